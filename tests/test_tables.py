"""A table shows each kind of run as what it is, in four formats, the same bytes every time.

After a change that is meant to move the look of a table, write the stored files again:

    MIXLORA_STORE=1 python -m pytest tests/test_tables.py
"""

import html
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from invented_runs import PROTOCOL, right, write_run
from markdown_it import MarkdownIt

from mixlora.config import doors
from mixlora.config.overrides import config_dir, normalise
from mixlora.config.typed import typed
from mixlora.errors import ConfigError
from mixlora.records import log_path, read_json, read_lines, read_text, write_json, write_lines
from mixlora.tables import notes, render, show, statistics, table
from mixlora.tables import recipe as recipes
from mixlora.tables.recipe import Claim, Group, Point
from mixlora.tables.runs import MISSING
from mixlora.tables.study import Study

HERE = Path(__file__).parent
RECIPE, EXPECTED = HERE / "recipes" / "marks", HERE / "recipes" / "marks" / "expected"


def points(method: str) -> list[Point]:
    return [Point(Group("tiny", "arc", method), seed) for seed in (0, 1, 2)]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """lora best; mole tied with it; mola one seed; smora one of three on other data; dynmole failed; mixlora dirty."""
    folder = tmp_path_factory.mktemp("runs")
    study = study_in(folder)

    def made(method: str, seeds: list[int], easy: float, hard: float, **changes: object) -> None:
        for seed in seeds:
            scores = {"arc_easy": right(200, easy, 3 * seed), "arc_challenge": right(100, hard + seed / 50, 5 * seed)}
            write_run(study, points(method)[seed], scores, **changes)

    made("lora", [0, 1, 2], 0.9, 0.8)
    score_base(study.run(points("lora")[1]).folder, arc_easy=0.95)  # above all that were trained, and yet not the best
    made("mole", [0, 1, 2], 0.895, 0.4)
    made("mola", [1], 0.5, 0.5)
    made("smora", [0, 2], 0.6, 0.5)
    made("smora", [1], 0.99, 0.99, task_data={"test": "sha of another file"})
    made("mixlora", [0, 1, 2], 0.7, 0.7, git_dirty=True)
    score_base(study.run(points("mixlora")[0]).folder, arc_easy=0.1, arc_challenge=0.1)  # of a run that is left out
    failed = study.run(points("dynmole")[0]).folder
    write_json(failed / "run.json", {"status": "running"})
    write_json(log_path(failed).with_suffix(".json"), {"status": 6, "message": "not finite"})
    write_json(study.run(points("dynmole")[1]).folder / "run.json", {"status": "running"})
    return folder


def study_in(folder: Path, **options: Any) -> Study:
    return Study(recipes.load(str(RECIPE)), RECIPE, str(folder), **options)


@pytest.fixture(scope="module")
def made(root) -> table.Table:
    return table.build(study_in(root))


def row(made: table.Table, method: str) -> table.Row:
    return next(r for r in made.rows if r.method == method)


def cell(made: table.Table, method: str, column: str = "arc_easy") -> table.Cell:
    return made.cells[row(made, method), column]


def test_the_base_model_stands_above_and_is_not_compared(made):
    base = made.rows[0]
    assert (base.method, base.labels[2]) == ("", "base model")
    scored, missing, mean = (made.cells[base, column] for column in made.columns)
    assert (scored.mean, scored.examples) == (0.95, 200)
    assert not any((scored.best, scored.tied, scored.untested))
    assert missing.mean is mean.mean is None
    assert cell(made, "lora").best
    assert "| base model | 95.0 | – |" in render.markdown(made)


def score_base(folder: Path, **values: float) -> None:
    """What a run leaves that has asked the base model as it later asked its adapter."""
    results = read_json(folder / "results.json")
    write_json(folder / "before" / "results.json", {task: results[task] | {"value": v} for task, v in values.items()})


def base_of(study: Study) -> tuple[table.Table, table.Row | None]:
    made = table.build(study)
    return made, next((row for row in made.rows if row.labels[2] == "base model"), None)


def test_a_recipe_may_leave_the_base_model_out_and_runs_that_have_not_scored_it_have_no_row(root, tmp_path):
    study = study_in(root)
    study.recipe.table.base = None
    assert base_of(study)[1] is None
    assert base_of(study_in(tmp_path))[1] is None


def test_a_base_that_was_asked_in_another_way_is_left_out_and_seeds_that_sample_are_a_mean(tmp_path):
    study = study_in(tmp_path)
    for seed, value in enumerate((0.2, 0.3, 0.4)):
        score_base(write_run(study, points("lora")[seed], {"arc_easy": [1.0, 0.0]}), arc_easy=value)
    other = write_run(study, points("mole")[0], {"arc_challenge": [1.0, 0.0]})
    score_base(other, arc_challenge=0.5)
    results = read_json(other / "before" / "results.json")
    results["arc_challenge"]["protocol"] = PROTOCOL | {"version": 2}
    write_json(other / "before" / "results.json", results)
    made, row = base_of(study)
    assert row is not None
    assert list(made.cells[row, "arc_easy"].values.values()) == [0.2, 0.3, 0.4]
    assert "| base model | 30.0 ± 10.0 | – |" in render.markdown(made)
    assert made.cells[row, "arc_challenge"].mean is None


def test_what_a_paper_printed_for_the_base_model_stands_beside_ours(root):
    study = study_in(root)
    study.recipe.published.append(recipes.Published(label="base model", values={"arc_easy": 12.5}))
    made, row = base_of(study)
    assert [other.labels[2] for other in made.rows].count("base model") == 1
    assert made.cells[row, "arc_easy"].mean == 0.95
    assert "95.0 (12.5)" in render.markdown(made)


def test_a_mean_of_zero_is_a_score_and_comes_before_a_row_without_one(tmp_path):
    study = study_in(tmp_path)
    study.recipe.table.order = recipes.Order.score
    wrong = {"arc_easy": [0.0, 0.0], "arc_challenge": [0.0, 0.0]}
    score_base(write_run(study, points("mole")[0], wrong), arc_easy=0.5, arc_challenge=0.5)
    rows = table.build(study).rows
    assert [row.labels[2] for row in rows[:2]] == ["base model", "mole"]


def test_the_best_is_bold_and_what_cannot_be_told_from_it_is_marked(made):
    assert cell(made, "lora").best
    assert cell(made, "mole").tied
    assert not cell(made, "mole", "arc_challenge").tied
    assert not cell(made, "smora").tied
    assert cell(made, "mole", "arc_challenge").p < 0.01


