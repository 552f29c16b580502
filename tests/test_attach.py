"""Where the adapter goes: which modules, how many experts in each layer, how many parameters, and what is refused."""

import pytest
import torch
from built import METHODS, built, composed, disturb, tokens
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from mixlora import gates, loading
from mixlora.adapters import files, targets
from mixlora.adapters.attach import adapted, attach, count, detach
from mixlora.adapters.modules import Fused
from mixlora.config.schema import Dtype, Factors, Method, Model, Scope
from mixlora.errors import ConfigError

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION, FEED_FORWARD = SEVEN[:4], SEVEN[4:]


def llama(layers: int = 4) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes))


@pytest.fixture(scope="module")
def llama2_7b() -> LlamaForCausalLM:
    """The sizes without the weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(intermediate_size=11008, max_position_embeddings=4096))


def sizes_with(model: nn.Module, method: Method) -> dict[str, int]:
    """The counts with `method` attached; the model is left as it was."""
    attach(model, method)
    found = count(model)
    detach(model)
    return found


def gated(**values) -> Method:
    return Method(**({"name": "a", "r": 2, "num_experts": 4, "top_k": 2, "gate": {"kind": "topk"}} | values))


def endings(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name in adapted(model)}


def gemma3(text_layers: int = 2, vision_layers: int = 5) -> Gemma3ForConditionalGeneration:
    """As AutoModelForCausalLM makes it of a Gemma 3 from 4B on: reads images as well."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    text = sizes | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "num_hidden_layers": text_layers}
    vision = sizes | {"num_hidden_layers": vision_layers, "image_size": 28, "patch_size": 14}
    ids = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62, "mm_tokens_per_image": 1}
    model = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=vision, **ids))
    assert isinstance(model, Gemma3ForConditionalGeneration)
    return model


# ---- published counts


@pytest.mark.parametrize(
    ("method", "overrides", "published"),
    [
        ("lora", ["r=64"], 159_907_840),
        ("mola", ["num_experts=8"], 169_017_344),
        ("mola", [], 105_635_840),
        ("mola", ["num_experts=[8,6,4,2]"], 105_635_840),
        ("mola", ["num_experts=[8,2,2,8]"], 105_635_840),
        ("mola", ["num_experts=[2,8,8,2]"], 105_635_840),
        ("mola", ["num_experts=5"], 105_635_840),
        ("mixlora", [], 203_423_744),
    ],
)
def test_parameters_of_llama2_7b_are_the_published_ones(llama2_7b, method, overrides, published):
    config = composed(method, *(f"method.{o}" for o in overrides))
    assert sizes_with(llama2_7b, config.method)["trainable"] == published


def test_a_token_activates_eight_of_64_ranks_and_the_whole_router(llama2_7b):
    found = sizes_with(llama2_7b, composed("smora").method)
    assert found["trainable"] == 159_907_840 + 72_876_032
    assert found["activated"] == 159_907_840 // 8 + 72_876_032


