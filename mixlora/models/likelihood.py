"""How likely a model finds the labels of a batch.

Answers end at the last position of a left-padded batch, so logits are computed for the last K positions alone
(transformers' `logits_to_keep`): full logits over a large vocabulary never exist.

    B rows   S positions   K kept positions   V vocabulary
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlora.tasks.collate import IGNORED, Batch


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model can compute the logits of its last positions alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def answer_losses(model: nn.Module, batch: Batch, *, keep_logits: bool) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in nats and number of label tokens of each row: [B], [B]."""
    first = int((batch.labels_BS != IGNORED).any(0).nonzero()[0])
    keep = batch.labels_BS.shape[1] - first + 1  # the label at t is predicted at t - 1
    extra = {"logits_to_keep": keep} if keep_logits else {}
    logits = model(
        input_ids=batch.input_ids_BS,
        attention_mask=batch.attention_mask_BS,
        position_ids=batch.position_ids_BS,
        **extra,
    ).logits
    logits_BKV = logits[:, -keep:-1]
    labels_BK = batch.labels_BS[:, first:]
    precise = torch.promote_types(logits.dtype, torch.float32)
    nats_BK = F.cross_entropy(
        logits_BKV.to(precise).flatten(0, 1), labels_BK.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(labels_BK)
    return nats_BK.sum(-1), (labels_BK != IGNORED).sum(-1)
