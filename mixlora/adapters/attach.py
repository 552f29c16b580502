"""Attach a method to a model: freeze it, wrap the chosen modules, return the tensors that belong to the adapter."""

import math
from collections import Counter
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixlora import gates
from mixlora.adapters import targets, trial
from mixlora.adapters.modules import (
    Ahead,
    Fused,
    FusedFeedForward,
    FusedGatedLinear,
    FusedLoraLinear,
    GatedFeedForward,
    GatedLinear,
    LoraLinear,
    Wrapper,
)
from mixlora.config.load import check_adapter_dtype, check_method, plain
from mixlora.config.schema import Compute, Dtype, Factors, Method, Model, Scale, Scope
from mixlora.config.typed import typed
from mixlora.errors import ConfigError
from mixlora.lowrank import LowRank
from mixlora.quantized import never_repacked

QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")


def attach(model: nn.Module, method: Method, names: Model | None = None) -> dict[str, Tensor]:
    """Freeze `model`, wrap the modules that `method` targets in place, and return what trains and what is saved.

    Returns:
        Parameters and buffers of the adapter by full name; the parameters are exactly those with requires_grad.

    Raises:
        ConfigError: a target that matches nothing, a pattern that does not fit, a gate option that does not exist, a
            gate that would scale the blocks it chooses among, an adapter in float16, a model that carries one already.
    """
    method = typed(Method, plain(method), "method")  # reads "shared_a" as the enum it names, refuses what is none
    check_adapter_dtype(method, str(next(model.parameters()).dtype).removeprefix("torch."))
    if method.gate is not None:
        gates.require_whole_groups(method)
        if method.scope is Scope.feed_forward:
            gates.require_weights_of_one(method)
    place(model, prepared(model, method, names))
    return adapter_tensors(model)


def prepared(model: nn.Module, method: Method, names: Model | None = None) -> dict[str, Wrapper]:
    """Every wrapper by the name of the module that it will replace; the model is as it was.

    Raises as `attach` does, but for what makes no difference to an adapter that is trained already.
    """
    check_method(method)
    if adapted(model):
        raise ConfigError(
            "this model carries an adapter already. Take it off (mixlora.adapters.attach.detach(model)), or merge it"
        )
    never_repacked(model)  # the trial scores too
    return wrappers(model, Builder(model, method), names or Model(name="model"))


def place(model: nn.Module, built: Mapping[str, Wrapper]) -> None:
    """Freeze the model and put the wrappers into it, each in the mode (training or not) of what it stands for."""
    model.requires_grad_(False)
    for name, wrapper in built.items():
        model.set_submodule(name, wrapper.train(model.get_submodule(name).training))