@pytest.mark.parametrize("name", METHODS)
def test_counts_are_ordered_and_trainable_is_what_attach_returns(name):
    model, adapter = built(composed(name))
    sizes = count(model)
    assert 0 < sizes["activated"] <= sizes["trainable"] < sizes["total"]
    assert sizes["trainable"] == sum(t.numel() for t in adapter.values() if t.requires_grad)
    assert sizes["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("k", "active"), [(1, 1), (2, 2), (None, 4)])
def test_activated_parameters_are_those_of_k_experts_and_the_router(k, active):
    model = llama(1)
    attach(model, gated(top_k=k, target_modules=["q_proj"]))
    assert count(model)["activated"] == active * 2 * (16 + 16) + 4 * 16


def test_an_a_that_all_share_is_active_whole():
    model = llama(1)
    attach(model, gated(factors=Factors.shared_a, target_modules=["q_proj"], top_k=1))
    assert count(model)["trainable"] == 2 * 16 + 4 * 2 * 16 + 4 * 16
    assert count(model)["activated"] == 2 * 16 + 1 * 2 * 16 + 4 * 16


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("factors", list(Factors))
def test_a_block_activates_k_experts_of_its_three_linears_and_its_one_router(k, factors):
    model = llama(1)
    values = {"scope": Scope.feed_forward, "target_modules": "feed-forward", "factors": factors, "top_k": k}
    attach(model, gated(**values))
    of_A, of_B = 2 * (16 + 16 + 24), 2 * (24 + 24 + 16)  # gate, up, down
    shared = factors is Factors.shared_a
    assert count(model)["trainable"] == (1 if shared else 4) * of_A + 4 * of_B + 4 * 16
    assert count(model)["activated"] == (1 if shared else k) * of_A + k * of_B + 4 * 16


# ---- patterns over the layers


def experts(model: nn.Module) -> list[int]:
    return [wrapper.gate.num_experts for name, wrapper in adapted(model).items() if name.endswith("q_proj")]


def test_a_choice_may_be_given_as_its_word_and_a_wrong_word_is_refused():
    counts = [sizes_with(llama(), gated(factors=one)) for one in ("shared_a", Factors.shared_a, Factors.own)]
    assert counts[0] == counts[1] != counts[2]
    with pytest.raises(ConfigError, match=r"method\.factors"):
        attach(llama(), gated(factors="shared_b"))


def test_entries_of_a_pattern_that_no_layer_gets_are_known():
    assert targets.left_out([2, 4, 6, 8], 4) == targets.left_out([2, 4], 30) == targets.left_out(8, 1) == []
    assert targets.left_out([2, 4, 6, 8], 2) == [4, 8]
    assert targets.left_out([*range(32)], 30) == [15, 31]


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 7, 30, 32])
def test_a_pattern_is_stretched_over_any_depth(layers):
    model = llama(layers)
    attach(model, gated(num_experts=[2, 4, 6, 8], target_modules=["q_proj"]))
    found = experts(model)
    assert found == sorted(found)
    assert found[0] == 2
    if layers >= 4:
        shares = [found.count(e) for e in (2, 4, 6, 8)]
        assert max(shares) - min(shares) <= 1


def test_one_entry_a_layer_for_experts_rank_and_k():
    model = llama(3)
    attach(model, gated(num_experts=[5, 3, 4], r=[1, 2, 3], top_k=[2, 1, 4], lora_alpha=6, target_modules=["q_proj"]))
    wrappers = list(adapted(model).values())
    assert [w.gate.num_experts for w in wrappers] == [5, 3, 4]
    assert [w.delta.r for w in wrappers] == [1, 2, 3]
    assert [w.gate.top_k for w in wrappers] == [2, 1, 4]
    assert [w.delta.scale for w in wrappers] == [6, 3, 2]


def test_a_k_above_the_experts_it_meets_is_refused_whatever_the_lengths():
    attach(llama(4), gated(num_experts=[2, 2, 4, 4], top_k=[2, 4]))
    with pytest.raises(ConfigError, match="Lower top_k or add experts"):
        attach(llama(4), gated(num_experts=[2, 2, 2, 4], top_k=[2, 4]))


def test_a_pattern_for_a_linear_in_no_layer_is_refused():
    model = nn.Sequential()
    model.add_module("only", nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="sits in no layer"):
        attach(model, gated(num_experts=[2, 4]))


# ---- which modules


@pytest.mark.parametrize(
    ("target_modules", "found"),
    [
        ("all-linear", set(SEVEN)),
        ("attention", set(ATTENTION)),
        ("feed-forward", set(FEED_FORWARD)),
        (["q_proj", "mlp.up_proj"], {"q_proj", "up_proj"}),
        (["attention", "down_proj"], {*ATTENTION, "down_proj"}),
        (r".*\.(q|v)_proj", {"q_proj", "v_proj"}),
    ],
)
def test_target_modules_are_roles_endings_or_an_expression(target_modules, found):
    model = llama()
    attach(model, gated(target_modules=target_modules))
    assert endings(model) == found
    assert len(adapted(model)) == 4 * len(found)
    assert type(model.lm_head) is nn.Linear


