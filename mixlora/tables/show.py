"""What `python -m mixlora.table` does: read the runs of a recipe, print its table, write it as asked for."""

import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path

from mixlora.config.typed import suggest
from mixlora.console import say
from mixlora.errors import ConfigError
from mixlora.records import read_json, write_bytes, write_json, write_text
from mixlora.tables import recipe as recipes
from mixlora.tables import render, table
from mixlora.tables.study import DONE, Run, Study

# What stays of a prediction in kept records: all that a score can be computed from again.
DROPPED = ("prompt", "options")
KEPT = ("run.json", "results.json", "config.yaml", "metrics.jsonl", "routing.json")


def study_of(name: str, output_root: str, overrides: Sequence[str], *, include_dirty: bool = False) -> Study:
    found = recipes.load(name)
    return Study(found, recipes.find(name), output_root, overrides, include_dirty=include_dirty)


def formats(asked: str) -> list[str]:
    """The formats behind one word; ConfigError where it is none."""
    if asked == "all":
        return list(render.FORMATS)
    if asked not in render.FORMATS:
        raise ConfigError(f"format={asked} is not a format. {suggest(asked, [*render.FORMATS, 'all'])}")
    return [asked]


def show(study: Study, asked: str, to: Path | None) -> table.Table:
    """Print the table as Markdown and write it; returns it."""
    kinds = formats(asked)
    made = table.build(study)
    say(render.markdown(made))
    folder = to or study.root / "tables" / study.recipe.name
    for kind in kinds:
        path = folder / f"table.{kind}"
        write_text(path, render.FORMATS[kind](made))
        say(f"Wrote {path}")
    return made


def report(study: Study, made: table.Table, to: Path | None, plots: str | None) -> None:
    """Write report.html beside the table, and its plots as files when asked."""
    from mixlora.tables import report as reports  # matplotlib takes a second to load, a table needs none

    folder = to or study.root / "tables" / study.recipe.name
    reports.check_kind(plots)
    say(f"Wrote {reports.recipe_report(study, made, folder)}")
    if plots is not None:
        for path in reports.write_plots(reports.recipe_figures(study, made), folder, plots):
            say(f"Wrote {path}")


def keep_records(study: Study, folder: Path) -> None:
    """Copy the runs of the table into `folder`: records as they are, predictions packed and without their prompts."""
    runs = [run for runs in study.final.values() for run in runs if run.state == DONE]
    first = [study.run(p) for group in study.groups for p in recipes.first_points(study.recipe, group)]
    for run in {r.folder: r for r in [*runs, *first] if r.state == DONE}.values():
        keep_run(study, run, folder / run.folder.name)
    say(f"Kept the records of {len(runs)} runs in {folder}")


def keep_run(study: Study, run: Run, folder: Path) -> None:
    for name in KEPT:
        if (run.folder / name).is_file():
            write_bytes(folder / name, (run.folder / name).read_bytes())
    for task in run.results:
        rows = [{k: v for k, v in row.items() if k not in DROPPED} for row in run.predictions(task)]
        write_bytes(folder / "predictions" / f"{task}.jsonl.gz", packed(rows))
    before = run.folder / "before" / "results.json"
    if before.is_file():
        write_json(folder / "before" / "results.json", read_json(before))


def packed(rows: Sequence[object]) -> bytes:
    """JSONL in gzip, without the clock that gzip writes by itself."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, filename="") as file:
        file.write(text.encode())
    return buffer.getvalue()
