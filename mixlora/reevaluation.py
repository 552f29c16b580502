"""Score a trained run or a bare base model again: what `python -m mixlora.evaluate` does."""

from pathlib import Path

from mixlora.adapters import files
from mixlora.adapters.attach import attach
from mixlora.checks import check
from mixlora.config import load as configs
from mixlora.config.schema import Config
from mixlora.console import say
from mixlora.evaluation.report import print_results
from mixlora.models import base
from mixlora.parts import Parts
from mixlora.scoring import Scoring


def reevaluate(config: Config, run: str | None) -> Path:
    """Write results and predictions into a folder named by what was asked; returns the folder.

    A run's own folder is not touched: the results stand in `<run>/evaluations/<hash>`.
    """
    name = f"{config.tasks.name}-{configs.digest(config)[:8]}"
    folder = Path(run) / "evaluations" / name if run else Path(config.output_root) / f"{config.model.name}-{name}"
    config.run_dir = str(folder)
    check(config)
    parts = Parts(config)
    parts.tell_notes()
    parts.require_means()
    loaded = base.load(config.model, device=parts.accelerator.device, tokenizer=parts.tokenizer)
    adapter = {} if run is None else attach(loaded.model, config.method, config.model)
    if run is not None:
        files.load(Path(run) / "adapter", adapter)
    Scoring(parts, loaded).evaluate(folder, "score", base.fingerprint(adapter))
    if parts.accelerator.is_main_process:
        print_results(folder)
        say(f"Wrote {folder}")
    return folder
