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

from mixlora import checks, gates, losses
from mixlora.checks import ATTENTIONS, check, check_training
from mixlora.config import load
from mixlora.config.explain import leaves
from mixlora.config.overrides import normalise
from mixlora.config.schema import Config, Launch, Model
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
        gates.kind_and_options(config.method.gate)
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
    assert normalise(["+model=gemma2_9b", "model.path=/x"]) == ["model=gemma2_9b", "model.path=/x"]


def test_what_does_not_change_a_result_does_not_change_the_folder(tmp_path):
    one = composed("method=lora", "tasks=arc")
    harmless = ("tracker=tensorboard", "report=false", "train.save_steps=7", "train.torch_compile=true", "dry_run=true")
    other = composed("method=lora", "tasks=arc", *harmless, f"output_root={tmp_path}")
    assert load.run_folder(one).name == load.run_folder(other).name
    less = (
        "train.micro_batch_size=2",
        "model.gradient_checkpointing=true",
        "eval.batch_size=4",
        "eval.batch_tokens=99",
    )
    assert load.digest(composed("method=lora", "tasks=arc", *less)) == load.digest(one)  # what memory may ask for
    rounded = ("method=lora", "tasks=arc", "model=path", "model.path=a/b", "model.quantization=int8")
    assert load.digest(composed(*rounded)) != load.digest(composed(*rounded, "eval.batch_size=4"))
    for change in ("seed=1", "train.learning_rate=2e-3", "method.r=4", "eval.limit=5", "data.source=sample"):
        assert load.run_folder(composed("method=lora", "tasks=arc", change)).name != load.run_folder(one).name


HARMLESS = {
    "output_root": "x", "run_dir": "x", "resume": "x", "dry_run": True, "rank_timeout": 9, "tracker": "wandb",
    "report": False, "train.save_steps": 7, "train.save_total_limit": 7, "train.logging_steps": 7,
    "train.torch_compile": True, "train.micro_batch_size": 2, "model.gradient_checkpointing": True,
    "method.compute": "lean", "eval.batch_size": 4, "eval.batch_tokens": 99,
}  # fmt: skip
OF_A_SWEEP = {"launcher": "slurm", "jobs": 3, "processes": 2, "accelerate": "ddp", "slurm.time_min": 99}


@pytest.mark.parametrize("key", [*HARMLESS, *OF_A_SWEEP])
def test_each_key_that_the_page_calls_harmless_changes_no_name(key):
    values = OmegaConf.create(load.plain(composed("method=mole", "tasks=arc")))
    before = load.config_of(values)
    OmegaConf.update(values, key, (HARMLESS | OF_A_SWEEP)[key], force_add=False)
    after = load.config_of(values)
    assert after != before
    assert load.digest(after) == load.digest(before)


def test_the_page_names_each_harmless_key():
    page = (CONFIGS.parent / "docs" / "runs.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^What is not part of the name(.*?)\n\n", page, flags=re.DOTALL | re.MULTILINE)
    assert {name.partition("=")[0] for name in re.findall(r"`([^`]+)`", listed)} == HARMLESS.keys()
    assert {key.partition(".")[0] for key in OF_A_SWEEP} == Launch.__dataclass_fields__.keys()


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


def test_an_error_without_a_message_is_named_by_its_kind(monkeypatch):
    monkeypatch.setattr(base.online, "problem", lambda: None)
    with pytest.raises(ConfigError, match="could not be loaded: ImportError"), base.named_errors(Model(name="a")):
        raise ImportError
    at_x = base.named_errors(Model(name="a", path="x"))
    with pytest.raises(DataError, match="could not be loaded from 'x': ValueError"), at_x:
        raise ValueError


def test_adapters_are_not_trained_in_float16():
    check_training(composed("method=lora", "tasks=arc", "model.dtype=float16"))
    check_training(composed("method=lora", "tasks=arc", "method.adapter_dtype=auto"))
    for keys in (["method.adapter_dtype=float16"], ["method.adapter_dtype=auto", "model.dtype=float16"]):
        with pytest.raises(ConfigError, match=r"in float16.*Set method.adapter_dtype=float32"):
            check_training(composed("method=lora", "tasks=arc", *keys))


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="its package is here")
def test_an_attention_whose_package_is_missing_is_said_in_one_line():
    with pytest.raises(ConfigError, match=r"model 'tiny' could not be loaded: FlashAttention2 .*\Z"):
        base.load(
            composed("method=lora", "model=tiny", "tasks=arc", "model.attn_implementation=flash_attention_2").model
        )


OUT_OF_RANGE = {
    "eval.split=valid": "eval.split",
    "train.warmup_ratio=3": "train.warmup_ratio is a part of all steps",
    "train.adam_beta2=1.0": "train.adam_beta2 must be in",
    "train.adam_beta1=-0.1": "train.adam_beta1 must be in",
    "train.adam_epsilon=-1e-8": "train.adam_epsilon must be",
    "train.weight_decay=-0.1": "train.weight_decay must be",
    "train.micro_batch_size=9": "train.micro_batch_size=9 is more than train.per_device_train_batch_size=8",
    "slurm.signal_delay_s=600": "queued again without end. Lower it to 540",
    "slurm.mem_gb=0": "slurm.mem_gb must be at least 0.001, got 0",
    "slurm.mem_gb=nan": "slurm.mem_gb must be at least 0.001, got nan",
    "train.max_tokens=511": "train.max_tokens must be at least 512, got 511",
}


