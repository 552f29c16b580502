"""Generated answers: left-padded batches, greedy or sampled with a seed, cut at the first stop string."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: Sequence[str] = (),
    temperature: float = 0.0,
    seed: int = 0,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """The text that follows each prompt, in the order of `prompts`.

    `temperature` 0 is greedy. Sampling seeds the generator with (seed, number of the prompt), one prompt at a time, so
    that a sample does not depend on its batch.
    """
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    size = batch_size if temperature == 0 else 1
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        if temperature > 0:
            torch.manual_seed(seed * 1_000_003 + chosen[0])
        new = continue_batch(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens, stop, temperature)
        for i, text in zip(chosen, new, strict=True):
            texts[i] = cut(text, stop)
        on_done(len(chosen))
    return texts


def continue_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[str],
    temperature: float,
) -> list[str]:
    longest, device = max(map(len, prompts)), next(model.parameters()).device
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    stops = {"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        **sampling,
        **stops,
    )
    return tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    ends = [text.index(s) for s in stop if s in text]
    return text[: min(ends)] if ends else text
