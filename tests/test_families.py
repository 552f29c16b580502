"""Families of models as transformers builds them: adapters beside all linears, and the same step however it is cut."""

from functools import partial
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_evaluation import slow_nats
from test_loop import gradients, trainer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mixlora.adapters import files
from mixlora.adapters.attach import attach
from mixlora.config.schema import Dtype, Method, Model
from mixlora.evaluation.generation import generate
from mixlora.evaluation.likelihood import OptionScorer
from mixlora.models import base
from mixlora.models.likelihood import pads_rows
from mixlora.models.tokenizer import byte_tokenizer
from mixlora.tasks.prompts import Choice, Prompt
from mixlora.training.loop import Trainer

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
HEADS, TWO_OF_FOUR = {"head_dim": 8}, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},  # its blocks lay rows side by side
    "falcon": SIZES,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gpt_oss": SIZES | HEADS | LOCAL | {"sliding_window": 6, "rope_scaling": None},
    "mixtral": SIZES | LOCAL,
    "qwen2_moe": SIZES | TWO_OF_FOUR | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": SIZES | HEADS | TWO_OF_FOUR,
    "phi3": SIZES,
    "phi": SIZES,
    "deepseek_v3": SIZES
    | TWO_OF_FOUR
    | {
        "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 4,
    },
    "lfm2": SIZES,
    "gemma3_text": SIZES | HEADS | {"sliding_window": 6},
    "cohere2": SIZES | {"sliding_window": 6},
    "olmo2": SIZES,
    "glm4": SIZES | HEADS,
    "starcoder2": SIZES,
    "recurrent_gemma": SIZES | {"num_hidden_layers": 3, "lru_width": 32},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "stablelm": SIZES,
    "biogpt": SIZES,
    "granite": SIZES,
    "nemotron": SIZES,
}  # fmt: skip
EAGER = ("bloom", "gpt_oss", "xglm")  # have no other attention
PADDED = (*EAGER, "recurrent_gemma")  # are not computed row by row in a pack
EXPERTS_AND_LINEARS = ("qwen2_moe", "deepseek_v3")  # PEFT would look for the linears in the experts' one tensor
# transformers computes them in no float64; the others' rounding would reach 1e-4 on some machines in float32.
NO_FLOAT64 = {"bloom", "gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "xglm"}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    ids = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = AutoConfig.for_model(name, **FAMILIES[name] | ids)
    for key in list(vars(config)):
        if "drop" in key and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)  # each cut of a step would draw its own
    attention = "eager" if name in EAGER else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    base.use_cache(model, False)  # as in a run: with a cache, transformers looks for no packs
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_is_the_same_however_it_is_cut(name, tmp_path):
    """In packs, padded, and row by row."""
    dtype, tolerance = (torch.float32, 1e-4) if name in NO_FLOAT64 else (torch.float64, 1e-6)
    gate: dict[str, Any] = {"kind": "topk"}
    method = Method(name="m", r=2, num_experts=3, top_k=2, gate=gate, target_modules="all-linear")
    method.adapter_dtype = Dtype.float32 if name in NO_FLOAT64 else Dtype.float64

    def made(rows: int, **how: Any) -> Trainer:
        cut = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows}
        return trainer(tmp_path, method=method, model=model_of(name).to(dtype), **cut, **how)

    want, padded, packed = made(1, packing=False), made(8, packing=False), made(8)
    assert packed.packed is (name not in PADDED)
    alone = gradients(want)
    assert alone.norm() > 0.01
    for cut in (padded, packed):
        assert float((gradients(cut) - alone).norm() / alone.norm()) < tolerance
    line, _ = made(8, aux={"load_balance": {}, "router_z": {}}).step(1)
    assert line["expert_load"]["idle"] < 1


@pytest.mark.parametrize("name", FAMILIES)
def test_options_score_as_one_forward_each_and_answers_as_alone(name):
    model = model_of(name)
    prompts = [(9, 8, 7, 6, 5, 9, 11), (4, 5), (17, 3, 22, 8)]
    asked = [[Choice(Prompt(ids), answer, "") for answer in ((11, 12, 13), (14,), (15, 16))] for ids in prompts]
    found = OptionScorer(model)(asked, batch_size=3, batch_tokens=300, pad_id=0)
    for choices, nats in zip(asked, found, strict=True):
        assert nats == pytest.approx([slow_nats(model, choice) for choice in choices], abs=1e-3)
    ask = partial(generate, model, byte_tokenizer(), max_new_tokens=6, pads=pads_rows(model))
    assert ask(prompts, batch_size=3) == [ask([ids], batch_size=1)[0] for ids in prompts]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_lora_loads_whole_in_peft_or_not_at_all(name, tmp_path):
    model, method = model_of(name), Method(name="m", r=2)
    adapter = attach(model, method)
    with torch.no_grad():
        for tensor in adapter.values():
            tensor.normal_(std=0.2)
    files.save(tmp_path, adapter, model, method, Model(name="base"))
    if name in EXPERTS_AND_LINEARS:
        with pytest.raises(KeyError, match="MIXLORA"):
            PeftModel.from_pretrained(model_of(name), str(tmp_path))
        return
    theirs = PeftModel.from_pretrained(model_of(name), str(tmp_path)).eval()
    ids = torch.randint(3, 60, (2, 9))
    torch.testing.assert_close(theirs(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
