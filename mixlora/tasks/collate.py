"""From tokenised rows to tensors. Rows are padded on the left, so that every answer ends at the last position.

B rows   S positions
"""

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Batch:
    """One micro-batch; `labels` is IGNORED where there is no loss."""

    ids: tuple[str, ...]
    tasks: tuple[str, ...]
    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    position_ids_BS: Tensor
    labels_BS: Tensor

    @property
    def label_tokens(self) -> int:
        return int((self.labels_BS != IGNORED).sum())

    @property
    def mask_BS(self) -> Tensor:
        return self.attention_mask_BS.bool()

    def to(self, device: torch.device) -> "Batch":
        tensors = (self.input_ids_BS, self.attention_mask_BS, self.position_ids_BS, self.labels_BS)
        return Batch(self.ids, self.tasks, *(t.to(device) for t in tensors))


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Pad `rows` on the left into one batch."""
    longest = max(len(row.prompt_ids) + len(row.answer_ids) for row in rows)
    ids, labels, mask = [], [], []
    for row in rows:
        tokens = [*row.prompt_ids, *row.answer_ids]
        # The first token is predicted by nothing, so it can carry no loss.
        silent = 1 if row.loss_on_prompt else len(row.prompt_ids)
        pad = longest - len(tokens)
        ids.append([pad_id] * pad + tokens)
        labels.append([IGNORED] * (pad + silent) + tokens[silent:])
        mask.append([0] * pad + [1] * len(tokens))
    mask_BS = torch.tensor(mask)
    position_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
    names = tuple(row.id for row in rows), tuple(row.task for row in rows)
    return Batch(*names, torch.tensor(ids), mask_BS, position_BS, torch.tensor(labels))
