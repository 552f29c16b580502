"""One run from its configuration to its results: what `python -m mixlora.train` does.

Everything that can be wrong with the configuration or the data is found before the base model is loaded.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs
from transformers import PreTrainedTokenizerBase

from mixlora import losses, ranks, signals, tasks
from mixlora.adapters import files
from mixlora.adapters.attach import count, paths, place, prepared
from mixlora.adapters.modules import Wrapper
from mixlora.checks import check
from mixlora.config import load as configs
from mixlora.config.schema import Config
from mixlora.console import bar, say
from mixlora.errors import CheckpointError, ConfigError, MixloraError, ResourceError
from mixlora.evaluation.report import print_results
from mixlora.evaluation.routing import expert_loads
from mixlora.evaluation.run import PROTOCOL_VERSION, Evaluator, result, scorer
from mixlora.failpoints import reach
from mixlora.models import base
from mixlora.models.likelihood import evaluating
from mixlora.records import disk_error, owned, read_json, remove_strays, write_json, write_lines, write_text
from mixlora.tables.report import run_report
from mixlora.tasks import fewshot
from mixlora.tasks.collate import Row
from mixlora.tasks.example import Example
from mixlora.tasks.mixture import Plan, plan
from mixlora.tasks.prompts import Formatter
from mixlora.training import checkpoint
from mixlora.training.loop import Totals, Trainer

PACKAGES = (
    "mixlora-train",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "hydra-core",
    "omegaconf",
    "safetensors",
)
ROUTING_ROWS = 32  # examples a task for routing.json


@dataclass
class Experiment:
    """One configuration, with what is built from it on demand."""

    config: Config
    command: str

    def __post_init__(self) -> None:
        self.watch = ranks.Watch(self.config.rank_timeout)
        self.folder = configs.run_folder(self.config)
        check(self.config)
        self.losses = losses.build(self.config.aux_loss)

    # ---- parts

    @cached_property
    def accelerator(self) -> Accelerator:
        tracker = "none" if self.config.dry_run else self.config.tracker.value
        accelerator = Accelerator(
            # Left to itself on a machine without accelerators, it would start one job of one process on every rank.
            cpu=not torch.accelerator.is_available(),
            log_with=None if tracker == "none" else tracker,
            project_dir=str(self.folder),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=self.config.rank_timeout))],
        )
        if tracker != "none":
            flat = {"config": json.dumps(configs.plain(self.config))}
            accelerator.init_trackers(
                "mixlora", flat, {"wandb": {"name": self.folder.name}} if tracker == "wandb" else {}
            )
        return accelerator

    @cached_property
    def data(self) -> Mapping[str, tasks.TaskData]:
        reach("data.load")
        return tasks.load(self.config.tasks, self.config.data, self.config.seed)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return base.tokenizer(self.config.model)

    @cached_property
    def formatter(self) -> Formatter:
        return Formatter(self.tokenizer, self.config.data)

    @cached_property
    def trained(self) -> dict[str, tasks.TaskData]:
        return {name: data for name, data in self.data.items() if data.train}

    @cached_property
    def evaluated(self) -> dict[str, tasks.TaskData]:
        return {name: data for name, data in self.data.items() if not data.task.train_only}

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
        split = data.validation if self.config.eval.split == "validation" else data.test
        return split[: self.config.eval.limit]

    @cached_property
    def shots(self) -> dict[str, list[Example]]:
        """The solved examples that stand before each task's questions."""
        number, seed = self.config.eval.num_fewshot, self.config.eval.fewshot_seed
        return {
            name: fewshot.draw(name, data.train, [*data.validation, *data.test], number, seed)
            for name, data in self.evaluated.items()
        }

    def row(self, task: str, example: Example) -> Row:
        encoded = self.formatter.encode(example, max_length=self.config.train.max_length)
        on_prompt = self.config.data.loss_on.value == "all"
        return Row(example.id, task, tuple(encoded.prompt_ids), tuple(encoded.answer_ids), on_prompt)

    def rows(self, first: int, number: int) -> list[Row]:
        drawn = self.plan.draws(first, number)
        return [self.row(name, self.trained[name].train[index]) for name, index in drawn]

    # ---- the run

    def run(self) -> None:
        """Train and evaluate, or go on, or show what is already there."""
        with signals.raised(), named(self.folder):
            self.accelerator  # noqa: B018  starts the process group
            with ranks.together(self.config.rank_timeout) as self.watch:
                reach("start")
                if self.config.dry_run:
                    self.announce()
                    self.rehearse()
                    return
                if ranks.agree(self.finished()):
                    say(f"This configuration is finished: {self.folder}")
                    if self.accelerator.is_main_process:
                        print_results(self.folder)
                    return
                self.announce()
                began = time.monotonic()
                loaded, adapter = self.load()
                with owned(self.folder) if self.accelerator.is_main_process else nullcontext():
                    self.begin()
                    self.work(loaded, adapter, began)
            self.accelerator.end_training()

    def rehearse(self) -> None:
        """One step on rows as long as a row can be, and what an example looks like; writes nothing."""
        example = next(iter(self.trained.values())).train[0]
        say(f"{example.id}, with the tokens that carry loss marked:")
        say(self.formatter.show(example, max_length=self.config.train.max_length))
        loaded, adapter = self.load()
        sizes = self.attach(loaded, adapter)
        say(f"{sizes['total']:,} parameters in all")
        trainer = self.trainer(loaded, self.evaluator(loaded))
        trainer.rows = lambda first, number: [
            longest(row, self.config.train.max_length) for row in self.rows(0, number)
        ]
        began = time.monotonic()
        line, _ = trainer.step(1)
        peak = peak_memory(self.accelerator.device) / 2**30
        say(
            f"One step of {self.rows_a_step} rows of {self.config.train.max_length} tokens, "
            f"{trainer.totals.micro_batch_size} in a forward: loss {line['loss']:.3f}, "
            f"{time.monotonic() - began:.1f} s, peak memory {peak:.2f} GiB. Nothing was trained or written"
        )

    def finished(self) -> bool:
        record = self.folder / "run.json"
        if not record.is_file() or read_json(record).get("status") != "finished":
            return False
        if read_json(record).get("config_sha256") == configs.digest(self.config):
            return True
        raise ConfigError(f"{self.folder} holds a finished run of another configuration. Set run_dir to a new folder")

    def begin(self) -> None:
        """Write the configuration; refuse a folder that another configuration began."""
        if not self.accelerator.is_main_process:
            return
        remove_strays(self.folder)
        path = self.folder / "config.yaml"
        text = yaml.safe_dump(configs.plain(self.config), sort_keys=False, allow_unicode=True)
        if path.is_file():
            self.same_configuration()
        else:
            write_text(path, text)
        self.record("running")

    def same_configuration(self) -> None:
        before = configs.config_of(configs.read(self.folder))
        if configs.digest(before) == configs.digest(self.config):
            return
        differ = sorted(differences(configs.plain(before), configs.plain(self.config)))
        raise CheckpointError(
            f"{self.folder} was begun with another configuration; these keys differ: {', '.join(differ[:6])}. "
            "Use the old values, or set run_dir to a new folder"
        )

    def load(self) -> tuple[base.Base, dict[str, Wrapper]]:
        """The base model, and the adapter that fits it: what cannot fit is said before anything is scored or written.

        The adapter begins the same for one seed, whatever was computed before.
        """
        config = self.config
        self.formatter  # noqa: B018  the tokenizer is quick to load and shows many mistakes
        say(f"Loading {config.model.name} ...")
        loaded = base.load(config.model, device=self.accelerator.device)
        torch.manual_seed(config.seed)
        return loaded, prepared(loaded.model, config.method, config.model)

    def work(self, loaded: base.Base, adapter: Mapping[str, Wrapper], began: float) -> None:
        config = self.config
        if config.eval.before:
            self.evaluate_base(self.evaluator(loaded))
        sizes = self.attach(loaded, adapter)
        evaluator = self.evaluator(loaded)
        trainer = self.trainer(loaded, evaluator)
        totals = self.train(trainer)
        reach("adapter.write")
        tensors = trainer.tensors()
        if trainer.main:
            files.save(self.folder / "adapter", tensors, loaded.model, config.method, origin(config))
        reach("evaluate.after")
        self.evaluate(evaluator, self.folder, "after")
        loads = self.routing(loaded)
        if trainer.main:
            reach("finish")
            write_json(self.folder / "routing.json", loads)
            self.record("finished", loaded, sizes, totals, time.monotonic() - began)
            say(f"Report: {run_report(self.folder)}")
            print_results(self.folder)

    def attach(self, loaded: base.Base, adapter: Mapping[str, Wrapper]) -> dict[str, int]:
        """Put the adapter into the model; its numbers of parameters."""
        config = self.config
        place(loaded.model, adapter)
        if config.model.gradient_checkpointing:
            loaded.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        sizes = count(loaded.model)
        say(
            f"{config.method.name}: {sizes['trainable']:,} trainable parameters "
            f"({sizes['trainable'] / sizes['total']:.2%}), {sizes['activated']:,} activated by a token"
        )
        return sizes

    def evaluator(self, loaded: base.Base) -> Evaluator:
        config = self.config
        return Evaluator(loaded.model, loaded.tokenizer, config.eval, config.data, self.shots, config.seed)

    def trainer(self, loaded: base.Base, evaluator: Evaluator) -> Trainer:
        return Trainer(
            model=loaded.model,
            aux=self.losses,
            rows=self.rows,
            tasks=sorted(self.trained),
            train=self.config.train,
            steps=self.steps,
            seed=self.config.seed,
            pad_id=int(loaded.tokenizer.pad_token_id),
            folder=self.folder,
            accelerator=self.accelerator,
            origin=self.origin(loaded.sha256),
            score=lambda step: self.validation(evaluator, step),
            at=self.watch.at,
        )

    def origin(self, weights_sha256: str) -> dict[str, Any]:
        """What a run must share with the checkpoint that it goes on from."""
        return {
            "config": configs.decisive(self.config),
            "data": {name: data.fingerprints for name, data in sorted(self.data.items())},
            "weights": weights_sha256,
            "world_size": self.accelerator.num_processes,
        }

    def train(self, trainer: Trainer) -> Totals:
        """Go on from the newest whole checkpoint, or from the one that `resume` names, or start."""
        path = ranks.agree(self.checkpoint())
        start = 0
        if path is not None:
            saved = checkpoint.read(path)
            same_origin(path, saved.state["origin"], trainer.origin)
            trainer.restore(saved)
            start = saved.step
            say(f"Going on after step {start}")
        elif trainer.main:
            trainer.metrics.unlink(missing_ok=True)
        reach("data.tokenise")
        with bar("train", self.steps, start) as shown:
            trainer.on_step = lambda line: self.log(line, shown)
            totals = trainer.run(start)
        if self.config.train.load_best and totals.best is not None:
            trainer.restore_best()
            say(f"Best validation score at step {totals.best_step}; that adapter is kept")
        return totals

    def checkpoint(self) -> Path | None:
        """Where to go on from; whatever is damaged is named."""
        if self.config.resume:
            return Path(self.config.resume)
        path, wrong = checkpoint.newest(self.folder / "checkpoints")
        for reason in wrong:
            say(f"Not used: {reason}")
        return path

    def log(self, line: Mapping[str, Any], shown: Any) -> None:
        shown.advance(1, f"loss {line['loss']:.3f}" if isinstance(line["loss"], float) else f"loss {line['loss']}")
        if self.config.tracker.value != "none":
            self.accelerator.log(flat(line), step=line["step"])

    def validation(self, evaluator: Evaluator, step: int) -> dict[str, float]:
        found = {}
        for name, data in self.evaluated.items():
            examples = data.validation[: self.config.train.eval_limit]
            if examples and self.runnable(data):
                self.watch.at(f"step {step}, validate {name}")
                predictions = evaluator(data.task, examples, f"validate {name}")
                found[name] = result(data.task, predictions, evaluator.protocol)["value"]
        return found

    def evaluate_base(self, evaluator: Evaluator) -> None:
        """Score the base model into `before`, or copy the scores that another run of the same protocol left.

        They depend on neither method nor training, so a sweep pays for them once.
        """
        folder, main = self.folder / "before", self.accelerator.is_main_process
        shared = Path(self.config.output_root) / "base" / f"{self.config.model.name}-{self.protocol_digest()[:12]}"
        there, known = ranks.agree([(place / "results.json").is_file() for place in (folder, shared)])
        if there:
            return
        reach("evaluate.before")
        if not known:
            self.evaluate(evaluator, folder, "before")
            if main:
                copy_results(folder, shared)
        elif main:
            say(f"The base model's scores are taken from {shared}")
            copy_results(shared, folder)
        self.accelerator.wait_for_everyone()

    def protocol_digest(self) -> str:
        """sha256 of everything that decides the base model's scores."""
        config = configs.plain(self.config)
        data = {name: [data.fingerprints, configs.plain(data.task)] for name, data in self.evaluated.items()}
        shots = {name: [shot.id for shot in some] for name, some in self.shots.items()}
        parts = [config["model"], config["data"], config["eval"], shots, self.config.seed]
        parts += [data, self.formatter.fingerprint(), PROTOCOL_VERSION, version("torch"), version("transformers")]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def evaluate(self, evaluator: Evaluator, folder: Path, when: str) -> None:
        """Score every task into `folder`: predictions/TASK.jsonl and results.json."""
        main = self.accelerator.is_main_process
        results: dict[str, Any] = {}
        for name, data in self.evaluated.items():
            if not self.runnable(data):
                reason = "generated code is run only with eval.allow_code_execution=true"
                results[name] = {"metric": data.task.metric, "value": None, "n": 0, "reason": reason}
                continue
            self.watch.at(f"{when} {name}")
            predictions = scorer(evaluator)(data.task, self.examples(data), f"{when:6} {name}")
            found = result(data.task, predictions, evaluator.protocol)
            results[name] = found | {
                "protocol": evaluator.describe(data.task),
                "data": data.fingerprints,
                "complete": data.complete,
                "prompts": evaluator.fingerprint(data.task),
                "trained": name in self.trained,
            }
            if main:
                write_lines(folder / "predictions" / f"{name}.jsonl", predictions)
        reach("results.write")
        if main:
            write_json(folder / "results.json", results)

    def runnable(self, data: tasks.TaskData) -> bool:
        return data.task.answer_kind.value != "code" or self.config.eval.allow_code_execution

    def routing(self, loaded: base.Base) -> dict[str, Any]:
        rows = {
            name: [self.row(name, example) for example in self.examples(data)[:ROUTING_ROWS]]
            for name, data in self.evaluated.items()
        }
        with evaluating(loaded.model):
            return expert_loads(loaded.model, rows, batch_size=8, pad_id=int(loaded.tokenizer.pad_token_id))

    # ---- what is said and kept

    def announce(self) -> None:
        say(f"Run folder: {self.folder}")
        self.notes()
        ranks.same("configuration", configs.digest(self.config))
        ranks.same("data", {name: data.fingerprints for name, data in self.data.items()})
        if not self.trained:
            raise ConfigError(f"tasks={self.config.tasks.name} has no training rows")
        say(f"{self.steps} steps of {self.rows_a_step} rows from {len(self.trained)} tasks:")
        for name, drawn in self.plan.drawn().items():
            say(f"  {name:16} {drawn.rows:7,} rows, {drawn.distinct:7,} distinct, {drawn.passes:.2f} passes")

    def notes(self) -> None:
        for data in self.data.values():
            for note in data.notes:
                say(f"Note: {note}")

    def record(self, status: str, *parts: Any) -> None:
        """run.json: where this run comes from and how far it got."""
        path = self.folder / "run.json"
        values = {
            "status": status,
            "command": self.command,
            "config_sha256": configs.digest(self.config),
            "method": self.config.method.name,
            "model": self.config.model.name,
            "tasks": self.config.tasks.name,
            "seed": self.config.seed,
            **git_state(),
            "packages": {name: version(name) for name in PACKAGES},
            "python": sys.version.split()[0],
            "device": device_name(self.accelerator.device),
            "world_size": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "steps": self.steps,
            "data": {name: data.fingerprints for name, data in self.data.items()},
            "incomplete": sorted(name for name, data in self.data.items() if not data.complete),
            "notes": [note for data in self.data.values() for note in data.notes],
            "prompts": self.formatter.fingerprint(),
        }
        if parts:
            loaded, sizes, totals, seconds = parts
            values |= {
                "weights_sha256": loaded.sha256,
                "sharded": ranks.sharded(loaded.model),
                "parameters": sizes,
                "computed": paths(loaded.model),
                "tokens": totals.tokens,
                "label_tokens": dict(totals.label_tokens),
                "rows": {name: drawn.rows for name, drawn in self.plan.drawn().items()},
                "passes": {name: round(drawn.passes, 4) for name, drawn in self.plan.drawn().items()},
                "skipped_steps": totals.skipped,
                "micro_batch_size": totals.micro_batch_size,
                "seconds": round(seconds, 1),
                "training_seconds": round(totals.seconds, 1),
                "checkpoint_seconds": round(totals.checkpoint_seconds, 2),
                "tokens_per_second": round(totals.tokens / max(totals.seconds, 1e-9), 1),
                "peak_memory_bytes": peak_memory(self.accelerator.device),
            }
        write_json(path, values)


