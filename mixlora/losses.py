"""Auxiliary losses: pure functions of what the gates decided and of which tokens are real.

`configs/aux_loss/*.yaml` maps a loss to its coefficient and options. The coefficient is applied by the caller, so a
loss logs its own value. Means over tokens run over all ranks, so a rank with few tokens does not count twice.

    T tokens (any leading shape)   E experts   N real tokens   f_i share of expert i   P_i its mean probability
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mixlora.config.typed import suggest, typed
from mixlora.errors import ConfigError
from mixlora.gates import Routing, alike, tsallis_entropy


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
        P = score_means(routings, mask_T)
        f = self.shares(routings, mask_T)
        groups: dict[tuple[int, int], list[list[str]]] = {}
        for group in grouped(P, self.over):
            groups.setdefault((len(group), self.experts(P, group)), []).append(group)
        return reduced([self.values(P, f, those) for those in groups.values()], self.reduce)

    def values(self, P: Mapping[str, Tensor], f: Mapping[str, Tensor], groups: list[list[str]]) -> Tensor:
        """The loss of each of G groups of as many routers. Every router of a group saw the same tokens, so means over
        routers are means over all of them."""
        P_GE, f_GE = (
            torch.stack([means[name] for group in groups for name in group]).unflatten(0, (len(groups), -1)).mean(1)
            for means in (P, f)
        )
        if self.share is Share.assignments:
            f_GE = f_GE / f_GE.sum(-1, keepdim=True)
        return P_GE.shape[-1] * (f_GE * P_GE).sum(-1)

    def experts(self, P: Mapping[str, Tensor], group: list[str]) -> int:
        """How many experts each router of a group has."""
        if len(experts := {len(P[name]) for name in group}) > 1:
            raise unlike(self.over, experts)
        return experts.pop()

    def shares(self, routings: Mapping[str, Routing], mask_T: Tensor) -> dict[str, Tensor]:
        """f of every router."""
        if self.share is Share.soft:
            return token_means({name: r.weights_TE for name, r in routings.items()}, mask_T)
        if self.share is Share.argmax:
            return score_means(routings, mask_T, lambda p: F.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype))
        dtype = next(iter(routings.values())).logits_TS.dtype
        return token_means({name: r.chosen_TE for name, r in routings.items()}, mask_T, lambda chosen: chosen.to(dtype))


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
        if not self.eps >= 0:
            raise ConfigError(f"aux_loss.tsallis.eps must be at least 0, got {self.eps}")

    def __call__(self, routings: Mapping[str, Routing], mask_T: Tensor) -> Tensor:
        mask_T = torch.ones_like(mask_T) if self.count_padding else mask_T
        values = score_means(routings, mask_T, partial(tsallis_entropy, q=self.q, eps=self.eps))
        return torch.stack(list(values.values())).mean()


@dataclass(frozen=True, kw_only=True)
class RouterZ:
    """Mean squared log-partition of the router's logits (ST-MoE eq. 5): keeps logits small."""

    coef: float = 1e-3

    def __call__(self, routings: Mapping[str, Routing], mask_T: Tensor) -> Tensor:
        logits = {name: r.logits_TS for name, r in routings.items()}
        values = token_means(logits, mask_T, lambda z: z.logsumexp(-1).square())
        return torch.stack(list(values.values())).mean()


def unlike(over: Over, experts: Iterable[int]) -> ConfigError:
    return ConfigError(
        f"aux_loss.load_balance.over={over.value} puts routers of {sorted({*experts})} experts together, but needs one "
        "number of experts. Use aux_loss.load_balance.over=router, or layer"
    )


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
        key = {Over.router: name, Over.layer: layer_prefix(name), Over.model: ""}[over]
        groups.setdefault(key, []).append(name)
    return groups.values()


def layer_prefix(name: str) -> str:
    """ "model.layers.3.mlp.up_proj.gate" -> "model.layers.3": up to the first number."""
    parts = name.split(".")
    end = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: end + 1])


def reduced(values: Sequence[Tensor], reduce: Reduce) -> Tensor:
    joined = torch.cat(list(values))
    return joined.sum() if reduce is Reduce.sum else joined.mean()


def score_means(
    routings: Mapping[str, Routing], mask_T: Tensor, of: Callable[[Tensor], Tensor] = lambda p_LTE: p_LTE
) -> dict[str, Tensor]:
    """Mean of `of(p)` for every router, p its normalised scores: computed all at once, for a model has one kind of
    gate."""
    first = next(iter(routings.values()))
    normalized = first.normalized_score or first.score
    return token_means({name: r.logits_TS for name, r in routings.items()}, mask_T, lambda z_LTS: of(normalized(z_LTS)))


def token_means(
    values: Mapping[str, Tensor], mask_T: Tensor, of: Callable[[Tensor], Tensor] = lambda value: value
) -> dict[str, Tensor]:
    """Means of `of(value)` over the real tokens of all ranks, each [T, E] -> [...], all of them in one reduction.

    `of` gets the values of one shape stacked, [L, T, ...]. A product with the mask, not a selection: that would copy,
    and cost a scatter in backward. The gradient is right under the averaging over ranks that data-parallel wrappers do.
    """
    stacks = alike(values)
    found_LT = [of(stack) for _, stack in stacks]
    dtype = torch.promote_types(found_LT[0].dtype, torch.float32)
    mask_N = mask_T.flatten().to(dtype)
    parts_LW = [mask_N @ found.to(dtype).reshape(len(found), len(mask_N), -1) for found in found_LT]
    sums = torch.cat([mask_N.sum()[None], *(part_LW.flatten() for part_LW in parts_LW)])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        sums = OverRanks.apply(sums)
    parts = (sums[1:] / sums[0].detach()).split([part_LW.numel() for part_LW in parts_LW])
    means: dict[str, Tensor] = {}
    for (names, stack), found, part in zip(stacks, found_LT, parts, strict=True):
        # By the record's own dimensions: some blocks lay their rows side by side first, [B · S, D].
        means |= zip(names, part.view(len(names), *found.shape[stack.dim() - 1 :]), strict=True)
    return {name: means[name] for name in values}


class OverRanks(torch.autograd.Function):
    """The sum over ranks. Every rank's loss contains it, so its gradient is the sum over ranks as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return OverRanks.apply(*gradients)
