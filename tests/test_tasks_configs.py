"""Every file under configs/task and configs/tasks composes, fits its type, and reads real rows."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from mixlora import tasks
from mixlora.config.schema import Answer, Data, Mixture, Options, Overlap, Splits, Task
from mixlora.config.typed import typed
from mixlora.errors import DataError
from mixlora.models.tokenizer import byte_tokenizer
from mixlora.tasks import overlap
from mixlora.tasks.data import against_overlap
from mixlora.tasks.mixture import plan
from mixlora.tasks.parse import Reader
from mixlora.tasks.prompts import Formatter
from mixlora.tasks.template import template

ROOT = Path(__file__).parents[1]
HUB, TINY = (ROOT.parent / "shared" / "data" / name for name in ("hub", "hub_tiny"))
NAMES = sorted(path.stem for path in (ROOT / "configs" / "task").glob("*.yaml"))
MIXTURES = sorted(path.stem for path in (ROOT / "configs" / "tasks").glob("*.yaml"))
needs_tiny = pytest.mark.skipif(not TINY.is_dir(), reason="needs ../shared/data/hub_tiny")
needs_hub = pytest.mark.skipif(not HUB.is_dir(), reason="needs ../shared/data/hub")


def read(name: str) -> Task:
    return typed(Task, yaml.safe_load((ROOT / "configs" / "task" / f"{name}.yaml").read_text(encoding="utf-8")))


def mixture(name: str, *overrides: str) -> Mixture:
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return typed(Mixture, compose("train", overrides=["method=lora", f"tasks={name}", *overrides]).tasks)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_file_is_whole(name):
    task = read(name)
    Reader.of(task)
    assert task.name == name
    assert task.splits.test
    assert task.splits.validation != task.splits.test
    assert task.splits.train != task.splits.test
    comment = (ROOT / "configs" / "task" / f"{name}.yaml").read_text(encoding="utf-8").split("\nname:")[0]
    assert "Licence:" in comment
    assert f"Reported on: {task.splits.test}" in comment


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_holds_whole_tasks(name):
    found = mixture(name)
    assert found.name == name
    assert all(task.name == key for key, task in found.mixture.items())
    assert any(task.splits.train and not task.eval_only for task in found.mixture.values())
    switches = {key: (task.train_only, task.eval_only) for key, task in found.mixture.items()}
    for key, task in found.mixture.items():
        original = read(key)
        original.train_only, original.eval_only = switches[key]
        assert task == original


def test_the_command_line_reaches_a_task_of_a_mixture():
    found = mixture("arc", "tasks.mixture.arc_easy.weight=2", "tasks.mixture.arc_easy.cap=10")
    assert (found.mixture["arc_easy"].weight, found.mixture["arc_easy"].cap) == (2.0, 10)


def test_programming_is_trained_on_one_set_and_scored_on_another():
    for name in ("humaneval", "math_code_med", "multi"):
        found = mixture(name).mixture
        assert found["mbpp"].train_only
        assert found["humaneval"].eval_only


@needs_tiny
@pytest.mark.parametrize("name", NAMES)
def test_real_rows_become_prompts(name):
    task = read(name)
    if not (TINY / task.path / task.config).is_dir():
        pytest.skip(f"{TINY} has no {task.path} {task.config}")
    data = tasks.load_task(task, Data(source=str(TINY)))
    assert len(data.test) == 16
    assert not data.complete
    form = Formatter(byte_tokenizer(), Data())
    for example in [*data.train, *data.test]:
        shown = form.show(example)
        assert shown.endswith(f"{example.answer}<|end|>⟧")
        assert example.question in shown
        assert "{" not in task.question or example.question != task.question
        assert (example.gold is not None) == (task.answer_kind is Answer.options)


def test_the_question_of_mbpp_gives_the_functions_name():
    row = {"text": "Twice.", "code": "def twice(x): ...", "test_list": ["assert twice(1) == 2"], "test_setup_code": ""}
    example = Reader.of(read("mbpp"))(row, "mbpp/test/0")
    assert "assert twice(1) == 2" in example.question
    assert example.entry_point == "twice"


@pytest.mark.full
@needs_hub
def test_the_commonsense_mixture_of_the_mirror():
    """Row counts are those of the published sets; HellaSwag has no training rows there, and none are made up."""
    data = tasks.load(mixture("commonsense"), Data(source=str(HUB), overlap=Overlap.note), seed=0)
    published = {
        "boolq": (9427, 3270), "piqa": (16113, 1838), "siqa": (33410, 1954), "winogrande": (40398, 1267),
        "arc_easy": (2251, 2376), "arc_challenge": (1119, 1172), "openbookqa": (4957, 500), "hellaswag": (0, 10042),
    }  # fmt: skip
    assert {name: (len(d.train) + d.held_out, len(d.test)) for name, d in data.items()} == published
    assert [name for name, d in data.items() if any("not trained" in note for note in d.notes)] == ["hellaswag"]
    again = {name: len(d.trained_on["test"]) for name, d in data.items() if d.trained_on["test"]}
    assert again == {"arc_easy": 4, "arc_challenge": 1, "openbookqa": 15, "piqa": 4}
    assert [name for name, d in data.items() if not d.complete] == ["hellaswag"]
    sizes = {name: len(d.train) for name, d in data.items() if d.train}
    drawn = plan(sizes, dict.fromkeys(sizes, 1.0), total=sum(sizes.values()), seed=0).drawn()
    assert all(d.passes == 1 for d in drawn.values())


REPEATED = {  # (test, validation) rows of the published sets that are also in train
    "openbookqa": (15, 8), "cola": (19, 0), "arc_easy": (4, 1), "arc_challenge": (1, 0), "mbpp": (3, 0), "piqa": (4, 0),
    "sst2": (2, 0), "boolq": (1, 0), "gsm8k": (0, 0),
}  # fmt: skip


# One with rows in both splits, one with few and one with none each time; the rest now and then.
OFTEN = ("openbookqa", "mbpp", "gsm8k")


@needs_hub
@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.full) for n in REPEATED])
def test_known_overlaps_stop_a_run_with_count_ids_and_remedy(name):
    test, validation = REPEATED[name]
    data = tasks.load_task(read(name), Data(source=str(HUB)))
    if data.held_out:
        data = replace(data, train=[*data.train, *data.validation], validation=[])
    if not test:
        against_overlap({name: data}, Overlap.error)
        return
    with pytest.raises(DataError) as raised:
        against_overlap({name: data}, Overlap.error)
    said = str(raised.value)
    assert f"task {name}: {test} of {len(data.test):,} test rows are also trained on: {name}/test/" in said
    assert (f"{validation} of {len(data.validation)} validation rows" in said) == bool(validation)
    assert "data.overlap=drop" in said
    dropped = against_overlap({name: data}, Overlap.drop)[name]
    assert not dropped.trained_on["test"]
    assert len(dropped.test) == len(data.test)
    assert 0 < len(data.train) - len(dropped.train) < 2 * (test + validation) + 5


@needs_hub
@pytest.mark.parametrize(
    "published",
    [{"arc_easy": 16, "arc_challenge": 6}, {"mbpp": 53}, {"gsm8k": 3}, {"medqa": 415}],
    ids=lambda published: next(iter(published)),
)
def test_thirteen_words_in_a_row_count_as_published_for_the_sets(published):
    """Test rows that share them with any training row of the tasks that are trained on together."""
    data = [tasks.load_task(read(name), Data(source=str(HUB))) for name in published]
    trained = [example for d in data for example in [*d.train, *(d.validation if d.held_out else ())]]
    found = {d.name: len(overlap.resembling(d.test, trained)) for d in data}
    assert found == published


@pytest.mark.parametrize("name", NAMES)
def test_words_that_a_task_file_adds_are_no_part_of_what_is_compared(name):
    """The same question in the words of another task is the same, and no run of words comes from a template."""
    task = read(name)
    text = template(task.identity or task.question, name)
    assert not any(map(str.isalnum, "".join(text.literals)))


@needs_hub
def test_resembling_rows_of_gsm8k_are_noted():
    data = tasks.load_task(read("gsm8k"), Data(source=str(HUB)))
    found = against_overlap({"gsm8k": data}, Overlap.error)["gsm8k"]
    assert len(found.resembling) == 3
    assert any("3 of 1,319 test rows have 13 words in a row in common" in note for note in found.notes)


@needs_hub
def test_a_part_of_a_set_carries_the_mark():
    data = tasks.load_task(read("medqa"), Data(source=str(HUB)))
    assert not data.complete
    assert any("1,925 of 10,178" in note for note in data.notes)


def own_task(**values) -> Task:
    base = {"name": "mine", "path": "x.jsonl", "question": "{q}", "options": Options(fixed=["a", "b"]), "answer": "key"}
    return Task(**(base | values), splits=Splits(test="all"))


def test_what_was_left_out_of_a_task_file_has_a_neutral_default():
    task = own_task()
    assert (task.weight, task.cap, task.where, task.cue) == (1.0, None, None, "\nAnswer:")
