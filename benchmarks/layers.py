"""One linear and one feed-forward block, adapted by PEFT, by this package, and by a loop over experts."""

import torch
import torch.nn.functional as F
from common import Any
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from mixlora.adapters.attach import attach
from mixlora.config.schema import Compute, Dtype, Method, Scope

E, K = 8, 2
TOPK = {"kind": "topk"}


class Linear(nn.Module):
    """A model of one linear."""

    targets = ("lin",)

    def __init__(self, d: int):
        super().__init__()
        self.lin = nn.Linear(d, d, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.lin(x_TD)


class FeedForward(nn.Module):
    targets = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, d: int, ff: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(d, ff, bias=False), nn.Linear(d, ff, bias=False)
        self.down_proj, self.act_fn = nn.Linear(ff, d, bias=False), nn.SiLU()

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Block(nn.Module):
    """A feed-forward block needs a name."""

    targets = FeedForward.targets

    def __init__(self, d: int, ff: int):
        super().__init__()
        self.mlp = FeedForward(d, ff)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.mlp(x_TD)


class GatherLoop(nn.Module):
    """Top-k mixture of LoRA experts the obvious way: for each expert, gather its tokens, compute, scatter."""

    def __init__(self, base: nn.Linear, r: int, dropout: float = 0.0):
        super().__init__()
        d, o, like = base.in_features, base.out_features, base.weight
        self.base = base.requires_grad_(False)
        self.A = nn.ParameterList([torch.randn(r, d, dtype=like.dtype, device=like.device) / d**0.5 for _ in range(E)])
        self.B = nn.ParameterList([torch.randn(o, r, dtype=like.dtype, device=like.device) * 0.01 for _ in range(E)])
        self.router, self.dropout = nn.Linear(d, E, bias=False, device=like.device), nn.Dropout(dropout)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TO = self.base(x_TD)
        weight_TK, expert_TK = self.router(x_TD.float()).softmax(-1).topk(K, dim=-1)
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        for e in range(E):
            token_n, slot_n = (expert_TK == e).nonzero(as_tuple=True)
            low_nr = F.linear(self.dropout(x_TD[token_n]), self.A[e])
            part_nO = F.linear(low_nr, self.B[e]) * weight_TK[token_n, slot_n, None].to(x_TD.dtype)
            y_TO.index_add_(0, token_n, part_nO)
        return y_TO


def peft(model: Any, rank: int, dropout: float = 0.0) -> nn.Module:
    """PEFT's LoRA with adapters in the base's dtype, B away from zero."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=list(model.targets))
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    filled(p for name, p in adapted.named_parameters() if "lora_B" in name)
    return adapted.train()


def lora(model: Any, rank: int, dropout: float = 0.0) -> nn.Module:
    return ours(model, Method(name="lora", r=rank, lora_dropout=dropout, target_modules=list(model.targets)))


def gated(model: Any, r: int, dropout: float = 0.0, top_k: int = K, num_experts: int = E) -> nn.Module:
    options: dict[str, Any] = {"target_modules": list(model.targets), "gate": TOPK, "lora_dropout": dropout}
    return ours(model, Method(name="gated", r=r, num_experts=num_experts, top_k=top_k, **options))


def mixture(model: Block, r: int, compute: Compute, dropout: float = 0.0) -> nn.Module:
    options: dict[str, Any] = {"target_modules": "feed-forward", "gate": TOPK, "lora_dropout": dropout}
    method = Method(name="m", scope=Scope.feed_forward, r=r, num_experts=E, top_k=K, compute=compute, **options)
    return ours(model, method)


def ours(model: nn.Module, method: Method) -> nn.Module:
    method.adapter_dtype = Dtype.auto
    adapter = attach(model, method)
    filled(tensor for name, tensor in adapter.items() if name.endswith("B_RO"))
    return model.train()


@torch.no_grad()
def filled(tensors: Any) -> None:
    for tensor in tensors:
        tensor.normal_(std=0.02)


def step(model: nn.Module, x_TD: Tensor, dy_TO: Tensor) -> None:
    """Forward and backward; x needs a gradient, as everywhere but in the first layer."""
    x_TD.grad = None
    for parameter in model.parameters():
        parameter.grad = None
    model(x_TD).backward(dy_TO)
