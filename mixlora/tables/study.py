"""A recipe with what has been run of it: the configuration of each point, and by it the folder of its run.

A point's configuration is composed through the door of training. Nothing here needs torch.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from mixlora.config import explain
from mixlora.config import load as configs
from mixlora.config.overrides import config_dir, normalise, spelled, store_single_tasks
from mixlora.config.schema import Config, Split
from mixlora.config.typed import suggest
from mixlora.errors import ConfigError
from mixlora.records import read_json
from mixlora.tables import comparable
from mixlora.tables import recipe as recipes
from mixlora.tables.recipe import Group, Point, Recipe
from mixlora.tables.runs import DIRTY, DONE, FAILED, MISSING, Run, read_run, validation_score

INDEX = "kept.json"  # in a folder of kept records: which run lies where, and what the study was run with


class Study:
    """A recipe and its runs under one output root.

    Where the root holds kept records (kept.json), a run is found by the overrides that it was made with, so that
    neither the place of the data nor a key that was added later hides it; without overrides of its own the study takes
    those of the records.

    Args:
        overrides: laid over every point, after the recipe's own: another source of the data, fewer steps.
        include_dirty: also use runs that were made with changed code.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        output_root: str,
        overrides: Sequence[str] = (),
        *,
        include_dirty: bool = False,
    ) -> None:
        self.recipe, self.folder, self.root = recipe, folder, Path(output_root)
        kept = self.root / INDEX
        self.kept: dict[str, Any] = read_json(kept) if kept.is_file() else {"overrides": [], "runs": []}
        self.overrides = list(overrides) or list(self.kept["overrides"])
        self.include_dirty = include_dirty
        self.read: dict[Point, Run] = {}
        recipes.check_overrides(dataclasses.replace(recipe, protocol=self.overrides))

    # ---- configurations

    @property
    def config_folder(self) -> Path | None:
        """Configs that only this recipe has: recipes/<name>/configs."""
        folder = (self.folder / "configs").resolve()
        return folder if folder.is_dir() else None

    def command(self, point: Point) -> list[str]:
        """The arguments of `python -m mixlora.train` for one point."""
        extra = [] if self.config_folder is None else [f"--config-dir={self.config_folder}"]
        return [*extra, *self.point_overrides(point), spelled("output_root", str(self.root))]

    def point_overrides(self, point: Point) -> list[str]:
        return recipes.merged([*recipes.point_overrides(self.recipe, point), *self.overrides])

    @cached_property
    def groups(self) -> list[Group]:
        return recipes.groups(self.recipe)

    @cached_property
    def group_configs(self) -> dict[Group, Config]:
        """The configuration of each group; seed and rate are laid in by `config`."""
        place = None if self.config_folder is None else str(self.config_folder)
        store_single_tasks([] if place is None else [f"--config-dir={place}"])
        made = self.assembled(place) or {group: self.compose(group, place) for group in self.groups}
        check_choice(self.recipe, made)
        check_settings(self.recipe, made)
        return made

    def compose(self, group: Group, place: str | None) -> Config:
        overrides = recipes.merged([*recipes.group_overrides(self.recipe, group), *self.overrides])
        try:
            return composed(tuple(normalise(overrides, [] if place is None else [Path(place)])), place)
        except ConfigError as error:
            raise ConfigError(f"recipe {self.recipe.name}, {group}: {error}") from None

    def assembled(self, place: str | None) -> dict[Group, Config] | None:
        """Every group from a row and a column of the grid: composing takes Hydra a third of a second.

        None where the mixtures touch anything but `tasks`, or the rest touches `tasks`: then each is composed.
        """
        if self.recipe.exceptions:
            return None
        model, mixture, method = (
            next(iter(a)) for a in (self.recipe.models, self.recipe.mixtures, self.recipe.methods)
        )
        rests = {(g.model, g.method): self.compose(Group(g.model, mixture, g.method), place) for g in self.groups}
        tasks = {g.mixture: self.compose(Group(model, g.mixture, method), place) for g in self.groups}
        first = rests[model, method]
        apart = all(config.tasks == first.tasks for config in rests.values())
        apart &= all(dataclasses.replace(config, tasks=first.tasks) == first for config in tasks.values())
        if not apart:
            return None
        return {g: dataclasses.replace(rests[g.model, g.method], tasks=tasks[g.mixture].tasks) for g in self.groups}

    def config(self, point: Point) -> Config:
        config = self.group_configs[point.group]
        rate = config.train.learning_rate if point.rate is None else point.rate
        train = dataclasses.replace(config.train, learning_rate=rate)
        return dataclasses.replace(config, seed=point.seed, train=train, output_root=str(self.root))

    # ---- runs

    def run(self, point: Point) -> Run:
        """What stands in the folder of one point, before it is compared with the others."""
        if point not in self.read:
            self.read[point] = read_run(point, self.run_folder(point), self.include_dirty)
        return self.read[point]

    def run_folder(self, point: Point) -> Path:
        """Among the kept records, or else by the hash of the configuration."""
        kept = self.kept_in(point)
        return configs.run_folder(self.config(point)) if kept is None else self.root / kept

    def kept_in(self, point: Point) -> str | None:
        """The folder of a point's run among the kept records."""
        overrides = self.point_overrides(point)
        return next((entry["folder"] for entry in self.kept["runs"] if entry["overrides"] == overrides), None)

    def forget(self) -> None:
        """Read the folders again: runs have been added."""
        self.read.clear()
        self.__dict__.pop("final", None)

    def rate(self, group: Group) -> float | None:
        """The learning rate of a group: the only one, or the best on validation; None while that is open."""
        rates = self.recipe.learning_rates
        if len(rates) < 2:
            return rates[0] if rates else None
        scores = self.validation(group)
        if len(scores) < len(rates) or not any(score is not None for score in scores.values()):
            return None
        return max((r for r, s in scores.items() if s is not None), key=lambda r: (scores[r], -rates.index(r)))

    def validation(self, group: Group) -> dict[float, float | None]:
        """rate -> mean validation score at the end of its first-seed run; None where that run is lost."""
        found: dict[float, float | None] = {}
        for point in recipes.first_points(self.recipe, group):
            run = self.run(point)
            assert point.rate is not None
            if run.lost:
                found[point.rate] = None
            elif run.state in (DONE, DIRTY):
                found[point.rate] = validation_score(run.folder, self.config(point).train.load_best)
        return found

    def is_open(self, group: Group) -> bool:
        """Whether the rate of a group is still to be chosen."""
        return len(self.recipe.learning_rates) > 1 and self.rate(group) is None

    def open_run(self, point: Point) -> Run:
        """A run of the table whose rate is not known: still to be chosen, or with nothing to choose from."""
        if self.is_lost(point.group):
            return Run(point, Path(), FAILED, "no learning rate has a validation score")
        return Run(point, Path(), MISSING, "its learning rate is not chosen yet")

    def is_lost(self, group: Group) -> bool:
        """Whether every rate was tried and none can be chosen."""
        return self.is_open(group) and len(self.validation(group)) == len(self.recipe.learning_rates)

    @property
    def choosing(self) -> list[Run]:
        """The runs that choose a learning rate."""
        return [self.run(point) for group in self.groups for point in recipes.first_points(self.recipe, group)]

    def points(self) -> list[Point]:
        """Every point whose rate is known by now: the runs that choose it, then the runs of the table."""
        first = [p for group in self.groups for p in recipes.first_points(self.recipe, group)]
        chosen = [g for g in self.groups if not self.is_open(g)]
        final = [p for g in chosen for p in recipes.final_points(self.recipe, g, self.rate(g))]
        return list(dict.fromkeys([*first, *final]))

    @cached_property
    def final(self) -> dict[Group, list[Run]]:
        """The runs of the table, one a seed, compared with each other."""
        found = {}
        for group in self.groups:
            if self.is_open(group):
                found[group] = [self.open_run(Point(group, seed)) for seed in self.recipe.seeds]
            else:
                found[group] = [self.run(p) for p in recipes.final_points(self.recipe, group, self.rate(group))]
        comparable.compare([run for runs in found.values() for run in runs], self.recipe)
        return found


