"""Means over seeds, and whether two methods can be told apart.

    d_st = score of one method − score of another on example t with seed s, averaged over examples and seeds

Examples and seeds are crossed: every seed scores the same examples. So the variance of the mean has a part from the
examples and a part from the seeds:

    V = MS_examples / (n S) + var_seeds / S        n examples, S seeds

    MS_examples = S · var over examples of the means over seeds,  var_seeds = var over seeds of the means over examples

t = mean / sqrt(V) has Satterthwaite's degrees of freedom, V² / Σ (part² / df) with df n − 1 and S − 1. What is left of
d beside examples and seeds is in both parts, so V is a little too large. It is not subtracted: by chance nothing would
remain of the seeds, and the test would then claim the degrees of freedom of the examples. With one seed only the
examples are left, and the test is the ordinary paired t-test. Over several tasks the mean is the unweighted mean of the
tasks' means, MS_examples / (n S) is summed over the T tasks and divided by T², and var_seeds is of their mean.

Three seeds are few: by chance those of two methods agree, and V is then too small. The other methods of a column have
seeds as well, so var_seeds is no less than what is usual among M methods

    var_usual = median of var_seeds over all pairs / (median of χ²_{S−1} / (S − 1))        df (M − 1)(S − 1)

A mean over the pairs would be a little surer where all methods vary alike, but one that fails once would hide what the
others differ by. A pair that varies more than is usual is judged by itself. With one seed nothing is known of seeds.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Table = NDArray[np.float64]  # [S, n]: one row a seed, one column an example


@dataclass(frozen=True)
class Spread:
    """How much one seed of a difference varies, and the degrees of freedom of that variance."""

    variance: float
    freedom: int


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


def usual(scores: Sequence[Sequence[float]]) -> Spread | None:
    """var_usual of scores [M, S]: one row a method, one column a seed. None where there is one seed, or no third row:
    two methods know no more than their difference."""
    M = len(scores)
    S = len(scores[0]) if M else 0
    if M < 3 or S < 2:
        return None
    pairs = [np.subtract(a, b).var(ddof=1) for a, b in itertools.combinations(scores, 2)]
    return Spread(float(np.median(pairs) * (S - 1) / stats.chi2.median(S - 1)), (M - 1) * (S - 1))


def difference(tasks: Sequence[Table], others: Spread | None = None) -> Difference:
    """The test over the tables of d, one a task, all with the same seeds.

    Args:
        others: how much seeds usually vary, see `usual`.

    Raises:
        ValueError: no task, an empty table, or tables with different numbers of seeds.
    """
    if not tasks or any(d.ndim != 2 or not d.size for d in tasks) or len({d.shape[0] for d in tasks}) > 1:
        raise ValueError("every task needs examples, and all tasks the same seeds")
    S, T = tasks[0].shape[0], len(tasks)
    mean = float(np.mean([d.mean() for d in tasks]))
    parts = [(of_examples(d) / T**2, d.shape[1] - 1) for d in tasks]
    by_seed = np.mean([d.mean(1) for d in tasks], axis=0)
    spread = Spread(float(by_seed.var(ddof=1)) if S > 1 else 0.0, S - 1)
    if others is not None and others.variance > spread.variance:
        spread = others
    parts.append((spread.variance / S, spread.freedom))
    variance = sum(part for part, _ in parts)
    if variance <= 1e-18:
        return Difference(mean, 0.0, without_spread(mean, min(d.shape[1] for d in tasks)))
    freedom = variance**2 / sum(part**2 / max(df, 1) for part, df in parts)
    p = 2 * float(stats.t.sf(abs(mean) / math.sqrt(variance), freedom))
    return Difference(mean, math.sqrt(variance), p)


def of_examples(d: Table) -> float:
    """MS_examples / (n S); nothing of a single example."""
    n = d.shape[1]
    return float(d.mean(0).var(ddof=1)) / n if n > 1 else 0.0


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