def test_the_family_of_a_column_is_all_pairs_of_its_rows(tmp_path):
    """Of four rows six pairs, though only three are of the best: which it is, the same scores have said."""
    study = study_in(tmp_path)
    shares = dict(zip(("lora", "mole", "mola", "smora"), (0.9, 0.6, 0.59, 0.58), strict=True))
    scores = {method: {seed: right(60, share, 3 * seed) for seed in (0, 1, 2)} for method, share in shares.items()}
    for method, of_seeds in scores.items():
        for point in points(method):
            write_run(study, point, {"arc_easy": of_seeds[point.seed]})
    arrays = {method: np.array(list(of_seeds.values())) for method, of_seeds in scores.items()}
    pairs = list(itertools.combinations(arrays, 2))
    seeds = statistics.usual([array.mean(1) for array in arrays.values()])
    p = statistics.holm([statistics.difference([arrays[a] - arrays[b]], seeds).p for a, b in pairs])
    made = table.build(study)
    for (a, b), value in zip(pairs, p, strict=True):
        if a == "lora":
            assert cell(made, b).p == pytest.approx(value)


def test_the_seeds_of_a_pair_vary_no_less_than_is_usual_among_all_rows_that_have_them(tmp_path):
    """Two tasks; the seeds of two rows agree by chance, those of two others do not, and a last one lacks a seed."""
    rng = np.random.default_rng(0)

    def row(*shifts: float) -> list[table.Scores]:
        scores = [shift + rng.normal(0, 0.01, 50) for shift in shifts]
        one = {seed: {str(i): float(value) for i, value in enumerate(of)} for seed, of in enumerate(scores)}
        return [one, {seed: {key: value / 2 for key, value in of.items()} for seed, of in one.items()}]

    a, b, short = row(0.5, 0.5, 0.5), row(0.52, 0.52, 0.52), row(0.1, 0.9)
    whole = [a, b, row(0.2, 0.6, 0.4), row(0.5, 0.1, 0.6)]
    alone, beside = table.paired_test(a, b), table.paired_test(a, b, [*map(table.seed_means, (*whole, short))])
    means = [[np.mean([np.mean(list(task[s].values())) for task in of]) for s in range(3)] for of in whole]
    own, usual = np.var(np.subtract(means[0], means[1]), ddof=1), statistics.usual(means).variance
    assert beside.error**2 == pytest.approx(alone.error**2 + (usual - own) / 3)
    assert alone.p < 1e-3 < 0.05 < beside.p


@pytest.mark.parametrize("others", ["calm", "wild"])
def test_rows_that_vary_from_seed_to_seed_make_a_table_less_sure_of_the_others(tmp_path, others):
    study = study_in(tmp_path)
    study.recipe.claims = [Claim(better="lora", worse="mole", delta=1.0)]
    shares = {"lora": [0.8, 0.8, 0.8], "mole": [0.6, 0.6, 0.6]}
    wild = {"mola": [0.2, 0.7, 0.5], "smora": [0.6, 0.1, 0.5], "hydralora": [0.5, 0.2, 0.6]}
    shares |= wild if others == "wild" else {method: [0.5] * 3 for method in wild}
    for method, of_seeds in shares.items():
        for point in points(method):
            write_run(study, point, dict.fromkeys(("arc_easy", "arc_challenge"), right(60, of_seeds[point.seed], 0)))
    made = table.build(study)
    assert cell(made, "mole").tied == (others == "wild")
    claim = next(line for line in made.notes if "minus" in line)
    p = float(re.search(r"p = ([\d.e-]+)", claim)[1])
    assert (p > table.LEVEL) == (others == "wild")


def test_equal_means_are_both_the_best_and_need_no_mark(tmp_path):
    study = study_in(tmp_path)
    for method, turn in (("lora", 0), ("mole", 7)):
        for point in points(method):
            write_run(study, point, {"arc_easy": right(20, 0.5, turn), "arc_challenge": right(20, 0.5, turn)})
    made = table.build(study)
    assert all(cell(made, method).best and not cell(made, method).tied for method in ("lora", "mole"))
    assert render.markdown(made).count("**50.0** ± 0.0") == 6
    assert "≈" not in render.markdown(made)


def test_one_seed_has_no_deviation(made):
    assert cell(made, "mola").deviation is None
    assert "50.0¹ 1/3" in render.markdown(made)


def test_missing_failed_and_dirty_are_words(made):
    assert cell(made, "hydralora").empty == "not run"
    assert cell(made, "dynmole").empty == "failed"
    assert cell(made, "mixlora").empty == "dirty"
    text = render.markdown(made)
    assert "dynmole · seed 0: failed, exit status 6: not finite" in text
    assert "dynmole · seed 1: unfinished" in text


def test_a_run_on_other_data_is_left_out_and_named(made):
    assert cell(made, "smora").values == {0: 0.6, 2: 0.6}
    text = render.markdown(made)
    assert "smora · seed 1, arc_easy: left out, data.test sha of another file instead of sha of arc_easy" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"task_prompts": "other"},
        {"task_protocol": {"name": "loglikelihood", "version": 2, "split": "test"}},
        {"weights_sha256": "other"},
        {"task_metric": "acc_norm"},
        {"world_size": 2},
    ],
)
def test_anything_else_that_differs_is_left_out_as_well(tmp_path, changes):
    study = study_in(tmp_path)
    scores = {"arc_easy": [1.0, 0.0], "arc_challenge": [1.0, 0.0]}
    for point in points("lora"):
        write_run(study, point, scores)
    write_run(study, points("mole")[0], scores, **changes)
    assert cell(table.build(study), "mole").empty == "other data"


def test_models_may_be_trained_by_other_numbers_of_processes_but_runs_of_one_model_not(tmp_path):
    models = {"tiny": None, "wide": {"overrides": ["model=tiny", "model.random.hidden_size=128"]}}
    study = other_recipe(tmp_path, models=models, methods={"lora": None, "mole": None})
    for model, method, processes in (("tiny", "lora", 1), ("wide", "lora", 4), ("wide", "mole", 1)):
        for seed in (0, 1, 2)[: 3 if method == "lora" else 1]:
            write_run(study, Point(Group(model, "arc", method), seed), SCORES, world_size=processes)
    made = table.build(study)
    assert all(len(c.values) == 3 for (r, _), c in made.cells.items() if r.method == "lora")
    assert "wide · arc · mole · seed 0, arc_easy: left out, processes 1 instead of 4" in render.markdown(made)


HASHED = {"task_data": {"test": "a" * 64}, "task_prompts": "b" * 64, "weights_sha256": "c" * 64}
PINNED = {
    "data": {"arc_easy": {"test": "a" * 64}, "arc_challenge": {"test": "a" * 64}},
    "prompts": {"tiny": {"arc_easy": "b" * 64, "arc_challenge": "b" * 64}},
    "weights": {"tiny": "c" * 64},
    "protocol_version": 1,
}


