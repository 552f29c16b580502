"""mixlora: mixture-of-LoRA fine-tuning of language models. One equation, y = W x + s B (g(x) ⊙ A x)."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__version__ = "0.1.0"


def load(
    folder: str | Path,
    device: str = "cpu",
    *,
    dtype: "str | torch.dtype | None" = None,
    model_path: str | Path | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """The trained model of a run folder (or of a PEFT LoRA folder): a transformers causal LM in evaluation mode.

    Args:
        dtype: of the base model; None: as the run has it.
        model_path: where the base model lies now, a folder or a hub id; None: where it lay in training.
        trust_remote_code: let the code run that comes with the base model, which a folder alone cannot ask for.

    Raises:
        ConfigError, CheckpointError, DataError: naming what is missing or does not fit.
    """
    from mixlora import loading

    now = loading.model_now(model_path, dtype, trust_remote_code)
    return loading.load(Path(os.path.expanduser(folder)), device, now).model


def load_tokenizer(
    folder: str | Path, *, model_path: str | Path | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """The tokenizer of the base model of a run folder. Arguments and errors are those of `load`."""
    from mixlora import loading

    now = loading.model_now(model_path, None, trust_remote_code)
    return loading.tokenizer(Path(os.path.expanduser(folder)), now)
