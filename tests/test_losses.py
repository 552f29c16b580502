"""Auxiliary losses: pure functions of what the gates decided and of which tokens are real."""

import math

import pytest
import torch
from built import gate_of

from mixlora import losses
from mixlora.errors import ConfigError
from mixlora.gates import Routing

MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)


def routing(logits, k: int) -> Routing:
    """Top-k of a softmax, renormalised, for [B, S, E] logits."""
    probs = logits.softmax(-1)
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, probs.topk(k).indices, True)
    weights = probs * chosen / (probs * chosen).sum(-1, keepdim=True)
    return Routing(logits, weights, chosen, lambda z: z.softmax(-1))


def random(experts: int = 4, k: int = 2, seed: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    return routing(torch.randn(2, 4, experts, generator=generator, dtype=torch.float64), k)


def turned(experts: int, k: int) -> Routing:
    """Token t prefers experts t, t+1, ... in turn: every expert is chosen equally often."""
    row = torch.linspace(2, -2, experts, dtype=torch.float64)
    return routing(torch.stack([row.roll(t) for t in range(2 * experts)]).view(2, experts, experts), k)


def loss(name: str, **options):
    return losses.build({name: options})[name]


ALL = [
    *({"over": o, "reduce": r, "share": s} for o in losses.Over for r in losses.Reduce for s in losses.Share),
]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_a_balanced_router_costs_one_whatever_k_is(k):
    found, everything = {"layers.0.gate": turned(4, k)}, torch.ones(2, 4, dtype=torch.bool)
    assert loss("load_balance")(found, everything).item() == pytest.approx(1)
    assert loss("load_balance", share="slots")(found, everything).item() == pytest.approx(k)
    assert loss("load_balance", share="argmax")(found, everything).item() == pytest.approx(1)
    assert loss("load_balance", share="soft")(found, everything).item() == pytest.approx(1)


def test_a_collapsed_router_costs_as_much_as_it_has_experts():
    logits = torch.zeros(2, 4, 6, dtype=torch.float64)
    logits[..., 2] = 50
    assert loss("load_balance")({"layers.0.gate": routing(logits, 1)}, MASK).item() == pytest.approx(6)


def test_the_definition_written_out():
    r = random()
    p, c, w = r.probs_TE[MASK], r.chosen_TE[MASK].double(), r.weights_TE[MASK]
    first = torch.nn.functional.one_hot(p.argmax(-1), 4).double()
    for share, f in {"assignments": c / 2, "slots": c, "argmax": first, "soft": w}.items():
        want = 4 * (f.mean(0) * p.mean(0)).sum()
        torch.testing.assert_close(loss("load_balance", share=share)({"layers.0.gate": r}, MASK), want)


def test_scores_of_ranks_that_share_an_output_are_those_of_the_gate():
    """Three logits for twelve experts, and sigmoids: nothing that a softmax over the logits would be taken for."""
    gate = gate_of({"kind": "balanced", "rank_partition": 4}, 5, 12, 4, dtype=torch.float64)
    found, want = {}, []
    for name in ("layers.0.gate", "layers.1.gate"):
        found[name] = gate.route(torch.randn(2, 4, 3, dtype=torch.float64), **gate.state())
        p = found[name].logits_TS.sigmoid().repeat_interleave(4, dim=-1)[MASK]
        p = p / p.sum(-1, keepdim=True)
        want.append(12 * (found[name].chosen_TE[MASK].double().mean(0) / 4 * p.mean(0)).sum())
    torch.testing.assert_close(loss("load_balance")(found, MASK), sum(want) / 2)


@pytest.mark.parametrize("gate", [{"score": "sigmoid"}, {"score": "softmax", "rank_partition": 4}], ids=str)
def test_scores_that_do_not_sum_to_one_are_parts_of_their_sum_to_a_loss(gate):
    """Balanced is 1 and undecided is 1, as for every other gate: one definition for all."""
    made = gate_of({"kind": "balanced", **gate}, 5, 12, 4, dtype=torch.float64)
    alike = {
        "layers.0.gate": made.route(torch.zeros(2, 4, made.router.out_features, dtype=torch.float64), **made.state())
    }
    assert float(loss("load_balance")(alike, MASK)) == pytest.approx(1)
    assert float(loss("tsallis", eps=0.0)(alike, MASK)) == pytest.approx(1)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_padding_never_counts(name):
    """Whatever a padded position holds, value and gradient stay; with count_padding they do not."""
    found, other = random(), random()
    for r in (found, other):
        r.logits_TS.requires_grad_()
    with torch.no_grad():
        other.logits_TS[0, 0] = torch.tensor([9.0, -9.0, 3.0, 1.0])
    values, gradients = [], []
    for r in (found, other):
        again = routing(r.logits_TS, 2)
        value = loss(name)({"layers.0.gate": again}, MASK)
        gradients.append(torch.autograd.grad(value, r.logits_TS)[0])
        values.append(value)
    assert torch.equal(*values)
    assert torch.equal(*gradients)
    assert gradients[0][0, 0].abs().max() == 0
    assert gradients[0][1].abs().min() > 0
    if name != "router_z":
        counted = loss(name, count_padding=True)
        assert counted({"a": routing(found.logits_TS, 2)}, MASK) != counted({"a": routing(other.logits_TS, 2)}, MASK)


@pytest.mark.parametrize(
    ("name", "options"), [*(("load_balance", o) for o in ALL), ("tsallis", {}), ("router_z", {})], ids=str
)
def test_rows_that_lie_side_by_side_are_the_same_tokens(name, options):
    """As in OPT's blocks and Qwen2-MoE's shared expert, beside routers that read [B, S, D]."""
    one, other = random(seed=1), random(seed=2)
    flat = Routing(*(x.flatten(0, 1) for x in (other.logits_TS, other.weights_TE, other.chosen_TE)), other.score)
    some, others = ({"layers.0.a": one, "layers.0.b": r} for r in (other, flat))
    torch.testing.assert_close(loss(name, **options)(others, MASK), loss(name, **options)(some, MASK))


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_routers_are_taken_alone_by_layer_or_all_together(reduce):
    names = ["model.layers.0.q_proj.gate", "model.layers.0.k_proj.gate", "model.layers.1.q_proj.gate"]
    found = {name: random(seed=i) for i, name in enumerate(names)}

    def joined(*group: str) -> torch.Tensor:
        p = torch.cat([found[n].probs_TE[MASK] for n in group])
        c = torch.cat([found[n].chosen_TE[MASK].double() for n in group])
        return 4 * (c.mean(0) / 2 * p.mean(0)).sum()

    groups = {"router": [[n] for n in names], "layer": [names[:2], names[2:]], "model": [names]}
    for over, parts in groups.items():
        values = torch.stack([joined(*part) for part in parts])
        want = values.sum() if reduce == "sum" else values.mean()
        torch.testing.assert_close(loss("load_balance", over=over, reduce=reduce)(found, MASK), want)


def test_routers_of_different_size_go_together_only_where_they_can():
    found = {"layers.0.a.gate": random(2), "layers.0.b.gate": random(2), "layers.1.a.gate": random(4)}
    for over in ("router", "layer"):
        assert torch.isfinite(loss("load_balance", over=over)(found, MASK))
    with pytest.raises(ConfigError, match=r"over=model puts routers of \[2, 4\] experts together"):
        loss("load_balance", over="model")(found, MASK)


def test_a_collapse_hides_behind_the_opposite_collapse_only_when_all_routers_are_joined():
    logits = torch.full((2, 4, 2), -20.0, dtype=torch.float64)
    left, right = logits.clone(), logits.clone()
    left[..., 0], right[..., 1] = 20, 20
    found = {"layers.0.gate": routing(left, 1), "layers.1.gate": routing(right, 1)}
    assert loss("load_balance", over="model")(found, MASK).item() == pytest.approx(1)
    assert loss("load_balance")(found, MASK).item() == pytest.approx(2)


@pytest.mark.parametrize("options", ALL, ids=lambda o: "-".join(v.value for v in o.values()))
def test_every_variant_gives_every_router_a_gradient(options):
    logits = [torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    names = ["layers.0.a.gate", "layers.0.b.gate", "layers.1.a.gate"]
    found = {name: routing(z, 2) for name, z in zip(names, logits, strict=True)}
    value = loss("load_balance", **{k: v.value for k, v in options.items()})(found, MASK)
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(value, logits))


def test_entropy_of_a_uniform_router_is_one_and_of_a_sure_one_zero():
    flat, sure = torch.zeros(2, 4, 6, dtype=torch.float64), torch.zeros(2, 4, 6, dtype=torch.float64)
    sure[..., 0] = 100
    for q in (1.0, 1.1, 2.0):
        entropy = loss("tsallis", q=q, eps=0.0)
        assert entropy({"a": routing(flat, 2)}, MASK).item() == pytest.approx(1)
        assert entropy({"a": routing(sure, 2)}, MASK).item() == pytest.approx(0, abs=1e-9)


def test_the_z_loss_is_the_mean_square_of_the_log_partition():
    flat = torch.zeros(2, 4, 6, dtype=torch.float64)
    found = {"a": routing(flat, 2), "b": routing(flat + 1, 2)}
    want = (math.log(6) ** 2 + (math.log(6) + 1) ** 2) / 2
    assert loss("router_z")(found, MASK).item() == pytest.approx(want)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("load_balanse", {}, "Did you mean 'load_balance'"),
        ("load_balance", {"over": "routr"}, "aux_loss.load_balance.over"),
        ("load_balance", {"share": "hard"}, "aux_loss.load_balance.share"),
        ("load_balance", {"reduce": "max"}, "aux_loss.load_balance.reduce"),
        ("load_balance", {"coef": "much"}, "aux_loss.load_balance.coef"),
        ("load_balance", {"coeff": 1}, "Did you mean 'coef'"),
        ("tsallis", {"q": 0}, "aux_loss.tsallis.q must be above 0"),
        ("tsallis", {"eps": -1e-3}, "aux_loss.tsallis.eps must be at least 0"),
        ("router_z", {"q": 2}, "no key 'aux_loss.router_z.q'"),
    ],
)
def test_a_mistake_is_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        losses.build({name: options})


def test_a_sum_over_ranks_has_derivatives_of_every_order(monkeypatch):
    """As if there were three ranks with the same: f(x) = (3 x)^2, and its gradient is summed over them once more."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.data.mul_(3))
    x = torch.tensor(1.0, requires_grad=True)
    (dx,) = torch.autograd.grad(losses.OverRanks.apply(x).square(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx, x)
    assert (dx.item(), ddx.item()) == (18, 18)
