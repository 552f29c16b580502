"""Scores as pure functions: from what a model said to numbers with their uncertainty.

The three aggregates are `evaluate.Metric`s, which work without a hub.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import evaluate


@dataclass(frozen=True)
class Score:
    """A mean over n examples with its standard error (sample deviation / sqrt n) and Wilson's 95 % interval."""

    value: float
    stderr: float
    n: int
    interval: tuple[float, float]


def mean_score(correct: Sequence[float]) -> Score:
    """Score of one number an example, each in [0, 1]."""
    value, stderr = mean_and_error(correct)
    return Score(value, stderr, len(correct), wilson(value, len(correct)))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, sample deviation / sqrt n."""
    n = len(values)
    mean = sum(values) / n
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(n - 1, 1) / n)


def wilson(share: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description=self.__doc__ or "", citation="", features=features)

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        hits = sum(p == r for p, r in zip(predictions, references, strict=True))
        return {"accuracy": hits / len(references)}


# How the log-likelihood of an option becomes its score; the name is also the metric's.
NORMALISERS = {
    "acc": lambda nats, text, tokens: nats,
    "acc_norm": lambda nats, text, tokens: nats / max(len(text.encode()), 1),
    "acc_token": lambda nats, text, tokens: nats / max(tokens, 1),
}


def choose(nats: Sequence[float], texts: Sequence[str], tokens: Sequence[int]) -> dict[str, int]:
    """The option with the highest score under each normaliser: summed, per byte, per token; the first of equals."""
    chosen = {}
    for name, normalise in NORMALISERS.items():
        scores = [normalise(*option) for option in zip(nats, texts, tokens, strict=True)]
        chosen[name] = max(range(len(scores)), key=lambda i: (scores[i], -i))
    return chosen


def fold(text: str) -> str:
    """Lower case, no punctuation at the ends, single blanks."""
    return " ".join(text.lower().split()).strip(" .,;:!?\"'")


NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?|-?\$?\.\d+")


def strict_number(text: str) -> str | None:
    """The number after `####`, as GSM8K's answers end; None where there is none."""
    found = re.search(r"####\s*(" + NUMBER.pattern + ")", text.replace("−", "-"))
    return canonical_number(found[1]) if found else None


def last_number(text: str) -> str | None:
    """The last number anywhere in the text: 1,234 and $18 and 3/4 and -2.50 count, units after it do not matter."""
    found = NUMBER.findall(text.replace("−", "-"))
    return canonical_number(found[-1]) if found else None


def canonical_number(text: str) -> str:
    """One spelling for equal numbers: "1,234.50" -> "1234.5", "3/4" -> "0.75"."""
    plain = text.replace(",", "").replace("$", "")
    above, _, below = plain.partition("/")
    value = float(above) / float(below) if below and float(below) else float(above)
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def majority_share(golds: Sequence[Any]) -> float:
    """Share of the most frequent gold answer: what a constant guess would score."""
    counts: dict[Any, int] = {}
    for gold in golds:
        counts[gold] = counts.get(gold, 0) + 1
    return max(counts.values()) / len(golds)


def paired_difference(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[float, float, int]:
    """Mean of after - before over the same examples (by id), its standard error, and n."""
    shared = sorted(set(before) & set(after))
    if not shared:
        return 0.0, 0.0, 0
    return *mean_and_error([after[i] - before[i] for i in shared]), len(shared)
