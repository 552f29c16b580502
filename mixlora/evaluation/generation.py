"""Generated answers: left-padded batches, greedy or sampled with a seed, cut at the first stop string.

B rows of a batch   V vocabulary
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from mixlora.evaluation.batches import batches


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    batch_tokens: int = 1 << 30,
    stop: Sequence[str] = (),
    temperature: float = 0.0,
    beams: int = 1,
    seeds: Sequence[int] = (),
    pads: bool = True,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """The text that follows each prompt, in the order of `prompts`.

    `temperature` 0 is greedy, or beam search with `beams` above 1. Sampling takes one of `seeds` for each prompt, and a
    sample depends neither on its batch nor on its process. Without `pads` only prompts of one length share a batch.
    """
    texts = [""] * len(prompts)
    lengths = [(len(prompt) + max_new_tokens) * beams for prompt in prompts]
    device = next(model.parameters()).device
    for chosen in batches(lengths, batch_size, batch_tokens, None if pads else 0):
        how: dict[str, Any] = {"num_beams": beams}
        if temperature > 0:
            how = {"logits_processor": LogitsProcessorList([Draw(temperature, [seeds[i] for i in chosen], device)])}
        new = continue_batch(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens, stop, how)
        for i, text in zip(chosen, new, strict=True):
            texts[i] = cut(text, stop)
        on_done(len(chosen))
    return texts


def continue_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[str],
    how: dict[str, Any],
) -> list[str]:
    longest, device = max(map(len, prompts)), next(model.parameters()).device
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    stops = {"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        do_sample=False,
        **how,
        **stops,
    )
    return tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)


class Draw(LogitsProcessor):
    """The next token of each row, drawn by a generator of the row's own: t ~ softmax(z / temperature).

    Only the drawn token keeps a finite score, so greedy search takes it.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], device: torch.device):
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        p_BV = (scores_BV / self.temperature).softmax(-1)
        drawn = [torch.multinomial(p_V, 1, generator=g) for p_V, g in zip(p_BV, self.generators, strict=True)]
        return torch.full_like(scores_BV, -torch.inf).scatter(1, torch.stack(drawn), 0.0)


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    ends = [text.index(s) for s in stop if s in text]
    return text[: min(ends)] if ends else text
