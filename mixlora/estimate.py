"""What a recipe would cost before anything is run: parameters on the meta device, and hours of one accelerator.

    FLOPs = (4 N + 6 P) · steps · rows a step · L   +   2 N · scored rows · L

N parameters of the frozen base (forward and the backward through activations), P trained ones (their gradients too), L
tokens of a row, taken as half of train.max_length. Scored twice where the base model is scored as well; options share
their prompt, so a row is one forward. Hours = FLOPs / (tflops · utilization). An estimate, right to a factor of two.
"""

import functools
import json
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
from mixlora.tables.study import Study


@dataclass(frozen=True)
class Estimate:
    """None where something is not known without the hub."""

    trainable: int | None
    activated: int | None
    hours: float | None


def known() -> dict[str, dict[str, dict[str, Any]]]:
    """recipes/known.yaml: shapes of base models and rows of data sets, so that an estimate needs no hub."""
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
            return base.from_random(model, 0, torch.float32)[0]
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
    trained, scored = rows(config)
    if trained is None:
        return Estimate(found["trainable"], found["activated"], None)
    length = config.train.max_length / 2
    frozen = found["total"] - found["trainable"]
    flops = (4 * frozen + 6 * found["trainable"]) * trained * length
    flops += 2 * frozen * scored * length * (2 if config.eval.before else 1)
    return Estimate(found["trainable"], found["activated"], flops / (tflops * 1e12 * utilization) / 3600)


def rows(config: Config) -> tuple[float | None, float]:
    """(rows trained on over the whole run, rows scored once), from known.yaml where the data decide."""
    table, train = known()["rows"], config.train
    scored, size = 0, 0
    unknown = False
    for name, task in config.tasks.mixture.items():
        entry = table.get(name)
        unknown |= entry is None
        if entry is not None and not task.train_only:
            scored += min(entry["test"], config.eval.limit or entry["test"])
        if entry is not None and not task.eval_only:
            size += min(entry["train"], task.cap or entry["train"])
    if train.max_steps is not None:
        return train.max_steps * train.per_device_train_batch_size * train.gradient_accumulation_steps, scored
    return (None if unknown else (train.epochs or 1.0) * size), scored


def print_estimate(study: Study, tflops: float, utilization: float) -> None:
    """Every run with its state, parameters and hours; and what the numbers assume."""
    grid = Grid(title=f"{study.recipe.name}: {study.recipe.title}", title_justify="left")
    for column in ("run", "state", "trainable", "activated", "hours"):
        grid.add_column(column, justify="left" if column in ("run", "state") else "right")
    total = 0.0
    points = study.points()
    opened = [group for group in study.groups if study.is_open(group)]
    for point in points:
        found = estimate(study.config(point), tflops, utilization)
        hours = "?" if found.hours is None else f"{found.hours:.3g}"
        numbers = ["?" if n is None else f"{n:,}" for n in (found.trainable, found.activated)]
        grid.add_row(str(point), study.run(point).state, *numbers, hours)
        total += found.hours or 0.0
    console.print(grid)
    if opened:
        seeds = len(study.recipe.seeds) - 1
        say(f"and {len(opened) * seeds} more with the chosen rates, once the {len(points)} above have chosen them")
    say(f"{total:.3g} hours of one device of {tflops:g} TFLOP/s at {utilization:.0%} in all.")
    say("FLOPs = (4 N + 6 P) · rows · L + 2 N · scored rows · L: N frozen and P trained parameters, L = half of")
    say("train.max_length tokens. '?': the shape of the model or the size of the data is not in recipes/known.yaml.")


def recipe_sizes(name: str) -> dict[str, int]:
    """method -> trainable parameters, with the first model and mixture of a recipe."""
    study = Study(recipes.load(name), recipes.find(name), "runs")
    found: dict[str, int] = {}
    for group in study.groups:
        counts = sizes(study.group_configs[group])
        if counts is not None:
            found.setdefault(group.method, counts["trainable"])
    return found
