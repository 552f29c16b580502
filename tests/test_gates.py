"""From a token to one weight for each expert: what each kind chooses, what it weighs, and what moves its state."""

import math
from contextlib import nullcontext

import pytest
import torch
from built import gate_of, load_of

from mixlora import gates
from mixlora.config.schema import Method
from mixlora.errors import ConfigError

P = torch.tensor([[0.5, 0.3, 0.1, 0.05, 0.03, 0.02]], dtype=torch.float64)


def routed(probs, top_k=None, **options) -> gates.Routing:
    """The record of a gate whose softmax gives `probs`."""
    gate = gate_of(options, 4, probs.shape[-1], top_k, dtype=torch.float64)
    return gate.route(probs.log())


# ---- entropy


def test_tsallis_entropy_of_known_distributions():
    """N = 6, q = 1.1: the largest raw value, and the share of it that one distribution has."""
    highest = (1 - 6 ** (1 - 1.1)) / (1.1 - 1)
    assert highest == pytest.approx(1.6404119792, abs=1e-10)
    assert gates.tsallis_entropy(P, 1.1).item() == pytest.approx(0.709406, abs=1e-6)
    assert gates.tsallis_entropy(P, 1.1, eps=1e-5).item() == pytest.approx(0.709089, abs=1e-6)


@pytest.mark.parametrize("q", [0.5, 1, 1.1, 2, 3])
@pytest.mark.parametrize("experts", [2, 6, 64])
def test_tsallis_entropy_is_one_at_uniform_and_zero_at_a_point(q, experts):
    uniform = torch.full((experts,), 1 / experts, dtype=torch.float64)
    point = torch.eye(experts, dtype=torch.float64)[0]
    assert gates.tsallis_entropy(uniform, q).item() == pytest.approx(1)
    assert gates.tsallis_entropy(point, q).item() == pytest.approx(0, abs=1e-12)


def test_shannon_is_the_limit_of_tsallis():
    shannon = -(P * P.log()).sum().item() / math.log(6)
    assert gates.tsallis_entropy(P, 1).item() == pytest.approx(shannon)
    assert gates.tsallis_entropy(P, 1 + 1e-6).item() == pytest.approx(shannon, abs=1e-6)


def test_one_expert_has_no_entropy():
    assert gates.tsallis_entropy(torch.ones(3, 1), 1.1).tolist() == [0, 0, 0]


# ---- what is chosen


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_p": 0.75}, 1),  # 0.5 + 0.3 passes 0.75: the second is left out
        ({"top_p": 0.75, "crossing": "include"}, 2),
        ({"top_p": 0.81}, 2),
        ({"top_p": 0.4}, 1),  # even the first passes; one is kept all the same
        ({"top_p": 0.75, "top_k": 2}, 2),
        ({"top_p": 0.75, "top_k": 4}, 4),
        ({"top_p": 0.75, "entropy_threshold": 0.7}, 6),  # H is 0.709: unsure, so every expert
        ({"top_p": 0.75, "entropy_threshold": 0.7093}, 1),  # eps takes H to 0.70909
        ({"top_p": 0.75, "entropy_threshold": 0.7093, "entropy_eps": 0}, 6),
    ],
)
def test_top_p_and_the_fall_back(options, kept):
    found = routed(P, kind="entropy", **options)
    assert found.chosen_TE.sum().item() == kept
    torch.testing.assert_close(found.weights_TE, P * (torch.arange(6) < kept))


def test_a_threshold_of_one_switches_the_fall_back_off():
    uniform = torch.full((1, 6), 1 / 6, dtype=torch.float64)
    assert routed(uniform, 2, kind="entropy").chosen_TE.sum() == 6
    assert routed(uniform, 2, kind="entropy", entropy_threshold=1.0, top_p=0.4).chosen_TE.sum() == 2


@pytest.mark.parametrize("options", [{"kind": "topk"}, {"kind": "entropy", "renormalize": True}])
def test_renormalised_weights_sum_to_one(options):
    assert routed(P, 2, **options).weights_TE.sum().item() == pytest.approx(1)


