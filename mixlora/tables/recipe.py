"""A recipe: the grid of runs behind a table, what they share, what a paper printed, and the shape of the table.

    points = models × mixtures × methods × learning rates × seeds, less what an exception leaves out

A point is a list of Hydra overrides, the same ones a person would type. Where there is more than one learning rate,
the rate of each (model, mixture, method) is chosen on the validation split with the first seed, and the other seeds run
with that rate only.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import yaml

from mixlora.config.schema import Launch
from mixlora.config.typed import suggest, typed
from mixlora.errors import ConfigError

# What the grid or the door decides, so no list of overrides may.
RESERVED = frozenset({"seed", "train.learning_rate", "output_root", "run_dir", "resume", "dry_run"})
RESERVED |= Launch.__dataclass_fields__.keys()


@dataclass(kw_only=True)
class Axis:
    """One value of an axis: its label in the table and its overrides; without any, `<group>=<name>`."""

    label: str = ""
    overrides: list[str] = field(default_factory=list)
    setting: str = ""  # of a mixture: the row that its runs belong to, where a table compares mixtures


@dataclass(kw_only=True)
class Departure:
    """What holds for some points only: `where` names values of the axes model, mixture, method."""

    where: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    leave_out: bool = False


@dataclass(kw_only=True)
class Published:
    """One row that a paper printed. A row whose method is not in the grid has a label and is shown as printed."""

    method: str = ""
    model: str = ""
    setting: str = ""
    label: str = ""
    values: dict[str, float] = field(default_factory=dict)  # column -> percent, digit by digit
    parameters: int | None = None
    mean: float | None = None


@dataclass(kw_only=True)
class Claim:
    """A printed difference in percentage points: `better` minus `worse`, over the mean of the columns."""

    better: str = ""
    worse: str = ""
    delta: float = 0.0


class Order(Enum):
    grid = "grid"
    score = "score"  # the highest mean first, within a model


class Extra(Enum):
    trainable = "trainable"
    activated = "activated"
    tokens_per_second = "tokens_per_second"
    peak_memory = "peak_memory"


@dataclass(kw_only=True)
class Shape:
    columns: dict[str, str] = field(default_factory=dict)  # task -> label, in order
    metrics: dict[str, str] = field(default_factory=dict)  # task -> a metric other than the task's own
    mean: str | None = "Avg"  # label of the column with the unweighted mean; null for none
    base: str | None = "base model"  # label of the row with the scores before training; null for none
    order: Order = Order.grid
    extra: list[Extra] = field(default_factory=list)
    decimals: int = 1


@dataclass(kw_only=True)
class Pins:
    """What the runs must have been made with; whatever differs is left out of the table and marked.

    `python -m mixlora.table recipe=NAME format=pins` prints those of the runs that are there.
    """

    data: dict[str, dict[str, str]] = field(default_factory=dict)  # task -> split -> sha256
    prompts: dict[str, dict[str, str]] = field(default_factory=dict)  # model -> task -> sha256 of all that asks it
    weights: dict[str, str] = field(default_factory=dict)  # model -> sha256 of the loaded base: its revision and dtype
    protocol_version: int | None = None


@dataclass(kw_only=True)
class Recipe:
    """recipes/<name>/recipe.yaml."""

    name: str = ""  # of its folder; filled in by `load`
    title: str = ""
    notes: list[str] = field(default_factory=list)  # what a reader of the table must know
    source: str = ""  # of the published numbers; empty where there are none
    models: dict[str, Axis | None] = field(default_factory=dict)
    mixtures: dict[str, Axis | None] = field(default_factory=dict)
    methods: dict[str, Axis | None] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    learning_rates: list[float] = field(default_factory=list)
    protocol: list[str] = field(default_factory=list)  # overrides that every run shares
    exceptions: list[Departure] = field(default_factory=list)
    published: list[Published] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    table: Shape = field(default_factory=Shape)
    pins: Pins = field(default_factory=Pins)


@dataclass(frozen=True)
class Group:
    """The points that differ in seed and learning rate only."""

    model: str
    mixture: str
    method: str

    def __str__(self) -> str:
        return f"{self.model} · {self.mixture} · {self.method}"


@dataclass(frozen=True)
class Point:
    """One run: a group, a seed and, where the recipe has rates, one of them."""

    group: Group
    seed: int
    rate: float | None = None

    def __str__(self) -> str:
        rate = "" if self.rate is None else f" · rate {self.rate:g}"
        return f"{self.group} · seed {self.seed}{rate}"


def folders() -> list[Path]:
    """Where recipes lie: at the top of the repository or inside an installed wheel."""
    here = Path(__file__).resolve().parents[1]
    return [folder for folder in (here / "recipes", here.parent / "recipes") if folder.is_dir()]


def names() -> list[str]:
    return sorted(path.parent.name for folder in folders() for path in folder.glob("*/recipe.yaml"))


def find(name: str) -> Path:
    """The folder of a recipe, by name or by path."""
    for folder in (Path(name), *(place / name for place in folders())):
        if (folder / "recipe.yaml").is_file():
            return folder
    raise ConfigError(f"There is no recipe '{name}'. {suggest(name, names())}")


def name_of(folder: Path) -> str:
    """What `find` finds the folder by."""
    return folder.name if folder.parent in folders() else str(folder)


def load(name: str) -> Recipe:
    """Read and check a recipe.

    Raises:
        ConfigError: a file that is not there, an unknown key, a name that fits nothing in the recipe.
    """
    folder = find(name)
    path = folder / "recipe.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no mapping")
    try:
        recipe = typed(Recipe, values)
        recipe.name = folder.name
        check(recipe)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return recipe


def check(recipe: Recipe) -> None:
    """Everything that can be wrong without composing a configuration."""
    for key in ("models", "mixtures", "methods", "seeds"):
        if not getattr(recipe, key):
            raise ConfigError(f"{key} is empty. Give it at least one entry")
    if not recipe.table.columns:
        raise ConfigError("table.columns is empty. List the tasks of the table: {gsm8k: GSM8K}")
    if recipe.table.decimals < 0:
        raise ConfigError(f"table.decimals={recipe.table.decimals} is below 0")
    for key, entries in (("seeds", recipe.seeds), ("learning_rates", recipe.learning_rates)):
        if len(set(entries)) < len(entries):
            raise ConfigError(f"{key}={entries} names a value twice")
    for rate in recipe.learning_rates:
        if not 0 < rate < float("inf"):
            raise ConfigError(f"learning_rates must be positive numbers, got {rate}")
    if len(recipe.learning_rates) > 1 and not any(o.startswith("train.eval_steps=") for o in recipe.protocol):
        raise ConfigError(
            "more than one of learning_rates needs train.eval_steps in protocol: the rate is chosen on validation"
        )
    check_overrides(recipe)
    check_names(recipe)


def check_overrides(recipe: Recipe) -> None:
    lists = {"protocol": recipe.protocol}
    for key in ("models", "mixtures", "methods"):
        lists |= {f"{key}.{name}": axis.overrides for name, axis in getattr(recipe, key).items() if axis is not None}
    lists |= {f"exceptions[{i}]": departure.overrides for i, departure in enumerate(recipe.exceptions)}
    for place, overrides in lists.items():
        for override in overrides:
            key, equals, _ = override.lstrip("+").partition("=")
            if not equals and not override.startswith("~"):
                raise ConfigError(f"{place}: '{override}' is not an override. Write key=value")
            fixed = key == "train.learning_rate" and not recipe.learning_rates
            if RESERVED & {key, key.partition(".")[0]} and not fixed:
                raise ConfigError(f"{place}: '{override}' is decided by the grid or the command line. Remove it")


def check_names(recipe: Recipe) -> None:
    """Every name in exceptions, published numbers and claims must be one of an axis."""
    axes: dict[str, Mapping[str, object]] = {
        "model": recipe.models,
        "mixture": recipe.mixtures,
        "method": recipe.methods,
        "setting": dict.fromkeys(settings(recipe)),
    }
    labels = Counter(label(recipe.methods, name) for name in recipe.methods)
    if alike := [text for text, number in labels.items() if number > 1]:
        raise ConfigError(
            f"two of methods have the label '{alike[0]}', and nobody could tell their rows apart. Give one another"
        )
    for i, departure in enumerate(recipe.exceptions):
        for axis, value in departure.where.items():
            if axis not in ("model", "mixture", "method"):
                known = suggest(axis, ("model", "mixture", "method"))
                raise ConfigError(f"exceptions[{i}].where has no axis '{axis}'. {known}")
            known_name(value, axes[axis], f"exceptions[{i}].where.{axis}")
    for i, row in enumerate(recipe.published):
        if not row.method and not row.label:
            raise ConfigError(f"published[{i}] needs a method of the grid, or a label")
        for axis in ("method", "model", "setting"):
            if value := getattr(row, axis):
                known_name(value, axes[axis], f"published[{i}].{axis}")
        for column in row.values:
            known_name(column, recipe.table.columns, f"published[{i}].values")
    for i, claim in enumerate(recipe.claims):
        known_name(claim.better, recipe.methods, f"claims[{i}].better")
        known_name(claim.worse, recipe.methods, f"claims[{i}].worse")
    if recipe.table.mean is None and (recipe.claims or recipe.table.order is Order.score):
        key = "claims" if recipe.claims else "table.order=score"
        raise ConfigError(f"{key} is by the mean of the columns, and table.mean is null. Give it a label")
    for column in recipe.table.metrics:
        known_name(column, recipe.table.columns, "table.metrics")
    check_pins(recipe)


def check_pins(recipe: Recipe) -> None:
    """A pin of something that the table does not have would never be looked at."""
    pins = recipe.pins
    looked_up: list[tuple[str, Mapping[str, object], Mapping[str, object]]] = [
        ("pins.data", pins.data, recipe.table.columns),
        ("pins.prompts", pins.prompts, recipe.models),
        ("pins.weights", pins.weights, recipe.models),
        *((f"pins.prompts.{model}", tasks, recipe.table.columns) for model, tasks in pins.prompts.items()),
    ]
    for place, names, known in looked_up:
        for name in names:
            known_name(name, known, place)
    hashes = list(pins.weights.values())
    hashes += [sha256 for part in (pins.data, pins.prompts) for some in part.values() for sha256 in some.values()]
    for value in hashes:
        if not re.fullmatch(r"[0-9a-f]{64}", value):
            raise ConfigError(f"pins: '{value}' is not a sha256. `mixlora.table format=pins` prints those of the runs")


def known_name(name: str, known: Mapping[str, object], place: str) -> None:
    if name not in known:
        raise ConfigError(f"{place}: there is no '{name}'. {suggest(name, known)}")


def settings(recipe: Recipe) -> list[str]:
    """The rows that mixtures are put into, in order; one without a name where the recipe names none."""
    return list(dict.fromkeys(axis.setting if axis else "" for axis in recipe.mixtures.values()))


def setting(recipe: Recipe, mixture: str) -> str:
    axis = recipe.mixtures[mixture]
    return axis.setting if axis else ""


def label(axis: Mapping[str, Axis | None], name: str) -> str:
    entry = axis[name]
    return entry.label or name if entry else name


def group_label(recipe: Recipe, group: Group) -> str:
    """Method, and before it what there are several of."""
    parts = [(recipe.models, group.model), (recipe.mixtures, group.mixture), (recipe.methods, group.method)]
    return " · ".join(label(axis, name) for i, (axis, name) in enumerate(parts) if len(axis) > 1 or i == 2)


def groups(recipe: Recipe) -> list[Group]:
    """In the order of the recipe, without what an exception leaves out."""
    whole = (Group(a, b, c) for a in recipe.models for b in recipe.mixtures for c in recipe.methods)
    return [group for group in whole if not any(d.leave_out for d in departures(recipe, group))]


def departures(recipe: Recipe, group: Group) -> Iterator[Departure]:
    for departure in recipe.exceptions:
        if all(getattr(group, axis) == value for axis, value in departure.where.items()):
            yield departure


def group_overrides(recipe: Recipe, group: Group) -> list[str]:
    """What every run of the group is started with; later ones win: protocol, model, mixture, method, exceptions."""
    axes = (
        ("model", recipe.models, group.model),
        ("tasks", recipe.mixtures, group.mixture),
        ("method", recipe.methods, group.method),
    )
    own = [override for key, axis, name in axes for override in entry_overrides(key, axis, name)]
    return merged([*recipe.protocol, *own, *(o for d in departures(recipe, group) for o in d.overrides)])


def entry_overrides(key: str, axis: Mapping[str, Axis | None], name: str) -> list[str]:
    entry = axis[name]
    return list(entry.overrides) if entry and entry.overrides else [f"{key}={name}"]


def merged(overrides: Sequence[str]) -> list[str]:
    """Each key once, with its last value: Hydra takes a group only once."""
    last = {override.lstrip("+").partition("=")[0]: override for override in overrides}
    return list(last.values())


def point_overrides(recipe: Recipe, point: Point) -> list[str]:
    rate = [] if point.rate is None else [f"train.learning_rate={point.rate!r}"]
    return [*group_overrides(recipe, point.group), *rate, f"seed={point.seed}"]


def first_points(recipe: Recipe, group: Group) -> list[Point]:
    """The runs that choose the rate: every rate with the first seed. None where there is nothing to choose."""
    if len(recipe.learning_rates) < 2:
        return []
    return [Point(group, recipe.seeds[0], rate) for rate in recipe.learning_rates]


def final_points(recipe: Recipe, group: Group, rate: float | None) -> list[Point]:
    """The runs of the table: every seed with the chosen rate."""
    return [Point(group, seed, rate) for seed in recipe.seeds]
