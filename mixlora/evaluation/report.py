"""The table that a run prints at its end, from the files of its folder alone."""

from pathlib import Path
from typing import Any

from rich.table import Table

from mixlora.console import console, say
from mixlora.evaluation.scores import paired_difference
from mixlora.records import read_json, read_lines


def print_results(folder: Path) -> None:
    """Score of each task before and after training with its standard error, and where to look next."""
    after = read_json(folder / "results.json")
    before_path = folder / "before" / "results.json"
    before = read_json(before_path) if before_path.is_file() else {}
    table = Table(title=folder.name)
    for column in ("task", "n", "metric", "majority", "before", "after", "change (paired)"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for name, result in after.items():
        table.add_row(*cells(folder, name, result, before.get(name)))
    table.add_section()
    table.add_row(*mean_cells(folder, after, before))
    console.print(table)
    for name, result in after.items():
        if result["value"] is None:
            say(f"{name}: {result['reason']}")
    say(f"Results: {folder / 'results.json'}   predictions: {folder / 'predictions'}")
    say(f"Losses step by step: {folder / 'metrics.jsonl'}   adapter: {folder / 'adapter'}")
    say(f'Talk to it: python -m mixlora.generate run={folder} prompt="..."')


def cells(folder: Path, name: str, result: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    if result["value"] is None:
        return [name, "0", result["metric"], "", "", "not run", ""]
    label = name if result.get("trained", True) else f"{name} (not trained)"
    label += "" if result.get("complete", True) else " (incomplete set)"
    majority = "" if result["majority"] is None else percent(result["majority"])
    row = [label, str(result["n"]), result["metric"], majority]
    if before is None or before["value"] is None:
        return [*row, "", with_error(result["value"], result["stderr"]), ""]
    change, error, _ = difference(folder, name, result["metric"])
    return [
        *row,
        with_error(before["value"], before["stderr"]),
        with_error(result["value"], result["stderr"]),
        f"{100 * change:+.1f} ± {100 * error:.1f}",
    ]


def mean_cells(folder: Path, after: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Unweighted mean over the trained tasks, with the standard error of the paired difference."""
    names = [n for n, r in after.items() if r["value"] is not None and r.get("trained", True)]
    if not names:
        return ["mean", "", "", "", "", "", ""]
    mean = sum(after[n]["value"] for n in names) / len(names)
    row = ["mean of trained", str(sum(after[n]["n"] for n in names)), "", ""]
    if any(n not in before or before[n]["value"] is None for n in names):
        return [*row, "", percent(mean), ""]
    changes = [difference(folder, n, after[n]["metric"]) for n in names]
    change = sum(c for c, _, _ in changes) / len(names)
    error = sum(e * e for _, e, _ in changes) ** 0.5 / len(names)
    base = sum(before[n]["value"] for n in names) / len(names)
    return [*row, percent(base), percent(mean), f"{100 * change:+.1f} ± {100 * error:.1f}"]


def difference(folder: Path, name: str, metric: str) -> tuple[float, float, int]:
    """Paired over the same examples: (mean change, its standard error, n)."""
    scores = [
        {row["id"]: row[metric] for row in read_lines(place / "predictions" / f"{name}.jsonl")}
        for place in (folder / "before", folder)
    ]
    return paired_difference(*scores)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def with_error(value: float, error: float) -> str:
    return f"{100 * value:.1f} ± {100 * error:.1f}"
