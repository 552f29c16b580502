"""What a recipe would cost: the tokens that are really there, what is done, and the runs that a choice still opens."""

from dataclasses import replace
from pathlib import Path

import pytest
from invented_runs import write_run

from mixlora import estimate
from mixlora.records import write_lines
from mixlora.tables import recipe as recipes
from mixlora.tables.recipe import Group, Point
from mixlora.tables.study import Study

RECIPE = Path(__file__).parent / "recipes" / "marks"


def test_every_task_of_every_recipe_has_a_length_beside_its_rows():
    assert all(entry.keys() == {"train", "test", "tokens"} for entry in estimate.known()["rows"].values())


@pytest.mark.full
def test_the_tokens_are_those_of_the_tasks_and_not_of_the_longest_row():
    study = Study(recipes.load("smollm2_commonsense"), recipes.find("smollm2_commonsense"), "runs")
    config = study.group_configs[study.groups[0]]
    lengths = [min(estimate.known()["rows"][task]["tokens"], 256) for task in config.tasks.mixture]
    trained, scored = estimate.tokens(config)
    assert trained == pytest.approx(16 * 8 * sum(lengths) / 8)  # equal sampling, 16 steps of 8 rows
    assert scored == 32 * sum(lengths)
    own = config.tasks.mixture | {"own": config.tasks.mixture["piqa"]}
    assert estimate.tokens(replace(config, tasks=replace(config.tasks, mixture=own))) is None


@pytest.mark.full
def test_done_to_do_and_the_second_round_add_up_to_the_whole_grid(tmp_path, capsys):
    study = Study(recipes.load(str(RECIPE)), RECIPE, str(tmp_path))
    study.recipe.learning_rates = [1e-4, 1e-3]
    lora = Group("tiny", "arc", "lora")
    one = estimate.estimate(study.config(Point(lora, 0)), 1, 1).hours
    whole = sum(estimate.estimate(study.config(Point(g, 0)), 1, 1).hours for g in study.groups) * (2 + 2)
    before = estimate.hours(study, 1, 1)
    assert before.done == 0
    assert before.listed + before.later == pytest.approx(whole)
    for rate in (1e-4, 1e-3):
        folder = write_run(study, Point(lora, 0, rate), {"arc_easy": [1.0], "arc_challenge": [1.0]})
        write_lines(folder / "metrics.jsonl", [{"step": 2, "validation_mean": rate}])
    study.forget()
    after = estimate.hours(study, 1, 1)
    assert after.done == pytest.approx(2 * one)
    assert after.done + after.listed + after.later == pytest.approx(whole)
    assert after.later == pytest.approx(before.later - 2 * one)
    estimate.print_estimate(study, 1, 1)
    said = capsys.readouterr().out
    assert f"Done: {after.done:.3g} hours. To do: {after.listed + after.later:.3g} hours" in said
    assert f"{after.later:.3g} of them in the second round" in said
