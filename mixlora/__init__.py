"""mixlora: mixture-of-LoRA fine-tuning of language models. One equation, y = W x + s B (g(x) ⊙ A x)."""

from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def load(folder: str | Path, device: str = "cpu") -> Any:
    """The trained model of a run folder (or of a PEFT LoRA folder): a transformers causal LM in evaluation mode."""
    from mixlora.loading import load as load_model

    return load_model(Path(folder), device).model


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of the base model of a run folder."""
    from mixlora.loading import tokenizer

    return tokenizer(Path(folder))