def detach(model: nn.Module) -> nn.Module:
    """Put every module that a wrapper stands for back into its place: the model computes what it did before `attach`.

    Its parameters stay frozen, for nobody has noted which of them were not; `model.requires_grad_(True)` trains all.
    """
    for name, wrapper in adapted(model).items():
        model.set_submodule(name, wrapper.get_submodule("base_layer"))
    return model


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of the adapter by full name: all that a wrapper holds besides what it wraps."""
    found = {}
    for name, wrapper in adapted(model).items():
        for inner, tensor in wrapper.state_dict(keep_vars=True).items():
            if not inner.startswith("base_layer."):
                found[f"{name}.{inner}"] = tensor
    return found


def wrappers(model: nn.Module, builder: "Builder", names: Model) -> dict[str, Wrapper]:
    """What `prepared` says, by one builder."""
    method, linears = builder.method, targets.linears(model)
    chosen = targets.select(linears, method.target_modules, names, "method.target_modules")
    gated = method.gate is not None
    require_fit(model, {name: linears[name] for name in chosen}, "method.target_modules", gated=gated)
    built: dict[str, Wrapper] = {}
    if method.scope is Scope.linear:
        built |= {name: builder.linear(name, linears[name]) for name in chosen}
    else:
        blocks = feed_forward_blocks(chosen, names)
        if others := trial.other_blocks(model, blocks, names.feed_forward):
            raise ConfigError(
                f"method.scope=feed_forward: '{others[0]}' computes more than down(act(gate x) * up x), which is "
                "all that would be put in its place. Use a method with scope=linear"
            )
        built |= {name: builder.feed_forward(name, model.get_submodule(name), names) for name in blocks}
        if method.plain_modules is not None:
            plain = targets.select(linears, method.plain_modules, names, "method.plain_modules")
            outside = [name for name in plain if not any(name.startswith(block + ".") for block in blocks)]
            require_fit(model, {name: linears[name] for name in outside}, "method.plain_modules", gated=False)
            built |= {name: builder.plain(name, linears[name]) for name in outside}
    join_siblings(built, names)
    return built


def require_fit(model: nn.Module, chosen: Mapping[str, nn.Module], key: str, *, gated: bool) -> None:
    """Raise a ConfigError for the first chosen linear beside which an adapter could not do its work."""
    if wrong := trial.misfits(model, chosen, gated=gated):
        name, why = next(iter(wrong.items()))
        fit, unfit = ({targets.ending(found) for found in some} for some in (chosen.keys() - wrong.keys(), wrong))
        others = f"{key}=[{', '.join(sorted(fit - unfit))}]" if fit - unfit else "choose others by a regular expression"
        raise ConfigError(f"{key}: '{name}' {why}. Leave it out: {others}")


def join_siblings(built: Mapping[str, Wrapper], names: Model) -> None:
    """Make siblings of the linears of one module that read one input, as transformers names them."""
    for family in (QUERY_KEY_VALUE, (names.feed_forward.gate, names.feed_forward.up)):
        for parent in dict.fromkeys(name.rpartition(".")[0] for name in built):
            found = [built.get(f"{parent}.{child}") for child in dict.fromkeys(family)]
            layers: list[Any] = [layer for layer in found if isinstance(layer, Fused)]
            if len(layers) > 1 and all(related(layers[0], layer) for layer in layers):
                layers[0].siblings, ahead = layers[1:], Ahead()
                for layer in layers:
                    layer.ahead = ahead


def related(one: Any, other: Any) -> bool:
    """Whether two layers of one module may be computed side by side."""
    return one.delta.A_RD.shape == other.delta.A_RD.shape and gates.of_one_rule(one.gate, other.gate)


def feed_forward_blocks(chosen: list[str], names: Model) -> list[str]:
    """The blocks that hold the chosen linears; each must be chosen whole, for an expert is a whole block."""
    parts = targets.feed_forward(names)
    blocks = list(dict.fromkeys(name.rpartition(".")[0] for name in chosen))
    for block in blocks:
        if {name for name in chosen if name.rpartition(".")[0] == block} != {f"{block}.{part}" for part in parts}:
            raise ConfigError(
                f"method.scope=feed_forward needs method.target_modules to choose {parts} of every block and nothing "
                f"else, but it chooses other linears in '{block}'. Use method.target_modules=feed-forward"
            )
    return blocks


class Builder:
    """What each module gets: numbers from the method, stretched over the layers of this model."""

    def __init__(self, model: nn.Module, method: Method):
        self.method = method
        self.kind = None if method.gate is None else gates.kind_and_options(method.gate)
        self.depth = targets.depth(model)
        self.dtype = next(model.parameters()).dtype if method.adapter_dtype is Dtype.auto else torch_dtype(method)

    def linear(self, name: str, base: nn.Module) -> Wrapper:
        if self.method.gate is None:
            return self.plain(name, base)
        E, shared = self.at(name, "num_experts"), self.method.factors is Factors.shared_a
        kind = FusedGatedLinear if self.by_hand(base) else GatedLinear
        return kind(base, self.low_rank(name, base, E, shared_a=shared), self.gate(name, base, E))

    def plain(self, name: str, base: nn.Module) -> Wrapper:
        kind = FusedLoraLinear if self.by_hand(base) else LoraLinear
        return kind(base, self.low_rank(name, base, 1, shared_a=False))

    def by_hand(self, *linears: nn.Module) -> bool:
        """Whether a hand-written backward is wanted, and reads these linears right."""
        return self.method.compute is not Compute.eager and all(map(targets.readable, linears))

    def feed_forward(self, name: str, block: nn.Module, names: Model) -> Wrapper:
        parts = {"gate": names.feed_forward.gate, "up": names.feed_forward.up, "down": names.feed_forward.down}
        if parts["gate"] == parts["up"]:
            raise ConfigError(
                f"method.scope=feed_forward needs a gate and an up, and model.feed_forward names '{parts['up']}' for "
                "both. Use a method with scope=linear"
            )
        linears = {part: getattr(block, child) for part, child in parts.items()}
        if getattr(linears["down"], "bias", None) is not None:
            raise ConfigError(f"method.scope=feed_forward: '{name}.{parts['down']}' has a bias, which is not supported")
        if not hasattr(block, names.feed_forward.activation):
            raise ConfigError(f"model.feed_forward.activation: '{name}' has no '{names.feed_forward.activation}'")
        E, shared = self.at(name, "num_experts"), self.method.factors is Factors.shared_a
        deltas = {part: self.low_rank(name, linear, E, shared_a=shared) for part, linear in linears.items()}
        children = parts | {"activation": names.feed_forward.activation}
        kind = FusedFeedForward if self.by_hand(*linears.values()) else GatedFeedForward
        built = kind(block, children, deltas, self.gate(name, linears["gate"], E))
        if self.method.compute is Compute.lean:
            built.turn_lean()
        return built

    def low_rank(self, name: str, base: nn.Module, E: int, *, shared_a: bool) -> LowRank:
        D, O = targets.sizes(base)
        r, m = self.at(name, "r"), self.method
        dropout, scale = m.lora_dropout, self.scale(name, r)
        return LowRank(
            D,
            O,
            r=r,
            num_experts=E,
            scale=scale,
            dropout=dropout,
            shared_a=shared_a,
            dtype=self.dtype,
            device=next(base.parameters()).device,
        )

    def gate(self, name: str, base: nn.Module, E: int) -> gates.Gate:
        factory = {"dtype": torch.promote_types(self.dtype, torch.float32), "device": next(base.parameters()).device}
        assert self.kind is not None
        kind, options = self.kind
        return kind(targets.sizes(base)[0], E, self.at(name, "top_k"), options, **factory)

    def scale(self, name: str, r: int) -> float:
        k = self.at(name, "top_k") or self.at(name, "num_experts")
        alpha, rule = self.method.lora_alpha, self.method.scale
        divisor = {Scale.alpha_over_r: r, Scale.alpha_over_sqrt_r: r**0.5, Scale.alpha_over_k: k, Scale.constant: 1}
        return alpha / divisor[rule]

    def at(self, name: str, field: str) -> Any:
        return targets.stretched(getattr(self.method, field), targets.layer_of(name), self.depth, f"method.{field}")


def torch_dtype(method: Method) -> torch.dtype:
    dtype = getattr(torch, method.adapter_dtype.value)
    assert isinstance(dtype, torch.dtype)
    return dtype


def adapted(model: nn.Module) -> dict[str, Wrapper]:
    """Every wrapper of the model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Wrapper)}


