"""The table of a recipe from its runs: a cell for each row and column, with its mean, spread, marks and printed value.

The cells of a row are compared with the best of the same model in the same column.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mixlora.tables import notes, statistics
from mixlora.tables import recipe as recipes
from mixlora.tables.cells import MEAN, Cell, Row, Table, belongs, printed_row
from mixlora.tables.recipe import Order, Recipe
from mixlora.tables.runs import DIRTY, FAILED, MISSING, OTHER, UNFINISHED, Run
from mixlora.tables.study import Study, scores

LEVEL = 0.05
SAME = 1e-12  # what means of equal scores may differ by, for they are sums of fractions
# Of several reasons for an empty cell the first is shown.
REASONS = (FAILED, OTHER, DIRTY, UNFINISHED, MISSING)

Scores = dict[int, dict[str, float]]  # seed -> example -> score


def build(study: Study) -> Table:
    """Read what there is of a study and put it into its table."""
    recipe = study.recipe
    rows = grid_rows(study)
    by_example: dict[tuple[Row, str], Scores] = {}
    cells: dict[tuple[Row, str], Cell] = {}
    for row in rows:
        for task in recipe.table.columns:
            cells[row, task], by_example[row, task] = cell(recipe, runs_of(study, row, task), task)
    columns = dict(recipe.table.columns)
    if recipe.table.mean is not None:
        columns[MEAN] = recipe.table.mean
        for row in rows:
            cells[row, MEAN] = mean_cell([cells[row, task] for task in recipe.table.columns])
    compare(recipe, rows, columns, cells, by_example)
    if recipe.table.order is Order.score:
        rows = sorted(rows, key=lambda row: (list(recipe.models).index(row.model), -order_score(row, cells)))
    rows = with_base(study, rows, columns, cells)
    rows = publish(recipe, rows, columns, cells)
    examples = {task: max((cells[row, task].examples for row in rows), default=0) for task in recipe.table.columns}
    extras, extra_columns = notes.extra_cells(study, rows)
    said = [*recipe.notes, *notes.changes(study), *claims(recipe, rows, cells, by_example), *notes.on_runs(study)]
    return Table(
        recipe,
        columns,
        rows,
        cells,
        extras,
        extra_columns,
        said,
        examples,
        metrics=notes.metrics(study),
        scoring=notes.scoring(study),
        incomplete=notes.incomplete(study),
        untrained=notes.untrained(study),
    )


def grid_rows(study: Study) -> list[Row]:
    recipe = study.recipe
    found: dict[Row, None] = {}
    for group in study.groups:
        place = recipes.setting(recipe, group.mixture)
        labels = (recipes.label(recipe.models, group.model), place, recipes.label(recipe.methods, group.method))
        found[Row(group.model, place, group.method, labels)] = None
    models, places, methods = list(recipe.models), recipes.settings(recipe), list(recipe.methods)
    return sorted(found, key=lambda r: (models.index(r.model), methods.index(r.method), places.index(r.setting)))


def runs_of(study: Study, row: Row, task: str) -> list[Run]:
    """The runs of a row whose mixture scores `task`."""
    found = []
    for group, runs in study.final.items():
        if belongs(study.recipe, group, row) and scores(study.group_configs[group], task):
            found += runs
    return found


def cell(recipe: Recipe, runs: Sequence[Run], task: str) -> tuple[Cell, Scores]:
    if not runs:
        return Cell(empty="–"), {}
    made = Cell(expected=len(runs))
    by_example: Scores = {}
    metric = recipe.table.metrics.get(task)
    for run in runs:
        if not run.scored(task):
            continue
        result = run.results[task]
        name = metric or result["metric"]
        rows = run.predictions(task)
        if len(rows) == result["n"] and all(name in row for row in rows):
            by_example[run.point.seed] = {str(row["id"]): float(row[name]) for row in rows}
        value = value_of(result, name)
        if value is None:
            made.empty = f"no {name}"
            continue
        made.values[run.point.seed] = float(value)
        made.examples = max(made.examples, int(result["n"]))
        made.dirty |= run.dirty
    if not made.values and not made.empty:
        states = {OTHER if task in run.others else run.state for run in runs}
        made.empty = next((reason for reason in REASONS if reason in states), "not scored")
    return made, by_example


def value_of(result: Mapping[str, Any], metric: str) -> float | None:
    return result["value"] if metric == result["metric"] else result.get("metrics", {}).get(metric)


def mean_cell(cells: Sequence[Cell]) -> Cell:
    """Unweighted mean over the tasks, seed by seed, of the seeds that every task has."""
    seeds = [seed for seed in cells[0].values if all(seed in c.values for c in cells)]
    if not seeds:
        empty = next((c.empty for c in cells if not c.values), "in part")
        return Cell(empty=empty, expected=max(c.expected for c in cells))
    values = {seed: math.fsum(c.values[seed] for c in cells) / len(cells) for seed in seeds}
    return Cell(
        values, max(c.expected for c in cells), sum(c.examples for c in cells), dirty=any(c.dirty for c in cells)
    )


def row_score(row: Row, cells: Mapping[tuple[Row, str], Cell]) -> float | None:
    return cells[row, MEAN].mean if (row, MEAN) in cells else None


def order_score(row: Row, cells: Mapping[tuple[Row, str], Cell]) -> float:
    score = row_score(row, cells)
    return -1.0 if score is None else score


# ---- the base model


def with_base(
    study: Study, rows: Sequence[Row], columns: Mapping[str, str], cells: dict[tuple[Row, str], Cell]
) -> list[Row]:
    """Above the rows of a model what it scores without an adapter, where runs of the table have looked.

    It stands for itself: neither best nor compared with the best, whatever it scores.
    """
    recipe, out = study.recipe, list(rows)
    if recipe.table.base is None:
        return out
    runs = [run for runs in study.final.values() for run in runs]
    for model in recipe.models:
        label = (recipes.label(recipe.models, model), "", recipe.table.base)
        row = Row(model, "", "", label)
        mine = [run for run in runs if run.point.group.model == model]
        made = {task: base_cell(mine, task, recipe.table.metrics.get(task)) for task in recipe.table.columns}
        if MEAN in columns:
            made[MEAN] = mean_cell(list(made.values()))
        if any(cell.values for cell in made.values()):
            cells |= {(row, column): without_seeds(cell) for column, cell in made.items()}
            out.insert(next(i for i, other in enumerate(out) if other.model == model), row)
    return out


ASKED = ("metric", "n", "data", "prompts", "protocol")  # of a result: what was asked, and how


def base_cell(runs: Sequence[Run], task: str, metric: str | None) -> Cell:
    """Of each seed the first run in the table that has asked the base what it then asked its adapter."""
    made = Cell(empty="–")
    for run in runs:
        before, after = run.before.get(task), run.results.get(task, {})
        if before is None or run.point.seed in made.values or not run.scored(task):
            continue
        value = value_of(before, metric or before["metric"])
        if value is not None and all(before.get(key) == after.get(key) for key in ASKED):
            made.values[run.point.seed] = float(value)
            made.examples, made.dirty = int(before["n"]), made.dirty or run.dirty
    made.expected = len(made.values)
    return made


def without_seeds(cell: Cell) -> Cell:
    """One value where the seeds agree: they decide nothing but answers that are sampled."""
    values = list(cell.values.values())
    alike = bool(values) and max(values) - min(values) <= SAME
    kept = {0: values[0]} if alike else cell.values
    return dataclasses.replace(cell, values=kept, expected=len(kept), untrained=True)


# ---- best, and what cannot be told from it


def compare(
    recipe: Recipe,
    rows: Sequence[Row],
    columns: Mapping[str, str],
    cells: Mapping[tuple[Row, str], Cell],
    by_example: Mapping[tuple[Row, str], Scores],
) -> None:
    """Set best, tied, untested and p of every cell, within a model and a column.

    Which row is the best is seen in the same scores, so each pair might have been compared: all count as tests.
    """
    tasks = list(recipe.table.columns)
    for model in recipe.models:
        for column in columns:
            means = {row: cells[row, column].mean for row in rows if row.model == model}
            known = {row: mean for row, mean in means.items() if mean is not None}
            if len(known) < 2:
                continue
            best = best_row(known, {row for row in known if cells[row, column].complete})
            p = tests(
                known, {row: [by_example[row, t] for t in (tasks if column == MEAN else [column])] for row in known}
            )
            mark(cells, column, best, known, {row: p[pair] for pair in p if best in pair for row in pair - {best}})


def tests(means: Mapping[Row, float], scores: Mapping[Row, Sequence[Scores]]) -> dict[frozenset[Row], float]:
    """Pair -> p, adjusted within all pairs. A pair whose test and means disagree counts as one, and has no p."""
    found, p, seeds = [], {}, [seed_means(scores[row]) for row in means]
    for a, b in itertools.combinations(means, 2):
        test = paired_test(scores[a], scores[b], seeds)
        if test is not None:
            p[frozenset((a, b))] = test.p
            found.append(agree(test.mean, means[a] - means[b]))
    adjusted = zip(p, statistics.holm(list(p.values())), found, strict=True)
    return {pair: value for pair, value, agrees in adjusted if agrees}


def best_row(means: Mapping[Row, float], complete: Collection[Row]) -> Row:
    """The first of the highest. Cells that lack seeds compete only where all do: a lucky seed alone is not the best."""
    competing = {row: mean for row, mean in means.items() if row in complete} or means
    highest = max(competing.values())
    return next(row for row, mean in competing.items() if highest - mean <= SAME)


def agree(tested: float, shown: float) -> bool:
    """Whether a difference that was tested is the one that the means show, and not its opposite."""
    return abs(tested) <= SAME or (abs(shown) > SAME and tested * shown > 0)


def mark(
    cells: Mapping[tuple[Row, str], Cell], column: str, best: Row, means: Mapping[Row, float], p: Mapping[Row, float]
) -> None:
    for row, mean in means.items():
        cell = cells[row, column]
        cell.best = abs(mean - means[best]) <= SAME and cell.complete >= cells[best, column].complete
        cell.p = p.get(row)
        cell.tied = not cell.best and row in p and p[row] >= LEVEL
        cell.untested = not cell.best and row not in p


def paired_test(
    best: Sequence[Scores], other: Sequence[Scores], rows: Sequence[Mapping[int, float]] = ()
) -> statistics.Difference | None:
    """best − other over the seeds that both have of every task; None where there is no such seed.

    The means of the cells may have more seeds, and then the other sign: nobody can say which of the two is better.
    `rows`, the means of the column's (see `seed_means`), tell how much seeds vary: those with all seeds of the two.
    """
    seeds = set.intersection(*(set(s) for s in (*best, *other))) if best else set()
    tables = [
        statistics.paired({s: a[s] for s in seeds}, {s: b[s] for s in seeds}) for a, b in zip(best, other, strict=True)
    ]
    whole = [table for table in tables if table is not None]
    if len(whole) < len(tables):
        return None
    alike = [[row[seed] for seed in sorted(seeds)] for row in rows if seeds <= row.keys()]
    return statistics.difference(whole, statistics.usual(alike))


def seed_means(tasks: Sequence[Scores]) -> dict[int, float]:
    """seed -> unweighted mean over the tasks, of the seeds that every task has."""
    seeds = set.intersection(*map(set, tasks)) if tasks else set()
    return {s: math.fsum(math.fsum(task[s].values()) / len(task[s]) for task in tasks) / len(tasks) for s in seeds}


# ---- printed values


def publish(
    recipe: Recipe, rows: Sequence[Row], columns: Mapping[str, str], cells: dict[tuple[Row, str], Cell]
) -> list[Row]:
    """Lay the printed values beside ours; rows that were only printed or left out go behind those of their model."""
    out = list(rows)
    for printed in recipe.published:
        row = printed_row(recipe, printed)
        named = (row.model, row.setting, printed.method)
        row = next((r for r in rows if printed.method and (r.model, r.setting, r.method) == named), row)
        if row not in out:  # the base model's is there where a run has scored it
            same = [i for i, r in enumerate(out) if r.model == row.model]
            out.insert(same[-1] + 1 if same else len(out), row)
            cells |= {(row, column): Cell(empty="–") for column in columns}
        for column, value in printed.values.items():
            cells[row, column].published = value
        if printed.mean is not None and MEAN in columns:
            cells[row, MEAN].published = printed.mean
    return out


def claims(
    recipe: Recipe,
    rows: Sequence[Row],
    cells: Mapping[tuple[Row, str], Cell],
    by_example: Mapping[tuple[Row, str], Scores],
) -> list[str]:
    """Printed differences with ours beside them, one for each model and setting."""
    lines = []
    places = list(dict.fromkeys((row.model, row.setting) for row in rows if row.method))
    for claim in recipe.claims:
        pairs = {place: [row_of(rows, place, method) for method in (claim.better, claim.worse)] for place in places}
        ours = [
            f"{found}{where(recipe, place, places)}"
            for place, pair in pairs.items()
            if (found := ours_of(pair, of_model(rows, place[0]), cells, by_example, list(recipe.table.columns)))
        ]
        names = [recipes.label(recipe.methods, name) for name in (claim.better, claim.worse)]
        lines.append(f"{names[0]} minus {names[1]}: published {claim.delta:+.1f}, ours {', '.join(ours) or 'not run'}")
    return lines


def row_of(rows: Sequence[Row], place: tuple[str, str], method: str) -> Row | None:
    return next((r for r in rows if (r.model, r.setting, r.method) == (*place, method)), None)


def of_model(rows: Sequence[Row], model: str) -> list[Row]:
    return [row for row in rows if row.model == model and row.method]


def ours_of(
    pair: Sequence[Row | None],
    beside: Sequence[Row],
    cells: Mapping[tuple[Row, str], Cell],
    by_example: Mapping[tuple[Row, str], Scores],
    tasks: Sequence[str],
) -> str:
    """Our difference of the means, in points, with what is known of it: `+1.5 (error 0.7, p = 0.04)`. Empty where a row
    has no mean; p is of this one pair; how much seeds vary, all rows `beside` tell."""
    rows = [row for row in pair if row is not None]
    means = [mean for row in rows if (mean := cells[row, MEAN].mean) is not None]
    if len(means) < 2:
        return ""
    change = means[0] - means[1]
    of_rows = {row: [by_example.get((row, task), {}) for task in tasks] for row in beside}
    better, worse = rows
    test = paired_test(of_rows[better], of_rows[worse], [*map(seed_means, of_rows.values())])
    known = [f"error {100 * test.error:.1f}, p = {test.p:.2g}"] if test and agree(test.mean, change) else []
    known += [] if all(cells[row, MEAN].complete for row in rows) else ["not of all seeds"]
    return f"{100 * change:+.1f}" + (f" ({', '.join(known)})" if known else "")


def where(recipe: Recipe, place: tuple[str, str], places: Sequence[tuple[str, str]]) -> str:
    """` of MODEL, SETTING` where there are several."""
    model, setting = place
    several = len({m for m, _ in places}) > 1, len({s for _, s in places}) > 1
    parts = [recipes.label(recipe.models, model)] * several[0] + [setting] * (several[1] and bool(setting))
    return f" of {', '.join(parts)}" if parts else ""
