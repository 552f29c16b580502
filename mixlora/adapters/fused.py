"""Low-rank layers with a hand-written backward: a mixture at the price of one LoRA, whatever the gate.

Autograd alone would keep three copies of A x and add the gradient of x up in three passes. These functions replace it;
the gate between them stays ordinary autograd over [T, E], so every gate and every auxiliary loss works unchanged.

    W x + b, A x, W_r x                  `Project`: one input, kept once, its gradient added up in place
    base + s · B (g ⊙ h)                 `Combine`: keeps h and g, neither their product nor base
    base + s · B h                       `Onto`: the same without a gate, for plain LoRA

Each serves one linear, or n that read the same input: what is as wide as R or E is one tensor for all of them. Factors
come in their own dtype and are cast here to that of the products, so that no cast copy is kept and autograd has no
casts to undo.

T tokens (any leading shape; one dimension in h)   D in   O out   n linears   E experts   R rank over all experts
r = R / E   S logits   N rows or columns that stand side by side
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixlora.adapters.dropout import Dropout, Whole

ROWS = 64  # of a float32 copy: 1 MiB for a model of 4096
# Whether torch.mm takes out_dtype, which it does not in the oldest PyTorch that we run on.
HAS_OUT_DTYPE = "dtype" in torch.ops.aten.mm.overloads()


class Project(torch.autograd.Function):
    """x [T, D], n times frozen W [O, D], b and A [R, D], routers W_r [E, D] -> n of [T, O], h [T, n, R], logits [T, S].

    S are the logits of all routers, computed in the routers' dtype (float32 at least), so the routing is exact on a
    bfloat16 base too: by one product with all A and W_r where the device multiplies half floats into float32 (see
    `widened`), else by one for the routers alone (see `scored`).
    Dropout acts on what A sees, never on what a router sees.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, drops: tuple[Dropout, ...], *parts: Any) -> Any:
        n = len(drops)
        Ws, bs, As, routers = parts[0 : 3 * n : 3], parts[1 : 3 * n : 3], parts[2 : 3 * n : 3], parts[3 * n :]
        wide, c = cast(x_TD, product_dtype(x_TD)), product_dtype(x_TD)
        wide, lead = wide.flatten(0, -2), x_TD.shape[:-1]
        bases = [cast(linear(wide, W, b), x_TD.dtype) for W, b in zip(Ws, bs, strict=True)]
        # Not `view`: autograd lets nobody write over one of several views.
        bases = [torch.ops.aten._unsafe_view(base_TO, [*lead, base_TO.shape[-1]]) for base_TO in bases]
        router_dtype = routers[0].dtype if routers else c
        if routers and nothing_dropped(drops) and widens(x_TD, router_dtype):
            h_TN, z_TS = widened(wide, As, routers)
        else:
            h_TN = down(wide, drops, As)
            z_TS = scored(wide if router_dtype == c else x_TD.flatten(0, -2), routers, router_dtype)
        ctx.save_for_backward(x_TD, *Ws, *As, *routers)
        ctx.drops = drops
        return *bases, cast(h_TN, x_TD.dtype).unflatten(-1, (n, -1)), z_TS.unflatten(0, lead)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x_TD, *weights = ctx.saved_tensors
        n, c = len(ctx.drops), product_dtype(x_TD)
        Ws, As, routers = weights[:n], weights[n : 2 * n], weights[2 * n :]
        *dbases, dh_TnR, dz_TS = gradients
        dh_TnR, dz_TS, wide = cast(dh_TnR, c), cast(dz_TS.flatten(0, -2), c), cast(x_TD.flatten(0, -2), c)
        dx_TD = sum_of_products(dbases, Ws, c) if ctx.needs_input_grad[0] else None
        if nothing_dropped(ctx.drops):
            dhz_TN = joined([dh_TnR.flatten(1), *([dz_TS] if routers else ())])
            rows = (dhz_TN.T @ wide).split([*map(len, As), *map(len, routers)])
            dAs, drouters = rows[:n], rows[n:]
            if dx_TD is not None:
                dx_TD.addmm_(dhz_TN, stacked(c, *As, *routers))
        else:
            dhs = dh_TnR.unbind(1)
            dAs = [dh_TR.T @ drop.thin(wide) for drop, dh_TR in zip(ctx.drops, dhs, strict=True)]
            drouters = (dz_TS.T @ wide).split([*map(len, routers)]) if routers else ()
            if dx_TD is not None:
                if routers:
                    dx_TD.addmm_(dz_TS, stacked(c, *routers))
                for drop, dh_TR, A in zip(ctx.drops, dhs, As, strict=True):
                    drop.add(dx_TD, dh_TR, cast(A, c))
        triples = [part for dA, A in zip(dAs, As, strict=True) for part in (None, None, cast(dA, A.dtype))]
        found = [cast(dW, W.dtype) for dW, W in zip(drouters, routers, strict=True)]
        return None if dx_TD is None else cast(dx_TD, x_TD.dtype).view_as(x_TD), None, *triples, *found


