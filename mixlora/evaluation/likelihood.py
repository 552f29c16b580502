"""Option questions: the log-likelihood of every option's text after its prompt.

The options of a question stand behind one copy of what their prompts share, each seeing that and itself (a tree in the
attention mask, positions counted along each branch), so the prompt is computed once. The last token of an option is
predicted and never read, so it is no input. Logits are taken only where an option's token is predicted.

A model whose attention reads no such mask is asked one option a row, and so are rows that are longer than it sees.

    B trees   S positions   N predicted tokens   V vocabulary
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixlora import ranks
from mixlora.evaluation.batches import batches
from mixlora.models.base import attention
from mixlora.models.likelihood import TokenNats, as_if_alone, evaluating, pads_rows, rounding
from mixlora.tasks.prompts import Choice

# Keys of transformers' configurations, and what `layer_types` calls the layers that they speak of.
WINDOWS = {"sliding_window": "sliding_attention", "attention_chunk_size": "chunked_attention", "window_size": "local"}
# Of the logits' norm. Distances that count another branch (ALiBi) made 7 % even in an MPT of random weights, and
# rounding to bfloat16 or float16 none or 0.1 % in SmolLM2.
APART = 0.05
FORWARD = 32  # positions that cost a CPU as much as a forward does beside them: all weights are read


@dataclass(frozen=True)
class Branch:
    """What follows the trunk: the rest of a prompt, then an option, whose `scored` tokens count."""

    ids: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class Tree:
    """A trunk that all branches share, at least one token, and the branches."""

    trunk: tuple[int, ...]
    branches: tuple[Branch, ...]

    def __len__(self) -> int:
        """Positions that are computed."""
        return len(self.trunk) + sum(len(branch.ids) - 1 for branch in self.branches)


@dataclass(frozen=True)
class TreeBatch:
    """Padded on the left. `source`, `target` and `option` have one entry for each predicted token."""

    input_ids_BS: Tensor
    position_ids_BS: Tensor
    mask: Tensor  # [B, S] or [B, 1, S, S], see `Masks`
    keep: int  # logits of the last `keep` positions are needed
    source_N: Tensor  # where it is predicted, in the flattened kept positions
    target_N: Tensor
    option_N: Tensor  # the branch it belongs to, counted over the batch


# From the segment of each position (-1 padding, 0 trunk, 1 and up the branches), [B, S], to an attention mask.
Masks = Callable[[Tensor], Tensor]


class OptionScorer:
    """Scores options with one model, whose ways are found out once, on a few short rows."""

    def __init__(self, model: Any):
        self.model, self.nats, self.masks, self.reach = model, TokenNats(model), tree_masks(model), reach(model)
        self.pads = agreed(model, pads_rows(model))
        self.spare = 0 if not self.pads else FORWARD if model.device.type == "cpu" else None

    def __call__(
        self,
        asked: Sequence[Sequence[Choice]],
        *,
        batch_size: int,
        batch_tokens: int,
        pad_id: int,
        on_done: Callable[[int], None] = lambda count: None,
    ) -> list[list[float]]:
        """Log-likelihood in nats of every choice of every question, in their order, whatever the batches were.

        `on_done` hears how many questions were finished.
        """
        planted = [(i, tree) for i, choices in enumerate(asked) for tree in self.planted(choices)]
        owner, trees = [i for i, _ in planted], [tree for _, tree in planted]
        left, found = Counter(owner), dict[int, list[float]]()
        for chosen, masks in self.batched(trees, batch_size, batch_tokens):
            batch = collate_trees([trees[place] for place in chosen], pad_id, self.model.device, masks)
            nats = iter(branch_nats(self.model, batch, self.nats).tolist())
            for place in chosen:
                found[place] = [next(nats) for _ in trees[place].branches]
                left[owner[place]] -= 1
                on_done(int(left[owner[place]] == 0))
        collected: list[list[float]] = [[] for _ in asked]
        for place in sorted(found):
            collected[owner[place]] += found[place]
        return collected

    def planted(self, choices: Sequence[Choice]) -> list[Tree]:
        """The trees of one question."""
        longest = max(len(choice.prompt.ids) + len(choice.answer_ids) for choice in choices)
        if self.masks is None or longest > self.reach:
            return [row_of(choice) for choice in choices]
        return trees_of(choices)

    def batched(self, trees: Sequence[Tree], most: int, budget: int) -> Iterator[tuple[list[int], Masks]]:
        """Places of trees that share a batch, with its mask: of trees with branches, and of rows."""
        rows = [place for place, tree in enumerate(trees) if len(tree.branches) == 1]
        branched = [place for place, tree in enumerate(trees) if len(tree.branches) > 1]
        for places, masks in ((branched, self.masks), (rows, row_mask)):
            for chosen in batches([len(trees[place]) for place in places], most, budget, self.spare):
                assert masks is not None  # nothing branches without
                yield [places[n] for n in chosen], masks


def trees_of(choices: Sequence[Choice]) -> list[Tree]:
    """One tree for a question; one a choice where its prompts differ in more than half of their tokens."""
    whole = [(*choice.prompt.ids, *choice.answer_ids) for choice in choices]
    shortest = min(len(choice.prompt.ids) for choice in choices)
    shared = common([choice.prompt.ids for choice in choices])
    if shared < max(1, shortest / 2):
        return [row_of(choice) for choice in choices]
    branches = (Branch(w[shared:], len(c.answer_ids)) for w, c in zip(whole, choices, strict=True))
    return [Tree(whole[0][:shared], tuple(branches))]


def row_of(choice: Choice) -> Tree:
    """One choice by itself."""
    return Tree(choice.prompt.ids, (Branch(choice.answer_ids, len(choice.answer_ids)),))


def common(rows: Sequence[tuple[int, ...]]) -> int:
    """Length of the beginning that all rows share."""
    low, high = min(rows), max(rows)
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


@torch.no_grad()
def branch_nats(model: nn.Module, batch: TreeBatch, nats: TokenNats) -> Tensor:
    """Log-likelihood of each branch of the batch, in order."""
    inputs = model_inputs(batch) | ({"logits_to_keep": batch.keep} if nats.keep_logits else {})
    nats_N = nats(model, inputs, lambda found: found[:, -batch.keep :].flatten(0, 1)[batch.source_N], batch.target_N)
    total = torch.zeros(int(batch.option_N[-1]) + 1, dtype=nats_N.dtype, device=nats_N.device)
    return total.index_add_(0, batch.option_N, -nats_N)


def model_inputs(batch: TreeBatch) -> dict[str, Any]:
    return {"input_ids": batch.input_ids_BS, "attention_mask": batch.mask, "position_ids": batch.position_ids_BS}


def collate_trees(trees: Sequence[Tree], pad_id: int, device: torch.device, masks: Masks) -> TreeBatch:
    """Rows of [pad, trunk, branch 1, branch 2, ...] with the mask that keeps branches apart."""
    longest, keep = max(map(len, trees)), 1 + max(len(tree) - len(tree.trunk) for tree in trees)
    ids, positions, segments = [], [], []
    source: list[int] = []
    target: list[int] = []
    option: list[int] = []
    number = 0
    for b, tree in enumerate(trees):
        pad, trunk = longest - len(tree), len(tree.trunk)
        read = [branch.ids[:-1] for branch in tree.branches]
        ids.append([pad_id] * pad + [t for part in (tree.trunk, *read) for t in part])
        positions.append([0] * pad + [*range(trunk), *(trunk + j for part in read for j in range(len(part)))])
        segments.append([-1] * pad + [0] * trunk + [i + 1 for i, part in enumerate(read) for _ in part])
        start = b * keep + keep - (len(tree) - trunk)
        end_of_trunk = start - 1
        for branch in tree.branches:
            places = [end_of_trunk, *range(start, start + len(branch.ids) - 1)]
            source += places[-branch.scored :]
            target += branch.ids[-branch.scored :]
            option += [number] * branch.scored
            start += len(branch.ids) - 1
            number += 1
    tensors = (torch.tensor(x, device=device) for x in (ids, positions, source, target, option))
    ids_BS, positions_BS, source_N, target_N, option_N = tensors
    mask = masks(torch.tensor(segments, device=device))
    return TreeBatch(ids_BS, positions_BS, mask, keep, source_N, target_N, option_N)


def row_mask(segment_BS: Tensor) -> Tensor:
    """One where a token is, as tokenizers give it: for rows of one branch. [B, S]"""
    return (segment_BS >= 0).long()


def tree_mask(segment_BS: Tensor) -> Tensor:
    """True where a position may look: earlier, real, and in the trunk (segment 0) or the same branch. [B, 1, S, S]"""
    query, key = segment_BS[:, :, None], segment_BS[:, None, :]
    place = torch.arange(segment_BS.shape[1], device=segment_BS.device)
    earlier = place[None, :] <= place[:, None]
    allowed = earlier & (key >= 0) & ((key == 0) | (key == query))
    # A padded position looks at itself: a row of the softmax must not be empty.
    return (allowed | torch.eye(len(place), dtype=torch.bool, device=place.device))[:, None]


def added(allowed_B1SS: Tensor, dtype: torch.dtype) -> Tensor:
    """The same as numbers that are added to the products of queries and keys."""
    return torch.zeros_like(allowed_B1SS, dtype=dtype).masked_fill_(~allowed_B1SS, torch.finfo(dtype).min)


def tree_masks(model: Any) -> Masks | None:
    """The mask of trees as the model's attention reads it: transformers' sdpa booleans, its eager one what is added to
    the products (booleans too, as 0 and 1). None for others, and where branches do not come out as if alone."""
    kinds: dict[str, Masks] = {"sdpa": tree_mask, "eager": lambda segment_BS: added(tree_mask(segment_BS), model.dtype)}
    masks = kinds.get(attention(model))
    if masks is None:
        return None
    try:
        apart = keeps_branches_apart(model, masks)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if ranks.is_out_of_memory(error):
            raise
        apart = False  # a model that takes no mask of four dimensions
    return masks if agreed(model, apart) else None


@torch.no_grad()
def keeps_branches_apart(model: Any, masks: Masks) -> bool:
    """Whether the second branch of a tree, which is padded as well, comes out as if alone: tried on short ones."""
    trunk, row = (0, 1, 2), (3, 2, 1)

    def logits(*first: tuple[int, ...]) -> Tensor:
        longer = [Tree(trunk, (Branch(3 * ids, 1),)) for ids in first]
        own = Tree(trunk, tuple(Branch(ids, 1) for ids in (*first, row)))
        batch = collate_trees([own, *longer], 0, model.device, masks if first else row_mask)
        found: Tensor = model(**model_inputs(batch)).logits
        return found[0, 1 - len(row) :].cpu().double()

    with evaluating(model):
        beside, beside_another = logits((2, 3, 0, 1, 2)), logits((3, 1, 0, 0, 3))
        return as_if_alone(logits(), beside, beside_another, rounding(model), APART)


def agreed(model: Any, found: bool) -> bool:
    """The same on all ranks of a model that lies in parts on them, which compute in step."""
    return ranks.agree(found) if ranks.sharded(model) else found


def reach(model: Any) -> float:
    """How many tokens a token sees, itself included, in the layers where it sees least."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    found = [getattr(config, key, None) for key, kind in WINDOWS.items() if kinds is None or kind in kinds]
    return min((window for window in found if window), default=math.inf)