def pinned(folder: Path, pins: dict[str, Any]) -> Study:
    """A copy of the recipe that pins, over the runs in `folder`."""
    place = folder / "pinned"
    place.mkdir(exist_ok=True)
    (place / "recipe.yaml").write_text((RECIPE / "recipe.yaml").read_text() + yaml.safe_dump({"pins": pins}))
    return Study(recipes.load(str(place)), place, str(folder))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task_data": {"test": "d" * 64}}, "data.test dddddddd instead of aaaaaaaa"),
        ({"task_prompts": "d" * 64}, "prompts dddddddd instead of bbbbbbbb"),
        ({"weights_sha256": "d" * 64}, "weights dddddddd instead of cccccccc"),
        (
            {"task_protocol": {"name": "loglikelihood", "version": 2, "split": "test"}},
            "protocol.version 2 instead of 1",
        ),
    ],
)
def test_what_differs_from_a_pin_is_left_out_even_where_most_runs_do(tmp_path, changes, says):
    study = pinned(tmp_path, PINNED)
    scores = {"arc_easy": [1.0, 0.0], "arc_challenge": [1.0, 0.0]}
    for point in points("lora")[:2]:
        write_run(study, point, scores, **HASHED | changes)
    assert cell(table.build(study), "lora").empty == "other data"  # even where no run fits
    write_run(study, points("mole")[0], scores, **HASHED)
    study.forget()
    made = table.build(study)
    assert cell(made, "mole").values == {0: 0.5}
    assert cell(made, "lora").empty == "other data"
    assert f"lora · seed 0, arc_easy: left out, {says}\n" in render.markdown(made)


def test_a_pin_of_one_split_says_nothing_of_the_others(tmp_path):
    study = pinned(tmp_path, {"data": {"arc_easy": {"test": "a" * 64}}})
    scores = {"arc_easy": [1.0, 0.0], "arc_challenge": [1.0, 0.0]}
    for point in points("lora"):
        write_run(study, point, scores, task_data={"test": "a" * 64, "train": "e" * 64})
    assert len(cell(table.build(study), "lora").values) == 3
    for point in points("mole"):
        write_run(study, point, scores, task_data={"test": "a" * 64, "train": "f" * 64})
    study.forget()
    text = render.markdown(table.build(study))
    assert "mole · seed 0, arc_easy: left out, data.train ffffffff instead of eeeeeeee" in text


def test_the_pins_of_finished_runs_are_printed_for_pasting_and_fit(tmp_path, capsys):
    study = study_in(tmp_path)
    with pytest.raises(ConfigError, match="has no finished run"):
        show.print_pins(study)
    scores = {"arc_easy": [1.0, 0.0], "arc_challenge": [1.0, 0.0]}
    for point in points("lora"):
        write_run(study, point, scores, **HASHED)
    write_run(study, points("mole")[0], scores, **HASHED | {"task_prompts": "d" * 64})
    study.forget()
    show.print_pins(study)
    text = capsys.readouterr().out
    assert "# tiny · arc · mole · seed 0, arc_easy: left out, prompts" in text
    assert yaml.safe_load(text) == {"pins": PINNED}
    again = table.build(pinned(tmp_path, yaml.safe_load(text)["pins"]))
    assert len(cell(again, "lora").values) == 3
    assert cell(again, "mole").empty == "other data"


def test_dirty_runs_are_taken_in_when_asked_and_marked(root):
    made = table.build(study_in(root, include_dirty=True))
    assert cell(made, "mixlora").mean == pytest.approx(0.7)
    assert "70.0 ± 0.0‡" in render.markdown(made)


def test_printed_values_stand_beside_ours_and_rows_without_runs_too(made):
    text = render.markdown(made)
    assert "**90.0** ± 0.0 (73.8) | **82.0** ± 2.0 (50.9)" in text
    assert "| Prompt tuning 100% | – (10.25) |" in text
    assert "published +1.5, ours -20.2 (error 2.3, p = " in text  # (89.5 + 42) / 2 − (90 + 82) / 2


def test_what_was_printed_of_a_group_that_is_left_out_keeps_its_row_and_its_parameters(tmp_path):
    mixtures = {"arc": {"setting": "all"}, "both": {"setting": "equal", "overrides": ["tasks=arc"]}}
    published = [
        {"method": "lora", "setting": "all", "values": {"arc_easy": 11.5}, "parameters": 111},
        {"method": "lora", "setting": "equal", "values": {"arc_easy": 22.5}, "parameters": 222},
    ]
    left_out = [{"where": {"mixture": "both", "method": "lora"}, "leave_out": True}]
    made = table.build(other_recipe(tmp_path, mixtures=mixtures, published=published, exceptions=left_out))
    found = {
        row.setting: (made.cells[row, "arc_easy"].published, made.extras[row, "published_parameters"])
        for row in made.rows
        if row.labels[2] == "LoRA & co_1"
    }
    assert found == {"all": (11.5, 111), "equal": (22.5, 222)}
    assert "| equal | LoRA & co_1 | – (22.5) |" in render.markdown(made)


def test_the_legend_says_how_was_asked_where_it_is_not_the_usual_way(tmp_path):
    study = study_in(tmp_path)
    folder = write_run(study, points("lora")[0], SCORES)
    assert "scored:" not in render.markdown(table.build(study))
    results = read_json(folder / "results.json")
    for result in results.values():
        result["protocol"] |= {"split": "validation", "num_fewshot": 5}
    results["arc_easy"]["protocol"]["name"] = "letters"
    write_json(folder / "results.json", results)
    study.forget()
    said = "- scored: validation split; 5 solved examples before each question; protocol letters (ARC-e)\n"
    assert said in render.markdown(table.build(study))


def test_the_legend_and_the_csv_say_by_what_each_task_is_scored(tmp_path):
    study = study_in(tmp_path)
    folder = write_run(study, points("lora")[0], SCORES)
    assert "- metric: acc\n" in render.markdown(table.build(study))
    results = read_json(folder / "results.json")
    results["arc_challenge"] |= {"metric": "acc_norm", "metrics": {"acc_norm": 0.5, "acc_token": 0.25}}
    write_json(folder / "results.json", results)
    study.forget()
    assert "- metric: acc (ARC-e), acc_norm (ARC-c)\n" in render.markdown(table.build(study))
    study.recipe.table.metrics = {"arc_challenge": "acc_token"}
    made = table.build(study)
    for kind, said in (
        ("md", "- metric: acc (ARC-e), acc_token (ARC-c)\n"),
        ("tex", r"metric: acc (ARC-e), acc\_token (ARC-c).\\"),
        ("html", "<li>metric: acc (ARC-e), acc_token (ARC-c)</li>"),
        ("csv", "lora,arc_easy,acc,0.75"),
        ("csv", "lora,arc_challenge,acc_token,0.25"),
        ("csv", "lora,mean,,0.5"),
    ):
        assert said in render.FORMATS[kind](made), kind


