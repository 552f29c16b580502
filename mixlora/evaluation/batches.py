"""Which examples share a batch."""

from collections.abc import Iterator, Sequence


def batches(lengths: Sequence[int], most: int, budget: int) -> Iterator[list[int]]:
    """Places grouped by like length, the longest first.

    A batch has at most `most` rows and `budget` tokens, padding included; a row that is longer stands alone.
    """
    chosen: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if chosen and (len(chosen) == most or (len(chosen) + 1) * lengths[chosen[0]] > budget):
            yield chosen
            chosen = []
        chosen.append(i)
    if chosen:
        yield chosen
