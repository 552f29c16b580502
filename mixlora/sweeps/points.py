"""The points of a sweep: composed, checked and named before the first of them starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixlora import checks
from mixlora.config import explain
from mixlora.config import load as configs
from mixlora.config.schema import Config, Launch
from mixlora.errors import ConfigError, DataError
from mixlora.records import finished, read_lines
from mixlora.tasks import sources

LAUNCH_KEYS = frozenset(Launch.__dataclass_fields__)


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str  # what sets it apart: "method=smora seed=1"
    arguments: tuple[str, ...]  # of `python -m mixlora.train`
    folder: Path  # found from the configuration, so that the same point finds the same folder
    steps: int | None = None

    @property
    def finished(self) -> bool:
        return finished(self.folder)

    @property
    def progress(self) -> str:
        """How far the run got, from the files of its folder."""
        lines = read_lines(self.folder / "metrics.jsonl")
        if not lines:
            return ""
        last = lines[-1]
        total = "" if self.steps is None else f"/{self.steps}"
        loss = f" loss {last['loss']:.3f}" if isinstance(last.get("loss"), float) else ""
        return f"step {last['step']}{total}{loss}"


def composed(
    loader: Any, master: DictConfig, job_overrides: Sequence[Sequence[str]]
) -> tuple[list[Point], list[Config]]:
    """Every point with its checked configuration.

    Raises:
        ConfigError: naming the first point that cannot be, or two that would be one run.
        DataError: naming the first point whose source of data is not there.
    """
    shared = set.intersection(*(set(overrides) for overrides in job_overrides))
    places = [s.path for s in master.hydra.runtime.config_sources if s.provider == "command-line"]
    points, found = [], []
    for overrides in job_overrides:
        name = " ".join(override for override in overrides if override not in shared)
        try:
            values = loader.load_sweep_config(master, list(overrides))
            config = configs.config_of(OmegaConf.masked_copy(values, [key for key in values if key != "hydra"]))
            checks.check(config)
            sources.require(config.tasks.mixture.values(), config.data.source)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(said_of(name, explain.hydra_error(error))) from None
        except (ConfigError, DataError) as error:
            raise type(error)(said_of(name, str(error))) from None
        arguments = [*(f"--config-dir={place}" for place in places), *filter(is_runs, overrides)]
        # A config of the group `sweep` says what to sweep over; in a point it must not start a sweep again.
        folder = configs.run_folder(config)
        points.append(Point(name or folder.name, (*arguments, "hydra.mode=RUN"), folder, config.train.max_steps))
        found.append(config)
    refuse_doubles(points)
    return points, found


def said_of(point: str, message: str) -> str:
    return f"{point}: {message}" if point else message


def is_runs(override: str) -> bool:
    """Whether an override is a run's own, not about how the sweep is run."""
    return override.partition("=")[0].lstrip("+~").partition(".")[0] not in LAUNCH_KEYS


def refuse_doubles(points: Sequence[Point]) -> None:
    names: dict[Path, str] = {}
    for point in points:
        if point.folder in names:
            raise ConfigError(
                f"two points would be one run, {point.folder}: {names[point.folder]} and {point.name}. "
                "Sweep over keys that decide a result, and set output_root in place of run_dir"
            )
        names[point.folder] = point.name
