"""The table that a run prints at its end, from the files of its folder alone."""

import shlex
from pathlib import Path
from typing import Any

from rich.table import Table

from mixlora.config.overrides import spelled
from mixlora.console import console, say
from mixlora.evaluation.scores import paired_difference
from mixlora.records import by_metric, caveats, error_of_mean, of_mean, read_json, read_lines

NOT_KNOWN = "–"  # a change of which predictions are missing


def print_results(folder: Path) -> None:
    """Score of each task with its standard error, before and after training where both are there, and where to look."""
    after = read_json(folder / "results.json")
    before_path = folder / "before" / "results.json"
    before = read_json(before_path) if before_path.is_file() else {}
    table = Table(title=folder.name, title_justify="left")
    shown = {"task": 0, "n": 1, "guess": 2} | ({"before": 3, "after": 4, "change": 5} if before else {"score": 4})
    for column in shown:
        table.add_column(column, justify="left" if column == "task" else "right", no_wrap=True)
    rows = [cells(folder, name, result, before.get(name)) for name, result in after.items()]
    for row in rows:
        table.add_row(*(row[place] for place in shown.values()))
    table.add_section()
    mean = mean_cells(folder, after, before)
    table.add_row(*(mean[place] for place in shown.values()))
    console.print(table)
    for note in notes(after, paired=bool(before)):
        say(note)
    say(f"Results: {folder / 'results.json'}\nPredictions: {folder / 'predictions'}")
    if (folder / "adapter").is_dir():
        say(f"Losses step by step: {folder / 'metrics.jsonl'}\nAdapter: {folder / 'adapter'}")
        run = shlex.quote(spelled("run", str(folder)))
        say(f'Talk to it: python -m mixlora.generate {run} prompt="..."')


def notes(results: dict[str, Any], *, paired: bool = True) -> list[str]:
    """What the table's numbers and marks mean."""
    metrics = {name: r["metric"] for name, r in results.items() if r["value"] is not None}
    change = "; change: paired" if paired else ""
    lines = [f"percent ± standard error; guess: the best constant answer{change}"]
    lines += [f"metric: {by_metric(metrics)}"] if metrics else []
    lines += [f"n={n}: the first {n} rows (eval.limit)" for n in {r["n"] for r in results.values() if is_cut_off(r)}]
    if any(not r.get("trained", True) for r in results.values()):
        lines.append("* not trained on")
    if any(not r.get("complete", True) for r in results.values()):
        lines.append("† the data set lacks rows here")
    for name, result in results.items():
        lines += [f"{name}: {some} of {n} {what}" for what, (some, n) in caveats(result).items()]
        number = result.get("protocol", {}).get("num_samples", 1)
        if number > 1 and result["value"] is not None:
            shown = (f"{m} {with_error(value, result['stderrs'][m])}" for m, value in result["metrics"].items())
            lines.append(f"{name}, {number} samples: {', '.join(shown)}")
    return lines + [f"{name}: {r['reason']}" for name, r in results.items() if r["value"] is None]


def is_cut_off(result: dict[str, Any]) -> bool:
    return result["value"] is not None and result.get("limit") == result["n"]


def cells(folder: Path, name: str, result: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    label = name + ("" if result.get("trained", True) else "*") + ("" if result.get("complete", True) else "†")
    if result["value"] is None:
        return [label, "0", "", "", "not run", ""]
    guess = "" if result["majority"] is None else percent(result["majority"])
    row = [label, str(result["n"]), guess]
    if before is None or before["value"] is None:
        return [*row, "", with_error(result["value"], result["stderr"]), ""]
    change, error, n = difference(folder, name, result["metric"])
    scores = with_error(before["value"], before["stderr"]), with_error(result["value"], result["stderr"])
    return [*row, *scores, with_error(change, error, "+") if n == result["n"] else NOT_KNOWN]


def mean_cells(folder: Path, after: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Unweighted mean over the trained tasks, with the standard error of the paired difference."""
    label, names = of_mean(after)
    if not names:
        return [label, "", "", "", "", ""]
    mean = sum(after[n]["value"] for n in names) / len(names)
    row = [label, str(sum(after[n]["n"] for n in names)), ""]
    if any(n not in before or before[n]["value"] is None for n in names):
        return [*row, "", percent(mean), ""]
    changes = [difference(folder, n, after[n]["metric"]) for n in names]
    known = all(n == after[name]["n"] for name, (_, _, n) in zip(names, changes, strict=True))
    change = sum(c for c, _, _ in changes) / len(names)
    error = error_of_mean([e for _, e, _ in changes])
    base = sum(before[n]["value"] for n in names) / len(names)
    return [*row, percent(base), percent(mean), with_error(change, error, "+") if known else NOT_KNOWN]


def difference(folder: Path, name: str, metric: str) -> tuple[float, float | None, int]:
    """Paired over the same examples: (mean change, its standard error, n)."""
    places = (folder / "before", folder)
    rows = [read_lines(place / "predictions" / f"{name}.jsonl") for place in places]
    return paired_difference(*({row["id"]: row[metric] for row in some} for some in rows))


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
