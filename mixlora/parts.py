"""What a run is made of, built from its configuration on demand: data, tokenizer, prompts, plan, rows, devices."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin
from transformers import PreTrainedTokenizerBase

from mixlora import ranks, tasks
from mixlora.checks import AS_THEY_ARE
from mixlora.config import load as configs
from mixlora.config.schema import Answer, Backend, Config, Loss, Split, Tracker
from mixlora.console import say
from mixlora.environment import world_size
from mixlora.errors import ConfigError, DataError, first_line
from mixlora.evaluation import harness, protocols, sandbox
from mixlora.failpoints import reach
from mixlora.models import base
from mixlora.tasks import fewshot
from mixlora.tasks.collate import Row
from mixlora.tasks.example import Example
from mixlora.tasks.mixture import Plan, plan
from mixlora.tasks.overlap import listed
from mixlora.tasks.parse import MOST_BAD
from mixlora.tasks.prompts import Formatter
from mixlora.tasks.styles import STYLES


@dataclass
class Parts:
    """The parts of one configuration, each built once, when it is first asked for."""

    config: Config

    @cached_property
    def folder(self) -> Path:
        return configs.run_folder(self.config)

    @cached_property
    def accelerator(self) -> Accelerator:
        require_usable(world_size())
        tracker, patience = self.config.tracker, self.config.rank_timeout + ranks.GRACE_SECONDS
        return Accelerator(
            # Left to itself on a machine without accelerators, it would start one job of one process on every rank.
            cpu=base.accelerator() is None,
            # Where these are not given, the environment that `accelerate launch` sets decides.
            mixed_precision=AS_THEY_ARE,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=None if tracker is Tracker.none else tracker.value,
            project_dir=str(self.folder),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=patience))],
        )

    def start_tracker(self, *, goes_on: bool) -> None:
        """Only where there is something to track: a run that begins or goes on from a checkpoint."""
        tracker = self.config.tracker
        if tracker is not Tracker.none:
            flat = {"config": json.dumps(configs.plain(self.config))}
            options = {"wandb": wandb_run(self.folder, goes_on=goes_on)} if tracker is Tracker.wandb else {}
            try:
                self.accelerator.init_trackers("mixlora", flat, options)
            except Exception as error:
                if not type(error).__module__.startswith("wandb"):
                    raise
                remedy = "Log in (wandb login), or set WANDB_MODE=offline"
                raise ConfigError(f"tracker=wandb: {first_line(error)}. {remedy}") from error

    @cached_property
    def data(self) -> Mapping[str, tasks.TaskData]:
        reach("data.load")
        return loaded(self.config)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return base.load_tokenizer(self.config.model)

    @cached_property
    def formatter(self) -> Formatter:
        return Formatter(self.tokenizer, self.config.data)

    @cached_property
    def trained(self) -> Mapping[str, tasks.TaskData]:
        """The tasks that rows are drawn of."""
        return {name: data for name, data in self.data.items() if data.drawn}

    @cached_property
    def in_place(self) -> dict[str, dict[int, int]]:
        """Of each task the rows whose answer leaves no room for a question in train.max_length, and the next row that
        fits, which is drawn in the place of each: all other draws stay as they are.

        Raises:
            DataError: more of them than may be left out.
        """
        return {name: self.next_that_fits(data) for name, data in self.trained.items()}

    def next_that_fits(self, data: tasks.TaskData) -> dict[int, int]:
        most, number = self.config.train.max_length, len(data.train)
        long = [i for i, example in enumerate(data.train) if not self.formatter.fits(example, most)]
        if len(long) > MOST_BAD * number:
            raise DataError(
                f"{self.long_answers_note(data, long)}. Raise it: they are more than the {MOST_BAD:.0%} that may be "
                "left out"
            )
        found: dict[int, int] = {}
        for i in reversed([*long, *(i + number for i in long)]):  # round, for the last row may be one of them
            found[i] = found.get(i + 1, i + 1)
        return {i: found[i] % number for i in long}

    def long_answers_note(self, data: tasks.TaskData, long: Sequence[int]) -> str:
        what = f"{len(long)} of {len(data.train):,} training rows have an answer that leaves no room for the question"
        ids = listed([data.train[i].id for i in long])
        return f"task {data.name}: {what} in train.max_length={self.config.train.max_length}: {ids}"

    @cached_property
    def evaluated(self) -> dict[str, tasks.TaskData]:
        return {name: data for name, data in self.data.items() if not data.task.train_only}

    @cached_property
    def validated(self) -> dict[str, tasks.TaskData]:
        """The tasks that are scored while a run trains."""
        return {name: data for name, data in self.evaluated.items() if data.validation and self.runnable(data)}

    @cached_property
    def plan(self) -> Plan:
        """Which row of which task each draw takes, for the whole run."""
        mixture = self.config.tasks
        sizes = {name: len(data.train) for name, data in self.trained.items()}
        total = self.rows_a_step * self.steps
        return plan(
            sizes,
            {name: data.task.weight for name, data in self.trained.items()},
            sampling=mixture.sampling,
            temperature=mixture.temperature,
            size_cap=mixture.size_cap,
            caps={name: data.task.cap for name, data in self.trained.items()},
            total=total,
            seed=self.config.seed,
        )

    @property
    def rows_a_step(self) -> int:
        train = self.config.train
        return train.per_device_train_batch_size * train.gradient_accumulation_steps * self.accelerator.num_processes

    @cached_property
    def steps(self) -> int:
        train = self.config.train
        if train.max_steps is not None:
            return train.max_steps
        rows = sum(min(len(d.train), d.task.cap or len(d.train)) for d in self.trained.values())
        return max(1, round((train.epochs or 1.0) * rows / self.rows_a_step))

    def examples(self, data: tasks.TaskData) -> Sequence[Example]:
        return self.split(data)[: self.config.eval.limit]

    def split(self, data: tasks.TaskData) -> Sequence[Example]:
        """The rows that are scored, where nothing limits them."""
        return data.validation if self.config.eval.split is Split.validation else data.test

    def is_limited(self, data: tasks.TaskData) -> bool:
        return len(self.examples(data)) < len(self.split(data))

    def also_trained_on(self, data: tasks.TaskData) -> int | None:
        """How many of the rows that are scored; None where the rows of an earlier training cannot be read any more."""
        if not all(drawn.train for drawn in self.trained.values()):
            return None
        known = {*data.trained_on.get(self.config.eval.split.value, [])}
        return sum(example.id in known for example in self.examples(data))

    def unscored(self, data: tasks.TaskData) -> str | None:
        """Why a task is not scored, where it is not."""
        if not self.runnable(data):
            return "generated code is run only with eval.allow_code_execution=true"
        if not self.examples(data):
            return f"there are no {self.config.eval.split.value} rows"
        return None

    @cached_property
    def shots(self) -> dict[str, list[Example]]:
        """The solved examples that stand before each task's questions."""
        number, seed = self.config.eval.num_fewshot, self.config.eval.fewshot_seed
        if self.config.eval.backend is Backend.lm_eval:  # which draws its own
            return {}
        return {
            name: fewshot.draw(name, data.train, [*data.validation, *data.test], number, seed)
            for name, data in self.evaluated.items()
            if self.runnable(data)
        }

    def row(self, task: str, example: Example) -> Row:
        encoded = self.formatter.encode(example, max_length=self.config.train.max_length)
        on_prompt = self.config.data.loss_on is Loss.all
        return Row(example.id, task, tuple(encoded.prompt_ids), tuple(encoded.answer_ids), on_prompt)

    def rows(self, first: int, number: int) -> list[Row]:
        drawn = self.plan.draws(first, number)
        places = ((name, self.in_place[name].get(index, index)) for name, index in drawn)
        return [self.row(name, self.trained[name].train[index]) for name, index in places]

    def runnable(self, data: tasks.TaskData) -> bool:
        return data.task.answer_kind is not Answer.code or self.config.eval.allow_code_execution

    def require_prerequisites(self) -> None:
        """What the scoring needs is there: found before the model is loaded.

        Raises:
            SandboxError: programs are to be run and no sandbox holds.
            ConfigError: no task has a row of the split that is to be scored; lm-evaluation-harness on several
                processes, where it returns results on the first alone.
        """
        if self.config.eval.backend is Backend.lm_eval and self.accelerator.num_processes > 1:
            raise ConfigError(
                f"eval.backend=lm_eval scores on one process, not on {self.accelerator.num_processes}. Use "
                "eval.protocol=lm_eval with eval.backend=own, which asks and scores alike"
            )
        if self.config.eval.backend is Backend.lm_eval:
            harness.require_data([data.task for data in self.evaluated.values()])
        if self.evaluated and not any(map(self.examples, self.evaluated.values())):
            split = self.config.eval.split.value
            raise ConfigError(
                f"eval.split={split}: no task of tasks={self.config.tasks.name} has {split} rows. Use eval.split=test"
            )
        self.shots  # noqa: B018  there are as many as are asked for
        style = STYLES[protocols.protocol_of(self.config.eval, self.config.data).style]
        for data in self.evaluated.values():
            for example in [*self.examples(data), *data.validation]:
                style.check(example)
        if any(data.task.answer_kind is Answer.code and self.runnable(data) for data in self.evaluated.values()):
            sandbox.require()

    @property
    def notes(self) -> list[str]:
        """What the user should know about the data before anything is trained or scored."""
        long = [self.long_answers_note(self.trained[name], [*rows]) for name, rows in self.in_place.items() if rows]
        return [note for data in self.data.values() for note in data.notes] + [
            f"{told}. Others are drawn in their place" for told in long
        ]

    def tell_notes(self) -> None:
        for note in self.notes:
            say(f"Note: {note}")


