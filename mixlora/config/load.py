"""The composed configuration as typed records, with every check that needs no torch, no data and no model."""

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Sequence, Set
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from mixlora.config.schema import Compute, Config, Eval, Launch, Method, Mixture, Model, Quantization, Scope, Train
from mixlora.config.typed import at_least, below_one, literal, positive, typed
from mixlora.errors import ConfigError

# What does not change a result, or only as memory may ask for it, and so is left out of a run's name.
NAMELESS = (
    "output_root",
    "run_dir",
    "tracker",
    "report",
    "resume",
    "dry_run",
    "rank_timeout",
    *Launch.__dataclass_fields__,
)
NAMELESS_EVAL = ("batch_size", "batch_tokens")
NAMELESS_TRAIN = ("save_steps", "save_total_limit", "logging_steps", "torch_compile", "micro_batch_size")

# A point is told that it is none of a sweep any more, where a file (a config of the group `sweep`) says that it is.
A_POINT = "hydra.mode=RUN"


def config_of(composed: DictConfig) -> Config:
    """Type and check what Hydra composed.

    Raises:
        ConfigError: an unknown key, a wrong type, a combination that cannot be.
    """
    config = typed(Config, composed)
    expand_home(config)
    check_launch(config)
    check_model(config.model)
    check_method(config.method)
    check_train(config.train)
    check_names(config.tasks)
    at_least("eval.limit", config.eval.limit, 1)
    at_least("rank_timeout", config.rank_timeout, 1)
    if config.train.max_steps is None and config.train.epochs is None:
        config.train.epochs = 1.0
    return config


def expand_home(config: Config) -> None:
    """`~` in what a file gives as a place: `overrides.normalise` has read what was typed."""
    places = ((config, "output_root"), (config, "run_dir"), (config, "resume"), (config.data, "source"))
    for record, key in (*places, (config.model, "path")):
        if (place := getattr(record, key)) is not None:
            setattr(record, key, os.path.expanduser(place))


def read(run_folder: str | Path) -> DictConfig:
    """config.yaml of a run folder, as plain data: a key `_target_` is refused, it could name any Python object."""
    path = Path(run_folder) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_folder} is not a run folder: it has no config.yaml")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no mapping")
    if names_objects(values):
        raise ConfigError(f"{path} names Python objects (_target_); mixlora does not run code from a run folder")
    return OmegaConf.create(literal(values))