class Combine(torch.autograd.Function):
    """h [T, n, R], gates g [T, n, E] (or [T, E] of one), s, r, n times base [T, O] (written over), n times Bᵀ [R, O]
    -> n of base + s · B (g ⊙ h)."""

    @staticmethod
    def forward(ctx: Any, h_TnR: Tensor, g_TnE: Tensor, scale: float, r: int, *parts: Tensor) -> tuple[Tensor, ...]:
        n = h_TnR.shape[1]
        bases, Bs = parts[:n], parts[n:]
        add_products(bases, weighed(h_TnR, g_TnE.reshape(*h_TnR.shape[:2], -1), r), Bs, scale)
        ctx.mark_dirty(*bases)
        ctx.save_for_backward(h_TnR, g_TnE, *Bs)
        ctx.scale, ctx.r = scale, r
        return bases

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # for a derivative of this one
            raise RuntimeError("a second derivative through a gated linear needs method.compute=eager")
        h_TnR, g_TnE, *Bs = ctx.saved_tensors
        c, n = product_dtype(h_TnR), len(Bs)
        # For dB and dh the scale goes to g, the smallest of all.
        h_TnEr = cast(h_TnR, c).unflatten(-1, (-1, ctx.r))
        sg_TnE = ctx.scale * cast(g_TnE.reshape(*h_TnR.shape[:2], -1), c)
        dBs, dm_TN = products(dys, weighed(cast(h_TnR, c), sg_TnE, ctx.r), Bs, c)
        dm_TnEr = dm_TN.unflatten(-1, (n, -1, ctx.r))
        dg_TnE = (dm_TnEr * h_TnEr).sum(-1).mul_(ctx.scale)
        dh_TnEr = dm_TnEr.mul_(sg_TnE.unsqueeze(-1))
        shared_a = h_TnEr.shape[-2] < dh_TnEr.shape[-2]
        dh_TnR = dh_TnEr.sum(-2) if shared_a else dh_TnEr.flatten(-2)
        return cast(dh_TnR, h_TnR.dtype), cast(dg_TnE, g_TnE.dtype).view_as(g_TnE), None, None, *dys, *dBs


class Onto(torch.autograd.Function):
    """h [T, n, R], s, n times base [T, O] (written over), n times Bᵀ [R, O] -> n of base + s · B h."""

    @staticmethod
    def forward(ctx: Any, h_TnR: Tensor, scale: float, *parts: Tensor) -> tuple[Tensor, ...]:
        n = h_TnR.shape[1]
        bases, Bs = parts[:n], parts[n:]
        add_products(bases, h_TnR, Bs, scale)
        ctx.mark_dirty(*bases)
        ctx.save_for_backward(h_TnR, *Bs)
        ctx.scale = scale
        return bases

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        h_TnR, *Bs = ctx.saved_tensors
        c, n = product_dtype(h_TnR), len(Bs)
        dBs, dh_TN = products(dys, ctx.scale * cast(h_TnR, c), Bs, c)
        dh_TN.mul_(ctx.scale)
        return cast(dh_TN, h_TnR.dtype).unflatten(-1, (n, -1)), None, *dys, *dBs


def weighed(h_TnR: Tensor, g_TnE: Tensor, r: int) -> Tensor:
    """g ⊙ h, one weight for each block of r; an A that all experts share is broadcast."""
    return (h_TnR.unflatten(-1, (-1, r)) * g_TnE.unsqueeze(-1)).flatten(-2)


def add_products(ys: Any, m_TnR: Tensor, Bs: Any, scale: float) -> None:
    """y += s · B m of each linear."""
    c = product_dtype(m_TnR)
    for y_TO, m_TR, B_RO in zip(ys, cast(m_TnR, c).unbind(1), Bs, strict=True):
        y_TO = y_TO.flatten(0, -2)  # as it came from a product: a view
        if c == y_TO.dtype:
            y_TO.addmm_(m_TR, cast(B_RO, c), alpha=scale)
        else:
            y_TO.add_(m_TR @ cast(B_RO, c), alpha=scale)


