"""What a recipe would cost before anything is run: parameters on the meta device, and hours of one accelerator.

    FLOPs = (4 N + 6 P) · trained tokens   +   2 N · scored tokens

N parameters of the frozen base (forward and the backward through activations), P trained ones (their gradients too). A
row has as many tokens as the rows of its task have on average, at most train.max_length. Scored twice where the base
model is scored as well; options share their prompt, so a row is one forward. Hours = FLOPs / (tflops · utilization).
An estimate, right to a factor of two for the tasks' own wording; moe_peft asks some questions in a third of it (BoolQ
without its passage).
"""

import functools
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from rich.table import Table as Grid
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mixlora.adapters.attach import attach, count
from mixlora.config.load import plain
from mixlora.config.schema import Config, Method, Model
from mixlora.config.typed import typed
from mixlora.console import console, say
from mixlora.models import base
from mixlora.tables import recipe as recipes
from mixlora.tables.recipe import Point
from mixlora.tables.runs import DIRTY, DONE
from mixlora.tables.study import Study
from mixlora.tasks.mixture import probabilities


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
    attach(built, typed(Method, json.loads(method)), names)
    return count(built)


def estimate(config: Config, tflops: float, utilization: float) -> Estimate:
    found = sizes(config)
    if found is None:
        return Estimate(None, None, None)
    length = tokens(config)
    if length is None:
        return Estimate(found["trainable"], found["activated"], None)
    trained, scored = length
    frozen = found["total"] - found["trainable"]
    flops = (4 * frozen + 6 * found["trainable"]) * trained
    flops += 2 * frozen * scored * (2 if config.eval.before else 1)
    return Estimate(found["trainable"], found["activated"], flops / (tflops * 1e12 * utilization) / 3600)


def tokens(config: Config) -> tuple[float, float] | None:
    """(tokens trained on over the whole run, tokens scored once); None with a task that known.yaml does not have."""
    mixture, train, table = config.tasks.mixture, config.train, known()["rows"]
    if not mixture.keys() <= table.keys():
        return None
    lengths = {name: min(table[name]["tokens"], train.max_length) for name in mixture}
    tests = {name: table[name]["test"] for name, task in mixture.items() if not task.train_only}
    scored = sum(lengths[name] * min(n, config.eval.limit or n) for name, n in tests.items())
    sizes = {name: table[name]["train"] for name, task in mixture.items() if not task.eval_only}
    sizes = {name: min(n, mixture[name].cap or n) for name, n in sizes.items()}
    shares = probabilities(
        sizes,
        {name: mixture[name].weight for name in sizes},
        sampling=config.tasks.sampling,
        temperature=config.tasks.temperature,
        size_cap=config.tasks.size_cap,
    )
    if train.max_steps is None:
        rows = (train.epochs or 1.0) * sum(sizes.values())
    else:
        rows = train.max_steps * train.per_device_train_batch_size * train.gradient_accumulation_steps
    return rows * sum(share * lengths[name] for name, share in shares.items()), scored


@dataclass(frozen=True)
class Hours:
    """Of the runs that are done, of those that are listed and not, and of those that a choice of rates still opens."""

    done: float
    listed: float
    later: float


def hours(study: Study, tflops: float, utilization: float) -> Hours:
    """What is not known counts as nothing."""

    def of(point: Point) -> float:
        return estimate(study.config(point), tflops, utilization).hours or 0.0

    points = study.points()
    done = [point for point in points if study.run(point).state in (DONE, DIRTY)]
    listed = [point for point in points if point not in done]
    return Hours(*(math.fsum(map(of, some)) for some in (done, listed, later_points(study))))


def later_points(study: Study) -> list[Point]:
    """The other seeds of every group whose rate is open; what the rate is makes no difference to the hours."""
    opened = [group for group in study.groups if study.is_open(group) and not study.is_lost(group)]
    return [Point(group, seed) for group in opened for seed in study.recipe.seeds[1:]]


def print_estimate(study: Study, tflops: float, utilization: float) -> None:
    """Every run with its state, parameters and hours; and what the numbers assume."""
    grid = Grid(title=f"{study.recipe.name}: {study.recipe.title}", title_justify="left")
    for column in ("run", "state", "trainable", "activated", "hours"):
        grid.add_column(column, justify="left" if column in ("run", "state") else "right")
    points = study.points()
    for point in points:
        found = estimate(study.config(point), tflops, utilization)
        numbers = ["?" if n is None else f"{n:,}" for n in (found.trainable, found.activated)]
        last = "?" if found.hours is None else f"{found.hours:.3g}"
        grid.add_row(str(point), study.run(point).state, *numbers, last)
    console.print(grid)
    total, later = hours(study, tflops, utilization), len(later_points(study))
    if later:
        say(f"and {later} more with the chosen rates, once the {len(points)} above have chosen them")
    second = f", {total.later:.3g} of them in the second round" if later else ""
    say(f"Done: {total.done:.3g} hours. To do: {total.listed + total.later:.3g} hours{second}.")
    say(f"Hours of one device of {tflops:g} TFLOP/s at {utilization:.0%}.")
    say(
        "FLOPs = (4 N + 6 P) · trained tokens + 2 N · scored tokens: N frozen and P trained parameters, the mean length"
    )
    say("of a task's rows from recipes/known.yaml. '?': it lacks the shape of the model, or a task.")
