"""What can be seen to be wrong before transformers is imported and any data is read."""

import os
from collections.abc import Mapping
from functools import partial
from importlib import metadata

from mixlora import environment, gates, losses
from mixlora.config.load import check_adapter_dtype, digest, require_folder, require_quantizer, run_folder
from mixlora.config.schema import Config, Model, Quantization, Scope, Tracker
from mixlora.config.typed import suggest
from mixlora.environment import switched_on, world_size
from mixlora.errors import ConfigError
from mixlora.evaluation import protocols
from mixlora.records import finished_as, require_place
from mixlora.tasks import sources

# What Accelerate calls to compute in the dtypes that the tensors have, by the operators that the model names.
AS_THEY_ARE = "no"
# Settings of Accelerate that are refused, and what is there in their place. Autocast would compute routers in the lower
# dtype, and training otherwise than the scores before and after it; a compiler would get the whole model, with what
# changes in it from step to step.
INSTEAD = {
    "mixed_precision": "the base model computes in model.dtype and adapters stay in method.adapter_dtype. Set "
    "model.dtype=bfloat16 or float16",
    "dynamo_backend": "decoder layers alone are compiled. Set train.torch_compile=true",
}

# Names of transformers' attentions; one of the hub's kernels has a / in its name.
ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


def check(config: Config) -> None:
    """Raise a ConfigError for the first of surroundings, gate, losses, protocol and ways to compute that cannot be."""
    check_accelerate(os.environ)
    check_shards(config, os.environ)
    losses.build(config.aux_loss)
    if config.method.gate is not None:
        gates.kind_and_options(config.method.gate)
    elif config.aux_loss:
        raise ConfigError(
            f"aux_loss.{next(iter(config.aux_loss))} is a loss of routers, and method={config.method.name} has none. "
            "Set aux_loss=none, or choose a method with a gate"
        )
    protocols.check(config)
    require_folder(config.model)
    require_quantizer(config.model)
    check_attention(config.model)
    if config.train.torch_compile and config.model.gradient_checkpointing:
        raise ConfigError(
            "train.torch_compile=true compiles nothing of layers that model.gradient_checkpointing=true computes "
            "twice. Set one of them to false"
        )


def check_training(config: Config) -> None:
    """What makes no difference to a model that is trained already."""
    if config.method.gate is not None:
        gates.require_whole_groups(config.method)
        if config.method.scope is Scope.feed_forward:
            gates.require_weights_of_one(config.method)
    if config.train.max_tokens is not None and not config.train.packing:
        raise ConfigError(
            f"train.max_tokens={config.train.max_tokens} is of packed rows, and train.packing=false. Set it to null"
        )
    check_losses(config)
    check_adapter_dtype(config.method, config.model.dtype.value)
    require_tracker(config.tracker)


def check_losses(config: Config) -> None:
    """Refuse a loss over routers of several sizes, and one that counts padding where packing leaves none."""
    for name, loss in losses.build(config.aux_loss).items():
        if getattr(loss, "count_padding", False) and config.train.packing:
            raise ConfigError(
                f"aux_loss.{name}.count_padding=true counts padding, and train.packing=true leaves none. Set "
                "train.packing=false, or count_padding to false"
            )
        assert config.method.gate is not None  # see `check`
        kind, _ = gates.kind_and_options(config.method.gate)
        counts = getattr(loss, "share", None) in (losses.Share.assignments, losses.Share.slots)
        if counts and kind.uses_every(config.method):
            raise ConfigError(
                f"aux_loss.{name} would be the same whatever the routers do, for each token uses every expert. Set "
                f"aux_loss.{name}.share=soft, or aux_loss=none"
            )
        experts = config.method.num_experts
        over = getattr(loss, "over", None)
        if over is losses.Over.model and isinstance(experts, list) and len({*experts}) > 1:
            raise losses.unlike(over, experts)


def check_accelerate(environment: Mapping[str, str]) -> None:
    """Refuse settings of Accelerate that would change how a model computes behind the configuration's back."""
    for key, instead in INSTEAD.items():
        name = f"ACCELERATE_{key.upper()}"
        asked = environment.get(name, AS_THEY_ARE).lower()
        if asked != AS_THEY_ARE:
            raise ConfigError(
                f"Accelerate is set to {key}={asked} (its config file, a flag of `accelerate launch`, or {name}), "
                f"which is not supported: {instead}, and {key} to '{AS_THEY_ARE}'"
            )


def check_shards(config: Config, environment: Mapping[str, str]) -> None:
    """Refuse DeepSpeed, Megatron-LM and FSDP 1, settings that would be passed over, and 8-bit weights under FSDP, which
    makes plain parameters of them."""
    asks_for = partial(switched_on, environment=environment)
    for name, kind in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if asks_for(name):
            raise ConfigError(
                f"{kind} is not supported. Use configs/distributed/zero2.yaml or zero3.yaml, which cut the same things "
                "into parts"
            )
    sharded = asks_for("ACCELERATE_USE_FSDP")
    several = world_size(environment) > 1
    for name, remedy in (
        ("FSDP_OFFLOAD_PARAMS", "Leave it out; model.quantization=nf4 makes the base smaller"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "Leave it out and set model.gradient_checkpointing=true"),
    ):
        if sharded and asks_for(name):
            raise ConfigError(f"{name.lower()}=true, in the file for Accelerate, has no effect here. {remedy}")
    if sharded and several and environment.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("FSDP 1 is not supported. Set fsdp_version: 2, as in configs/distributed/fsdp2.yaml")
    if sharded and several and config.model.quantization is Quantization.int8:
        raise ConfigError(
            "model.quantization=int8 under FSDP is not supported: what belongs to an 8-bit weight would be lost. Set "
            "model.quantization=nf4, or use configs/distributed/ddp.yaml"
        )


def require_tracker(tracker: Tracker) -> None:
    """Accelerate leaves a tracker out that is not installed, and says so to nobody."""
    able = {Tracker.none: (), Tracker.wandb: ("wandb",), Tracker.tensorboard: ("tensorboard", "tensorboardX")}[tracker]
    if able and not any(map(installed, able)):
        raise ConfigError(f"tracker={tracker.value} needs {tracker.value}: pip install {tracker.value}")


def installed(package: str) -> bool:
    """Not by what Python can import: a folder `wandb`, which that package leaves where it ran, would do."""
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def check_attention(model: Model) -> None:
    name = model.attn_implementation
    if name not in ATTENTIONS and "/" not in name:
        raise ConfigError(
            f"model.attn_implementation={name!r} is no attention of transformers. {suggest(name, ATTENTIONS)}"
        )


def check_run(config: Config, world_size: int) -> None:
    """`check`, and that the run has a folder of its own and data to read.

    Args:
        world_size: processes that will run it.

    Raises:
        ConfigError: its folder holds a finished run of another configuration or of other processes, or cannot be made.
        DataError: a source that is not there; a finished run is shown without one.
    """
    check(config)
    check_training(config)
    # One of several ranks may lack what the others have, which only their process group can tell them.
    is_rank = environment.world_size() > 1
    if not finished_as(run_folder(config), digest(config), world_size) and not is_rank:
        if not config.dry_run:
            require_place(run_folder(config))
        sources.require(config.tasks.mixture.values(), config.data.source)
