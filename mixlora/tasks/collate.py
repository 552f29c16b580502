"""From tokenised rows to tensors: padded on the left, so that every answer ends at the last position, or packed into
one line without padding, each row with positions of its own.

Lengths and labels are counted here, on the host, which then waits for no device to tell it.

    B rows (or one line)   S positions   N labels   K kept positions
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One tokenised example: the prompt and the continuation that carries loss or is scored."""

    id: str
    task: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    loss_on_prompt: bool = False

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt_ids, *self.answer_ids]

    @property
    def silent(self) -> int:
        """How many tokens at the front carry no loss; the first one is predicted by nothing."""
        return 1 if self.loss_on_prompt else max(1, len(self.prompt_ids))


@dataclass(frozen=True)
class Batch:
    """One micro-batch; a packed one is a single line that holds its rows one after the other.

    The label at t is predicted at t - 1. Positions at which any label is predicted are kept, in ascending order;
    `source`, `target` and `row` have one entry for each label.
    """

    ids: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]  # tokens of each row
    label_tokens: tuple[int, ...]  # labels of each row
    packed: bool
    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    position_ids_BS: Tensor
    kept_K: Tensor
    source_N: Tensor  # where it is predicted, in the flattened kept positions
    target_N: Tensor
    row_N: Tensor  # the row it belongs to

    @property
    def mask_BS(self) -> Tensor:
        return self.attention_mask_BS.bool()

    def to(self, device: torch.device) -> "Batch":
        tensors = {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}
        moved: dict[str, Any] = {name: t.to(device, non_blocking=True) for name, t in tensors.items()}
        return replace(self, **moved)


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Pad `rows` on the left into one batch."""
    longest = max(map(len, rows))
    return batch_of([[row] for row in rows], [longest - len(row) for row in rows], pad_id, packed=False)


def pack(rows: Sequence[Row]) -> Batch:
    """One line that holds `rows` one after the other."""
    return batch_of([rows], [0], 0, packed=True)


def batch_of(lines: Sequence[Sequence[Row]], pads: Sequence[int], pad_id: int, *, packed: bool) -> Batch:
    """Each line is its padding and its rows."""
    rows = [row for line in lines for row in line]
    ids, mask, positions = [], [], []
    found: list[tuple[int, int, int, int]] = []  # line and place where a label is predicted, the label, its row
    number = 0
    for b, (line, pad) in enumerate(zip(lines, pads, strict=True)):
        ids.append([pad_id] * pad + [token for row in line for token in row.tokens])
        mask.append([0] * pad + [1] * (len(ids[-1]) - pad))
        positions.append([0] * pad + [t for row in line for t in range(len(row))])
        start = pad
        for row in line:
            tokens = row.tokens
            found += [(b, start + t - 1, tokens[t], number) for t in range(row.silent, len(row))]
            start += len(row)
            number += 1
    kept = sorted({place for _, place, _, _ in found})
    index = {place: k for k, place in enumerate(kept)}
    source = [b * len(kept) + index[place] for b, place, _, _ in found]
    tensors = (ids, mask, positions, kept, source, [label for *_, label, _ in found], [row for *_, row in found])
    return Batch(
        tuple(row.id for row in rows),
        tuple(row.task for row in rows),
        tuple(map(len, rows)),
        tuple(len(row) - row.silent for row in rows),
        packed,
        *(torch.tensor(values, dtype=torch.int64) for values in tensors),
    )


def padded_batches(rows: Sequence[Row], size: int, ranks: int = 1) -> list[list[Row]]:
    """Batches of at most `size` rows, as many for each rank and about as large; rows of like length stand together,
    which costs less padding."""
    ordered = sorted(rows, key=len)
    count = ranks * -(-len(ordered) // (size * ranks))
    ends = [-(-len(ordered) * i // count) for i in range(count + 1)]
    return [ordered[first:last] for first, last in itertools.pairwise(ends)]


def packs(rows: Sequence[Row], count: int) -> list[list[Row]]:
    """`count` packs of as many rows and about as many tokens each: the longest row first, into the emptiest one."""
    filled: list[list[Row]] = [[] for _ in range(count)]
    tokens, most = [0] * count, -(-len(rows) // count)
    for row in sorted(rows, key=lambda row: (-len(row), row.id)):
        i = min((i for i in range(count) if len(filled[i]) < most), key=lambda i: tokens[i])
        filled[i].append(row)
        tokens[i] += len(row)
    return filled


def packs_for(rows: Sequence[Row], count: int, ranks: int) -> list[list[Row]]:
    """`count` packs, each cut into one for each rank: what ranks compute together does not depend on their number."""
    return [part for pack in packs(rows, count) for part in packs(pack, ranks)]


def packs_within(rows: Sequence[Row], max_tokens: int, ranks: int) -> list[list[Row]]:
    """As few packs as keep within `max_tokens`, as many for each rank (a row longer than that is a pack of its own)."""
    most = len(rows) // ranks
    for count in range(1, most):
        found = packs_for(rows, count, ranks)
        if all(found) and max(sum(map(len, pack)) for pack in found) <= max_tokens:
            return found
    return packs_for(rows, most, ranks)
