"""Recipes are typed, their points compose, and a mistake is named."""

from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from mixlora.config import load
from mixlora.config.overrides import config_dir, normalise
from mixlora.errors import ConfigError
from mixlora.tables import recipe as recipes
from mixlora.tables.recipe import Group, Point
from mixlora.tables.study import Study

SMALL = {
    "title": "two methods",
    "models": {"tiny": None},
    "mixtures": {"arc": None},
    "methods": {"lora": None, "wide": {"label": "LoRA r32", "overrides": ["method=lora", "method.r=32"]}},
    "seeds": [0, 1],
    "table": {"columns": {"arc_easy": "ARC-e", "arc_challenge": "ARC-c"}},
}


def written(tmp_path: Path, **changes: object) -> str:
    folder = tmp_path / "small"
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(SMALL | changes, sort_keys=False))
    return str(folder)


def test_a_point_is_what_one_would_type(tmp_path):
    name = written(tmp_path, learning_rates=[1e-3], protocol=["train.max_steps=3"])
    recipe = recipes.load(name)
    study = Study(recipe, recipes.find(name), str(tmp_path / "runs"))
    point = Point(Group("tiny", "arc", "wide"), seed=1, rate=1e-3)
    overrides = study.command(point)
    with initialize_config_dir(config_dir(), version_base="1.3"):
        typed_by_hand = load.config_of(compose("train", overrides=normalise(overrides)))
    assert load.run_folder(study.config(point)) == load.run_folder(typed_by_hand)
    assert typed_by_hand.method.r == 32
    assert typed_by_hand.seed == 1


def test_the_grid_is_every_combination_less_the_exceptions(tmp_path):
    leave = [{"where": {"method": "wide"}, "leave_out": True}]
    changes = {"mixtures": {"arc": None, "gsm8k": None}}
    whole = recipes.groups(recipes.load(written(tmp_path, **changes)))
    assert len(whole) == 4
    fewer = recipes.groups(recipes.load(written(tmp_path, **changes, exceptions=leave)))
    assert {g.method for g in fewer} == {"lora"}
    assert len(fewer) == 2


def test_an_exception_wins_over_the_method_and_the_method_over_the_protocol(tmp_path):
    name = written(
        tmp_path,
        protocol=["train.max_steps=1", "train.weight_decay=0.5"],
        methods={"lora": {"overrides": ["method=lora", "train.max_steps=2"]}},
        exceptions=[{"where": {"method": "lora"}, "overrides": ["train.weight_decay=0.25"]}],
    )
    found = recipes.group_overrides(recipes.load(name), Group("tiny", "arc", "lora"))
    assert "train.max_steps=2" in found
    assert "train.weight_decay=0.25" in found
    assert len(found) == 5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metods": {}}, "Did you mean 'methods'?"),
        ({"methods": {"lora": {"lable": "x"}}}, r"methods.lora.lable'. Did you mean 'label'\?"),
        ({"exceptions": [{"were": {}}]}, r"exceptions\[0\].were'. Did you mean 'where'\?"),
        ({"exceptions": [{"where": {"method": "lroa"}}]}, "Did you mean 'lora'?"),
        ({"published": [{"method": "lora", "values": {"arc_esy": 1.0}}]}, "Did you mean 'arc_easy'?"),
        ({"published": [{"values": {}}]}, "needs a method of the grid, or a label"),
        ({"table": {"columns": {"arc_easy": "A"}, "extra": ["trainabel"]}}, "trainabel"),
        ({"table": {}}, "table.columns is empty"),
        ({"table": {"columns": {"arc_easy": "A"}, "decimals": -1}}, "table.decimals=-1 is below 0"),
        ({"seeds": [0, 0]}, "names a value twice"),
        ({"seeds": []}, "seeds is empty"),
        ({"learning_rates": [1e-3, 2e-3]}, "needs train.eval_steps in protocol"),
        ({"methods": {"lora": None, "mole": {"label": "lora"}}}, "two of methods have the label 'lora'"),
        ({"protocol": ["seed=3"]}, "decided by the grid"),
        ({"protocol": ["train.max_steps"]}, "Write key=value"),
        (
            {"pins": {"data": {"arc_esy": {"test": "0" * 64}}}},
            r"pins.data: there is no 'arc_esy'. Did you mean 'arc_easy'",
        ),
        ({"pins": {"prompts": {"tyny": {"arc_easy": "0" * 64}}}}, "pins.prompts: there is no 'tyny'"),
        ({"pins": {"prompts": {"tiny": {"arc_esy": "0" * 64}}}}, "pins.prompts.tiny: there is no 'arc_esy'"),
        ({"pins": {"weights": {"tyny": "0" * 64}}}, "pins.weights: there is no 'tyny'"),
        ({"pins": {"weights": {"tiny": "main"}}}, "'main' is not a sha256"),
        ({"pins": {"revisions": {}}}, "revisions"),
    ],
)
def test_a_mistake_is_named(tmp_path, changes, says):
    with pytest.raises(ConfigError, match=says) as caught:
        recipes.load(written(tmp_path, **changes))
    assert "recipe.yaml" in str(caught.value)


def test_a_grid_is_composed_the_same_way_point_by_point(tmp_path):
    name = written(tmp_path, mixtures={"arc": None, "gsm8k": {"overrides": ["tasks=gsm8k", "tasks.temperature=3"]}})
    study = Study(recipes.load(name), recipes.find(name), str(tmp_path))
    assert study.group_configs == {group: study.compose(group, None) for group in study.groups}


def test_mixtures_that_touch_more_than_tasks_are_composed_one_by_one(tmp_path):
    name = written(tmp_path, mixtures={"arc": None, "gsm8k": {"overrides": ["tasks=gsm8k", "train.max_steps=9"]}})
    study = Study(recipes.load(name), recipes.find(name), str(tmp_path))
    assert study.assembled(None) is None
    assert {c.train.max_steps for g, c in study.group_configs.items() if g.mixture == "gsm8k"} == {9}


def test_a_point_that_does_not_compose_names_recipe_and_point(tmp_path):
    name = written(tmp_path, methods={"lroa": None})
    study = Study(recipes.load(name), recipes.find(name), str(tmp_path))
    with pytest.raises(ConfigError, match=r"recipe small, tiny · arc · lroa: There is no method 'lroa'"):
        _ = study.group_configs


def study_of(tmp_path: Path, overrides: tuple[str, ...] = (), **changes: object) -> Study:
    name = written(tmp_path, **changes)
    return Study(recipes.load(name), recipes.find(name), str(tmp_path), overrides)


VALIDATION = "eval.split=validation"
PLACES = {
    "protocol": {"protocol": ["train.eval_steps=5", VALIDATION]},
    "model": {"models": {"tiny": {"overrides": ["model=tiny", VALIDATION]}}},
    "mixture": {"mixtures": {"arc": {"overrides": ["tasks=arc", VALIDATION]}}},
    "method": {"methods": {"lora": None, "wide": {"overrides": ["method=lora", VALIDATION]}}},
    "exception": {"exceptions": [{"where": {"method": "wide"}, "overrides": [VALIDATION]}]},
    "command line": {},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_rate_is_not_chosen_on_the_rows_that_are_shown_wherever_the_split_is_set(tmp_path, place):
    overrides = (VALIDATION,) if place == "command line" else ()
    rates = {"learning_rates": [1e-3, 2e-3], "protocol": ["train.eval_steps=5"]}
    study = study_of(tmp_path, overrides, **rates | PLACES[place])
    with pytest.raises(ConfigError, match=r"recipe small, tiny · arc · .* would be chosen on the rows that are shown"):
        _ = study.group_configs
    assert study_of(tmp_path, overrides, **PLACES[place] | {"learning_rates": [1e-3]}).group_configs


def test_a_column_that_no_mixture_scores_is_refused(tmp_path):
    """It would stay empty after all runs; so would that of a task which is only trained on."""
    columns = {"columns": {"arc_easy": "ARC-e", "arc_chalenge": "ARC-c"}}
    with pytest.raises(
        ConfigError, match=r"small: table.columns has 'arc_chalenge', .* Did you mean 'arc_challenge'\?"
    ):
        _ = study_of(tmp_path, table=columns).group_configs
    trained_only = {"arc": {"overrides": ["tasks=arc", "tasks.mixture.arc_challenge.train_only=true"]}}
    with pytest.raises(ConfigError, match="'arc_challenge', which no mixture scores"):
        _ = study_of(tmp_path, mixtures=trained_only).group_configs


def test_an_unknown_recipe_is_named():
    with pytest.raises(ConfigError, match="There is no recipe 'nonsense'"):
        recipes.load("nonsense")


def test_a_recipe_that_cannot_be_read_is_named_with_the_place(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: [x\npath: y\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml is not valid YAML: .* line 2"):
        recipes.load(str(tmp_path))


@pytest.mark.parametrize("key", ["claims", "order"])
def test_what_goes_by_the_mean_needs_one(key):
    recipe = recipes.load("dynmole_commonsense")
    recipe.table.mean = None
    if key == "order":
        recipe.claims, recipe.table.order = [], recipes.Order.score
    with pytest.raises(ConfigError, match=f"{key}.* is by the mean of the columns"):
        recipes.check(recipe)
