"""Adapter folders: PEFT's layout both ways, all or nothing, and no file that would load half."""

import json

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import mixlora
from mixlora import loading
from mixlora.adapters import files
from mixlora.adapters.attach import attach
from mixlora.config.schema import FeedForwardNames, Method, Model, Scale
from mixlora.errors import CheckpointError, ConfigError
from mixlora.models import base
from mixlora.models.tokenizer import byte_tokenizer

IDS = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(5))
GATED = {"kind": "topk"}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **sizes)).eval()


def trained(model, method: Method, names: Model | None = None):
    adapter = attach(model, method, names)
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in adapter.values():
            tensor.normal_(std=0.2)
    return adapter


@pytest.mark.parametrize("scale", list(Scale))
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], r".*layers\.1\..*"])
def test_a_lora_loads_in_peft(tmp_path, scale, targets):
    model = llama()
    method = Method(name="a", r=4, lora_alpha=16, scale=scale, target_modules=targets)
    files.save(tmp_path, trained(model, method), model, method, Model(name="base"))
    theirs = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_lora_loads_here(tmp_path, rslora):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "v_proj", "up_proj"]
    theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, use_rslora=rslora, target_modules=targets)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    method, _ = files.method_of(tmp_path / "adapter")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    files.load(tmp_path / "adapter", attach(ours, method))
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("r", [3, [2, 4]])
@pytest.mark.parametrize("scale", list(Scale))
def test_an_adapter_folder_alone_gives_the_model_back(tmp_path, scale, r):
    """Its base by a name of configs/model, and ranks that differ by layer."""
    model = base.load(loading.model_of("tiny")).model
    method = Method(name="a", r=r, lora_alpha=12, scale=scale)
    files.save(tmp_path, trained(model, method), model, method, Model(name="tiny"))
    torch.testing.assert_close(mixlora.load(tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("role", ["attention", "feed-forward"])
def test_a_folder_of_a_mixture_knows_what_a_role_means_in_its_base(tmp_path, role):
    tokenizer, names = byte_tokenizer(), FeedForwardNames(gate="c_fc", up="c_fc", down="mlp.c_proj")
    tokenizer.save_pretrained(tmp_path / "base")
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    origin = Model(name="a", path=str(tmp_path / "base"), attention=["c_attn", "attn.c_proj"], feed_forward=names)
    model, method = base.load(origin).model, Method(name="a", num_experts=4, gate=GATED, top_k=2, target_modules=role)
    adapter = trained(model, method, origin)
    files.save(tmp_path / "mine", adapter, model, method, origin)
    assert len(adapter) == 12  # A, B and router of two linears in each layer
    assert mixlora.load(tmp_path / "mine")(IDS).logits.equal(model(IDS).logits)


def test_a_folder_of_a_mixture_of_before_loads(tmp_path):
    model = base.load(loading.model_of("tiny")).model
    method = Method(name="a", num_experts=4, gate=GATED, top_k=2, target_modules="attention")
    files.save(tmp_path, trained(model, method), model, method, Model(name="tiny"))
    config = json.loads((tmp_path / files.CONFIG).read_text())
    del config["mixlora_names"]
    (tmp_path / files.CONFIG).write_text(json.dumps(config))
    torch.testing.assert_close(mixlora.load(tmp_path)(IDS).logits, model(IDS).logits)


def test_an_adapter_folder_alone_names_the_commit_of_its_base(tmp_path):
    model, method = base.load(loading.model_of("tiny")).model, Method(name="a", r=2)
    for revision in ("0123abc", None):
        origin = Model(name="a", path="owner/name", revision=revision)
        files.save(tmp_path, trained(model, method) if revision else {}, model, method, origin)
        assert PeftConfig.from_pretrained(tmp_path).revision == revision
        described, _, _ = loading.described(tmp_path)
        assert (described.path, described.revision) == ("owner/name", revision)


@pytest.mark.parametrize("name", ["tiny", "mistral_7b"])
def test_a_base_in_a_folder_is_not_taken_for_a_name_of_ours_nor_a_name_for_a_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    model, method = llama(), Method(name="a", r=2)
    adapter = trained(model, method)
    files.save(tmp_path / "of_ours", adapter, model, method, loading.model_of(name))
    want = loading.described(tmp_path / "of_ours")[0]
    model.config.save_pretrained(tmp_path / name)
    files.save(tmp_path / "mine", adapter, model, method, Model(name="mine", path=name))
    assert loading.described(tmp_path / "mine")[0].path == f"./{name}"
    assert loading.described(tmp_path / "of_ours")[0] == want


@pytest.mark.full
def test_an_adapter_of_the_model_in_a_package_is_loaded_without_a_hub(tmp_path):
    model, method = base.load(loading.model_of("smollm2_135m")).model, Method(name="a", r=2)
    files.save(tmp_path, trained(model, method), model, method, Model(name="smollm2_135m"))
    torch.testing.assert_close(mixlora.load(tmp_path)(IDS).logits, model(IDS).logits)


def peft_folder(folder, **options):
    theirs = get_peft_model(base.load(loading.model_of("tiny")).model, LoraConfig(r=4, lora_alpha=12, **options)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(folder)
    config = json.loads((folder / files.CONFIG).read_text())
    (folder / files.CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "tiny"}))
    return theirs


def test_ranks_that_peft_gives_by_pattern_are_read(tmp_path):
    ranks = {r"layers\.[12]\.self_attn\.[qv]_proj": 2}
    theirs = peft_folder(tmp_path, target_modules=["q_proj", "v_proj"], rank_pattern=ranks)
    torch.testing.assert_close(mixlora.load(tmp_path)(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_without_counterpart_is_refused(tmp_path, key):
    peft_folder(tmp_path, target_modules=["q_proj", "v_proj"], **{key: {"q_proj": 2}})
    with pytest.raises(ConfigError, match=f"{key} .*_proj"):
        mixlora.load(tmp_path)


def test_peft_refuses_a_mixture(tmp_path):
    model = llama()
    method = Method(name="a", r=2, num_experts=4, top_k=2, gate=GATED)
    files.save(tmp_path, trained(model, method), model, method, Model(name="base"))
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(llama(), str(tmp_path))


def test_a_file_has_the_factors_of_a_mixture_as_peft_has_those_of_a_lora(tmp_path):
    """lora_A [R, D] and lora_B [O, R], experts side by side in R: what other programs read."""
    model = llama()
    method = Method(name="a", r=2, num_experts=4, top_k=2, gate=GATED)
    adapter = trained(model, method)
    files.save(tmp_path, adapter, model, method, Model(name="base"))
    up, saved = "model.layers.1.mlp.up_proj", load_file(tmp_path / files.TENSORS)
    A_RD, B_OR = (saved[f"base_model.model.{up}.lora_{factor}.weight"] for factor in "AB")
    assert (A_RD.shape, B_OR.shape) == ((8, 32), (48, 8))
    assert torch.equal(A_RD, adapter[f"{up}.delta.A_RD"])
    assert torch.equal(B_OR.T, adapter[f"{up}.delta.B_RO"])


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    model = llama()
    method = Method(name="a", r=2, num_experts=4, top_k=2, gate=GATED)
    adapter = trained(model, method)
    for folder in ("one", "two"):
        files.save(tmp_path / folder, adapter, model, method, Model(name="base"))
    for file in (files.TENSORS, files.CONFIG):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("part", ["model", "layer"])
@pytest.mark.parametrize("gate", [None, GATED])
def test_an_adapter_of_a_compiled_model_is_one_of_the_model(tmp_path, gate, part):
    """Its names have a part more there. By PEFT it is read too, which here is told the full names."""
    model = compiled = llama()
    if part == "model":
        compiled = torch.compile(model, backend="eager")
    else:
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    options = {} if gate is None else {"num_experts": 4, "top_k": 2, "gate": gate}
    method = Method(name="a", r=2, target_modules=r".*layers\.1\..*q_proj", **options)
    adapter = trained(compiled, method)
    files.save(tmp_path, adapter, compiled, method, Model(name="base"))
    files.load(tmp_path, adapter)
    plain = llama()
    files.load(tmp_path, attach(plain, method))
    if gate is None:
        theirs = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
        torch.testing.assert_close(theirs(IDS).logits, plain(IDS).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits)


def lose(tensors, key):
    del tensors[key]


HARMS = {
    "lacks": lose,
    "besides": lambda tensors, key: tensors.update(extra=torch.ones(2)),
    "shape": lambda tensors, key: tensors.update({key: torch.ones(3, 3)}),
    "not finite": lambda tensors, key: tensors[key].view(-1)[0].fill_(float("nan")),
}


@pytest.mark.parametrize("message", HARMS)
def test_a_file_that_does_not_fit_changes_nothing(tmp_path, message):
    model = llama()
    method = Method(name="a", r=2)
    adapter = trained(model, method)
    files.save(tmp_path, adapter, model, method, Model(name="base"))
    tensors = load_file(tmp_path / files.TENSORS)
    HARMS[message](tensors, sorted(tensors)[-1])
    save_file(tensors, tmp_path / files.TENSORS)
    before = {name: t.clone() for name, t in adapter.items()}
    with pytest.raises(
        CheckpointError, match=f"{tmp_path / files.TENSORS}.* {message}.* Copy the whole adapter folder"
    ):
        files.load(tmp_path, adapter)
    assert all(torch.equal(before[name], adapter[name]) for name in adapter)


def test_a_cut_file_and_a_pickle_are_refused(tmp_path):
    model = llama()
    method = Method(name="a", r=2)
    adapter = trained(model, method)
    files.save(tmp_path, adapter, model, method, Model(name="base"))
    path = tmp_path / files.TENSORS
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="damaged"):
        files.load(tmp_path, adapter)
    path.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="missing"):
        files.load(tmp_path, adapter)


def test_merging_gives_the_same_logits_and_a_plain_model():
    model = llama()
    trained(model, Method(name="a", r=4))
    want = model(IDS).logits
    files.merge(model)
    torch.testing.assert_close(model(IDS).logits, want, atol=1e-4, rtol=1e-4)
    assert set(model.state_dict()) == set(llama().state_dict())


@pytest.mark.full
def test_a_merged_model_from_a_gguf_file_is_saved_as_numbers(tmp_path):
    """transformers does not save what it takes for a file's blocks."""
    model = base.load(loading.model_of("smollm2_135m")).model
    model.model.layers = model.model.layers[:1]
    trained(model, Method(name="a", r=2))
    want = model(IDS).logits
    files.merge(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    model.config.num_hidden_layers = 1
    model.config.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, want, atol=1e-3, rtol=1e-3)


def test_one_weight_with_two_adapters_is_not_merged():
    """Layers that share their weights (Zamba): every adapter would be added to the one weight of all."""
    model = llama()
    first, second = (layer.self_attn.q_proj for layer in model.model.layers[:2])
    second.weight = first.weight
    trained(model, Method(name="a", r=4, target_modules=["q_proj"]))
    before = first.weight.clone()
    with pytest.raises(
        ConfigError, match=r"layers\.1\.self_attn\.q_proj' and .* are one weight with an adapter for each"
    ):
        files.merge(model)
    assert torch.equal(first.weight, before)


def test_numbers_with_a_scale_beside_them_are_not_merged():
    model = llama()
    trained(model, Method(name="a", r=4, target_modules=["q_proj"]))
    linear = model.model.layers[0].self_attn.q_proj.base_layer
    linear.weight = torch.nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ConfigError, match="is quantised"):
        files.merge(model)


