"""report.html: a run, or a recipe, to look at. One file without any reference to another; opens from disk.

Built from the record files alone, so it can be made again for any run at any time.
"""

import functools
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixlora.config.schema import Loss
from mixlora.console import say
from mixlora.errors import ConfigError
from mixlora.records import is_there, of_mean, read_lines, write_text
from mixlora.tables import plots, render, specialisation
from mixlora.tables import recipe as recipes
from mixlora.tables.cells import MEAN, Table
from mixlora.tables.plots import Draw
from mixlora.tables.recipe import Group
from mixlora.tables.runs import DONE, Run, config_values, optional, predictions_path
from mixlora.tables.study import Study

EXAMPLES = 2  # right and wrong ones a task
LONGEST = 600  # characters of a question that are shown
PASSED = "passed"  # a sample's verdict


def run_report(folder: Path) -> Path:
    """Write `folder`/report.html; returns it."""
    path = folder / "report.html"
    write_text(path, run_page(folder))
    return path


def show(folder: Path, kind: str | None) -> None:
    """What `python -m mixlora.report` does: a page of what there is, and its figures as files when asked."""
    if not any(is_there(folder / name) for name in ("config.yaml", "run.json")):
        raise ConfigError(f"{folder} has neither config.yaml nor run.json: it is not a run folder")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder} cannot be written to, and its report stands in it. Copy it to a folder of yours")
    say(f"Report: {run_report(folder)}")
    if kind is not None:
        for written in write_plots(run_figures(folder), folder, kind):
            say(f"Wrote {written}")


def run_page(folder: Path) -> str:
    record, (loads, least) = optional(folder / "run.json"), routing(folder)
    after, before = optional(folder / "results.json"), optional(folder / "before" / "results.json")
    found = specialisation.gates(loads, least)
    figures = [(title, caption, plots.svg(draw)) for title, caption, draw in run_figures(folder)]
    return (
        render.environment()
        .get_template("run.html.j2")
        .render(
            name=folder.resolve().name,
            record=record,
            summary=summary(record, after, before),
            figures=figures,
            reading=specialisation.reading(found) if is_there(folder / "routing.json") else [],
            preferences=preferences(loads),
            examples={task: examples(folder, task, result) for task, result in after.items()},
            config=(folder / "config.yaml").read_text(encoding="utf-8") if (folder / "config.yaml").is_file() else "",
            provenance=flat(record),
        )
    )


def routing(folder: Path) -> tuple[specialisation.Loads, dict[str, int]]:
    """What routing.json says of a run, see `specialisation.parts`; nothing where there is none."""
    return specialisation.parts(optional(folder / "routing.json"), top_k(config_values(folder)))


def top_k(config: Mapping[str, Any]) -> int | list[int]:
    """Experts that a token uses at the least, or their pattern over the layers, where routing.json does not tell:
    without a number all of them, or one where the configuration shows that the gate adds up a share of the probability.
    """
    method = config.get("method", {})
    adds_up = "top_p" in (method.get("gate") or {})
    found: int | list[int] = method.get("top_k") or (1 if adds_up else method.get("num_experts")) or 1
    return found


def trained_on(config: Mapping[str, Any]) -> str:
    whole = config.get("data", {}).get("loss_on") == Loss.all.value
    return "all tokens, those of the questions too," if whole else "the answer tokens"


def run_figures(folder: Path) -> list[tuple[str, str, Draw]]:
    """(title, caption, how to draw it), those that this run has something for."""
    lines, (loads, _) = read_lines(folder / "metrics.jsonl"), routing(folder)
    after, before = optional(folder / "results.json"), optional(folder / "before" / "results.json")
    found: list[tuple[str, str, Draw]] = []
    if any(result.get("value") is not None for result in after.values()):
        found.append(("Scores", "95 % intervals (Wilson)", lambda: plots.scores(after, before)))
    if lines:
        found.append(("Loss", f"mean over {trained_on(config_values(folder))} of a step", lambda: plots.loss(lines)))
        found.append(("Loss by task", "smoothed", lambda: plots.task_losses(lines)))
    if any("validation" in line for line in lines):
        found.append(("Validation", "during training", lambda: plots.validation(lines)))
    if specialisation.tables(loads):
        gate = plots.most_telling(loads).name
        found += [
            ("Load: layer × expert", "mean over the gates of a layer and the tasks", lambda: plots.layer_load(loads)),
            (
                "Load: task × expert",
                f"of the gate that knows most about the task: {gate}",
                lambda: plots.task_load(loads),
            ),
            ("Entropy over depth", "1: all experts alike; a dot is a gate", lambda: plots.entropy_over_depth(loads)),
        ]
        if len(loads) > 1:
            depth = "mutual information of task and expert; a dot is a gate"
            found.append(("Specialisation over depth", depth, lambda: plots.information_over_depth(loads)))
    if len(lines) > 2:
        found.append(("Throughput", "while training", lambda: plots.throughput(lines)))
    return found


