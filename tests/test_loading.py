"""A run that is read again: whose code runs, where its base model lies now, and what reading it does not do."""

import dataclasses
import functools
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import mixlora
from mixlora import evaluate, export, generate, lm_eval, loading, online, train
from mixlora.adapters import files
from mixlora.adapters.attach import attach
from mixlora.config import load as configs
from mixlora.config.overrides import config_dir
from mixlora.config.schema import Config, Method, Mixture, Model
from mixlora.errors import ConfigError, DataError
from mixlora.models import base
from mixlora.models.tokenizer import byte_tokenizer
from mixlora.records import read_json, write_json

IDS = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(5))
METHOD = Method(name="mine", r=2)
SAMPLE = ("data.source=sample", "eval.limit=1")


def save_base(folder: Path) -> Path:
    """A small model as a folder of transformers, with a tokenizer that names no sign to pad with."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder whose base model is the folder beside it."""
    model = Model(name="small", path=str(save_base(tmp_path / "base")))
    loaded = base.load(model).model
    adapter = attach(loaded, METHOD)
    with torch.no_grad():
        for tensor in adapter.values():
            tensor.normal_(std=0.2)
    files.save(tmp_path / "run" / "adapter", adapter, loaded, METHOD, model)
    (tmp_path / "run" / "run.json").write_text("{}")
    says(tmp_path / "run", path=model.path)
    return tmp_path / "run"


def says(run: Path, **model: object) -> None:
    """Let config.yaml of the run say this of its base model."""
    config = dataclasses.replace(configuration(), model=Model(name="small", **model), method=METHOD)
    (run / "config.yaml").write_text(yaml.safe_dump(configs.plain(config)))


@functools.cache
def configuration() -> Config:
    with initialize_config_dir(config_dir(), version_base="1.3"):
        return configs.config_of(compose("train", overrides=["model=tiny", "method=lora", "tasks=arc", *SAMPLE]))


