"""Laws that hold for every file in configs/method, on a tiny model of random weights (float64 where it says EXACT)."""

import copy
import dataclasses
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from built import METHODS, built, busy, composed, computes, disturb, tokens
from safetensors.torch import load_file
from torch import Tensor, nn

import mixlora
from mixlora import gates, losses
from mixlora.adapters import files
from mixlora.adapters.attach import adapted, adapter_tensors, attach, paths
from mixlora.adapters.modules import GatedFeedForward, GatedLinear
from mixlora.config.schema import Config, Method, Mixture, Model, Options, Scope, Splits, Task
from mixlora.evaluation.routing import least_experts
from mixlora.experiment import Experiment
from mixlora.models import base
from mixlora.models.likelihood import model_inputs, predicting
from mixlora.tasks.collate import Batch, Row, collate

EXACT = ("model.dtype=float64", "method.adapter_dtype=float64")
SMALL = (*EXACT, "model.random.num_hidden_layers=2")
every_method = pytest.mark.parametrize("name", METHODS)
PATHS = [(name, compute) for name in METHODS for compute in computes(name)]
every_path = pytest.mark.parametrize(("name", "compute"), PATHS)

ROWS = [
    Row("a", "t", tuple(tokens(1, 9, 1)[0].tolist()), tuple(tokens(1, 4, 2)[0].tolist())),
    Row("b", "t", tuple(tokens(1, 5, 3)[0].tolist()), tuple(tokens(1, 3, 4)[0].tolist())),
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    given = {"attention_mask": batch.attention_mask_BS, "position_ids": batch.position_ids_BS}
    return model(input_ids=batch.input_ids_BS, **given).logits


def objective(model: nn.Module, config: Config, batch: Batch) -> Tensor:
    """Cross-entropy plus the method's own auxiliary losses, these at full size so that a wrong one shows."""
    torch.manual_seed(3)  # the same dropout masks each time
    logits_NV = predicting(model(**model_inputs(batch, keep_logits=True)).logits, batch)
    routings = gates.pop_routings(model)
    aux = [loss(routings, batch.mask_BS) for loss in losses.build(config.aux_loss).values()]
    return nn.functional.cross_entropy(logits_NV, batch.target_N) + sum(aux)


def gradients(model: nn.Module, config: Config, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    objective(model, config, batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def smooth(model: nn.Module) -> nn.Module:
    """LLaMA's norm rounds to float32 whatever the model's dtype, which drowns finite differences; this one does not."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon, dtype=module.weight.dtype)
            norm.load_state_dict(module.state_dict())
            model.set_submodule(name, norm.requires_grad_(False))
    return model


# ---- at the start, and what trains

# What every wrapper computes by; the linears beside a mixture in a block have one hand-written form.
TAKEN = {("eager", scope): {"eager"} for scope in Scope} | {("fast", Scope.linear): {"fused"}}
TAKEN |= {(compute, Scope.feed_forward): {compute, "fused"} for compute in ("fast", "lean")}


@every_path
def test_starts_as_the_base_model(name, compute):
    config = composed(name, *SMALL, f"method.compute={compute}")
    want = base.load(config.model, seed=7).model(tokens(2, 9)).logits
    model, _ = built(config)
    assert set(paths(model)) == TAKEN[compute, config.method.scope]
    difference = (model.eval()(tokens(2, 9)).logits - want).abs().max()
    # Whole-block experts sum k equal blocks with weights that add up to one, which is exact up to rounding.
    assert difference <= (1e-12 if config.method.scope is Scope.feed_forward else 0)


@every_path
def test_gradients_reach_the_adapter_alone_and_equal_finite_differences(name, compute):
    """Dropout is on: the masks must be the same in forward, in backward, and for every step aside."""
    one_layer = (*EXACT, "model.random.num_hidden_layers=1")
    config = composed(name, *one_layer, "method.lora_dropout=0.1", f"method.compute={compute}")
    model, adapter = busy(config)
    smooth(model).train()
    batch = collate(ROWS, 0)
    found = gradients(model, config, batch)
    assert set(found) == {name for name, tensor in adapter.items() if tensor.requires_grad}
    torch.manual_seed(5)
    step = 1e-6
    with torch.no_grad():
        for key, gradient in found.items():
            assert gradient.abs().max() > 0, f"{key} has no gradient"
            start, direction = adapter[key].clone(), F.normalize(torch.randn_like(gradient), dim=None)
            adapter[key].add_(step * direction)
            above = objective(model, config, batch)
            adapter[key].copy_(start - step * direction)
            below = objective(model, config, batch)
            adapter[key].copy_(start)
            slope = (above - below) / (2 * step)
            torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-5, atol=1e-8)


@every_path
def test_checkpointing_changes_no_gradient(name, compute):
    config = composed(name, *SMALL, "method.lora_dropout=0.1", f"method.compute={compute}")
    model, _ = busy(config)
    model.train()
    batch = collate(ROWS, 0)
    want = gradients(model, config, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradients(model, config, batch), want, rtol=1e-12, atol=1e-12)


@every_method
def test_forward_moves_no_state(name):
    model, adapter = busy(composed(name, *SMALL))
    before = {key: tensor.clone() for key, tensor in adapter.items()}
    for mode in (True, False):
        model.train(mode)(tokens(2, 5))
    assert all(torch.equal(before[key], adapter[key]) for key in before)


@every_path
def test_dropout_is_off_in_evaluation(name, compute):
    small = (*SMALL, f"method.compute={compute}")
    with_dropout, _ = busy(composed(name, *small, "method.lora_dropout=0.5"))
    without, _ = busy(composed(name, *small, "method.lora_dropout=0"))
    want = without(tokens(2, 5)).logits
    torch.testing.assert_close(with_dropout.eval()(tokens(2, 5)).logits, want, rtol=1e-10, atol=1e-10)
    assert (with_dropout.train()(tokens(2, 5)).logits - want).abs().max() > 1e-3


# ---- tokens and rows do not see each other


@every_path
def test_a_later_token_moves_no_earlier_logit(name, compute):
    model, _ = busy(composed(name, *SMALL, f"method.compute={compute}"))
    ids = tokens(2, 9)
    before = model.eval()(ids).logits
    ids[:, 6] += 1
    after = model(ids).logits
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=0, atol=1e-10)
    assert (after[:, 6:] - before[:, 6:]).abs().amax(-1).min() > 1e-4


@every_path
def test_other_rows_and_padding_move_no_logit(name, compute):
    model, _ = busy(composed(name, *SMALL, f"method.compute={compute}"))
    model.eval()
    together = logits_of(model, collate([*ROWS, Row("c", "t", tuple(tokens(1, 17)[0].tolist()), (7,))], 0))
    for i, row in enumerate(ROWS):
        alone = logits_of(model, collate([row], 0))[0]
        torch.testing.assert_close(together[i, -len(alone) :], alone, rtol=0, atol=1e-10)


@every_method
def test_a_cache_of_keys_and_values_changes_no_logit(name):
    model, _ = busy(composed(name, *EXACT))
    ids = tokens(2, 9)
    with torch.inference_mode():
        want = model.eval()(ids).logits
        first = model(ids[:, :6], use_cache=True)
        pieces = [first.logits]
        for t in range(6, 9):
            pieces.append(model(ids[:, t : t + 1], past_key_values=first.past_key_values, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), want, rtol=0, atol=1e-10)


@every_method
def test_generation_with_and_without_a_cache(name):
    model, _ = busy(composed(name, *SMALL))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(2, 6)}
    found = [model.eval().generate(tokens(2, 6), use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*found)


# ---- what the equation says


@pytest.mark.parametrize("name", [*METHODS, "a gate whose options are left out"])
def test_a_router_that_is_sure_uses_the_least_experts(name):
    config = composed(name if name in METHODS else "dynmole", *SMALL)
    if name not in METHODS:
        config = dataclasses.replace(config, method=dataclasses.replace(config.method, gate={"kind": "entropy"}))
    model, _ = busy(config)
    for gate in gates.gates_of(model).values():
        gate.router.weight.data.mul_(1e4)
    model(tokens(2, 9))
    used = {name: int(routing.chosen_TE.sum(-1).min()) for name, routing in gates.pop_routings(model).items()}
    assert least_experts(model, config.method) == used


@every_method
def test_one_expert_is_lora(name):
    """All kinds of gate give their only expert the weight one."""
    for top_k in ["null", 1] if composed(name).method.top_k else ["null"]:
        one = ["method.num_experts=1", f"method.top_k={top_k}"] if composed(name).method.gate else []
        config = composed(name, *SMALL, "method.lora_dropout=0", *one)
        model, adapter = built(config)
        m = config.method
        targets = [m.target_modules, *([m.plain_modules] if m.plain_modules else [])]
        twin_method = Method(name="twin", r=m.r, lora_alpha=m.lora_alpha, scale=m.scale, adapter_dtype=m.adapter_dtype)
        twin_method.target_modules = m.target_modules if m.target_modules == "all-linear" else targets
        twin, twin_adapter = built(Config(model=config.model, method=twin_method))
        disturb(adapter)
        by_file_name = {files.file_name(key): tensor for key, tensor in adapter.items()}
        with torch.no_grad():
            for key, tensor in twin_adapter.items():
                tensor.copy_(by_file_name[files.file_name(key)])
        torch.testing.assert_close(model(tokens(2, 9)).logits, twin(tokens(2, 9)).logits, rtol=1e-9, atol=1e-9)


@every_path
def test_equals_a_slow_loop_over_tokens_and_experts(name, compute):
    model, _ = busy(composed(name, *EXACT, f"method.compute={compute}"))
    model.eval()
    for key, wrapper in adapted(model).items():
        width = (wrapper.gate_proj if isinstance(wrapper, GatedFeedForward) else wrapper.delta).A_RD.shape[1]
        x_TD = torch.randn(5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(len(key)))
        with torch.no_grad():
            slow = slow_block if isinstance(wrapper, GatedFeedForward) else slow_linear
            torch.testing.assert_close(wrapper(x_TD), slow(wrapper, x_TD), rtol=1e-10, atol=1e-10)


def expert(delta, e: int, x_D: Tensor) -> Tensor:
    """s · B_e A_e x."""
    block = slice(e * delta.r, (e + 1) * delta.r)
    A_rD = delta.A_RD if len(delta.A_RD) < len(delta.B_RO) else delta.A_RD[block]
    return delta.scale * delta.B_RO[block].T @ (A_rD @ x_D)


def slow_linear(wrapper, x_TD: Tensor) -> Tensor:
    rows = []
    for x_D in x_TD:
        gate = getattr(wrapper, "gate", None)
        weights = [1.0] if gate is None else SLOW_GATES[type(gate)](gate, (gate.router.weight @ x_D).tolist())
        rows.append(wrapper.base_layer(x_D) + sum(g * expert(wrapper.delta, e, x_D) for e, g in enumerate(weights)))
    return torch.stack(rows)


def slow_block(wrapper, x_TD: Tensor) -> Tensor:
    """Every expert is a whole feed-forward block; the gate weighs their outputs."""
    rows = []
    for x_D in x_TD:
        total_D = torch.zeros_like(x_D)
        for e, g in enumerate(
            SLOW_GATES[type(wrapper.gate)](wrapper.gate, (wrapper.gate.router.weight @ x_D).tolist())
        ):
            u_F = wrapper.base("gate")(x_D) + expert(wrapper.gate_proj, e, x_D)
            v_F = wrapper.base("up")(x_D) + expert(wrapper.up_proj, e, x_D)
            h_F = F.silu(u_F) * v_F
            total_D += g * (wrapper.base("down")(h_F) + expert(wrapper.down_proj, e, h_F))
        rows.append(total_D)
    return torch.stack(rows)


def softmax(logits: list[float]) -> list[float]:
    exps = [math.exp(z) for z in logits]
    return [e / sum(exps) for e in exps]


def best(scores: list[float], k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:k]


def slow_dense(gate, logits: list[float]) -> list[float]:
    return softmax(logits)


def slow_topk(gate, logits: list[float]) -> list[float]:
    p = softmax(logits)
    kept = best(p, gate.top_k or len(p))
    norm = sum(p[i] for i in kept) if gate.options.renormalize else 1
    return [p[i] / norm if i in kept else 0.0 for i in range(len(p))]


def slow_entropy(gate, logits: list[float]) -> list[float]:
    o, p = gate.options, softmax(logits)
    shifted = [x + o.entropy_eps for x in p]
    if o.q == 1:
        H = -sum(x * math.log(x) for x in shifted) / math.log(len(p))
    else:
        H = (1 - sum(x**o.q for x in shifted)) / (1 - len(p) ** (1 - o.q))
    kept, total = [], 0.0
    for rank, i in enumerate(best(p, len(p))):
        total += p[i]
        before = total if o.crossing is gates.Crossing.exclude else total - p[i]
        if before <= o.top_p or o.top_p == 1 or rank < gate.top_k or o.entropy_threshold < min(H, 1):
            kept.append(i)
    norm = sum(p[i] for i in kept) if o.renormalize else 1
    return [p[i] / norm if i in kept else 0.0 for i in range(len(p))]


def slow_balanced(gate, logits: list[float]) -> list[float]:
    o, k = gate.options, gate.top_k
    scores = softmax(logits) if o.score is gates.Score.softmax else [1 / (1 + math.exp(-z)) for z in logits]
    plain_scores = [scores[i // o.rank_partition] for i in range(gate.num_experts)]
    biased = [c + b for c, b in zip(plain_scores, gate.bias_E.tolist(), strict=True)]
    kept = best(biased, k)
    value = biased if o.bias_in_value else plain_scores
    return [k * value[i] / sum(value[j] for j in kept) if i in kept else 0.0 for i in range(len(value))]


SLOW_GATES = {
    gates.Dense: slow_dense,
    gates.TopK: slow_topk,
    gates.Entropy: slow_entropy,
    gates.BalancedTopK: slow_balanced,
}

VARIANTS = [
    ("mole", "gate.renormalize=false"),
    ("mole", "top_k=null"),
    ("dynmole", "gate.crossing=include"),
    ("dynmole", "gate.renormalize=true"),
    ("dynmole", "gate.entropy_threshold=1"),
    ("dynmole", "gate.entropy_eps=0.3"),
    ("dynmole", "gate.q=1"),
    ("dynmole", "top_k=3"),
    ("dynmole", "gate.top_p=0.4"),
    ("dynmole", "gate.top_p=1"),
    ("smora", "gate.score=softmax"),
    ("smora", "gate.bias_in_value=false"),
    ("smora", "gate.rank_partition=4"),
    ("smora", "r=2"),
    ("mixlora", "factors=shared_a"),
    ("mixlora", "top_k=1"),
    ("hydralora", "factors=own"),
    *[("mole", f"scale={scale}") for scale in ("alpha_over_r", "alpha_over_sqrt_r", "alpha_over_k", "constant")],
]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_published_variant_is_an_override_away(name, variant):
    """Each changes the logits, and still equals the slow loop, on every path."""
    deep = ("model.random.num_hidden_layers=1", "method.lora_dropout=0", *EXACT)
    models = [busy(composed(name, *deep, f"method.{variant}", f"method.compute={c}"))[0] for c in computes(name)]
    plainly, _ = busy(composed(name, *deep))
    with torch.no_grad():
        x_TD = torch.randn(20, 32, dtype=torch.float64) * torch.logspace(-2, 0.5, 20).unsqueeze(-1)
        changed = False
        for key, wrapper in adapted(models[0]).items():
            if isinstance(wrapper, GatedFeedForward | GatedLinear) and "down_proj" not in key:
                want_TD = (slow_block if isinstance(wrapper, GatedFeedForward) else slow_linear)(wrapper, x_TD)
                for model in models:
                    found_TD = model.get_submodule(key)(x_TD)
                    torch.testing.assert_close(found_TD, want_TD, rtol=1e-10, atol=1e-10)
                changed |= not torch.allclose(want_TD, plainly.get_submodule(key)(x_TD))
    # alpha over r is the default, and Shannon's entropy is so near to q = 1.1 that no choice need differ.
    assert changed or variant in ("scale=alpha_over_r", "gate.q=1")


# ---- files, dtypes, compilers


@every_method
def test_saves_and_loads_to_equal_logits(tmp_path, name):
    config = composed(name)
    model, adapter = busy(config)
    files.save(tmp_path, adapter, model, config.method, Model(name="tiny"))
    fresh, fresh_adapter = built(config)
    assert not torch.equal(fresh.eval()(tokens(2, 9)).logits, model.eval()(tokens(2, 9)).logits)
    files.load(tmp_path, fresh_adapter)
    assert torch.equal(fresh(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


@every_method
def test_the_tensors_that_attach_returned_are_the_models_own_after_it_moved(tmp_path, name):
    """To another dtype, as to another device: what is trained there is saved, and what is loaded arrives there."""
    config = composed(name)
    (model, adapter), (fresh, fresh_adapter) = built(config), built(config)
    for each in (model, fresh):
        each.double()
    disturb(adapter_tensors(model))
    files.save(tmp_path, adapter, model, config.method, Model(name="tiny"))
    files.load(tmp_path, fresh_adapter)
    assert torch.equal(fresh(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


@every_path
def test_under_autocast_routers_compute_in_float32_and_gradients_are_there(name, compute):
    """As transformers' Trainer has it with bf16=True; backward inside the block too."""
    options = ("model.random.num_hidden_layers=2", f"method.compute={compute}", "method.lora_dropout=0.1")
    model, adapter = busy(composed(name, *options))
    inputs = {}
    for key in gates.gates_of(model):
        owner = model.get_submodule(key.removesuffix(".gate"))
        owner.register_forward_pre_hook(lambda module, args, key=key: inputs.update({key: args[0].detach()}))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.train()(tokens(8, 64)).logits
        logits.float().square().mean().backward()
    assert logits.dtype == torch.bfloat16
    assert all(torch.isfinite(t.grad).all() and t.grad.dtype == t.dtype for t in adapter.values() if t.requires_grad)
    for key, routing in gates.pop_routings(model).items():
        gate = model.get_submodule(key)
        assert routing.logits_TS.dtype == torch.float32
        exact = inputs[key].double() @ gate.router.weight.double().T
        torch.testing.assert_close(routing.logits_TS.double(), exact, rtol=1e-4, atol=1e-5)


@every_method
def test_attach_leaves_every_module_in_its_mode_and_puts_wrappers_into_that_of_what_they_stand_for(name):
    config = composed(name, "model.random.num_hidden_layers=2", "method.lora_dropout=0.5")
    model = base.load(config.model).model.train()
    for module in model.model.layers[1].modules():
        module.eval()
    before = {module: module.training for module in model.modules()}
    attach(model, config.method, config.model)
    assert {module: module.training for module in before} == before
    assert all(m.training == ("layers.1" not in key) for key, w in adapted(model).items() for m in w.modules())


@every_path
def test_a_model_that_has_just_computed_can_be_copied_and_pickled(name, compute):
    model, _ = busy(composed(name, "model.random.num_hidden_layers=2", f"method.compute={compute}"))
    want = model(tokens(2, 9)).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(gate.routing is None for gate in gates.gates_of(other).values())
        torch.testing.assert_close(other(tokens(2, 9)).logits, want)
        other(tokens(2, 9)).logits.sum().backward()


@every_path
def test_a_bfloat16_base_keeps_a_float32_adapter_and_routes_in_float32(name, compute):
    small = ("model.dtype=bfloat16", "model.random.num_hidden_layers=2")
    model, adapter = busy(composed(name, *small, "method.lora_dropout=0.1", f"method.compute={compute}"))
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    inputs = {}
    for key, gate in gates.gates_of(model).items():
        owner = model.get_submodule(key.removesuffix(".gate"))
        owner.register_forward_pre_hook(lambda module, args, key=key: inputs.update({key: args[0].detach()}))
        assert gate.router.weight.dtype == torch.float32
    logits = model.train()(tokens(8, 64)).logits
    logits.float().square().mean().backward()
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()
    assert all(
        torch.isfinite(t.grad).all() and t.grad.dtype == torch.float32 for t in adapter.values() if t.requires_grad
    )
    for key, routing in gates.pop_routings(model).items():
        gate = model.get_submodule(key)
        exact = gate.route(inputs[key].double() @ gate.router.weight.double().T, **gate.state())
        assert routing.logits_TS.dtype == torch.float32
        same_T = torch.isclose(routing.weights_TE.double(), exact.weights_TE, atol=1e-4).all(-1)
        assert same_T.double().mean() >= 0.9999


# With dropout a compiled layer takes the plain path. The two gates with most to trace and a block of experts each time,
# the rest now and then.
OFTEN = [("smora", 0.0), ("smora", 0.1), ("dynmole", 0.0), ("mixlora", 0.0)]
COMPILED = [(n, p, () if (n, p) in OFTEN else pytest.mark.full) for p in (0.0, 0.1) for n in METHODS]


@pytest.mark.parametrize(("name", "dropout"), [pytest.param(n, p, marks=marks) for n, p, marks in COMPILED])
def test_one_layer_compiles_as_one_graph(name, dropout):
    """In training, with the masks that the plain path draws."""
    options = ("model.random.num_hidden_layers=1", *EXACT, f"method.lora_dropout={dropout}")
    results = []
    for compute in ("eager", "fast"):
        model, _ = busy(composed(name, *options, f"method.compute={compute}"))
        key, wrapper = list(adapted(model.train()).items())[-1]
        width = 48 if key.endswith("down_proj") else 32
        x_BSD = torch.randn(2, 5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        torch._dynamo.reset()
        run = wrapper if compute == "eager" else torch.compile(wrapper, fullgraph=True, backend="aot_eager")
        torch.manual_seed(3)
        found = run(x_BSD)
        trained = [p for p in wrapper.parameters() if p.requires_grad]
        results.append((found, torch.autograd.grad(found.square().sum(), trained)))
    (want, want_gradient), (found, gradient) = results
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.full
@every_method
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_whole_model_compiles_as_one_graph(name, dropout):
    """In training: the loss with all its parts, and every gradient, are those of the plain path."""
    options = (*SMALL, f"method.lora_dropout={dropout}")
    config, batch = composed(name, *options), collate(ROWS, 0)
    plainly, _ = busy(composed(name, *options, "method.compute=eager"))
    want = gradients(plainly.train(), config, batch)
    model, _ = busy(config)
    torch._dynamo.reset()
    model.train().compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(model, config, batch), want, rtol=1e-8, atol=1e-8)


# ---- a whole run


def quiz(folder: Path) -> Task:
    """A task of the user's own: twelve questions in one file."""
    rows = [{"q": f"{i} and {i}?", "o": [str(2 * i), str(i + 90)], "a": i % 2} for i in range(12)]
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = Splits(train="[:8]", test="[8:]")
    options = Options(field="o")
    return Task(
        name="quiz", path=str(folder / "quiz.jsonl"), splits=splits, question="{q}", options=options, answer="a"
    )


def test_a_trained_run_folder_loads_in_a_fresh_process(tmp_path):
    """The method whose gate keeps a state beside its parameters."""
    train = ("train.max_steps=3", "train.per_device_train_batch_size=2", "train.learning_rate=0.05")
    config = copy.deepcopy(composed("smora", *train, f"output_root={tmp_path}", "eval.before=false"))
    config.report = False
    config.tasks = Mixture(name="quiz", mixture={"quiz": quiz(tmp_path)})
    experiment = Experiment(config, "a test")
    experiment.run()
    adapter = load_file(experiment.folder / "adapter" / files.TENSORS)
    biases = [tensor for key, tensor in adapter.items() if key.endswith("balance_bias")]
    assert len(biases) == 28
    assert all(bias.unique().numel() > 1 for bias in biases)
    here = mixlora.load(experiment.folder)(tokens(2, 9)).logits
    (tmp_path / "elsewhere.py").write_text(
        "import sys, torch, mixlora\n"
        "torch.set_num_threads(1)\n"
        "torch.save(mixlora.load(sys.argv[1])(torch.tensor(eval(sys.argv[2]))).logits, sys.argv[3])\n"
    )
    arguments = [str(experiment.folder), str(tokens(2, 9).tolist()), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, str(tmp_path / "elsewhere.py"), *arguments], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), here)
    base_logits = base.load(config.model).model(tokens(2, 9)).logits
    assert (here - base_logits).abs().max() > 0.1
