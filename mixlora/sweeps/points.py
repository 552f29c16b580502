"""The points of a sweep: composed, checked and named before the first of them starts."""

import contextlib
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
from mixlora.records import finished, in_use, last_row

LAUNCH_KEYS = frozenset(Launch.__dataclass_fields__)


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str  # what sets it apart: "method=smora seed=1"
    arguments: tuple[str, ...]  # of `python -m mixlora.train`
    folder: Path  # found from the configuration, so that the same point finds the same folder
    steps: int | None = None

    @property
    def finished(self) -> bool | None:
        """None where the disk does not say now, as a shared one may for a while: it is asked again."""
        with contextlib.suppress(OSError):
            return finished(self.folder)
        return None

    @property
    def in_use(self) -> bool | None:
        """Whether a run is at the point; None as above."""
        with contextlib.suppress(OSError):
            return in_use(self.folder)
        return None

    @property
    def progress(self) -> str:
        """How far the run got, from the files of its folder; nothing where they are just being replaced."""
        try:
            last = last_row(self.folder / "metrics.jsonl")
        except OSError:  # a shared disk may say so too; the sweep goes on
            return ""
        if last is None:
            return ""
        total = "" if self.steps is None else f"/{self.steps}"
        loss = f" loss {last['loss']:.3f}" if isinstance(last.get("loss"), float) else ""
        return f"step {last['step']}{total}{loss}"


def composed(
    loader: Any, master: DictConfig, job_overrides: Sequence[Sequence[str]]
) -> tuple[list[Point], list[Config]]:
    """Every point with its checked configuration.

    Raises:
        ConfigError: naming the first point that cannot be, or two that would be one run or are run in two ways.
        DataError: naming the first point whose source of data is not there.
    """
    shared = set.intersection(*(set(overrides) for overrides in job_overrides))
    refuse_choice_of_grids(job_overrides)
    switches = switches_of(master)
    points, found = [], []
    for overrides in job_overrides:
        name = " ".join(override for override in overrides if override not in shared)
        try:
            values = loader.load_sweep_config(master, list(overrides))
            config = configs.config_of(OmegaConf.masked_copy(values, [key for key in values if key != "hydra"]))
            checks.check_run(config, config.processes * config.slurm.nodes)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(said_of(name, explain.hydra_error(error))) from None
        except (ConfigError, DataError) as error:
            raise type(error)(said_of(name, str(error))) from None
        arguments = (*switches, *filter(is_runs, overrides), configs.A_POINT)
        folder = configs.run_folder(config)
        points.append(Point(name or folder.name, arguments, folder, config.train.max_steps))
        found.append(config)
    refuse_doubles(points)
    refuse_two_ways(points, found)
    return points, found


def switches_of(master: DictConfig) -> list[str]:
    """What a point must be told of where its configuration is read from."""
    hydra = master.hydra
    places = [f"--config-dir={s.path}" for s in hydra.runtime.config_sources if s.provider == "command-line"]
    name = [] if hydra.job.config_name == "train" else [f"--config-name={hydra.job.config_name}"]
    search = [override for override in hydra.overrides.hydra if override.startswith("hydra.searchpath=")]
    return [*places, *name, *search]


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


def refuse_two_ways(points: Sequence[Point], found: Sequence[Config]) -> None:
    """How a sweep is run is read once, for all of its points."""
    for key in (*Launch.__dataclass_fields__, "dry_run"):
        first = getattr(found[0], key)
        for point, config in zip(points, found, strict=True):
            if getattr(config, key) != first:
                raise ConfigError(
                    f"the points of one sweep are run in one way, but {key} is not the same in {points[0].name} and in "
                    f"{point.name}. Make two sweeps of them"
                )
    if len(points) > 1 and any(config.resume for config in found):
        raise ConfigError("resume names a checkpoint of one run; the points of a sweep go on from their own without it")


def refuse_choice_of_grids(job_overrides: Sequence[Sequence[str]]) -> None:
    """Hydra takes the grid from the first composition, in which what is swept over has no part yet."""
    grids = list(dict.fromkeys(o for overrides in job_overrides for o in overrides if o.startswith("sweep=")))
    if len(grids) > 1:
        names = ",".join(grid.partition("=")[2] for grid in grids)
        raise ConfigError(f"sweep={names} is a sweep over sweeps. For all their keys at once: sweep=[{names}]")
