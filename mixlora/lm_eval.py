"""python -m mixlora.lm_eval --model mixlora --model_args run=FOLDER --tasks arc_easy,piqa ...

The command line of lm-evaluation-harness with one more model. (The harness finds no models of other packages by itself,
so its own `lm_eval` command cannot know this one.) Every switch of the harness works.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from mixlora.errors import ConfigError, exit_status


def main() -> int:
    return exit_status(run_harness)


def run_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("this command needs lm-evaluation-harness: pip install 'lm_eval>=0.4.13'")
    if not sys.stderr.isatty():  # bars of a model that is loaded; the harness's own stay
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
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
        """A run folder of mixlora: base model, adapter and gates. What may be said of the base model is what
        `mixlora.load` takes."""

        def __init__(
            self,
            run: str = "",
            device: str | None = None,
            dtype: str | None = None,
            model_path: str | None = None,
            trust_remote_code: bool = False,
            **options: Any,
        ):
            if not run:
                raise ConfigError("say which run: --model mixlora --model_args run=FOLDER")
            import torch

            from mixlora import loading
            from mixlora.models import base

            # The harness asks for a GPU unless it is told otherwise.
            here = str(base.accelerator() or "cpu")
            place = here if device is None or (device.startswith("cuda") and not torch.cuda.is_available()) else device
            now = loading.model_now(model_path, dtype, trust_remote_code)
            loaded = loading.load(Path(os.path.expanduser(run)), place, now)
            super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, device=place, **options)

    return MixtureLM


if __name__ == "__main__":
    sys.exit(main())
