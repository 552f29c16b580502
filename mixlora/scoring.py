"""A run's scores: of the base model, on validation rows while it trains, at the end; and where its tokens went."""

import contextlib
import errno
import hashlib
import itertools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixlora import ranks
from mixlora.config import load as configs
from mixlora.config.schema import Backend
from mixlora.console import say
from mixlora.errors import ConfigError, ResourceError
from mixlora.evaluation.routing import expert_loads, least_experts
from mixlora.evaluation.run import Evaluator, digest, marked, result, scorer
from mixlora.failpoints import reach
from mixlora.gates import gates_of
from mixlora.models import base
from mixlora.models.likelihood import evaluating
from mixlora.parts import Parts
from mixlora.provenance import version
from mixlora.records import (
    partial_of,
    read_json,
    read_lines,
    sync,
    write_bytes,
    write_json,
    write_lines,
)
from mixlora.training.spent import Spent

ROUTING_ROWS = 32  # examples a task for routing.json
SCORED = "scored.json"
STRAY_SECONDS = 3600.0  # a copy takes seconds: what is older was left by a process that was killed


@dataclass
class Scoring:
    """One loaded model, with or without its adapter, scored on the tasks of a configuration.

    Args:
        at: hears where this rank is.
        spent: on the whole run; kept with what is scored so far.
    """

    parts: Parts
    loaded: base.Known
    at: Callable[[str], None] = lambda place: None
    spent: Spent = field(default_factory=Spent)

    def __post_init__(self) -> None:
        parts, config = self.parts, self.parts.config
        self.config, self.main = config, parts.accelerator.is_main_process
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        self.evaluator = Evaluator(model, tokenizer, config.eval, config.data, parts.shots, config.seed)
        for data in parts.evaluated.values():
            if config.eval.backend is Backend.own and parts.runnable(data):
                self.evaluator.require_room(data.task, [*parts.examples(data), *data.validation])

    def validation(self, step: int) -> dict[str, float]:
        found = {}
        for name, data in self.parts.validated.items():
            self.at(f"step {step}, validate {name}")
            predictions = self.evaluator(data.task, data.validation[: self.config.train.eval_limit], f"validate {name}")
            found[name] = result(data.task, predictions, self.evaluator.protocol)["value"]
        return found

    def evaluate_base(self, *, anew: bool) -> None:
        """Score the base model into `before`, or copy the scores that another run of the same protocol left.

        They depend on neither method nor training, so a sweep pays for them once.

        Args:
            anew: training begins. No checkpoint says that data and weights are those of an earlier process, so scores
                that it left here do not count by themselves.
        """
        folder = self.parts.folder / "before"
        shared = Path(self.config.output_root) / "base" / f"{self.config.model.name}-{self.protocol_digest()[:12]}"
        there, known = ranks.agree([(place / "results.json").is_file() for place in (folder, shared)])
        if anew or not there:
            reach("evaluate.before")
            if not known:
                self.evaluate(folder, "before")
                if self.main:
                    share_results(folder, shared)
            elif self.main:
                say(f"The base model's scores are taken from {shared}")
                copy_results(shared, folder)
        if self.main:  # of an evaluation that was interrupted, be it after its last line
            (folder / SCORED).unlink(missing_ok=True)
        ranks.wait_for_rank_0()

    def protocol_digest(self) -> str:
        """sha256 of everything that decides the base model's scores."""
        config = configs.plain(self.config)
        tasks = {
            name: [configs.plain(data.task), self.origin(name) | {"trained": None}]
            for name, data in self.parts.evaluated.items()
        }
        # A name, a folder or a branch of the hub may hold other weights tomorrow; `dtype: auto` goes by the device. The
        # digest of the weights tells their dtype as well.
        model = config["model"] | {"gradient_checkpointing": False}  # of training alone
        made_of = [model, self.loaded.sha256, self.parts.accelerator.device.type]
        seed = self.config.seed if self.config.eval.temperature else None  # of samples, and of nothing else
        asked = [config["data"], config["eval"], seed, tasks]
        packages = ("torch", "transformers", "lm_eval", *configs.quantizer(self.config.model))
        return digest([made_of, asked, [version(package) for package in packages]])

    def evaluate(self, folder: Path, when: str, adapter_sha256: str | None = None) -> None:
        """Score every task into `folder`: predictions/TASK.jsonl and results.json.

        Where an earlier process was ended between two tasks, those that it scored with the same weights are kept.
        """
        of = [self.protocol_digest(), self.parts.accelerator.num_processes, adapter_sha256]
        scored = Scored(folder, digest(of), self.spent)
        there, results = ranks.agree(scored.begin() if self.main else []), dict[str, Any]()
        for name, data in self.parts.evaluated.items():
            if (reason := self.parts.unscored(data)) is not None:
                found = {"metric": data.task.metric, "value": None, "stderr": None, "n": 0, "reason": reason}
                results[name] = found | self.origin(name)
                continue
            path = scored.predictions(name)
            self.at(f"{when} {name}")
            if name in there:
                say(f"{when:6} {name} was scored before the interruption")
                predictions = ranks.agree(read_lines(path) if self.main else [])
            else:
                predictions = scorer(self.evaluator)(data.task, self.parts.examples(data), f"{when:6} {name}")
                if self.main:
                    scored.put(name, marked(data.task, predictions, self.evaluator.protocol))
                    reach("evaluate.task")
            found = result(data.task, predictions, self.evaluator.protocol)
            results[name] = found | self.origin(name) | self.rows(name, trained=adapter_sha256 is not None)
        reach("results.write")
        if self.main:
            write_json(folder / "results.json", results)
            scored.forget()

    def origin(self, name: str) -> dict[str, Any]:
        """How a task was asked and on what data: all that a score depends on besides the model."""
        data = self.parts.evaluated[name]
        found = {"data": data.fingerprints, "prompts": self.evaluator.fingerprint(data.task)}
        return {
            "protocol": self.evaluator.describe(data.task),
            "fingerprints": found,
            **found,  # where tables read them
            "complete": data.complete,
            "trained": name in self.parts.trained,
        }

    def rows(self, name: str, *, trained: bool) -> dict[str, Any]:
        """How many rows are scored, where these are the first of more, and how many of them are also trained on."""
        data = self.parts.evaluated[name]
        return {
            "limit": self.config.eval.limit if self.parts.is_limited(data) else None,
            # A base model's scores are those of other runs as well, which trained on other rows.
            "also_trained_on": self.parts.also_trained_on(data) if trained else None,
        }

    def routing(self) -> dict[str, Any]:
        """Where the tokens of some scored examples went, those that are no longer than a training row can be, and how
        many experts of each gate they use at the least."""
        most, fits = self.config.train.max_length, self.parts.formatter.fits
        found = {}
        for name, data in self.parts.evaluated.items() if gates_of(self.loaded.model) else ():
            fitting = (example for example in self.parts.examples(data) if fits(example, most))
            if rows := [self.parts.row(name, example) for example in itertools.islice(fitting, ROUTING_ROWS)]:
                found[name] = rows
        with evaluating(self.loaded.model):
            pad_id, pads = int(self.loaded.tokenizer.pad_token_id), self.evaluator.score_options.pads
            loads = expert_loads(self.loaded.model, found, self.config.eval, pad_id, pads=pads)
        return {"least_experts": least_experts(self.loaded.model, self.config.method), "loads": loads}


