"""The one trainable layer: delta(x) = s · B (g(x) ⊙ A x).

A bank of R rank-one atoms, each a row of A and the same row of Bᵀ. `g` gives one weight to each of E blocks of r = R/E
atoms; a block is what the papers call an expert, so a mixture of E LoRA experts Σ_e g_e B_e A_e x is exactly this layer
(no dispatch, no loop). The weights are an argument: the layer owns no gate, which lets the same class serve linears and
feed-forward blocks.

    T tokens (any leading shape)   D in   O out   E experts   r rank of one expert   R = E · r
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(nn.Module):
    """A [R, D] (or [r, D] where all experts share one A) and Bᵀ [R, O], with the scale s.

    B is kept as Bᵀ: what belongs to one expert lies together, as in A, and the gradient mᵀ dy is a product that took a
    Xeon a fifth less time than dyᵀ m. Adapter files hold B, as PEFT's do.

    Parameters keep their own dtype (float32 masters) and are cast to the input's dtype for the two products: casting
    skinny factors costs nothing, casting x would copy every activation. B starts at zero, so delta starts at zero.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        num_experts: int = 1,
        scale: float = 1.0,
        dropout: float = 0.0,
        shared_a: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if r < 1 or num_experts < 1:
            raise ValueError(f"r and num_experts must be at least 1, got r={r}, num_experts={num_experts}")
        self.r, self.num_experts, self.scale = r, num_experts, scale
        rows = r if shared_a else num_experts * r
        self.A_RD = nn.Parameter(torch.empty(rows, in_features, dtype=dtype, device=device))
        self.B_RO = nn.Parameter(torch.empty(num_experts * r, out_features, dtype=dtype, device=device))
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.A_RD, a=math.sqrt(5))
        nn.init.zeros_(self.B_RO)

    def forward(self, y_TO: Tensor, x_TD: Tensor, weights_TE: Tensor) -> Tensor:
        """y + s · B (g ⊙ A x): [T, O], [T, D], [T, E] -> [T, O]."""
        return self.onto(y_TO, self.mix(self.down(x_TD), weights_TE))

    def down(self, x_TD: Tensor) -> Tensor:
        """A x: [T, D] -> [T, R]."""
        return F.linear(self.dropout(x_TD), self.A_RD.to(x_TD.dtype))

    def mix(self, h_TR: Tensor, weights_TE: Tensor) -> Tensor:
        """g ⊙ h, one weight for each block of r; a shared A is broadcast to every block."""
        h_TEr = h_TR.unflatten(-1, (-1, self.r))
        return (h_TEr * weights_TE.unsqueeze(-1)).flatten(-2)

    def onto(self, y_TO: Tensor, h_TR: Tensor) -> Tensor:
        """y + s · B h: [T, O], [T, R] -> [T, O], in one product; the scale goes to the small factor."""
        h_TR = (self.scale * h_TR).to(y_TO.dtype)
        sum_TO = torch.addmm(y_TO.flatten(0, -2), h_TR.flatten(0, -2), self.B_RO.to(y_TO.dtype))
        return sum_TO.view_as(y_TO)

    def extra_repr(self) -> str:
        return f"r={self.r}, num_experts={self.num_experts}, scale={self.scale:g}"
