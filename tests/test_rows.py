"""Whole runs: which rows are trained on and which are scored, and what is said of those that are not."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tiny_runs import REPOSITORY, evaluate, task_folder, train

from mixlora.config.schema import Config, Task
from mixlora.errors import DataError
from mixlora.parts import Parts
from mixlora.records import read_json
from mixlora.tasks import TaskData
from mixlora.tasks.example import Example

ONE_STEP = ("method=mole", "train.max_steps=1", "train.save_steps=1", "train.gradient_accumulation_steps=1")
TRAINED_ONLY = ("tasks=both", "++tasks.mixture.sums.train_only=true")
HUB = REPOSITORY.parent / "shared" / "data" / "hub"


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> Path:
    """The task `sums`, and mixtures of it and others over files of their own."""
    folder = task_folder(tmp_path_factory.mktemp("configs"))
    sums = yaml.safe_load((folder / "task" / "sums.yaml").read_text())
    tested = sums | {"name": "tested", "splits": {"train": None, "validation": None, "test": "[50:]"}}
    said = [{"q": f"Say {i}.", "a": f"word {i}"} for i in range(130)]
    lengthy = " ".join(["word"] * 100)
    for name, long in (("texts", ()), ("long_test", (120,)), ("long_train", (7,))):
        rows = [row | ({"a": lengthy} if i in long else {}) for i, row in enumerate(said)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        splits = {"train": "[:105]", "validation": "[105:115]", "test": "[115:]"}
        text = {"name": name, "path": str(folder / f"{name}.jsonl"), "splits": splits, "question": "{q}", "answer": "a"}
        text |= {"answer_kind": "text", "metric": "exact_match", "max_new_tokens": 4}
        (folder / "task" / f"{name}.yaml").write_text(yaml.safe_dump(text))
    (folder / "tasks").mkdir()
    both = {"name": "both", "mixture": {"sums": sums, "tested": tested}}
    (folder / "tasks" / "both.yaml").write_text(yaml.safe_dump(both))
    return folder


def evaluated(*overrides: str, status: int = 0) -> str:
    done = evaluate(*overrides)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def validated(configs, tmp_path_factory) -> Path:
    """A run that is scored on validation rows, which one of its tasks does not have."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    job = (*ONE_STEP, "tasks=both", "eval.split=validation", "report=true")
    done = train(configs, folder, *job)
    assert done.returncode == 0, done.stderr
    assert "tested: there are no validation rows" in done.stdout
    assert train(configs, folder, *job).returncode == 0  # shown
    return folder


def test_a_task_without_rows_of_the_split_is_not_scored_and_the_run_ends(validated):
    for place in (validated, validated / "before"):
        found = read_json(place / "results.json")
        assert found["sums"]["n"] == 6
        assert found["sums"]["protocol"]["split"] == "validation"
        assert (found["tested"]["value"], found["tested"]["n"]) == (None, 0)
    assert set(read_json(validated / "routing.json")["loads"]) == {"sums"}
    assert (validated / "report.html").is_file()


def test_a_task_is_trained_where_its_rows_were_and_not_where_it_has_some(configs, validated):
    """Scored again on other tasks than those of training; a model that nobody trained has none."""
    said = evaluated("--config-dir", str(configs), f"run={validated}", "tasks=texts", "eval.split=test", "eval.limit=3")
    (again,) = (validated / "evaluations").glob("texts-*")
    assert read_json(again / "results.json")["texts"]["trained"] is False
    assert "texts*" in said
    assert "* not trained on" in said
    root = f"output_root={configs / 'bare'}"
    said = evaluated("--config-dir", str(configs), "model=tiny", "tasks=sums", "eval.limit=3", root)
    (bare,) = (configs / "bare").glob("tiny-sums-*")
    assert read_json(bare / "results.json")["sums"]["trained"] is False


@pytest.mark.skipif(not HUB.is_dir(), reason="needs ../shared/data/hub")
def test_a_model_that_is_not_trained_has_seen_none_of_the_rows(tmp_path):
    """OpenBookQA's public splits overlap, which would stop a training."""
    said = evaluated("model=tiny", "tasks=openbookqa", f"data.source={HUB}", "eval.limit=3", f"output_root={tmp_path}")
    assert "also trained on" not in said


