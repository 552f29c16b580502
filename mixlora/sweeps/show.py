"""What a person sees of a sweep: a live table on a terminal, lines in a log file, the points in order at the end."""

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd
from rich.live import Live
from rich.table import Table

from mixlora.console import console, say
from mixlora.records import error_of_mean, log_path, of_mean, read_json, write_text
from mixlora.sweeps.points import Point

LOOK_SECONDS = 2.0  # between two looks at the run folders
FRAME_LINES = 8  # of the live table and around it, besides its points
SETTLED = ("done", "done before", "failed", "waiting")  # the other states are of points that run


class Board:
    """The state of every point while the sweep runs."""

    def __init__(self, points: Sequence[Point]) -> None:
        self.states = {point: "done before" if point.finished else "waiting" for point in points}
        self.progress: dict[Point, str] = {}
        self.live: Live | None = None
        self.looked = float("-inf")
        self.refusal = ""  # what was last said of a point that could not be started

    def __enter__(self) -> "Board":
        if console.is_terminal:
            self.live = Live(self.table(), console=console, refresh_per_second=2)
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.update(self.table())
            self.live.stop()
            self.live = None

    def told(self, point: Point, event: str, failure: object = None) -> None:
        """Something happened to a point."""
        self.states[point] = "running" if event == "started" else event
        if event == "done":
            self.progress[point] = point.progress
        done = sum(state.startswith("done") for state in self.states.values())
        if failure is not None:
            say(f"FAILED {point.name}: {failure}\n  log: {log_path(point.folder)}")
        elif self.live is None and event == "started":
            say(f"Running {point.name}  (log: {log_path(point.folder)})")
        elif self.live is None:
            say(f"{event.capitalize()} {point.name}  ({done} of {len(self.states)})")

    def refused(self, why: str) -> None:
        """A point could not be started yet; that is said once, not at every try."""
        if why != self.refusal:
            self.refusal = why
            say(f"{why}\nIt is tried again, for other runs go on")

    def sees(self, point: Point, state: str) -> None:
        """The point still runs; `state` is what its place says of it."""
        self.states[point] = state
        if self.live is not None and time.monotonic() - self.looked > LOOK_SECONDS:
            self.looked = time.monotonic()
            self.live.update(self.table())

    def table(self) -> Table:
        """Every point; where the terminal is too low for that, those that run, and of all others their number."""
        counts = Counter(state if state in SETTLED else "running" for state in self.states.values())
        told = ", ".join(f"{counts[state]} {state}" for state in ("running", *SETTLED) if counts[state])
        table = Table(title=f"sweep: {told}", title_justify="left")
        for column in ("point", "state", "progress"):
            table.add_column(column, overflow="fold")
        self.progress |= {point: point.progress for point, state in self.states.items() if state not in SETTLED}
        rows = list(self.states.items())
        if len(rows) > (room := max(1, console.height - FRAME_LINES)):
            rows = [row for row in rows if row[1] not in SETTLED][:room]
        for point, state in rows:
            table.add_row(point.name, state, self.progress.get(point, ""))
        return table


# ---- at the end


@dataclass(frozen=True)
class Score:
    """Mean over tasks, what `of_mean` calls it, its standard error, number of examples, and which tasks these are."""

    mean: float
    of: str
    error: float | None
    n: int
    tasks: str


def score(folder: Path) -> Score | None:
    """None where nothing was scored."""
    path = folder / "results.json"
    results = read_json(path) if path.is_file() else {}
    label, names = of_mean(results)
    found = [results[name] for name in names]
    if not found:
        return None
    error = error_of_mean([r["stderr"] for r in found])
    mean = sum(r["value"] for r in found) / len(found)
    return Score(mean, label, error, sum(r["n"] for r in found), " ".join(sorted(names)))


COLUMNS = ("point", "score", "of", "stderr", "n", "tasks", "split", "state", "run")


def summary(points: Sequence[Point], states: Mapping[Point, str], splits: Sequence[str]) -> pd.DataFrame:
    """One row a point, the best first of those that score the same tasks and split; those without a score last."""
    rows: list[dict[str, Any]] = []
    for point, split in zip(points, splits, strict=True):
        found = score(point.folder) if point.finished else None
        known = {"score": found.mean, "of": found.of, "stderr": found.error} if found else {}
        known |= {"n": found.n, "tasks": found.tasks} if found else {}
        place = {"point": point.name, "split": split, "state": states[point], "run": str(point.folder)}
        rows.append(dict.fromkeys(COLUMNS) | place | known)
    kinds = list(dict.fromkeys((row["tasks"], row["split"]) for row in rows if row["score"] is not None))

    def order(row: Mapping[str, Any]) -> tuple[int, float]:
        return (len(kinds), 0.0) if row["score"] is None else (kinds.index((row["tasks"], row["split"])), -row["score"])

    return pd.DataFrame(sorted(rows, key=order), columns=COLUMNS).astype({"n": "Int64"})


def is_one_ranking(frame: pd.DataFrame) -> bool:
    """Whether all scores are of the same tasks and split."""
    return len(frame[frame.score.notna()].groupby(["tasks", "split"])) < 2


def show(frame: pd.DataFrame) -> None:
    split, one = " and ".join(sorted(set(frame.split))), is_one_ranking(frame)
    means = " or ".join(sorted(set(frame.of.dropna()))) or "mean"
    table = Table(title=f"{means}, {split} split, percent ± standard error", title_justify="left")
    for column in ("point", "score", "n", *(() if one else ("tasks", "split")), "state"):
        numbers = column in ("score", "n")
        table.add_column(column, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    for row in frame.itertuples():
        known = not pd.isna(row.score)
        error = "" if pd.isna(row.stderr) else f" ± {100 * row.stderr:.1f}"
        shown = f"{100 * row.score:.1f}{error}" if known else "—"
        of = [] if one else [row.tasks if known else "", row.split]
        table.add_row(row.point, shown, str(row.n) if known else "", *of, row.state)
    console.print(table)
    if not one:
        say("Only points that score the same tasks and split are in order: the other means are of other questions")


def keep(frame: pd.DataFrame, points: Sequence[Point], root: Path) -> Path:
    """The summary as a file that the same sweep finds again."""
    name = hashlib.sha256("\n".join(sorted(str(p.folder) for p in points)).encode()).hexdigest()[:8]
    path = root / "sweeps" / f"{name}.csv"
    write_text(path, frame.to_csv(index=False))
    return path
