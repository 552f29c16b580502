"""Adapter files in PEFT's names and layout; what PEFT would not compute carries peft_type MIXLORA, which it refuses.

model.layers.0.mlp.up_proj.delta.A_RD   <->   base_model.model.model.layers.0.mlp.up_proj.lora_A.weight
model.layers.0.mlp.up_proj.delta.B_RO   <->   base_model.model.model.layers.0.mlp.up_proj.lora_B.weight, transposed
"""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from mixlora.adapters import targets
from mixlora.adapters.attach import adapted
from mixlora.adapters.modules import LoraLinear, Wrapper
from mixlora.config.load import plain
from mixlora.config.schema import Method, Model, Scale
from mixlora.config.typed import typed
from mixlora.errors import CheckpointError, ConfigError
from mixlora.records import read_json, write_bytes, write_json

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAMES = ("attention", "feed_forward")  # of a Model: what the roles of a method mean
ENDINGS = (
    (r"(\.delta)?\.A_RD$", ".lora_A.weight"),
    (r"(\.delta)?\.B_RO$", ".lora_B.weight"),
    (r"\.gate\.router\.weight$", ".router.weight"),
    (r"\.gate\.bias_E$", ".router.balance_bias"),
)


def file_name(name: str) -> str:
    """The name of an adapter tensor in the file."""
    name = uncompiled(name)
    for ending, replacement in ENDINGS:
        name = re.sub(ending, replacement, name)
    return "base_model.model." + name


def uncompiled(name: str) -> str:
    """The name that a tensor or a module has where torch.compile wraps nothing."""
    return name.replace("._orig_mod", "").removeprefix("_orig_mod.")


