"""What a recipe would cost: the tokens that are really there, what is done, and the runs that a choice still opens."""

from dataclasses import replace
from pathlib import Path

import pytest
from built import composed
from invented_runs import write_run

from mixlora import estimate
from mixlora.config.schema import Answer, Config, Split, Task
from mixlora.records import write_lines
from mixlora.tables import recipe as recipes
from mixlora.tables.recipe import Group, Point
from mixlora.tables.study import Study

RECIPE = Path(__file__).parent / "recipes" / "marks"


def test_every_task_of_every_recipe_has_a_length_beside_its_rows():
    assert all(
        entry.keys() - {"validation"} == {"train", "test", "tokens"} for entry in estimate.known()["rows"].values()
    )


@pytest.mark.full
def test_the_tokens_are_those_of_the_tasks_and_not_of_the_longest_row():
    study = Study(recipes.load("smollm2_commonsense"), recipes.find("smollm2_commonsense"), "runs")
    config = study.group_configs[study.groups[0]]
    lengths = [min(estimate.known()["rows"][task]["tokens"], 256) for task in config.tasks.mixture]
    found = estimate.tokens(config)
    assert found.trained == pytest.approx(16 * 8 * sum(lengths) / 8)  # equal sampling, 16 steps of 8 rows
    assert found.scored == 32 * sum(lengths)
    assert found.validated == 16 / config.train.eval_steps * config.train.eval_limit * sum(lengths)
    own = config.tasks.mixture | {"own": config.tasks.mixture["piqa"]}
    assert estimate.tokens(replace(config, tasks=replace(config.tasks, mixture=own))) is None


def test_samples_solved_examples_validation_and_processes_cost_and_programs_that_are_not_run_do_not():
    config = composed("lora", "train.max_steps=10")
    arc, code = Task(answer_kind=Answer.options), Task(answer_kind=Answer.code, eval_only=True)
    config = replace(config, tasks=replace(config.tasks, mixture={"arc_easy": arc, "humaneval": code}))
    once = estimate.tokens(config)
    assert (once.scored, once.validated) == (2376 * 50, 0)
    assert estimate.tokens(config, 4).trained == 4 * once.trained

    def changed(train=(), **of_eval) -> estimate.Tokens:
        return estimate.tokens(
            replace(config, eval=replace(config.eval, **of_eval), train=replace(config.train, **dict(train)))
        )

    assert changed(num_fewshot=5).scored == 6 * once.scored
    assert changed(num_fewshot=5, max_length=100).scored == 2 * once.scored
    assert changed(num_samples=10).scored == once.scored
    assert changed(num_samples=10, allow_code_execution=True).scored == once.scored + 10 * 164 * 158
    assert changed(train={"eval_steps": 4, "eval_limit": 7}).validated == 3 * 7 * 50  # after steps 4, 8 and 10


def of_tasks(config: Config, **of: Task) -> Config:
    return replace(config, tasks=replace(config.tasks, mixture=of))


def test_tasks_that_are_not_drawn_from_and_rows_that_are_held_out_add_no_step():
    """One epoch: of the rows that a run would train on, and of no others."""
    arc, code, math = Task(), Task(answer_kind=Answer.code), Task(answer_kind=Answer.number)
    config = composed("lora")
    alone = estimate.tokens(of_tasks(config, arc_easy=arc))
    assert alone.trained == 2251 * 50
    weightless = estimate.tokens(of_tasks(config, arc_easy=arc, piqa=replace(arc, weight=0.0)))
    assert (weightless.trained, weightless.scored) == (alone.trained, alone.scored + 1838 * 58)
    found = estimate.tokens(of_tasks(config, gsm8k=math, humaneval=code))  # which has no training rows
    assert found.trained == (7473 - 373) * 127
    assert estimate.tokens(of_tasks(config, gsm8k=replace(math, train_only=True))).trained == 7473 * 127


@pytest.mark.parametrize(("task", "rows", "tokens"), [("arc_easy", 570, 50), ("boolq", 471, 149), ("sst2", 500, 32)])
def test_of_the_validation_split_as_many_rows_are_scored_as_there_are(task, rows, tokens):
    config = composed("lora", "train.max_steps=1", "train.eval_steps=1", "train.eval_limit=1000")
    found = estimate.tokens(
        of_tasks(replace(config, eval=replace(config.eval, split=Split.validation)), **{task: Task()})
    )
    assert found.scored == found.validated == rows * tokens


def test_layers_that_are_computed_twice_cost_a_forward_more():
    config = of_tasks(composed("lora"), arc_easy=Task(train_only=True))
    twice = replace(config, model=replace(config.model, gradient_checkpointing=True))
    size = estimate.sizes(config)
    frozen, trained = size["total"] - size["trainable"], size["trainable"]
    hours = [estimate.estimate(one, 1, 1).hours for one in (config, twice)]
    assert hours[1] / hours[0] == pytest.approx((6 * frozen + 8 * trained) / (4 * frozen + 6 * trained))


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
    printed = [estimate.printed_hours(hours) for hours in (after.done, after.listed + after.later)]
    assert "Done: {} hours. To do: {} hours".format(*printed) in said
    assert [estimate.printed_hours(h) for h in (0, 2.6e-9, 0.0123, 7.5, 1234.5)] == [
        "0",
        "<0.01",
        "0.0123",
        "7.5",
        "1,234",
    ]
    assert f"{estimate.printed_hours(after.later)} of them in the second round" in said