def test_a_gated_method_cannot_be_merged():
    model = llama()
    trained(model, Method(name="a", r=2, num_experts=4, top_k=2, gate=GATED))
    before = set(model.state_dict())
    with pytest.raises(ConfigError, match="has a gate"):
        files.merge(model)
    assert set(model.state_dict()) == before


OTHER_LAYERS = {
    "use_dora": True,
    "alora_invocation_tokens": [1, 2],
    "lora_bias": True,
    "layers_to_transform": [0],
    "bias": "all",
    "an_option_of_tomorrow": {"rank": 3},
}


@pytest.mark.parametrize("option", OTHER_LAYERS)
def test_a_peft_option_without_counterpart_is_refused(tmp_path, option):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, option: OTHER_LAYERS[option]}
    (tmp_path / files.CONFIG).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=option):
        mixlora.load(tmp_path)


@pytest.mark.filterwarnings("ignore:.*embedding layers")
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"], r".*(q_proj|lm_head)"])
def test_a_peft_lora_beside_head_or_embeddings_is_refused(tmp_path, targets):
    peft_folder(tmp_path, target_modules=targets)
    with pytest.raises(ConfigError, match=r"has a LoRA beside \S*(lm_head|embed_tokens)\. .* merge it there"):
        mixlora.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "other"), [("r", None), ("r", "four"), ("lora_alpha", "x"), ("target_modules", 3), ("mixlora_method", [])]
)
def test_a_configuration_that_a_hand_has_changed_is_named_with_its_key(tmp_path, key, other):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    for harmed in (config | {key: other}, {name: value for name, value in config.items() if name != key}):
        kind = {"peft_type": "MIXLORA"} if key == "mixlora_method" else {}
        (tmp_path / files.CONFIG).write_text(json.dumps(harmed | kind))
        with pytest.raises(CheckpointError, match=f"{files.CONFIG}: {key} must be .* Put the file back"):
            mixlora.load(tmp_path)


