"""python -m mixlora.lm_eval --model mixlora --model_args run=FOLDER --tasks arc_easy,piqa ...

The command line of lm-evaluation-harness with one more model. (The harness finds no models of other packages by itself,
so its own `lm_eval` command cannot know this one.) Every switch of the harness works.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from mixlora.errors import ConfigError, exit_status


def main() -> int:
    return exit_status(run_harness)


def run_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("this command needs lm-evaluation-harness: pip install 'lm_eval>=0.4.13'")
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


def register() -> None:
    """Make `mixlora` a model of the harness in this process."""
    from lm_eval.api.registry import model_registry

    if "mixlora" not in model_registry:
        model_registry.register("mixlora", target=mixture_lm_class())


def mixture_lm_class() -> type:
    """The model that `--model mixlora --model_args run=FOLDER` names."""
    from lm_eval.models.huggingface import HFLM

    class MixtureLM(HFLM):
        """A run folder of mixlora: base model, adapter and gates."""

        def __init__(self, run: str = "", device: str | None = None, **options: Any):
            if not run:
                raise ConfigError("say which run: --model mixlora --model_args run=FOLDER")
            import torch

            from mixlora import loading
            from mixlora.models import base

            # The harness asks for a GPU unless it is told otherwise.
            here = str(base.accelerator() or "cpu")
            place = here if device is None or (device.startswith("cuda") and not torch.cuda.is_available()) else device
            loaded = loading.load(Path(run), device=place)
            super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, device=place, **options)

    return MixtureLM


if __name__ == "__main__":
    sys.exit(main())
