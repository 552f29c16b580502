"""From tokenised rows to tensors: padded on the left, so that every answer ends at the last position, or packed into
one line without padding, each row with positions of its own.

B rows   S positions
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORED = -100


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
    def labels(self) -> list[int]:
        # The first token is predicted by nothing, so it can carry no loss.
        silent = 1 if self.loss_on_prompt else max(1, len(self.prompt_ids))
        return [IGNORED] * silent + self.tokens[silent:]


@dataclass(frozen=True)
class Batch:
    """One micro-batch; `labels` is IGNORED where there is no loss.

    A packed batch is one line that holds its rows one after the other; `segments` has their lengths.
    """

    ids: tuple[str, ...]
    tasks: tuple[str, ...]
    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    position_ids_BS: Tensor
    labels_BS: Tensor
    segments: tuple[int, ...] = ()

    @property
    def label_tokens(self) -> int:
        return int((self.labels_BS != IGNORED).sum())

    @property
    def mask_BS(self) -> Tensor:
        return self.attention_mask_BS.bool()

    @property
    def row_BS(self) -> Tensor:
        """Which row every position belongs to."""
        index_B = torch.arange(len(self.ids), device=self.input_ids_BS.device)
        if self.segments:
            return index_B.repeat_interleave(torch.tensor(self.segments, device=index_B.device))[None]
        return index_B[:, None].expand_as(self.input_ids_BS)

    def to(self, device: torch.device) -> "Batch":
        names = ("input_ids_BS", "attention_mask_BS", "position_ids_BS", "labels_BS")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Pad `rows` on the left into one batch."""
    longest = max(map(len, rows))
    ids, labels, mask = [], [], []
    for row in rows:
        pad = longest - len(row)
        ids.append([pad_id] * pad + row.tokens)
        labels.append([IGNORED] * pad + row.labels)
        mask.append([0] * pad + [1] * len(row))
    mask_BS = torch.tensor(mask)
    position_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
    names = tuple(row.id for row in rows), tuple(row.task for row in rows)
    return Batch(*names, torch.tensor(ids), mask_BS, position_BS, torch.tensor(labels))


def pack(rows: Sequence[Row]) -> Batch:
    """One line that holds `rows` one after the other."""
    ids = torch.tensor([[token for row in rows for token in row.tokens]])
    labels = torch.tensor([[label for row in rows for label in row.labels]])
    positions = torch.tensor([[position for row in rows for position in range(len(row))]])
    names = tuple(row.id for row in rows), tuple(row.task for row in rows)
    return Batch(*names, ids, torch.ones_like(ids), positions, labels, tuple(map(len, rows)))


def padded_batches(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Batches of `size` rows; rows of like length stand together, which costs less padding."""
    ordered = sorted(rows, key=len)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


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
