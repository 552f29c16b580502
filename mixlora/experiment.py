"""One run from its configuration to its results: what `python -m mixlora.train` does.

Everything that can be wrong with the configuration or the data is found before the base model is loaded.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from mixlora import losses, ranks, signals
from mixlora.adapters import files, targets
from mixlora.adapters.attach import count, paths, place, prepared
from mixlora.adapters.modules import Wrapper
from mixlora.checks import check, check_training
from mixlora.config import load as configs
from mixlora.config.schema import Config, Tracker
from mixlora.console import bar, say
from mixlora.errors import CheckpointError, ConfigError, Interrupted, MixloraError, ResourceError
from mixlora.evaluation.report import print_results
from mixlora.failpoints import reach
from mixlora.models import base, compiled
from mixlora.parts import Parts
from mixlora.provenance import changes, peak_memory, same_origin, surroundings, with_earlier
from mixlora.records import (
    attempt_path,
    differences,
    finished,
    finished_as,
    owned,
    read_json,
    remove_strays,
    write_json,
    write_text,
)
from mixlora.remedies import with_remedies
from mixlora.scoring import SCORED, Scoring
from mixlora.tasks.collate import Row
from mixlora.training import checkpoint
from mixlora.training.distribute import require_one_dtype
from mixlora.training.loop import Totals, Trainer, require_way
from mixlora.training.recompute import enable_gradient_checkpointing
from mixlora.training.spent import Spent

MENTIONED = 0.05  # share of weights that no adapter can stand beside


@dataclass
class Experiment:
    """One configuration, and the command and the overrides that it came from."""

    config: Config
    command: str
    overrides: Sequence[str] = ()
    surroundings: dict[str, Any] = field(default_factory=dict, init=False)  # of the whole process: taken once

    def __post_init__(self) -> None:
        check(self.config)
        check_training(self.config)
        self.watch = ranks.Watch(self.config.rank_timeout)
        self.parts = Parts(self.config)
        self.folder = self.parts.folder
        self.losses = losses.build(self.config.aux_loss)
        self.start_from: Path | None = None  # a checkpoint, found when the run begins
        self.spent = Spent(lambda: peak_memory(self.parts.accelerator.device))
        self.ways: Callable[[], dict[str, Any]] = dict  # in which training computes: none, till the adapter is there

    def run(self) -> None:
        """Train and evaluate, or go on, or show what is already there."""
        self.spent.began = time.monotonic()
        with signals.raised(), with_remedies(self.folder):
            self.parts.accelerator  # noqa: B018  starts the process group
            # Inside as well: what a rank tells the others is the error that names its remedy.
            with ranks.together(self.config.rank_timeout) as self.watch, with_remedies(self.folder):
                reach("start")
                self.surroundings = surroundings(self.parts.accelerator.device, configs.quantizer(self.config.model))
                if self.config.dry_run:
                    self.announce()
                    self.rehearse()
                    return
                if ranks.agree(self.finished()):
                    say(f"This configuration is finished: {self.folder}")
                    if self.parts.accelerator.is_main_process:
                        self.show()
                    return
                self.announce()
                loaded, adapter = self.load()
                ranks.require_same("base model's weights", loaded.sha256)
                with owned(self.folder) if self.parts.accelerator.is_main_process else nullcontext():
                    if ranks.agree(self.finished()):
                        say(f"Another process has finished this run while the model was loading here: {self.folder}")
                        return
                    self.same_configuration()
                    self.forget_attempt()
                    self.start_from = self.agreed_checkpoint(loaded)
                    self.write_config()
                    with self.failure_recorded(), with_remedies(self.folder):
                        self.parts.start_tracker(goes_on=self.start_from is not None)
                        self.train_and_score(loaded, adapter)
            self.parts.accelerator.end_training()

    def finished(self) -> bool:
        return finished_as(self.folder, configs.digest(self.config), self.parts.accelerator.num_processes)

    def show(self) -> None:
        """The results of a finished run, and its report where a kill came between the two and it can be written."""
        print_results(self.folder)
        page, record = self.folder / "report.html", self.folder / "run.json"
        old = page.is_file() and page.stat().st_mtime_ns < record.stat().st_mtime_ns  # made while the run went on
        if self.config.report and (old or not page.is_file()):
            try:
                with owned(self.folder):
                    self.report()
            except (ConfigError, ResourceError, OSError) as error:
                say(f"report.html was not made: {error}")

    def report(self) -> None:
        from mixlora.tables.report import run_report  # matplotlib: no process should wait for it before it trains

        reach("report.write")
        say(f"Report: {run_report(self.folder)}")

    def rehearse(self) -> None:
        """One step on rows as long as a row can be, and what an example looks like; writes nothing."""
        name, data = next(iter(self.parts.trained.items()))
        example = data.train[self.parts.in_place[name].get(0, 0)]
        say(f"{example.id}, with the tokens that carry loss marked:")
        say(self.parts.formatter.show(example, max_length=self.config.train.max_length))
        loaded, adapter = self.load()
        sizes = self.attach(loaded, adapter)
        say(f"{sizes['total']:,} parameters in all")
        trainer = self.trainer(loaded, self.scoring(loaded))
        trainer.rows = lambda first, number: [
            longest(row, self.config.train.max_length) for row in self.parts.rows(0, number)
        ]
        loaded.model.train()  # as in a run: with dropout, and computed twice where gradient_checkpointing says so
        began = time.monotonic()
        line, _ = trainer.step(1)
        peak = peak_memory(self.parts.accelerator.device) / 2**30
        say(
            f"One step of {self.parts.rows_a_step} rows of {self.config.train.max_length} tokens, "
            f"{trainer.totals.micro_batch_size} in a forward: {loss_of(line)}, "
            f"{time.monotonic() - began:.1f} s, peak memory {peak:.2f} GiB. Nothing was trained or written"
        )

    def agreed_checkpoint(self, loaded: base.Known) -> Path | None:
        """Where training goes on from; refused, before anything is scored or written, if it is of another run."""
        path = ranks.agree(self.find_checkpoint() if self.parts.accelerator.is_main_process else None)
        if path is not None:
            same_origin(path, checkpoint.read(path).state["origin"], self.origin(loaded.sha256))
            if self.config.train.load_best:
                checkpoint.require_best(path, self.run_of(path) / "best")
        return path

    def write_config(self) -> None:
        """Write the configuration, that of this process, for a run may go on with less memory; and that it runs."""
        if not self.parts.accelerator.is_main_process:
            return
        remove_strays(self.folder)
        path = self.folder / "config.yaml"
        text = yaml.safe_dump(configs.plain(self.config), sort_keys=False, allow_unicode=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
        for record in self.built_on():
            self.surroundings = with_earlier(self.surroundings, read_json(record))
        self.record("running")

    def built_on(self) -> list[Path]:
        """run.json of every folder in which an earlier process left something that this one goes on from."""
        left = [*checkpoint.steps(self.folder / "checkpoints"), self.folder / "before" / SCORED]
        found = [self.folder / "run.json"] if any(path.exists() for path in left) else []
        if self.elsewhere is not None:
            found.append(self.elsewhere / "run.json")
        return [record for record in found if record.is_file()]  # there is none beside a copy of a checkpoint

    @property
    def elsewhere(self) -> Path | None:
        """The run folder of the checkpoint that this run goes on from, where it is another one."""
        theirs = self.folder if self.start_from is None else self.run_of(self.start_from)
        return None if theirs.resolve() == self.folder.resolve() else theirs

    def run_of(self, path: Path) -> Path:
        """The run folder of a checkpoint: this one's, whose checkpoints may be a link to another disk, or another."""
        own = (self.folder / "checkpoints").resolve()
        if own in (path.parent.resolve(), path.resolve().parent):
            return self.folder
        return (path.absolute() if path.parent.name == "checkpoints" else path.resolve()).parents[1]

    @contextmanager
    def failure_recorded(self) -> Iterator[None]:
        """Let run.json say that a run has failed, and of what; not where it was interrupted or another rank is gone."""
        self.watch.on_failure = self.record_failure
        try:
            yield
        except Exception as error:
            ended = isinstance(error, Interrupted) or ranks.is_lost(error)
            if self.parts.accelerator.is_main_process and not ended:
                self.record_failure(str(error) or type(error).__name__, getattr(error, "status", 1))
            raise

    def record_failure(self, message: str, exit_status: int) -> None:
        with contextlib.suppress(MixloraError, OSError):  # the disk may be what failed
            if not finished(self.folder):
                self.record("failed", {"message": message, "exit_status": exit_status})

    def forget_attempt(self) -> None:
        """How an earlier try ended, as its launcher kept it, is no news of this one."""
        if self.parts.accelerator.is_main_process:
            attempt_path(self.folder).unlink(missing_ok=True)

    def same_configuration(self) -> None:
        """Refuse a folder that another configuration began."""
        if not self.parts.accelerator.is_main_process or not (self.folder / "config.yaml").is_file():
            return
        before = configs.config_of(configs.read(self.folder))
        if configs.digest(before) == configs.digest(self.config):
            return
        differ = sorted(differences(configs.decisive(before), configs.decisive(self.config)))
        raise CheckpointError(
            f"{self.folder} was begun with another configuration; these keys differ: {', '.join(differ[:6])}. "
            "Use the old values, or set run_dir to a new folder"
        )

    def load(self) -> tuple[base.Known, dict[str, Wrapper]]:
        """The base model, and the adapter that fits it: what cannot fit is said before anything is scored or written.

        The adapter begins the same for one seed, whatever was computed before.
        """
        config = self.config
        self.parts.formatter  # noqa: B018  the tokenizer is quick to load and shows many mistakes
        if config.train.torch_compile:
            compiled.require_compiler(self.parts.accelerator.device)
        say(f"Loading {config.model.name} ...")
        loaded = base.load(config.model, device=self.parts.accelerator.device, tokenizer=self.parts.tokenizer).known()
        if config.train.torch_compile:
            compiled.require_layers(loaded.model)
        require_way(loaded.model, config.train)
        if config.model.gradient_checkpointing and not loaded.model.supports_gradient_checkpointing:
            raise ConfigError(
                f"model.gradient_checkpointing=true: transformers computes no layer of {type(loaded.model).__name__} "
                "twice. Set it to false; train.micro_batch_size=N needs less memory as well"
            )
        most = base.window(loaded.model)
        if most is not None and config.train.max_length > most:
            told = (
                f"train.max_length={config.train.max_length} is more than the {most} tokens that model "
                f"'{config.model.name}' was made for"
            )
            if not base.rotation(loaded.model.config.get_text_config()):
                raise ConfigError(f"{told}, and it has no positions beyond. Lower it to {most}")
            say(f"{told}: longer rows are trained on, and prompts are scored with no more than {most}")
        torch.manual_seed(config.seed)
        adapter = prepared(loaded.model, config.method, config.model)
        require_one_dtype(adapter.values(), self.parts.accelerator.num_processes)
        return loaded, adapter

    def train_and_score(self, loaded: base.Known, adapter: Mapping[str, Wrapper]) -> None:
        config = self.config
        if config.eval.before:
            self.scoring(loaded).evaluate_base(anew=self.start_from is None or self.elsewhere is not None)
        sizes = self.attach(loaded, adapter)
        scoring = self.scoring(loaded)
        trainer = self.trainer(loaded, scoring)
        self.ways = lambda: self.ways_of(loaded.model, trainer)
        if trainer.main:
            self.record("running")
        self.tell_drawn(self.train(trainer))
        reach("adapter.write")
        tensors = trainer.tensors()
        if trainer.main:
            files.save(self.folder / "adapter", tensors, loaded.model, config.method, config.model)
        reach("evaluate.after")
        scoring.evaluate(self.folder, "after", base.fingerprint(tensors))
        loads = scoring.routing()
        if trainer.main:
            reach("finish")
            write_json(self.folder / "routing.json", loads)
            self.record("finished", self.outcome(loaded, sizes, trainer))
            try:
                if self.config.report:
                    self.report()
            finally:
                print_results(self.folder)

    def attach(self, loaded: base.Known, adapter: Mapping[str, Wrapper]) -> dict[str, int]:
        """Put the adapter into the model; its numbers of parameters."""
        config = self.config
        place(loaded.model, adapter)
        if config.model.gradient_checkpointing:
            enable_gradient_checkpointing(loaded.model)
        for key in ("r", "num_experts", "top_k"):
            if lost := targets.left_out(getattr(config.method, key), targets.depth(loaded.model)):
                say(f"Note: method.{key} has more entries than the model layers: no layer gets {lost}")
        sizes, beyond = count(loaded.model), targets.beyond_linears(loaded.model)
        if beyond > MENTIONED:
            say(f"Note: {beyond:.0%} of the weights are the base model's own experts, beside which no adapter stands")
        say(
            f"{config.method.name}: {sizes['trainable']:,} trainable parameters "
            f"({sizes['trainable'] / sizes['total']:.2%}), {sizes['activated']:,} activated by a token"
        )
        return sizes

    def scoring(self, loaded: base.Known) -> Scoring:
        """Of the model as it is now: what it can do is looked at once, with the adapter in it or without."""
        return Scoring(self.parts, loaded, lambda place: self.watch.at(place), self.spent)

    def trainer(self, loaded: base.Known, scoring: Scoring) -> Trainer:
        made = Trainer(
            model=loaded.model,
            aux=self.losses,
            rows=self.parts.rows,
            tasks=sorted(self.parts.trained),
            train=self.config.train,
            steps=self.parts.steps,
            seed=self.config.seed,
            pad_id=int(loaded.tokenizer.pad_token_id),
            folder=self.folder,
            accelerator=self.parts.accelerator,
            origin=self.origin(loaded.sha256),
            score=scoring.validation,
            at=self.watch.at,
            spent=self.spent,
        )
        made.made_with = self.made_with(made)  # only now is the model in shards, where it is
        if self.config.train.packing and not made.packed:
            say("train.packing=true has no effect: the model does not compute packed rows as if alone. They are padded")
        return made

    def ways_of(self, model: nn.Module, trainer: Trainer) -> dict[str, Any]:
        """Which of its ways training takes: the quick ones are not open to every model, weight and dropout."""
        through_compiler = self.config.train.torch_compile
        layers = base.decoder_layers(model) if through_compiler else []
        return {
            "computed": paths(model, {module for layer in layers for module in layer.modules()}),
            "torch_compile": through_compiler,
            "packed": trainer.packed,
            "chunked_head": trainer.answer_losses.nats.head is not None,
            "lean_from_step": trainer.totals.lean_from_step,
        }

    def origin(self, weights_sha256: str) -> dict[str, Any]:
        """What a run must share with the checkpoint that it goes on from."""
        return {
            "config": configs.decisive(self.config),
            "data": {name: data.fingerprints for name, data in sorted(self.parts.data.items())},
            "weights": weights_sha256,
            "world_size": self.parts.accelerator.num_processes,
        }

    def made_with(self, trainer: Trainer) -> dict[str, Any]:
        """What may change the last bits of a run that goes on, and no more than that."""
        kept = {key: self.surroundings[key] for key in ("git_commit", "packages", "python", "device", "threads")}
        return kept | {
            "compute": self.config.method.compute.value,
            "torch_compile": self.config.train.torch_compile,
            "micro_batch_size": trainer.totals.micro_batch_size,
            "gradient_checkpointing": self.config.model.gradient_checkpointing,
            "sharded": ranks.sharded(trainer.model),
        }

    def train(self, trainer: Trainer) -> Totals:
        """Go on from the newest whole checkpoint, or from the one that `resume` names, or start."""
        path, start = self.start_from, 0
        if path is not None:
            saved = checkpoint.read(path)
            for change in changes(saved.state.get("made_with", {}), trainer.made_with):
                say(f"Going on with {change}: {self.what_differs(change)} of a run in one piece")
            if trainer.main and self.elsewhere is not None:
                checkpoint.adopt(path, self.elsewhere, self.folder, with_best=self.config.train.load_best)
            ranks.wait_for_rank_0()
            trainer.restore(saved)
            trainer.resumed_from = checkpoint.marks(path) if path == self.asked_for else saved.state.get("resumed_from")
            start = saved.step
            say(f"Going on after step {start}")
        elif trainer.main:
            trainer.metrics.unlink(missing_ok=True)
        reach("data.tokenise")
        with bar("train", self.parts.steps, start) as shown:
            trainer.on_step = lambda line: self.log(line, shown)
            totals = trainer.run(start)
        if self.config.train.load_best and totals.best is not None:
            trainer.restore_best()
            say(f"Best validation score at step {totals.best_step}; that adapter is kept")
        return totals

    def what_differs(self, change: str) -> str:
        """What a run that goes on otherwise than it was begun does not have in common with one in one piece."""
        by_forward = self.config.method.lora_dropout > 0 or bool(self.losses)
        if by_forward and change.startswith("micro_batch_size"):
            return "dropout and auxiliary losses go by the rows of a forward, so what follows may differ from that"
        return "the last bits may differ from those"

    @property
    def asked_for(self) -> Path | None:
        """The checkpoint that the user asks for."""
        return Path(self.config.resume) if self.config.resume else None

    def find_checkpoint(self) -> Path | None:
        """Where to go on from; whatever is damaged is named."""
        folder, best = self.folder / "checkpoints", self.folder / "best"
        checkpoint.require_there(folder)
        checkpoint.require_there(best)
        path, wrong = checkpoint.newest(folder, best if self.config.train.load_best else None)
        if self.asked_for is not None and (path is None or not checkpoint.went_on_from(path, self.asked_for)):
            return self.asked_for
        for reason in wrong:
            say(f"Not used: {reason}")
        if wrong and path is None:
            checkpoint.require_some(folder)
            say("No whole checkpoint is left: training starts from the first step")
            checkpoint.forget_after(folder, 0)
            checkpoint.forget_after(best, 0)
        return path

    def log(self, line: Mapping[str, Any], shown: Any) -> None:
        shown.advance(1, loss_of(line))
        if self.config.tracker is not Tracker.none:
            self.parts.accelerator.log(flat(line), step=line["step"])

    # ---- what is said and kept

    def announce(self) -> None:
        processes = self.parts.accelerator.num_processes
        say(f"Run folder: {self.folder}")
        say(f"{processes} process{'es' if processes > 1 else ''}, {self.surroundings['device']}")
        self.parts.tell_notes()
        self.parts.require_prerequisites()
        ranks.require_same("configuration", configs.digest(self.config))
        ranks.require_same("data", {name: data.fingerprints for name, data in self.parts.data.items()})
        if not self.parts.trained:
            raise ConfigError(f"tasks={self.config.tasks.name} has no training rows of a weight above 0")
        every = self.config.train.eval_steps
        if every is not None and not self.parts.validated:
            raise ConfigError(
                f"train.eval_steps={every} scores validation rows, and no task that is scored here has any. Set it to "
                "null, and train.load_best to false, or give a task some (splits.validation)"
            )
        drawn_from = f"{len(self.parts.plan.tasks)} of {len(self.parts.data)} tasks"
        say(f"{self.parts.steps} steps of {self.parts.rows_a_step} rows from {drawn_from}:")
        for name, drawn in self.parts.plan.drawn().items():
            say(f"  {name:16} {drawn.rows:7,} rows, {drawn.distinct:7,} distinct, {drawn.passes:.2f} passes")

    def tell_drawn(self, totals: Totals) -> None:
        """What each task gave to the training that is done."""
        say("Trained on:")
        tokens = counted(totals) or {}
        for name, drawn in self.parts.plan.drawn().items():
            seen = f"{tokens[name]:11,} tokens, " if name in tokens else ""
            say(f"  {name:16} {totals.rows[name]:7,} rows, {seen}{drawn.passes:.2f} passes")

    def record(self, status: str, outcome: Mapping[str, Any] | None = None) -> None:
        """run.json: where this run comes from and how far it got."""
        values = {
            "status": status,
            "command": self.command,
            "overrides": list(self.overrides),
            "config_sha256": configs.digest(self.config),
            "method": self.config.method.name,
            "model": self.config.model.name,
            "tasks": self.config.tasks.name,
            "seed": self.config.seed,
            **self.surroundings,
            "world_size": self.parts.accelerator.num_processes,
            "steps": self.parts.steps,
            "data": {name: data.fingerprints for name, data in self.parts.data.items()},
            "incomplete": sorted(name for name, data in self.parts.data.items() if not data.complete),
            "notes": self.parts.notes,
            "prompts": self.parts.formatter.fingerprint,
            **self.ways(),
        }
        write_json(self.folder / "run.json", values | dict(outcome or {}))

    def outcome(self, loaded: base.Known, sizes: Mapping[str, int], trainer: Trainer) -> dict[str, Any]:
        """What a finished run was made with, and what it took."""
        trainer.measure()
        drawn, totals = self.parts.plan.drawn(), trainer.totals
        return {
            "weights_sha256": loaded.sha256,
            "sharded": ranks.sharded(loaded.model),
            "parameters": sizes,
            "tokens": totals.tokens,
            "tokens_by_task": counted(totals),
            "label_tokens": dict(totals.label_tokens),
            "rows": {name: task.rows for name, task in drawn.items()},
            "passes": {name: round(task.passes, 4) for name, task in drawn.items()},
            "skipped_steps": totals.skipped,
            "kept_step": totals.best_step if self.config.train.load_best else self.parts.steps,
            "micro_batch_size": totals.micro_batch_size,
            "seconds": round(totals.run_seconds, 1),
            "training_seconds": round(totals.seconds, 1),
            "checkpoint_seconds": round(totals.checkpoint_seconds, 2),
            "tokens_per_second": None if totals.tokens_per_second is None else round(totals.tokens_per_second, 1),
            "peak_memory_bytes": totals.peak_memory_bytes,
        }


def loss_of(line: Mapping[str, Any]) -> str:
    """One that is not finite is a text already."""
    return f"loss {line['loss']:.3f}" if isinstance(line["loss"], float) else f"loss {line['loss']}"


def counted(totals: Totals) -> dict[str, int] | None:
    """Tokens by task; None where a part was trained by a version that did not count them."""
    return dict(totals.tokens_by_task) if totals.tokens_by_task.total() == totals.tokens else None


def longest(row: Row, length: int) -> Row:
    """The row with its prompt repeated up to `length` tokens."""
    room = max(1, length - len(row.answer_ids))
    return replace(row, prompt_ids=(row.prompt_ids * room)[:room])


def flat(line: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested metrics as `task_losses/arc_easy`."""
    out: dict[str, Any] = {}
    for key, value in line.items():
        out |= flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out
