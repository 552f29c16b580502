"""A mixture inside a feed-forward block with a hand-written backward.

Rows that chose an expert are taken together, so a token costs only the experts it chose and its own r of the R ranks;
the frozen projections run once for all experts (see `GatedFeedForward`). For expert e and its rows t:

    u = u0_t + s1 · a1_te B1_eᵀ     v = v0_t + s3 · a3_te B3_eᵀ     h = act(u) ⊙ v
    H_t += g_te h                   P_te = g_te (h A2_eᵀ)

    T tokens   F hidden   E experts   r rank of an expert   R = E · r   N pairs of a token and an expert it chose
    n pairs of one expert
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixlora.adapters.dropout import Dropout
from mixlora.adapters.fused import product_dtype

NO_GRADIENTS = (None,) * 4  # of counts, scales, act and drops


class Lean(torch.autograd.Function):
    """u0, v0 [T, F], a [T, 2, R] (a1, a3), g [T, E], rows [N], B1ᵀ, B3ᵀ, A2 [R, F] -> H [T, F], P [T, R].

    Rows, and counts behind them, are those of `rows_of_experts`. Keeps what came in; u and v of every pair are computed
    again in backward.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, counts, scales, act, drops = inputs
        ctx.save_for_backward(*tensors)
        ctx.counts, ctx.scales, ctx.act, ctx.drops = counts, scales, act, drops
        return mixed(Block(*tensors, counts=counts, scales=scales), act, drops, lambda u_nF, v_nF: None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        block = Block(*ctx.saved_tensors, counts=ctx.counts, scales=ctx.scales)
        return *unmixed(block, ctx.act, ctx.drops, block.hidden, *gradients), *NO_GRADIENTS


class Fast(torch.autograd.Function):
    """The same; keeps u and v of every pair instead of u0 and v0."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, counts, scales, act, drops = inputs
        kept: list[Tensor] = []
        out = mixed(Block(*tensors, counts=counts, scales=scales), act, drops, lambda *pair: kept.extend(pair))
        ctx.save_for_backward(*tensors[2:], *kept)
        ctx.counts, ctx.scales, ctx.act, ctx.drops = counts, scales, act, drops
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved = ctx.saved_tensors
        tensors, kept = saved[:6], iter(saved[6:])
        like = gradients[0]  # [T, F] in the dtype of u0 and v0, which are not kept
        block = Block(like, like, *tensors, counts=ctx.counts, scales=ctx.scales)
        found = unmixed(block, ctx.act, ctx.drops, lambda e, t_n: (next(kept), next(kept)), *gradients)
        return *found, *NO_GRADIENTS


def rows_of_experts(chosen_TE: Tensor) -> tuple[Tensor, list[int]]:
    """The rows that chose each expert, one expert after the other [N], and how many each has. A device is waited for
    twice: for the counts, and for the number of rows."""
    return chosen_TE.T.nonzero(as_tuple=True)[1], chosen_TE.sum(0).tolist()


class Block:
    """What came in, with the factors laid out by expert: [E, r, F]."""

    def __init__(
        self,
        u0_TF: Tensor,
        v0_TF: Tensor,
        a_T2R: Tensor,
        g_TE: Tensor,
        t_N: Tensor,
        B1_RF: Tensor,
        B3_RF: Tensor,
        A2_RF: Tensor,
        *,
        counts: list[int],
        scales: tuple[float, float],
    ):
        self.r, self.dtype = len(B1_RF) // g_TE.shape[1], product_dtype(u0_TF)
        self.x0s, self.g_TE, self.scales = (u0_TF, v0_TF), g_TE, scales
        self.low_T2Er = a_T2R.unflatten(-1, (-1, self.r))
        self.factors = B1_RF, B3_RF, A2_RF
        self.Bs = [B_RF.to(self.dtype).unflatten(0, (-1, self.r)) for B_RF in (B1_RF, B3_RF)]
        self.A2_ErF = A2_RF.to(self.dtype).unflatten(0, (-1, self.r))
        self.experts = list(enumerate(t_N.split(counts)))

    def hidden(self, e: int, t_n: Tensor) -> tuple[Tensor, Tensor]:
        """u and v of the rows of expert e."""
        u_nF, v_nF = (
            x0_TF.index_select(0, t_n).to(self.dtype).addmm_(self.low(i, e, t_n), of(self.Bs[i], e))
            for i, x0_TF in enumerate(self.x0s)
        )
        return u_nF, v_nF

    def low(self, i: int, e: int, t_n: Tensor) -> Tensor:
        """s · a of the rows of expert e, in the gate (0) or the up (1) projection."""
        return self.scales[i] * column(self.low_T2Er[:, i], e).index_select(0, t_n).to(self.dtype)


def mixed(
    block: Block, act: Any, drops: tuple[Dropout, ...], keep: Callable[[Tensor, Tensor], None]
) -> tuple[Tensor, Tensor]:
    (T, E), x0_TF = block.g_TE.shape, block.x0s[0]
    H_TF, P_TEr = torch.zeros_like(x0_TF), x0_TF.new_zeros(T, E, block.r)
    for e, t_n in block.experts:
        u_nF, v_nF = block.hidden(e, t_n)
        keep(u_nF.to(x0_TF.dtype), v_nF.to(x0_TF.dtype))
        h_nF = act(u_nF) * v_nF
        w_n1 = block.g_TE[t_n, e, None].to(h_nF.dtype)
        P_TEr[t_n, e] = ((drops[e].thin(h_nF) @ of(block.A2_ErF, e).T) * w_n1).to(P_TEr.dtype)
        H_TF.index_add_(0, t_n, h_nF.mul_(w_n1).to(H_TF.dtype))
    return H_TF, P_TEr.flatten(-2)


def unmixed(block: Block, act: Any, drops: tuple[Dropout, ...], hidden: Any, dH_TF: Tensor, dP_TR: Tensor) -> Any:
    """The gradients of all that `Block` took, in its order; `hidden` gives u and v of the rows of an expert."""
    if torch.is_grad_enabled():  # for a derivative of this one, which would lack what goes through the activation
        raise RuntimeError("a second derivative through a mixture inside a block needs method.compute=eager")
    dtype, dP_TEr = block.dtype, dP_TR.unflatten(-1, (-1, block.r))
    dA2_ErF, dg_TE = torch.zeros_like(block.A2_ErF), torch.zeros_like(block.g_TE)
    dx0s = [torch.zeros_like(dH_TF) for _ in block.x0s]
    dlow_T2Er, dBs = torch.zeros_like(block.low_T2Er), [torch.zeros_like(B_ErF) for B_ErF in block.Bs]
    for e, t_n in block.experts:
        u_nF, v_nF = (x_nF.to(dtype) for x_nF in hidden(e, t_n))
        w_n1, dp_nr = block.g_TE[t_n, e, None].to(dtype), dP_TEr[t_n, e].to(dtype)
        s_nF, slope = activated(act, u_nF)
        h_nF = s_nF * v_nF
        of(dA2_ErF, e).addmm_((dp_nr * w_n1).T, drops[e].thin(h_nF))
        dh_nF = dH_TF.index_select(0, t_n).to(dtype)
        drops[e].add(dh_nF, dp_nr, of(block.A2_ErF, e))
        dg_TE[t_n, e] = h_nF.mul_(dh_nF).sum(-1).to(dg_TE.dtype)
        dh_nF.mul_(w_n1)
        dx_nFs = slope(dh_nF * v_nF), dh_nF.mul_(s_nF)
        for i, dx_nF in enumerate(dx_nFs):
            of(dBs[i], e).addmm_(block.low(i, e, t_n).T, dx_nF)
            dlow_nr = block.scales[i] * (dx_nF @ of(block.Bs[i], e).T)
            column(dlow_T2Er[:, i], e).index_add_(0, t_n, dlow_nr.to(dlow_T2Er.dtype))
            dx0s[i].index_add_(0, t_n, dx_nF.to(dx0s[i].dtype))
    dfactors = *(dB_ErF.flatten(0, 1) for dB_ErF in dBs), dA2_ErF.flatten(0, 1)
    found = [gradient.to(factor.dtype) for gradient, factor in zip(dfactors, block.factors, strict=True)]
    return *dx0s, dlow_T2Er.flatten(-2), dg_TE, None, *found


def activated(act: Callable[[Tensor], Tensor], u_nF: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """act(u), and the function from its gradient to u's."""
    with torch.enable_grad():
        leaf_nF = u_nF.detach().requires_grad_()
        s_nF = act(leaf_nF)
    return s_nF.detach(), lambda ds_nF: torch.autograd.grad(s_nF, leaf_nF, ds_nF)[0]


def of(blocks_ErF: Tensor, e: int) -> Tensor:
    """The factor of expert e; where all experts share one, that one."""
    return blocks_ErF[e if len(blocks_ErF) > 1 else 0]


def column(low_TEr: Tensor, e: int) -> Tensor:
    return low_TEr[:, e if low_TEr.shape[1] > 1 else 0]