def paths(model: nn.Module, compiled: Container[nn.Module] = ()) -> dict[str, int]:
    """How many wrappers train which way: eager (autograd over the plain equation), or fused, fast, lean by hand.

    Args:
        compiled: modules that are trained through torch.compile, which cannot follow every way.
    """
    ways = (w.compiled_path if w in compiled else w.path for w in adapted(model).values())
    return dict(sorted(Counter(ways).items()))


def make_lean(model: nn.Module) -> None:
    """Let every mixture in a block that computes by hand go on in its lean form."""
    for wrapper in adapted(model).values():
        wrapper.turn_lean()


def count(model: nn.Module) -> dict[str, int]:
    """Trainable parameters, and those at work for one token: the router, and at most `most_active` experts."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    idle = 0
    for wrapper in adapted(model).values():
        gate = wrapper.gate
        for low_rank in (m for m in wrapper.children() if isinstance(m, LowRank)):
            share = 0 if gate is None else 1 - gate.most_active / gate.num_experts
            shared_a = low_rank.A_RD.shape[0] < low_rank.B_RO.shape[0]
            idle += round(share * (low_rank.B_RO.numel() + (0 if shared_a else low_rank.A_RD.numel())))
    # A 4-bit weight holds two numbers in a byte.
    numbers = {linear.weight: math.prod(targets.sizes(linear)) for linear in targets.every_linear(model).values()}
    total = sum(numbers.get(p, p.numel()) for p in model.parameters())
    return {"trainable": trainable, "activated": trainable - idle, "total": total}
