"""Attention over packed rows: each row attends to itself alone.

A packed batch is one line of rows. Its attention is computed row by row, so no pair of tokens of two rows is ever
multiplied; neighbours of one length are a batch. transformers sees the restart of the positions and makes a
block-diagonal mask of [S, S] as well: a model that does not hand `segments` to its attention goes by that, slower and
not wrong.

    H heads   S positions   n rows of one length   s positions of one row
"""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

REACH = "_reach_within_row"  # an attribute of masks, see `mask_with_reach`


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
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' own sdpa attention, on each row of the pack; without `segments`, or with a bias for every pair of
    positions of the pack, it is that attention."""
    qkv = query_1HSd, key_1HSd, value_1HSd
    if not segments or position_bias is not None:
        return sdpa_attention_forward(module, *qkv, attention_mask, position_bias=position_bias, **options)
    reach = math.inf if attention_mask is None else getattr(attention_mask, REACH, 0)
    runs = [(length, len(list(same))) for length, same in groupby(segments)]
    # Split, not sliced run by run: the gradients of all rows are then joined once, where each slice's would be spread
    # over the whole pack and added.
    sizes = [length * n for length, n in runs]
    parts = zip(*(x_1HSd.split(sizes, dim=2) for x_1HSd in qkv), strict=True) if len(runs) > 1 else [qkv]
    outputs, start = [], 0
    for (length, n), part in zip(runs, parts, strict=True):
        first = slice(start, start + length)
        # Within a row that is no longer than its reach the mask says no more than "causal".
        mask = None if attention_mask is None or length <= reach else attention_mask[..., first, first]
        rows_nHsd = (x_1HSd.unflatten(2, (n, length))[0].transpose(0, 1) for x_1HSd in part)
        y_nsHd, _ = sdpa_attention_forward(module, *rows_nHsd, mask, **options)
        outputs.append(y_nsHd.flatten(0, 1))
        start += length * n
    # One output is not joined: o_proj keeps what it reads, and attention its own output.
    return (torch.cat(outputs) if len(outputs) > 1 else outputs[0])[None], None


def mask_with_reach(**options: Any) -> Tensor | None:
    """transformers' own mask, which bears how many tokens of its row a token sees: itself and those before, or those of
    a window or a chunk. A mask that a model makes or changes by itself does not, and is taken as it is."""
    mask: Tensor | None = sdpa_mask(**options)
    if mask is not None and not options.get("use_vmap"):  # transformers' mark of patterns that are a model's own
        size = options.get("local_size")
        setattr(mask, REACH, math.inf if size is None else size)
    return mask


@contextmanager
def by_row() -> Iterator[None]:
    """Attention by row inside the block, for every model whose attention is sdpa.

    The name stays "sdpa": transformers' models ask for it, and would compute something else under another.
    """
    ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = attention_by_row, mask_with_reach
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def for_flash(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """By what flash attention tells the rows of a pack apart in one call. Left to itself it would look for them in the
    positions, and the host would wait for the device in every layer."""
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths), "max_length_k": max(lengths)}
