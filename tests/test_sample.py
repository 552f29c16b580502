"""The embedded sample: every task can use it, in the hub's schema, and nothing but reading the question helps.

A set that a rule of thumb could solve would show nothing about training, so the rules of thumb are tried here.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml

from mixlora import tasks
from mixlora.config.schema import Answer, Data, Task
from mixlora.config.typed import typed
from mixlora.tasks import overlap, sample

ROOT = Path(__file__).parents[1]
TINY = ROOT.parent / "shared" / "data" / "hub_tiny"
NAMES = sorted(path.stem for path in (ROOT / "configs" / "task").glob("*.yaml"))
SLACK = 0.12  # a rule of thumb may do so much better than chance on a hundred rows


@cache
def read(name: str) -> Task:
    return typed(Task, yaml.safe_load((ROOT / "configs" / "task" / f"{name}.yaml").read_text(encoding="utf-8")))


@cache
def load(name: str) -> tasks.TaskData:
    return tasks.load_task(read(name), Data(source="sample"))


OPTIONS = [name for name in NAMES if read(name).answer_kind is Answer.options]
PROGRAMS = [name for name in NAMES if read(name).answer_kind is Answer.code]
NUMBERS = [name for name in NAMES if read(name).answer_kind is Answer.number]


def splits(name: str) -> list[str]:
    """The splits that the task file names, as they are called in the set."""
    named = read(name).splits
    return [split for split in (named.train, named.validation, named.test) if split]


def rows(name: str, split: str) -> list[dict]:
    return sample.rows(read(name).path, read(name).config, split)


@pytest.mark.parametrize("name", NAMES)
def test_every_task_reads_the_sample(name):
    data, splits = load(name), read(name).splits
    assert len(data.test) >= 20
    assert bool(data.train) == bool(splits.train)
    assert not splits.validation or len(data.validation) >= 10
    assert not data.complete
    assert data.notes == []


def test_what_the_sample_lacks_has_no_rows():
    assert sample.rows("nobody/nothing", "default", "train") == []
    assert sample.rows("google/boolq", "default", "no such split") == []


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_is_the_hubs(name):
    folder = TINY / read(name).path / read(name).config
    if not folder.is_dir():
        pytest.skip(f"needs {folder.relative_to(ROOT.parent)} beside the repository")
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split in splits(name):
        file = next(f for f in (folder / f"{split}.parquet", *sorted(folder.glob("*.parquet"))) if f.is_file())
        schema = pq.read_schema(file).remove_metadata()
        table = pa.Table.from_pylist(rows(name, split), schema=schema)  # raises where a type does not fit
        assert set(rows(name, split)[0]) == set(schema.names)
        assert table.to_pylist() == rows(name, split)


def digest() -> str:
    text = json.dumps([sample.rows(*key, split) for key, found in sample.SETS.items() for split in found.sizes])
    return hashlib.sha256(text.encode()).hexdigest()


def test_another_process_makes_the_same_rows():
    code = "import sys; sys.path.insert(0, 'tests'); from test_sample import digest; print(digest())"
    environment = {**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": str(ROOT)}
    again = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert again.stdout.strip() == digest()


@pytest.mark.parametrize("name", NAMES)
def test_no_row_is_twice_nor_in_two_parts(name):
    found = [rows(name, split) for split in splits(name)]
    texts = [
        json.dumps({k: v for k, v in row.items() if k not in ("id", "idx", "ind")}) for part in found for row in part
    ]
    assert len(set(texts)) == len(texts)
    data = load(name)
    parts = [{key for row in part for key in overlap.keys(row)} for part in (data.train, data.validation, data.test)]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert not parts[0] & parts[1]


@pytest.mark.parametrize("name", OPTIONS)
def test_no_answer_is_frequent(name):
    """Neither an option's place nor its text is right much oftener than it is shown."""
    for part in (load(name).train, load(name).test):
        chance = sum(1 / len(example.options) for example in part) / len(part)
        counts = Counter(example.gold for example in part)
        assert max(counts.values()) / len(part) < chance + SLACK
        texts = Counter(example.answer for example in part)
        shown = Counter(text for example in part for text in example.options)
        common = {text: n for text, n in shown.items() if n >= 30}
        assert all(texts[text] / n < chance + 2 * SLACK for text, n in common.items())


@pytest.mark.parametrize("name", [name for name in OPTIONS if read(name).options.fixed is None])
@pytest.mark.parametrize("rule", [max, min])
def test_the_length_of_an_option_tells_nothing(name, rule):
    data = load(name)
    part = [*data.test, *data.train]
    chance = sum(1 / len(example.options) for example in part) / len(part)
    right = 0.0
    for example in part:
        best = [text for text in example.options if len(text) == rule(map(len, example.options))]
        right += (example.answer in best) / len(best)
    assert right / len(part) < chance + SLACK


@pytest.mark.parametrize("name", OPTIONS)
def test_the_question_is_needed(name):
    """The option that was right most often in training, whatever the question, is near chance in the test."""
    data = load(name)
    right = Counter(example.answer for example in data.train)
    shown = Counter(text for example in data.train for text in example.options)
    picked = [max(e.options, key=lambda text: right[text] / max(shown[text], 1)) == e.answer for e in data.test]
    chance = sum(1 / len(example.options) for example in data.test) / len(data.test)
    assert sum(picked) / len(picked) < chance + SLACK


@pytest.mark.parametrize("name", OPTIONS)
def test_the_sentences_of_the_test_are_new(name):
    """No test question is a training question with one word exchanged."""

    def frames(examples):
        words = [example.question.split() for example in examples]
        return {(place, *w[:place], *w[place + 1 :]) for w in words for place in range(len(w))}

    assert not frames(load(name).train) & frames(load(name).test)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_solutions_pass_their_tests(name):
    """The expected values come from other code than the solutions, so either could be wrong."""
    data = load(name)
    for example in [*data.train, *data.validation, *data.test]:
        given = example.row.get("prompt", "")
        space: dict = {}
        exec(given + example.answer + "\n" + example.tests, space)
        assert callable(space[example.entry_point])


@pytest.mark.parametrize("name", NUMBERS)
def test_the_arithmetic_is_right(name):
    data = load(name)
    for example in [*data.train, *data.validation, *data.test]:
        marks = re.findall(r"<<(\d+)([-+*])(\d+)=(\d+)>>(\d+)", example.answer)
        assert len(marks) == 2
        for left, sign, right, value, said in marks:
            a, b = int(left), int(right)
            assert int(value) == int(said) == {"+": a + b, "-": a - b, "*": a * b}[sign]
        assert example.answer.endswith(f"\n#### {marks[-1][-1]}")
        assert int(marks[-1][-1]) > 0
