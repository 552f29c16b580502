"""Low-rank layers with a hand-written backward: a mixture at the price of one LoRA, whatever the gate.

Autograd alone would keep three copies of A x and add the gradient of x up in three passes. These functions replace it;
the gate between them stays ordinary autograd over [T, E], so every gate and every auxiliary loss works unchanged.

    W x + b, A x, W_r x                  `Project`: one input, kept once, its gradient added up in place, for one linear
                                         or several that read it
    base + s · B (g ⊙ h)                 `Combine`: keeps h and g, neither their product nor base
    base + s · B h                       `Onto`: the same without a gate, for plain LoRA

T tokens   D in   O out   E experts   R rank over all experts   r = R / E   S logits   N rows of A and routers
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixlora.adapters.dropout import Dropout, Whole


class Project(torch.autograd.Function):
    """x [T, D], n times frozen W [O, D], b and A [R, D], m routers W_r [E, D] -> n of [T, O], n of [T, R], [T, S].

    S are the logits of all routers, computed in the routers' dtype (float32 at least). Where the products are in that
    dtype too, all A and W_r are one product, and so they are where the device multiplies half floats into float32 (see
    `down`); else x is copied for the routers alone and the copy is dropped. The routing is exact on a bfloat16 base
    either way. Dropout acts on what A sees, never on what a router sees.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, drops: tuple[Dropout, ...], *parts: Any) -> Any:
        n = len(drops)
        Ws, bs, As, routers = parts[0 : 3 * n : 3], parts[1 : 3 * n : 3], parts[2 : 3 * n : 3], parts[3 * n :]
        wide, c = x_TD.to(product_dtype(x_TD)), product_dtype(x_TD)
        bases = [linear(wide, W, b).to(x_TD.dtype) for W, b in zip(Ws, bs, strict=True)]
        whole = all(isinstance(drop, Whole) for drop in drops)
        router_dtype = routers[0].dtype if routers else c
        if whole and (router_dtype == c or widens(x_TD, router_dtype)):
            *hs, z_TS = down(wide, As, routers)
        else:
            hs = [linear(drop.thin(wide), A) for drop, A in zip(drops, As, strict=True)]
            z_TS = x_TD.new_empty(len(x_TD), 0)
            if routers:
                (z_TS,) = down(x_TD if widens(x_TD, router_dtype) else x_TD.to(router_dtype), (), routers)
        ctx.save_for_backward(x_TD, *Ws, *As, *routers)
        ctx.drops = drops
        return *bases, *(h_TR.to(x_TD.dtype) for h_TR in hs), z_TS

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x_TD, *weights = ctx.saved_tensors
        n, c = len(ctx.drops), product_dtype(x_TD)
        Ws, As, routers = weights[:n], weights[n : 2 * n], weights[2 * n :]
        dbases, dhs, dz_TS = gradients[:n], [dh_TR.to(c) for dh_TR in gradients[n:-1]], gradients[-1].to(c)
        wide = x_TD.to(c)
        dx_TD = sum_of_products(dbases, Ws, c) if ctx.needs_input_grad[0] else None
        if all(isinstance(drop, Whole) for drop in ctx.drops):
            dhz_TN = torch.cat([*dhs, dz_TS], dim=-1)
            rows = (dhz_TN.T @ wide).split([*map(len, As), *map(len, routers)])
            dAs, drouters = rows[:n], rows[n:]
            if dx_TD is not None:
                dx_TD.addmm_(dhz_TN, stacked(c, *As, *routers))
        else:
            dAs = [dh_TR.T @ drop.thin(wide) for drop, dh_TR in zip(ctx.drops, dhs, strict=True)]
            drouters = (dz_TS.T @ wide).split([*map(len, routers)]) if routers else ()
            if dx_TD is not None:
                if routers:
                    dx_TD.addmm_(dz_TS, stacked(c, *routers))
                for drop, dh_TR, A in zip(ctx.drops, dhs, As, strict=True):
                    drop.add(dx_TD, dh_TR, A.to(c))
        triples = [part for dA, A in zip(dAs, As, strict=True) for part in (None, None, dA.to(A.dtype))]
        found = [dW.to(W.dtype) for dW, W in zip(drouters, routers, strict=True)]
        return None if dx_TD is None else dx_TD.to(x_TD.dtype), None, *triples, *found


class Combine(torch.autograd.Function):
    """base [T, O] (written over), h [T, R], gate g [T, E], B [O, R], s -> base + s · B (g ⊙ h)."""

    @staticmethod
    def forward(ctx: Any, base_TO: Tensor, h_TR: Tensor, g_TE: Tensor, B_OR: Tensor, scale: float, r: int) -> Tensor:
        add_product(base_TO, weighed(h_TR, g_TE, r), B_OR, scale)
        ctx.mark_dirty(base_TO)
        ctx.save_for_backward(h_TR, g_TE, B_OR)
        ctx.scale, ctx.r = scale, r
        return base_TO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy_TO,) = gradients
        h_TR, g_TE, B_OR = ctx.saved_tensors
        c = product_dtype(dy_TO)
        # For dB and dh the scale goes to g, the smallest of all.
        wide, h_TEr, sg_TE1 = dy_TO.to(c), h_TR.to(c).unflatten(-1, (-1, ctx.r)), (ctx.scale * g_TE.to(c)).unsqueeze(-1)
        dB_OR = wide.T @ (h_TEr * sg_TE1).flatten(-2)
        dm_TEr = (wide @ B_OR.to(c)).unflatten(-1, (-1, ctx.r))
        dg_TE = (dm_TEr * h_TEr).sum(-1).mul_(ctx.scale)
        dh_TEr = dm_TEr.mul_(sg_TE1)
        shared_a = h_TEr.shape[-2] < dh_TEr.shape[-2]
        dh_TR = dh_TEr.sum(-2) if shared_a else dh_TEr.flatten(-2)
        return dy_TO, dh_TR.to(h_TR.dtype), dg_TE.to(g_TE.dtype), dB_OR.to(B_OR.dtype), None, None