@contextmanager
def named(folder: Path) -> Iterator[None]:
    """Errors of the machine as errors that name their remedy."""
    try:
        yield
    except MixloraError:
        raise
    except OSError as error:
        raise disk_error(folder, error) from error
    except (RuntimeError, MemoryError) as error:
        if not ranks.is_out_of_memory(error):
            raise
        raise ResourceError(
            "out of memory outside a training step. Lower eval.batch_size, or choose model.quantization=nf4 or "
            "model.dtype=bfloat16 where the model itself does not fit"
        ) from error


def same_origin(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that another configuration, world size, model or data left.

    Raises:
        CheckpointError: naming what differs, with both values where there is room.
    """
    differ = sorted(differences(saved, json.loads(json.dumps(now))))
    if differ:
        shown = [f"{key.removeprefix('config.')} was {at(saved, key)}, now {at(now, key)}" for key in differ[:4]]
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(shown)}{'; ...' if differ[4:] else ''}. "
            "Use the old values, or set run_dir to a new folder"
        )


def at(values: Any, dotted: str) -> str:
    for key in dotted.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return str(values)[:80]


def longest(row: Row, length: int) -> Row:
    """The row with its prompt repeated up to `length` tokens."""
    room = max(1, length - len(row.answer_ids))
    return replace(row, prompt_ids=(row.prompt_ids * room)[:room])


def copy_results(source: Path, target: Path) -> None:
    """Predictions first, results last: where results.json stands, everything does."""
    shutil.copytree(source / "predictions", target / "predictions", dirs_exist_ok=True)
    write_json(target / "results.json", read_json(source / "results.json"))


def origin(config: Config) -> str:
    return config.model.path or config.model.name


def flat(line: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested metrics as `task_losses/arc_easy`."""
    out: dict[str, Any] = {}
    for key, value in line.items():
        out |= flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def differences(a: Any, b: Any, prefix: str = "") -> set[str]:
    """Dotted keys at which two nested mappings differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = a.keys() | b.keys()
        return {d for k in keys for d in differences(a.get(k), b.get(k), f"{prefix}{k}.")}
    return set() if a == b else {prefix.rstrip(".")}


def git_state() -> dict[str, Any]:
    """Commit and whether tracked files differ from it; null outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except OSError:
        commit, changes = None, None
    return {"git_commit": commit, "git_dirty": None if commit is None else bool(changes)}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> int:
    """Bytes: of the accelerator where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
