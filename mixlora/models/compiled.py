"""Decoder layers through torch.compile, for training steps alone.

A layer is compiled once, for packs of any length: sizes are symbols, and attention over rows stays out of the graph
(see packing.py). Evaluation runs the layers as they are written, for its batches have other shapes, and a cache.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import nn

from mixlora.errors import ConfigError, first_line, wrapped
from mixlora.models.base import decoder_layers
from mixlora.models.likelihood import instead

# Layers share their graphs. Each of some pieces of a layer is another one where no gradient goes to the input (the
# first layer) and for every number of experts and ranks.
MOST_GRAPHS = 64


def compiled(model: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """What makes a context in which every decoder layer of `model` is compiled; the work is done at the first call."""
    torch._dynamo.config.optimize_ddp = False  # which would cut each layer's graph again, by DDP's buckets
    # Scales and epsilons never change; as symbols each would be a tensor that a graph is given.
    torch._dynamo.config.specialize_float = True
    torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    forwards = {layer: torch.compile(layer.forward, dynamic=True) for layer in decoder_layers(model)}

    @contextmanager
    def in_effect() -> Iterator[None]:
        with ExitStack() as stack:
            for layer, forward in forwards.items():
                stack.enter_context(instead(layer, forward))
            yield

    return in_effect


def require_layers(model: nn.Module) -> None:
    """Raise a ConfigError where a model does not say what its decoder layers are."""
    if not decoder_layers(model):
        name = type(model).__name__
        raise ConfigError(f"{name} does not name its decoder layers (_no_split_modules). Set train.torch_compile=false")


def require_compiler(device: torch.device) -> None:
    """Compile something small.

    Raises:
        ConfigError: there is no compiler here for `device`.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:
        if own := wrapped(error):
            raise own from None
        needed = "g++" if device.type == "cpu" else "Triton and gcc"
        raise ConfigError(
            f"train.torch_compile=true does not work here ({first_line(error)}). Install {needed}, or set it to false"
        ) from error
