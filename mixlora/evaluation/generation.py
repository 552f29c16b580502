"""Generated answers: left-padded batches, greedy or sampled with a seed, cut at the first stop string."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

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
    on_done: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """The text that follows each prompt, in the order of `prompts`.

    `temperature` 0 is greedy, or beam search with `beams` above 1. Sampling takes one prompt at a time and seeds the
    generator with its entry of `seeds`, so that a sample depends neither on its batch nor on its process.
    """
    texts = [""] * len(prompts)
    size = batch_size if temperature == 0 else 1
    lengths = [(len(prompt) + max_new_tokens) * beams for prompt in prompts]
    if temperature > 0:
        how: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    else:
        how = {"do_sample": False, "num_beams": beams}
    for chosen in batches(lengths, size, batch_tokens):
        if temperature > 0:
            torch.manual_seed(seeds[chosen[0]])
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
        **how,
        **stops,
    )
    return tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    ends = [text.index(s) for s in stop if s in text]
    return text[: min(ends)] if ends else text
