"""Option questions: the log-likelihood of every option's text after the prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mixlora.models.likelihood import answer_losses, keeps_logits
from mixlora.tasks.collate import Row, collate
from mixlora.tasks.example import Example
from mixlora.tasks.prompts import Formatter


@dataclass(frozen=True)
class OptionScores:
    """One question: nats and tokens of each option, in the order of the example's options."""

    id: str
    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    texts: tuple[str, ...]


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

    Rows of like length share a batch. `on_done` hears how many options were scored.
    """
    rows, texts = [], []
    for example in examples:
        prompt_ids, options, option_texts = formatter.continuations(example, max_length=max_length)
        rows += [Row(example.id, example.task, tuple(prompt_ids), tuple(option)) for option in options]
        texts.append(tuple(option_texts))
    nats = score_rows(model, rows, batch_size=batch_size, pad_id=pad_id, on_done=on_done)
    scored, at = [], 0
    for example, option_texts in zip(examples, texts, strict=True):
        span = slice(at, at + len(option_texts))
        tokens = tuple(len(row.answer_ids) for row in rows[span])
        scored.append(OptionScores(example.id, tuple(nats[span]), tokens, option_texts))
        at = span.stop
    return scored


@torch.no_grad()
def score_rows(
    model: nn.Module, rows: Sequence[Row], *, batch_size: int, pad_id: int, on_done: Callable[[int], None]
) -> list[float]:
    """Log-likelihood in nats of each row's continuation, in the order of `rows`."""
    device, keep = next(model.parameters()).device, keeps_logits(model)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].prompt_ids) - len(rows[i].answer_ids))
    nats = [0.0] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([rows[i] for i in chosen], pad_id).to(device)
        loss_B, _ = answer_losses(model, batch, keep_logits=keep)
        for i, loss in zip(chosen, loss_B.tolist(), strict=True):
            nats[i] = -loss
        on_done(len(chosen))
    return nats