def test_weights_that_are_not_renormalised_are_the_probabilities():
    found = routed(P, 2, kind="topk", renormalize=False).weights_TE
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.3, 0, 0, 0, 0]], dtype=torch.float64))


@pytest.mark.parametrize("kind", gates.KINDS)
def test_an_expert_that_is_not_chosen_weighs_nothing_and_most_active_bounds_the_rest(kind):
    torch.manual_seed(0)
    gate = gate_of({"kind": kind}, 8, 6, None if kind == "dense" else 2)
    weights_TE = gate(torch.randn(200, 8))
    chosen_TE = gate.routing.chosen_TE
    assert torch.equal(weights_TE != 0, chosen_TE)
    assert chosen_TE.sum(-1).max() <= gate.most_active
    assert weights_TE.dtype == torch.float32
    assert gate(torch.randn(3, 8).bfloat16()).dtype == torch.bfloat16
    assert gate.routing.probs_TE.dtype == torch.float32


def test_scores_are_the_softmax_of_the_logits_in_whichever_order_they_lie():
    """Stacked, those of one expert lie together; value and gradient are the same."""
    gate = gate_of({"kind": "topk"}, 8, 6, 2, dtype=torch.float64)
    logits = {name: torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True) for name in "abc"}
    ((names, stack_LTE),) = gates.alike(logits)
    assert stack_LTE.stride(-1) != 1
    found_LTE, want_LTE = gate.score(stack_LTE), torch.stack([logits[name].softmax(-1) for name in names])
    torch.testing.assert_close(found_LTE, want_LTE)
    by_name = [torch.autograd.grad(p.square().sum(), list(logits.values())) for p in (found_LTE, want_LTE)]
    torch.testing.assert_close(*by_name)


@pytest.mark.parametrize("kind", ["topk", "balanced"])
def test_only_the_chosen_have_a_gradient(kind):
    gate = gate_of({"kind": kind}, 8, 6, 2)
    logits_TS = torch.randn(40, 6, requires_grad=True)
    found = gate.route(logits_TS, **gate.state())
    (gradient_TS,) = torch.autograd.grad((found.weights_TE * torch.randn(40, 6)).sum(), logits_TS)
    assert torch.equal(gradient_TS != 0, found.chosen_TE)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("bias_in_value", [True, False])
def test_balanced_gates_sum_to_k(score, bias_in_value):
    gate = gate_of({"kind": "balanced", "score": score, "bias_in_value": bias_in_value}, 8, 16, 4)
    gate.bias_E.uniform_(0, 0.2)
    torch.testing.assert_close(gate(torch.randn(50, 8)).sum(-1), torch.full((50,), 4.0))


def test_a_bias_decides_the_choice_and_only_if_asked_the_value():
    logits = torch.zeros(1, 4)
    for in_value, want in ((True, [0, 0, 1.2, 0.8]), (False, [0, 0, 1, 1])):
        gate = gate_of({"kind": "balanced", "bias_in_value": in_value}, 4, 4, 2)
        gate.bias_E.copy_(torch.tensor([-0.1, -0.1, 0.25, 0.0]))
        found = gate.route(logits, **gate.state())
        assert found.chosen_TE.tolist() == [[False, False, True, True]]
        torch.testing.assert_close(found.weights_TE, torch.tensor([want], dtype=torch.float32))


def test_ranks_of_one_partition_share_their_score_and_the_router_shrinks():
    gate = gate_of({"kind": "balanced", "rank_partition": 4}, 8, 16, 4)
    assert gate.router.weight.shape == (4, 8)
    gate(torch.randn(5, 8))
    assert torch.equal(gate.routing.probs_TE[:, ::4], gate.routing.probs_TE[:, 3::4])
    assert (gate.routing.chosen_TE.unflatten(-1, (4, 4)).sum(-1) % 4 == 0).all()


