"""Scores as pure functions: from what a model said to numbers with their uncertainty."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixlora.errors import NumericsError


@dataclass(frozen=True)
class Score:
    """A mean over n examples with its standard error (sample deviation / sqrt n; None of one) and Wilson's 95 %
    interval."""

    value: float
    stderr: float | None
    n: int
    interval: tuple[float, float]


def mean_score(correct: Sequence[float]) -> Score:
    """Score of one number an example, each in [0, 1]."""
    value, stderr = mean_and_error(correct)
    return Score(value, stderr, len(correct), wilson(value, len(correct)))


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, sample deviation / sqrt n; no error of a single value."""
    n = len(values)
    mean = sum(values) / n
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None


def wilson(share: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def finite(nats: Sequence[float], of: str) -> list[float]:
    """Log-likelihoods to six places; among numbers that are none the first option would always be the likeliest.

    Raises:
        NumericsError: one that is not finite, of the example `of`.
    """
    if not all(map(math.isfinite, nats)):
        raise NumericsError(
            f"the log-likelihoods of {of} are not finite ({', '.join(map(str, nats))}). {NumericsError.WIDER}"
        )
    return [round(n, 6) for n in nats]


# How the log-likelihood of an option becomes its score; the name is also the metric's.
NORMALISERS = {
    "acc": lambda nats, length, tokens: nats,
    "acc_norm": lambda nats, length, tokens: nats / max(length, 1),
    "acc_token": lambda nats, length, tokens: nats / max(tokens, 1),
}


def choose(nats: Sequence[float], lengths: Sequence[int], tokens: Sequence[int]) -> dict[str, int]:
    """The option with the highest score under each normaliser: summed, by length, per token; the first of equals."""
    chosen = {}
    for name, normalise in NORMALISERS.items():
        scores = [normalise(*option) for option in zip(nats, lengths, tokens, strict=True)]
        chosen[name] = max(range(len(scores)), key=lambda i: (scores[i], -i))
    return chosen


def majority_share(golds: Sequence[Any]) -> float:
    """Share of the most frequent gold answer: what a constant guess would score."""
    counts: dict[Any, int] = {}
    for gold in golds:
        counts[gold] = counts.get(gold, 0) + 1
    return max(counts.values()) / len(golds)


def paired_difference(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[float, float | None, int]:
    """Mean of after - before over the same examples (by id), its standard error, and n."""
    shared = sorted(set(before) & set(after))
    if not shared:
        return 0.0, None, 0
    return *mean_and_error([after[i] - before[i] for i in shared]), len(shared)
