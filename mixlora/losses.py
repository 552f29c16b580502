"""Auxiliary losses: pure functions of what the gates decided and of which tokens are real.

`configs/aux_loss/*.yaml` maps a loss to its coefficient and options. The coefficient is applied by the caller, so a
loss logs its own value. Means over tokens run over all ranks, so a rank with few tokens does not count twice.

    T tokens (any leading shape)   E experts   N real tokens   f_i share of expert i   P_i its mean probability
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixlora.config.typed import suggest, typed
from mixlora.errors import ConfigError
from mixlora.gates import Routing, tsallis_entropy


class Over(Enum):
    """Which routers are put together before f and P are taken."""

    router = "router"  # each router on its own
    layer = "layer"  # all routers of one layer (MoLA's code)
    model = "model"  # all routers (MixLoRA's code); hides a collapse behind the opposite collapse of another layer


class Reduce(Enum):
    mean = "mean"
    sum = "sum"


class Share(Enum):
    """What f counts."""

    assignments = "assignments"  # share of all assignments, sums to one: 1 is balanced, whatever k is
    slots = "slots"  # every chosen expert counts, sums to k (MixLoRA's code)
    argmax = "argmax"  # the first choice only (Switch; MixLoRA's text)
    soft = "soft"  # the mean weight, differentiable (DynMoLE's code)


@dataclass(frozen=True, kw_only=True)
class LoadBalance:
    """E · Σ_i f_i P_i (Switch Transformer eq. 4, with f normalised so that it means the same for every method)."""

    coef: float = 1e-3
    over: Over = Over.router
    reduce: Reduce = Reduce.mean
    share: Share = Share.assignments
    count_padding: bool = False

    def __call__(self, routings: Mapping[str, Routing], mask_T: Tensor) -> Tensor:
        mask_T = torch.ones_like(mask_T) if self.count_padding else mask_T
        P = token_means({name: r.probs_TE for name, r in routings.items()}, mask_T)
        f = token_means({name: self.counted(r).to(P[name].dtype) for name, r in routings.items()}, mask_T)
        return reduced([self.one(P, f, group) for group in grouped(P, self.over)], self.reduce)

    def one(self, P: Mapping[str, Tensor], f: Mapping[str, Tensor], group: list[str]) -> Tensor:
        """Every router of a group saw the same tokens, so means over routers are means over all of them."""
        if len(experts := {len(P[name]) for name in group}) > 1:
            raise ConfigError(
                f"aux_loss.load_balance.over={self.over.value} puts routers of {sorted(experts)} experts together, "
                "but needs one number of experts. Use aux_loss.load_balance.over=router, or layer"
            )
        P_E, f_E = (torch.stack([means[name] for name in group]).mean(0) for means in (P, f))
        if self.share is Share.assignments:
            f_E = f_E / f_E.sum()
        return len(P_E) * (f_E * P_E).sum()

    def counted(self, routing: Routing) -> Tensor:
        if self.share is Share.soft:
            return routing.weights_TE
        if self.share is Share.argmax:
            first_T = routing.probs_TE.argmax(-1)
            return torch.nn.functional.one_hot(first_T, routing.probs_TE.shape[-1])
        return routing.chosen_TE


@dataclass(frozen=True, kw_only=True)
class TsallisEntropy:
    """Mean normalised Tsallis entropy of the router, H in [0, 1]; q = 1 is Shannon's. A negative coef raises it."""

    coef: float = 1e-2
    q: float = 1.1
    eps: float = 1e-5
    count_padding: bool = False  # the official code counts padding here

    def __post_init__(self) -> None:
        if not self.q > 0:
            raise ConfigError(f"aux_loss.tsallis.q must be above 0, got {self.q}")

    def __call__(self, routings: Mapping[str, Routing], mask_T: Tensor) -> Tensor:
        mask_T = torch.ones_like(mask_T) if self.count_padding else mask_T
        values = {name: tsallis_entropy(r.probs_TE, self.q, eps=self.eps) for name, r in routings.items()}
        return reduced(token_means(values, mask_T).values(), Reduce.mean)


@dataclass(frozen=True, kw_only=True)
class RouterZ:
    """Mean squared log-partition of the router's logits (ST-MoE eq. 5): keeps logits small."""

    coef: float = 1e-3

    def __call__(self, routings: Mapping[str, Routing], mask_T: Tensor) -> Tensor:
        values = {name: r.logits_TS.logsumexp(-1).square() for name, r in routings.items()}
        return reduced(token_means(values, mask_T).values(), Reduce.mean)


AuxLoss = LoadBalance | TsallisEntropy | RouterZ
LOSSES: dict[str, type[AuxLoss]] = {"load_balance": LoadBalance, "tsallis": TsallisEntropy, "router_z": RouterZ}


def build(aux_loss: Mapping[str, Mapping[str, Any]]) -> dict[str, AuxLoss]:
    """The losses that a config names, by name; ConfigError for an unknown loss or option."""
    built = {}
    for name, options in aux_loss.items():
        if name not in LOSSES:
            raise ConfigError(f"There is no auxiliary loss '{name}'. {suggest(name, LOSSES)}")
        built[name] = typed(LOSSES[name], options, f"aux_loss.{name}")
    return built


def grouped(names: Iterable[str], over: Over) -> Iterable[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        key = {Over.router: name, Over.layer: layer_of(name), Over.model: ""}[over]
        groups.setdefault(key, []).append(name)
    return groups.values()


def layer_of(name: str) -> str:
    """ "model.layers.3.mlp.up_proj.gate" -> "model.layers.3": up to the first number."""
    parts = name.split(".")
    end = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: end + 1])


def reduced(values: Iterable[Tensor], reduce: Reduce) -> Tensor:
    stacked = torch.stack(list(values))
    return stacked.sum() if reduce is Reduce.sum else stacked.mean()


def token_means(values: Mapping[str, Tensor], mask_T: Tensor) -> dict[str, Tensor]:
    """Means over the real tokens of all ranks, each [T, ...] -> [...], all of them in one reduction.

    A product with the mask, not a selection: that would copy, and cost a scatter in backward. The gradient is right
    under the averaging over ranks that data-parallel wrappers do.
    """
    dtype = torch.promote_types(next(iter(values.values())).dtype, torch.float32)
    mask_N = mask_T.flatten().to(dtype)
    rows = [value.to(dtype).reshape(len(mask_N), -1) for value in values.values()]
    sums = torch.cat([mask_N.sum()[None], *(mask_N @ row for row in rows)])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        sums = OverRanks.apply(sums)
    means = (sums[1:] / sums[0].detach()).split([row.shape[1] for row in rows])
    shapes = (value.shape[mask_T.dim() :] for value in values.values())
    return {name: mean.view(shape) for name, mean, shape in zip(values, means, shapes, strict=True)}


class OverRanks(torch.autograd.Function):
    """The sum over ranks. Every rank's loss contains it, so its gradient is the sum over ranks as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient)
        return gradient
