"""Which runs may stand in one table: a task's scores must be of the same data, prompts, weights and protocol, and of
training on as many processes: each takes train.per_device_train_batch_size rows of a step."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mixlora.records import differences
from mixlora.tables.recipe import Pins, Recipe
from mixlora.tables.runs import Run

# Of a protocol: the model's window, whether it has a chat template, and an attention that its file asks for.
OF_MODEL = ("max_length", "template", "attention")


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
        found.append(Part("processes", lambda run: run.record.get("world_size"), model=model))
    return sorted(found, key=lambda part: part.pin is None)


def compare(runs: Sequence[Run], recipe: Recipe) -> None:
    """Mark, in `others`, each run whose data, prompts, weights, protocol or processes differ from what the table is of.

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
