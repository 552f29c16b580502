"""Attention over packed rows: each row attends to itself alone.

A packed batch is one line of rows. Its attention is computed row by row, so no pair of tokens of two rows is ever
multiplied, and a pack costs what its rows cost; neighbours of one length are a batch. transformers sees the restart of
the positions and makes a block-diagonal mask as well: a model that does not hand `segments` to its attention is slower,
not wrong.

    H heads   S positions   n rows of one length   s positions of one row
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_by_row"


class Segments:
    """Lengths of the rows of a pack: an object, for a compiler makes the numbers of a tuple a part of its graph."""

    def __init__(self, lengths: Sequence[int]):
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(self.lengths)


@torch.compiler.disable  # or every number of rows would be another graph
def attention_by_row(
    module: nn.Module,
    query_1HSd: Tensor,
    key_1HSd: Tensor,
    value_1HSd: Tensor,
    attention_mask: Tensor | None,
    segments: Collection[int] = (),
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' own sdpa attention, on each row of the pack; without `segments` it is that attention."""
    if not segments:
        return sdpa_attention_forward(module, query_1HSd, key_1HSd, value_1HSd, attention_mask, **options)
    runs = [(length, len(list(same))) for length, same in groupby(segments)]
    # Split, not sliced run by run: the gradients of all rows are then joined once, where each slice's would be spread
    # over the whole pack and added.
    sizes = [length * n for length, n in runs]
    parts = zip(*(x_1HSd.split(sizes, dim=2) for x_1HSd in (query_1HSd, key_1HSd, value_1HSd)), strict=True)
    outputs, start = [], 0
    for (length, n), part in zip(runs, parts, strict=True):
        first = slice(start, start + length)
        # Within one row the mask says no more than "causal", unless a window is shorter than the row.
        narrow = attention_mask is not None and sliding_window is not None and length > sliding_window
        mask = attention_mask[..., first, first] if narrow and attention_mask is not None else None
        rows_nHsd = (x_1HSd.unflatten(2, (n, length))[0].transpose(0, 1) for x_1HSd in part)
        y_nsHd, _ = sdpa_attention_forward(module, *rows_nHsd, mask, **options)
        outputs.append(y_nsHd.flatten(0, 1))
        start += length * n
    return torch.cat(outputs)[None], None


AttentionInterface.register(NAME, attention_by_row)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def by_row(model: Any) -> Iterator[None]:
    """Attention by row inside the block, where the model's attention is sdpa."""
    before = model.config._attn_implementation
    if before != "sdpa":
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