def names_objects(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" in value or any(map(names_objects, value.values()))
    return isinstance(value, list) and any(map(names_objects, value))


def plain(value: Any) -> Any:
    """Dataclasses and enums as the YAML they came from."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value.value if isinstance(value, Enum) else value


def decisive(config: Config) -> dict[str, Any]:
    """Everything in the configuration that decides the result, as plain data."""
    values = {k: v for k, v in plain(config).items() if k not in NAMELESS}
    values["train"] = {k: v for k, v in values["train"].items() if k not in NAMELESS_TRAIN}
    for task in values["tasks"]["mixture"].values():
        for key in ("fixtures", "group"):  # they came later: runs of before keep their names
            if task[key] is None:
                del task[key]
    # Where memory runs out, a run goes on with less of it, by itself or as the message says that it may.
    if config.method.compute is Compute.lean:
        values["method"] = values["method"] | {"compute": Compute.fast.value}
    values["model"] = values["model"] | {"gradient_checkpointing": False}
    if config.model.quantization is not Quantization.int8:  # whose scores depend on the rows beside a row
        values["eval"] = values["eval"] | {key: getattr(Eval(), key) for key in NAMELESS_EVAL}
    return values


def digest(config: Config) -> str:
    """sha256 of everything in the configuration that decides the result."""
    values = decisive(config)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def evaluation_name(config: Config) -> str:
    """Of the folder of an evaluation. Batches are no part of what is asked, but rounding may show them."""
    usual = Eval()
    batches = [f"{key}{v}" for key in NAMELESS_EVAL if (v := getattr(config.eval, key)) != getattr(usual, key)]
    return "-".join([config.tasks.name, digest(config)[:8], *batches])


def run_folder(config: Config) -> Path:
    """The folder of this configuration: no clock in its name, so the same configuration finds the same folder."""
    if config.run_dir:
        return Path(config.run_dir)
    name = f"{config.method.name}-{config.tasks.name}-{config.model.name}-{digest(config)[:8]}"
    return Path(config.output_root) / name


def check_launch(launch: Launch) -> None:
    slurm = launch.slurm
    for key, value, least in (
        ("jobs", launch.jobs, 1), ("processes", launch.processes, 1), ("slurm.nodes", slurm.nodes, 1),
        ("slurm.time_min", slurm.time_min, 1), ("slurm.gpus_per_node", slurm.gpus_per_node, 0),
        ("slurm.cpus_per_task", slurm.cpus_per_task, 1), ("slurm.signal_delay_s", slurm.signal_delay_s, 1),
        ("slurm.max_requeues", slurm.max_requeues, 0), ("slurm.mem_gb", slurm.mem_gb, 0.001),
    ):  # fmt: skip
        at_least(key, value, least)
    if slurm.signal_delay_s >= 60 * slurm.time_min:
        raise ConfigError(
            f"slurm.signal_delay_s={slurm.signal_delay_s} leaves nothing of slurm.time_min={slurm.time_min} minutes: "
            "each job would be told to save as it starts. Lower the one or raise the other"
        )
    # submitit counts a time limit from four fifths of it on, or from ten minutes before it; SLURM is a minute early.
    if slurm.signal_delay_s > (most := max(12 * slurm.time_min, 600) - 60):
        raise ConfigError(
            f"slurm.signal_delay_s={slurm.signal_delay_s} is so long before the end of slurm.time_min={slurm.time_min} "
            f"minutes that a job which ran out of time would be counted as preempted, and queued again without end. "
            f"Lower it to {most}, or raise slurm.time_min to {math.ceil((slurm.signal_delay_s + 60) / 12)}"
        )


def refuse_launcher(config: Config, argv: Sequence[str]) -> None:
    """One run has no use for what places the points of a sweep; a point may find it in the files of its sweep."""
    if A_POINT in argv:
        return
    for key in Launch.__dataclass_fields__:
        if getattr(config, key) != getattr(Launch(), key):
            raise ConfigError(
                f"{key} is for a sweep: add -m, or sweep=NAME. It then starts each point's processes itself"
            )


def check_model(model: Model) -> None:
    """Only what is read from a path may be quantised. To look for a package within another would run the other."""
    if model.package is not None and not model.package.isidentifier():
        raise ConfigError(f"model.package={model.package}: a package that ships weights has a name without dots")
    if model.quantization is not Quantization.none and (model.random is not None or model.gguf_file is not None):
        origin = "a GGUF file" if model.random is None else "random numbers"
        raise ConfigError(
            f"model.quantization={model.quantization.value} is for weights of a hub id or a folder, and those of model="
            f"{model.name} come from {origin}. Set model.quantization=none, or choose a model with a model.path"
        )


def require_folder(model: Model) -> None:
    """A path that can only be a folder's must be one; a hub id is `owner/name`. Asked where the model is to be read:
    whose folder has moved, its run can be looked at all the same."""
    path = os.path.expanduser(model.path or "")
    if path and (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).is_dir():
        raise ConfigError(
            f"model.path={path}: there is no such folder. Give a folder or a hub id, OWNER/NAME (model_path in Python)"
        )


def of_path(path: str, gguf_file: str | None) -> dict[str, Any]:
    """Where a model comes from that lies in `path` now: from there alone, in a GGUF file where that lies there too."""
    kept = gguf_file if gguf_file and (Path(os.path.expanduser(path)) / gguf_file).is_file() else None
    return {"path": path, "gguf_file": kept, "package": None, "random": None, "revision": None}


def require_trust(model: Model, folder: str | Path, given: Set[str] = frozenset()) -> None:
    """Raise a ConfigError where a folder asks for code from outside: that of a model's repository, or a kernel of the
    hub. Its reader decides that, and not its writer.

    Args:
        given: the keys that the reader has given.
    """
    if model.trust_remote_code and "model.trust_remote_code" in given:
        return
    asked = {
        "model.trust_remote_code": "true" if model.trust_remote_code else None,
        "model.attn_implementation": model.attn_implementation if "/" in model.attn_implementation else None,
    }
    for key, value in asked.items():
        if value is not None and key not in given:
            raise ConfigError(
                f"{folder} has {key}={value}, which runs code from outside, and a folder does not decide that. If you "
                "trust it, say so: model.trust_remote_code=true (in Python or model_args trust_remote_code=True)"
            )


def quantizer(model: Model) -> tuple[str, ...]:
    """The package that quantises the model, or none."""
    return () if model.quantization is Quantization.none else ("bitsandbytes",)


def require_quantizer(model: Model) -> None:
    """Raise a ConfigError where the package that quantises is asked for and not installed."""
    for package in quantizer(model):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"model.quantization={model.quantization.value} needs {package}: pip install {package}")


def check_names(tasks: Mixture) -> None:
    """A mixture's name is part of a folder's, a task's the name of a file."""
    for key, name in (("tasks.name", tasks.name), *(("tasks.mixture", name) for name in tasks.mixture)):
        if "/" in name:
            raise ConfigError(f"{key}: '{name}' cannot be the name of a file in a run folder. Leave the / out of it")


def check_method(method: Method) -> None:
    check_targets("method.target_modules", method.target_modules)
    if method.plain_modules is not None:
        check_targets("method.plain_modules", method.plain_modules)
        if method.scope is not Scope.feed_forward:
            raise ConfigError(
                "method.plain_modules is for method.scope=feed_forward; add them to method.target_modules"
            )
    check_pattern("method.r", method.r, least=1)
    check_pattern("method.num_experts", method.num_experts, least=1)
    if method.top_k is not None:
        check_pattern("method.top_k", method.top_k, least=1)
        check_top_k(method)
    if method.gate is None and method.num_experts != 1:
        raise ConfigError(
            f"method.num_experts={method.num_experts} needs a gate: set method.gate.kind, or use 1 expert"
        )
    if method.gate is None and method.scope is Scope.feed_forward:
        raise ConfigError("method.scope=feed_forward needs a gate: set method.gate.kind, or use method.scope=linear")
    if method.gate is None and method.top_k is not None:
        raise ConfigError(f"method.top_k={method.top_k} is for a gate, and there is none: set it to null")
    positive("method.lora_alpha", method.lora_alpha)
    below_one("method.lora_dropout", method.lora_dropout)


def check_adapter_dtype(method: Method, of_base: str) -> None:
    """Refuse adapters in float16: AdamW keeps its moments in their dtype, and a gradient of 1e-4 squared is 0 there."""
    asked = method.adapter_dtype.value
    if (of_base if asked == "auto" else asked) == "float16":
        raise ConfigError(
            f"method.adapter_dtype={asked} would train adapters in float16, which cannot hold what AdamW knows of "
            "their gradients. Set method.adapter_dtype=float32; model.dtype may stay"
        )


def check_top_k(method: Method) -> None:
    """Every pair that can meet in a layer once both patterns are stretched over the depth."""
    experts, top_k = (v if isinstance(v, list) else [v] for v in (method.num_experts, method.top_k))
    parts = math.lcm(len(experts), len(top_k))
    if any(top_k[i * len(top_k) // parts] > experts[i * len(experts) // parts] for i in range(parts)):
        raise ConfigError(
            f"method.top_k={method.top_k} is above method.num_experts={method.num_experts}. Lower top_k or add experts"
        )


def check_targets(key: str, value: Any) -> None:
    """A regular expression (a role's name is one), or a list of name endings."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ConfigError(f"{key}={value!r} is not a regular expression: {error}") from None
    elif not isinstance(value, list) or not value or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(
            f"{key} must be all-linear, attention, feed-forward, a list of name endings such as [q_proj, v_proj], or a "
            f"regular expression over full names; got {value!r}"
        )


def check_pattern(key: str, value: Any, *, least: int) -> None:
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, int) or entry < least:
            raise ConfigError(f"{key} must be an integer of at least {least}, or a list of them; got {value!r}")
    if not entries:
        raise ConfigError(f"{key} is an empty list")


def check_train(train: Train) -> None:
    if train.max_steps is not None and train.epochs is not None:
        raise ConfigError("train.max_steps and train.epochs are both set; choose one (the other is null)")
    for key, least in (
        ("max_steps", 1), ("per_device_train_batch_size", 1), ("gradient_accumulation_steps", 1), ("max_length", 8),
        ("save_steps", 1), ("save_total_limit", 2), ("logging_steps", 1), ("eval_steps", 1), ("eval_limit", 1),
        ("max_tokens", train.max_length), ("micro_batch_size", 1),
    ):  # fmt: skip
        at_least(f"train.{key}", getattr(train, key), least)
    if (train.micro_batch_size or 1) > train.per_device_train_batch_size:
        raise ConfigError(
            f"train.micro_batch_size={train.micro_batch_size} is more than train.per_device_train_batch_size="
            f"{train.per_device_train_batch_size}, of which it is a part"
        )
    for key in ("learning_rate", "epochs", "max_grad_norm"):
        positive(f"train.{key}", getattr(train, key))
    for key in ("weight_decay", "adam_epsilon"):
        at_least(f"train.{key}", getattr(train, key), 0)
    for key in ("adam_beta1", "adam_beta2"):
        below_one(f"train.{key}", getattr(train, key))
    if not 0 <= train.warmup_ratio <= 1:
        raise ConfigError(
            f"train.warmup_ratio is a part of all steps, from 0 to 1, got {train.warmup_ratio}: 0.03 is 3 % of them"
        )
    if train.load_best and train.eval_steps is None:
        raise ConfigError("train.load_best=true needs train.eval_steps: how often to score the validation split")