def products(dys: Any, m_TnR: Tensor, Bs: Any, c: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """dBᵀ = mᵀ dy of each linear, and dm = dy B of all side by side."""
    dBs, dms = [], []
    for dy_TO, m_TR, B_RO in zip(dys, m_TnR.unbind(1), Bs, strict=True):
        wide = cast(dy_TO.flatten(0, -2), c)
        dBs.append(cast(m_TR.T @ wide, B_RO.dtype))
        dms.append(wide @ cast(B_RO, c).T)
    return dBs, joined(dms)


def sum_of_products(dys: Any, Ws: Any, c: torch.dtype) -> Tensor:
    """Σ dy W."""
    total = cast(dys[0].flatten(0, -2), c) @ cast(Ws[0], c)
    for dy_TO, W in zip(dys[1:], Ws[1:], strict=True):
        total.addmm_(cast(dy_TO.flatten(0, -2), c), cast(W, c))
    return total


def linear(x_TD: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    return F.linear(x_TD, cast(W, x_TD.dtype), None if b is None else cast(b, x_TD.dtype))


def down(x_TD: Tensor, drops: Sequence[Dropout], As: Any) -> Tensor:
    """A x of all linears side by side, in one product where none drops anything."""
    if nothing_dropped(drops):
        return linear(x_TD, stacked(x_TD.dtype, *As))
    return joined([linear(drop.thin(x_TD), A) for drop, A in zip(drops, As, strict=True)])


def widened(x_TD: Tensor, As: Any, routers: Any) -> tuple[Tensor, Tensor]:
    """A x and the routers' float32 logits of all linears, in one product of half floats that reads x once.

    A float32 router becomes three rows of half floats for each expert, hi + mid + lo, which hold its 24 bits between
    them; products of half floats are exact in float32, where they are added up (on an H100 within 2e-6 of float64,
    relative; a float32 product within 3e-7).
    """
    W_SD = stacked(routers[0].dtype, *routers)
    rows_ND, S = torch.cat([*(cast(A, x_TD.dtype) for A in As), *pieces(W_SD, x_TD.dtype, 3)]), len(W_SD)
    h_TN, z_TN = torch.mm(x_TD, rows_ND.T, out_dtype=torch.float32).split([len(rows_ND) - 3 * S, 3 * S], dim=-1)
    return cast(h_TN, x_TD.dtype), z_TN.unflatten(-1, (3, -1)).sum(-2)


def scored(x_TD: Tensor, routers: Any, router_dtype: torch.dtype) -> Tensor:
    """The logits alone, side by side; [T, 0] without routers.

    On a CPU some rows of x are copied at a time, for such a copy stays in the cache, and W comes first, for few rows of
    x: 1 % of a bfloat16 linear of d 4096 less than 256 rows and x first, forward and backward, and 3 % for d 1024.
    """
    if not routers:
        return x_TD.new_empty(len(x_TD), 0)
    if widens(x_TD, router_dtype):
        return widened(x_TD, (), routers)[1]
    W_SD = stacked(router_dtype, *routers)
    if x_TD.dtype == router_dtype:
        return F.linear(x_TD, W_SD)
    rows = ROWS if x_TD.device.type == "cpu" and not torch.compiler.is_compiling() else len(x_TD)
    return torch.cat([F.linear(W_SD, x_ND.to(router_dtype)).T for x_ND in x_TD.split(rows)])


def pieces(W: Tensor, dtype: torch.dtype, number: int) -> list[Tensor]:
    """Matrices of `dtype` whose sum is W, each the rounding of what the ones before leave."""
    found = [cast(W, dtype)]
    while len(found) < number:
        W = W - found[-1]
        found.append(cast(W, dtype))
    return found


def widens(x_TD: Tensor, router_dtype: torch.dtype) -> bool:
    """Whether products of x may be added up and returned in the routers' float32: bfloat16 on CUDA.

    Not float16, whose range would lose the low pieces of a small weight; nor ROCm, where it was never run.
    """
    able = HAS_OUT_DTYPE and x_TD.is_cuda and torch.version.hip is None
    return able and (x_TD.dtype, router_dtype) == (torch.bfloat16, torch.float32)


def stacked(dtype: torch.dtype, *matrices: Tensor) -> Tensor:
    return cast(matrices[0] if len(matrices) == 1 else torch.cat(matrices), dtype)


def joined(parts_TN: list[Tensor]) -> Tensor:
    """Side by side in one tensor, which a single part is already."""
    return parts_TN[0] if len(parts_TN) == 1 else torch.cat(parts_TN, dim=-1)


def nothing_dropped(drops: Sequence[Dropout]) -> bool:
    return all(isinstance(drop, Whole) for drop in drops)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which needs 2 µs to find that there is nothing to do, fifty times for q, k and v."""
    return x if x.dtype == dtype else x.to(dtype)


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
