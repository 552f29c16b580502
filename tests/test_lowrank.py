"""The equation y + s · B (g ⊙ A x), and that its hand-written backward is the same function."""

import pytest
import torch
from built import gate_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixlora.adapters.modules import FusedGatedLinear, GatedLinear
from mixlora.lowrank import LowRank

D, O, E, R = 12, 10, 4, 3


@pytest.mark.parametrize("shared_a", [False, True])
def test_equals_a_sum_over_experts(shared_a):
    torch.manual_seed(0)
    layer = LowRank(D, O, r=R, num_experts=E, scale=1.5, shared_a=shared_a, dtype=torch.float64)
    nn.init.normal_(layer.B_RO)
    x_TD, g_TE = torch.randn(5, D, dtype=torch.float64), torch.rand(5, E, dtype=torch.float64)
    y_TO = torch.randn(5, O, dtype=torch.float64)
    want = y_TO.clone()
    for e in range(E):
        block = slice(e * R, (e + 1) * R)
        A_rD = layer.A_RD if shared_a else layer.A_RD[block]
        want += 1.5 * g_TE[:, e : e + 1] * (x_TD @ A_rD.T @ layer.B_RO[block])
    torch.testing.assert_close(layer(y_TO, x_TD, g_TE), want, rtol=1e-12, atol=1e-12)


def test_starts_at_zero_and_keeps_the_dtype_of_its_input():
    layer = LowRank(D, O, r=R, num_experts=E)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        y_TO, x_TD, g_TE = (torch.randn(2, 3, n, dtype=dtype) for n in (O, D, E))
        found = layer(y_TO, x_TD, g_TE)
        assert found.dtype == dtype
        assert torch.equal(found, y_TO)
    assert layer.A_RD.dtype == layer.B_RO.dtype == torch.float32


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="got r=0"):
        LowRank(D, O, r=0)


# ---- the hand-written backward

GATES = {
    "dense": (None, {"kind": "dense"}),
    "topk": (2, {"kind": "topk"}),
    "entropy": (1, {"kind": "entropy", "entropy_threshold": 0.8}),
    "balanced": (2, {"kind": "balanced"}),
    "balanced, shared outputs": (2, {"kind": "balanced", "rank_partition": 2}),
}


def pair(kind: str, *, shared_a: bool, bias: bool, dtype: torch.dtype, base_dtype: torch.dtype | None = None):
    """A plain and a fused wrapper around the very same modules."""
    torch.manual_seed(1)
    top_k, options = GATES[kind]
    base = nn.Linear(D, O, bias=bias, dtype=base_dtype or dtype).requires_grad_(False)
    delta = LowRank(D, O, r=R, num_experts=E, scale=0.7, shared_a=shared_a, dtype=dtype)
    nn.init.normal_(delta.B_RO)
    gate = gate_of(options, D, E, top_k, dtype=dtype)
    nn.init.normal_(gate.router.weight)
    return GatedLinear(base, delta, gate), FusedGatedLinear(base, delta, gate)


def run(wrapper: GatedLinear, x: Tensor, *, again: bool = False) -> list[Tensor]:
    """Output, record, and all gradients of a loss that reads the output and the record."""
    x = x.clone().requires_grad_()
    y = wrapper(x)
    routing = wrapper.gate.routing
    if again:  # the layer runs twice in one graph
        y = y + wrapper(2 * x).sin()
    loss = (y * torch.linspace(-1, 1, O, dtype=y.dtype)).square().sum() + routing.probs_TE.square().sum()
    loss = loss + routing.logits_TS.logsumexp(-1).sum()
    leaves = [x, *(p for p in wrapper.parameters() if p.requires_grad)]
    return [y, routing.logits_TS, routing.weights_TE, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("shared_a", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_fused_equals_plain(kind, shared_a, dtype, tolerance):
    for lead in ((7,), (2, 5), (2, 3, 4)):
        for bias in (False, True):
            for again in (False, True):
                plain, fused = pair(kind, shared_a=shared_a, bias=bias, dtype=dtype)
                x = torch.randn(*lead, D, dtype=dtype)
                for want, found in zip(run(plain, x, again=again), run(fused, x, again=again), strict=True):
                    largest = max(1.0, float(want.detach().abs().max()))
                    torch.testing.assert_close(found, want, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("kind", GATES)
def test_fused_where_the_input_needs_no_gradient(kind):
    plain, fused = pair(kind, shared_a=False, bias=True, dtype=torch.float64)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    trained = [p for p in plain.parameters() if p.requires_grad]
    found, want = (torch.autograd.grad(wrapper(x).square().sum(), trained) for wrapper in (fused, plain))
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", GATES)
def test_fused_under_checkpointing_and_used_twice(kind):
    plain, fused = pair(kind, shared_a=False, bias=True, dtype=torch.float64)
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for p in plain.parameters() if p.requires_grad)]

    def loss(wrapper: GatedLinear) -> Tensor:
        return (wrapper(x) * wrapper(x.cos())).sum()

    want = torch.autograd.grad(loss(plain), leaves)
    found = torch.autograd.grad(checkpoint(loss, fused, use_reentrant=False), leaves)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


def test_fused_writes_into_nothing_that_the_caller_holds():
    _, fused = pair("topk", shared_a=False, bias=True, dtype=torch.float64)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    before, weight = x.clone(), fused.base_layer.weight.clone()
    assert not torch.equal(fused(x), fused.base_layer(x))
    assert torch.equal(x, before)
    assert torch.equal(fused.base_layer.weight, weight)


@pytest.mark.parametrize("kind", GATES)
def test_fused_on_a_bfloat16_base_is_as_near_to_the_truth_as_the_plain_path(kind):
    """Both round to bfloat16; the routing itself is that of a float32 router."""
    plain, fused = pair(kind, shared_a=False, bias=False, dtype=torch.float32, base_dtype=torch.bfloat16)
    exact, _ = pair(kind, shared_a=False, bias=False, dtype=torch.float64)
    exact.load_state_dict({key: value.double() for key, value in plain.state_dict().items()})
    x = torch.randn(400, D).bfloat16()
    truth, rounded, found = run(exact, x.double()), run(plain, x), run(fused, x)
    torch.testing.assert_close(found[1], rounded[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2], rounded[2], rtol=0, atol=1e-5)
    for want, theirs, ours in zip(truth, rounded, found, strict=True):
        size = want.norm()
        assert (ours.double() - want).norm() / size <= 1.5 * (theirs.double() - want).norm() / size + 4e-3
