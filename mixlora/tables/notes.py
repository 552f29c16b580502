"""What a table says beside its scores: further columns, and notes on the runs behind it."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mixlora.records import caveats
from mixlora.tables import comparable
from mixlora.tables import recipe as recipes
from mixlora.tables.cells import Further, Row, belongs, printed_row
from mixlora.tables.recipe import Extra
from mixlora.tables.runs import DONE, FAILED, MISSING, Run
from mixlora.tables.study import Study, trains

EXTRA_LABELS = {
    Extra.trainable: "trainable",
    Extra.activated: "activated",
    Extra.tokens_per_second: "tokens/s",
    Extra.peak_memory: "peak GiB",
}
OF_OPTIONS = ("acc", "acc_norm", "acc_token", "parsed")  # metrics of tasks with options


def extra_cells(study: Study, rows: Sequence[Row]) -> tuple[dict[tuple[Row, str], Further], dict[str, str]]:
    recipe = study.recipe
    columns = {extra.value: EXTRA_LABELS[extra] for extra in recipe.table.extra}
    if len(recipe.learning_rates) > 1:
        columns["rate"] = "rate"
    printed = {place_of(printed_row(recipe, p)): p.parameters for p in recipe.published}
    if any(printed.values()):
        columns["published_parameters"] = "published trainable"
    alike = {model for model in recipe.models if len(ways(study, model)) == 1}
    found: dict[tuple[Row, str], Further] = {}
    for row in rows:
        mine = [(g, runs) for g, runs in study.final.items() if row.method and belongs(recipe, g, row)]
        done = [run.record for _, runs in mine for run in runs if in_table(study, run)]
        rates = sorted({rate for g, _ in mine if (rate := study.rate(g)) is not None})
        values: dict[str, Further] = {
            Extra.trainable.value: one(done, lambda r: r.get("parameters", {}).get("trainable")),
            Extra.activated.value: one(done, lambda r: r.get("parameters", {}).get("activated")),
            Extra.tokens_per_second.value: speed(done) if row.model in alike else None,
            Extra.peak_memory.value: peak_gib(r.get("peak_memory_bytes") for r in done),
            "rate": " / ".join(f"{rate:g}" for rate in rates),  # of several mixtures in a row each has its own
            "published_parameters": printed.get(place_of(row)),
        }
        found |= {(row, name): values[name] for name in columns}
    return found, columns


def place_of(row: Row) -> tuple[str, str, str]:
    """What names a row, be it of runs or only printed."""
    return row.model, row.setting, row.labels[2]


def one(records: Sequence[dict], value: Callable[[dict], int | None]) -> int | None:
    """The value that all records share; None where they differ."""
    found = {value(record) for record in records}
    return found.pop() if len(found) == 1 else None


def in_table(study: Study, run: Run) -> bool:
    return any(run.scored(task) for task in study.recipe.table.columns)


def speed(records: Sequence[dict]) -> float | None:
    """Mean tokens a second."""
    known = [v for r in records if (v := r.get("tokens_per_second")) is not None]
    return math.fsum(known) / len(known) if known else None


def ways(study: Study, model: str) -> set[tuple[Any, ...]]:
    """Where and how the runs of a model were computed, each part of them. Where that is not one, tokens a second say
    nothing about the methods."""
    records = [
        run.record for g, runs in study.final.items() if g.model == model for run in runs if in_table(study, run)
    ]
    return {
        (part.get("device"), part.get("threads"), r.get("world_size"), bool(r.get("torch_compile")))
        for r in records
        for part in parts(r)
    }


def parts(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The surroundings of a run: of its last try, and others that a part was made in."""
    return [record, *record.get("earlier_surroundings", [])]


def peak_gib(values: Iterable[float | None]) -> float | None:
    """The greatest of some numbers of bytes."""
    known = [v for v in values if v is not None]
    return max(known) / 2**30 if known else None


# ---- notes


