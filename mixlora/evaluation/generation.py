"""Generated answers: left-padded batches, greedy or sampled with a seed, ended by what ends an answer in training.

Nothing of the rules that a model's authors keep beside it is taken over but the tokens that end a text: some penalise
repetition, and those of a base model need not know the token by which its chat template ends an answer.

B rows of a batch   V vocabulary
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from mixlora.errors import NumericsError
from mixlora.evaluation.batches import batches

GENERATION_VERSION = 2  # raised by one whenever the same prompt would be answered otherwise


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    batch_tokens: int = 1 << 30,
    ends: Sequence[int] = (),
    stop: Sequence[str] = (),
    temperature: float = 0.0,
    beams: int = 1,
    seeds: Sequence[int] = (),
    pads: bool = True,
    on_done: Callable[[int], None] = lambda count: None,
    on_cut: Callable[[int], None] = lambda place: None,
) -> list[str]:
    """The text that follows each prompt, in the order of `prompts`, up to the first of the tokens `ends`, of those that
    the model and its tokenizer end a text with, and of the strings `stop`.

    `temperature` 0 is greedy, or beam search with `beams` above 1. Sampling takes one of `seeds` for each prompt, and a
    sample depends neither on its batch nor on its process. Without `pads` only prompts of one length share a batch.
    `on_cut` hears the place of each prompt whose answer had no end within `max_new_tokens`.
    """
    texts = [""] * len(prompts)
    lengths = [(len(prompt) + max_new_tokens) * beams for prompt in prompts]
    device = next(model.parameters()).device
    ends = sorted({*ends, *own_ends(model, tokenizer)})
    for chosen in batches(lengths, batch_size, batch_tokens, None if pads else 0):
        draws = [Draw(temperature, [seeds[i] for i in chosen], device)] if temperature > 0 else []
        asked, number = [prompts[i] for i in chosen], 1 if draws else beams
        with by_rules(model, GenerationConfig(eos_token_id=ends or None, pad_token_id=tokenizer.pad_token_id)):
            new = continue_batch(model, tokenizer, asked, max_new_tokens, stop, draws, number)
        for i, ids in zip(chosen, new, strict=True):
            # Older transformers would take blanks away before punctuation where the tokenizer's file asks for it.
            whole = before(ends, ids)
            said = tokenizer.decode(whole, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            texts[i] = cut(said, stop)
            if len(whole) == max_new_tokens and texts[i] == said:
                on_cut(i)
        on_done(len(chosen))
    return texts


def continue_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[str],
    draws: Sequence[LogitsProcessor],
    beams: int,
) -> list[list[int]]:
    longest, device = max(map(len, prompts)), next(model.parameters()).device
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    stops = {"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}
    watched = Watched()
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        do_sample=False,
        num_beams=beams,
        logits_processor=LogitsProcessorList([watched, *draws]),
        **stops,
    )
    if watched.broken:
        raise NumericsError(
            f"the model's logits were not finite after one of {len(prompts)} prompts. {NumericsError.WIDER}"
        )
    found: list[list[int]] = out[:, longest:].tolist()
    return found


def own_ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens by which a model and its tokenizer end a text."""
    found = model.generation_config.eos_token_id
    found = found if isinstance(found, list) else [found]
    return [token for token in (*found, tokenizer.eos_token_id) if token is not None]


@contextmanager
def by_rules(model: Any, rules: GenerationConfig) -> Iterator[None]:
    """`rules` alone inside the block: transformers fills what a call leaves open from the model's own."""
    own, model.generation_config = model.generation_config, rules
    try:
        yield
    finally:
        model.generation_config = own


def before(ends: Sequence[int], ids: list[int]) -> list[int]:
    """What stands before the first end, which not every tokenizer takes for a special token."""
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


class Watched(LogitsProcessor):
    """Whether a logit was no number, or had no bound; read at the end, so that no token waits for it."""

    def __init__(self) -> None:
        self.broken: Tensor | bool = False

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        broken_BV = ~(scores_BV < torch.inf)
        self.broken |= broken_BV.any()
        return scores_BV.masked_fill(broken_BV, 0.0)  # a GPU that is to draw from no numbers ends the process


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
