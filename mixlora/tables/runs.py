"""One point of a recipe as its run folder tells of it: how far it got, and what it scored.

Only files are read (config.yaml, run.json, results.json, metrics.jsonl, predictions), so nothing here needs torch.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mixlora.errors import NumericsError
from mixlora.records import attempt_path, is_there, read_json, read_lines
from mixlora.tables.recipe import Point

# How far a point got; the words are what the table shows.
MISSING, FAILED, UNFINISHED, DIRTY, OTHER, DONE = "not run", "failed", "unfinished", "dirty", "other data", "done"


@dataclass
class Run:
    """One point with its folder, state, and why where it is not in the table."""

    point: Point
    folder: Path
    state: str = MISSING
    reason: str = ""
    exit_status: int | None = None  # of a run that failed, where it is known
    record: dict[str, Any] = field(default_factory=dict)  # run.json
    results: dict[str, Any] = field(default_factory=dict)  # results.json
    before: dict[str, Any] = field(default_factory=dict)  # results.json of the base model
    others: dict[str, str] = field(default_factory=dict)  # task -> what differs from the other runs

    def scored(self, task: str) -> bool:
        """Whether this run has a number for the table's cell of `task`."""
        return self.state == DONE and task not in self.others and self.results.get(task, {}).get("value") is not None

    @property
    def lost(self) -> bool:
        """Whether it failed for its numbers, as another try would; what was killed or found no room may yet be done. A
        run of an earlier version does not say."""
        return self.state == FAILED and self.exit_status in (NumericsError.status, None)

    @property
    def dirty(self) -> bool:
        return bool(self.record.get("git_dirty"))

    def predictions(self, task: str) -> list[dict[str, Any]]:
        """One record an example; empty where the file is not there."""
        return read_lines(predictions_path(self.folder, task))


def read_run(point: Point, folder: Path, include_dirty: bool) -> Run:
    path = folder / "run.json"
    failed = optional(attempt_path(folder))
    record = read_json(path) if path.is_file() else {}
    run = Run(point, folder, record=record)
    status = record.get("status")
    if status == "finished" and (folder / "results.json").is_file():
        run.results = read_json(folder / "results.json")
        run.before = optional(folder / "before" / "results.json")
        dirty = bool(record.get("git_dirty"))
        run.state = DIRTY if dirty and not include_dirty else DONE
        run.reason = "made with code that differs from its commit; include_dirty=true takes it in" if dirty else ""
    elif status == "failed" or failed:
        run.state = FAILED
        # Where a launcher ends with 1 whatever its ranks did, the run itself knows better.
        run.exit_status = record.get("exit_status") or failed.get("status")
        why = record.get("message", "its run.json says so")
        run.reason = f"exit status {failed['status']}: {failed['message']}" if failed else why
    elif record:
        run.state, run.reason = UNFINISHED, f"its run.json says {status}"
    return run


def validation_score(folder: Path, best: bool) -> float | None:
    """Mean validation score of the adapter that was kept: of the last step, or of the best one."""
    lines = read_lines(folder / "metrics.jsonl")
    scores = [line["validation_mean"] for line in lines if line.get("validation_mean") is not None]
    if not scores:
        return None
    return float(max(scores) if best else scores[-1])


# ---- single files


def optional(path: Path) -> Any:
    return read_json(path) if is_there(path) else {}


def config_values(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def predictions_path(folder: Path, task: str) -> Path:
    return folder / "predictions" / f"{task}.jsonl"
