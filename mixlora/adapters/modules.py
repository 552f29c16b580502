"""The visible wrappers: low-rank layers beside a linear, and inside a feed-forward block.

T tokens (any leading shape)   D in   O out   F hidden   E experts   R rank over all experts   j slot   n linears
S logits of all their routers
"""

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlora import gates
from mixlora.adapters import dropout, experts, targets
from mixlora.adapters.fused import Combine, Onto, Project
from mixlora.gates import Gate, Routing
from mixlora.lowrank import LowRank

Found = tuple[Tensor, Routing | None]  # y, and what the gate decided


class Wrapper(nn.Module):
    """Stands where its `base_layer` stood, and holds the tensors of the adapter beside it."""

    path = "eager"  # how it computes, see `attach.paths`
    base_layer: nn.Module
    gate: Gate | None  # no value here: an attribute of the class would hide the module of that name

    @property
    def compiled_path(self) -> str:
        """What torch.compile makes of a training step."""
        return self.path

    def turn_lean(self) -> None:
        """Keep less for backward, where there is a way to."""

    def forget(self) -> None:
        """Let go of what a forward left that nobody asks for any more; its gate does so by itself."""


class LoraLinear(Wrapper):
    """y = W x + s B A x: one block, no gate (LoRA, arXiv 2106.09685)."""

    gate: Gate | None = None

    def __init__(self, base_layer: nn.Module, delta: LowRank):
        super().__init__()
        self.base_layer, self.delta = base_layer, delta

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.delta.onto(self.base_layer(x_TD), self.delta.down(x_TD))


class GatedLinear(Wrapper):
    """y = W x + s B (g(x) ⊙ A x)."""

    gate: Gate

    def __init__(self, base_layer: nn.Module, delta: LowRank, gate: Gate):
        super().__init__()
        self.base_layer, self.delta, self.gate = base_layer, delta, gate

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.delta(self.base_layer(x_TD), x_TD, self.gate(x_TD))