def command(monkeypatch, door, *argv: str) -> None:
    """Run a door; its error is raised, not printed."""
    monkeypatch.setenv("MIXLORA_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["mixlora", *argv])
    GlobalHydra.instance().clear()
    door.main()


WAYS = {
    "load": lambda run, patch, trust: mixlora.load(run, trust_remote_code=trust),
    "adapter": lambda run, patch, trust: mixlora.load(run / "adapter", trust_remote_code=trust),
    "tokenizer": lambda run, patch, trust: mixlora.load_tokenizer(run, trust_remote_code=trust),
    "generate": lambda run, patch, trust: command(
        patch, generate, f"run={run}", "prompt=hi", "max_new_tokens=1", *["model.trust_remote_code=true"] * trust
    ),
    "export": lambda run, patch, trust: command(
        patch, export, f"run={run}", f"to={run.parent / 'to'}", *["model.trust_remote_code=true"] * trust
    ),
    "evaluate": lambda run, patch, trust: command(
        patch, evaluate, f"run={run}", *["model.trust_remote_code=true"] * trust
    ),
    "lm_eval": lambda run, patch, trust: lm_eval.mixture_lm_class()(str(run), "cpu", trust_remote_code=trust),
}


@pytest.fixture
def trusts(monkeypatch) -> list[bool]:
    """What transformers was told in each loading of a model or a tokenizer."""
    heard = []

    def listened(kind):
        before = kind.from_pretrained

        def from_pretrained(*given, trust_remote_code, **options):
            heard.append(trust_remote_code)
            return before(*given, trust_remote_code=trust_remote_code, **options)

        return from_pretrained

    for kind in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", listened(kind))
    return heard


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("said", [{"trust_remote_code": True}, {"attn_implementation": "somebody/kernel"}])
def test_a_folder_cannot_ask_for_code_from_outside(run, monkeypatch, trusts, way, said):
    if way == "lm_eval":
        pytest.importorskip("lm_eval")
    says(run, path=str(run.parent / "base"), **said)
    (key,) = said
    with pytest.raises(ConfigError, match=rf"model\.{key}=.*say so: model\.trust_remote_code=true"):
        WAYS[way](run, monkeypatch, False)
    assert trusts == []


@pytest.mark.parametrize("way", WAYS)
def test_who_trusts_that_code_says_so(run, monkeypatch, trusts, way):
    if way == "lm_eval":
        pytest.importorskip("lm_eval")
    says(run, path=str(run.parent / "base"), trust_remote_code=True)
    WAYS[way](run, monkeypatch, True)
    assert set(trusts) == {True}


def test_a_package_within_another_is_not_looked_for(run, monkeypatch):
    """Python would run the outer one: of a run folder in the working directory, a file that lies in it."""
    monkeypatch.chdir(run.parent)
    monkeypatch.syspath_prepend(run.parent)
    (run / "__init__.py").write_text("raise SystemExit('it ran')")
    says(run, package="run.weights")
    with pytest.raises(ConfigError, match=r"model\.package=run\.weights"):
        mixlora.load(run)


def test_a_base_model_that_has_moved_is_found_where_it_is_said_to_lie(run, monkeypatch, tmp_path):
    before = mixlora.load(run)(IDS).logits
    (tmp_path / "base").rename(tmp_path / "moved")
    for way in WAYS.keys() - {"lm_eval"}:
        with pytest.raises(ConfigError, match=r"model\.path=.*base: there is no such folder"):
            WAYS[way](run, monkeypatch, False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert torch.equal(mixlora.load("~/run", model_path="~/moved")(IDS).logits, before)
    assert torch.equal(mixlora.load("run/adapter", model_path="moved")(IDS).logits, before)
    assert mixlora.load_tokenizer("~/run", model_path="~/moved").vocab_size == byte_tokenizer().vocab_size
    moved = ("run=~/run", "model.path=~/moved")
    command(monkeypatch, generate, *moved, "prompt=hi", "max_new_tokens=1")
    command(monkeypatch, evaluate, *moved)
    command(monkeypatch, export, *moved, "to=~/merged", "merge=true", "model.dtype=bfloat16")
    command(monkeypatch, export, *moved, "to=~/peft")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert (merged.float()(IDS).logits - before).std() < 0.2 * before.std()
    assert read_json(tmp_path / "peft" / files.CONFIG)["base_model_name_or_path"] == str(tmp_path / "moved")
    assert torch.equal(mixlora.load(tmp_path / "peft")(IDS).logits, before)


def test_rules_that_transformers_warns_of_are_merged_with_their_model(run, monkeypatch, tmp_path):
    rules = {"temperature": 0.9, "top_p": 0.6, "max_length": 4096}  # of a model whose authors left do_sample out
    write_json(tmp_path / "base" / "generation_config.json", rules)
    command(monkeypatch, export, f"run={run}", f"to={tmp_path / 'to'}", "merge=true")
    found = read_json(tmp_path / "to" / "generation_config.json")
    assert found.items() >= (rules | {"eos_token_id": [byte_tokenizer().eos_token_id]}).items()


def test_a_lora_that_peft_would_load_in_part_is_exported_merged_alone(run, monkeypatch, tmp_path):
    monkeypatch.setattr(files, "loads_in_peft", lambda model: False)
    with pytest.raises(ConfigError, match=r"merge=true writes a plain model.*mixlora\.load"):
        command(monkeypatch, export, f"run={run}", f"to={tmp_path / 'to'}")
    command(monkeypatch, export, f"run={run}", f"to={tmp_path / 'to'}", "merge=true")


def test_the_dtype_of_a_base_model_may_be_said_and_adapter_and_gates_keep_theirs(run):
    for dtype in ("bfloat16", torch.bfloat16):
        model = mixlora.load(run, dtype=dtype)
        assert model.model.embed_tokens.weight.dtype == torch.bfloat16
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with pytest.raises(ConfigError, match=r"dtype: Invalid value 'bf16'.*bfloat16"):
        mixlora.load(run, dtype="bf16")


def test_an_adapter_that_had_the_dtype_of_its_base_has_that_of_now(run):
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("adapter_dtype: float32", "adapter_dtype: auto"))
    for dtype in (torch.float32, torch.bfloat16):
        assert {p.dtype for p in mixlora.load(run, dtype=dtype).parameters() if p.requires_grad} == {dtype}


def test_a_home_in_a_file_is_expanded_once(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = configs.plain(Config(model=Model(name="a", path="~/b"), method=METHOD, tasks=Mixture(name="none")))
    config |= {"output_root": "~/runs", "run_dir": "~/run", "resume": "~/r"}
    config["data"] |= {"source": "~/hub"}
    found = configs.config_of(OmegaConf.create(config))
    assert [found.output_root, found.run_dir, found.resume] == [f"{tmp_path}/{name}" for name in ("runs", "run", "r")]
    assert [found.data.source, found.model.path] == [f"{tmp_path}/hub", f"{tmp_path}/b"]
    assert base.where(Model(name="a", path="~/b"))[0] == f"{tmp_path}/b"


def test_reading_a_run_hashes_no_weights(run, monkeypatch):
    monkeypatch.setattr(base, "fingerprint", lambda tensors: pytest.fail("nobody asked"))
    mixlora.load(run)


def test_a_tokenizer_pads_whoever_loads_it(run, tmp_path):
    told = AutoTokenizer.from_pretrained(tmp_path / "base")
    alone, beside = mixlora.load_tokenizer(run), loading.load(run).tokenizer
    assert told.pad_token_id is None
    assert alone.pad_token_id == beside.pad_token_id == told.eos_token_id


@pytest.mark.full
def test_bars_are_left_to_a_session_and_a_command_shows_none_in_a_log(run, tmp_path):
    logging.enable_progress_bar()
    mixlora.load(run)
    assert logging.is_progress_bar_enabled()
    asked = ["-m", "mixlora.generate", f"run={run}", "prompt=hi", "max_new_tokens=1"]
    env = os.environ | {"PYTHONPATH": str(Path(mixlora.__file__).parents[1])}
    done = subprocess.run([sys.executable, *asked], capture_output=True, text=True, cwd=tmp_path, env=env, check=True)
    assert done.stderr == ""


# ---- the hub


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that refuses: Hugging Face's library would ask it again and again."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    with socket.socket() as taken:  # bound and not listening: a connection is refused
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        online.heard.clear()
        yield endpoint


def test_a_hub_whose_certificate_is_not_known_here_is_there(monkeypatch):
    """Its own library may know it."""

    def refused(request, timeout):
        raise urllib.error.URLError(ssl.SSLCertVerificationError("unable to get local issuer certificate"))

    monkeypatch.setattr("urllib.request.urlopen", refused)
    assert online.asked("https://some.where", 5.0) is None


def test_a_hub_that_did_not_answer_is_asked_again_later(no_hub, monkeypatch):
    assert "refused" in online.problem()
    monkeypatch.setattr(online, "asked", lambda url, patience: None)
    assert "refused" in online.problem()  # loading one model asks several times
    monkeypatch.setattr(online, "KEPT", 0.0)
    assert online.problem() is None
    monkeypatch.setattr(online, "asked", lambda url, patience: pytest.fail("it has answered"))
    assert online.problem() is None


def test_a_model_that_only_an_unreachable_hub_has_is_said_within_ten_seconds(no_hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    with pytest.raises(DataError, match=rf"'nobody/nothing'.*{no_hub} cannot be reached.*Use model\.path=FOLDER"):
        command(monkeypatch, train, "+method=lora", "+tasks=arc", *SAMPLE, "model=nobody/nothing")
    assert time.monotonic() - began < 10
    assert not list(tmp_path.iterdir())


def test_a_model_that_was_downloaded_before_needs_no_hub(no_hub, monkeypatch, tmp_path):
    place = tmp_path / "models--nobody--small"
    save_base(place / "snapshots" / ("a" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    assert base.load(Model(name="small", path="nobody/small")).model.config.num_hidden_layers == 2
    assert time.monotonic() - began < 10


def test_a_folder_asks_no_hub(no_hub, monkeypatch, run):
    monkeypatch.setattr(online, "unreachable", lambda url, patience: pytest.fail("the hub is asked"))
    mixlora.load(run)