def test_an_expression_can_choose_layers():
    model = llama()
    attach(model, gated(target_modules=r"model\.layers\.[13]\..*\.q_proj"))
    assert list(adapted(model)) == [f"model.layers.{i}.self_attn.q_proj" for i in (1, 3)]


def test_a_family_may_name_its_parts_otherwise():
    names = Model(name="m", attention=["q_proj"])
    model = llama()
    attach(model, gated(target_modules="attention"), names)
    assert endings(model) == {"q_proj"}


def test_a_linear_that_is_both_gate_and_up_is_no_sibling_of_itself():
    """Phi-3 has one `gate_up_proj`, which the role of the feed-forward block must name twice."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Phi3ForCausalLM(Phi3Config(vocab_size=64, num_key_value_heads=2, pad_token_id=0, **sizes))
    names = Model(name="phi3")
    names.feed_forward.gate = names.feed_forward.up = "gate_up_proj"
    attach(model, gated(target_modules="feed-forward"), names)
    both = model.model.layers[0].mlp.gate_up_proj
    assert isinstance(both, Fused)
    assert not both.siblings
    model = Phi3ForCausalLM(Phi3Config(vocab_size=64, num_key_value_heads=2, pad_token_id=0, **sizes))
    with pytest.raises(ConfigError, match=r"needs a gate and an up, and .*'gate_up_proj' for both"):
        attach(model, gated(scope=Scope.feed_forward, target_modules="feed-forward"), names)


def test_experts_of_the_base_model_in_one_tensor_are_counted_beside_linears():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **sizes)
    model = MixtralForCausalLM(config)
    assert targets.beyond_linears(llama()) == 0
    experts = 2 * 4 * 3 * 16 * 24  # layers, experts, matrices of one
    assert targets.beyond_linears(model) == experts / sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_modules": ["q_prj"]}, "Did you mean 'q_proj'"),
        ({"target_modules": ["zzz"]}, "Known: down_proj, gate_proj"),
        ({"target_modules": "q_proj"}, r"matches the regular expression 'q_proj'. Did you mean the list \[q_proj\]"),
        ({"target_modules": "*q_proj"}, "is not a regular expression"),
        ({"target_modules": []}, "a list of name endings"),
        ({"target_modules": None}, "a list of name endings"),
        ({"target_modules": [1]}, "a list of name endings"),
        ({"plain_modules": "attention"}, "is for method.scope=feed_forward"),
        ({"scope": Scope.feed_forward, "target_modules": ["up_proj"]}, "Use method.target_modules=feed-forward"),
        ({"scope": Scope.feed_forward, "target_modules": "all-linear"}, "Use method.target_modules=feed-forward"),
        (
            {"scope": Scope.feed_forward, "target_modules": "feed-forward", "gate": None, "num_experts": 1, "top_k": 1},
            "needs a gate",
        ),
        ({"gate": None}, "needs a gate"),
        ({"num_experts": 0}, "integer of at least 1"),
        ({"r": [2, 2.5]}, "integer of at least 1"),
        ({"top_k": 5}, "above method.num_experts=4"),
        ({"top_k": 1, "gate": {"kind": "balanced", "rank_partition": 2}}, "top_k=1 must be a multiple of"),
        ({"lora_dropout": 1.0}, r"must be in \[0, 1\)"),
        (
            {"scope": Scope.feed_forward, "target_modules": "feed-forward", "gate": {"kind": "entropy"}},
            r"would scale the block.*method\.gate\.renormalize=true",
        ),
        (
            {"scope": "feed_forward", "target_modules": "feed-forward", "gate": {"kind": "balanced"}},
            r"would scale the block.*method\.gate\.kind=topk or dense",
        ),
        ({"adapter_dtype": "float16"}, r"float16 would train adapters in float16.*Set method\.adapter_dtype=float32"),
    ],
)
def test_a_mistake_is_named_and_changes_nothing(values, message):
    model = llama()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=message):
        attach(model, gated(**values))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_what_makes_an_adapter_in_float16_loads_one_and_trains_none():
    method = gated(adapter_dtype=Dtype.auto, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=r"adapter_dtype=auto would train adapters in float16"):
        attach(llama().half(), method)
    adapter = loading.attached(llama().half(), method, Model(name="a"))
    assert {tensor.dtype for name, tensor in adapter.items() if "delta" in name} == {torch.float16}


def test_a_second_adapter_is_refused():
    model = llama()
    attach(model, gated())
    with pytest.raises(ConfigError, match=r"carries an adapter already.*mixlora\.adapters\.attach\.detach"):
        attach(model, gated())


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_is_taken_off_again(name):
    model, ids = llama().eval(), tokens(2, 9) % 32
    before, modules = model(ids).logits, dict(model.named_modules())
    for _ in range(2):
        disturb(attach(model, composed(name).method))
        assert not torch.equal(model.eval()(ids).logits, before)
        assert detach(model) is model
        assert dict(model.named_modules()) == modules
        assert torch.equal(model(ids).logits, before)
    assert not any(p.requires_grad for p in model.parameters())


# ---- other families

NO_ENDS = {"bos_token_id": None, "eos_token_id": None}


@pytest.mark.parametrize("name", METHODS)
def test_gpt2_takes_every_method_that_sits_beside_a_linear(name):
    """GPT-2 keeps its weights the other way round, and its feed-forward has no gate to adapt."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=260, n_positions=32, **NO_ENDS)
    ).eval()
    want = model(tokens(2, 5)).logits
    method = composed(name, "method.lora_dropout=0").method
    if method.target_modules != "all-linear":
        with pytest.raises(ConfigError, match="ends in 'gate_proj'"):
            attach(model, method)
        return
    adapter = attach(model, method)
    assert endings(model) == {"c_attn", "c_fc", "c_proj"}
    assert torch.equal(model(tokens(2, 5)).logits, want)
    with torch.no_grad():
        for tensor in adapter.values():
            tensor.normal_(std=0.1)
    found = model(tokens(2, 5)).logits
    found.square().sum().backward()
    assert (found - want).abs().max() > 1e-3
    assert all(t.grad.abs().max() > 0 for t in adapter.values() if t.requires_grad)


