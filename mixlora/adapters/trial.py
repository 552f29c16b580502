"""Whether an adapter could do its work where it is to stand: tried on a few tokens, before anything is put there.

What a model does beside running its linears as they stand in it is not to be seen from outside: some read a weight by
themselves, give a linear the rows of some tokens only, or return more than a product.
"""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixlora.config.schema import FeedForwardNames

TRIED = (0, 1, 2)  # tokens


class Probe(nn.Module):
    """Stands where a wrapper would stand, and finds out why none could."""

    def __init__(self, linear: nn.Module, gated: bool):
        super().__init__()
        self.linear, self.gated, self.calls, self.why = linear, gated, 0, ""

    def forward(self, *given: Any, **named: Any) -> Any:
        self.calls += 1
        y = self.linear(*given, **named)
        rows = [x.shape[:-1].numel() if isinstance(x, Tensor) else None for x in (*given, y)]
        if len(rows) != 2 or None in rows or rows[0] != rows[1]:
            self.why = "does not map every token to one product"
        elif self.gated and rows[0] != len(TRIED):
            self.why = "sees other rows than the tokens, of which a gate could not say which they are"
        elif self.gated and self.calls > 1:
            self.why = "runs more than once in a forward, of which a gate would remember the last"
        return y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(self.linear, name)
            self.why = f"is not only run: the model reads its {name} by itself"
            return found


@torch.no_grad()
def misfits(model: nn.Module, linears: Mapping[str, nn.Module], *, gated: bool) -> dict[str, str]:
    """Linears beside which an adapter could not do its work, and why: tried on a few tokens, in both modes, for some
    models compute otherwise in training."""
    if not can_be_tried(model):
        return {}
    probes = {name: Probe(linear, gated) for name, linear in linears.items()}
    before = modes(model)
    try:
        for name, probe in probes.items():
            model.set_submodule(name, probe)
        for mode in (True, False):
            for probe in probes.values():
                probe.calls = 0
            tried(model.train(mode))
    finally:
        for name, probe in probes.items():
            model.set_submodule(name, probe.linear)
        restore(before)
    for probe in probes.values():
        if gated and not probe.calls:  # in evaluation; training may leave out a layer by chance
            probe.why = probe.why or "is not run by tokens of text"
    return {name: probe.why for name, probe in probes.items() if probe.why}


@torch.no_grad()
def other_blocks(model: nn.Module, blocks: Iterable[str], names: FeedForwardNames) -> list[str]:
    """Feed-forward blocks that compute something else than down(act(gate x) ⊙ up x): tried on a few tokens."""
    if not can_be_tried(model):
        return []
    found: list[str] = []

    def compare(name: str, block: Any, x: Tensor, y: Any) -> None:
        if not hasattr(block, names.activation):
            return  # which is said where a mixture is made of it
        gate, up, down = (getattr(block, part) for part in (names.gate, names.up, names.down))
        want = down(getattr(block, names.activation)(gate(x)) * up(x))
        same = isinstance(y, Tensor) and (y - want).norm() <= torch.finfo(want.dtype).eps ** 0.5 * want.norm()
        if not same and want.isfinite().all() and name not in found:
            found.append(name)

    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda block, given, y, name=name: compare(name, block, given[0], y)
        )
        for name in blocks
    ]
    before = modes(model)
    try:
        tried(model.eval())
    finally:
        restore(before)
        for hook in hooks:
            hook.remove()
    return found


def modes(model: nn.Module) -> dict[nn.Module, bool]:
    """Which modules are in training: a user may have set some apart from the rest."""
    return {module: module.training for module in model.modules()}


def restore(modes: Mapping[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


def can_be_tried(model: nn.Module) -> bool:
    """Whether this is one of transformers' models, and has numbers."""
    device = getattr(model, "device", None)
    return isinstance(device, torch.device) and device.type != "meta" and hasattr(model, "config")


def tried(model: Any) -> None:
    """A forward over a few tokens; random numbers are drawn aside."""
    inputs = {"input_ids": torch.tensor([TRIED], device=model.device)}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = torch.arange(len(TRIED), device=model.device)  # as in training, see `likelihood`
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        model(**inputs)
