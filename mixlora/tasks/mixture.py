"""Which row of which task each draw takes: a pure function of the seed, the task and the number of the draw.

    p_i = w_i n_i^a / sum_j w_j n_j^a     n rows of a task, w its weight, a = 1 proportional, 0 equal, 1/T temperature

The k-th draw of task i happens at a random moment of the interval [k / p_i, (k + 1) / p_i); the plan is all draws in
the order of their moments. So any stretch of the plan has the right shares up to a draw a task, a longer plan goes on
from a shorter one, and one epoch of the proportional mixture takes every row exactly once.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixlora.config.schema import Sampling
from mixlora.errors import ConfigError, DataError


@dataclass(frozen=True)
class Drawn:
    """What a plan really takes from one task; `passes` is rows / the size of the task."""

    rows: int
    distinct: int
    passes: float


@dataclass(frozen=True)
class Plan:
    """N draws: the task (a place in `tasks`) and the row of each."""

    tasks: tuple[str, ...]
    sizes: Mapping[str, int]  # rows in use, after the caps
    shares: Mapping[str, float]  # p
    task_N: NDArray[np.int32]
    row_N: NDArray[np.int64]

    def draws(self, first: int, number: int) -> list[tuple[str, int]]:
        """(task, row) of `number` draws from the `first` on."""
        stretch = slice(first, first + number)
        pairs = zip(self.task_N[stretch].tolist(), self.row_N[stretch].tolist(), strict=True)
        return [(self.tasks[task], row) for task, row in pairs]

    def drawn(self) -> dict[str, Drawn]:
        """What the whole plan takes of each task."""
        counts = np.bincount(self.task_N, minlength=len(self.tasks)).tolist()
        sizes = (self.sizes[task] for task in self.tasks)
        # Every pass takes each row once, so the distinct rows need no counting.
        return {t: Drawn(n, min(n, size), n / size) for t, n, size in zip(self.tasks, counts, sizes, strict=True)}


def plan(
    sizes: Mapping[str, int],
    weights: Mapping[str, float],
    *,
    sampling: Sampling = Sampling.proportional,
    temperature: float = 1.0,
    size_cap: int | None = None,
    caps: Mapping[str, int | None] | None = None,
    total: int,
    seed: int,
) -> Plan:
    """The first `total` draws of the mixture.

    Args:
        sizes: training rows of each task.
        weights: one a task, at least 0; with 0 a task is never drawn.
        size_cap: no task counts as larger than this in p (T5, arXiv:1910.10683, section 3.5.2).
        caps: a task with a cap uses so many of its rows, the same ones under every seed.

    Raises:
        ConfigError: a weight below 0, no weight above 0, a temperature or cap that is not positive.
        DataError: a task with a weight above 0 and no row.
    """
    used = {task: min(n, (caps or {}).get(task) or n) for task, n in sorted(sizes.items())}
    shares = probabilities(used, weights, sampling=sampling, temperature=temperature, size_cap=size_cap)
    tasks = tuple(task for task in used if shares[task] > 0)
    # When `total` draws are made, the moment is before total + tasks: until then each task is behind by less than one.
    counts = [math.ceil((total + len(tasks)) * shares[task]) + 1 for task in tasks]
    moments = [moments_of(task, n, shares[task], seed) for task, n in zip(tasks, counts, strict=True)]
    task_M = np.repeat(np.arange(len(tasks), dtype=np.int32), counts)
    first_N = np.argsort(np.concatenate(moments), kind="stable")[:total]
    task_N = task_M[first_N]
    row_N = np.empty(total, dtype=np.int64)
    for i, task in enumerate(tasks):
        mine = task_N == i
        row_N[mine] = rows_of(task, sizes[task], used[task], int(mine.sum()), seed)
    return Plan(tasks, {task: used[task] for task in tasks}, shares, task_N, row_N)


def probabilities(
    sizes: Mapping[str, int],
    weights: Mapping[str, float],
    *,
    sampling: Sampling,
    temperature: float = 1.0,
    size_cap: int | None = None,
) -> dict[str, float]:
    """p of each task; see the top of this file. Raises as `plan` does."""
    for task, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ConfigError(f"tasks.mixture.{task}.weight must be a number of at least 0, got {weight}")
        if weight > 0 and task in sizes and sizes[task] == 0:
            raise DataError(f"task {task} has weight {weight} and no training row. Give it weight=0 or eval_only=true")
    if not temperature > 0:
        raise ConfigError(f"tasks.temperature must be above 0, got {temperature}")
    if size_cap is not None and size_cap < 1:
        raise ConfigError(f"tasks.size_cap must be at least 1, got {size_cap}")
    power = {Sampling.proportional: 1.0, Sampling.equal: 0.0, Sampling.temperature: 1 / temperature}[sampling]
    mass = {task: weights[task] * min(n, size_cap or n) ** power if n else 0.0 for task, n in sizes.items()}
    whole = math.fsum(mass.values())
    if not whole > 0:
        raise ConfigError(f"the weights of the tasks {', '.join(sorted(sizes)) or '(none)'} sum to 0: nothing to draw")
    return {task: m / whole for task, m in mass.items()}


def moments_of(task: str, number: int, share: float, seed: int) -> NDArray[np.float64]:
    jitter = np.random.default_rng(seed_of(seed, task, "moments")).random(number)
    return (np.arange(number) + jitter) / share


def rows_of(task: str, size: int, used: int, number: int, seed: int) -> NDArray[np.int64]:
    """The first `number` rows of a task: pass after pass, each a fresh permutation of the `used` rows."""
    pool = np.random.default_rng(seed_of(task, "cap")).permutation(size)[:used] if used < size else np.arange(size)
    passes = [
        pool[np.random.default_rng(seed_of(seed, task, epoch)).permutation(used)] for epoch in range(-(-number // used))
    ]
    return np.concatenate([*passes, np.empty(0, dtype=np.int64)])[:number]


def seed_of(*parts: object) -> int:
    """One seed for a tuple of names and numbers, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")
