"""Layers that keep no more than their inputs and are computed again in backward, and what a forward leaves behind."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from mixlora.adapters.attach import adapted
from mixlora.adapters.modules import Wrapper
from mixlora.gates import Gate, gates_of


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Let layers keep no more than their inputs, and compute them again in backward: after `attach`, in place of
    transformers' own.

    What the second forward leaves on a gate has a graph that no backward goes through, and which therefore holds all
    that the layer should not keep: it is cleared away layer by layer.
    """
    kept = keepers(model)

    @contextmanager
    def again() -> Iterator[None]:
        try:
            yield
        finally:
            clear_records(kept)

    how = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), again())}
    any_model: Any = model  # transformers calls it "activation" since 5.24
    new = getattr(any_model, "activation_checkpointing_enable", None)
    (new or any_model.gradient_checkpointing_enable)(how)


def keepers(model: nn.Module) -> list[Gate | Wrapper]:
    """The modules that keep something of a forward until it is asked for."""
    return [*gates_of(model).values(), *adapted(model).values()]


def clear_records(keepers: Iterable[Gate | Wrapper]) -> None:
    """What a forward left that nobody asks any more: a second one of a layer, or one that failed."""
    for keeper in keepers:
        keeper.forget()