def test_what_runs_say_under_their_scores_stands_with_the_most_of_any_run_under_the_table(tmp_path):
    study, protocol = study_in(tmp_path), {"task_protocol": PROTOCOL | {"max_new_tokens": 64}}
    write_run(study, points("lora")[0], SCORES, task_cut=None, **protocol)  # of the harness, which does not say
    assert "of a run at most" not in render.markdown(table.build(study))
    for seed, lost in ((1, 3), (2, 2)):
        folder = write_run(study, points("lora")[seed], SCORES, task_cut={"prompts": lost, "replies": 0}, **protocol)
        results = read_json(folder / "results.json")
        results["arc_challenge"] |= {"cut": {"prompts": 1, "replies": lost}, "also_trained_on": seed}
        results["arc_easy"]["metrics"] = {"acc": 0.75, "parsed": 1 - lost / 4}
        write_json(folder / "results.json", results)
    write_run(study, points("mole")[0], SCORES, task_cut={"prompts": 4}, task_prompts="other")  # left out
    study.forget()
    assert [line for line in table.build(study).notes if "of a run at most" in line] == [
        "prompts were too long and lost shots or their beginning, of a run at most: ARC-e 3 of 4, ARC-c 1 of 4",
        "answers name no option and count as wrong, of a run at most: ARC-e 3 of 4",
        "answers had no end within 64 tokens (max_new_tokens of the task), of a run at most: ARC-c 3 of 4",
        "rows were also trained on, of a run at most: ARC-c 2 of 4",
    ]


def test_the_legend_says_that_the_first_rows_were_scored_and_chosen_on(tmp_path):
    study = study_in(tmp_path, overrides=["eval.limit=4"])
    write_run(study, points("lora")[0], SCORES)
    assert "- scored: the first 4 rows\n" in render.markdown(table.build(study))
    fewer = {"arc_easy": SCORES["arc_easy"], "arc_challenge": [1.0, 0.0]}  # all that there are
    write_run(study, points("lora")[0], fewer)
    study.forget()
    assert "- scored: the first 4 rows (ARC-e)\n" in render.markdown(table.build(study))
    said = "the rate is chosen on the first 50 validation rows of a task"
    assert said not in notes.on_runs(study)
    study.recipe.learning_rates = [1e-4, 1e-3]
    study.forget()
    assert said in notes.on_runs(study)


def test_an_answer_of_a_task_without_options_is_generated_as_usual():
    result = {"metric": "strict", "protocol": {"name": "generate", "split": "test", "num_fewshot": 0}}
    assert notes.unusual(result) == []
    assert notes.unusual(result | {"metric": "acc"}) == ["protocol generate"]


def test_tasks_whose_data_lack_rows_are_marked_and_runs_of_changed_code_otherwise(tmp_path):
    study = study_in(tmp_path, include_dirty=True)
    write_run(study, points("lora")[0], SCORES, incomplete=["arc_easy"], git_dirty=True)
    made = table.build(study)
    text = render.markdown(made)
    assert "| ARC-e† (n=4) | ARC-c (n=4) |" in text
    assert "- † the data sets of arc_easy lack rows of the original\n" in text
    assert "- ‡ tiny · arc · lora · seed 0: made with code" in text
    assert "75.0¹‡ 1/3" in text
    assert r"ARC-e$^{\dagger}$" in render.latex(made)
    assert r"$^{\ddagger}$" in render.latex(made)


def test_rows_that_no_number_of_the_table_is_made_of_may_lack(tmp_path):
    """Of runs that are left out, of cells that are, and of a task that is neither a column nor trained on."""
    study = study_in(tmp_path)
    trained, lacking = {"arc_easy": 9, "gsm8k": 9}, ["arc_challenge", "arc_easy", "boolq", "gsm8k"]
    for point in points("lora"):
        write_run(study, point, SCORES)
    write_run(study, points("mole")[0], SCORES, rows=trained, incomplete=lacking, git_dirty=True)
    write_run(study, points("mole")[1], SCORES, rows=trained, incomplete=lacking, task_prompts="other")
    assert table.build(study).incomplete == set()
    folder = write_run(study, points("mole")[0], SCORES, rows=trained, incomplete=lacking)
    results = read_json(folder / "results.json")
    results["arc_challenge"]["data"] = {"test": "of another file"}
    write_json(folder / "results.json", results)
    study.forget()
    assert table.build(study).incomplete == {"arc_easy", "gsm8k"}


@pytest.mark.parametrize("name", ["tiny", str(RECIPE)])
def test_the_command_for_what_is_not_there_makes_the_same_study(tmp_path, capsys, name):
    overrides = ['data.source="a b"', "train.max_steps=2", r'tasks.mixture.arc_easy.question="a \"b\", c\\"']
    study = show.study_of(name, str(tmp_path / "my runs, 1"), overrides)
    made = show.show(study, doors.Format.md, None)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Run what is not there yet: "))
    python, m, module, *argv = shlex.split(line.partition(": ")[2])
    assert (python, m, module) == ("python", "-m", "mixlora.reproduce")
    with initialize_config_dir(config_dir(), version_base="1.3"):
        options = typed(doors.Reproduce, compose("reproduce", overrides=normalise(argv)))
    again = show.study_of(options.recipe, options.output_root, options.overrides)
    assert (again.folder, again.root, again.overrides) == (study.folder, study.root, overrides)
    assert again.recipe == study.recipe
    assert str(tmp_path) not in render.markdown(made)
    assert f"recipe={name}" in argv


def test_a_task_that_the_runs_could_not_train_on_is_marked_and_the_mean_over_it_too(tmp_path):
    study = study_in(tmp_path)
    folder = write_run(study, points("lora")[0], SCORES, task_trained=True)
    assert "not trained on" not in render.markdown(table.build(study))
    results = read_json(folder / "results.json")
    results["arc_easy"]["trained"] = False
    write_json(folder / "results.json", results)
    study.forget()
    made = table.build(study)
    text = render.markdown(made)
    assert r"| Method | ARC-e\* (n=4) | ARC-c (n=4) | Avg\* |" in text
    assert r"- \* scored and not trained on, for the runs had no training rows of it; Avg is over it as well" in text
    assert "ARC-e{*} & ARC-c & Avg{*}" in render.latex(made)


@pytest.mark.parametrize(
    "key", ["weight=0", *(pytest.param(key, marks=pytest.mark.full) for key in ("eval_only=true", "splits.train=null"))]
)
def test_a_task_that_no_mixture_would_train_on_has_no_mark(tmp_path, key):
    study = study_in(tmp_path, overrides=[f"tasks.mixture.arc_easy.{key}"])
    write_run(study, points("lora")[0], SCORES, task_trained=False)
    assert table.build(study).untrained == {"arc_challenge"}


