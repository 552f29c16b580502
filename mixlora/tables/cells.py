"""A table as data. A row is a (model, setting, method); `table` fills it, `render` writes it."""

from dataclasses import dataclass, field

from mixlora.tables import recipe as recipes
from mixlora.tables import statistics
from mixlora.tables.recipe import Group, Published, Recipe

Further = float | int | str | None  # in a column that is no score
MEAN = "mean"  # the name of the column with the mean of the others


@dataclass(frozen=True)
class Row:
    model: str
    setting: str  # empty where there is none
    method: str  # empty: the base model's, or a row that was only printed
    labels: tuple[str, str, str]  # of model, setting, method


@dataclass
class Cell:
    """Fractions, not percent, except `published`, which is what the paper printed."""

    values: dict[int, float] = field(default_factory=dict)  # seed -> score
    expected: int = 0  # seeds that the recipe asks for
    examples: int = 0
    empty: str = ""  # why there is no number
    dirty: bool = False
    best: bool = False
    tied: bool = False  # not the best, and not distinguishable from it
    untested: bool = False  # not the best, and not to be compared with it
    p: float | None = None  # of the comparison with the best, adjusted
    published: float | None = None
    untrained: bool = False  # the base model's score

    @property
    def mean(self) -> float | None:
        return statistics.mean_and_deviation(list(self.values.values()))[0] if self.values else None

    @property
    def deviation(self) -> float | None:
        return statistics.mean_and_deviation(list(self.values.values()))[1] if self.values else None

    @property
    def complete(self) -> bool:
        return len(self.values) == self.expected


@dataclass
class Table:
    """Everything that a rendering needs, in the order to show it."""

    recipe: Recipe
    columns: dict[str, str]  # name -> label; the mean is the last
    rows: list[Row]
    cells: dict[tuple[Row, str], Cell]
    extras: dict[tuple[Row, str], Further]
    extra_columns: dict[str, str]
    notes: list[str]
    examples: dict[str, int]
    metrics: dict[str, str]  # task -> what its column shows, where it was scored
    scoring: list[str]  # how tasks were asked, where it is not the usual way
    incomplete: set[str]  # tasks whose data lack rows
    untrained: set[str]  # tasks that were not trained on, though the mixture would

    def groups(self) -> list[list[Row]]:
        """Rows of one model together."""
        models = dict.fromkeys(row.model for row in self.rows)
        return [[row for row in self.rows if row.model == model] for model in models]


def printed_row(recipe: Recipe, printed: Published) -> Row:
    """The row of a paper's numbers where the grid has none for them."""
    model = printed.model or next(iter(recipe.models))
    place = printed.setting or (recipes.settings(recipe)[0] if printed.method else "")
    name = recipes.label(recipe.methods, printed.method) if printed.method else printed.label
    return Row(model, place, "", (recipes.label(recipe.models, model), place, name))


def belongs(recipe: Recipe, group: Group, row: Row) -> bool:
    """Whether the runs of a group stand in a row."""
    place = recipes.setting(recipe, group.mixture)
    return (group.model, group.method, place) == (row.model, row.method, row.setting)