class Ahead:
    """What the first of several linears that read one input has computed for the others, until each asks for its own.

    It holds nothing from the last of them to the next forward. Weights must not move in between. What belongs to one
    input is one tuple: another thread may put its own in that place at any time.
    """

    kept: tuple[Tensor, tuple[int, bool], dict[nn.Module, Found]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def forget(self) -> None:
        self.kept = None

    def keep(self, x_TD: Tensor, layers: Sequence[nn.Module], found: Sequence[Found]) -> None:
        self.kept = x_TD, state(x_TD), dict(zip(layers, found, strict=True))

    def take(self, layer: nn.Module, x_TD: Tensor) -> Found | None:
        """The layer's part, if it was computed for this very input."""
        kept = self.kept
        if kept is None or kept[0] is not x_TD or kept[1] != state(x_TD):
            self.forget()
            return None
        found = kept[2].pop(layer, None)
        if not kept[2]:
            self.forget()
        return found


def state(x_TD: Tensor) -> tuple[int, bool]:
    """What may change between two calls with one tensor: how often it was written over, and whether a graph is kept.

    A compiled graph cannot ask for the first; nothing in transformers writes over what its projections read.
    """
    uncounted = torch.compiler.is_compiling() or x_TD.is_inference()
    return 0 if uncounted else x_TD._version, torch.is_grad_enabled()


def readable_still(x_TD: Tensor, *linears: nn.Module) -> bool:
    """Whether a hand-written backward still reads these linears right: after `attach` somebody may have hooked or
    exchanged one or let it train, and under autocast products take another dtype than their tensors have."""
    if torch.is_autocast_enabled(x_TD.device.type) or any(map(targets.trains, linears)):
        return False
    return torch.compiler.is_compiling() or all(map(targets.readable, linears))  # no graph can ask for hooks


class Fused(Wrapper):
    """The same function as the class beside it with a hand-written backward, for a plain linear (see fused.py).

    The first of several linears that read one input holds the others, its siblings, and computes theirs with its own:
    they are one node of the graph, and one that nobody asks gets a gradient of zero. A model that gives a sibling
    another input gets what that makes, and has paid for the other.
    """

    path = "fused"
    siblings: Sequence["Fused"] = ()
    ahead: Ahead | None = None  # the same for all of them
    delta: LowRank

    @property
    def compiled_path(self) -> str:
        return Wrapper.path if self.delta.dropout.p else self.path

    def forget(self) -> None:
        if self.ahead is not None:
            self.ahead.forget()

    def forward(self, x_TD: Tensor) -> Tensor:
        if dropout.untraceable(self.delta.dropout):
            return super().forward(x_TD)
        own = None if self.ahead is None else self.ahead.take(self, x_TD)
        if own is None:
            if not readable_still(x_TD, self.base_layer):
                return super().forward(x_TD)
            own = self.with_siblings(x_TD)
        y_TO, routing = own
        if self.gate is not None:
            self.gate.routing = routing
        return y_TO

    def with_siblings(self, x_TD: Tensor) -> Found:
        siblings = self.siblings if readable_still(x_TD, *(one.base_layer for one in self.siblings)) else ()
        own, *others = side_by_side([self, *siblings], x_TD)
        if others and self.ahead is not None:
            self.ahead.keep(x_TD, self.siblings, others)
        return own


class FusedLoraLinear(Fused, LoraLinear):
    """y = W x + s B A x."""


class FusedGatedLinear(Fused, GatedLinear):
    """y = W x + s B (g(x) ⊙ A x)."""


def side_by_side(layers: Sequence[Any], x_TD: Tensor) -> list[Found]:
    """y = W x + s B (g(x) ⊙ A x) of several linears that read one x, all gated or none, and alike but for W and its
    width: one product for all A, one for all routers, one pass through all gates."""
    dtype = x_TD.dtype
    deltas, choosing = [layer.delta for layer in layers], [layer.gate for layer in layers if layer.gate is not None]
    drops = tuple(dropout.draw(delta.dropout, x_TD) for delta in deltas)
    parts = [(layer.base_layer.weight, layer.base_layer.bias, layer.delta.A_RD) for layer in layers]
    routers = [gate.weight(dtype) for gate in choosing]
    *bases, h_TnR, z_TS = Project.apply(x_TD, drops, *itertools.chain(*parts), *routers)
    Bs, scale, r = [delta.B_RO for delta in deltas], deltas[0].scale, deltas[0].r
    if choosing:
        decided = gates.together(choosing, z_TS)
        ys = Combine.apply(h_TnR, decided.weights_TE.to(dtype), scale, r, *bases, *Bs)
        routings: Sequence[Routing | None] = gates.apart(decided, len(layers))
    else:
        ys, routings = Onto.apply(h_TnR, scale, *bases, *Bs), [None] * len(layers)
    return list(zip(ys, routings, strict=True))


class GatedFeedForward(Wrapper):
    """y = Σ_e g_e(x) FFN_e(x), FFN_e(x) = W2_e(act(W1_e x) ⊙ W3_e x), W*_e = W* + s B*_e A*_e (MixLoRA, 2404.15159).

    The frozen gate and up projections run once for all experts. Slot j of a token holds its j-th expert, whose low-rank
    deltas are added with a one-hot gate. The down projection is linear, Σ_j w_j W2 h_j = W2 Σ_j w_j h_j: it runs once.
    """

    gate: Gate

    def __init__(self, base_layer: nn.Module, names: dict[str, str], deltas: dict[str, LowRank], gate: Gate):
        super().__init__()
        self.base_layer, self.gate = base_layer, gate
        self.names = names
        self.gate_proj, self.up_proj, self.down_proj = deltas["gate"], deltas["up"], deltas["down"]

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TE = self.gate(x_TD)
        weight_TK, expert_TK = weights_TE.topk(self.gate.most_active, dim=-1)
        slot_TKE = F.one_hot(expert_TK, self.gate.num_experts).to(x_TD.dtype)

        w1_TF, w3_TF = self.base("gate")(x_TD), self.base("up")(x_TD)
        a1_TR, a3_TR = self.gate_proj.down(x_TD), self.up_proj.down(x_TD)
        act = self.base("activation")
        hidden_TF, z_TR = [], []
        for j in range(self.gate.most_active):
            g_TE, w_T1 = slot_TKE[..., j, :], weight_TK[..., j, None]
            u_TF = self.gate_proj.onto(w1_TF, self.gate_proj.mix(a1_TR, g_TE))
            v_TF = self.up_proj.onto(w3_TF, self.up_proj.mix(a3_TR, g_TE))
            h_TF = act(u_TF) * v_TF
            hidden_TF.append(w_T1 * h_TF)
            z_TR.append(self.down_proj.mix(self.down_proj.down(h_TF), w_T1 * g_TE))
        return self.down_proj.onto(self.base("down")(total(hidden_TF)), total(z_TR))

    def base(self, part: str) -> nn.Module:
        return getattr(self.base_layer, self.names[part])


class FusedFeedForward(GatedFeedForward):
    """The same function with a hand-written backward, for plain linears, in one of two forms (see experts.py).

    The lean one keeps half as many bytes and computes the hidden rows of each expert twice.
    """

    path = "fast"
    compiled_path = Wrapper.path
    mix: type[torch.autograd.Function] = experts.Fast

    def turn_lean(self) -> None:
        self.path, self.mix = "lean", experts.Lean

    def forward(self, x_TD: Tensor) -> Tensor:
        linears = (self.base("gate"), self.base("up"), self.base("down"))
        # Rows sorted by expert have shapes that no graph knows beforehand.
        if torch.compiler.is_compiling() or not readable_still(x_TD, *linears):
            return super().forward(x_TD)
        lead, dtype = x_TD.shape[:-1], x_TD.dtype
        up, down, act = (self.gate_proj, self.up_proj), self.down_proj, self.base("activation")
        drops = tuple(dropout.draw(delta.dropout, x_TD) for delta in up)
        parts: list[Any] = []
        for base, delta in zip((self.base("gate"), self.base("up")), up, strict=True):
            parts += [base.weight, base.bias, delta.A_RD]
        *inputs, z_TS = Project.apply(x_TD.flatten(0, -2), drops, *parts, self.gate.weight(dtype))

        decided = self.gate.decide(z_TS.unflatten(0, lead))
        g_TE = decided.weights_TE.to(dtype).flatten(0, -2)
        t_N, counts = experts.rows_of_experts(decided.chosen_TE.flatten(0, -2))
        factors = *(delta.B_RO for delta in up), down.A_RD
        scales = tuple(delta.scale for delta in up)
        drops = tuple(dropout.draw(down.dropout, x_TD) for _ in range(self.gate.num_experts))
        h_TF, z_TR = self.mix.apply(*inputs, g_TE, t_N, *factors, counts, scales, act, drops)
        return down.onto(self.base("down")(h_TF), z_TR).unflatten(0, lead)


def total(terms: Sequence[Tensor]) -> Tensor:
    return functools.reduce(operator.add, terms)
