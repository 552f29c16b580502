"""Parity with official code: ../shared/golden holds layers that the published implementations computed in float32.

Every case runs through the modules that `attach` builds from configs/method with overrides, in float32 and float64,
by every path of `method.compute`. Tolerances are those of the golden README.
"""

import json
from pathlib import Path

import pytest
import torch
from built import composed, computes, load_of
from safetensors import safe_open
from torch import Tensor, nn

from mixlora import gates, losses
from mixlora.adapters.attach import adapted, attach, paths
from mixlora.config.schema import Compute, Config, Scope

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
TOLERANCE = {torch.float64: 5e-6, torch.float32: 1e-5}


def variants(method: str) -> pytest.MarkDecorator:
    """Both dtypes, by every path of the method."""
    each = [(dtype, compute) for dtype in TOLERANCE for compute in computes(method)]
    ids = [f"{str(dtype).removeprefix('torch.')}-{compute}" for dtype, compute in each]
    return pytest.mark.parametrize(("dtype", "compute"), each, ids=ids)


class Case:
    """One case of one file: its tensors by name, and its description."""

    def __init__(self, method: str, case: str, dtype: torch.dtype):
        with safe_open(GOLDEN / f"{method}.safetensors", "pt") as file:
            self.about = json.loads(file.metadata()[case])
            own = [key for key in file.keys() if key.startswith(f"{case}.")]  # noqa: SIM118
            self.tensors = {key.removeprefix(f"{case}."): file.get_tensor(key) for key in own}
        self.dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].to(self.dtype)

    @property
    def mask(self) -> Tensor:
        return self.tensors["mask"].bool()

    def same(self, found: Tensor, name: str) -> None:
        """Within the tolerance of the README, relative to the largest entry."""
        want, found = self.tensors[name].double(), found.detach().double().reshape(self.tensors[name].shape)
        worst = float((found - want).abs().max())
        print(f"{self.about['method']} {self.about['case']} {name} {worst:.1e}")
        assert worst <= TOLERANCE[self.dtype] * max(1.0, float(want.abs().max())), f"{name} differs by {worst:.1e}"


def cases(method: str) -> list:
    """Every case of the file, found in it; one skipped test where there are no files."""
    path = GOLDEN / f"{method}.safetensors"
    if not path.is_file():
        return [pytest.param("none", marks=pytest.mark.skip(reason="needs ../shared/golden"))]
    with safe_open(path, "pt") as file:
        names = json.loads(file.metadata()["cases"])
        dora = [name for name in names if json.loads(file.metadata()[name]).get("use_dora")]
    skip = pytest.mark.skip(reason="its experts are DoRA, which no method here has")
    return [pytest.param(name, marks=skip if name in dora else ()) for name in names]


def blocks(B_EOr: Tensor) -> Tensor:
    """Golden files keep one B an expert, [E, O, r]; ours stand side by side, [O, E r]."""
    return B_EOr if B_EOr.dim() == 2 else B_EOr.permute(1, 0, 2).flatten(1)


def unblocked(B_OR: Tensor, like: Tensor) -> Tensor:
    return B_OR if like.dim() == 2 else B_OR.unflatten(1, (like.shape[0], -1)).permute(1, 0, 2)


def attached(config: Config, model: nn.Module) -> nn.Module:
    attach(model, config.method, config.model)
    method = config.method
    fused = method.scope is Scope.linear and method.compute is Compute.fast
    assert set(paths(model)) == {"fused" if fused else method.compute.value}
    return model.eval()