def changes(study: Study) -> list[str]:
    """What the runs were started with beside the recipe: it may be another experiment."""
    return [f"laid over the recipe: {', '.join(study.overrides)}"] if study.overrides else []


def scored(study: Study) -> dict[str, list[Run]]:
    """task -> the runs that its column is made of; not the tasks that no run was scored on."""
    runs = [run for some in study.final.values() for run in some]
    found = {task: [run for run in runs if run.scored(task)] for task in study.recipe.table.columns}
    return {task: mine for task, mine in found.items() if mine}


def metrics(study: Study) -> dict[str, str]:
    """task -> what its column shows: runs that were scored by something else would not be in the table."""
    asked = study.recipe.table.metrics
    return {task: asked.get(task) or runs[0].results[task]["metric"] for task, runs in scored(study).items()}


def scoring(study: Study) -> list[str]:
    """How the tasks were asked, where it is not the usual way."""
    found: dict[str, list[str]] = {}
    columns = scored(study)
    for task, runs in columns.items():
        result = runs[0].results[task]  # all are of one protocol and as many rows, or would not be in the table
        limit = result.get("limit", study.group_configs[runs[0].point.group].eval.limit)  # an earlier version has none
        first = [f"the first {limit} rows"] if result["n"] == limit else []
        for way in [*first, *unusual(result)]:
            found.setdefault(way, []).append(study.recipe.table.columns[task])
    return [way + (f" ({', '.join(of)})" if len(of) < len(columns) else "") for way, of in found.items()]


def unusual(result: Mapping[str, Any]) -> list[str]:
    """Usual are test rows, no solved examples, and the likeliest option or, where a task has none, a greedy answer."""
    protocol = result["protocol"]
    name, shots = protocol.get("name"), protocol.get("num_fewshot", 0)
    usual = name == "loglikelihood" or (name == "generate" and result["metric"] not in OF_OPTIONS)
    ways = (
        (f"{protocol.get('split')} split", protocol.get("split") != "test"),
        (f"{shots} solved example{'s' if shots > 1 else ''} before each question", shots),
        (f"protocol {name}", not usual),
        (f"temperature {protocol.get('temperature')}", protocol.get("temperature")),
    )
    return [way for way, holds in ways if holds]


def caveat_notes(study: Study) -> list[str]:
    """What a run says under its scores, with the most that any run of a task in the table has to say."""
    found: dict[str, list[str]] = {}
    for task, runs in scored(study).items():
        known = [caveats(run.results[task]) for run in runs]
        for what in dict.fromkeys(what for one in known for what in one):
            some, n = max(one[what] for one in known if what in one)
            found.setdefault(what, []).append(f"{study.recipe.table.columns[task]} {some} of {n}")
    return [f"{what}, of a run at most: {', '.join(counts)}" for what, counts in found.items()]


def on_runs(study: Study) -> list[str]:
    said = (caveat_notes, choice_notes, run_notes, speed_notes, provenance_notes)
    return [line for notes in said for line in notes(study)]


def choice_notes(study: Study) -> list[str]:
    """What a reader must know of how the learning rates were chosen."""
    copies = [dataclasses.replace(run) for run in study.choosing]  # compared with each other, not with the table's runs
    comparable.compare(copies, study.recipe)
    final = {run.point for runs in study.final.values() for run in runs}  # which have notes of their own
    lines = []
    for run in copies:
        if run.state == FAILED:
            what = "it has no say in the choice of the learning rate" if run.lost else "no rate is chosen without it"
            lines.append(f"{run.point}: failed, {run.reason}; {what}")
        elif run.dirty and run.point not in final:
            lines.append(
                f"{run.point}: made with code that differs from its commit, and yet it helps to choose the rate"
            )
        for task, why in list(run.others.items())[:1]:
            lines.append(f"{run.point}, {task}: {why}, and yet it helps to choose the rate")
    return [*lines, *edge_notes(study), *rows_of_choice(study)]


