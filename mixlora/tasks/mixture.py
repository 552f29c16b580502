"""Which row of which task each draw takes: a pure function of (seed, task, number of the draw)."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mixlora.config.schema import Sampling


@dataclass(frozen=True)
class Drawn:
    rows: int
    distinct: int
    passes: float


@dataclass(frozen=True)
class Plan:
    tasks: tuple[str, ...]
    sizes: Mapping[str, int]
    task_N: np.ndarray
    row_N: np.ndarray

    def draws(self, first: int, number: int) -> list[tuple[str, int]]:
        return [(self.tasks[t], int(r)) for t, r in zip(self.task_N[first : first + number], self.row_N[first : first + number], strict=True)]

    def drawn(self) -> dict[str, Drawn]:
        out = {}
        for i, task in enumerate(self.tasks):
            rows = self.row_N[self.task_N == i]
            out[task] = Drawn(len(rows), len(np.unique(rows)), len(rows) / self.sizes[task])
        return out


def seed_of(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def plan(sizes, weights, *, sampling: Sampling, temperature: float, size_cap, caps, total: int, seed: int) -> Plan:
    tasks = tuple(sorted(sizes))
    sizes = {t: min(sizes[t], caps.get(t) or sizes[t]) for t in tasks}
    n = np.array([min(sizes[t], size_cap or sizes[t]) for t in tasks], dtype=float)
    w = np.array([weights[t] for t in tasks])
    power = {Sampling.proportional: 1.0, Sampling.equal: 0.0, Sampling.temperature: 1 / temperature}[sampling]
    p = w * n**power
    task_N = np.random.default_rng(seed_of(seed, "tasks")).choice(len(tasks), size=total, p=p / p.sum())
    row_N = np.zeros(total, dtype=np.int64)
    for i, task in enumerate(tasks):
        count = int((task_N == i).sum())
        passes = -(-count // sizes[task])
        order = [np.random.default_rng(seed_of(seed, task, e)).permutation(sizes[task]) for e in range(passes)]
        row_N[task_N == i] = np.concatenate([*order, np.zeros(0, dtype=np.int64)])[:count]
    return Plan(tasks, sizes, task_N, row_N)