def test_letters_quotes_and_greek_are_text_in_latex():
    assert render.latex_text("Łódź, Žižek, naïve, Größe") == "Łódź, Žižek, naïve, Größe"
    assert render.latex_text("“a” ‘b’ … 5 µm € Ωβμ") == (
        r"{``}a{''} {`}b{'} \ldots{} 5 $\mu$m \texteuro{} $\Omega$$\beta$$\mu$"
    )
    assert render.latex_text("ęđ漢²") == "(U+0119)(U+0111)(U+6F22)(U+00B2)"  # an error, or no sign at all


@pytest.mark.parametrize("kind", sorted(render.FORMATS))
def test_the_bytes_are_the_stored_ones_and_the_same_twice(root, made, kind):
    text = render.FORMATS[kind](made)
    assert text == render.FORMATS[kind](table.build(study_in(root)))
    if os.environ.get("MIXLORA_STORE"):
        (EXPECTED / f"table.{kind}").write_text(text, encoding="utf-8")
    assert text == (EXPECTED / f"table.{kind}").read_text(encoding="utf-8")


def test_kept_records_make_the_same_table_byte_for_byte(root, tmp_path):
    show.keep_records(study_in(root), tmp_path / "runs")
    again = table.build(study_in(tmp_path / "runs"))
    for kind, text in render.FORMATS.items():
        assert text(again) == (EXPECTED / f"table.{kind}").read_text(encoding="utf-8")
    assert not list((tmp_path / "runs").rglob("*.jsonl"))
    assert sum(path.stat().st_size for path in (tmp_path / "runs").rglob("*") if path.is_file()) < 200_000


@pytest.mark.full
def test_kept_records_are_found_by_what_was_asked_for_wherever_the_data_lay(tmp_path):
    runs, kept = tmp_path / "runs", tmp_path / "kept"
    made_with = study_in(runs, overrides=["data.source=/elsewhere/hub"])
    write_run(made_with, points("lora")[0], {"arc_easy": [1.0, 0.0], "arc_challenge": [1.0, 1.0]})
    show.keep_records(made_with, kept)
    found = study_in(kept)
    assert found.run(points("lora")[0]).scored("arc_easy")
    assert "laid over the recipe: data.source=hub" in render.markdown(table.build(found))
    index = read_json(kept / "kept.json")
    moved = kept / index["runs"][0]["folder"]
    moved.rename(kept / "any-name")  # as if a later key of the configuration had changed every hash
    index["runs"][0]["folder"] = "any-name"
    write_json(kept / "kept.json", index)
    assert study_in(kept).run(points("lora")[0]).scored("arc_easy")
    changed = study_in(kept)
    changed.recipe.protocol = ["train.max_steps=99"]
    assert changed.run(points("lora")[0]).state == MISSING


def test_kept_records_name_no_place_of_the_machine(tmp_path):
    source, runs = "/elsewhere/hub", tmp_path / "runs"
    study = study_in(runs, overrides=[f"data.source={source}"])
    study.recipe.methods = {name: study.recipe.methods[name] for name in ("lora", "mole")}
    command = f"python -m mixlora.train --config-dir={tmp_path} method=lora data.source={source} output_root={runs}"
    notes = [f"task arc: there is no {source}/arc/train.parquet"]
    scores = {"arc_easy": [1.0, 0.0], "arc_challenge": [1.0, 1.0]}
    write_run(study, points("lora")[0], scores, command=command, notes=notes)
    failed = log_path(study.run(points("mole")[0]).folder).with_suffix(".json")
    write_json(failed, {"status": 3, "message": f"there is no {source}"})
    study.forget()
    show.keep_records(study, tmp_path / "kept")
    for path in (tmp_path / "kept").rglob("*"):
        if path.is_file():
            assert not re.search(rf"/elsewhere|{re.escape(str(tmp_path))}", read_text(path_of(path))), path
    record = read_json(tmp_path / "kept" / study.run(points("lora")[0]).folder.name / "run.json")
    assert record["command"].endswith("method=lora data.source=hub output_root=runs")
    assert "mole · seed 0: failed, exit status 3: there is no hub" in render.markdown(
        table.build(study_in(tmp_path / "kept"))
    )


def test_records_do_not_overwrite_the_runs_that_they_are_of(tmp_path):
    study = study_in(tmp_path / "runs")
    folder = write_run(study, points("lora")[0], {"arc_easy": [1.0, 0.0], "arc_challenge": [1.0, 1.0]})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for place in (study.root, folder, folder / "kept", tmp_path / "kept" / ".." / "runs"):
        with pytest.raises(ConfigError, match=r"is where the runs are, which would be overwritten\. Name another"):
            show.keep_records(study, place)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_path_is_hidden_where_it_is_one_and_not_inside_other_words():
    hidden = {"/data": "D", "/data/hub": "hub", "/home/a b/runs": "runs"}
    for text, want in (
        (
            "data.source=/data org/data org/data_x /data_x /data-2 ./data ~/data",
            "data.source=D org/data org/data_x /data_x /data-2 ./data ~/data",
        ),
        ("no '/data/hub/x.json', no /data/x. file:///data", "no 'hub/x.json', no D/x. file://D"),
        (r'{"message": "line\n/data/hub", "root": "/home/a b/runs"}', r'{"message": "line\nhub", "root": "runs"}'),
    ):
        assert show.without_paths(text, hidden) == want
    assert show.without_paths("as it is", {}) == "as it is"


def path_of(path: Path) -> Path:
    return path.with_suffix("") if path.suffix == ".gz" else path


def test_the_rate_is_chosen_on_validation_with_the_first_seed(tmp_path):
    study = study_in(tmp_path)
    study.recipe.learning_rates = [1e-4, 1e-3]
    group = Group("tiny", "arc", "lora")
    assert study.rate(group) is None
    scores = {"arc_easy": [1.0, 0.0], "arc_challenge": [1.0, 0.0]}
    for rate, validation, test in ((1e-4, 0.7, 0.0), (1e-3, 0.6, 1.0)):
        changed = {task: [test] * 2 for task in scores}
        folder = write_run(study, Point(group, 0, rate), changed)
        write_json(folder / "metrics.jsonl", {})
        (folder / "metrics.jsonl").write_text(f'{{"step": 2, "validation_mean": {validation}}}\n')
    study.forget()
    assert study.rate(group) == 1e-4
    assert [p.rate for p in study.points() if p.group == group] == [1e-4, 1e-3, 1e-4, 1e-4]
    assert all(study.is_open(g) for g in study.groups if g != group)


@pytest.mark.parametrize(("load_best", "chosen"), [("false", 1e-3), ("true", 1e-4)])
def test_the_rate_is_chosen_by_the_score_of_the_adapter_that_is_kept(tmp_path, load_best, chosen):
    study = study_in(tmp_path, overrides=["train.eval_steps=1", f"train.load_best={load_best}"])
    study.recipe.learning_rates = [1e-4, 1e-3]
    group = Group("tiny", "arc", "lora")
    for rate, validation in ((1e-4, (0.9, 0.1)), (1e-3, (0.2, 0.5))):
        folder = write_run(study, Point(group, 0, rate), SCORES)
        lines = [{"step": step, "validation_mean": mean} for step, mean in enumerate(validation, start=1)]
        write_lines(folder / "metrics.jsonl", lines)
    assert study.rate(group) == chosen