# ---- state


def test_a_bias_moves_towards_the_mean_load_by_one_rate():
    gate = gate_of({"kind": "balanced", "bias_rate": 0.5}, 8, 4, 2)
    gate.after_step(torch.tensor([5, 1, 3, 3]))
    assert gate.bias_E.tolist() == [-0.5, 0.5, 0, 0]
    gate.after_step(torch.tensor([2.0, 2.0, 2.0, 2.0], dtype=torch.float64))
    assert gate.bias_E.tolist() == [-0.5, 0.5, 0, 0]


def test_a_bias_stays_one_tensor_where_its_gate_moves_and_a_gate_can_be_made_without_numbers():
    gate = gate_of({"kind": "balanced"}, 8, 4, 2)
    before = gate.bias_E
    assert gate.double().bias_E is before
    assert before.dtype is torch.float64
    assert gate.to("meta").to_empty(device="cpu").bias_E.device.type == "cpu"


def test_moving_the_bias_balances_a_router_that_prefers_one_expert():
    torch.manual_seed(0)
    gate = gate_of({"kind": "balanced", "bias_rate": 0.02}, 8, 8, 2)
    x, mask = torch.randn(500, 8) + 1, torch.ones(500, dtype=torch.bool)
    gate(x)
    before = load_of(gate.routing, mask).double()
    for _ in range(60):
        gate(x)
        gate.after_step(load_of(gate.routing, mask))
    after = load_of(gate.routing, mask).double()
    assert after.std() < 0.3 * before.std()


def test_padding_counts_in_no_load():
    gate = gate_of({"kind": "topk"}, 8, 4, 2)
    gate(torch.randn(3, 5, 8))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)
    assert load_of(gate.routing, mask).sum() == 9 * 2
    assert torch.equal(load_of(gate.routing, mask), gate.routing.chosen_TE[mask].sum(0))


def test_a_record_is_popped_once():
    model = torch.nn.ModuleDict({"a": gate_of({"kind": "topk"}, 8, 4, 2)})
    model["a"](torch.randn(3, 8))
    assert list(gates.pop_routings(model)) == ["a"]
    with pytest.raises(ConfigError, match="gate a did not run"):
        gates.pop_routings(model)


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "top_k", "message"),
    [
        ({"kind": "topkk"}, 2, "Did you mean 'topk'"),
        ({}, 2, "is not a gate"),
        ({"kind": "topk", "renormalise": True}, 2, "Did you mean 'renormalize'"),
        ({"kind": "topk", "renormalize": "perhaps"}, 2, "method.gate.renormalize"),
        ({"kind": "topk", "top_p": 0.5}, 2, "no key 'method.gate.top_p'"),
        ({"kind": "entropy", "crossing": "exlude"}, 2, "method.gate.crossing"),
        ({"kind": "entropy", "q": 0}, 2, "method.gate.q must be above 0"),
        ({"kind": "entropy", "top_p": -0.1}, 2, "method.gate.top_p must be above 0"),
        ({"kind": "entropy", "entropy_eps": -1}, 2, "method.gate.entropy_eps"),
        ({"kind": "balanced", "score": "tanh"}, 2, "method.gate.score"),
        ({"kind": "balanced", "bias_rate": -1}, 2, "method.gate.bias_rate"),
        ({"kind": "balanced", "rank_partition": 4}, 2, "must divide num_experts=6"),
        ({"kind": "balanced", "rank_partition": 0}, 2, "must divide num_experts=6"),
        ({"kind": "topk", "router_init_std": -0.1}, 2, "method.gate.router_init_std"),
        ({"kind": "topk"}, 7, "between 1 and num_experts=6, got 7"),
        ({"kind": "topk"}, 0, "between 1 and num_experts=6, got 0"),
        ({"kind": "dense"}, 2, "uses every expert"),
    ],
)
def test_a_mistake_is_named(options, top_k, message):
    with pytest.raises(ConfigError, match=message):
        gate_of(options, 8, 6, top_k)


