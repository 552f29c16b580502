"""python -m mixlora.generate run=RUN_FOLDER prompt="Why is the sky blue?", or a prompt a line on standard input."""

import sys
from pathlib import Path

from omegaconf import DictConfig

from mixlora.config.cli import door
from mixlora.errors import ConfigError


@door("generate")
def main(cfg: DictConfig) -> None:
    run = Path(str(cfg.run))
    if cfg.prompt is None and sys.stdin.isatty():
        raise ConfigError('Nothing to answer: give prompt="...", or lines on standard input')
    from mixlora import loading
    from mixlora.config.schema import Data
    from mixlora.evaluation.generation import generate
    from mixlora.tasks.example import Example
    from mixlora.tasks.prompts import Formatter

    loaded = loading.load(run)
    data = loading.config_of(run).data if (run / "config.yaml").is_file() else Data()
    formatter = Formatter(loaded.tokenizer, data)
    prompts = [str(cfg.prompt)] if cfg.prompt is not None else [line.rstrip("\n") for line in sys.stdin]
    examples = [Example(id=str(i), task="prompt", question=text, answer="") for i, text in enumerate(prompts)]
    limit = loaded.model.config.max_position_embeddings - cfg.max_new_tokens
    texts = generate(
        loaded.model,
        loaded.tokenizer,
        [formatter.prompt(example, max_length=limit).ids for example in examples],
        max_new_tokens=cfg.max_new_tokens,
        batch_size=8,
        temperature=cfg.temperature,
        seeds=[cfg.seed * 1_000_003 + i for i in range(len(prompts))],
    )
    for text in texts:
        print(text.strip())


if __name__ == "__main__":
    main()