@pytest.mark.parametrize(("status", "open_"), [(6, False), (-9, True), (5, True), (1, True)])
@pytest.mark.parametrize("told_by", ["run.json", "the sweep"])
def test_a_rate_is_lost_by_its_numbers_alone(tmp_path, status, open_, told_by):
    """A run that was killed, or found no memory, says nothing of its rate: the choice waits for it."""
    study = study_in(tmp_path)
    study.recipe.learning_rates = [1e-4, 1e-3]
    tried(study, "lora", 1e-4, 0.4)
    tried(study, "lora", 1e-3, None, status=status if told_by == "the sweep" else 1)
    point = Point(Group("tiny", "arc", "lora"), 0, 1e-3)
    if told_by == "run.json":  # torchrun's own status is 1
        record = study.run(point).folder / "run.json"
        write_json(record, {"status": "failed", "message": "of the run", "exit_status": status})
    study.forget()
    group = Group("tiny", "arc", "lora")
    assert study.is_open(group) is open_
    assert not study.is_lost(group)
    assert study.rate(group) == (None if open_ else 1e-4)
    said = "no rate is chosen without it" if open_ else "it has no say in the choice"
    assert f"{point}: failed, exit status" in (text := render.markdown(table.build(study)))
    assert said in text


def test_a_failed_run_of_an_earlier_version_is_lost_for_it_does_not_say_why(tmp_path):
    study, point = study_in(tmp_path), points("lora")[0]
    write_json(study.run(point).folder / "run.json", {"status": "failed", "message": "of the run"})
    study.forget()
    assert study.run(point).lost


def tried(
    study: Study, method: str, rate: float | None, validation: float | None, *, status: int = 6, **changes: Any
) -> None:
    """A run that chooses the rate: with a validation score, or failed."""
    point = Point(Group("tiny", "arc", method), 0, rate)
    if validation is None:
        failed = {"status": status, "message": f"nan at {rate}"}
        write_json(log_path(study.run(point).folder).with_suffix(".json"), failed)
        return
    folder = write_run(study, point, {"arc_easy": [1.0, 0.0], "arc_challenge": [1.0, 0.0]}, **changes)
    write_lines(folder / "metrics.jsonl", [{"step": 2, "validation_mean": validation}])


def test_what_happened_to_the_choice_of_the_rates_is_said(tmp_path):
    study = study_in(tmp_path)
    study.recipe.learning_rates = [1e-4, 1e-3, 1e-2]
    for rate, validation in ((1e-4, 0.4), (1e-3, 0.5), (1e-2, 0.6)):
        tried(study, "lora", rate, validation)
        tried(study, "mole", rate, None if rate == 1e-2 else 1 - validation)
        tried(study, "mola", rate, None)
    tried(study, "smora", 1e-4, 0.1, git_dirty=True)
    tried(study, "smora", 1e-3, 0.7)
    tried(study, "smora", 1e-2, 0.2, task_data={"test": "of another file"})
    study.forget()
    made = table.build(study)
    assert [cell(made, m).empty for m in ("mola", "hydralora")] == ["failed", "not run"]
    assert cell(made, "smora").values == {0: 0.5}
    text = render.markdown(made)
    for said in (
        "mole · seed 0 · rate 0.01: failed, exit status 6: nan at 0.01; it has no say",
        "mola · seed 0 · rate 0.001: failed, exit status 6: nan at 0.001",
        "mola · seed 1: failed, no learning rate has a validation score",
        "smora · seed 0 · rate 0.0001: made with code that differs from its commit, and yet",
        "smora · seed 0 · rate 0.01, arc_easy: data.test of another file instead of sha of arc_easy, and yet",
        "chosen rate is the largest of the grid (0.01) for LoRA & co_1; the smallest of the grid (0.0001) for mole: ",
    ):
        assert said in text, said
    assert all(p.group.method != "mola" or p.rate is not None for p in study.points())
    show.keep_records(study, tmp_path / "kept")
    kept = study_in(tmp_path / "kept")
    kept.recipe.learning_rates = study.recipe.learning_rates
    assert render.markdown(table.build(kept)) == text


# ---- what may be compared


SCORES = {"arc_easy": [1.0, 0.0, 1.0, 1.0], "arc_challenge": [1.0, 0.0, 1.0, 0.0]}