def rows_of_choice(study: Study) -> list[str]:
    if len(study.recipe.learning_rates) < 2:
        return []
    limits = sorted({config.train.eval_limit for config in study.group_configs.values()})
    return [f"the rate is chosen on the first {' or '.join(map(str, limits))} validation rows of a task"]


def edge_notes(study: Study) -> list[str]:
    """Methods whose best rate may lie outside the grid, in one line."""
    rates, found = study.recipe.learning_rates, []
    if len(rates) < 2:
        return []
    for name, edge in (("largest", max(rates)), ("smallest", min(rates))):
        mine = [recipes.group_label(study.recipe, group) for group in study.groups if study.rate(group) == edge]
        if mine:
            found.append(f"the {name} of the grid ({edge:g}) for {', '.join(mine)}")
    return [f"the chosen rate is {'; '.join(found)}: a better one may lie beyond"] if found else []


def run_notes(study: Study) -> list[str]:
    """A line for each run that is not, or only with a mark, in the table; those that were never started are counted."""
    lines, missing = [], 0
    for run in (run for runs in study.final.values() for run in runs):
        missing += run.state == MISSING
        if run.state not in (DONE, MISSING):
            lines.append(f"{run.point}: {run.state}, {run.reason}")
        elif run.dirty:
            lines.append(f"‡ {run.point}: made with code that differs from its commit")
        lines += [f"{run.point}, {task}: left out, {why}" for task, why in run.others.items()]
    if missing:
        total = sum(len(runs) for runs in study.final.values())
        lines.append(f"{missing} of {total} runs are not there yet")
    if lacking := incomplete(study):
        lines.append(f"† the data sets of {', '.join(sorted(lacking))} lack rows of the original")
    return lines


def incomplete(study: Study) -> set[str]:
    """Tasks of whose data a run in the table had not all rows: those that it has a cell of, or was also trained on."""
    columns = study.recipe.table.columns
    runs = [run for some in study.final.values() for run in some if in_table(study, run)]
    lacking = [(run, task) for run in runs for task in run.record.get("incomplete", [])]
    return {task for run, task in lacking if (run.scored(task) if task in columns else task in run.record["rows"])}


def untrained(study: Study) -> set[str]:
    """Tasks that a run in the table was scored on and not trained on, though its mixture would have drawn of them."""
    return {
        task
        for group, runs in study.final.items()
        for task in study.recipe.table.columns
        for run in runs
        if run.scored(task) and trains(study.group_configs[group], task) and not run.results[task].get("trained", True)
    }


def speed_notes(study: Study) -> list[str]:
    asked = Extra.tokens_per_second in study.recipe.table.extra
    mixed = [recipes.label(study.recipe.models, m) for m in study.recipe.models if asked and len(ways(study, m)) > 1]
    what = "its runs were not all made on one kind of device, with as many threads, all compiled or none"
    return [f"{EXTRA_LABELS[Extra.tokens_per_second]} of {name} are left out: {what}" for name in mixed]


def provenance_notes(study: Study) -> list[str]:
    made = provenance([run for runs in study.final.values() for run in runs if in_table(study, run)])
    return [f"{name}: {', '.join(values)}" for name, values in made.items() if values]


def provenance(runs: Sequence[Run]) -> dict[str, list[str]]:
    """What the runs of a table were made with: commits, versions, devices; each with every value that occurs."""
    done = [run for run in runs if run.state == DONE]

    def values(of: Callable[[dict[str, Any]], Iterator[Any]]) -> list[str]:
        return sorted({str(value) for run in done for value in of(run.record) if value is not None})

    return {
        "commit": values(
            lambda r: (part.get("git_commit") or "not known" for part in (r, *r.get("earlier_commits", [])))
        ),
        "versions": values(
            lambda r: (f"{name} {v}" for p in parts(r) for name, v in (p.get("packages") or {}).items() if v)
        ),
        "device": values(lambda r: (part.get("device") for part in parts(r))),
        "processes": values(lambda r: iter([r.get("world_size")])),
        "threads": values(lambda r: (part.get("threads") for part in parts(r))),
    }
