"""Solved examples that stand before a question: drawn from the training rows by seed, never from what is scored."""

from collections.abc import Iterable, Sequence

from mixlora.errors import DataError
from mixlora.tasks import overlap
from mixlora.tasks.example import Example
from mixlora.tasks.mixture import seed_of


def draw(task: str, train: Sequence[Example], scored: Iterable[Example], number: int, seed: int) -> list[Example]:
    """`number` examples of `train` whose question is not scored; the same for every question of the task.

    A larger number keeps the examples of a smaller one, nearest to the question.

    Raises:
        DataError: there are not so many.
    """
    if number == 0:
        return []
    import numpy as np

    forbidden = set[bytes]().union(*map(overlap.keys, scored))
    order = np.random.default_rng(seed_of("few-shot", seed, task)).permutation(len(train))
    chosen: list[Example] = []
    for place in order:
        if len(chosen) == number:
            break
        if forbidden.isdisjoint(overlap.keys(train[place])):
            chosen.append(train[place])
    if len(chosen) < number:
        raise DataError(
            f"eval.num_fewshot={number}, but task {task} has {len(chosen)} training rows to draw from. "
            "Lower it, or give the task a training split (one that is not to be trained on: weight=0, not eval_only)"
        )
    return chosen[::-1]
