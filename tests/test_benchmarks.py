"""The README's figures are those of benchmarks/results, and every benchmark runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
BENCHMARKS = REPOSITORY / "benchmarks"
NEEDS_PEER = {"peers"}  # an environment of its own
NO_SCRIPTS = {"common", "layers", "training", "report", "run"}
SCRIPTS = sorted({path.stem for path in BENCHMARKS.glob("*.py")} - NO_SCRIPTS - NEEDS_PEER)


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import report

    return report


def row(**values):
    blank = {"figure": "step", "setting": "float32", "value": 0.5, "goal": None, "at_least": False, "low": None}
    blank |= {"high": None, "noisy": False, "met": None}
    return blank | values


def result(*rows):
    return {"machine": {"device": "a CPU", "threads": 2}, "date": "2026-01-02", "rows": list(rows)}


def test_the_readme_has_what_the_results_say(report):
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert report.with_summary(text, report.read(report.RESULTS)) == text


def test_a_summary_says_what_was_met_missed_and_noisy(report):
    readme = "a\n<!-- made by benchmarks/report.py -->\nold\n<!-- end -->\nb\n"
    rows = [row(goal=1.0, met=True), row(goal=2.0, at_least=True, met=False, noisy=True), row(figure="no goal")]
    made = report.with_summary(readme, [result(*rows)])
    assert made.startswith("a\n<!-- made")
    assert made.endswith("<!-- end -->\nb\n")
    assert "| step | float32 | 0.500 | ≤ 1 | met |" in made
    assert "| step | float32 | 0.500 | ≥ 2 | not met, noisy |" in made
    assert "Measured on: a CPU, 2 threads, 2026-01-02." in made
    assert "old" not in made
    assert "no goal" not in made


def test_a_readme_without_its_marks_is_said(report):
    with pytest.raises(SystemExit, match="has no"):
        report.with_summary("nothing", [])


@pytest.mark.full
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_runs(name, tmp_path):
    command = [sys.executable, BENCHMARKS / f"{name}.py", "--quick", "--threads", "1", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = tmp_path.glob("*-quick.json")
    rows = json.loads(written.read_text(encoding="utf-8"))["rows"]
    assert rows
    assert all(r["value"] > 0 for r in rows)