def in_file(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file names them and lays them out: views of the adapter's own."""
    return {file_name(name): tensor.T if name.endswith("B_RO") else tensor for name, tensor in adapter.items()}


def save(folder: Path, adapter: Mapping[str, Tensor], model: nn.Module, method: Method, base: Model) -> None:
    """Write adapter_model.safetensors and adapter_config.json; the same tensors give the same bytes.

    Args:
        base: where the model under the adapter comes from.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in sorted(in_file(adapter).items())}
    write_bytes(folder / TENSORS, save_safetensors(tensors, metadata={"format": "pt"}))
    write_json(folder / CONFIG, config(model, method, base))


def config(model: nn.Module, method: Method, base: Model) -> dict[str, Any]:
    """adapter_config.json: PEFT's own for what it computes, else ours."""
    common = {
        "base_model_name_or_path": origin(base),
        "revision": base.revision,
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "inference_mode": True,
    }
    if loads_in_peft(model):
        return common | peft_lora(model, method)
    names = {key: plain(getattr(base, key)) for key in NAMES}
    return common | {"peft_type": "MIXLORA", "mixlora_method": plain(method), "mixlora_names": names}


def origin(base: Model) -> str:
    """Where a base model is from. A folder of the working directory could be taken for a name of ours."""
    path = base.path or ""
    bare = os.path.isdir(path) and os.path.basename(path) == path
    return f"./{path}" if bare else path or base.name


# What the linears of experts were called before transformers 5 joined all experts of a layer in one tensor. PEFT looks
# for these names in that tensor (its transformers_weight_conversion), and loads nothing beside other linears.
NAMES_OF_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj"}


def loads_in_peft(model: nn.Module) -> bool:
    """Whether PEFT computes what this adapter does: all of it plain LoRA, beside linears that PEFT finds."""
    wrappers = adapted(model)
    joined = any(name.endswith(".gate_up_proj") and p.dim() == 3 for name, p in model.named_parameters())
    found = not (joined and NAMES_OF_EXPERTS & {targets.ending(name) for name in wrappers})
    return found and all(isinstance(wrapper, LoraLinear) for wrapper in wrappers.values())


def peft_lora(model: nn.Module, method: Method) -> dict[str, Any]:
    """LoraConfig's fields. PEFT divides alpha by r (or its root), so any other scale is expressed through alpha."""
    wrappers = {uncompiled(name): wrapper for name, wrapper in adapted(model).items()}
    ranks = {name: wrapper.delta.r for name, wrapper in wrappers.items() if isinstance(wrapper, LoraLinear)}
    scales = {name: wrapper.delta.scale for name, wrapper in wrappers.items() if isinstance(wrapper, LoraLinear)}
    first = next(iter(ranks))
    rslora = method.scale is Scale.alpha_over_sqrt_r
    alphas = {name: as_integer(scales[name] * (ranks[name] ** 0.5 if rslora else ranks[name])) for name in ranks}
    return {
        "peft_type": "LORA",
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "lora_dropout": method.lora_dropout,
        "use_rslora": rslora,
        "target_modules": endings(model, list(ranks)),
        "rank_pattern": {name: r for name, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def as_integer(alpha: float) -> float | int:
    """PEFT types alpha as an integer; a product of scale and rank is one up to rounding."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha


def endings(model: nn.Module, names: list[str]) -> list[str]:
    """Last parts of the names where these mean the same modules to PEFT; otherwise the full names."""
    short = sorted({name.rpartition(".")[2] for name in names})
    everything = [uncompiled(name).removesuffix(".base_layer") for name in targets.every_linear(model)]
    meant = {name for name in everything if name.rpartition(".")[2] in short}
    return short if meant <= set(names) else sorted(names)


def load(folder: Path, adapter: Mapping[str, Tensor]) -> None:
    """Copy the file's tensors into the adapter: all of them or none.

    Raises:
        CheckpointError: a file missing or cut off; a tensor missing, unknown, of another shape, or not finite.
    """
    saved, wanted = read_tensors(folder / TENSORS), in_file(adapter)
    remedy = "Copy the whole adapter folder again, and use the base model that it was trained on"
    require_same_tensors(saved, wanted, folder / TENSORS, remedy)
    with torch.no_grad():
        for name, tensor in saved.items():
            wanted[name].copy_(tensor)


def require_same_tensors(
    saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor], place: Path | str, remedy: str
) -> None:
    """Nothing is lacking, unknown, of another shape, or not finite in what was saved.

    Raises:
        CheckpointError: naming the place, the tensor and the remedy.
    """
    missing, unknown = sorted(set(wanted) - set(saved)), sorted(set(saved) - set(wanted))
    if missing or unknown:
        raise CheckpointError(
            f"{place} is of another adapter: lacks {missing[:3]}, has {unknown[:3]} besides. {remedy}"
        )
    for name, tensor in saved.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"has shape {list(tensor.shape)}; this model needs {list(wanted[name].shape)}"
            raise CheckpointError(f"{place}: {name} {shapes}. {remedy}")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{place}: {name} holds values that are not finite. {remedy}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing (pickled .bin files are not read)")
    try:
        return load_safetensors(path.read_bytes())
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


# What LoraConfig may set: an option that is in neither set would be another layer than W x + s B A x.
PEFT_READ = {
    *("peft_type", "base_model_name_or_path", "revision", "target_modules", "r", "lora_alpha", "use_rslora"),
    *("lora_dropout", "bias", "rank_pattern", "alpha_pattern", "init_lora_weights", "exclude_modules"),
}
PEFT_WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "inference_mode"),
    "fan_in_fan_out",  # how the base keeps W, which its module tells
    *("megatron_core", "layers_pattern", "qalora_group_size"),  # of use only beside options that are refused
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # how A and B start: see init_lora_weights
}
STARTS_BESIDE_W = {"gaussian", "eva", "orthogonal", "mica"}  # others take from W what they give to B A


def method_of(folder: Path) -> tuple[Method, str]:
    """The method and the base model that an adapter folder names: ours, or a plain LoRA that PEFT saved.

    What it says of single modules needs the model to be understood: see `without_excluded` and `with_patterns`.

    Raises:
        ConfigError: a PEFT adapter with an option that has no counterpart here.
        CheckpointError: adapter_config.json does not hold what was saved in it.
    """
    values, place = read_config(folder), folder / CONFIG
    base = str(values.get("base_model_name_or_path") or "")
    if values.get("peft_type") == "MIXLORA":
        return typed(Method, needed(values, "mixlora_method", place), "mixlora_method"), base
    refuse_unsupported(values, place)
    method = Method(
        name="peft",
        r=needed(values, "r", place),
        lora_alpha=float(needed(values, "lora_alpha", place)),
        lora_dropout=float(values.get("lora_dropout") or 0.0),
        scale=Scale.alpha_over_sqrt_r if values.get("use_rslora") else Scale.alpha_over_r,
        target_modules=needed(values, "target_modules", place),
    )
    return method, base


def refuse_unsupported(values: Mapping[str, Any], place: Path) -> None:
    """Raise a ConfigError for what PEFT saved and nothing here computes."""
    if values.get("peft_type") != "LORA":
        raise ConfigError(f"{place} has peft_type={values.get('peft_type')!r}; LORA and MIXLORA can be loaded")
    for option, value in values.items():
        of_layer_0 = option == "layers_to_transform" and value == 0
        if (value or of_layer_0) and option not in PEFT_READ | PEFT_WITHOUT_EFFECT:
            raise ConfigError(f"{place} sets {option}, which is not supported here")
    if values.get("bias", "none") != "none":
        raise ConfigError(f"{place} sets bias, which is not supported here")
    start = values.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in STARTS_BESIDE_W:
        raise ConfigError(
            f"{place} has init_lora_weights={start!r}, which starts from another W than the base model's: on "
            "the base model it computes something else. Save it in PEFT with path_initial_model_for_weight_conversion"
        )


def refuse_elsewhere(folder: Path, model: nn.Module) -> None:
    """Raise a ConfigError for a LoRA of PEFT's that stands where none can here."""
    if read_config(folder).get("peft_type") != "LORA":
        return
    beside = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in read_tensors(folder / TENSORS)}
    elsewhere = targets.every_linear(model).keys() - targets.linears(model).keys()
    elsewhere |= {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    if found := sorted(beside & elsewhere):
        raise ConfigError(
            f"{folder / TENSORS} has a LoRA beside {', '.join(found[:3])}. Here none stands beside the output head, "
            "embeddings, or parts that read no text: load the adapter in PEFT, or merge it there"
        )


# What an adapter is nothing without: the type that it is saved in, and what that is called.
NEEDED: dict[str, tuple[Any, str]] = {
    "mixlora_method": (dict, "a mapping"),
    "mixlora_names": (dict, "a mapping"),
    "r": (int, "a whole number"),
    "lora_alpha": ((int, float), "a number"),
    "target_modules": ((str, list), "a text or a list"),
}


def needed(values: Mapping[str, Any], key: str, place: Path) -> Any:
    """The value of a key; a CheckpointError where a hand has taken it out, or made something else of it."""
    (kind, called), value = NEEDED[key], values.get(key)
    if not isinstance(value, kind):
        raise CheckpointError(f"{place}: {key} must be {called}, got {value!r}. Put the file back as it was saved")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    place = folder / CONFIG
    try:
        values = read_json(place)
    except (OSError, ValueError) as error:  # no JSON, no UTF-8
        raise CheckpointError(f"{place} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{place} must hold a mapping, not {values!r:.50}. Put the file back as it was saved")
    return values


def names_of(folder: Path) -> dict[str, Any]:
    """What a mixture's folder says of the names of its base's modules; nothing in one of an earlier version."""
    values = read_config(folder)
    kept = needed(values, "mixlora_names", folder / CONFIG) if "mixlora_names" in values else {}
    return {key: kept[key] for key in NAMES if key in kept}


Patterns = dict[str, dict[str, float]]  # "r" and "lora_alpha" -> pattern of names -> value


def patterns(folder: Path) -> Patterns:
    """What a PEFT folder sets for single modules: `rank_pattern` and `alpha_pattern`."""
    values = read_config(folder)
    return {"r": values.get("rank_pattern") or {}, "lora_alpha": values.get("alpha_pattern") or {}}


def without_excluded(folder: Path, method: Method, model: nn.Module, names: Model) -> Method:
    """`method` without the linears that a PEFT folder excludes: a regular expression, or names and their ends."""
    excluded = read_config(folder).get("exclude_modules")
    if not excluded:
        return method
    chosen = targets.select(targets.linears(model), method.target_modules, names, "target_modules")

    def out(name: str) -> bool:
        if isinstance(excluded, str):
            return re.fullmatch(excluded, name) is not None
        return any(targets.ends(name, ending) for ending in excluded)

    return replace(method, target_modules=[name for name in chosen if not out(name)])


def with_patterns(method: Method, patterns: Patterns, model: nn.Module, names: Model) -> Method:
    """`method` with PEFT's patterns over names as ours over layers and scales.

    Raises:
        ConfigError: ranks that differ within a layer, or alphas that follow no rule of ours.
    """
    if not any(patterns.values()):
        return method
    linears = targets.linears(model)
    chosen = targets.select(linears, method.target_modules, names, "target_modules")
    ranks = {name: round(matched(patterns["r"], name, method.r)) for name in chosen}
    alphas = {name: matched(patterns["lora_alpha"], name, method.lora_alpha) for name in chosen}
    method = replace(method, r=by_layer(ranks, linears))
    if len(set(alphas.values())) == 1:
        return replace(method, lora_alpha=alphas[chosen[0]])
    power = 0.5 if method.scale is Scale.alpha_over_sqrt_r else 1.0
    scales = {name: alphas[name] / ranks[name] ** power for name in chosen}
    scale = scales[chosen[0]]
    for name, other in scales.items():
        if abs(other - scale) > 1e-6 * scale:
            raise ConfigError(
                f"alpha_pattern scales '{chosen[0]}' by {scale:g} and '{name}' by {other:g}. Here all modules of an "
                "adapter share one alpha or one scale; load it in PEFT, or merge it there"
            )
    return replace(method, lora_alpha=scale, scale=Scale.constant)


def matched(pattern: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first entry that is the name, or its end from a dot on, as PEFT reads it."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def by_layer(ranks: Mapping[str, int], linears: Mapping[str, nn.Module]) -> int | list[int]:
    """One rank where all are equal, else the rank of each layer; in a layer without an adapter it is of no account."""
    if len(set(ranks.values())) == 1:
        return next(iter(ranks.values()))
    depth = 1 + max((layer for name in linears if (layer := targets.layer_of(name)) is not None), default=0)
    found: dict[int, int] = {}
    for name, r in ranks.items():
        layer = targets.layer_of(name)
        if layer is None or found.setdefault(layer, r) != r:
            raise ConfigError(
                f"rank_pattern gives '{name}' a rank of its own, {r}. Here the modules of a layer share one rank; load "
                "the adapter in PEFT, or merge it there"
            )
    return [found.get(layer, 1) for layer in range(depth)]


def merge(model: nn.Module) -> None:
    """Fold every plain LoRA into its linear, W + s B A computed in float32 at least, and take the wrappers away.

    Raises:
        ConfigError: a gate decides for each token anew, so no single weight gives the same outputs.
    """
    wrappers = adapted(model)
    require_mergeable(wrappers)
    for name, wrapper in wrappers.items():
        assert isinstance(wrapper, LoraLinear)
        weight, delta = weight_of(wrapper), wrapper.delta
        precise = torch.promote_types(weight.dtype, torch.float32)
        change = delta.scale * delta.B_RO.to(precise).T @ delta.A_RD.to(precise)
        transposed = weight.shape != change.shape or type(wrapper.base_layer).__name__ == "Conv1D"
        with torch.no_grad():
            weight.copy_(weight.to(precise) + (change.T if transposed else change))
        model.set_submodule(name, wrapper.base_layer)


def require_mergeable(wrappers: Mapping[str, Wrapper]) -> None:
    """Raise a ConfigError for the first linear whose adapter no single weight could hold."""
    names: dict[int, str] = {}  # of the linears by where their weights lie
    for name, wrapper in wrappers.items():
        if not isinstance(wrapper, LoraLinear):
            raise ConfigError(
                f"'{name}' has a gate that weighs its experts for each token, so no single weight matrix equals it. "
                "Keep the adapter (mixlora.load reads the run folder), or train a method without a gate"
            )
        if targets.widths(wrapper.base_layer) is None or weight_of(wrapper).dtype not in targets.READABLE:
            raise ConfigError(
                f"'{name}' is quantised. Merge into plain weights: model.quantization=none, or another copy"
            )
        first = names.setdefault(weight_of(wrapper).data_ptr(), name)
        if first != name:
            raise ConfigError(
                f"'{name}' and '{first}' are one weight with an adapter for each, so no weight equals both. Keep the "
                "adapter"
            )


def weight_of(wrapper: LoraLinear) -> Tensor:
    weight = wrapper.base_layer.weight
    assert isinstance(weight, Tensor)
    return weight