def loaded(config: Config, trained: Mapping[str, tasks.TaskData] | None = None) -> Mapping[str, tasks.TaskData]:
    """What `tasks.load` says. Of a hub one process asks for all: many at once are turned away."""

    def load() -> Mapping[str, tasks.TaskData]:
        return tasks.load(config.tasks, config.data, config.seed, trained)

    return ranks.of_first(load) if config.data.source == "hub" else load()


def require_usable(processes: int) -> None:
    """Say where a GPU will not be used.

    Raises:
        ConfigError: by one of several processes: on other machines they may use theirs, and would wait for this one.
    """
    if not base.unusable_gpu():
        return
    what = f"this machine has a GPU that PyTorch {torch.__version__} cannot use: no CUDA in it, or too old a driver"
    if processes > 1:
        raise ConfigError(f"{what}. Install another, or set CUDA_VISIBLE_DEVICES= to compute on CPUs on every machine")
    say(f"Note: {what}. It computes on the CPU")


def wandb_run(folder: Path, *, goes_on: bool) -> dict[str, str]:
    """What W&B calls the run of this folder. One that goes on is the same run there: its own files here name it. One
    that begins again is another, for W&B takes no step a second time."""
    found = {"name": folder.name, "dir": str(folder)}
    last = re.fullmatch(r"(?:offline-)?run-\d+_\d+-(.+)", (folder / "wandb" / "latest-run").resolve().name)
    return found | {"id": last[1], "resume": "allow"} if last and goes_on else found