@pytest.mark.parametrize("override", OUT_OF_RANGE)
def test_a_value_that_cannot_be_is_refused_with_its_key(override):
    """Another split than the two would have been the test split; the others are torch's to refuse, after everything."""
    limit = ["slurm.time_min=50"] if override.startswith("slurm") else []
    with pytest.raises(ConfigError, match=re.escape(OUT_OF_RANGE[override])):
        composed("method=lora", "tasks=arc", override, *limit)


@pytest.mark.parametrize("keys", [{"options": {"fixed": [False, "yes"]}}, {"cue": True}], ids=["in a list", "alone"])
def test_a_text_that_yaml_takes_for_a_truth_value_is_refused(keys):
    """`fixed: [no, yes]` without quotes would be asked as False and True."""
    values = load.plain(composed("method=lora", "tasks=arc"))
    values["tasks"]["mixture"]["arc_easy"] |= keys
    with pytest.raises(ConfigError, match=r"arc_easy\.(options\.fixed\[0\]|cue) is a text, .* in quotes"):
        load.config_of(OmegaConf.create(values))


@pytest.mark.parametrize("key", ["tasks.name", "tasks.mixture"])
def test_a_name_of_a_task_that_would_be_a_folder_is_refused(key):
    values = load.plain(composed("method=lora", "tasks=arc"))
    if key == "tasks.name":
        values["tasks"]["name"] = "my/mix"
    else:
        values["tasks"]["mixture"]["my/mix"] = values["tasks"]["mixture"].pop("arc_easy")
    with pytest.raises(ConfigError, match=f"{key}: 'my/mix' cannot be the name of a file.*Leave the / out"):
        load.config_of(OmegaConf.create(values))


def test_padding_is_not_counted_where_there_is_none():
    """MoLA's own loss counts it, so that loss brings padded rows."""
    assert not composed("method=mola", "tasks=arc", "aux_loss=load_balance_layer_sum").train.packing
    config = composed("method=dynmole", "tasks=arc", "aux_loss.tsallis.count_padding=true")
    with pytest.raises(ConfigError, match=r"tsallis\.count_padding=true .*train\.packing=false"):
        check_training(config)
    check(config)  # a run from before is still scored
    config.train.packing = False
    check_training(config)


def test_routers_of_other_sizes_are_not_put_together_and_that_is_said_at_once():
    config = composed("method=mola", "tasks=arc", "aux_loss=load_balance_all_layers")
    with pytest.raises(ConfigError, match=r"over=model puts routers of \[2, 4, 6, 8\] experts together"):
        check_training(config)


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    """Accelerate would track nothing and say nothing."""
    config = composed("method=lora", "tasks=arc", "tracker=tensorboard")
    check_training(config)
    monkeypatch.setattr(checks, "installed", lambda package: False)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        check_training(config)
    check(config)  # what was trained elsewhere is scored here


def test_a_sweep_does_not_mix_names_of_models_with_paths():
    assert normalise(["-m", "model=a/b,c/d"])[1:] == ["model=path", "model.path=a/b,c/d"]
    assert normalise(["-m", "model=tiny,smollm2_135m"])[1:] == ["model=tiny,smollm2_135m"]
    with pytest.raises(ConfigError, match="names of configs/model and over hub ids"):
        normalise(["-m", "model=smollm2_135m,Qwen/Qwen2.5-0.5B"])


def test_a_key_that_came_later_does_not_rename_the_runs_of_before():
    for tasks, key, has in (("humaneval", "fixtures", {"mbpp"}), ("commonsense", "group", {"winogrande"})):
        mixture = load.decisive(composed("method=lora", f"tasks={tasks}"))["tasks"]["mixture"]
        assert {name for name, task in mixture.items() if key in task} == has < mixture.keys()


def test_a_text_of_a_configuration_is_a_text(tmp_path):
    """`${` and `_target_` in a question, a column or a path, through the run folder and back."""
    values = load.plain(composed("method=lora", "tasks=arc"))
    values["output_root"] = "/scratch/shift_target_/runs"
    values["tasks"]["mixture"]["arc_easy"]["question"] = r"It costs ${price}, or \${more}"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    again = load.config_of(load.read(tmp_path))
    assert load.plain(again) == values
    path.write_text(yaml.safe_dump(values | {"method": [{"x": {"_target_": "os.system"}}]}), encoding="utf-8")
    with pytest.raises(ConfigError, match="names Python objects"):
        load.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed is not supported. Use configs/distributed/zero2.yaml"),
        ("FSDP_OFFLOAD_PARAMS", "fsdp_offload_params=true, in the file for Accelerate, has no effect here"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "set model.gradient_checkpointing=true"),
    ],
)
def test_ways_of_accelerate_that_would_do_nothing_or_fail_later_are_refused_at_once(name, said):
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}
    config = composed("method=lora", "tasks=arc")
    checks.check_shards(config, environment)
    with pytest.raises(ConfigError, match=re.escape(said)):
        checks.check_shards(config, environment | {name: "true"})
