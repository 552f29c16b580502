"""Option questions: the log-likelihood of every option's text after its prompt.

The options of a question stand behind one copy of what their prompts share, each seeing that and itself (a tree in the
attention mask, positions counted along each branch), so the prompt is computed once. The last token of an option is
predicted and never read, so it is no input. Logits are taken only where an option's token is predicted.

    B trees   S positions   N predicted tokens   V vocabulary
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixlora.evaluation.batches import batches
from mixlora.models.likelihood import keeps_logits
from mixlora.tasks.prompts import Choice


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
    mask_B1SS: Tensor
    keep: int  # logits of the last `keep` positions are needed
    source_N: Tensor  # where it is predicted, in the flattened kept positions
    target_N: Tensor
    option_N: Tensor  # the branch it belongs to, counted over the batch


def score_choices(
    model: nn.Module,
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
    planted = [trees_of(choices) for choices in asked]
    owner = [i for i, trees in enumerate(planted) for _ in trees]
    left = [len(trees) for trees in planted]
    scores = iter_scores(
        model, [t for trees in planted for t in trees], batch_size=batch_size, batch_tokens=batch_tokens, pad_id=pad_id
    )
    found: dict[int, list[float]] = {}
    for place, nats in scores:
        found[place] = nats
        left[owner[place]] -= 1
        on_done(int(left[owner[place]] == 0))
    collected: list[list[float]] = [[] for _ in asked]
    for place in sorted(found):
        collected[owner[place]] += found[place]
    return collected


def trees_of(choices: Sequence[Choice]) -> list[Tree]:
    """One tree for a question; one a choice where its prompts differ in more than half of their tokens."""
    whole = [(*choice.prompt.ids, *choice.answer_ids) for choice in choices]
    shortest = min(len(choice.prompt.ids) for choice in choices)
    shared = common([choice.prompt.ids for choice in choices])
    if shared < max(1, shortest / 2) and len(choices) > 1:
        return [tree for choice in choices for tree in trees_of([choice])]
    branches = (Branch(w[shared:], len(c.answer_ids)) for w, c in zip(whole, choices, strict=True))
    return [Tree(whole[0][:shared], tuple(branches))]


def common(rows: Sequence[tuple[int, ...]]) -> int:
    """Length of the beginning that all rows share."""
    low, high = min(rows), max(rows)
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


@torch.no_grad()
def iter_scores(
    model: nn.Module, trees: Sequence[Tree], *, batch_size: int, batch_tokens: int, pad_id: int
) -> Iterator[tuple[int, list[float]]]:
    """(place of a tree, nats of its branches), in the order in which they were computed."""
    device, cut = next(model.parameters()).device, keeps_logits(model)
    for chosen in batches([len(tree) for tree in trees], batch_size, batch_tokens):
        batch = collate_trees([trees[i] for i in chosen], pad_id, device)
        scores = iter(tree_nats(model, batch, cut).tolist())
        for i in chosen:
            yield i, [next(scores) for _ in trees[i].branches]


def tree_nats(model: nn.Module, batch: TreeBatch, cut: bool) -> Tensor:
    """Nats of each branch of the batch, in order."""
    logits = model(
        input_ids=batch.input_ids_BS,
        attention_mask=batch.mask_B1SS,
        position_ids=batch.position_ids_BS,
        **({"logits_to_keep": batch.keep} if cut else {}),
    ).logits
    chosen_NV = logits[:, -batch.keep :].flatten(0, 1)[batch.source_N]
    chosen_NV = chosen_NV.to(torch.promote_types(chosen_NV.dtype, torch.float32))
    nats_N = chosen_NV.gather(-1, batch.target_N[:, None])[:, 0] - chosen_NV.logsumexp(-1)
    total = torch.zeros(int(batch.option_N[-1]) + 1, dtype=nats_N.dtype, device=nats_N.device)
    return total.index_add_(0, batch.option_N, nats_N)


def collate_trees(trees: Sequence[Tree], pad_id: int, device: torch.device) -> TreeBatch:
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
    mask_B1SS = tree_mask(torch.tensor(segments, device=device))
    return TreeBatch(ids_BS, positions_BS, mask_B1SS, keep, source_N, target_N, option_N)


def tree_mask(segment_BS: Tensor) -> Tensor:
    """True where a position may look: earlier, real, and in the trunk (segment 0) or the same branch. [B, 1, S, S]"""
    query, key = segment_BS[:, :, None], segment_BS[:, None, :]
    place = torch.arange(segment_BS.shape[1], device=segment_BS.device)
    earlier = place[None, :] <= place[:, None]
    allowed = earlier & (key >= 0) & ((key == 0) | (key == query))
    # A padded position looks at itself: a row of the softmax must not be empty.
    return (allowed | torch.eye(len(place), dtype=torch.bool, device=place.device))[:, None]
