"""Score a trained run or a bare base model again: what `python -m mixlora.evaluate` does."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mixlora import loading, ranks, signals
from mixlora.adapters import files
from mixlora.checks import check
from mixlora.config import load as configs
from mixlora.config.schema import Config
from mixlora.console import say
from mixlora.environment import world_size
from mixlora.errors import ConfigError, DataError
from mixlora.evaluation.report import print_results
from mixlora.models import base
from mixlora.parts import Parts, loaded
from mixlora.records import owned, require_place
from mixlora.remedies import with_remedies
from mixlora.scoring import Scoring
from mixlora.tasks import TaskData


def reevaluate(config: Config, run: str | None, folder: str | None = None) -> Path:
    """Write results and predictions into `folder`, or one that is named by what was asked; returns it.

    A run's own folder is not touched: the results stand in `<run>/evaluations/<hash>`.
    """
    with signals.raised():
        return rescored(config, run, folder)


def rescored(config: Config, run: str | None, given: str | None) -> Path:
    name = configs.evaluation_name(config)
    folder = Path(run) / "evaluations" / name if run else Path(config.output_root) / f"{config.model.name}-{name}"
    folder = Path(given) if given else folder
    if any((folder / name).is_file() for name in ("config.yaml", "run.json")):
        raise ConfigError(f"run_dir={folder} is a run's own folder, whose scores stay as they are. Name another one")
    config.run_dir = str(folder)
    check(config)
    if world_size() == 1:  # of several ranks the first alone writes
        require_place(folder)
    trained = None if run is None else loading.described(Path(run))[2]
    parts = Rescored(config, None if run is None else configs.config_of(configs.read(run)))
    with with_remedies(folder):
        parts.accelerator  # noqa: B018  starts the process group
        with ranks.together(config.rank_timeout) as watch, with_remedies(folder):
            scored(parts, folder, trained, watch)
    parts.accelerator.end_training()
    return folder


def scored(parts: "Rescored", folder: Path, trained: Path | None, watch: ranks.Watch) -> None:
    """Load the model, with the adapter in `trained` where there is one, and write its scores into `folder`."""
    config, device = parts.config, parts.accelerator.device
    parts.tell_notes()
    parts.require_prerequisites()
    model = base.load(loading.for_device(config.model, device), device=device, tokenizer=parts.tokenizer).known()
    ranks.require_same("base model's weights", model.sha256)
    adapter = {} if trained is None else loading.attached(model.model, config.method, config.model)
    if trained is not None:
        files.load(trained, adapter)
    scoring, main = Scoring(parts, model, watch.at), parts.accelerator.is_main_process
    with owned(folder) if main else nullcontext():
        scoring.evaluate(folder, "score", base.fingerprint(adapter))
    if main:
        print_results(folder)
        say(f"Wrote {folder}")


@dataclass
class Rescored(Parts):
    """The parts by which a model is scored that was trained before, or never.

    Args:
        before: the configuration that it was trained with; None for a bare model.
    """

    before: Config | None = None

    @cached_property
    def data(self) -> Mapping[str, TaskData]:
        return loaded(self.config) if self.as_before else loaded(self.config, self.trained)

    @cached_property
    def trained(self) -> Mapping[str, TaskData]:
        """The tasks that it was trained on, with their rows. Where these cannot be read here any more that is said, for
        the scores do not depend on them."""
        if self.before is None:
            return {}
        if self.as_before:
            return {name: data for name, data in self.data.items() if data.drawn}
        try:
            found = loaded(self.before)
        except DataError as error:
            say(f"Note: which of the scored rows were also trained on is not known here: {error}")
            mixture = self.before.tasks.mixture.items()
            return {
                name: TaskData(name=name, task=task) for name, task in mixture if task.weight and not task.eval_only
            }
        return {name: data for name, data in found.items() if data.drawn}

    @property
    def notes(self) -> list[str]:
        """Of the tasks that are scored."""
        return [note for data in self.data.values() for note in data.notes]

    @property
    def as_before(self) -> bool:
        """Whether the tasks are those of training, which are then read once."""
        before, now = self.before, self.config
        return before is not None and before.tasks == now.tasks and before.data == now.data
