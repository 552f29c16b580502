"""python -m mixlora.generate run=RUN_FOLDER prompt="Why is the sky blue?", or a prompt a line on standard input."""

import sys
from typing import Any

from omegaconf import DictConfig

from mixlora.config.cli import door
from mixlora.config.doors import Generate, run_folder
from mixlora.config.typed import typed
from mixlora.errors import ConfigError, DataError


@door("generate", Generate)
def main(cfg: DictConfig) -> None:
    options = typed(Generate, cfg)
    run = run_folder(options.run)
    if options.prompt is None and sys.stdin.isatty():
        raise ConfigError('Nothing to answer: give prompt="...", or lines on standard input')
    from mixlora import loading
    from mixlora.models.base import accelerator
    from mixlora.remedies import ANSWERING, FITTING, with_remedies

    with with_remedies(run, FITTING):
        loaded = loading.load(run, str(accelerator() or "cpu"), options.model)
    with with_remedies(run, ANSWERING):
        texts = answers(loaded, loading.formatter(run, loaded.tokenizer), options)
    for text in texts:
        print(text.strip())


def answers(loaded: Any, formatter: Any, options: Generate) -> list[str]:
    """What the model says to the prompt, or to each line of standard input."""
    from mixlora.evaluation.generation import generate
    from mixlora.models.base import USUAL_WINDOW, window
    from mixlora.models.likelihood import pads_rows
    from mixlora.tasks.example import Example

    prompts = [options.prompt] if options.prompt is not None else lines()
    examples = [Example(id=str(i), task="prompt", question=text, answer="") for i, text in enumerate(prompts)]
    most = window(loaded.model) or USUAL_WINDOW
    limit = most - options.max_new_tokens
    if limit < 1:
        raise ConfigError(
            f"max_new_tokens={options.max_new_tokens} leaves no room for a prompt: this model sees {most} tokens. "
            "Lower it"
        )
    return generate(
        loaded.model,
        loaded.tokenizer,
        [formatter.prompt(example, max_length=limit).ids for example in examples],
        max_new_tokens=options.max_new_tokens,
        batch_size=8,
        ends=formatter.end_ids,
        temperature=options.temperature,
        seeds=[options.seed * 1_000_003 + i for i in range(len(prompts))],
        pads=pads_rows(loaded.model),
    )


def lines() -> list[str]:
    """Of standard input. Raises DataError where they are not UTF-8."""
    try:
        found = [line.rstrip("\n") for line in sys.stdin]
        "".join(found).encode()  # where Python takes what it cannot read for halves of a letter
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise DataError(f"standard input is not UTF-8 ({error.reason})") from None
    return found


if __name__ == "__main__":
    main()