def test_a_down_projection_with_a_bias_is_refused_for_whole_blocks():
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=32,
            mlp_bias=True,
        )
    )
    with pytest.raises(ConfigError, match="has a bias"):
        attach(model, gated(scope=Scope.feed_forward, target_modules="feed-forward"))


def test_a_model_without_linears_is_refused():
    """As one whose linears a quantiser has replaced by its own."""
    model = nn.Sequential(nn.Embedding(4, 8), nn.LayerNorm(8))
    with pytest.raises(ConfigError, match=r"target_modules: this model has no linear .* model.quantization=nf4"):
        attach(model, Method(name="lora"))


# ---- models of more than text


def test_what_reads_no_text_carries_no_adapter_and_counts_in_no_pattern():
    """A gate in a tower for images would never run, and its layers would stretch a pattern over another depth."""
    model = gemma3()
    before = sum(p.numel() for p in model.parameters())
    adapter = attach(model, gated(num_experts=[2, 4], top_k=1))
    assert set(adapted(model)) == {f"model.language_model.layers.{i}.{n}" for i in (0, 1) for n in names_of(gemma3())}
    assert {w.gate.num_experts for name, w in adapted(model).items() if ".layers.1." in name} == {4}
    assert count(model)["total"] == before + sum(tensor.numel() for tensor in adapter.values())
    model(input_ids=torch.arange(5)[None])
    assert set(gates.pop_routings(model)) == {f"{name}.gate" for name in adapted(model)}


def names_of(model: Gemma3ForConditionalGeneration) -> list[str]:
    layer = model.model.language_model.layers[0]
    return [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]


