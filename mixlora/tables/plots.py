"""Plots of a run and of a recipe, as figures of matplotlib; pure functions of what the record files hold.

Inside report.html a figure is SVG whose ink is `currentColor`, so it follows the page into the dark. As a file it is
PDF or PNG on white.
"""

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mixlora.records import write_bytes
from mixlora.tables import specialisation
from mixlora.tables.specialisation import Loads

INK = "#123456"  # stands for the colour of the page's text
# Okabe and Ito's colours, without black and yellow, and two more: they hold on white and on near-black. For some of the
# colour-blind the first and the last but one are alike, so a line changes its dashes with its colour.
COLOURS = ["#0b7fc7", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8a7fd1", "#8c8c8c"]
DASHES = ["-", "--", ":", "-."]
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mixlora",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(
        color=COLOURS * len(DASHES),
        linestyle=[DASHES[(i + turn) % len(DASHES)] for turn in range(len(DASHES)) for i in range(len(COLOURS))],
    ),
    "text.parse_math": False,  # a label may hold a $
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.constrained_layout.use": True,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
WIDTH, HEIGHT = 4.8, 3.0
OVER = 3.4  # with a legend over it, where no curve can hide it
Lines = Sequence[Mapping[str, Any]]
Draw = Callable[[], Figure]


def figure(height: float = HEIGHT) -> tuple[Figure, Axes]:
    return plt.subplots(figsize=(WIDTH, height))


def svg(draw: Draw) -> str:
    """A figure for a page: no white ground, no clock, no reference to anything outside, ink from the page."""
    buffer = io.StringIO()
    with plt.rc_context(STYLE):
        made = draw()
        made.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(made)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    tag, rest = text.split(">", 1)
    tag = re.sub(r' (width|height)="[^"]*"', "", tag)
    return f"{tag}>{rest}".replace(INK, "currentColor")


def write(draw: Draw, path: Path) -> None:
    """A figure as a file for a paper: black on white, no clock."""
    clock = {"CreationDate": None} if path.suffix == ".pdf" else {}
    buffer = io.BytesIO()
    paper = {key: "black" if value == INK else value for key, value in STYLE.items()}
    with plt.rc_context(paper | {"pdf.fonttype": 42}):
        made = draw()
        for bar in made.findobj(LineCollection):
            bar.set(color="black")  # error bars, whose ink is not a setting
        made.savefig(buffer, format=path.suffix[1:], dpi=200, metadata=clock)
    plt.close(made)
    write_bytes(path, buffer.getvalue())


def named(label: str) -> str:
    """A label that stands in a legend: matplotlib leaves out one that begins with _."""
    return f"\u200b{label}" if label.startswith("_") else label


