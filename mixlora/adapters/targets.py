"""Which modules of a model a method adapts, and how a layer-wise pattern is stretched over the depth."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mixlora.config.schema import Model
from mixlora.config.typed import suggest
from mixlora.errors import ConfigError


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear that text goes through by full name, the output head left out (as PEFT's all-linear does)."""
    head, text = getattr(model, "get_output_embeddings", lambda: None)(), set(text_model(model).modules())
    return {name: m for name, m in every_linear(model).items() if m in text and m is not head}


def every_linear(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if widths(m) is not None}


def text_model(model: nn.Module) -> nn.Module:
    """The part that reads text, of a model that reads images or sound as well (Gemma 3 from 4B on), else all of it.

    An adapter in another part would never run, and its layers would count in patterns over the depth.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return model
    found = model.get_decoder()  # type: ignore[operator]
    assert isinstance(found, nn.Module)
    return found


def beyond_linears(model: nn.Module) -> float:
    """Share of the weights that text goes through in tensors of three dimensions: all experts of a layer in one, which
    is no linear that an adapter could stand beside."""
    sizes = [(p.dim(), p.numel()) for p in text_model(model).parameters()]
    return sum(number for dim, number in sizes if dim == 3) / sum(number for _, number in sizes)


def widths(module: nn.Module) -> tuple[int, int] | None:
    """(D, O) of a linear; GPT-2's Conv1D keeps its weight the other way round. None for anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and isinstance(module.weight, Tensor):
        return module.weight.shape[0], module.weight.shape[1]
    return None


def sizes(linear: nn.Module) -> tuple[int, int]:
    """(D, O) of a module that is known to be a linear."""
    found = widths(linear)
    assert found is not None
    return found


def select(candidates: Iterable[str], target_modules: Any, model: Model, key: str) -> list[str]:
    """Full names that `target_modules` means: a role, a list of name endings and roles, or a regular expression.

    Raises:
        ConfigError: where an entry matches nothing, naming it and the names there are.
    """
    candidates = list(candidates)
    if not candidates:
        raise ConfigError(
            f"{key}: this model has no linear that an adapter could stand beside. Where its weights are quantised "
            "(GPTQ, AWQ), choose those that are not, with model.quantization=nf4 or int8"
        )
    roles = {"attention": model.attention, "feed-forward": feed_forward(model)}
    if target_modules == "all-linear":
        return candidates
    if isinstance(target_modules, str) and target_modules not in roles:
        found = [name for name in candidates if re.fullmatch(target_modules, name)]
        if not found:
            raise unmatched(key, target_modules, candidates, "matches the regular expression")
        return found
    endings: list[str] = []
    for entry in [target_modules] if isinstance(target_modules, str) else target_modules:
        meant = roles.get(entry, [entry])
        for ending in meant:
            if not any(ends(name, ending) for name in candidates):
                told = f"; model.{entry.replace('-', '_')} names what is {entry}" if entry in roles else ""
                raise unmatched(key, ending, candidates, "has a name that ends in", told)
        endings += meant
    return [name for name in candidates if any(ends(name, ending) for ending in endings)]


def feed_forward(model: Model) -> list[str]:
    names = model.feed_forward
    return [names.gate, names.up, names.down]


def ending(name: str) -> str:
    """The last part of a name, and the one before it where that is a number."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def unmatched(key: str, entry: str, candidates: list[str], relation: str, told: str = "") -> ConfigError:
    known = {name.rpartition(".")[2] for name in candidates}
    remedy = f"Did you mean the list [{entry}]?" if entry in known else suggest(entry, known)
    return ConfigError(f"{key}: no linear of this model {relation} '{entry}'{told}. {remedy}")


def layer_of(name: str) -> int | None:
    """The layer a module sits in: the first number of its name."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else None


def depth(model: nn.Module) -> int:
    """How many layers the model has, by the names of its linears."""
    layers = [layer_of(name) for name in linears(model)]
    return 1 + max((layer for layer in layers if layer is not None), default=0)


def left_out(value: Any, depth: int) -> list[Any]:
    """The entries of a pattern that no layer gets, for it has more of them than the model layers."""
    if not isinstance(value, list):
        return []
    used = {layer * len(value) // depth for layer in range(depth)}
    return [entry for i, entry in enumerate(value) if i not in used]


def stretched(value: Any, layer: int | None, depth: int, key: str) -> Any:
    """One number for every layer, or a pattern stretched over the depth: 2-4-6-8 means quarters, whatever the depth."""
    if not isinstance(value, list):
        return value
    if layer is None:
        raise ConfigError(f"{key} is a pattern over layers, but a chosen module sits in no layer; give one number")
    return value[layer * len(value) // depth]


# Numbers that need no scale beside them.
READABLE = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def readable(linear: nn.Module) -> bool:
    """Whether W x + b may be computed from the linear's own tensors instead of by calling it.

    Not where the weight is quantised, sharded or computed (another type, or a dtype with scales beside it), where a
    hook listens or `forward` was exchanged, or on other devices.
    """
    weight = getattr(linear, "weight", None)
    if type(linear) is not nn.Linear or type(weight) is not nn.Parameter or "forward" in vars(linear):
        return False
    heard = any((linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks))
    return not heard and weight.dtype in READABLE and weight.device.type in ("cpu", "cuda")


def trains(linear: nn.Module) -> bool:
    """Whether its own weight or bias asks for a gradient, as they may once more after `attach` has frozen them."""
    return any(p is not None and p.requires_grad for p in linear._parameters.values())
