"""From a folder on disk to the model that was trained in it."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mixlora.adapters import files
from mixlora.adapters.attach import adapter_tensors, place, prepared
from mixlora.config import load as configs
from mixlora.config.doors import ModelNow
from mixlora.config.overrides import config_dir
from mixlora.config.schema import Config, Data, Method, Model
from mixlora.config.typed import typed
from mixlora.errors import CheckpointError
from mixlora.models import base
from mixlora.tasks.prompts import Formatter


def load(folder: Path, device: str = "cpu", now: ModelNow | None = None) -> base.Base:
    """Base model with the adapter attached and its tensors loaded, in evaluation mode.

    Raises:
        ConfigError, CheckpointError, DataError: naming what is missing or does not fit.
    """
    model, method, adapter_folder = looked_up(folder, now)
    loaded = base.load(for_device(model, device), device=device)
    if adapter_folder == run_of(folder):  # no configuration but the adapter's own
        files.refuse_elsewhere(folder, loaded.model)
        method = files.without_excluded(folder, method, loaded.model, model)
        method = files.with_patterns(method, files.patterns(folder), loaded.model, model)
    files.load(adapter_folder, attached(loaded.model, method, model))
    loaded.model.eval()
    return loaded


def attached(model: nn.Module, method: Method, names: Model) -> dict[str, Tensor]:
    """The tensors of an adapter that is trained already: whether it should be trained is not asked again."""
    place(model, prepared(model, method, names))
    return adapter_tensors(model)


def for_device(model: Model, device: torch.device | str) -> Model:
    """What was trained with flash attention computes the same on a CPU, which has none, by another."""
    if torch.device(device).type == "cpu" and "flash" in model.attn_implementation:
        return dataclasses.replace(model, attn_implementation="sdpa")
    return model


def run_of(folder: Path) -> Path:
    """The run that an adapter lies in, which knows more of its base model; of another adapter its own folder."""
    inside = folder.name == "adapter" and all((folder.parent / name).is_file() for name in ("config.yaml", "run.json"))
    return folder.parent if inside else folder


def tokenizer(folder: Path, now: ModelNow | None = None) -> PreTrainedTokenizerBase:
    return base.load_tokenizer(as_it_is_now(described(folder)[0], folder, now or ModelNow()))


def formatter(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Formatter:
    """How the model of a folder was asked in training; as a run asks by itself where the folder does not say."""
    folder = run_of(folder)
    return Formatter(tokenizer, config_of(folder).data if (folder / "config.yaml").is_file() else Data())


def described(folder: Path) -> tuple[Model, Method, Path]:
    """Base model, method and adapter folder that a folder names."""
    folder = run_of(folder)
    if (folder / "config.yaml").is_file():
        config = config_of(folder)
        if not (folder / "adapter" / files.CONFIG).is_file():
            raise CheckpointError(f"{folder} has no finished adapter. Run its training command again; it goes on")
        return config.model, config.method, folder / "adapter"
    method, origin = files.method_of(folder)
    model, revision = model_of(origin), files.read_config(folder).get("revision")
    said = {"revision": revision or model.revision, **files.names_of(folder)}
    return typed(Model, configs.plain(model) | said, "mixlora_names"), method, folder


def looked_up(folder: Path, now: ModelNow | None = None) -> tuple[Model, Method, Path]:
    """The same, with what the caller says of the base model, and how the base of an adapter keeps its weights, which
    the adapter does not say."""
    model, method, adapter_folder = described(folder)
    model = as_it_is_now(model, folder, now or ModelNow())
    if adapter_folder == run_of(folder) and model.path is not None:
        model = dataclasses.replace(model, quantization=base.stored(model))
    return model, method, adapter_folder


def as_it_is_now(model: Model, folder: Path, now: ModelNow) -> Model:
    """The base model that a folder names, with what the caller says of it.

    Raises:
        ConfigError: there is no such folder, or `folder` asks for code of others and the caller does not.
    """
    if now.path is not None:
        model = dataclasses.replace(model, **configs.of_path(now.path, model.gguf_file))
    if now.dtype is not None:
        model = dataclasses.replace(model, dtype=now.dtype)
    configs.require_folder(model)
    if now.trust_remote_code:
        return dataclasses.replace(model, trust_remote_code=True)
    configs.require_trust(model, folder)
    return model


def model_now(path: str | Path | None, dtype: Any, trust_remote_code: bool) -> ModelNow:
    """What Python says of a base model; a dtype by its name, or torch's own."""
    said = {
        "path": None if path is None else os.path.expanduser(path),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "trust_remote_code": trust_remote_code,
    }
    return typed(ModelNow, said)


def model_of(origin: str) -> Model:
    """What an adapter calls its base: a name of configs/model, or else a hub id or a folder (`./name`)."""
    path = Path(config_dir()) / "model" / f"{origin}.yaml"
    if origin.startswith(".") or not path.is_file():
        return Model(name=origin, path=origin)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return typed(Model, values.get("model", values), "model")  # a file that sets other keys besides has it as a key


def config_of(folder: Path) -> Config:
    """The typed configuration of a run folder."""
    return configs.config_of(configs.read(folder))
