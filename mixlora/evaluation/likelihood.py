"""Option questions: the log-likelihood of every option's text after the prompt.

All options of a question stand behind one copy of its prompt, each seeing the prompt and itself (a tree in the
attention mask, positions counted from the end of the prompt), so the prompt is computed once. Logits are taken only
where an option's token is predicted.

    B questions   S positions   N predicted tokens   V vocabulary
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixlora.models.likelihood import keeps_logits
from mixlora.tasks.example import Example
from mixlora.tasks.prompts import Formatter


@dataclass(frozen=True)
class OptionScores:
    """One question: nats and tokens of each option, in the order of the example's options."""

    id: str
    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Tree:
    """A tokenised question: the prompt once, then every option."""

    prompt_ids: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + sum(map(len, self.options))


@dataclass(frozen=True)
class TreeBatch:
    """Padded on the left. `source`, `target` and `option` have one entry for each predicted token."""

    input_ids_BS: Tensor
    position_ids_BS: Tensor
    mask_B1SS: Tensor
    keep: int  # logits of the last `keep` positions are needed
    source_N: Tensor  # where it is predicted, in the flattened kept positions
    target_N: Tensor
    option_N: Tensor  # the option it belongs to, counted over the batch


@torch.no_grad()
def score_options(
    model: nn.Module,
    formatter: Formatter,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    max_length: int,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[OptionScores]:
    """Score every option of every example; results in the order of `examples`, whatever the batches were.

    Questions of like length share a batch. `on_done` hears how many questions were scored.
    """
    trees, texts = [], []
    for example in examples:
        prompt_ids, options, option_texts = formatter.continuations(example, max_length=max_length)
        trees.append(Tree(tuple(prompt_ids), tuple(tuple(option) for option in options)))
        texts.append(tuple(option_texts))
    nats = score_trees(model, trees, batch_size=batch_size, pad_id=pad_id, on_done=on_done)
    return [
        OptionScores(example.id, tuple(n), tuple(map(len, tree.options)), t)
        for example, tree, n, t in zip(examples, trees, nats, texts, strict=True)
    ]


@torch.no_grad()
def score_trees(
    model: nn.Module,
    trees: Sequence[Tree],
    *,
    batch_size: int,
    pad_id: int,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[list[float]]:
    """Log-likelihood in nats of every option of every question, in their order."""
    first = next(model.parameters())
    cut = keeps_logits(model)
    order = sorted(range(len(trees)), key=lambda i: -len(trees[i]))
    nats: list[list[float]] = [[] for _ in trees]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate_trees([trees[i] for i in chosen], pad_id, first.device)
        scores = iter(tree_nats(model, batch, cut).tolist())
        for i in chosen:
            nats[i] = [next(scores) for _ in trees[i].options]
        on_done(len(chosen))
    return nats


def tree_nats(model: nn.Module, batch: TreeBatch, cut: bool) -> Tensor:
    """Nats of each option of the batch, in order."""
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
    """Rows of [pad, prompt, option 1, option 2, ...] with the mask that keeps options apart."""
    longest, keep = max(map(len, trees)), 1 + max(len(tree) - len(tree.prompt_ids) for tree in trees)
    ids, positions, segments = [], [], []
    source: list[int] = []
    target: list[int] = []
    option: list[int] = []
    for b, tree in enumerate(trees):
        pad, prompt = longest - len(tree), len(tree.prompt_ids)
        ids.append([pad_id] * pad + [t for part in (tree.prompt_ids, *tree.options) for t in part])
        positions.append([0] * pad + [*range(prompt), *(prompt + j for o in tree.options for j in range(len(o)))])
        segments.append([-1] * pad + [0] * prompt + [i + 1 for i, o in enumerate(tree.options) for _ in o])
        start = b * keep + keep - (len(tree) - prompt)
        end_of_prompt = start - 1
        number = option[-1] + 1 if option else 0
        for i, o in enumerate(tree.options):
            source += [end_of_prompt, *range(start, start + len(o) - 1)]
            target += o
            option += [number + i] * len(o)
            start += len(o)
    tensors = (torch.tensor(x, device=device) for x in (ids, positions, source, target, option))
    ids_BS, positions_BS, source_N, target_N, option_N = tensors
    mask_B1SS = tree_mask(torch.tensor(segments, device=device))
    return TreeBatch(ids_BS, positions_BS, mask_B1SS, keep, source_N, target_N, option_N)


def tree_mask(segment_BS: Tensor) -> Tensor:
    """True where a position may look: earlier, real, and in the prompt (segment 0) or the same option. [B, 1, S, S]"""
    query, key = segment_BS[:, :, None], segment_BS[:, None, :]
    place = torch.arange(segment_BS.shape[1], device=segment_BS.device)
    earlier = place[None, :] <= place[:, None]
    allowed = earlier & (key >= 0) & ((key == 0) | (key == query))
    # A padded position looks at itself: a row of the softmax must not be empty.
    return (allowed | torch.eye(len(place), dtype=torch.bool, device=place.device))[:, None]