def numbers(values: Sequence[Any]) -> list[float]:
    """A loss that was not finite is written as text in the records."""
    return [float(value) for value in values]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` finite values; a gap where there is none."""
    finite = pd.Series(np.where(np.isfinite(values), values, np.nan))
    return [float(mean) for mean in finite.rolling(window, min_periods=1).mean()]


# ---- one run


def loss(lines: Lines) -> Figure:
    made, axes = figure()
    steps, values = [line["step"] for line in lines], numbers([line["loss"] for line in lines])
    window = max(1, len(lines) // 20)
    axes.plot(steps, values, lw=0.8, alpha=0.35, color=COLOURS[0])
    axes.plot(steps, smooth(values, window), lw=1.6, color=COLOURS[0], label=f"mean of {window} steps")
    if window > 1:
        axes.legend()
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return made


def task_losses(lines: Lines) -> Figure:
    made, axes = figure(OVER)
    tasks = sorted({task for line in lines for task in line.get("task_losses", {})})
    window = max(1, len(lines) // 10)
    for task in tasks:
        mine = [line for line in lines if task in line["task_losses"]]
        values = smooth(numbers([line["task_losses"][task] for line in mine]), window)
        axes.plot([line["step"] for line in mine], values, lw=1.3, label=named(task))
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if tasks:
        made.legend(loc="outside upper center", ncols=4)
    return made


def validation(lines: Lines) -> Figure:
    made, axes = figure()
    mine = [line for line in lines if "validation" in line]
    for task in sorted({task for line in mine for task in line["validation"]}):
        of = [line for line in mine if task in line["validation"]]
        values = [100 * line["validation"][task] for line in of]
        axes.plot([line["step"] for line in of], values, marker="o", ms=3, label=named(task))
    axes.set(xlabel="step", ylabel="validation score (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(ncols=2)
    return made


def scores(after: Mapping[str, Any], before: Mapping[str, Any]) -> Figure:
    """Bars before and after with 95 % intervals; a tick where the best constant answer is."""
    tasks = [task for task, result in after.items() if result.get("value") is not None]
    made, axes = figure(max(1.6, 0.42 * len(tasks) + 0.9))
    place = np.arange(len(tasks))[::-1]
    for label, results, offset, colour in (("before", before, 0.2, "#8c8c8c"), ("after", after, -0.2, COLOURS[0])):
        known = [i for i, task in enumerate(tasks) if results.get(task, {}).get("value") is not None]
        if not known:
            continue
        values = np.array([100 * results[tasks[i]]["value"] for i in known])
        ends = np.array(
            [
                [100 * e for e in results[tasks[i]].get("interval", [v / 100] * 2)]
                for i, v in zip(known, values, strict=True)
            ]
        )
        spread = np.abs(ends.T - values)
        axes.barh(place[known] + offset, values, 0.38, color=colour, label=label)
        axes.errorbar(values, place[known] + offset, xerr=spread, fmt="none", ecolor=INK, lw=0.9)
    guess = [(p, 100 * after[t]["majority"]) for p, t in zip(place, tasks, strict=True) if after[t].get("majority")]
    if guess:
        axes.scatter(
            [g for _, g in guess],
            [p for p, _ in guess],
            marker="|",
            s=220,
            color=COLOURS[3],
            lw=1.6,
            label="constant guess",
            zorder=3,
        )
    axes.set_yticks(place, tasks)
    axes.set(xlabel="score (%)", xlim=(0, 100))
    made.legend(loc="outside upper center", ncols=3)
    return made


def layer_load(loads: Loads) -> Figure:
    """Layer × expert: share of a layer's choices, mean over its gates and tasks."""
    tables = specialisation.tables(loads)
    layers = sorted({specialisation.layer(name) for name in tables})
    most = max(table.shape[1] for table in tables.values())
    sums, counts = np.zeros((len(layers), most)), np.zeros((len(layers), most))
    for name, table in tables.items():
        share_TE = specialisation.shares(table)
        if len(share_TE):
            row = layers.index(specialisation.layer(name))
            sums[row, : table.shape[1]] += share_TE.mean(0) * table.shape[1]
            counts[row, : table.shape[1]] += 1
    with np.errstate(invalid="ignore"):
        relative = np.where(counts > 0, sums / counts, np.nan)
    made, axes = figure(min(5.2, max(2.0, 0.14 * len(layers) + 1.1)))
    heat(made, axes, relative, "load (1: even share)", high=max(2.0, float(np.nanmax(relative))))
    axes.set(xlabel="expert", ylabel="layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(lambda row, _: str(layers[int(row)]) if 0 <= row < len(layers) else "")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return made


def most_telling(loads: Loads) -> specialisation.Gate:
    """The gate whose choice knows most about the task."""
    return max(specialisation.gates(loads, {}), key=lambda g: (g.information, -specialisation.layer(g.name)))


def task_load(loads: Loads) -> Figure:
    """Task × expert of that gate."""
    best = most_telling(loads)
    share_TE = specialisation.tables(loads)[best.name].astype(float)
    share_TE = share_TE / np.maximum(share_TE.sum(1, keepdims=True), 1e-12) * best.experts
    made, axes = figure(min(5.2, max(1.7, 0.3 * len(loads) + 1.1)))
    heat(made, axes, share_TE, "load (1: even share)", high=max(2.0, float(share_TE.max())))
    axes.set_yticks(range(len(loads)), list(loads))
    axes.set(xlabel="expert")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return made


def heat(made: Figure, axes: Axes, values: Any, label: str, *, high: float) -> None:
    image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=0, vmax=high, interpolation="nearest")
    bar = made.colorbar(image, ax=axes, shrink=0.9, label=label)
    bar.outline.set_visible(False)


def entropy_over_depth(loads: Loads) -> Figure:
    """Entropy of the load over its maximum, a point a gate and a line for the mean of a layer."""
    made, axes = figure()
    gates = [g for g in specialisation.gates(loads, {}) if g.experts > 1]
    layers = specialisation.by_layer(gates)

    def relative(gate: specialisation.Gate) -> float:
        return float(np.log(max(gate.effective, 1.0)) / np.log(gate.experts))

    axes.scatter([specialisation.layer(g.name) for g in gates], [relative(g) for g in gates], s=9, alpha=0.5)
    axes.plot(list(layers), [float(np.mean([relative(g) for g in some])) for some in layers.values()], lw=1.6)
    axes.set(xlabel="layer", ylabel="entropy of the load / log E", ylim=(0, 1.05))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return made


def information_over_depth(loads: Loads) -> Figure:
    made, axes = figure()
    gates = specialisation.gates(loads, {})
    layers = specialisation.by_layer(gates)
    axes.scatter([specialisation.layer(g.name) for g in gates], [g.information for g in gates], s=9, alpha=0.5)
    axes.plot(list(layers), [float(np.mean([g.information for g in some])) for some in layers.values()], lw=1.6)
    axes.set(xlabel="layer", ylabel="I(task; expert), bits")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return made


def throughput(lines: Lines) -> Figure:
    """Tokens a second between one recorded step and the next."""
    made, axes = figure()
    pairs = [(b["step"], b["tokens"] - a["tokens"], b["seconds"] - a["seconds"]) for a, b in itertools.pairwise(lines)]
    known = [(step, tokens / seconds) for step, tokens, seconds in pairs if seconds > 0]
    axes.plot([step for step, _ in known], [rate for _, rate in known], lw=1.2)
    axes.set(xlabel="step", ylabel="tokens a second")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return made


# ---- a recipe


def bars(labels: Sequence[str], means: Sequence[float], deviations: Sequence[float | None], title: str) -> Figure:
    """Mean of each row in percent with its deviation over seeds."""
    made, axes = figure(max(1.6, 0.34 * len(labels) + 0.8))
    place = np.arange(len(labels))[::-1]
    axes.scatter([100 * m for m in means], place, s=28, zorder=3)
    axes.errorbar(
        [100 * m for m in means], place, xerr=[100 * (d or 0.0) for d in deviations], fmt="none", ecolor=INK, lw=1
    )
    axes.set_yticks(place, labels)
    axes.set(xlabel=f"{title} (%)")
    axes.margins(y=0.15)
    axes.grid(axis="x", alpha=0.25)
    return made


def rates(curves: Mapping[str, Mapping[float, float | None]]) -> Figure:
    """Validation score over the learning rate, a line a group."""
    made, axes = figure(OVER)
    for label, scores_at in curves.items():
        known = [(rate, 100 * score) for rate, score in scores_at.items() if score is not None]
        axes.plot([r for r, _ in known], [s for _, s in known], marker="o", ms=4, label=named(label))
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation score (%)")
    tried = sorted({rate for scores_at in curves.values() for rate in scores_at})
    axes.set_xticks(tried, labels=[f"{rate:g}" for rate in tried])
    axes.minorticks_off()
    if curves:
        made.legend(loc="outside upper center", ncols=3)
    return made


def losses(curves: Mapping[str, Lines]) -> Figure:
    """Smoothed loss of one run a method."""
    made, axes = figure(OVER)
    for label, lines in curves.items():
        values = smooth(numbers([line["loss"] for line in lines]), max(1, len(lines) // 8))
        axes.plot([line["step"] for line in lines], values, lw=1.4, label=named(label))
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if curves:
        made.legend(loc="outside upper center", ncols=3)
    return made