def other_recipe(folder: Path, **changes: Any) -> Study:
    """The recipe with other axes, over the runs in `folder`."""
    place = folder / "other"
    place.mkdir(exist_ok=True)
    values = yaml.safe_load((RECIPE / "recipe.yaml").read_text()) | {"published": [], "claims": []} | changes
    (place / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return Study(recipes.load(str(place)), place, str(folder))


def test_models_may_have_windows_templates_and_attentions_of_their_own_but_runs_of_one_model_not(tmp_path):
    models = {"tiny": None, "wide": {"overrides": ["model=tiny", "model.random.hidden_size=128"]}}
    study = other_recipe(tmp_path, models=models, methods={"lora": None, "mole": None})
    own = {
        "tiny": {"max_length": 2048, "template": "plain"},
        "wide": {"max_length": 8192, "template": "chat", "attention": "eager"},
    }
    for model, protocol in own.items():
        for seed in (0, 1, 2):
            write_run(study, Point(Group(model, "arc", "lora"), seed), SCORES, task_protocol=PROTOCOL | protocol)
    assert all(len(c.values) == 3 for (r, _), c in table.build(study).cells.items() if r.method == "lora")
    write_run(study, Point(Group("wide", "arc", "mole"), 0), SCORES, task_protocol=PROTOCOL | own["tiny"])
    study.forget()
    said = (
        "mole · seed 0, arc_easy: left out, protocol.attention nothing instead of eager, protocol.max_length 2048 "
        "instead of 8192, protocol.template plain instead of chat\n"
    )
    assert said in render.markdown(table.build(study))


def test_two_mixtures_in_one_row_with_the_same_task_are_refused(tmp_path):
    mixtures = {"arc": None, "both": {"overrides": ["tasks=arc", "tasks.sampling=equal"]}}
    with pytest.raises(ConfigError, match=r"mixtures arc and both both score arc_easy in one row.*`setting`"):
        table.build(other_recipe(tmp_path, mixtures=mixtures))
    mixtures = {"arc": {"setting": "all"}, "both": {"setting": "equal"} | mixtures["both"]}
    assert {r.setting for r in table.build(other_recipe(tmp_path, mixtures=mixtures)).rows} == {"all", "equal"}


def test_a_row_of_several_mixtures_has_the_rate_of_each(tmp_path):
    mixtures = {task: {"overrides": [f"tasks={task}"]} for task in SCORES}
    study = other_recipe(tmp_path, mixtures=mixtures, methods={"lora": None, "mole": None})
    study.recipe.learning_rates = [1e-3, 1e-4]
    best = {("lora", "arc_easy"): 1e-3, ("lora", "arc_challenge"): 1e-4, ("mole", "arc_easy"): 1e-4}
    for (method, task), chosen in best.items():
        for rate in study.recipe.learning_rates:
            point = Point(Group("tiny", task, method), 0, rate)
            folder = write_run(study, point, {task: SCORES[task]})
            write_lines(folder / "metrics.jsonl", [{"step": 2, "validation_mean": float(rate == chosen)}])
    made = table.build(study)
    assert [made.extras[row(made, method), "rate"] for method in ("lora", "mole")] == ["0.0001 / 0.001", "0.0001"]
    assert re.search(r"\| lora \|.*\| 0\.0001 / 0\.001 \|\n", render.markdown(made))
    assert re.search(r",lora,arc_easy,acc,.*,0\.0001 / 0\.001\n", render.csv(made))


def mole_beside_lora(folder: Path, seeds: tuple[int, ...] = (0, 1, 2), share: float = 0.2) -> tuple[Study, list[Path]]:
    """lora with 90 % in every seed, mole with less in some."""
    study = study_in(folder)
    for point in points("lora"):
        write_run(study, point, {"arc_easy": right(40, 0.9, 0), "arc_challenge": right(40, 0.9, 0)})
    mine = [write_run(study, points("mole")[s], {t: right(40, share, 0) for t in SCORES}) for s in seeds]
    return study, mine


@pytest.mark.parametrize("left", [0, 39])
def test_what_lacks_predictions_is_neither_worse_nor_equal_but_not_tested(tmp_path, left):
    study, folders = mole_beside_lora(tmp_path)
    assert "not tested" not in render.markdown(table.build(study))
    for folder in folders:
        path = folder / "predictions" / "arc_easy.jsonl"
        write_lines(path, read_lines(path)[:left])
    made = table.build(study)
    assert cell(made, "mole").untested
    assert cell(made, "mole", table.MEAN).untested
    assert not cell(made, "mole", "arc_challenge").untested
    assert "20.0 ± 0.0? | 20.0 ± 0.0 | 20.0 ± 0.0?" in render.markdown(made)
    assert "- ? not tested: " in render.markdown(made)


def test_a_seed_without_predictions_does_not_hide_the_other_seeds(tmp_path):
    study, folders = mole_beside_lora(tmp_path)
    write_lines(folders[0] / "predictions" / "arc_easy.jsonl", [])
    assert cell(table.build(study), "mole").p < 0.01


def test_nothing_is_claimed_where_the_shared_seeds_say_the_opposite_of_the_means(tmp_path):
    """lora is ahead over all seeds, for mole lacks the good ones; on seed 0 alone, which both have, mole is."""
    study = study_in(tmp_path)
    for point, share in zip(points("lora"), (0.1, 0.9, 0.9), strict=True):
        write_run(study, point, {task: right(40, share, 0) for task in SCORES})
    write_run(study, points("mole")[0], {task: right(40, 0.5, 0) for task in SCORES})
    made = table.build(study)
    assert cell(made, "lora").best
    assert cell(made, "mole").untested
    assert cell(made, "mole").p is None


def test_a_mean_over_tasks_takes_the_seeds_that_every_task_has():
    easy, hard = table.Cell({0: 0.2, 2: 0.6}, expected=3), table.Cell({2: 0.8, 1: 0.0}, expected=3)
    assert table.mean_cell([easy, hard]).values == {2: pytest.approx(0.7)}
    assert table.mean_cell([table.Cell({0: 0.2}, 3), table.Cell({1: 0.2}, 3)]).empty == "in part"
    assert table.mean_cell([easy, table.Cell(expected=3, empty="failed")]).empty == "failed"


def test_one_lucky_seed_is_not_the_best_beside_a_method_with_all(tmp_path):
    study, _ = mole_beside_lora(tmp_path, seeds=(1,), share=1.0)
    made = table.build(study)
    assert cell(made, "lora").best
    assert not cell(made, "mole").best
    assert "- bold: best of its model in the column, of the cells with all their runs if there is one" in (
        render.markdown(made)
    )


def test_means_that_differ_by_rounding_only_are_equal():
    rows = {table.Row("tiny", "", name, ("", "", "")): mean for name, mean in (("a", 0.1 + 0.2), ("b", 0.3))}
    cells = {(row, "t"): table.Cell({0: mean}, 1) for row, mean in rows.items()}
    table.mark(cells, "t", next(iter(rows)), rows, {})
    assert all(c.best and not c.untested for c in cells.values())


@pytest.mark.parametrize(
    ("seeds", "says"),
    [
        ((0, 1, 2), "percent, mean ± sample deviation over 3 seeds"),
        ((0, 1), "percent, mean ± sample deviation over 2 to 3 seeds"),
    ],
)
def test_the_legend_says_how_many_seeds(tmp_path, seeds, says):
    study, _ = mole_beside_lora(tmp_path, seeds=seeds)
    assert f"- {says}\n" in render.markdown(table.build(study))


def test_without_a_deviation_the_legend_has_no_word_of_it(tmp_path):
    study = study_in(tmp_path)
    write_run(study, points("lora")[0], SCORES)
    text = render.markdown(table.build(study))
    assert "- percent\n" in text
    assert "±" not in text


def test_every_commit_that_a_part_was_made_with_is_named_and_that_one_is_not_known(tmp_path):
    study = study_in(tmp_path)
    for point, commit in zip(points("lora"), ("ccc", None, "bbb"), strict=True):
        earlier = {"earlier_commits": [{"git_commit": "aaa", "git_dirty": False}]} if commit == "bbb" else {}
        write_run(study, point, SCORES, git_commit=commit, **earlier)
    assert "- commit: aaa, bbb, ccc, not known\n" in render.markdown(table.build(study))


def test_further_columns_are_of_the_runs_in_the_table(tmp_path):
    study = study_in(tmp_path)
    for point in points("lora"):
        write_run(study, point, SCORES, peak_memory_bytes=2**30, device="here")
    away = {"peak_memory_bytes": 2**40, "device": "away", "tokens_per_second": 9e9}
    write_run(study, points("mole")[0], SCORES, peak_memory_bytes=2**30, device="here")
    write_run(study, points("mole")[1], SCORES, task_prompts="other", **away)
    made = table.build(study)
    assert made.extras[row(made, "mole"), "peak_memory"] == 1.0
    assert made.extras[row(made, "mole"), "tokens_per_second"] == 100.0
    assert "away" not in render.markdown(made)
    write_run(study, points("mole")[1], SCORES, **away)
    study.forget()
    made = table.build(study)
    assert made.extras[row(made, "mole"), "peak_memory"] == 1024.0
    assert "- peak GiB: of the whole run, scoring included\n" in render.markdown(made)


EARLIER = {"packages": {"torch": "2.13.0"}, "python": "3.11", "device": "cpu", "threads": None}


@pytest.mark.parametrize(
    ("changes", "says", "alike"),
    [
        ({}, "device: cpu", True),
        ({"device": "gpu"}, "device: cpu, gpu", False),
        ({"threads": 8}, "threads: 8", False),
        ({"torch_compile": True}, "device: cpu", False),
        ({"earlier_surroundings": [EARLIER | {"device": "gpu"}]}, "device: cpu, gpu", False),
        ({"earlier_surroundings": [EARLIER | {"threads": 2}]}, "threads: 2", False),
        ({"earlier_surroundings": [EARLIER | {"packages": {"torch": "1"}}]}, "versions: torch 1, torch 2.13.0", True),
    ],
)
def test_tokens_a_second_stand_only_where_all_rows_of_a_model_were_made_alike(tmp_path, changes, says, alike):
    study = study_in(tmp_path)
    write_run(study, points("lora")[0], SCORES)
    write_run(study, points("mole")[0], SCORES, **changes)
    made = table.build(study)
    text = render.markdown(made)
    assert f"- {says}\n" in text
    assert ("- tokens/s of tiny are left out" in text) is not alike
    assert {made.extras[row(made, m), "tokens_per_second"] for m in ("lora", "mole")} == {100.0 if alike else None}


HOSTILE = ["[0] *first*", "_a_ <b>c</b>", "*2 \\d| a_b", "co_1 & 100%"]


def hostile(folder: Path) -> table.Table:
    methods = {f"m{i}": {"label": label, "overrides": ["method=lora"]} for i, label in enumerate(HOSTILE)}
    return table.build(other_recipe(folder, methods=methods, title=HOSTILE[1], notes=HOSTILE))


def test_labels_and_notes_are_text_in_markdown(tmp_path):
    page = MarkdownIt("commonmark").enable("table").render(render.markdown(hostile(tmp_path)))
    shown = html.unescape(re.sub(r"</?(?:p|strong|table|thead|tbody|tr|th|td|ul|li)\b[^>]*>", "\n", page)).splitlines()
    for text in HOSTILE:
        assert shown.count(text) >= 2, text
    assert "<em>" not in page
    assert "<b>" not in page


def test_no_label_or_note_is_taken_for_an_option_of_the_line_before(tmp_path):
    text = render.latex(hostile(tmp_path))
    assert not re.search(r"(\\\\|\\[a-z]+rule)\s*[\[*]", text)
    assert "{[}0]" in text


def test_a_format_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match=r"format: .*'htm', expected one of \[md, tex, csv, html, all, pins\]"):
        typed(doors.Table, {"recipe": "tiny", "format": "htm"})