def test_peft_is_told_the_full_names_where_their_ends_mean_other_parts_too(tmp_path):
    model, method = gemma3(), Method(name="lora", r=2, target_modules=["q_proj"])
    adapter = attach(model, method)
    files.save(tmp_path, adapter, model, method, Model(name="a"))
    theirs = PeftModel.from_pretrained(gemma3(), str(tmp_path))
    carried = {name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert carried == set(adapted(model))


# ---- linears beside which no adapter could do its work

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": None}
MOE = {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
MISFITS = {
    "mamba": ({"state_size": 4}, "mixer.x_proj", "all-linear", r"reads its \w+ by itself.*=\[in_proj\]$"),
    "phimoe": (MOE, "mlp.router", "all-linear", r"does not map every token.*=\[k_proj, o_proj, q_proj, v_proj\]$"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_linear_that_no_adapter_could_stand_beside_is_refused_with_the_others(name):
    options, linear, chosen, message = MISFITS[name]
    config = AutoConfig.for_model(name, **SMALL | options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    parts, drawn = dict(model.named_modules()), torch.get_rng_state()
    with pytest.raises(ConfigError, match=message) as raised:
        attach(model, gated(target_modules=chosen))
    assert linear in str(raised.value)
    assert dict(model.named_modules()) == parts
    assert model.training
    assert torch.equal(torch.get_rng_state(), drawn)
    others = str(raised.value).rpartition("=[")[2].removesuffix("]").split(", ")
    attach(model, gated(target_modules=others))
    model(input_ids=torch.arange(5)[None])
    assert len(gates.pop_routings(model)) == 2 * len(others)


class Twice(LlamaForCausalLM):
    """Its second layer is its first once more."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1] = self.model.layers[0]


def test_a_layer_that_runs_twice_carries_no_gate():
    config = llama().config
    with pytest.raises(ConfigError, match="runs more than once in a forward, of which a gate would remember the last"):
        attach(Twice(config), gated(target_modules=["q_proj"]))
    model = Twice(config)
    attach(model, Method(name="lora", r=2, target_modules=["q_proj"]))
    model(input_ids=torch.arange(5)[None])


class Experts(nn.Module):
    """A feed-forward of experts in a list, as models that bring their own code have it: each sees its tokens."""

    def __init__(self, D: int):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        rows = x_BSD.flatten(0, 1)
        return torch.stack([self.experts[t % 4](row[None])[0] for t, row in enumerate(rows)]).view_as(x_BSD)


def test_lora_stands_beside_experts_in_a_list_and_a_gate_does_not():
    for method in (Method(name="lora", r=2), gated()):
        model = llama(1)
        model.model.layers[0].mlp = Experts(16)
        if method.gate is None:
            attach(model, method)
            assert sum("experts" in name for name in adapted(model)) == 4
            continue
        with pytest.raises(ConfigError, match=r"'model.layers.0.mlp.experts.0' sees other rows .*\[k_proj, o_proj, q_"):
            attach(model, method)
        attach(model, gated(target_modules=["k_proj", "o_proj", "q_proj", "v_proj"]))


def test_layers_that_training_leaves_out_by_chance_carry_adapters():
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_attention_heads": 2, "num_hidden_layers": 4, "vocab_size": 32}
    for seed in range(3):
        torch.manual_seed(seed)
        model = OPTForCausalLM(OPTConfig(**sizes, layerdrop=0.9, word_embed_proj_dim=16, **NO_ENDS))
        attach(model, gated(target_modules=["q_proj"]))


class Halved(LlamaMLP):
    def forward(self, x):
        return super().forward(x) / 2


def test_a_block_that_does_more_is_no_expert_of_a_mixture_of_blocks():
    model, method = llama(2), gated(scope=Scope.feed_forward, target_modules="feed-forward")
    other = llama(2)
    other.model.layers[1].mlp = Halved(other.config)
    attach(model, method)
    with pytest.raises(ConfigError, match=r"'model.layers.1.mlp' computes more than down\(act\(gate x\) \* up x\)"):
        attach(other, method)
    assert not other.model.layers[1].mlp._forward_hooks
    attach(other, gated(target_modules="feed-forward"))
