"""How likely a model finds the labels of a batch.

Logits are computed where a label is predicted and nowhere else, a few rows at a time, and their gradient with them:
full logits over a large vocabulary never exist. A model whose logits are more than its head's product (a soft cap, a
scale) is asked for its last positions instead.

    B rows   S positions   N labels   K kept positions   D hidden   V vocabulary
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlora.models.packing import Segments
from mixlora.tasks.collate import IGNORED, Batch

CHUNK = 2**23  # logits at a time


class AnswerLosses:
    """Summed cross-entropy in nats and number of label tokens of each row: [B], [B].

    The model is entered at its front, so that what wraps it for several devices is in effect; inside, its head is told
    to turn hidden states into nats at once.
    """

    def __init__(self, model: nn.Module):
        self.head = plain_head(model)
        self.keep_logits = keeps_logits(model)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """`model` is the one that this was made for, or a wrapper of it."""
        head = self.head
        if head is None:
            return answer_losses(model, batch, keep_logits=self.keep_logits)
        row_N, place_N = (batch.labels_BS != IGNORED).nonzero(as_tuple=True)
        target_N, first = batch.labels_BS[row_N, place_N], int(place_N.min()) - 1
        inputs = model_inputs(batch)
        if self.keep_logits:
            inputs["logits_to_keep"] = places_from(first, batch)

        def nats(hidden_BKD: Tensor) -> Tensor:
            before = batch.labels_BS.shape[1] - hidden_BKD.shape[1]
            hidden_ND = hidden_BKD[row_N, place_N - 1 - before]  # the label at t is predicted at t - 1
            return ChunkedNats.apply(hidden_ND, head.weight, head.bias, target_N)

        with instead(head, nats):
            nats_N = model(**inputs).logits
        return summed(nats_N, batch.row_BS[row_N, place_N], len(batch.ids))


@contextmanager
def instead(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Calls of `module` compute `forward` inside the block; its hooks stay in effect."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


class ChunkedNats(torch.autograd.Function):
    """hidden [N, D], frozen W [V, D] and b, targets [N] -> -log softmax(W h + b) at the target: [N].

    The gradient of the nats is known as soon as the logits are, so they are used for both and dropped.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, W: Tensor, b: Tensor | None, target_N: Tensor) -> Tensor:
        precise = torch.promote_types(hidden_ND.dtype, torch.float32)
        nats, slopes = [], []
        size = max(1, CHUNK // len(W))
        for hidden_nD, target_n in zip(hidden_ND.split(size), target_N.split(size), strict=True):
            log_nV = F.linear(hidden_nD, W, b).to(precise).log_softmax(-1)
            nats.append(-log_nV.gather(-1, target_n[:, None])[:, 0])
            if ctx.needs_input_grad[0]:
                slope_nV = log_nV.exp_()
                slope_nV[torch.arange(len(target_n), device=target_n.device), target_n] -= 1
                slopes.append(slope_nV.to(W.dtype) @ W)
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(nats)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (slope_ND,) = ctx.saved_tensors
        return slope_ND * gradients[0][:, None].to(slope_ND.dtype), None, None, None


def summed(nats_N: Tensor, row_N: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Sum and number of the nats of each row."""
    sums_B = nats_N.new_zeros(rows).index_add(0, row_N, nats_N)
    return sums_B, torch.bincount(row_N, minlength=rows)


def model_inputs(batch: Batch) -> dict[str, Any]:
    """What a model is called with. A pack has no padding: its rows are told apart by their positions."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids_BS, "position_ids": batch.position_ids_BS}
    if batch.segments:
        return inputs | {"segments": Segments(batch.segments)}
    return inputs | {"attention_mask": batch.attention_mask_BS}


def places_from(first: int, batch: Batch) -> Tensor:
    """The positions from `first` to the end, as `logits_to_keep` takes them: where it is a number instead, some models
    leave positions out of their last layers, whose gates would see fewer tokens."""
    return torch.arange(first, batch.labels_BS.shape[1], device=batch.labels_BS.device)


@torch.no_grad()
def plain_head(model: Any) -> nn.Linear | None:
    """The model's head, if the logits are what it returns and nothing is done to them after: tried on two tokens."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear:
        return None
    found: list[Tensor] = []

    def recorded(hidden: Tensor) -> Tensor:
        found.append(F.linear(hidden, head.weight, head.bias))
        return found[-1]

    with evaluating(model), instead(head, recorded):
        logits = model(input_ids=torch.tensor([[0, 1]], device=model.device)).logits
    return head if len(found) == 1 and torch.equal(logits, found[0]) else None


@torch.no_grad()
def packs_rows(model: Any) -> bool:
    """Whether rows that are packed are each computed as if alone: tried on two short rows.

    Not with recurrent layers or positions that the model makes itself, for example. What such short rows cannot show
    is what a model does by place in the line and only far from its beginning.
    """
    if all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values()):
        return False
    first, other, row = ([0, 1, 2], [2, 3, 0], [3, 1])
    position_ids = torch.tensor([[0, 1, 2, 0, 1]], device=model.device)

    def logits(*rows: list[int], **packed: Any) -> Tensor:
        ids = torch.tensor([[i for row in rows for i in row]], device=model.device)
        found: Tensor = model(input_ids=ids, **packed).logits
        return found.cpu().double()

    with evaluating(model):
        alone = torch.cat([logits(first), logits(row)], dim=1)
        beside = logits(first, row, position_ids=position_ids, segments=(3, 2))
        beside_another = logits(other, row, position_ids=position_ids, segments=(3, 2))
    # Another neighbour changes nothing, not even how the machine rounds, except where a layer sorts tokens by expert.
    # Alone, a row may be multiplied by another routine, whose rounding adds up over the layers.
    eps = torch.finfo(model.dtype).eps
    leaked, apart = (beside_another - beside)[:, 3:].norm(), (beside - alone).norm()
    return bool(leaked <= eps**0.7 * alone.norm() and apart <= eps**0.5 * alone.norm())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside the block."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model can compute the logits of its last positions alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def answer_losses(model: nn.Module, batch: Batch, *, keep_logits: bool) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in nats and number of label tokens of each row: [B], [B]."""
    if batch.segments:
        return packed_losses(model, batch, keep_logits=keep_logits)
    first = int((batch.labels_BS != IGNORED).any(0).nonzero()[0]) - 1  # the label at t is predicted at t - 1
    extra = {"logits_to_keep": places_from(first, batch)} if keep_logits else {}
    logits = model(**model_inputs(batch), **extra).logits
    labels_BK = batch.labels_BS[:, first + 1 :]
    logits_BKV = logits[:, -labels_BK.shape[1] - 1 : -1]
    nats_BK = cross_entropy(logits_BKV.flatten(0, 1), labels_BK.flatten()).view_as(labels_BK)
    return nats_BK.sum(-1), (labels_BK != IGNORED).sum(-1)


def packed_losses(model: nn.Module, batch: Batch, *, keep_logits: bool) -> tuple[Tensor, Tensor]:
    place_N = (batch.labels_BS[0] != IGNORED).nonzero()[:, 0]
    extra = {"logits_to_keep": place_N - 1} if keep_logits else {}
    logits_SV = model(**model_inputs(batch), **extra).logits[0]
    logits_NV = logits_SV if keep_logits else logits_SV[place_N - 1]
    nats_N = cross_entropy(logits_NV, batch.labels_BS[0, place_N])
    return summed(nats_N, batch.row_BS[0, place_N], len(batch.ids))


def cross_entropy(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """In nats, in float32 at least; zero where the target is IGNORED."""
    precise = torch.promote_types(logits_NV.dtype, torch.float32)
    return F.cross_entropy(logits_NV.to(precise), target_N, ignore_index=IGNORED, reduction="none")
