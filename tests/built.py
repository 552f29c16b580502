"""What several tests build: a configuration through Hydra, and the tiny model with a method attached and made busy."""

import copy
import functools
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from mixlora import gates
from mixlora.adapters.attach import attach
from mixlora.config.load import config_of
from mixlora.config.schema import Compute, Config
from mixlora.models import base

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml"))


def computes(method: str) -> list[str]:
    """Every value of method.compute that is a path of its own: a mixture in a block has a lean one, a linear none."""
    options = yaml.safe_load((CONFIGS / "method" / f"{method}.yaml").read_text(encoding="utf-8"))
    linear = options.get("method", options).get("scope", "linear") == "linear"
    return [compute.value for compute in Compute if not (linear and compute is Compute.lean)]


@functools.lru_cache
def chosen(method: str, *choices: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        found = compose("train", overrides=["model=tiny", f"method={method}", "tasks=arc", *choices])
    found.tasks.mixture = {}  # typing the tasks again and again takes longer than the tests
    return found


@functools.lru_cache
def composed(method: str, *overrides: str) -> Config:
    """The typed configuration of `method`, as the command line would give it. Not to be written to.

    Hydra composes the groups once; `key.key=value` is set on its result, which refuses keys that are not there.
    """
    keys = [override for override in overrides if "." in override.partition("=")[0]]
    config = copy.deepcopy(chosen(method, *(override for override in overrides if override not in keys)))
    for key, _, value in (override.partition("=") for override in keys):
        OmegaConf.update(config, key, yaml.safe_load(value))
    return config_of(config)


def built(config: Config) -> tuple[nn.Module, dict[str, Tensor]]:
    """The base model with the method attached, as a run begins."""
    loaded = base.load(config.model, seed=7)
    torch.manual_seed(11)
    return loaded.model, attach(loaded.model, config.method, config.model)


def busy(config: Config) -> tuple[nn.Module, dict[str, Tensor]]:
    """The same with every adapter tensor away from its start, so that each one has a say in the logits."""
    model, adapter = built(config)
    disturb(adapter)
    return model, adapter


def disturb(adapter: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in adapter.items():
            std = 0.05 if name.endswith("bias_E") else 0.2 if name.endswith("B_RO") else 0.4
            tensor.copy_(torch.randn(tensor.shape) * std)


def gate_of(
    options: dict[str, Any], in_features: int, num_experts: int, top_k: int | None, **factory: Any
) -> gates.Gate:
    """A gate as `attach` makes it from `method.gate`."""
    kind, typed = gates.kind_and_options(options)
    return kind(in_features, num_experts, top_k, typed, **factory)


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def load_of(routing: gates.Routing, mask_T: Tensor) -> Tensor:
    """How many real tokens chose each expert, by selection: what `gates.loads` computes for all gates at once."""
    return routing.chosen_TE[mask_T].sum(0)
