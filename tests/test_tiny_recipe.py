"""recipe=tiny from nothing: two methods and two seeds are trained, and the table is the stored one in every format.

After a change that is meant to move scores or the look of a table, write the stored files again:

    MIXLORA_STORE=1 python -m pytest tests/test_tiny_recipe.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixlora.records import read_json, read_lines, write_json
from mixlora.tables import recipe as recipes
from mixlora.tables import render, table
from mixlora.tables.runs import DONE
from mixlora.tables.study import Study

STORED = Path(__file__).parent / "recipes" / "tiny" / "expected"
# Of the checkout and the machine, and so not of the table that is compared.
CHECKOUT = {"git_commit": "0123abc", "git_dirty": False, "packages": {"torch": "2.13.0"}, "device": "cpu", "threads": 1}


def reproduce(root: Path) -> "subprocess.CompletedProcess[str]":
    line = [
        sys.executable,
        "-m",
        "mixlora.reproduce",
        "recipe=tiny",
        f"output_root={root}",
        "jobs=2",
        "include_dirty=true",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(line, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    done = reproduce(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Done tiny") == 4
    return folder


def study_in(root: Path, **options: bool) -> Study:
    return Study(recipes.load("tiny"), recipes.find("tiny"), str(root), **options)


def test_all_four_runs_were_trained(root):
    study = study_in(root, include_dirty=True)
    runs = [run for runs in study.final.values() for run in runs]
    assert [run.state for run in runs] == [DONE] * 4
    losses = {tuple(line["loss"] for line in read_lines(run.folder / "metrics.jsonl")) for run in runs}
    assert len(losses) == 4  # each its own
    assert all(len(some) == 3 for some in losses)
    adapters = {(run.folder / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs}
    assert len(adapters) == 4


@pytest.fixture(scope="module")
def text(root) -> dict[str, str]:
    return {kind: write(table.build(study_in(root, include_dirty=True))) for kind, write in render.FORMATS.items()}


def test_what_was_written_is_the_table_and_a_page_that_leads_to_every_run(root, text):
    for kind, wanted in text.items():
        assert (root / "tables" / "tiny" / f"table.{kind}").read_text(encoding="utf-8") == wanted
    page = (root / "tables" / "tiny" / "report.html").read_text(encoding="utf-8")
    assert "Load, layer × expert: " in page
    folders = [run.folder for runs in study_in(root, include_dirty=True).final.values() for run in runs]
    assert all(f'href="../../{folder.name}/report.html"' in page for folder in folders)


@pytest.mark.full
def test_the_command_again_shows_the_table_and_runs_nothing(root, text):
    again = reproduce(root)
    assert again.returncode == 0, again.stderr
    assert "Running" not in again.stdout
    assert text["md"] in again.stdout
    assert (root / "tables" / "tiny" / "table.md").read_text(encoding="utf-8") == text["md"]


@pytest.mark.parametrize("kind", sorted(render.FORMATS))
def test_the_table_is_the_stored_one_byte_for_byte(root, kind):
    study = study_in(root, include_dirty=True)
    for run in (run for runs in study.final.values() for run in runs):
        path = run.folder / "run.json"
        write_json(path, read_json(path) | CHECKOUT)
    text = render.FORMATS[kind](table.build(study_in(root)))
    if os.environ.get("MIXLORA_STORE"):
        (STORED / f"table.{kind}").write_text(text, encoding="utf-8")
    assert text == (STORED / f"table.{kind}").read_text(encoding="utf-8")
