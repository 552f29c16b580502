"""The keys of the doors that start from a run or a recipe, typed: what configs/{export,generate,...}.yaml fit into.

options = typed(Export, cfg)
"""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from omegaconf import MISSING

from mixlora.config.schema import Config, Dtype, Launch
from mixlora.config.typed import at_least
from mixlora.errors import ConfigError


@dataclass(kw_only=True)
class Evaluate(Config):
    run: str | None = None


@dataclass(kw_only=True)
class ModelNow:
    """What is said of a run's base model anew; all else is as the run has it."""

    path: str | None = None
    dtype: Dtype | None = None
    trust_remote_code: bool = False


@dataclass(kw_only=True)
class Export:
    run: str = MISSING
    to: str = MISSING
    merge: bool = False
    model: ModelNow = field(default_factory=ModelNow)


@dataclass(kw_only=True)
class Generate:
    run: str = MISSING
    prompt: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    model: ModelNow = field(default_factory=ModelNow)

    def __post_init__(self) -> None:
        at_least("max_new_tokens", self.max_new_tokens, 1)
        at_least("temperature", self.temperature, 0)


class Plots(Enum):
    png = "png"
    pdf = "pdf"


@dataclass(kw_only=True)
class Report:
    run: str = MISSING
    plots: Plots | None = None


@dataclass(kw_only=True)
class Routing(Report):
    """The same keys."""


class Format(Enum):
    md = "md"
    tex = "tex"
    csv = "csv"
    html = "html"
    all = "all"
    pins = "pins"


@dataclass(kw_only=True)
class Table:
    recipe: str = MISSING
    output_root: str = "runs"
    overrides: list[str] = field(default_factory=list)
    format: Format = Format.all
    to: str | None = None
    include_dirty: bool = False
    records: str | None = None
    report: bool = True
    plots: Plots | None = None


@dataclass(kw_only=True)
class Reproduce(Launch):
    recipe: str = MISSING
    output_root: str = "runs"
    overrides: list[str] = field(default_factory=list)
    dry_run: bool = False
    tflops: float = 312.0
    utilization: float = 0.4
    format: Format = Format.all
    to: str | None = None
    include_dirty: bool = False

    def __post_init__(self) -> None:
        for key in ("tflops", "utilization"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"{key} must be above 0, got {getattr(self, key)}")
        if self.format is Format.pins:
            raise ConfigError("format=pins is for python -m mixlora.table, once the runs are there")


def run_folder(run: str) -> Path:
    """The folder that `run` names. Raises ConfigError where there is none."""
    folder = Path(run)
    if not run or not folder.is_dir():
        raise ConfigError(f"run={run}: there is no such folder. Give the run folder that training named")
    return folder
