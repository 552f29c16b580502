"""A recipe with what has been run of it: each point's folder, how far it got, and whether it may stand in the table.

Only files are read (config.yaml, run.json, results.json, metrics.jsonl, predictions), so nothing here needs torch. A
point's folder is found by composing its configuration through the door of training.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from mixlora.config import explain
from mixlora.config import load as configs
from mixlora.config.overrides import config_dir, normalise, spelled, store_single_tasks
from mixlora.config.schema import Config
from mixlora.errors import ConfigError
from mixlora.records import differences, is_there, log_path, read_json, read_lines
from mixlora.tables import recipe as recipes
from mixlora.tables.recipe import Group, Pins, Point, Recipe

INDEX = "kept.json"  # in a folder of kept records: which run lies where, and what the study was run with

# How far a point got; the words are what the table shows.
MISSING, FAILED, UNFINISHED, DIRTY, OTHER, DONE = "not run", "failed", "unfinished", "dirty", "other data", "done"


@dataclass
class Run:
    """One point with its folder, state, and why where it is not in the table."""

    point: Point
    folder: Path
    state: str = MISSING
    reason: str = ""
    record: dict[str, Any] = field(default_factory=dict)  # run.json
    results: dict[str, Any] = field(default_factory=dict)  # results.json
    before: dict[str, Any] = field(default_factory=dict)  # results.json of the base model
    others: dict[str, str] = field(default_factory=dict)  # task -> what differs from the other runs

    def scored(self, task: str) -> bool:
        """Whether this run has a number for the table's cell of `task`."""
        return self.state == DONE and task not in self.others and self.results.get(task, {}).get("value") is not None

    @property
    def dirty(self) -> bool:
        return bool(self.record.get("git_dirty"))

    def predictions(self, task: str) -> list[dict[str, Any]]:
        """One record an example; empty where the file is not there."""
        return read_lines(self.folder / "predictions" / f"{task}.jsonl")


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
        check_settings(self.recipe, made)
        return made

    def compose(self, group: Group, place: str | None) -> Config:
        overrides = recipes.merged([*recipes.group_overrides(self.recipe, group), *self.overrides])
        try:
            return composed(tuple(normalise(overrides)), place)
        except ConfigError as error:
            where = f"recipe {self.recipe.name}, {group.model} · {group.mixture} · {group.method}"
            raise ConfigError(f"{where}: {error}") from None

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

    @cached_property
    def read(self) -> dict[Point, Run]:
        return {}

    def forget(self) -> None:
        """Read the folders again: runs have been added."""
        for name in ("read", "final"):
            self.__dict__.pop(name, None)

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
        """rate -> mean validation score at the end of its first-seed run; None where that run failed."""
        found: dict[float, float | None] = {}
        for point in recipes.first_points(self.recipe, group):
            run = self.run(point)
            assert point.rate is not None
            if run.state == FAILED:
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
        compare([run for runs in found.values() for run in runs], self.recipe)
        return found


def scores(config: Config, task: str) -> bool:
    entry = config.tasks.mixture.get(task)
    return entry is not None and not entry.train_only


def check_settings(recipe: Recipe, made: Mapping[Group, Config]) -> None:
    """A cell has the runs of one mixture; those of two would be taken for seeds of one.

    Raises:
        ConfigError: two mixtures with the same setting score the same column.
    """
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


def optional(path: Path) -> Any:
    return read_json(path) if is_there(path) else {}