@pytest.mark.parametrize("content", [b"[1]", b"{", b"null", b"\xff"])
def test_what_is_no_configuration_is_named(tmp_path, content):
    (tmp_path / files.CONFIG).write_bytes(content)
    with pytest.raises(CheckpointError, match=files.CONFIG):
        mixlora.load(tmp_path)


def test_the_first_layer_alone_is_a_choice_too(tmp_path):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "layers_to_transform": 0}
    (tmp_path / files.CONFIG).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="layers_to_transform"):
        mixlora.load(tmp_path)


@pytest.mark.parametrize("excluded", [["v_proj", "lm_head"], r".*layers\.1\..*"])
def test_what_a_peft_lora_excludes_carries_no_adapter(tmp_path, excluded):
    targets = ["q_proj", "v_proj", "up_proj"]
    theirs = peft_folder(tmp_path, target_modules=targets, exclude_modules=excluded, init_lora_weights="Gaussian")
    torch.testing.assert_close(mixlora.load(tmp_path)(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_peft_lora_of_defaults_loads(tmp_path):
    """A configuration as PEFT writes it loads with every option at its default; no name here is none of its own."""
    LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    method, _ = files.method_of(tmp_path)
    assert (method.r, method.lora_alpha, method.target_modules) == (4, 8, ["q_proj"])
    theirs = set(json.loads((tmp_path / files.CONFIG).read_text()))
    assert theirs >= files.PEFT_READ | files.PEFT_WITHOUT_EFFECT


@pytest.mark.filterwarnings("ignore:.*changes the base weights")
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_peft_lora_that_changed_its_base_is_refused_until_it_is_converted(tmp_path, start):
    base, changed = llama(), llama()
    base.save_pretrained(tmp_path / "base")
    theirs = get_peft_model(changed, LoraConfig(r=2, lora_alpha=2, init_lora_weights=start, target_modules=["q_proj"]))
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's guide saves the start
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match=f"init_lora_weights='{start}'.*path_initial_model_for_weight_conversion"):
        files.method_of(tmp_path / "plain")
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    method, _ = files.method_of(tmp_path / "converted")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    files.load(tmp_path / "converted", attach(ours, method))
    torch.testing.assert_close(ours(IDS).logits, theirs.eval()(IDS).logits, atol=1e-4, rtol=1e-4)