def test_the_command_writes_four_files_without_torch(root, tmp_path):
    code = (
        "import sys; from mixlora.table import main\n"
        "try: main()\nfinally: assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"recipe={RECIPE}", f"output_root={root}", f"to={tmp_path}", "report=false"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {f"table.{kind}" for kind in render.FORMATS}
    assert (tmp_path / "table.md").read_bytes() == (EXPECTED / "table.md").read_bytes()


def test_every_row_of_the_latex_has_as_many_cells_as_the_table_has_columns(made):
    lines = render.latex(made).splitlines()
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", "\n".join(lines))[1]
    rows = [line for line in lines[: lines.index(r"\bottomrule")] if line.endswith(r"\\")]
    assert rows
    assert all(len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1 for line in rows)
    assert all(c.isascii() for c in "\n".join(lines))


@pytest.mark.full
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex (Debian: texlive-latex-recommended)")
class TestLatexCompiles:
    def compiled(self, folder: Path, made: table.Table) -> None:
        text = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\n%s\\end{document}\n"
        (folder / "t.tex").write_text(text % render.latex(made))
        line = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "t.tex"]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:]
        assert "Missing character" not in done.stdout
        assert "Overfull" not in done.stdout  # nothing runs off the page
        assert (folder / "t.pdf").read_bytes().startswith(b"%PDF")

    def test_with_every_mark(self, made, tmp_path):
        self.compiled(tmp_path, made)

    def test_with_labels_that_mean_something_to_latex(self, tmp_path):
        self.compiled(tmp_path, hostile(tmp_path))

    @pytest.mark.parametrize("name", recipes.names())
    def test_of_every_recipe_with_and_without_runs(self, name, tmp_path):
        study = Study(recipes.load(name), recipes.find(name), str(tmp_path / "runs"))
        study.recipe.pins = recipes.Pins()  # what is invented below was made with nothing
        self.compiled(tmp_path, table.build(study))
        study.recipe.learning_rates = study.recipe.learning_rates[:1]  # or no run of the table were known yet
        for i, group in enumerate(study.groups):
            point = recipes.final_points(study.recipe, group, study.rate(group))[0]
            tasks = study.group_configs[group].tasks.mixture
            write_run(study, point, {task: right(20, 0.5 + i % 3 / 10, i) for task in tasks})
        study.forget()
        made = table.build(study)
        assert any(c.values for c in made.cells.values())
        self.compiled(tmp_path, made)


def test_a_printed_difference_stands_beside_ours_of_every_setting_and_says_where_seeds_are_missing():
    recipe = SimpleNamespace(
        models={"m": None},
        methods={"a": None, "b": None},
        table=recipes.Shape(columns={"t": "T"}),
        claims=[Claim(better="a", worse="b", delta=1.5)],
    )
    found = {("one", "a"): 0.5, ("one", "b"): 0.4, ("two", "a"): 0.7, ("two", "b"): 0.8, ("three", "a"): 0.9}
    rows = [table.Row("m", setting, method, ("", "", "")) for setting, method in found]
    cells = {
        (r, table.MEAN): table.Cell(values={0: found[r.setting, r.method]}, expected=1 + (r.setting == "two"))
        for r in rows
    }
    said = "a minus b: published +1.5, ours +10.0 of one, -10.0 (not of all seeds) of two"
    assert table.claims(recipe, rows, cells, {}) == [said]


def test_beside_our_difference_stands_what_is_known_of_it(tmp_path):
    study = study_in(tmp_path)
    shares = {"lora": 0.5, "mole": 0.6}
    for method, share in shares.items():
        for point in points(method):
            write_run(study, point, {task: right(40, share, 7 * point.seed) for task in SCORES})
    a, b = ([[*right(40, share, 7 * seed)] for seed in (0, 1, 2)] for share in shares.values())
    test = statistics.difference([np.array(b) - np.array(a)] * 2)
    said = f"published +1.5, ours +10.0 (error {100 * test.error:.1f}, p = {test.p:.2g})\n"
    assert said in render.markdown(table.build(study))
