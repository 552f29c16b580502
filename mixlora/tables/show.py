"""What `python -m mixlora.table` does: read the runs of a recipe, print its table, write it as asked for."""

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from mixlora.config.doors import Format
from mixlora.config.overrides import in_quotes, spelled
from mixlora.console import say
from mixlora.errors import ConfigError
from mixlora.records import attempt_path, is_there, read_text, write_packed, write_text
from mixlora.tables import recipe as recipes
from mixlora.tables import render, table
from mixlora.tables.comparable import pins
from mixlora.tables.runs import DIRTY, MISSING, Run, config_values, predictions_path
from mixlora.tables.study import INDEX, Study

# What stays of a prediction in kept records: all that a score can be computed from again.
DROPPED = ("prompt", "options")
KEPT = ("config.yaml", "run.json", "results.json", "before/results.json")
PACKED = ("metrics.jsonl", "routing.json")
PLACES = {"output_root": "runs", "run_dir": "run"}  # key of the configuration -> what its path is called in records


def study_of(name: str, output_root: str, overrides: Sequence[str], *, include_dirty: bool = False) -> Study:
    found = recipes.load(name)
    return Study(found, recipes.find(name), output_root, overrides, include_dirty=include_dirty)


def show(study: Study, asked: Format, to: Path | None) -> table.Table:
    """Print the table as Markdown and write it; returns it."""
    kinds = render.FORMATS if asked is Format.all else [asked.value]
    made = table.build(study)
    say(render.markdown(made))
    if any(run.state == MISSING for runs in study.final.values() for run in runs):
        say(f"Run what is not there yet: {shlex.join(command(study))}")
    folder = to or study.root / "tables" / study.recipe.name
    for kind in kinds:
        path = folder / f"table.{kind}"
        write_text(path, render.FORMATS[kind](made))
        say(f"Wrote {path}")
    return made


def command(study: Study) -> list[str]:
    """What runs the rest of a study. It has places of this machine, so it stands in no table."""
    overrides = f"overrides=[{','.join(map(in_quotes, study.overrides))}]"
    given = [spelled("recipe", recipes.name_of(study.folder)), spelled("output_root", str(study.root))]
    return ["python", "-m", "mixlora.reproduce", *given, *([overrides] if study.overrides else [])]


def print_pins(study: Study) -> None:
    """The `pins` of a recipe as its finished runs would have them, for pasting. A run that is left out is named.

    Raises:
        ConfigError: there is no finished run.
    """
    runs = [run for runs in study.final.values() for run in runs]
    found = pins(runs, study.recipe)
    if not found.data:
        dirty = any(run.state == DIRTY for run in runs)
        more = "Those there were made with changed code: include_dirty=true takes them in" if dirty else "Run it first"
        raise ConfigError(f"recipe {study.recipe.name} has no finished run in {study.root}. {more}")
    for run in runs:
        for task, why in run.others.items():
            say(f"# {run.point}, {task}: left out, {why}")
    say(yaml.safe_dump({"pins": dataclasses.asdict(found)}, sort_keys=False, width=120).rstrip())


def report(study: Study, made: table.Table, to: Path | None, plots: str | None) -> None:
    """Write report.html beside the table, and its plots as files when asked."""
    from mixlora.tables import report as reports  # matplotlib takes a second to load, a table needs none

    folder = to or study.root / "tables" / study.recipe.name
    say(f"Wrote {reports.recipe_report(study, made, folder)}")
    if plots is not None:
        for path in reports.write_plots(reports.recipe_figures(study, made), folder, plots):
            say(f"Wrote {path}")


def keep_records(study: Study, folder: Path) -> None:
    """Copy the records of a study into `folder`, from which the same table can be made without a model.

    Kept are the runs of the table and those that chose the learning rates, however far they got. Predictions lose
    their prompts, long files are packed, and no path of the machine stays.

    Raises:
        ConfigError: they would overwrite the runs.
    """
    runs = [run for point in study.points() if (run := study.run(point)).state != MISSING]
    here = folder.resolve()
    if here == study.root.resolve() or any(here.is_relative_to(run.folder.resolve()) for run in runs):
        raise ConfigError(f"records={folder} is where the runs are, which would be overwritten. Name another folder")
    hidden = machine_paths(study, runs)
    for run in runs:
        keep_run(run, folder / run.folder.name, hidden)
    entries = [{"folder": run.folder.name, "overrides": study.point_overrides(run.point)} for run in runs]
    index = {"recipe": study.recipe.name, "overrides": study.overrides, "runs": entries}
    write_text(folder / INDEX, without_paths(json.dumps(index, indent=2) + "\n", hidden))
    say(f"Kept the records of {len(runs)} runs in {folder}")


def keep_run(run: Run, folder: Path, hidden: Mapping[str, str]) -> None:
    for name in KEPT:
        if is_there(run.folder / name):
            write_text(folder / name, without_paths(read_text(run.folder / name), hidden))
    for name in PACKED:
        if is_there(run.folder / name):
            write_packed(folder / name, read_text(run.folder / name))
    for task in run.results:
        rows = [{k: v for k, v in row.items() if k not in DROPPED} for row in run.predictions(task)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_packed(predictions_path(folder, task), text)
    failure = attempt_path(run.folder)
    if failure.is_file():
        write_text(attempt_path(folder), without_paths(read_text(failure), hidden))


def machine_paths(study: Study, runs: Sequence[Run]) -> dict[str, str]:
    """Absolute path in what the runs were started with -> what stands for it in kept records."""
    found = {str(study.root): "runs", str(study.root.resolve()): "runs"}
    given = [override.partition("=")[2] for override in study.overrides]
    for run in runs:
        config = config_values(run.folder)
        found |= {str(config[key]): name for key, name in PLACES.items() if config.get(key)}
        given += [*strings(config), *(word.rpartition("=")[2] for word in run.record.get("command", "").split())]
    for value in given:
        found.setdefault(value, Path(value).name)
    return {path: name for path, name in found.items() if name and Path(path).is_absolute()}


def strings(values: object) -> Iterator[str]:
    """Every text in nested mappings and lists."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, Mapping | list):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from strings(value)


def without_paths(text: str, hidden: Mapping[str, str]) -> str:
    """`text` with every path replaced by its stand-in, the longest first, for one may begin with another.

    /data is not in org/data, nor in /data_x. Before it may stand an escape of JSON, a colour's code or a short option.
    """
    if not hidden:
        return text
    paths = "|".join(re.escape(path) for path in sorted(hidden, key=len, reverse=True))
    begins = r"(?:(?<![\w.~-])|(?<=\\[nrt])|(?<=\dm)|(?<= -[A-Z]))"
    return re.sub(rf"{begins}(?:{paths})(?![\w-])", lambda found: hidden[found[0]], text)