def summary(record: Mapping[str, Any], after: Mapping[str, Any], before: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The few numbers on top."""
    (label, names), cards = of_mean(after), []
    if names:
        mean = 100 * sum(after[task]["value"] for task in names) / len(names)
        base = [before[task]["value"] for task in names if before.get(task, {}).get("value") is not None]
        change = f" ({mean - 100 * sum(base) / len(base):+.1f})" if len(base) == len(names) else ""
        cards.append((f"{label}, %", f"{mean:.1f}{change}"))
    sizes = record.get("parameters", {})
    if sizes:
        cards.append(("trained parameters", f"{sizes['trainable']:,}"))
        cards.append(("active for a token", f"{sizes['activated']:,}"))
    if record.get("tokens_per_second"):
        cards.append(("tokens a second", f"{record['tokens_per_second']:,.0f}"))
    if record.get("peak_memory_bytes"):
        cards.append(("peak memory, GiB", f"{record['peak_memory_bytes'] / 2**30:.1f}"))
    if record.get("seconds"):
        cards.append(("minutes", f"{record['seconds'] / 60:.1f}"))
    return cards


def preferences(loads: specialisation.Loads) -> list[tuple[str, str]]:
    """task -> the experts that it uses more than the other tasks do."""
    if len(loads) < 2:
        return []
    return [
        (
            task,
            "; ".join(
                f"layer {specialisation.layer(name)} {specialisation.short(name)}, expert {expert}: "
                f"{share:.0%} of its choices, {lift:.1f}× the mean"
                for name, expert, share, lift in rows
            ),
        )
        for task, rows in specialisation.preferred(loads).items()
        if rows
    ]


def examples(folder: Path, task: str, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first few right and wrong predictions of a task, with what each option scored.

    Kept records have neither questions nor the texts of options; then an option is its number.
    """
    metric = result.get("metric", "")
    rows = [row for row in read_lines(predictions_path(folder, task)) if metric in row]
    right = [row for row in rows if is_right(row, metric)][:EXAMPLES]
    wrong = [row for row in rows if not is_right(row, metric)][:EXAMPLES]
    return [example(row, metric) for row in [*right, *wrong]]


def is_right(row: Mapping[str, Any], metric: str) -> bool:
    """Whether what is shown is right: of a program that was sampled several times the first sample."""
    return bool(row["samples"][0]["verdict"] == PASSED if row.get("samples") else row[metric] == 1)


def said(row: Mapping[str, Any]) -> str:
    """What was answered; of several samples the first, and how many passed."""
    samples = row.get("samples") or []
    passed = sum(sample["verdict"] == PASSED for sample in samples)
    told = f"\n\n{passed} of {len(samples)} passed" if len(samples) > 1 else ""
    return str(row.get("prediction", ""))[:LONGEST] + told


def example(row: Mapping[str, Any], metric: str) -> dict[str, Any]:
    question = str(row.get("prompt", row["id"]))
    shown = {
        "question": question if len(question) <= LONGEST else f"… {question[-LONGEST:]}",
        "right": is_right(row, metric),
    }
    target, chosen = row.get("target"), row.get("prediction")  # places of options, or label texts
    if "log_likelihoods" in row and ("options" in row or isinstance(target, int)):
        texts = row.get("options") or [f"option {i + 1}" for i in range(len(row["log_likelihoods"]))]
        lines = [
            {"text": text, "score": score, "target": target in (i, text), "chosen": chosen in (i, text)}
            for i, (text, score) in enumerate(zip(texts, row["log_likelihoods"], strict=True))
        ]
        return shown | {"options": lines}
    if isinstance(target, int) and "options" in row:  # a free answer to a question with options
        target = row["options"][target]
    return shown | {
        "said": said(row),
        "target": str("" if target is None else target)[:LONGEST],
    }


def flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in record.items():
        rows += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", str(value))]
    return rows


def write_plots(figures: Sequence[tuple[str, str, Draw]], folder: Path, kind: str) -> list[Path]:
    """Every figure as a file: folder/plots/<title>.<kind>; titles that are spelled alike there are numbered."""
    written: list[Path] = []
    for title, _, draw in figures:
        stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        endings = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        path = next(p for end in endings if (p := folder / "plots" / f"{stem}{end}.{kind}") not in written)
        plots.write(draw, path)
        written.append(path)
    return written


# ---- a recipe


def recipe_report(study: Study, made: Table, folder: Path) -> Path:
    path = folder / "report.html"
    figures = [(title, caption, plots.svg(draw)) for title, caption, draw in recipe_figures(study, made)]
    runs = [run for runs in study.final.values() for run in runs]
    page = render.environment().get_template("recipe.html.j2")
    parts = render.html_parts(made) | {"figures": figures, "readings": readings(study), "runs": run_rows(runs, folder)}
    write_text(path, page.render(**parts))
    return path


def recipe_figures(study: Study, made: Table) -> list[tuple[str, str, Draw]]:
    return [*score_figures(study, made), *rate_figures(study), *loss_figures(study), *first_run_figures(study)]


def score_figures(study: Study, made: Table) -> list[tuple[str, str, Draw]]:
    """The means of the rows; of each task where the table has no mean over them."""
    found: list[tuple[str, str, Draw]] = []
    for column in [MEAN] if MEAN in made.columns else made.columns:
        cells = {row: cell for row in made.rows if (cell := made.cells[row, column]).mean is not None}
        if cells:
            label, names = made.columns[column], [row_name(study, row) for row in cells]
            means, deviations = [c.mean or 0.0 for c in cells.values()], [c.deviation for c in cells.values()]
            draw = functools.partial(plots.bars, names, means, deviations, label)
            found.append((label, "dot: mean over seeds, line: sample deviation", draw))
    return found


def rate_figures(study: Study) -> list[tuple[str, str, Draw]]:
    curves = {recipes.group_label(study.recipe, g): scores for g in study.groups if (scores := study.validation(g))}
    draw = functools.partial(plots.rates, curves)
    return [("Choice of the learning rate", "first seed, validation split", draw)] if curves else []


def loss_figures(study: Study) -> list[tuple[str, str, Draw]]:
    """The training losses of each model's groups."""
    found: list[tuple[str, str, Draw]] = []
    for model in study.recipe.models:
        curves = {
            recipes.group_label(study.recipe, group): lines
            for group, run in first_runs(study).items()
            if group.model == model and (lines := read_lines(run.folder / "metrics.jsonl"))
        }
        if curves:
            name = f": {recipes.label(study.recipe.models, model)}" if len(study.recipe.models) > 1 else ""
            found.append((f"Training loss{name}", "first seed, smoothed", functools.partial(plots.losses, curves)))
    return found


def first_run_figures(study: Study) -> list[tuple[str, str, Draw]]:
    return [
        figure
        for group, run in first_runs(study).items()
        for figure in group_figures(recipes.group_label(study.recipe, group), run.folder)
    ]


def first_runs(study: Study) -> dict[Group, Run]:
    """Of each group the run with the first seed, where it is done."""
    return {group: runs[0] for group, runs in study.final.items() if runs[0].state == DONE}


def group_figures(label: str, folder: Path) -> list[tuple[str, str, Draw]]:
    """What the first run of a group did to each task, and where its tokens go."""
    after, before = optional(folder / "results.json"), optional(folder / "before" / "results.json")
    loads, _ = routing(folder)
    found: list[tuple[str, str, Draw]] = []
    if any(result.get("value") is not None for result in after.values()):
        caption = "first seed, 95 % intervals (Wilson)"
        found.append((f"Scores: {label}", caption, functools.partial(plots.scores, after, before)))
    if specialisation.tables(loads):
        gate = plots.most_telling(loads).name
        layers, tasks = (functools.partial(draw, loads) for draw in (plots.layer_load, plots.task_load))
        found.append((f"Load, layer × expert: {label}", "first seed, mean over gates and tasks", layers))
        found.append((f"Load, task × expert: {label}", f"first seed, of {gate}", tasks))
    return found


def row_name(study: Study, row: Any) -> str:
    several = (len(study.recipe.models) > 1, len(recipes.settings(study.recipe)) > 1, True)
    return " · ".join(label for label, used in zip(row.labels, several, strict=True) if used and label)


def readings(study: Study) -> list[tuple[str, str]]:
    """group -> the plain-words reading of its first run's gates."""
    rows = []
    for group, run in first_runs(study).items():
        if found := specialisation.gates(*routing(run.folder)):
            rows.append((recipes.group_label(study.recipe, group), " ".join(specialisation.reading(found))))
    return rows


def run_rows(runs: Sequence[Run], page: Path) -> list[tuple[str, str, str, str, str]]:
    """(point, state, seconds, folder, its report where there is one as seen from the folder `page`)."""
    return [
        (
            str(run.point),
            run.state,
            f"{run.record['seconds']:.0f}" if run.record.get("seconds") else "",
            run.folder.name,
            link(run.folder / "report.html", page),
        )
        for run in runs
    ]


def link(path: Path, page: Path) -> str:
    """`path` as seen from the folder `page`; nothing where there is no such file."""
    return Path(os.path.relpath(path, page)).as_posix() if path.is_file() else ""
