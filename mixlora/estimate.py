"""What a recipe would cost before anything is run: parameters on the meta device, and hours of one accelerator.

    FLOPs = (4 N + 6 P) · trained tokens   +   2 N · scored tokens

N parameters of the frozen base (forward and the backward through activations), P trained ones (their gradients too);
6 N + 8 P with model.gradient_checkpointing, which goes forward twice. A row has as many tokens as the rows of its task
have on average; trained on, at most train.max_length; scored, as many times as it has solved examples before it and
its own, at most eval.max_length. Programs are scored where they may be run, eval.num_samples of each. Scored are the
rows of eval.split, twice where the base model is scored as well, and every train.eval_steps steps train.eval_limit rows
a task; options share their prompt, so a row is one forward. A step has the rows of all processes.
Hours = FLOPs / (tflops · utilization), summed over the devices.
An estimate, right to a factor of two for the tasks' own wording; moe_peft asks some questions in a third of it (BoolQ
without its passage). NOT_COUNTED says what is left out.
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from rich.table import Table as Grid
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mixlora.adapters.attach import count, place, prepared
from mixlora.config.load import plain
from mixlora.config.schema import Answer, Config, Method, Model, Task
from mixlora.config.typed import typed
from mixlora.console import console, say
from mixlora.models import base
from mixlora.tables import recipe as recipes
from mixlora.tables.recipe import Point
from mixlora.tables.runs import DIRTY, DONE
from mixlora.tables.study import Study
from mixlora.tasks.data import rows_held_out
from mixlora.tasks.mixture import probabilities

NOT_COUNTED = (
    "loading, beams, answers that are longer than the right one, and that base models' scores are shared by runs"
)


@dataclass(frozen=True)
class Estimate:
    """None where something is not known without the hub."""

    trainable: int | None
    activated: int | None
    hours: float | None


def known() -> dict[str, dict[str, dict[str, Any]]]:
    """recipes/known.yaml: shapes of base models, rows of data sets and their length: no estimate needs the hub."""
    for folder in recipes.folders():
        if (folder / "known.yaml").is_file():
            found = yaml.safe_load((folder / "known.yaml").read_text(encoding="utf-8"))
            assert isinstance(found, dict)
            return found
    return {"shapes": {}, "rows": {}}


def skeleton(model: Model) -> nn.Module | None:
    """The base model without weights; None where neither the hub nor known.yaml has its shape."""
    if model.random is not None:
        with torch.device("meta"):
            return base.from_random(model, base.load_tokenizer(model), 0, torch.float32)
    shape = known()["shapes"].get(model.name)
    if shape is not None:
        config = AutoConfig.for_model(**shape)
    else:
        origin, options = base.where(model)
        try:
            config = AutoConfig.from_pretrained(origin, **options)
        except OSError:
            return None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def sizes(config: Config) -> dict[str, int] | None:
    """Trainable, activated and total parameters of a configuration; no weight is made."""
    return counted(json.dumps(plain(config.model)), json.dumps(plain(config.method)))


@functools.cache
def counted(model: str, method: str) -> dict[str, int] | None:
    names = typed(Model, json.loads(model))
    built = skeleton(names)
    if built is None:
        return None
    place(built, prepared(built, typed(Method, json.loads(method)), names))  # `attach` asks for what trains
    return count(built)


def estimate(config: Config, tflops: float, utilization: float, processes: int = 1) -> Estimate:
    found = sizes(config)
    if found is None:
        return Estimate(None, None, None)
    length = tokens(config, processes)
    if length is None:
        return Estimate(found["trainable"], found["activated"], None)
    frozen = found["total"] - found["trainable"]
    scored = length.scored * (2 if config.eval.before else 1) + length.validated
    again = 2 * (frozen + found["trainable"]) if config.model.gradient_checkpointing else 0
    flops = (4 * frozen + 6 * found["trainable"] + again) * length.trained + 2 * frozen * scored
    return Estimate(found["trainable"], found["activated"], flops / (tflops * 1e12 * utilization) / 3600)


@dataclass(frozen=True)
class Tokens:
    """Trained on and validated over the whole run; scored once."""

    trained: float
    scored: float
    validated: float


def tokens(config: Config, processes: int = 1) -> Tokens | None:
    """None with a task that known.yaml does not have."""
    mixture, table = config.tasks.mixture, known()["rows"]
    if not mixture.keys() <= table.keys():
        return None
    rows = {name: rows_of(task, table[name]) for name, task in mixture.items()}
    drawn, steps = trained_rows(config, rows, processes)
    trained = sum(number * min(table[name]["tokens"], config.train.max_length) for name, number in drawn.items())
    asked = {name: asked_tokens(config, name, table) for name in mixture if is_scored(config, name)}
    scored = sum(
        n * min(getattr(rows[name], config.eval.split.value), config.eval.limit or math.inf)
        for name, n in asked.items()
    )
    every = config.train.eval_steps
    times = 0 if every is None else math.ceil(steps / every)
    validated = sum(n * min(rows[name].validation, config.train.eval_limit) for name, n in asked.items())
    return Tokens(trained, scored, times * validated)


@dataclass(frozen=True)
class Rows:
    """Of each split of one task."""

    train: int
    validation: int
    test: int


def rows_of(task: Task, known: Mapping[str, int]) -> Rows:
    """As a run splits them: where known.yaml has no split of validation rows, some are held out."""
    train = 0 if task.eval_only else known["train"]
    held_out = 0 if task.train_only or "validation" in known else rows_held_out(train)
    return Rows(train - held_out, known.get("validation", held_out), known["test"])


def trained_rows(config: Config, rows: Mapping[str, Rows], processes: int) -> tuple[dict[str, float], float]:
    """Rows of each task over the whole run, and the number of steps."""
    mixture, train = config.tasks.mixture, config.train
    sizes = {
        name: min(n, mixture[name].cap or n) for name, of in rows.items() if (n := of.train) and mixture[name].weight
    }
    shares = probabilities(
        sizes,
        {name: mixture[name].weight for name in sizes},
        sampling=config.tasks.sampling,
        temperature=config.tasks.temperature,
        size_cap=config.tasks.size_cap,
    )
    step = train.per_device_train_batch_size * train.gradient_accumulation_steps * processes
    drawn = (train.epochs or 1.0) * sum(sizes.values()) if train.max_steps is None else train.max_steps * step
    return {name: drawn * share for name, share in shares.items()}, drawn / step


def is_scored(config: Config, name: str) -> bool:
    """Programs are only where they may be run."""
    task = config.tasks.mixture[name]
    return not task.train_only and (task.answer_kind is not Answer.code or config.eval.allow_code_execution)


def asked_tokens(config: Config, name: str, table: Mapping[str, Mapping[str, int]]) -> float:
    """Of one question: with its solved examples, and as often as it is answered."""
    length = table[name]["tokens"] * (1 + config.eval.num_fewshot)
    samples = config.eval.num_samples if config.tasks.mixture[name].answer_kind is Answer.code else 1
    return samples * min(length, config.eval.max_length or length)


@dataclass(frozen=True)
class Hours:
    """Of the runs that are done, of those that are listed and not, and of those that a choice of rates still opens."""

    done: float
    listed: float
    later: float


def hours(study: Study, tflops: float, utilization: float, processes: int = 1) -> Hours:
    """What is not known counts as nothing."""

    def of(point: Point) -> float:
        return estimate(study.config(point), tflops, utilization, processes).hours or 0.0

    points = study.points()
    done = [point for point in points if study.run(point).state in (DONE, DIRTY)]
    listed = [point for point in points if point not in done]
    return Hours(*(math.fsum(map(of, some)) for some in (done, listed, later_points(study))))


def later_points(study: Study) -> list[Point]:
    """The other seeds of every group whose rate is open; what the rate is makes no difference to the hours."""
    opened = [group for group in study.groups if study.is_open(group) and not study.is_lost(group)]
    return [Point(group, seed) for group in opened for seed in study.recipe.seeds[1:]]


def print_estimate(study: Study, tflops: float, utilization: float, processes: int = 1) -> None:
    """Every run with its state, parameters and hours; and what the numbers assume."""
    grid = Grid(title=f"{study.recipe.name}: {study.recipe.title}", title_justify="left")
    for column in ("run", "state", "trainable", "activated", "hours"):
        grid.add_column(column, justify="left" if column in ("run", "state") else "right")
    points = study.points()
    for point in points:
        found = estimate(study.config(point), tflops, utilization, processes)
        numbers = ["?" if n is None else f"{n:,}" for n in (found.trainable, found.activated)]
        last = "?" if found.hours is None else printed_hours(found.hours)
        grid.add_row(str(point), study.run(point).state, *numbers, last)
    console.print(grid)
    total, later = hours(study, tflops, utilization, processes), len(later_points(study))
    if later:
        say(f"and {later} more with the chosen rates, once the {len(points)} above have chosen them")
    second = f", {printed_hours(total.later)} of them in the second round" if later else ""
    done, left = printed_hours(total.done), printed_hours(total.listed + total.later)
    say(f"Done: {done} hours. To do: {left} hours{second}.")
    say(f"Hours of a device of {tflops:g} TFLOP/s at {utilization:.0%}{shared(processes)}.")
    say("FLOPs = (4 N + 6 P) · trained tokens + 2 N · scored tokens: N frozen and P trained parameters, the mean")
    say("length of a task's rows from recipes/known.yaml; 6 N + 8 P with model.gradient_checkpointing.")
    say("'?': known.yaml lacks the shape of the model, or a task.")
    say(f"Not counted: {NOT_COUNTED}.")


def printed_hours(hours: float) -> str:
    if 0 < hours < 0.01:
        return "<0.01"
    return f"{hours:.3g}" if hours < 100 else f"{hours:,.0f}"


def shared(processes: int) -> str:
    return "" if processes == 1 else f", to be divided by the {processes} processes of a run"