def config_of(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_run(point: Point, folder: Path, include_dirty: bool) -> Run:
    path = folder / "run.json"
    attempt = log_path(folder).with_suffix(".json")
    failed = read_json(attempt) if attempt.is_file() else None
    record = read_json(path) if path.is_file() else {}
    run = Run(point, folder, record=record)
    status = record.get("status")
    if status == "finished" and (folder / "results.json").is_file():
        run.results = read_json(folder / "results.json")
        run.before = optional(folder / "before" / "results.json")
        dirty = bool(record.get("git_dirty"))
        run.state = DIRTY if dirty and not include_dirty else DONE
        run.reason = "made with code that differs from its commit; include_dirty=true takes it in" if dirty else ""
    elif status == "failed" or failed:
        run.state = FAILED
        why = record.get("message", "its run.json says so")
        run.reason = f"exit status {failed['status']}: {failed['message']}" if failed else why
    elif record:
        run.state, run.reason = UNFINISHED, f"its run.json says {status}"
    return run


def validation_score(folder: Path, best: bool) -> float | None:
    """Mean validation score of the adapter that was kept: of the last step, or of the best one."""
    lines = read_lines(folder / "metrics.jsonl")
    scores = [line["validation_mean"] for line in lines if line.get("validation_mean") is not None]
    if not scores:
        return None
    return float(max(scores) if best else scores[-1])


# ---- may these runs stand in one table?


OF_MODEL = ("max_length", "template")  # of a protocol: the model's window, and whether it has a chat template


@dataclass(frozen=True)
class Part:
    """Something that all runs of a task must share, or all those of one base model."""

    name: str
    of: Callable[[Run], Any]
    pin: Any = None
    model: str | None = None


def parts(task: str, recipe: Recipe) -> list[Part]:
    """Pins come first: a run that they leave out has no say in the rest."""
    pins = recipe.pins

    def result(key: str) -> Callable[[Run], Any]:
        return lambda run: run.results[task].get(key)

    def some(key: str, names: Callable[[str], bool]) -> Callable[[Run], Any]:
        return lambda run: {name: v for name, v in (run.results[task].get(key) or {}).items() if names(name)}

    data = pins.data.get(task, {})
    version = None if pins.protocol_version is None else {"version": pins.protocol_version}
    found = [
        Part("protocol", some("protocol", lambda name: name == "version"), version),
        Part("data", some("data", lambda name: name in data), data or None),
        Part("data", some("data", lambda name: name not in data)),
        Part("metric", result("metric")),
        Part("n", result("n")),
        Part("protocol", some("protocol", lambda name: name not in OF_MODEL)),
    ]
    for model in recipe.models:
        prompts = pins.prompts.get(model, {}).get(task)
        found.append(Part("protocol", some("protocol", lambda name: name in OF_MODEL), model=model))
        found.append(Part("prompts", result("prompts"), prompts, model))
        found.append(Part("weights", lambda run: run.record.get("weights_sha256"), pins.weights.get(model), model))
    return sorted(found, key=lambda part: part.pin is None)


def compare(runs: Sequence[Run], recipe: Recipe) -> None:
    """Mark, in `others`, each run whose data, prompts, weights or protocol differ from what the table is made of.

    What the table is made of is pinned by the recipe, or else what most of its runs have (of equals, the first).
    """
    for run in runs:
        run.others = {}
    for task in recipe.table.columns:
        for part in parts(task, recipe):
            mine = [run for run in runs if run.scored(task) and part.model in (None, run.point.group.model)]
            keep(task, part.name, [(run, part.of(run)) for run in mine], part.pin)


def keep(task: str, part: str, values: Sequence[tuple[Run, Any]], pin: Any) -> None:
    """Mark the runs whose value is not the pinned one, or not the most frequent one."""
    spelled = [json.dumps(value, sort_keys=True) for _, value in values]
    if not spelled:
        return
    wanted = json.loads(Counter(spelled).most_common(1)[0][0]) if pin is None else pin
    for run, value in values:
        if value != wanted:
            run.others.setdefault(task, change(part, value, wanted))


def change(name: str, value: Any, wanted: Any) -> str:
    """What differs, key by key: `data.test 1f2e3d4c instead of 5b6a7988`."""
    pairs = differences(value, wanted, f"{name}.").items()
    return ", ".join(f"{key} {short(mine)} instead of {short(theirs)}" for key, (mine, theirs) in sorted(pairs))


def short(value: Any) -> str:
    """A value in a note: of a hash the beginning, of a long text what fits."""
    text = "nothing" if value is None else str(value)
    if re.fullmatch(r"[0-9a-f]{40,64}", text):
        return text[:8]
    return text if len(text) <= 40 else f"{text[:37]}..."


def pins(runs: Sequence[Run], recipe: Recipe) -> Pins:
    """What the runs of a table were made with, to be pinned: of each task, and of each model."""
    made = Pins()
    for task in recipe.table.columns:
        for run in (run for run in runs if run.scored(task)):
            model, result = run.point.group.model, run.results[task]
            made.data[task] = result["data"]
            made.prompts.setdefault(model, {})[task] = result["prompts"]
            made.weights[model] = run.record["weights_sha256"]
            made.protocol_version = result["protocol"]["version"]
    return made


def provenance(runs: Sequence[Run]) -> dict[str, list[str]]:
    """What the runs of a table were made with: commits, versions, devices; each with every value that occurs."""
    done = [run for run in runs if run.state == DONE]

    def values(of: Callable[[dict[str, Any]], Iterator[Any]]) -> list[str]:
        return sorted({str(value) for run in done for value in of(run.record) if value is not None})

    return {
        "commit": values(lambda r: iter([r.get("git_commit")])),
        "versions": values(lambda r: (f"{name} {v}" for name, v in r.get("packages", {}).items() if v)),
        "device": values(lambda r: iter([r.get("device")])),
        "processes": values(lambda r: iter([r.get("world_size")])),
        "threads": values(lambda r: iter([r.get("threads")])),
    }