@dataclass(frozen=True)
class Scored:
    """Which tasks an evaluation has done so far: a file beside the predictions that is there until all are.

    Args:
        of: the digest of what their scores depend on, to the last bit; those of anything else do not count.
        spent: on the run up to now; what the earlier process had spent counts with what it scored.
    """

    folder: Path
    of: str
    spent: Spent

    @property
    def path(self) -> Path:
        return self.folder / SCORED

    def predictions(self, name: str) -> Path:
        return self.folder / "predictions" / f"{name}.jsonl"

    def begin(self) -> list[str]:
        """The tasks whose predictions are there, byte by byte. Where there are none, whatever was kept is forgotten."""
        kept = read_json(self.path) if self.path.is_file() else {}
        tasks = kept["tasks"] if kept.get("of") == self.of else {}
        whole = {name: sha256 for name, sha256 in tasks.items() if self.sha256(name) == sha256}
        if whole:
            self.spent.add_earlier(kept.get("seconds", 0.0), kept.get("peak_memory_bytes", 0))
            self.write(whole)
        else:
            self.forget()
        return list(whole)

    def put(self, name: str, predictions: Sequence[Mapping[str, Any]]) -> None:
        """Keep a task's predictions. Results that stand there are of those that go now, and go first."""
        (self.folder / "results.json").unlink(missing_ok=True)
        write_lines(self.predictions(name), predictions)
        done = read_json(self.path)["tasks"] if self.path.is_file() else {}
        self.write(done | {name: self.sha256(name)})

    def sha256(self, name: str) -> str | None:
        path = self.predictions(name)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

    def write(self, tasks: Mapping[str, str | None]) -> None:
        spent = {"seconds": self.spent.seconds, "peak_memory_bytes": self.spent.peak_memory_bytes}
        write_json(self.path, {"of": self.of, "tasks": dict(tasks), **spent})

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)


def copy_results(source: Path, target: Path) -> None:
    """Predictions first, results last, each file whole: where results.json stands, everything does."""
    for path in sorted((source / "predictions").glob("*.jsonl")):
        write_bytes(target / "predictions" / path.name, path.read_bytes())
    write_json(target / "results.json", read_json(source / "results.json"))


def share_results(source: Path, target: Path) -> None:
    """`copy_results` for other runs to read: all at once, and what the first of several runs left stays.

    Where they cannot be shared that is said: the others then score for themselves.
    """
    partial = partial_of(target)
    try:
        remove_old_partials(target)
        copy_results(source, partial)
        if predictions_in(partial) != predictions_in(source):  # another run took it for a stray meanwhile
            raise FileNotFoundError(errno.ENOENT, "another process removed a part of them")
        partial.rename(target)
        sync(target.parent)
    except (OSError, ConfigError, ResourceError) as error:
        if getattr(error, "errno", None) not in (errno.ENOTEMPTY, errno.EEXIST):
            say(f"The base model's scores are not shared with other runs: {error}")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_old_partials(target: Path) -> None:
    """Of this target alone: how long those of others take is not known here."""
    for stray in target.parent.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # another process removes them as well
            if stray.name.startswith(f".{target.name}.") and time.time() - stray.stat().st_mtime > STRAY_SECONDS:
                shutil.rmtree(stray, ignore_errors=True)


def predictions_in(folder: Path) -> set[str]:
    return {path.name for path in (folder / "predictions").glob("*.jsonl")}
