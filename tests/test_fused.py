"""Every hand-written backward against autograd over the plain equation."""

import copy
import functools
import gc
import itertools
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from mixlora import gates
from mixlora.adapters import dropout, experts, fused, modules, targets
from mixlora.adapters.attach import attach, paths
from mixlora.adapters.dropout import Mask, Places, Whole
from mixlora.adapters.modules import Ahead, Fused, FusedGatedLinear, FusedLoraLinear, GatedLinear, LoraLinear
from mixlora.config.schema import Compute, Method, Scope
from mixlora.config.typed import typed
from mixlora.lowrank import LowRank
from mixlora.training.recompute import clear_records, keepers

CONFIGS = Path(__file__).parents[1] / "configs" / "method"
METHODS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
BY_HAND = [compute for compute in Compute if compute is not Compute.eager]
IDS = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(0))
D, O, T = 24, 20, 33


def method(name: str, compute: Compute, **changes) -> Method:
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    values = values.get("method", values) | {"compute": compute.value, "adapter_dtype": "auto"} | changes
    return typed(Method, values)


def llama(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **sizes)).to(dtype)


def adapted(name: str, compute: Compute, dtype: torch.dtype = torch.float64, std: float = 0.2, **changes):
    model = llama(dtype)
    adapter = attach(model, method(name, compute, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapter.values():
            tensor.copy_(std * torch.randn(tensor.shape, generator=generator))
    return model, adapter


def gradients(model: nn.Module, adapter) -> dict[str, torch.Tensor]:
    model(IDS).logits.square().mean().backward()
    return {name: tensor.grad for name, tensor in adapter.items() if tensor.requires_grad}


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


# ---- the functions


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("compute", BY_HAND)
@pytest.mark.parametrize("name", METHODS)
def test_a_whole_model_has_the_gradients_of_the_plain_equation(name, compute, dtype, most):
    """Tensor by tensor, with small factors: with large ones float32 itself misses a gradient by more than that."""
    model, adapter = adapted(name, compute, dtype, std=0.1, lora_dropout=0.0)
    assert "eager" not in paths(model)
    slow, slow_adapter = adapted(name, Compute.eager, dtype, std=0.1, lora_dropout=0.0)
    assert set(paths(slow)) == {"eager"}
    assert far(model(IDS).logits, slow(IDS).logits) < most
    found, expected = gradients(model, adapter), gradients(slow, slow_adapter)
    assert found.keys() == expected.keys()
    for tensor, gradient in found.items():
        assert far(gradient, expected[tensor]) < most, tensor


def build(gate: dict, D: int, E: int) -> gates.Gate:
    kind, options = gates.kind_and_options(gate)
    return kind(D, E, None if gate["kind"] == "dense" else 2, options)


def one_linear(kind: type, dtype: torch.dtype, *, gate: dict | None, bias: bool = True, p: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    base = nn.Linear(D, O, bias=bias, dtype=dtype).requires_grad_(False)
    E = 1 if gate is None else 6
    delta = LowRank(D, O, r=4, num_experts=E, scale=0.5, dropout=p, dtype=torch.float32)
    nn.init.normal_(delta.B_RO, std=0.3)
    built = kind(base, delta) if gate is None else kind(base, delta, build(gate, D, E))
    return built.to(dtype) if dtype is torch.float64 else built


@pytest.mark.parametrize("gate", [None, {"kind": "topk"}, {"kind": "dense"}, {"kind": "entropy"}, {"kind": "balanced"}])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_one_linear_agrees_in_float32(gate, p, monkeypatch):
    """To 1e-5 of each gradient, with the same dropped places on both sides."""
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x_TD: dropout.draw(self, x_TD).thin(x_TD))
    slow, fast = (LoraLinear, FusedLoraLinear) if gate is None else (GatedLinear, FusedGatedLinear)
    x_TD, dy_TO = torch.randn(2, T, D), torch.randn(2, T, O)
    results = []
    for kind in (slow, fast):
        layer, x = one_linear(kind, torch.float32, gate=gate, p=p), x_TD.clone().requires_grad_()
        torch.manual_seed(7)
        y_TO = layer(x)
        y_TO.backward(dy_TO)
        trained = {name: q.grad for name, q in layer.named_parameters() if q.requires_grad}
        results.append({"y": y_TO.detach(), "x": x.grad} | trained)
    assert len(results[0]) == (4 if gate is None else 5)
    for name, value in results[0].items():
        assert far(results[1][name], value) < 1e-5, name


def second_derivative(module: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    torch.manual_seed(5)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.square().sum(), x)
    return ddx


def test_a_second_derivative_is_right_or_refused():
    want, found = (
        second_derivative(one_linear(kind, torch.float64, gate=None), (T, D)) for kind in (LoraLinear, FusedLoraLinear)
    )
    torch.testing.assert_close(found, want)
    with pytest.raises(RuntimeError, match=r"second derivative .* method\.compute=eager"):
        second_derivative(one_linear(FusedGatedLinear, torch.float64, gate={"kind": "topk"}), (T, D))
    for compute in BY_HAND:
        model, _ = adapted("mixlora", compute, lora_dropout=0.0)
        with pytest.raises(RuntimeError, match=r"second derivative .* method\.compute=eager"):
            second_derivative(model.model.layers[0].mlp, (2, T, 32))


# ---- linears that read one input


GATES = [None, {"kind": "topk"}, {"kind": "topk", "renormalize": False}, {"kind": "dense"}, {"kind": "entropy"}]
GATES += [{"kind": "balanced"}, {"kind": "balanced", "rank_partition": 2}]


RECORD = ("logits_TS", "probs_TE", "weights_TE", "chosen_TE")


def three(gate: dict | None, p: float = 0.0) -> list[Fused]:
    kind = FusedLoraLinear if gate is None else FusedGatedLinear
    layers = [one_linear(kind, torch.float64, gate=gate, p=p) for _ in range(3)]
    for layer in layers:
        for tensor in () if gate is None else layer.gate.state().values():
            nn.init.uniform_(tensor, 0, 0.2)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
    return layers


def as_siblings(layers: list[Fused]) -> list[Fused]:
    first, *others = copy.deepcopy(layers)
    first.siblings, ahead = others, Ahead()
    for layer in (first, *others):
        layer.ahead = ahead
    return [first, *others]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_siblings_compute_what_each_computes_alone(gate, p):
    apart = three(gate, p)
    together = as_siblings(apart)
    x_TD, results = torch.randn(2, T, D, dtype=torch.float64), []
    for layers in (apart, together):
        torch.manual_seed(7)
        x = x_TD.clone().requires_grad_()
        ys = [layer(x) for layer in layers]
        records = [layer.gate.routing for layer in layers if layer.gate is not None]
        # The records have gradients of their own, for auxiliary losses.
        (sum(y.square().sum() for y in ys) + sum((r.probs_TE * r.logits_TS.sum()).sum() for r in records)).backward()
        results.append([*ys, x.grad, *(q.grad for layer in layers for q in layer.parameters() if q.requires_grad)])
        results[-1] += [getattr(r, name).double() for r in records for name in RECORD]
    assert len(results[0]) == 3 + 1 + (6 if gate is None else 9 + 12)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


def counted(monkeypatch) -> list[int]:
    """How many linears each pass through `side_by_side` takes."""
    calls, original = [], modules.side_by_side
    monkeypatch.setattr(modules, "side_by_side", lambda layers, x: [calls.append(len(layers)), original(layers, x)][1])
    return calls


def test_siblings_are_computed_once_and_nothing_is_held_when_all_were_asked(monkeypatch):
    layers, calls = as_siblings(three({"kind": "topk"})), counted(monkeypatch)
    x = torch.randn(T, D, dtype=torch.float64)
    for layer in layers:
        layer(x)
    assert calls == [3]
    assert layers[0].ahead.kept is None


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
@pytest.mark.parametrize("inference", [False, True])
def test_siblings_that_are_given_other_inputs_compute_with_those(inference, order):
    """As in an attention to another sequence: outputs, and the records as they stand at the end."""
    apart = three({"kind": "topk"})
    together = as_siblings(apart)
    with torch.inference_mode(inference):
        inputs = [torch.randn(5, D, dtype=torch.float64), *[torch.randn(9, D, dtype=torch.float64)] * 2]
        for i in (*order, *order):
            torch.testing.assert_close(together[i](inputs[i]), apart[i](inputs[i]))
        for one, other in zip(together, apart, strict=True):
            torch.testing.assert_close(one.gate.routing.weights_TE, other.gate.routing.weights_TE)


def test_what_was_computed_ahead_is_for_the_same_values_and_the_same_graph():
    apart = three({"kind": "topk"})
    q, k, v = as_siblings(apart)
    x = torch.randn(T, D, dtype=torch.float64)
    with torch.no_grad():
        q(x)
    assert k(x).requires_grad
    with torch.no_grad():
        q(x)
        x.mul_(2)
        torch.testing.assert_close(v(x), apart[2](x))


def test_a_forward_that_failed_between_siblings_leaves_nothing_behind():
    model, _ = adapted("mole", Compute.fast, target_modules="all-linear")
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    model.model.layers[1].mlp.act_fn.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        model(IDS)
    clear_records(keepers(model))
    gc.collect()
    assert [ref() for ref in seen] == [None]
    assert copy.deepcopy(model) is not model


def test_a_model_that_is_let_go_is_gone_at_once():
    model, _ = adapted("mole", Compute.fast, target_modules="all-linear")
    weight = weakref.ref(model.model.layers[0].self_attn.q_proj.base_layer.weight)
    model(IDS)  # leaves a record on every gate, with its graph
    gc.collect()
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(4, 8), nn.Linear(4, 8)


def test_linears_of_other_widths_are_no_siblings():
    model = nn.ModuleDict({"attention": CrossAttention()})
    attach(model, method("mole", Compute.fast, target_modules="all-linear"))
    q, k, _ = model["attention"].children()
    q(torch.randn(5, 8))
    k(torch.randn(3, 4))
    assert q.ahead is None


@pytest.mark.parametrize("name", METHODS)
def test_a_model_s_linears_that_read_one_input_are_siblings(name):
    families = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")]
    if method(name, Compute.fast).scope is Scope.linear:
        families.append(("mlp.gate_proj", "mlp.up_proj"))
        model, _ = adapted(name, Compute.fast, target_modules="all-linear")
    else:
        model, _ = adapted(name, Compute.fast)
    found = set()
    for module in model.modules():
        if isinstance(module, Fused) and module.siblings:
            layers = [module, *module.siblings]
            assert all(layer.ahead is module.ahead for layer in layers)
            found.add(tuple(n for n, m in model.named_modules() if m in layers))
    assert found == {tuple(f"model.layers.{i}.{child}" for child in family) for family in families for i in (0, 1)}


class Tempered(gates.Dense):
    """A gate with a tensor of its own that `route` does not take."""

    def __init__(self, *args, **factory):
        super().__init__(*args, **factory)
        self.temperature = nn.Parameter(torch.ones(()))

    def route(self, logits_TS):
        return super().route(logits_TS / self.temperature)


def test_gates_that_hold_what_route_does_not_take_are_not_decided_together(monkeypatch):
    monkeypatch.setitem(gates.KINDS, "dense", Tempered)
    model, _ = adapted("hydralora", Compute.fast, target_modules="all-linear")
    assert not any(getattr(module, "ahead", None) for module in model.modules())


@pytest.mark.parametrize("mix", [experts.Fast, experts.Lean])
@pytest.mark.parametrize("drop", [Whole(), Places(0.3, 5)])
@pytest.mark.parametrize("shared", [False, True])
def test_the_mixture_in_a_block_is_differentiated_right(mix, drop, shared):
    """Against finite differences, which know no seed and no groups."""
    torch.manual_seed(2)
    E, r, F, n = 3, 2, 4, 5

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    own = r if shared else E * r
    chosen_TE = torch.rand(n, E) < 0.6
    t_N, counts = experts.rows_of_experts(chosen_TE)
    tensors = random(n, F), random(n, F), random(n, 2, own), random(n, E), random(E * r, F)
    tensors += random(E * r, F), random(own, F)

    def run(u0, v0, a, g, B1, B3, A2):
        act = torch.nn.functional.silu
        return mix.apply(u0, v0, a, g * chosen_TE, t_N, B1, B3, A2, counts, (0.5, 2.0), act, (drop,) * E)

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("name", METHODS)
def test_dropout_is_drawn_anew_in_each_forward(name):
    model, _ = adapted(name, Compute.fast, lora_dropout=0.3)
    model.train()
    torch.manual_seed(11)
    first, second = model(IDS).logits, model(IDS).logits
    assert not torch.equal(first, second)
    torch.manual_seed(11)
    assert torch.equal(model(IDS).logits, first)
    model.eval()
    assert torch.equal(model(IDS).logits, model(IDS).logits)


# ---- dropout


@pytest.mark.parametrize("kind", [Places, Mask])
@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.9])
def test_each_place_is_dropped_with_probability_p(kind, p):
    thinned = kind(p, seed=4).thin(torch.ones(400, 500))
    n, dropped = thinned.numel(), (thinned == 0).flatten()
    assert torch.all((thinned == 0) | torch.isclose(thinned, torch.tensor(1 / (1 - p))))
    for rows in (dropped, dropped[: n // 2], dropped[n // 2 :]):
        assert abs(float(rows.sum()) - len(rows) * p) < 5 * (len(rows) * p * (1 - p)) ** 0.5
    both = float((dropped[1:] & dropped[:-1]).sum())  # neighbours do not know of each other
    assert abs(both - n * p * p) < 6 * (n * p * p) ** 0.5 + 6
    assert torch.equal(thinned, kind(p, seed=4).thin(torch.ones(400, 500)))
    assert not torch.equal(thinned, kind(p, seed=5).thin(torch.ones(400, 500)))


@pytest.mark.parametrize("drop", [Whole(), Places(0.3, 5), Mask(0.3, 5)])
def test_what_flows_back_through_dropout(drop):
    x_TD = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    A_RD, dh_TR = torch.randn(4, 8, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    mask_TD = drop.thin(torch.ones_like(x_TD.detach()))
    (dx_TD,) = torch.autograd.grad((x_TD * mask_TD) @ A_RD.T, x_TD, dh_TR)
    before_TD = torch.randn(9, 8, dtype=torch.float64)
    after_TD = before_TD.clone()
    drop.add(after_TD, dh_TR, A_RD)
    torch.testing.assert_close(after_TD, before_TD + dx_TD)
    # One row that a model handed on with its axes exchanged, as recurrent layers do.
    torch.testing.assert_close(drop.thin(x_TD.detach().T.contiguous().T), x_TD.detach() * mask_TD)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_mask_drops_from_every_kind_of_x_in_one_pass_and_one_byte_an_element(dtype):
    """As a GPU has it. Tensors that a model cut or turned, and an expert without tokens, are x as well."""
    x_TD = torch.randn(30, 40, dtype=dtype)
    for each_TD in (x_TD, x_TD.T, x_TD[:, ::2], x_TD[None].transpose(0, 1), x_TD[:0]):
        with Made() as made:
            thinned_TD = Mask(0.3, 5).thin(each_TD)
        assert made.nbytes == each_TD.numel() * (1 + dtype.itemsize)
        mask_TD = Mask(0.3, 5).thin(torch.ones(each_TD.shape, dtype=torch.float64))
        assert thinned_TD.dtype is dtype
        torch.testing.assert_close(thinned_TD, (each_TD.double() * mask_TD).to(dtype))


class Made(TorchDispatchMode):
    """Bytes of all new tensors."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.storages[made.untyped_storage().data_ptr()] = made.untyped_storage()
        return made

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


# ---- what is kept


def saved_bytes(run, *left_out: torch.Tensor) -> int:
    known = {t.untyped_storage().data_ptr() for t in left_out}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    del kept
    return sum(storage.nbytes() for pointer, storage in seen.items() if pointer not in known)


@pytest.mark.parametrize("p", [0.0, 0.05])
def test_a_gated_linear_keeps_x_and_its_low_rank_image(p):
    layer = FusedGatedLinear(
        nn.Linear(512, 256, bias=False).requires_grad_(False),
        LowRank(512, 256, r=8, num_experts=8, dropout=p),
        build({"kind": "topk"}, 512, 8),
    )
    x_TD = torch.randn(64, 512, requires_grad=True)
    kept = saved_bytes(lambda: layer(x_TD), *layer.parameters())
    assert kept / 64 <= 4 * (512 + 64) + 80  # x and A x; the rest is the gate's: a few numbers for each expert


def test_the_lean_form_keeps_less():
    kept = {}
    for compute in Compute:
        model, _ = adapted("mixlora", compute, torch.float32, lora_dropout=0.0)
        block, x_TD = model.model.layers[0].mlp, torch.randn(64, 32, requires_grad=True)
        kept[compute] = saved_bytes(lambda block=block, x_TD=x_TD: block(x_TD), *model.parameters())
    assert kept[Compute.lean] < kept[Compute.fast] < kept[Compute.eager]


# ---- falling back


class OtherWeight(nn.Parameter):
    """What a quantised or sharded weight is: its numbers are not those that a product needs."""


class OtherLinear(nn.Linear):
    """What a quantised linear is: it alone knows what to do with its weight."""


def listen(linear: nn.Linear, kind: str) -> None:
    getattr(linear, f"register_{kind}_hook")(lambda module, *seen: None)


def exchange(linear: nn.Linear) -> None:
    linear.forward = functools.partial(nn.Linear.forward, linear)  # as accelerate does, to bring weights from elsewhere


HINDRANCES = {
    "forward hook": lambda linear: listen(linear, "forward"),
    "forward pre hook": lambda linear: listen(linear, "forward_pre"),
    "backward hook": lambda linear: listen(linear, "full_backward"),
    "backward pre hook": lambda linear: listen(linear, "full_backward_pre"),
    "exchanged forward": exchange,
    "computed weight": lambda linear: parametrize.register_parametrization(linear, "weight", nn.Identity()),
    "other weight": lambda linear: setattr(linear, "weight", OtherWeight(linear.weight.data)),
    "other linear": lambda linear: setattr(linear, "__class__", OtherLinear),
}


@pytest.mark.parametrize("name", ["lora", "mola", "mixlora"])
@pytest.mark.parametrize("hindrance", HINDRANCES)
def test_where_a_weight_cannot_be_read_the_plain_equation_runs(hindrance, name):
    """For that wrapper alone; outputs and gradients stay those of the plain equation everywhere."""
    slow, slow_adapter = adapted(name, Compute.eager, lora_dropout=0.0)
    model = llama(torch.float64)
    HINDRANCES[hindrance](model.get_submodule("model.layers.1.mlp.up_proj"))
    adapter = attach(model, method(name, Compute.fast, lora_dropout=0.0))
    assert paths(model)["eager"] == 1
    with torch.no_grad():
        for own, other in zip(adapter.values(), slow_adapter.values(), strict=True):
            own.copy_(other)
    assert far(model(IDS).logits, slow(IDS).logits) < 1e-10
    expected = gradients(slow, slow_adapter)
    for found, want in zip(gradients(model, adapter).values(), expected.values(), strict=True):
        assert far(found, want) < 1e-10


@pytest.mark.parametrize("place", ["self_attn.k_proj", "mlp.up_proj"])
@pytest.mark.parametrize("name", ["lora", "mola", "mixlora"])
def test_a_linear_that_is_hooked_after_attach_is_heard(name, place):
    """Also one that another would have computed along with its own."""

    def hooked(compute: Compute):
        model, adapter = adapted(name, compute, lora_dropout=0.0)
        (base,) = (m for key, m in model.named_modules() if "layers.1" in key and last(key) == place)
        base.register_forward_hook(lambda module, given, y: 2 * y)
        return model, adapter

    def last(key: str) -> str:
        return ".".join([part for part in key.split(".") if part != "base_layer"][-2:]) if is_base(key) else ""

    def is_base(key: str) -> bool:
        return "base_layer" in key.split(".")

    model, adapter = hooked(Compute.fast)
    slow, slow_adapter = hooked(Compute.eager)
    assert far(model(IDS).logits, slow(IDS).logits) < 1e-10
    expected = gradients(slow, slow_adapter)
    for found, want in zip(gradients(model, adapter).values(), expected.values(), strict=True):
        assert far(found, want) < 1e-10


@pytest.mark.parametrize("compute", BY_HAND)
@pytest.mark.parametrize("name", METHODS)
def test_base_weights_that_train_once_more_after_attach_have_their_gradients(name, compute):
    found = []
    for each in (compute, Compute.eager):
        model, _ = adapted(name, each, lora_dropout=0.0)
        model.requires_grad_(True)
        found.append(gradients(model, dict(model.named_parameters())))
    for parameter, want in found[1].items():
        assert far(found[0][parameter], want) < 1e-10, parameter


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("gate", [None, {"kind": "topk"}])
def test_a_bias_of_the_base_that_trains_has_its_gradient(gate, compiling, monkeypatch):
    """Beside linears that are computed along with its own, and where a graph is made."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    layers = as_siblings(three(gate))
    bias = layers[1].base_layer.bias.requires_grad_()
    sum(layer(torch.randn(T, D, dtype=torch.float64)).sum() for layer in layers).backward()
    torch.testing.assert_close(bias.grad, torch.full_like(bias, T))


def test_what_another_thread_computes_ahead_is_not_taken_for_ones_own(monkeypatch):
    """It may come at any time: here while the second of three linears asks for its part."""
    apart = three({"kind": "topk"})
    layers, others = as_siblings(apart), [torch.randn(T, D, dtype=torch.float64)]
    x, original = torch.randn(T, D, dtype=torch.float64), modules.state

    def interrupted(x_TD: torch.Tensor):
        if others and x_TD is x and layers[0].ahead.kept is not None:
            layers[0](others.pop())
        return original(x_TD)

    monkeypatch.setattr(modules, "state", interrupted)
    found = [layer(x) for layer in layers]
    assert not others
    for y, layer in zip(found, apart, strict=True):
        torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_that_need_a_scale_are_not_read(dtype):
    linear = nn.Linear(8, 8, bias=False).requires_grad_(False)
    assert targets.readable(linear)
    linear.weight = nn.Parameter(linear.weight.to(dtype), requires_grad=False)
    assert not targets.readable(linear)
    assert not targets.readable(nn.Linear(8, 8, device="meta"))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("name", METHODS)
def test_what_is_said_of_compiled_layers_is_what_their_forward_does(name, p, monkeypatch):
    """A wrapper that is being compiled leaves to the plain equation what no graph can hold."""
    model, _ = adapted(name, Compute.fast, torch.float32, lora_dropout=p)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    by_hand, apply = [], modules.Project.apply
    monkeypatch.setattr(modules.Project, "apply", lambda *parts: by_hand.append(parts) or apply(*parts))
    model.train()(IDS)
    said = paths(model, set(model.modules()))
    assert sum(len(drops) for _, drops, *_ in by_hand) == said.get("fused", 0)  # those that read one input in one call
    assert "fast" not in said
    assert "eager" not in paths(model)


@pytest.mark.parametrize("name", METHODS)
def test_checkpointing_changes_no_gradient(name):
    """Recomputation draws the same dropout again."""
    model, adapter = adapted(name, Compute.fast, torch.float64, lora_dropout=0.2)
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for each in (model, other):
        each.train()
        torch.manual_seed(5)
        each(IDS).logits.square().mean().backward()
    others = dict(other.named_parameters())
    for tensor_name, tensor in adapter.items():
        if tensor.requires_grad:
            assert torch.equal(tensor.grad, others[tensor_name].grad), tensor_name


# ---- half precision


@pytest.mark.parametrize("native", [True, False])
def test_routing_on_a_bfloat16_base_is_the_float32_routers(native, monkeypatch):
    """Exactly, whether or not products are computed in float32."""
    monkeypatch.setattr(fused, "native", lambda dtype: native)
    torch.manual_seed(0)
    base = nn.Linear(256, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer = FusedGatedLinear(base, LowRank(256, 64, r=8, num_experts=8), build({"kind": "topk"}, 256, 8))
    x_TD = torch.randn(20000, 256).bfloat16().requires_grad_()
    y_TO = layer(x_TD)
    assert y_TO.dtype is torch.bfloat16
    precise_TE = x_TD.detach().double() @ layer.gate.router.weight.detach().double().T
    expected_TE = torch.zeros(20000, 8, dtype=torch.bool).scatter(1, precise_TE.topk(2, -1).indices, True)
    same = (layer.gate.routing.chosen_TE == expected_TE).all(-1)
    assert float(same.double().mean()) >= 0.9999
    y_TO.float().square().mean().backward()
    assert layer.gate.router.weight.grad.dtype is torch.float32


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_a_bfloat16_base_trains_as_the_plain_equation_does(name, native, monkeypatch):
    for module in (fused, experts):
        monkeypatch.setattr(module, "product_dtype", (lambda x: x.dtype) if native else (lambda x: torch.float32))
    model, adapter = adapted(name, Compute.fast, torch.bfloat16, lora_dropout=0.0)
    slow, slow_adapter = adapted(name, Compute.eager, torch.bfloat16, lora_dropout=0.0)
    x_TD, dy_TD = torch.randn(2, 200, 32).bfloat16()
    for each in (model, slow):
        each.y_TD = each.model.layers[0].mlp(x_TD)
        each.y_TD.backward(dy_TD)
    # A token may pick another expert where what reaches its router was rounded another way.
    errors_T = (model.y_TD - slow.y_TD).norm(dim=-1) / slow.y_TD.norm(dim=-1)
    assert float(errors_T.detach().float().quantile(0.9)) < 0.03
    for tensor_name, tensor in adapter.items():
        if ".layers.0.mlp." in tensor_name and tensor.requires_grad:
            assert far(tensor.grad, slow_adapter[tensor_name].grad) < 0.1, tensor_name


def test_a_float32_router_is_the_sum_of_three_bfloat16_pieces():
    """On a GPU the router's product takes these in place of a float32 copy of x (`fused.widened`)."""
    W_ED = torch.randn(8, 64) * torch.logspace(-8, 8, 64)
    parts = fused.pieces(W_ED, torch.bfloat16, 3)
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert torch.equal(sum(part.float() for part in parts), W_ED)
    assert not torch.equal(sum(part.float() for part in parts[:2]), W_ED)


def test_one_product_for_a_and_a_float32_router_over_bfloat16(monkeypatch):
    """The path of a GPU, with a stand-in for its product: no CPU multiplies bfloat16 into float32."""
    monkeypatch.setattr(torch, "mm", lambda x, W, *, out_dtype: x.to(out_dtype) @ W.to(out_dtype))
    x_TD, router_ED = torch.randn(50, 64).bfloat16(), torch.randn(8, 64)
    As = [torch.randn(r, 64).bfloat16() for r in (6, 4)]
    h_TN, z_TE = fused.widened(x_TD, As, [router_ED])
    for h_TR, A in zip(h_TN.split([6, 4], dim=-1), As, strict=True):
        assert h_TR.dtype is torch.bfloat16
        torch.testing.assert_close(h_TR, (x_TD.float() @ A.float().T).bfloat16())
    torch.testing.assert_close(z_TE, x_TD.float() @ router_ED.T)
