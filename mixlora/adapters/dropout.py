"""Dropout whose mask is not kept: a seed is, and the mask is drawn again where it is needed.

Both kinds draw each element on its own with probability p and scale what is left by 1 / (1 - p), as `nn.Dropout` does.
On a CPU the few dropped places are drawn instead of a mask: the gaps between them are geometric, so p · N random
numbers are enough, and a mask of N never exists. An accelerator draws N numbers faster than it could wait for a count.

    T rows   D columns   R rank
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Whole:
    """No dropout."""

    def thin(self, x_TD: Tensor) -> Tensor:
        return x_TD

    def add(self, dx_TD: Tensor, dh_TR: Tensor, A_RD: Tensor) -> None:
        """dx += the gradient that reaches x through A · thin(x)."""
        dx_TD.addmm_(dh_TR, A_RD)


@dataclass(frozen=True)
class Places:
    """The dropped places by number."""

    p: float
    seed: int

    def thin(self, x_TD: Tensor) -> Tensor:
        thinned_TD = x_TD.contiguous() / (1 - self.p)  # places are counted in the order of rows
        thinned_TD.view(-1).index_fill_(0, self.places(x_TD.numel()), 0)
        return thinned_TD

    def add(self, dx_TD: Tensor, dh_TR: Tensor, A_RD: Tensor) -> None:
        # Nothing goes through a dropped place: what stood there before the product is put back.
        places, flat = self.places(dx_TD.numel()), dx_TD.view(-1)
        before = flat.index_select(0, places)
        dx_TD.addmm_(dh_TR, A_RD, alpha=1 / (1 - self.p))
        flat.scatter_(0, places, before)

    def places(self, size: int) -> Tensor:
        """Numbers below `size`, ascending, each there with probability p."""
        generator = torch.Generator().manual_seed(self.seed)
        expected = size * self.p
        ends, end = [torch.empty(0, dtype=torch.int64)], -1  # an expert may have no token, and x no element
        while end < size - 1:
            uniform = torch.rand(int(expected + 6 * math.sqrt(expected) + 16), generator=generator, dtype=torch.float64)
            gaps = (torch.log1p(-uniform) / math.log1p(-self.p)).floor_().to(torch.int64) + 1
            ends.append(gaps.cumsum_(0).add_(end))
            end = int(ends[-1][-1])
        found = torch.cat(ends)
        return found[: int(torch.searchsorted(found, size))]


@dataclass(frozen=True)
class Mask:
    """A mask of one byte an element, drawn on the device of x."""

    p: float
    seed: int

    def thin(self, x_TD: Tensor) -> Tensor:
        generator = torch.Generator(x_TD.device).manual_seed(self.seed)
        kept_TD = torch.empty(x_TD.shape, dtype=torch.bool, device=x_TD.device)
        kept_TD.bernoulli_(1 - self.p, generator=generator)
        # x · mask · scale in one pass, as `nn.Dropout` itself has it in both directions.
        thinned_TD: Tensor = torch.ops.aten.native_dropout_backward(x_TD, kept_TD, 1 / (1 - self.p))
        return thinned_TD

    def add(self, dx_TD: Tensor, dh_TR: Tensor, A_RD: Tensor) -> None:
        dx_TD.add_(self.thin(dh_TR @ A_RD))


Dropout = Whole | Places | Mask


def draw(dropout: torch.nn.Dropout, x_TD: Tensor) -> Dropout:
    """What `dropout` does to x this once; seeded by the global CPU generator, which checkpointing restores."""
    if not active(dropout):
        return Whole()
    seed = int(torch.randint(2**62, ()))
    return Places(dropout.p, seed) if x_TD.device.type == "cpu" else Mask(dropout.p, seed)


def untraceable(dropout: torch.nn.Dropout) -> bool:
    """Whether a compiler reads this and would have to follow `draw`: no graph holds a seed that Python reads."""
    return torch.compiler.is_compiling() and active(dropout)


def active(dropout: torch.nn.Dropout) -> bool:
    return dropout.training and dropout.p > 0