def scores(config: Config, task: str) -> bool:
    entry = config.tasks.mixture.get(task)
    return entry is not None and not entry.train_only


def check_choice(recipe: Recipe, made: Mapping[Group, Config]) -> None:
    """Raise a ConfigError where the rate would be chosen on the rows that the table shows."""
    for group, config in made.items():
        if len(recipe.learning_rates) > 1 and config.eval.split is Split.validation:
            raise ConfigError(
                f"recipe {recipe.name}, {group}: more than one of learning_rates with eval.split=validation: the rate "
                "would be chosen on the rows that are shown. Leave eval.split out, or give one rate"
            )


def trains(config: Config, task: str) -> bool:
    """Whether the mixture draws rows of a task that has some."""
    entry = config.tasks.mixture.get(task)
    return entry is not None and entry.splits.train is not None and entry.weight != 0 and not entry.eval_only


def check_settings(recipe: Recipe, made: Mapping[Group, Config]) -> None:
    """A cell has the runs of one mixture; those of two would be taken for seeds of one.

    Raises:
        ConfigError: two mixtures with the same setting score the same column, or no mixture scores it.
    """
    scored = {task for config in made.values() for task in config.tasks.mixture if scores(config, task)}
    for task in recipe.table.columns:
        if task not in scored:
            raise ConfigError(
                f"recipe {recipe.name}: table.columns has '{task}', which no mixture scores. {suggest(task, scored)}"
            )
    by_row: dict[tuple[str, ...], list[Group]] = {}
    for group in made:
        by_row.setdefault((group.model, group.method, recipes.setting(recipe, group.mixture)), []).append(group)
    for task, groups in itertools.product(recipe.table.columns, by_row.values()):
        mixtures = [group.mixture for group in groups if scores(made[group], task)]
        if len(mixtures) > 1:
            raise ConfigError(
                f"recipe {recipe.name}: the mixtures {' and '.join(mixtures)} both score {task} in one row of the "
                "table. Give each a `setting` of its own: {NAME: {setting: LABEL}}"
            )


@functools.cache
def composed(overrides: tuple[str, ...], config_folder: str | None) -> Config:
    """The configuration that training composes from `overrides`; nobody may change what is returned."""
    search = [] if config_folder is None else [f"hydra.searchpath=[file://{config_folder}]"]
    try:
        with outside_hydra(), initialize_config_dir(config_dir(), version_base="1.3"):
            return configs.config_of(compose("train", overrides=[*overrides, *search]))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain.hydra_error(error)) from None


@contextlib.contextmanager
def outside_hydra() -> Iterator[None]:
    """A door runs inside Hydra, which composes for one command only; step out of it while the block runs."""
    here = GlobalHydra.instance()
    before = here.hydra
    here.clear()
    try:
        yield
    finally:
        here.hydra = before
