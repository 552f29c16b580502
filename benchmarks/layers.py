"""One linear and one feed-forward block, adapted by PEFT, by this package, and by a loop over experts."""

from itertools import chain

import torch
import torch.nn.functional as F
from common import Any
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from mixlora.adapters import dropout as drops
from mixlora.adapters.attach import adapted, attach, join_siblings, place
from mixlora.adapters.fused import Onto, Project
from mixlora.adapters.modules import FusedGatedLinear, FusedLoraLinear
from mixlora.config.schema import Compute, Dtype, Method, Model, Scope

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


class ProductsAlone(FusedLoraLinear):
    """What no form of a gated linear can do without: its products, those of its router among them. Its gate and g ⊙ h
    cost nothing."""

    def __init__(self, mixture: FusedGatedLinear):
        super().__init__(mixture.base_layer, mixture.delta)
        self.router = mixture.gate.router

    def with_siblings(self, x_TD: Tensor) -> Any:
        layers = [self, *self.siblings]
        parts = [(layer.base_layer.weight, layer.base_layer.bias, layer.delta.A_RD) for layer in layers]
        whole = tuple(drops.draw(layer.delta.dropout, x_TD) for layer in layers)
        routers = [layer.router.weight.to(torch.promote_types(x_TD.dtype, torch.float32)) for layer in layers]
        *bases, h_TnR, _ = Project.apply(x_TD, whole, *chain(*parts), *routers)  # their gradient is one of zeros
        ys = Onto.apply(h_TnR, self.delta.scale, *bases, *(layer.delta.B_RO for layer in layers))
        own, *others = [(y_TO, None) for y_TO in ys]
        if self.ahead is not None:
            self.ahead.keep(x_TD, self.siblings, others)
        return own


def products_alone(model: nn.Module) -> nn.Module:
    """The same model with `ProductsAlone` in place of its mixtures."""
    built = {name: ProductsAlone(wrapper) for name, wrapper in adapted(model).items()}
    place(model, built)  # freezes what the mixtures trained as well
    for wrapper in built.values():
        wrapper.delta.requires_grad_(True)
        wrapper.router.requires_grad_(True)
    join_siblings(built, Model())
    return model


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
