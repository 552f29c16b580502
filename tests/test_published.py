"""Recipes against what the papers printed, and against the parameters that a right allocation has."""

import re
from pathlib import Path

import pytest

from mixlora import estimate
from mixlora.config import load as configs
from mixlora.config.schema import Overlap
from mixlora.tables import recipe as recipes
from mixlora.tables import render, table
from mixlora.tables.study import Study

PAPERS = Path(__file__).parents[2] / "shared" / "reference" / "papers_core.md"
needs_papers = pytest.mark.skipif(not PAPERS.is_file(), reason="needs ../shared/reference/papers_core.md")


def digits(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"\d+\.\d+", text.replace("*", ""))]


def section(start: str, end: str) -> str:
    return PAPERS.read_text(encoding="utf-8").split(start, 1)[1].split(end, 1)[0]


def printed(name: str) -> dict[tuple[str, str, str], list[float]]:
    """(model, setting, label) -> what the recipe says that the paper printed."""
    recipe = recipes.load(name)
    assert all(list(row.values) == list(recipe.table.columns) for row in recipe.published)
    return {
        (row.model, row.setting, row.label or recipes.label(recipe.methods, row.method)): [
            *row.values.values(),
            *([] if row.mean is None else [row.mean]),
        ]
        for row in recipe.published
    }


# The paper's name of a base model -> ours.
MODELS = {"Gemma 2B": "gemma_2b", "LLaMA-2 7B": "llama2_7b", "LLaMA-3 8B": "llama3_8b", "LLaMA-2 13B": "llama2_13b"}
OFTEN = ("tiny",)
EVERY = [name if name in OFTEN else pytest.param(name, marks=pytest.mark.full) for name in recipes.names()]


@pytest.mark.parametrize("name", EVERY)
def test_every_recipe_loads_and_all_its_points_have_folders_of_their_own(name):
    recipe = recipes.load(name)
    study = Study(recipe, recipes.find(name), "runs")
    folders = [configs.run_folder(study.config(point)) for point in study.points()]
    assert len(set(folders)) == len(folders) > 0
    # The public sets have rows that are both trained on and scored: a recipe that stops for them never runs.
    public = [config for config in study.group_configs.values() if config.data.source == "hub"]
    assert not [config.tasks.name for config in public if config.data.overlap is Overlap.error]
    assert recipe.source or not recipe.published
    scored = {task for config in study.group_configs.values() for task in config.tasks.mixture}
    assert set(recipe.table.columns) <= scored


@needs_papers
def test_mola_table_1():
    lines = section("**Table 1 — LLaMA-2-7B, direct", "Param check").splitlines()
    rows = [line for line in lines if line.startswith("|") and digits(line)]
    wanted = {line.split("|")[1].strip(): (digits(line)[:6], line.split("|")[8]) for line in rows}
    recipe = recipes.load("mola_llama2")
    for row in recipe.published:
        values, parameters = wanted["LoRA r64" if row.method == "lora" else row.method or row.label]
        assert list(row.values.values()) == values, row
        assert row.parameters == int(parameters.replace(",", ""))
    assert {"8888", "5555", "8642", "8228", "2468", "2882", "lora"} <= {row.method for row in recipe.published}


@needs_papers
def test_mixlora_table_1():
    wanted, model = {}, ""
    for line in section("**Table 1 — single task**", "**Table 2").splitlines():
        names = [cell.strip() for cell in line.split("|")[1:3]]
        if len(row := digits(line)[-9:]) == 9:
            model = names[0] or model
            wanted[MODELS[model], "", names[1]] = row
    assert len(wanted) == 16
    assert printed("mixlora_single") == wanted


@needs_papers
def test_mixlora_table_2():
    text = section("**Table 2 — multi-task, LLaMA-2 7B**", "**Table 5")
    wanted = {
        ("", setting, line.split()[0]): digits(row)[:6]
        for line in text.splitlines()
        for setting, row in re.findall(r"(ST|MT) ([^;(\n]*)", line)
    }
    assert len(wanted) == 8
    assert printed("mixlora_multi") == wanted


@needs_papers
def test_mixlora_table_9():
    text = section("**Table 9 — router-loss", "Expert-load std")
    wanted = {}
    for method, rows in re.findall(r"(MixLoRA|MixDoRA) (off [^.]*(?:\.\d[^.]*)*)\.", text):
        for row in rows.split(";"):
            coefficient, *values = row.replace("|", " ").replace("*", "").split()
            own = "no balance loss" if coefficient == "off" else f"coefficient {coefficient}"
            wanted["", "", own if method == "MixLoRA" else f"{method} {coefficient}"] = [float(v) for v in values]
    assert len(wanted) == 8
    assert printed("mixlora_aux") == wanted


@needs_papers
def test_dynmole_headlines():
    found = re.search(r"\+([\d.]+)% over LoRA, \+([\d.]+)% over MoLA", PAPERS.read_text(encoding="utf-8"))
    assert [claim.delta for claim in recipes.load("dynmole_commonsense").claims] == [float(x) for x in found.groups()]


def trained_parameters(name: str) -> dict[str, int]:
    """method -> trainable parameters, with the first model and mixture of a recipe."""
    study = Study(recipes.load(name), recipes.find(name), "runs")
    found: dict[str, int] = {}
    for group in study.groups:
        counts = estimate.sizes(study.group_configs[group])
        if counts is not None:
            found.setdefault(group.method, counts["trainable"])
    return found


@pytest.mark.full
def test_parameters_that_the_papers_print():
    recipe = recipes.load("mola_llama2")
    wanted = {row.method: row.parameters for row in recipe.published if row.method}
    assert trained_parameters("mola_llama2") == wanted


@pytest.mark.full
def test_the_six_methods_have_matched_parameters_and_the_note_states_them():
    found = trained_parameters("smollm2_commonsense")
    assert len(found) == 6
    assert max(found.values()) / min(found.values()) < 1.015
    stated = next(note for note in recipes.load("smollm2_commonsense").notes if "Trained parameters" in note)
    assert [int(x.replace(",", "")) for x in re.findall(r"\d[\d,]{6,}", stated.replace(";", ""))] == list(
        found.values()
    )


@pytest.mark.full
def test_a_finer_partition_has_more_router_and_the_same_ranks():
    found = list(trained_parameters("smora_granularity").values())
    assert found == sorted(found, reverse=True)
    assert found[0] == 232_783_872  # routers of 64 outputs beside 159,907,840


KEPT = sorted(path.parent.name for path in (Path(__file__).parents[1] / "recipes").glob("*/runs"))


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_table_is_what_its_kept_records_make(name):
    folder = recipes.find(name)
    study = Study(recipes.load(name), folder, str(folder / "runs"))
    made = table.build(study)
    for kind in ("md", "csv", "tex"):
        assert render.FORMATS[kind](made) == (folder / "table" / f"table.{kind}").read_text(encoding="utf-8")
    assert not [run for runs in study.final.values() for run in runs if run.others or run.state != "done"]
