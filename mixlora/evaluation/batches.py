"""Which examples share a batch."""

from collections.abc import Iterator, Sequence


def batches(lengths: Sequence[int], most: int, budget: int, spare: int | None = None) -> Iterator[list[int]]:
    """Places grouped by like length, the longest first.

    A batch has at most `most` rows and `budget` tokens, padding included, of which at most `spare` are padding; a row
    that is longer stands alone.
    """
    chosen: list[int] = []
    padding = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if chosen:
            padding += (longest := lengths[chosen[0]]) - lengths[i]
            full = len(chosen) == most or (len(chosen) + 1) * longest > budget
            if full or (spare is not None and padding > spare):
                yield chosen
                chosen, padding = [], 0
        chosen.append(i)
    if chosen:
        yield chosen