def linears(case: Case, sites: dict[str, list[str]]) -> nn.Module:
    """`layers.<i>.<site>` is a linear with the golden W."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in sites)
    for layer, names in zip(model.layers, sites.values(), strict=True):
        for name in names:
            W_OD = case[f"{name}W"]
            linear = nn.Linear(W_OD.shape[1], W_OD.shape[0], bias=False, dtype=case.dtype)
            linear.load_state_dict({"weight": W_OD})
            layer.add_module(name.replace(".", "") or "linear", linear)
    return model


def overrides(case: Case, compute: str, *more: str) -> list[str]:
    about, dtype = case.about, str(case.dtype).removeprefix("torch.")
    found = [f"method.compute={compute}", f"method.adapter_dtype={dtype}", f"method.lora_alpha={about['alpha']}"]
    return [*found, *more]


def fill(wrapper: nn.Module, case: Case, site: str) -> None:
    """The golden parameters into one adapted linear."""
    with torch.no_grad():
        wrapper.delta.A_RD.copy_(case[f"{site}A"].reshape(wrapper.delta.A_RD.shape))
        wrapper.delta.B_RO.T.copy_(blocks(case[f"{site}B"]))
        if f"{site}router" in case.tensors:
            wrapper.gate.router.weight.copy_(case[f"{site}router"])


def check(wrapper: nn.Module, case: Case, site: str, y: Tensor, x: Tensor) -> None:
    """Output, and the gradients of sum(y * v)."""
    case.same(y, f"{site}y")
    wrapper.zero_grad()
    x.grad = None
    (y * case[f"{site}v"]).sum().backward(retain_graph=True)
    case.same(x.grad, f"{site}grad_x")
    case.same(wrapper.delta.A_RD.grad, f"{site}grad_A")
    case.same(unblocked(wrapper.delta.B_RO.grad.T, case.tensors[f"{site}B"]), f"{site}grad_B")
    if f"{site}router" in case.tensors:
        case.same(wrapper.gate.router.weight.grad, f"{site}grad_router")


def check_aux(value: Tensor, case: Case, name: str, inputs: dict[str, Tensor], routers: dict[str, Tensor]) -> None:
    """An auxiliary value and its gradient in every router and input."""
    case.same(value, name)
    leaves = [*inputs.values(), *routers.values()]
    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    for (site, kind), gradient in zip(
        [*((s, "x") for s in inputs), *((s, "router") for s in routers)], found, strict=True
    ):
        if f"{site}grad_{name}_{kind}" in case.tensors:
            case.same(gradient, f"{site}grad_{name}_{kind}")


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


# ---- one linear


@variants("lora")
@pytest.mark.parametrize("name", cases("lora"))
def test_lora(name, dtype, compute):
    case = Case("lora", name, dtype)
    scale = {"alpha/r": "alpha_over_r", "alpha/sqrt(r)": "alpha_over_sqrt_r"}[case.about["scaling_rule"]]
    config = composed("lora", *overrides(case, compute, f"method.r={case.about['r']}", f"method.scale={scale}"))
    (wrapper,) = adapted(attached(config, linears(case, {"l0": [""]}))).values()
    fill(wrapper, case, "")
    x = leaf(case["x"])
    check(wrapper, case, "", wrapper(x), x)


@variants("hydralora")
@pytest.mark.parametrize("name", cases("hydralora"))
def test_hydralora(name, dtype, compute):
    case = Case("hydralora", name, dtype)
    sizes = (f"method.r={case.about['r']}", f"method.num_experts={case.about['E']}")
    model = attached(composed("hydralora", *overrides(case, compute, *sizes)), linears(case, {"l0": [""]}))
    (wrapper,) = adapted(model).values()
    fill(wrapper, case, "")
    x = leaf(case["x"])
    y = wrapper(x)
    (routing,) = gates.pop_routings(model).values()
    case.same(routing.probs_TE, "probs")
    case.same(routing.weights_TE, "gates")
    check(wrapper, case, "", y, x)


@variants("smora")
@pytest.mark.parametrize("name", cases("smora"))
def test_smora(name, dtype, compute):
    """The bias too, moved as the release does: after every forward, padding counted."""
    case = Case("smora", name, dtype)
    about = case.about
    sizes = [f"method.num_experts={about['r']}", f"method.top_k={about['k']}"]
    gate = [
        f"method.gate.bias_rate={about['bias_update_rate']}",
        f"method.gate.rank_partition={about['rank_partition']}",
    ]
    model = attached(composed("smora", *overrides(case, compute, *sizes, *gate)), linears(case, {"l0": [""]}))
    (wrapper,) = adapted(model).values()
    fill(wrapper, case, "")
    wrapper.gate.bias_E.copy_(case["bias"])
    x, everything = leaf(case["x"]), torch.ones_like(case.mask)
    y = wrapper(x)
    (routing,) = gates.pop_routings(model).values()
    case.same(routing.probs_TE, "probs")
    case.same(routing.probs_TE + wrapper.gate.bias_E, "scores_biased")
    case.same(routing.weights_TE, "gates")
    assert torch.equal(routing.chosen_TE.nonzero()[:, -1].view(2, 5, -1), case.tensors["selected"].sort(-1).values)
    check(wrapper, case, "", y, x)
    case.same(load_of(routing, everything), "counts")
    wrapper.gate.after_step(load_of(routing, everything))
    case.same(wrapper.gate.bias_E, "bias_after")
    case.same(wrapper(case["x"]), "y_second_train_forward")
    (routing,) = gates.pop_routings(model).values()
    wrapper.gate.after_step(load_of(routing, everything))
    case.same(wrapper.gate.bias_E, "bias_after_second")


@variants("dynmole")
@pytest.mark.parametrize("name", cases("dynmole"))
def test_dynmole(name, dtype, compute):
    """With the auxiliary losses that the method brings; the release counts padding in the entropy term."""
    case = Case("dynmole", name, dtype)
    about = case.about
    sizes = [f"method.num_experts={about['E']}", f"method.r={about['r']}", f"method.top_k={about['keep_top_k']}"]
    gate = [f"method.gate.{key}={about[key]}" for key in ("q", "entropy_threshold", "entropy_eps", "top_p")]
    options = ["method.target_modules=all-linear", "aux_loss.tsallis.count_padding=true"]
    config = composed("dynmole", *overrides(case, compute, *sizes, *gate, *options))
    model = attached(config, linears(case, {"l0": [""]}))
    (wrapper,) = adapted(model).values()
    fill(wrapper, case, "")
    x = leaf(case["x"])
    y = wrapper(x)
    routings = gates.pop_routings(model)
    (routing,) = routings.values()
    case.same(routing.probs_TE, "probs")
    case.same(routing.weights_TE, "gates")
    assert routing.chosen_TE.sum(-1).flatten().tolist() == about["experts_per_token"][0]
    case.same(gates.tsallis_entropy(routing.probs_TE, about["q"], eps=about["entropy_eps"]), "entropy")
    check(wrapper, case, "", y, x)
    aux = losses.build(config.aux_loss)
    values = {key: loss(routings, case.mask) for key, loss in aux.items()}
    leaves = ({"": x}, {"": wrapper.gate.router.weight})
    check_aux(values["tsallis"], case, "aux_entropy", *leaves)
    check_aux(values["load_balance"], case, "aux_balance", *leaves)
    check_aux(aux["load_balance"](routings, torch.ones_like(case.mask)), case, "aux_balance_nomask", *leaves)
    check_aux(sum(aux[key].coef * value for key, value in values.items()), case, "aux_total", *leaves)


# ---- several linears


@variants("mola")
@pytest.mark.parametrize("name", cases("mola"))
def test_mola(name, dtype, compute):
    """A number of experts, a rank and a k for each layer; the loss of its own code, or of MoE-PEFT's for one site."""
    case = Case("mola", name, dtype)
    about = case.about
    if "layers" in about:
        modules = range(about["modules_per_layer"])
        sites = {f"l{i}": [f"l{i}m{j}." for j in modules] for i in range(about["layers"])}
        keys, choice = ("experts_per_layer", "r_per_layer", "k_per_layer"), "load_balance_layer_sum"
    else:
        sites, keys, choice = {"l0": [""]}, ("E", "r", "k"), "load_balance_all_layers"
    sizes = [f"method.{f}={about[key]}" for f, key in zip(("num_experts", "r", "top_k"), keys, strict=True)]
    coefficient = f"aux_loss.load_balance.coef={about['router_aux_loss_coef']}"
    config = composed("mola", f"aux_loss={choice}", *overrides(case, compute, *sizes, coefficient))
    model = attached(config, linears(case, sites))
    inputs, outputs, routers = {}, {}, {}
    named = [site for layer in sites.values() for site in layer]
    wrappers = dict(zip(named, adapted(model).values(), strict=True))
    for site, wrapper in wrappers.items():
        fill(wrapper, case, site)
        inputs[site], routers[site] = leaf(case[f"{site}x"]), wrapper.gate.router.weight
        outputs[site] = wrapper(inputs[site])
    routings = gates.pop_routings(model)
    for site, routing in zip(named, routings.values(), strict=True):
        case.same(routing.probs_TE, f"{site}probs")
        case.same(routing.weights_TE, f"{site}gates")
        check(wrappers[site], case, site, outputs[site], inputs[site])
    loss = losses.build(config.aux_loss)["load_balance"]
    check_aux(loss(routings, case.mask), case, "aux_balance", inputs, routers)
    case.same(loss.coef * loss(routings, case.mask), "aux_total")
    if "aux_balance_nomask" in case.tensors:
        value = loss(routings, torch.ones_like(case.mask))
        check_aux(value, case, "aux_balance_nomask", inputs, routers)
    if "aux_balance_per_layer" in case.tensors:
        layers = [{k: r for k, r in routings.items() if k.startswith(f"layers.{i}.")} for i in range(len(sites))]
        case.same(torch.stack([loss(layer, case.mask) for layer in layers]), "aux_balance_per_layer")


