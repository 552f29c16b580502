"""How likely a model finds the tokens of a batch: labels that it learns, options that it scores.

Logits are computed where such a token is predicted and nowhere else, a few rows at a time, and their gradient with
them: full logits over a large vocabulary never exist. A model whose logits are more than its head's product (a soft
cap, a scale) is asked for those positions instead.

    B rows   S positions   N labels   K kept positions   D hidden   V vocabulary
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlora.config.schema import Quantization
from mixlora.errors import NumericsError
from mixlora.models.base import attention, quantized
from mixlora.models.packing import Segments, for_flash
from mixlora.tasks.collate import Batch, Row, collate

CHUNK = 2**23  # logits at a time
DEVICE_CHUNK = 2**26  # the same on an accelerator, which reads the whole head for each chunk


class TokenNats:
    """-log p of given tokens at given places of a batch, in nats: [N].

    The model is entered at its front, so that what wraps it for several devices is in effect; inside, its head is told
    to turn hidden states into nats at once.
    """

    def __init__(self, model: nn.Module):
        self.head = plain_head(model)
        self.keep_logits = keeps_logits(model)

    def __call__(
        self, model: nn.Module, inputs: Mapping[str, Any], places: Callable[[Tensor], Tensor], target_N: Tensor
    ) -> Tensor:
        """`model` is the one that this was made for, or a wrapper of it; `places` takes what stands at the N places,
        [N, X], from what the head is given or returns."""
        head = self.head
        if head is None:
            logits_NV = places(model(**inputs).logits)
            precise = torch.promote_types(logits_NV.dtype, torch.float32)
            return F.cross_entropy(logits_NV.to(precise), target_N, reduction="none")

        def nats(hidden: Tensor) -> Tensor:
            return ChunkedNats.apply(places(hidden), head.weight, head.bias, target_N)

        with instead(head, nats):
            found: Tensor = model(**inputs).logits
        return found


class AnswerLosses:
    """Summed cross-entropy in nats of each row of a batch: [B]."""

    def __init__(self, model: nn.Module):
        self.nats = TokenNats(model)
        self.flash = "flash" in attention(model)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """`model` is the one that this was made for, or a wrapper of it."""
        inputs = model_inputs(batch, keep_logits=self.nats.keep_logits)
        if self.flash and batch.packed:
            inputs |= for_flash(batch.lengths, batch.input_ids_BS.device)
        return summed(self.nats(model, inputs, partial(predicting, batch=batch), batch.target_N), batch)


@contextmanager
def instead(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Calls of `module` compute `forward` inside the block; its hooks stay in effect."""
    own = module.__dict__.get("forward")  # accelerate's, where it moves weights
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


class ChunkedNats(torch.autograd.Function):
    """hidden [N, D], frozen W [V, D] and b, targets [N] -> -log softmax(W h + b) at the target: [N].

    The gradient of the nats is known as soon as the logits are, so they are used for both and dropped.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, W: Tensor, b: Tensor | None, target_N: Tensor) -> Tensor:
        precise = torch.promote_types(hidden_ND.dtype, torch.float32)
        nats, slopes = [], []
        size = max(1, (CHUNK if W.device.type == "cpu" else DEVICE_CHUNK) // len(W))
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


def model_inputs(batch: Batch, *, keep_logits: bool = False) -> dict[str, Any]:
    """What a model is called with. A pack has no padding: its rows are told apart by their positions.

    Positions, not their number, say which logits are kept: told a number, some models leave positions out of their last
    layers, whose gates would see fewer tokens.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids_BS, "position_ids": batch.position_ids_BS}
    inputs |= {"segments": Segments(batch.lengths)} if batch.packed else {"attention_mask": batch.attention_mask_BS}
    return inputs | ({"logits_to_keep": batch.kept_K} if keep_logits else {})


def predicting(found: Tensor, batch: Batch) -> Tensor:
    """What stands where labels are predicted, [N, X], of lines of all S positions or of the K kept ones."""
    S, K, source_N = found.shape[1], len(batch.kept_K), batch.source_N
    if S > K:
        source_N = source_N // K * S + batch.kept_K[source_N % K]
    elif batch.packed:
        return found[0]  # one label each, in order
    return found.flatten(0, 1)[source_N]


def summed(nats_N: Tensor, batch: Batch) -> Tensor:
    """The nats of each row: [B]."""
    return nats_N.new_zeros(len(batch.ids)).index_add(0, batch.row_N, nats_N)


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
    is what a model does by place in the line and only far from its beginning; nor that 8-bit products (LLM.int8()) are
    rounded by what stands out in any row of the batch.
    """
    if quantized(model) is Quantization.int8:
        return False
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
    beside_another[:, :3] = beside[:, :3]  # the other neighbour itself, which is another row
    return as_if_alone(alone, beside, beside_another, rounding(model))


@torch.no_grad()
def pads_rows(model: Any) -> bool:
    """Whether a row that is padded beside a longer one is computed as if alone: tried on short rows.

    Not with recurrent layers that go on through the padding (RWKV).
    """
    row, longer, other = (Row("", "", (0, 1), ids) for ids in ((3, 2, 1), (2, 3, 0, 1, 2, 3), (3, 1, 0, 0, 3, 2)))

    def logits(*rows: Row) -> Tensor:
        batch = collate(rows, 0).to(model.device)
        found: Tensor = model(**model_inputs(batch)).logits
        return found[0, -len(row) :].cpu().double()

    with evaluating(model):
        return as_if_alone(logits(row), logits(row, longer), logits(row, other), rounding(model))


def rounding(model: Any) -> float:
    """Of the model's products, relative; those of 8 bits are rounded by what stands out in a batch."""
    return torch.finfo(torch.bfloat16 if quantized(model) is Quantization.int8 else model.dtype).eps


def as_if_alone(alone: Tensor, beside: Tensor, beside_another: Tensor, eps: float, most: float = 1.0) -> bool:
    """Whether logits, computed with a rounding of `eps`, do not depend on what stands beside in the same batch.

    Another neighbour changes nothing, not even how the machine rounds, except where a layer sorts tokens by expert.
    Alone, a row may be multiplied by another routine, whose rounding adds up over the layers: to `most` of the logits'
    norm at the most.

    Raises:
        NumericsError: logits that are not finite, whatever stands beside.
    """
    if not alone.isfinite().all():
        raise NumericsError(f"the model's logits are not finite, even of a few tokens. {NumericsError.WIDER}")
    leaked, apart = (beside_another - beside).norm(), (beside - alone).norm()
    return bool(leaked <= eps**0.7 * alone.norm() and apart <= min(eps**0.5, most) * alone.norm())


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
    """Whether the model can compute the logits of some positions alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters
