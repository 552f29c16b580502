"""Every file under configs/ composes and fits its type; the trunk shows every key; both spellings are one."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mixlora import gates, losses
from mixlora.checks import ATTENTIONS, check, check_dtypes
from mixlora.config import load
from mixlora.config.cli import normalise
from mixlora.config.explain import leaves
from mixlora.config.schema import Config, Model
from mixlora.errors import ConfigError, DataError
from mixlora.models import base

CONFIGS = Path(__file__).parents[1] / "configs"
GROUPS = ("aux_loss", "experiment", "method", "model", "tasks")


def composed(*overrides: str) -> Config:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return load.config_of(compose("train", overrides=list(overrides)))


def choices() -> list[dict[str, str]]:
    """Every file of every group in one composition at least; a group with fewer files goes round."""
    names = {group: sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")) for group in GROUPS}
    names = {group: some for group, some in names.items() if some}
    longest = max(len(some) for some in names.values())
    return [{group: some[i % len(some)] for group, some in names.items()} for i in range(longest)]


@pytest.mark.parametrize("chosen", choices(), ids=lambda chosen: "-".join(chosen.values()))
def test_every_file_composes_and_fits_its_type(chosen):
    extra = ["model.path=owner/name"] if chosen["model"] == "path" else []
    config = composed(*(f"{group}={name}" for group, name in chosen.items()), *extra)
    losses.build(config.aux_loss)
    if config.method.gate is not None:
        gates.check(config.method.gate)
    assert load.config_of(OmegaConf.create(load.plain(config))) == config


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_name_means_one_set_of_weights(path):
    """A model of the hub is a commit of its repository, not whatever the branch holds on the day."""
    model = yaml.safe_load(path.read_text(encoding="utf-8"))
    if model.get("path") not in (None, "???"):
        assert re.fullmatch("[0-9a-f]{40}", model["revision"])


def test_the_trunk_and_launch_show_every_key_and_its_default():
    trunk = {}
    for name in ("trunk", "launch"):
        trunk |= yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))

    def value(key: str):
        found = trunk
        for part in key.split("."):
            found = found[part]
        return found

    defaults = load.plain(Config())
    for key in leaves(Config):
        if key == "aux_loss":  # a group of its own
            continue
        default = defaults
        for part in key.split("."):
            default = default[part]
        assert value(key) == default, key


METHODS = sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml"))


@pytest.mark.parametrize("method", [m if m == "mole" else pytest.param(m, marks=pytest.mark.full) for m in METHODS])
def test_the_command_line_wins_over_the_loss_that_a_method_brings(method):
    brought = composed(f"method={method}", "tasks=arc").aux_loss
    assert composed(f"method={method}", "tasks=arc", "aux_loss=none").aux_loss == {}
    assert set(composed(f"method={method}", "tasks=arc", "aux_loss=router_z").aux_loss) == {"router_z"}
    for loss in brought:
        config = composed(f"method={method}", "tasks=arc", f"aux_loss.{loss}.coef=0.5")
        assert config.aux_loss[loss]["coef"] == 0.5


def test_both_spellings_of_a_group_are_one():
    assert normalise(["+method=smora", "tasks=arc", "++model=tiny"]) == ["method=smora", "tasks=arc", "model=tiny"]


def test_a_hub_id_or_a_folder_is_a_model_by_itself(tmp_path):
    assert normalise(["model=owner/name"]) == ["model=path", "model.path=owner/name"]
    assert normalise([f"model={tmp_path}"]) == ["model=path", f"model.path={tmp_path}"]
    assert normalise(["model.path=owner/name"]) == ["model=path", "model.path=owner/name"]


def test_what_does_not_change_a_result_does_not_change_the_folder(tmp_path):
    one = composed("method=lora", "tasks=arc")
    harmless = ("tracker=tensorboard", "report=false", "train.save_steps=7", "train.torch_compile=true", "dry_run=true")
    other = composed("method=lora", "tasks=arc", *harmless, f"output_root={tmp_path}")
    assert load.run_folder(one).name == load.run_folder(other).name
    for change in ("seed=1", "train.learning_rate=2e-3", "method.r=4", "eval.limit=5", "data.source=sample"):
        assert load.run_folder(composed("method=lora", "tasks=arc", change)).name != load.run_folder(one).name


def test_no_enum_is_lost_between_a_run_folder_and_the_next_reader(tmp_path):
    config = composed("method=smora", "tasks=commonsense", "data.style=letters")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(load.plain(config)), encoding="utf-8")
    again = load.config_of(load.read(tmp_path))
    assert dataclasses.asdict(again) == dataclasses.asdict(config)
    assert load.digest(again) == load.digest(config)


def test_an_attention_that_is_none_is_refused_with_the_nearest_name():
    known = {name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name}  # paged ones are for servers
    assert known <= set(ATTENTIONS)
    for name in (*ATTENTIONS, "kernels-community/flash-attn2"):
        check(composed("method=lora", "tasks=arc", f"model.attn_implementation={name}"))
    with pytest.raises(ConfigError, match=r"attn_implementation='spda' is no attention .* Did you mean 'sdpa'\?"):
        check(composed("method=lora", "tasks=arc", "model.attn_implementation=spda"))


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "flex_attention"])
def test_an_attention_that_a_model_does_not_have_is_refused_with_one_that_it_has(name):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    mamba = Model(name="mamba", random={"model_type": "mamba", **sizes}, attn_implementation=name)
    with pytest.raises(
        ConfigError, match=rf"MambaForCausalLM does not .*{name}.*\. Set model.attn_implementation=eager"
    ):
        base.load(mamba)
    base.load(dataclasses.replace(mamba, attn_implementation="eager"))


def test_an_error_without_a_message_is_named_by_its_kind():
    with pytest.raises(ConfigError, match="could not be loaded: ImportError"), base.named_errors(Model(name="a")):
        raise ImportError
    at_x = base.named_errors(Model(name="a", path="x"))
    with pytest.raises(DataError, match="could not be loaded from 'x': ValueError"), at_x:
        raise ValueError


def test_adapters_are_not_trained_in_float16():
    check_dtypes(composed("method=lora", "tasks=arc", "model.dtype=float16"))
    check_dtypes(composed("method=lora", "tasks=arc", "method.adapter_dtype=auto"))
    for keys in (["method.adapter_dtype=float16"], ["method.adapter_dtype=auto", "model.dtype=float16"]):
        with pytest.raises(ConfigError, match=r"in float16.*Set method.adapter_dtype=float32"):
            check_dtypes(composed("method=lora", "tasks=arc", *keys))


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="its package is here")
def test_an_attention_whose_package_is_missing_is_said_in_one_line():
    with pytest.raises(ConfigError, match=r"model 'tiny' could not be loaded: FlashAttention2 .*\Z"):
        base.load(
            composed("method=lora", "model=tiny", "tasks=arc", "model.attn_implementation=flash_attention_2").model
        )