# ---- a feed-forward block


class Block(nn.Module):
    """W2 (silu(W1 x) ⊙ W3 x)."""

    def __init__(self, case: Case, site: str):
        super().__init__()
        self.act_fn = nn.SiLU()
        for part, key in PARTS.items():
            F_out, F_in = case[f"{site}{key}"].shape
            linear = nn.Linear(F_in, F_out, bias=False, dtype=case.dtype)
            linear.load_state_dict({"weight": case[f"{site}{key}"]})
            self.add_module(part, linear)


PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@variants("mixlora")
@pytest.mark.parametrize("name", cases("mixlora"))
def test_mixlora(name, dtype, compute):
    case = Case("mixlora", name, dtype)
    about = case.about
    sites = [f"s{i}." for i in range(about["sites"])] if "sites" in about else [""]
    sizes = [f"method.num_experts={about['E']}", f"method.r={about['r']}", f"method.top_k={about['k']}"]
    options = ["method.plain_modules=null", f"aux_loss.load_balance.coef={about['router_aux_loss_coef']}"]
    config = composed("mixlora", "aux_loss=load_balance_all_layers", *overrides(case, compute, *sizes, *options))
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"mlp": Block(case, site)}) for site in sites)
    wrappers = dict(zip(sites, adapted(attached(config, model)).values(), strict=True))
    inputs, outputs, routers = {}, {}, {}
    for site, wrapper in wrappers.items():
        with torch.no_grad():
            wrapper.gate.router.weight.copy_(case[f"{site}router"])
            for part, key in PARTS.items():
                delta = getattr(wrapper, part)
                delta.A_RD.copy_(case[f"{site}A_{key}"].flatten(0, 1))
                delta.B_RO.T.copy_(blocks(case[f"{site}B_{key}"]))
        inputs[site], routers[site] = leaf(case[f"{site}x"]), wrapper.gate.router.weight
        outputs[site] = wrapper(inputs[site])
    routings = gates.pop_routings(model)
    for (site, wrapper), routing in zip(wrappers.items(), routings.values(), strict=True):
        case.same(routing.probs_TE, f"{site}probs")
        case.same(routing.weights_TE, f"{site}gates")
        case.same(outputs[site], f"{site}y")
        (outputs[site] * case[f"{site}v"]).sum().backward(retain_graph=True)
        case.same(inputs[site].grad, f"{site}grad_x")
        case.same(wrapper.gate.router.weight.grad, f"{site}grad_router")
        for part, key in PARTS.items():
            delta = getattr(wrapper, part)
            case.same(delta.A_RD.grad, f"{site}grad_A_{key}")
            case.same(unblocked(delta.B_RO.grad.T, case.tensors[f"{site}B_{key}"]), f"{site}grad_B_{key}")
    loss = losses.build(config.aux_loss)["load_balance"]
    check_aux(loss(routings, case.mask), case, "aux_balance", inputs, routers)
    check_aux(loss(routings, torch.ones_like(case.mask)), case, "aux_balance_nomask", inputs, routers)
    case.same(loss.coef * loss(routings, case.mask), "aux_total")