def test_a_mixture_without_a_row_of_the_split_is_refused_at_once(configs, tmp_path):
    done = train(configs, tmp_path / "run", *ONE_STEP, *TRAINED_ONLY, "eval.split=validation")
    assert done.returncode == 2
    assert "eval.split=validation: no task of tasks=both has validation rows" in done.stderr


def test_a_long_answer_among_scored_rows_does_not_end_a_run(configs, tmp_path):
    done = train(configs, tmp_path / "run", *ONE_STEP, "tasks=long_test", "train.max_length=64")
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "run" / "results.json")["long_test"]["n"] == 15


def test_a_long_answer_is_left_out_of_training_and_said_and_all_other_draws_stay(configs, tmp_path):
    """Another row is drawn in its place; it ended a run in the step that drew it."""
    job = (*ONE_STEP, "train.max_steps=27", "train.per_device_train_batch_size=4", "eval.before=false", "eval.limit=1")
    done = train(configs, tmp_path / "run", *job, "tasks=long_train", "train.max_length=64")
    assert done.returncode == 0, done.stderr
    said = (
        "1 of 105 training rows have an answer that leaves no room for the question in train.max_length=64: long_train/"
    )
    assert said in " ".join(done.stdout.split())
    assert said in read_json(tmp_path / "run" / "run.json")["notes"][0]


def test_more_long_answers_than_may_be_left_out_are_said_before_the_model_is_loaded(configs, tmp_path):
    done = train(configs, tmp_path / "run", *ONE_STEP, "tasks=long_test", "train.max_length=8")
    assert done.returncode == 3
    assert "105 of 105 training rows have an answer that leaves no room" in done.stderr
    assert "Loading" not in done.stdout


def test_the_row_in_place_of_a_long_one_is_the_next_that_fits(monkeypatch):
    rows = [Example(id=f"t/train/{i}", task="t", question="q", answer="a") for i in range(400)]
    parts = Parts(Config())
    parts.__dict__["formatter"] = SimpleNamespace(fits=lambda example, most: example not in long)
    data = TaskData(name="t", task=Task(name="t"), train=rows)
    long = [rows[0], rows[5], rows[6], rows[399]]
    assert parts.next_that_fits(data) == {0: 1, 5: 7, 6: 7, 399: 1}
    long = rows[:5]
    with pytest.raises(DataError, match="5 of 400 training rows"):
        parts.next_that_fits(data)


def test_of_the_rows_that_are_scored_those_that_are_also_trained_on_are_counted():
    rows = [Example(id=f"t/test/{i}", task="t", question="q", answer="a") for i in range(4)]
    data = TaskData(name="t", task=Task(name="t"), train=rows, test=rows, trained_on={"test": ["t/test/1", "t/test/3"]})
    parts = Parts(Config())
    parts.__dict__["trained"] = {"t": data}
    assert parts.also_trained_on(data) == 2
    parts.config.eval.limit = 3
    assert parts.also_trained_on(data) == 1
    parts.__dict__["trained"] = {"t": TaskData(name="t", task=data.task)}  # whose rows could not be read
    assert parts.also_trained_on(data) is None


def test_the_best_step_cannot_be_kept_where_nothing_is_validated(configs, tmp_path):
    best = ("train.eval_steps=1", "train.load_best=true")
    done = train(configs, tmp_path / "run", *ONE_STEP, *best, *TRAINED_ONLY)
    assert done.returncode == 2
    assert "train.eval_steps=1 scores validation rows, and no task that is scored here has any" in done.stderr


def test_an_epoch_counts_the_rows_that_can_be_drawn(configs, tmp_path):
    job = ("method=lora", "train.max_steps=null", "train.epochs=1", "eval.before=false", "eval.limit=2")
    drawn = ("tasks=both", "tasks.mixture.tested.splits.train='[:44]'", "++tasks.mixture.tested.weight=0")
    done = train(configs, tmp_path / "run", *job, *drawn)
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "run" / "run.json")["steps"] == 44 // 4
