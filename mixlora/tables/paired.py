"""Two runs, example by example: who won where, and whether that can be chance.

    0/1 scores    McNemar's exact test: of the b + c examples on which the runs differ, b ~ Binomial(b + c, 1/2)
    other scores  sign flips: without a difference between the runs, that of each example may as well be its negative.
                  All 2^m flips of the m examples that differ, or 10,000 of them with a fixed seed

The p values of the tasks are corrected by Holm's step-down procedure (`statistics.holm`).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from mixlora.errors import ConfigError, DataError
from mixlora.records import read_json, read_lines
from mixlora.tables import statistics
from mixlora.tables.runs import predictions_path

FLIPS, SEED = 10_000, 0
SAME = 1e-12  # what equal sums may differ by, relative to them


@dataclass(frozen=True)
class Paired:
    """One task. `won` are the examples on which B is better than A; `p_holm` is corrected over all tasks.

    `differ` is the share of examples to which the runs give another prediction, right or wrong.
    """

    task: str
    metric: str
    a: float
    b: float
    n: int
    differ: float
    won: tuple[str, ...]
    lost: tuple[str, ...]
    test: str
    p: float
    p_holm: float


def compare(a: Path, b: Path) -> list[Paired]:
    """The tasks that both folders scored.

    Raises:
        ConfigError: no results, no task in common, or scores that are not of the same examples, prompts and protocol.
        DataError: an example without prediction.
    """
    results = [results_of(folder) for folder in (a, b)]
    shared = [name for name in scored(results[0]) if name in scored(results[1])]
    if not shared:
        tasks = "; ".join(f"{f}: {', '.join(r) or 'none'}" for f, r in zip((a, b), results, strict=True))
        raise ConfigError(f"the runs have no scored task in common ({tasks})")
    wrong = [f"task {name}: {what}" for name in shared for what in differing(results[0][name], results[1][name])]
    if wrong:
        raise ConfigError(f"{a} and {b} cannot be compared, these differ:\n  " + "\n  ".join(wrong))
    found = [compare_task(name, results[0][name]["metric"], (a, b), [r[name]["n"] for r in results]) for name in shared]
    corrected = statistics.holm([one["p"] for one in found])
    return [Paired(**one, p_holm=p) for one, p in zip(found, corrected, strict=True)]


def alone(a: Path, b: Path) -> tuple[list[str], list[str]]:
    """The tasks that only the first folder scored, and those that only the second did."""
    one, other = (scored(results_of(folder)) for folder in (a, b))
    return [name for name in one if name not in other], [name for name in other if name not in one]


def scored(results: Mapping[str, Any]) -> list[str]:
    return [name for name, result in results.items() if result["value"] is not None]


def results_of(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    if not path.is_file():
        raise ConfigError(f"{folder} has no results.json: give the folder of a finished run or of an evaluation")
    found = read_json(path)
    assert isinstance(found, dict)
    return found


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What makes two scores of one task incomparable. Rows that were only trained on may differ."""
    found = [f"{key} ({a.get(key)} and {b.get(key)})" for key in ("metric", "n") if a.get(key) != b.get(key)]
    before, after = a.get("protocol", {}), b.get("protocol", {})
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            found.append(f"protocol.{key} ({before.get(key)} and {after.get(key)})")
    if scored_data(a) != scored_data(b):
        found.append(f"the scored data (sha256 {scored_data(a)!s:.12} and {scored_data(b)!s:.12})")
    if a.get("prompts") != b.get("prompts"):
        found.append(f"the prompts (fingerprints {a.get('prompts')!s:.12} and {b.get('prompts')!s:.12})")
    return found


def scored_data(result: Mapping[str, Any]) -> str | None:
    """sha256 of the rows that were scored; a validation split that was held out comes from train."""
    data = result.get("data", {})
    value = data.get(result.get("protocol", {}).get("split", "test"), data.get("train"))
    return None if value is None else str(value)


def compare_task(name: str, metric: str, folders: Sequence[Path], numbers: Sequence[int]) -> dict[str, Any]:
    scores = []
    for folder, number in zip(folders, numbers, strict=True):
        path = predictions_path(folder, name)
        rows = {row["id"]: row for row in read_lines(path)}
        if len(rows) != number:
            raise DataError(f"{path} has {len(rows)} predictions for {number} scored examples. Evaluate the run again")
        scores.append(rows)
    a, b = scores
    other = [i for i, row in a.items() if i not in b or not same_example(row, b[i])]
    if other:
        raise ConfigError(f"task {name}: the runs were not scored on the same examples: {', '.join(other[:5])} differ")
    values = np.array([[rows[i][metric] for i in a] for rows in (a, b)], dtype=float)
    change = values[1] - values[0]
    binary = bool(np.isin(values, (0.0, 1.0)).all())
    won = tuple(i for i, d in zip(a, change, strict=True) if d > 0)
    lost = tuple(i for i, d in zip(a, change, strict=True) if d < 0)
    return {
        "task": name,
        "metric": metric,
        "a": float(values[0].mean()),
        "b": float(values[1].mean()),
        "n": len(a),
        "differ": sum(said(a[i], metric) != said(b[i], metric) for i in a) / len(a),
        "won": won,
        "lost": lost,
        "test": "McNemar" if binary else "sign flips",
        "p": mcnemar(len(won), len(lost)) if binary else sign_flips(change),
    }


def same_example(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Of kept records only the target is there; their prompts have one fingerprint, which `differing` compares."""
    asked = all("prompt" in row for row in (a, b))
    return bool(a["target"] == b["target"]) and (not asked or bool(a["prompt"] == b["prompt"]))


def said(row: Mapping[str, Any], metric: str) -> Any:
    """The replies of all samples, or the prediction; of a row that keeps neither (the harness's), its score."""
    if "samples" in row:
        return [sample["reply"] for sample in row["samples"]]
    return row.get("prediction", row[metric])


def mcnemar(won: int, lost: int) -> float:
    """Exact and two-sided; 1 where the runs differ nowhere."""
    return float(stats.binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def sign_flips(change: np.ndarray, flips: int = FLIPS, seed: int = SEED) -> float:
    """Two-sided p of the mean: how often flipped signs take it as far from 0; exact where `flips` are all there are."""
    differ = change[change != 0]
    least = abs(differ.sum()) * (1 - SAME)
    if 2 ** len(differ) <= flips:
        signs = np.array([*itertools.product((1, -1), repeat=len(differ))])
        return float((np.abs(signs @ differ) >= least).mean())
    draw = np.random.default_rng(seed)
    sums = np.array([np.where(draw.random(len(differ)) < 0.5, 1, -1) @ differ for _ in range(flips)])
    return float((1 + (np.abs(sums) >= least).sum()) / (1 + flips))
