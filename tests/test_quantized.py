"""Quantised base models, by bitsandbytes itself: one of 4 or 8 bits is the model of the numbers that it stands for."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import bitsandbytes
import pytest
import torch
from built import METHODS, composed, disturb, tokens
from hydra.core.global_hydra import GlobalHydra
from tiny_runs import REPOSITORY, TORCHRUN
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import mixlora
from mixlora import export, train
from mixlora.adapters.attach import attach, count, paths
from mixlora.checks import check_shards
from mixlora.config.schema import Model, Quantization
from mixlora.errors import ConfigError
from mixlora.evaluation.likelihood import OptionScorer
from mixlora.models import base
from mixlora.models.likelihood import packs_rows
from mixlora.models.tokenizer import byte_tokenizer
from mixlora.quantized import REPACKS
from mixlora.records import read_lines

KINDS = [Quantization.nf4, Quantization.int8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A small LLaMA on disk, every width a multiple of the 64 numbers that share a scale."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=320, num_key_value_heads=2, initializer_range=0.05, **sizes, **special)
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


def loaded(folder: str, kind: Quantization) -> nn.Module:
    return base.load(Model(name="small", path=folder, quantization=kind)).model


def numbers(linear: nn.Module) -> torch.Tensor:
    """What the weight of a quantised linear stands for."""
    weight = linear.weight
    if isinstance(linear, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.CB.float() * weight.SCB[:, None] / 127


def plain(folder: str, quantized: nn.Module) -> nn.Module:
    """The same model with ordinary linears of those numbers."""
    model = loaded(folder, Quantization.none)
    for name, linear in quantized.named_modules():
        if isinstance(linear, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)):
            model.get_submodule(name).weight.data = numbers(linear)
    return model


def gradients(model: nn.Module, adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.train()(tokens(2, 12)).logits.square().mean().backward()
    return {name: tensor.grad for name, tensor in adapter.items() if tensor.requires_grad}


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_training_over_a_quantised_base_is_training_over_its_numbers(name, kind, folder):
    """After it has scored as well: on a CPU with bfloat16 products a kernel of the quantiser's own would score, and
    leave the weights otherwise."""
    method = composed(name, "method.lora_dropout=0.0").method
    quantized = loaded(folder, kind)
    assert not any(getattr(module, REPACKS, False) for module in quantized.modules())
    model = plain(folder, quantized)
    with torch.no_grad():
        quantized.eval()(tokens(2, 12))
    found = []
    for each in (quantized, model):
        torch.manual_seed(3)
        adapter = attach(each, method)
        disturb(adapter)
        with torch.no_grad():  # large factors make float32 itself miss a gradient by a thousandth
            for value in adapter.values():
                value.mul_(0.3)
        found.append(gradients(each, adapter))
    assert set(paths(quantized)) == {"eager"}
    assert "eager" not in paths(model)
    assert found[0].keys() == found[1].keys()
    for tensor, gradient in found[0].items():
        assert far(gradient, found[1][tensor]) < 1e-5, tensor


def users_own(folder: str) -> nn.Module:
    """A base of 4 bits as transformers gives it, in training mode, in which bitsandbytes packs nothing."""
    options = base.quantization(Quantization.nf4, torch.float32)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=options, device_map={"": "cpu"}).train()


def test_attach_leaves_a_users_own_base_of_4_bits_as_it_was_and_so_does_a_scoring(folder):
    """A trial in evaluation mode comes before an adapter, on a CPU whose quantiser would pack weights anew for it."""
    model, rows = users_own(folder), tokens(2, 12)
    four = [layer for layer in model.modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)]
    weights, logits = [numbers(layer) for layer in four], model(rows).logits
    adapter = attach(model, composed("lora", "method.lora_dropout=0.0").method)
    assert torch.equal(model(rows).logits, logits)
    disturb(adapter)
    before = {name: gradient.clone() for name, gradient in gradients(model, adapter).items()}
    with torch.no_grad():
        model.eval()(rows)
    model.zero_grad()
    for name, gradient in gradients(model, adapter).items():
        assert torch.equal(gradient, before[name]), name
    assert all(torch.equal(numbers(layer), weight) for layer, weight in zip(four, weights, strict=True))


def test_a_base_of_4_bits_that_was_packed_for_scoring_carries_no_adapter(folder):
    model = users_own(folder)
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ConfigError, match=r"weights of 'model\.layers\.1\.mlp\.up_proj' anew .* Load the model again"):
        attach(model, composed("lora").method)


@torch.no_grad()
def test_scores_of_4_bits_are_those_of_its_numbers_beside_any_row(folder):
    quantized = loaded(folder, Quantization.nf4)
    model = plain(folder, quantized)
    rows = tokens(3, 12)
    logits = quantized.eval()(rows).logits
    assert far(logits, model.eval()(rows).logits) < 1e-5
    assert far(logits[:1], quantized(rows[:1]).logits) < 1e-5
    assert packs_rows(quantized)


@pytest.mark.parametrize("kind", KINDS)
def test_options_are_scored_as_branches_of_one_prompt(kind, folder):
    assert OptionScorer(loaded(folder, kind)).masks is not None


def test_rows_are_not_packed_where_products_are_rounded_by_the_whole_batch(folder):
    assert not packs_rows(loaded(folder, Quantization.int8))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_quantised_already_are_called_what_they_are(kind, folder, tmp_path):
    loaded(folder, kind).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert base.quantized(loaded(str(tmp_path), kind)) is base.stored(Model(path=str(tmp_path))) is kind
    for other in set(Quantization) - {kind}:
        with pytest.raises(ConfigError, match=rf"model\.quantization={kind.value}"):
            loaded(str(tmp_path), other)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted_as_numbers_and_not_as_bytes(kind, folder):
    method, counts = composed("smora").method, []
    for each in (kind, Quantization.none):
        model = loaded(folder, each)
        attach(model, method)
        counts.append(count(model))
    assert counts[0] == counts[1]


def job(folder: str, run: Path, kind: Quantization) -> list[str]:
    small = ["data.source=sample", "train.max_steps=2", "eval.limit=4", "train.max_length=128", "report=false"]
    model = ["model=path", f"model.path={folder}", f"model.quantization={kind.value}"]
    return ["+method=smora", "+tasks=arc", *model, *small, f"run_dir={run}", f"output_root={run.parent}"]


def test_a_run_over_a_quantised_base(folder, tmp_path, monkeypatch):
    def call(door, *argv: str) -> None:
        monkeypatch.setattr(sys, "argv", ["mixlora", *argv])
        GlobalHydra.instance().clear()
        with redirect_stdout(io.StringIO()):
            door.main()

    call(train, *job(folder, tmp_path / "run", Quantization.nf4))
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished"
    assert record["computed"] == {"eager": 14}
    assert record["packages"]["bitsandbytes"] == bitsandbytes.__version__
    ids = torch.arange(20).unsqueeze(0)
    one, other = (mixlora.load(tmp_path / place)(ids).logits for place in ("run", "run/adapter"))
    assert torch.equal(one, other)  # the folder of the adapter does not forget what its base was
    with pytest.raises(SystemExit) as ended:
        call(export, f"run={tmp_path / 'run'}", f"to={tmp_path / 'to'}", "merge=true")
    assert ended.value.code == 2


def test_what_cannot_be_quantised_is_refused_before_anything_is_loaded():
    for model, origin in (("tiny", "random numbers"), ("smollm2_135m", "a GGUF file")):
        with pytest.raises(ConfigError, match=origin):
            composed("lora", f"model={model}", "model.quantization=nf4")


SHARDS = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
TWO = {"WORLD_SIZE": "2"}


def on_two(folder: str, run: Path, kind: Quantization, **env: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *TORCHRUN, "-m", "mixlora.train", *job(folder, run, kind)]
    more = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(line, env=os.environ | more | env, capture_output=True, text=True, timeout=300)


@pytest.mark.full
def test_shards_of_a_base_of_4_bits_train_as_copies_of_it(folder, tmp_path):
    found = []
    for name, env in (("copies", {}), ("shards", SHARDS)):
        done = on_two(folder, tmp_path / name / "run", Quantization.nf4, **env)
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / name / "run" / "run.json").read_text(encoding="utf-8"))
        assert record["sharded"] is (name == "shards")
        found.append(read_lines(tmp_path / name / "run" / "metrics.jsonl"))
    for ours, theirs in zip(*found, strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5)


def test_a_base_of_8_bits_is_not_cut_into_shards(folder):
    config = composed("lora", "model=path", f"model.path={folder}", "model.quantization=int8")
    for whole in (TWO, SHARDS):  # one process cuts nothing
        check_shards(config, whole)
    with pytest.raises(ConfigError, match=r"ddp\.yaml"):
        check_shards(config, SHARDS | TWO)
