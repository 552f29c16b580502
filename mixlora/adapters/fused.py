"""The per-linear mixture with a hand-written backward: what LoRA costs, whatever the gate.

Autograd alone would keep three copies of A x and add the gradient of x up in three passes. Two functions replace it;
the gate between them stays ordinary autograd over [T, E], so every gate and every auxiliary loss works unchanged.

    base, h, z  =  W x + b,  A x,  W_r x         `Project`: one input, its gradient accumulated in place
    y           =  base + s · B (g(z) ⊙ h)       `Combine`: saves h and g, neither their product nor base

    T tokens   D in   O out   E experts   R rank over all experts   r = R / E
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Project(torch.autograd.Function):
    """x [T, D], frozen W [O, D] and b, A [R, D], router W_r [E, D] -> W x + b [T, O], A x [T, R], logits [T, E].

    The logits are computed in the router's dtype (float32 at least). Where that is x's own, A and W_r are one product;
    else x is copied for the router alone and the copy is dropped, which keeps the routing exact on a bfloat16 base.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, W: Tensor, b: Tensor | None, A_RD: Tensor, router_ED: Tensor) -> Any:
        base_TO = F.linear(x_TD, W, b)
        if router_ED.dtype == x_TD.dtype:
            h_TR, z_TE = F.linear(x_TD, torch.cat([A_RD, router_ED])).split([len(A_RD), len(router_ED)], dim=-1)
        else:
            h_TR, z_TE = F.linear(x_TD, A_RD), F.linear(x_TD.to(router_ED.dtype), router_ED)
        ctx.save_for_backward(x_TD, W, A_RD, router_ED)
        return base_TO, h_TR, z_TE

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        dbase_TO, dh_TR, dz_TE = gradients
        x_TD, W, A_RD, router_ED = ctx.saved_tensors
        stacked_TS = torch.cat([dh_TR, dz_TE.to(dh_TR.dtype)], dim=-1)
        dS_SD = stacked_TS.T @ x_TD
        dx_TD = None
        if ctx.needs_input_grad[0]:
            dx_TD = dbase_TO @ W
            dx_TD.addmm_(stacked_TS, torch.cat([A_RD, router_ED.to(A_RD.dtype)]))
        dA_RD, drouter_ED = dS_SD.split([len(A_RD), len(router_ED)])
        return dx_TD, None, None, dA_RD, drouter_ED.to(router_ED.dtype)


class Combine(torch.autograd.Function):
    """base [T, O] (written over), h [T, R], gate g [T, E], B [O, R], s -> base + s · B (g ⊙ h)."""

    @staticmethod
    def forward(ctx: Any, base_TO: Tensor, h_TR: Tensor, g_TE: Tensor, B_OR: Tensor, scale: float, r: int) -> Tensor:
        base_TO.addmm_(weighed(h_TR, g_TE, r), B_OR.T, alpha=scale)
        ctx.mark_dirty(base_TO)
        ctx.save_for_backward(h_TR, g_TE, B_OR)
        ctx.scale, ctx.r = scale, r
        return base_TO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy_TO,) = gradients
        h_TR, g_TE, B_OR = ctx.saved_tensors
        dB_OR = (dy_TO.T @ weighed(h_TR, g_TE, ctx.r)).mul_(ctx.scale)
        dm_TEr = (dy_TO @ B_OR).mul_(ctx.scale).unflatten(-1, (-1, ctx.r))
        h_TEr = h_TR.unflatten(-1, (-1, ctx.r))
        dg_TE = (dm_TEr * h_TEr).sum(-1)
        dh_TEr = dm_TEr.mul_(g_TE.unsqueeze(-1))
        shared_a = h_TEr.shape[-2] < dh_TEr.shape[-2]
        dh_TR = dh_TEr.sum(-2) if shared_a else dh_TEr.flatten(-2)
        return dy_TO, dh_TR, dg_TE, dB_OR, None, None


def weighed(h_TR: Tensor, g_TE: Tensor, r: int) -> Tensor:
    """g ⊙ h, one weight for each block of r; an A that all experts share is broadcast."""
    return (h_TR.unflatten(-1, (-1, r)) * g_TE.unsqueeze(-1)).flatten(-2)
