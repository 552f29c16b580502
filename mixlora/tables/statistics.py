"""Means over seeds, and whether two methods can be told apart.

    d_st = score of one method − score of another on example t with seed s, averaged over examples and seeds

Examples and seeds are crossed: every seed scores the same examples. So the variance of the mean has a part from the
examples and a part from the seeds (a two-way analysis of variance without replication):

    V = MS_examples / (n S) + max(0, MS_seeds − MS_rest) / (n S)        n examples, S seeds

t = mean / sqrt(V) has Satterthwaite's degrees of freedom. With one seed only the examples are left, and the test is the
ordinary paired t-test. Over several tasks the mean is the unweighted mean of the tasks' means.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Table = NDArray[np.float64]  # [S, n]: one row a seed, one column an example


@dataclass(frozen=True)
class Difference:
    """Mean of a − b, its standard error, and the two-sided p that there is none."""

    mean: float
    error: float
    p: float


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample deviation; no deviation of a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def difference(tasks: Sequence[Table]) -> Difference:
    """The test over the tables of d, one a task, all with the same seeds.

    Raises:
        ValueError: no task, an empty table, or tables with different numbers of seeds.
    """
    if not tasks or any(d.ndim != 2 or not d.size for d in tasks) or len({d.shape[0] for d in tasks}) > 1:
        raise ValueError("every task needs examples, and all tasks the same seeds")
    S, T = tasks[0].shape[0], len(tasks)
    mean = float(np.mean([d.mean() for d in tasks]))
    parts = [squares(d) for d in tasks]
    examples = sum(p.examples / (d.size * T * T) for p, d in zip(parts, tasks, strict=True))
    rest = sum(p.rest / (d.size * T * T) for p, d in zip(parts, tasks, strict=True))
    by_seed = np.mean([d.mean(1) for d in tasks], axis=0)
    seeds = float(by_seed.var(ddof=1)) / S if S > 1 else 0.0
    variance = examples + max(0.0, seeds - rest)
    if variance <= 1e-18:
        return Difference(mean, 0.0, without_spread(mean, min(d.shape[1] for d in tasks)))
    freedom = variance**2 / slack(parts, tasks, seeds if seeds > rest else 0.0)
    p = 2 * float(stats.t.sf(abs(mean) / math.sqrt(variance), freedom))
    return Difference(mean, math.sqrt(variance), p)


@dataclass(frozen=True)
class Squares:
    """Mean squares of one task."""

    examples: float
    rest: float


def squares(d: Table) -> Squares:
    S, n = d.shape
    of_examples, of_seeds = d.mean(0), d.mean(1)
    examples = S * float(((of_examples - d.mean()) ** 2).sum()) / max(n - 1, 1)
    if S < 2 or n < 2:
        return Squares(examples, 0.0)
    rest = d - of_examples[None, :] - of_seeds[:, None] + d.mean()
    return Squares(examples, float((rest**2).sum()) / ((n - 1) * (S - 1)))


def slack(parts: Sequence[Squares], tasks: Sequence[Table], seeds: float) -> float:
    """Satterthwaite's denominator: the sum of squared parts of the variance over their degrees of freedom."""
    T, total = len(tasks), 0.0
    for part, d in zip(parts, tasks, strict=True):
        S, n = d.shape
        total += (part.examples / (d.size * T * T)) ** 2 / max(n - 1, 1)
        if seeds and S > 1:
            total += (part.rest / (d.size * T * T)) ** 2 / max((n - 1) * (S - 1), 1)
    return total + (seeds**2 / (tasks[0].shape[0] - 1) if seeds else 0.0)


def without_spread(mean: float, n: int) -> float:
    """Every example differs by the same amount: the sign test is all that is left."""
    return 1.0 if abs(mean) < 1e-12 else float(stats.binomtest(n, n).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p of each comparison, in their order.

    Sorted p_(1) ≤ … ≤ p_(m) become max_{j≤i} min(1, (m − j + 1) p_(j)).
    """
    adjusted, highest = [0.0] * len(p), 0.0
    for place, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = highest
    return adjusted


def paired(a: Mapping[int, Mapping[str, float]], b: Mapping[int, Mapping[str, float]]) -> Table | None:
    """seed -> id -> score of two methods as the table of their differences; None without a shared seed and example."""
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    ids = sorted(set.intersection(*(set(some[s]) for some in (a, b) for s in seeds)))
    if not ids:
        return None
    return np.array([[a[s][i] - b[s][i] for i in ids] for s in seeds], dtype=np.float64)