@pytest.mark.parametrize("crossing", gates.Crossing)
def test_a_top_p_of_one_keeps_every_expert(crossing):
    """However their sum is rounded: in float32 one row in ten passes 1."""
    probs_TE = torch.randn(10_000, 6).softmax(-1)
    assert (probs_TE.sort(descending=True)[0].cumsum(-1) > 1).any(-1).float().mean() > 0.05
    assert gates.prefix(probs_TE, 1.0, at_least=1, crossing=crossing).all()


@pytest.mark.parametrize("q", [0.5, 1, 1.1])
def test_tsallis_entropy_has_a_slope_where_a_probability_underflows(q):
    logits_E = torch.tensor([120.0, 0, -3, 1], requires_grad=True)
    gates.tsallis_entropy(logits_E.softmax(-1), q).backward()
    assert torch.isfinite(logits_E.grad).all()


def test_the_loads_of_all_gates_at_once_are_those_of_each():
    mask_BS = torch.rand(3, 5) < 0.6
    routings = {}
    for i, E in enumerate((4, 6, 4)):
        gate = gates.TopK(7, E, 2, gates.TopKOptions())
        gate(torch.randn(3, 5, 7))
        routings[f"layers.{i}"] = gate.routing
    found = gates.by_gate(gates.loads({name: routing.chosen_TE for name, routing in routings.items()}, mask_BS))
    assert found.keys() == routings.keys()
    for name, routing in routings.items():
        assert torch.equal(found[name], load_of(routing, mask_BS))


def test_loads_are_of_tokens_whether_rows_lie_side_by_side_or_not():
    """OPT's blocks and Qwen2-MoE's shared expert read [B · S, D]."""
    torch.manual_seed(0)
    record = routed(torch.rand(3, 5, 4).softmax(-1), top_k=2, kind="topk")
    flat = gates.Routing(
        record.logits_TS.flatten(0, 1), record.weights_TE.flatten(0, 1), record.chosen_TE.flatten(0, 1), record.score
    )
    mask_BS = torch.arange(5) < torch.tensor([[5], [2], [4]])
    found = gates.by_gate(gates.loads({"a": record.chosen_TE, "b": flat.chosen_TE}, mask_BS))
    assert torch.equal(found["a"], found["b"])
    assert int(found["a"].sum()) == 2 * 11


def test_a_router_begins_as_it_is_told():
    std = 0.3
    told = gate_of({"kind": "topk", "router_init_std": std}, 400, 8, 2).router.weight
    usual = gate_of({"kind": "topk"}, 400, 8, 2).router.weight
    assert float(told.detach().std()) == pytest.approx(std, rel=0.1)
    assert float(told.detach().abs().max()) > std * 2.5  # a normal distribution
    assert float(usual.detach().abs().max()) <= 400**-0.5  # nn.Linear's own, kaiming uniform


@pytest.mark.parametrize(
    ("gate", "top_k", "remedy"),
    [
        ({"kind": "topk", "renormalize": False}, 2, r"method\.gate\.renormalize=true"),
        ({"kind": "entropy"}, 2, r"method\.gate\.renormalize=true"),
        ({"kind": "balanced"}, 2, r"method\.gate\.kind=topk or dense"),
        ({"kind": "topk"}, 2, None),
        ({"kind": "topk", "renormalize": False}, None, None),
        ({"kind": "entropy", "renormalize": True}, 2, None),
        ({"kind": "dense"}, None, None),
    ],
)
def test_weights_that_would_scale_a_block_are_refused(gate, top_k, remedy):
    method = Method(name="m", num_experts=4, top_k=top_k, gate=gate)
    weights_TE = gate_of(gate, 8, 4, top_k)(torch.randn(50, 8) * 9)
    assert torch.allclose(weights_TE.sum(-1), torch.ones(50)) is (remedy is None)
    with pytest.raises(ConfigError, match=remedy) if remedy else nullcontext():
        gates.require_weights_of_one(method)