class Onto(torch.autograd.Function):
    """base [T, O] (written over), h [T, R], B [O, R], s -> base + s · B h."""

    @staticmethod
    def forward(ctx: Any, base_TO: Tensor, h_TR: Tensor, B_OR: Tensor, scale: float) -> Tensor:
        add_product(base_TO, h_TR, B_OR, scale)
        ctx.mark_dirty(base_TO)
        ctx.save_for_backward(h_TR, B_OR)
        ctx.scale = scale
        return base_TO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy_TO,) = gradients
        h_TR, B_OR = ctx.saved_tensors
        wide = dy_TO.to(product_dtype(dy_TO))
        dB_OR = (wide.T @ h_TR.to(wide.dtype)).mul_(ctx.scale)
        dh_TR = (wide @ B_OR.to(wide.dtype)).mul_(ctx.scale)
        return dy_TO, dh_TR.to(h_TR.dtype), dB_OR.to(B_OR.dtype), None


def weighed(h_TR: Tensor, g_TE: Tensor, r: int) -> Tensor:
    """g ⊙ h, one weight for each block of r; an A that all experts share is broadcast."""
    return (h_TR.unflatten(-1, (-1, r)) * g_TE.unsqueeze(-1)).flatten(-2)


def add_product(y_TO: Tensor, h_TR: Tensor, B_OR: Tensor, scale: float) -> None:
    """y += s · h Bᵀ."""
    c = product_dtype(y_TO)
    if c == y_TO.dtype:
        y_TO.addmm_(h_TR.to(c), B_OR.to(c).T, alpha=scale)
    else:
        y_TO.add_(h_TR.to(c) @ B_OR.to(c).T, alpha=scale)


def sum_of_products(dys: Any, Ws: Any, c: torch.dtype) -> Tensor:
    """Σ dy W."""
    total = dys[0].to(c) @ Ws[0].to(c)
    for dy_TO, W in zip(dys[1:], Ws[1:], strict=True):
        total.addmm_(dy_TO.to(c), W.to(c))
    return total


def linear(x_TD: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    return F.linear(x_TD, W.to(x_TD.dtype), None if b is None else b.to(x_TD.dtype))


def down(x_TD: Tensor, As: Any, routers: Any) -> list[Tensor]:
    """A x of every A, and the routers' logits side by side, in one product that reads x once.

    A float32 router over half floats becomes three rows of half floats for each expert, hi + mid + lo, which hold its
    24 bits between them; products of half floats are exact in float32, where they are added up (on an H100 within 2e-6
    of float64, relative; a float32 product within 3e-7).
    """
    sizes, S = [*map(len, As)], sum(map(len, routers))
    if not routers or routers[0].dtype == x_TD.dtype:
        # Apart from each other, so that the logits are freed when the gates are done with them.
        parts_TN = F.linear(x_TD, stacked(x_TD.dtype, *As, *routers)).split([*sizes, S], dim=-1)
        return [part_TR.contiguous() for part_TR in parts_TN]
    rows_ND = stacked(x_TD.dtype, *As, *pieces(torch.cat(routers), x_TD.dtype, 3))
    *hs, z_TS = torch.mm(x_TD, rows_ND.T, out_dtype=torch.float32).split([*sizes, 3 * S], dim=-1)
    return [*(h_TR.to(x_TD.dtype) for h_TR in hs), z_TS.unflatten(-1, (3, -1)).sum(-2)]


def pieces(W: Tensor, dtype: torch.dtype, number: int) -> list[Tensor]:
    """Matrices of `dtype` whose sum is W, each the rounding of what the ones before leave."""
    found = []
    for _ in range(number):
        found.append(W.to(dtype))
        W = W - found[-1]
    return found


def widens(x_TD: Tensor, router_dtype: torch.dtype) -> bool:
    """Whether products of x may be added up and returned in the routers' float32: bfloat16 on CUDA.

    Not float16, whose range would lose the low pieces of a small weight; nor ROCm, where it was never run.
    """
    return x_TD.is_cuda and torch.version.hip is None and (x_TD.dtype, router_dtype) == (torch.bfloat16, torch.float32)


def stacked(dtype: torch.dtype, *matrices: Tensor) -> Tensor:
    return torch.cat([matrix.to(dtype) for matrix in matrices])


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that products are computed in: x's own, but float32 where a CPU has no instructions for it.

    Without them PyTorch's own bfloat16 products take from 7 times (W as it lies) to 200 times (W transposed) as long.
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and x.device.type == "cpu" and not native(x.dtype) else x.dtype


@cache
def native(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of `dtype` by its own instructions."""
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")())
