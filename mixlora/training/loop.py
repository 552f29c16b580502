"""The training loop: draw, forward, two kinds of loss, backward, clip, step, move the gates, record.

Everything random is a function of (seed, step, rank): which rows a step sees comes from the mixture's plan, dropout
from a generator that is seeded anew for each micro-batch. So a resumed run does not need to know how it got here.
"""

import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import get_scheduler

from mixlora import gates
from mixlora.config.schema import Train
from mixlora.errors import CheckpointError, Interrupted, NumericsError
from mixlora.losses import AuxLoss
from mixlora.models import packing
from mixlora.models.likelihood import AnswerLosses, packs_rows
from mixlora.records import append_line, read_lines, write_lines
from mixlora.tasks.collate import Batch, Row, collate, pack, packs, packs_within, padded_batches
from mixlora.training import checkpoint

Rows = Callable[[int, int], list[Row]]  # (first draw, count) -> tokenised rows
MOST_BAD_STEPS = 3


@dataclass
class Totals:
    """What has happened since the first step; saved with every checkpoint."""

    tokens: int = 0  # real tokens that went through the model
    label_tokens: Counter[str] = field(default_factory=Counter)  # tokens with loss, by task
    rows: Counter[str] = field(default_factory=Counter)
    skipped: int = 0  # steps that were not taken because a number was not finite
    seconds: float = 0.0
    best: float = -math.inf
    best_step: int = 0


@dataclass
class Trainer:
    """One run of training.

    Args:
        model: with the adapter attached; only its trainable parameters move.
        adapter: every tensor that belongs to the adapter, by name, as `attach` returned them.
        rows: tokenised training rows by draw, the same on every rank.
        tasks: their names, in one order on every rank.
        score: mean validation score of the current model; called every `train.eval_steps` steps.
    """

    model: nn.Module
    adapter: Mapping[str, Tensor]
    aux: Mapping[str, AuxLoss]
    rows: Rows
    tasks: Sequence[str]
    train: Train
    steps: int
    seed: int
    pad_id: int
    folder: Path
    accelerator: Accelerator
    score: Callable[[int], Mapping[str, float]] | None = None
    on_step: Callable[[Mapping[str, Any]], None] = lambda line: None

    def __post_init__(self) -> None:
        train = self.train
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.names = {id(t): name for name, t in self.adapter.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            weight_decay=train.weight_decay,
        )
        warmup = round(train.warmup_ratio * self.steps)
        self.scheduler = get_scheduler(train.lr_scheduler.value, self.optimizer, warmup, self.steps)
        self.answer_losses = AnswerLosses(self.model)
        with packing.by_row(self.model):
            self.packed = train.packing and packs_rows(self.model)
        clear_records(self.model)
        self.wrapped = self.accelerator.prepare(self.model) if self.parameters else self.model
        self.totals = Totals()
        self.bad_in_a_row = 0

    # ---- the run

    def run(self, start: int = 0) -> Totals:
        """Train from after step `start` to the last step."""
        self.model.train()
        with interruptions() as interrupted:
            for step in range(start + 1, self.steps + 1):
                began = time.monotonic()
                line = self.step(step)
                self.totals.seconds += time.monotonic() - began
                line |= self.validate(step)
                if self.main:
                    if step % self.train.logging_steps == 0 or step == self.steps:
                        append_line(self.folder / "metrics.jsonl", line)
                    self.on_step(line)
                if step % self.train.save_steps == 0 or step == self.steps or interrupted:
                    self.save(step)
                if interrupted:
                    raise Interrupted(f"saved after step {step}; the same command goes on from there", interrupted[0])
        return self.totals

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step over all micro-batches of this rank; returns its line of metrics."""
        batches = self.batches(step)
        label_tokens = self.total(torch.tensor(sum(b.label_tokens for b in batches)))
        sums, loads = Sums(self.tasks), Loads()
        aux_sums = dict.fromkeys(self.aux, 0.0)
        for i, batch in enumerate(batches):
            torch.manual_seed(mixed(self.seed, step, i, self.accelerator.process_index))
            last = i == len(batches) - 1
            unsynced = nullcontext() if last else self.accelerator.no_sync(self.wrapped)
            with packing.by_row(self.model), unsynced:
                nats_B, count_B = self.answer_losses(self.wrapped, batch)
                routings = gates.pop_routings(self.model)
                # DDP averages over ranks; the loss is a sum over all ranks' tokens.
                loss = nats_B.sum() / label_tokens * self.accelerator.num_processes
                for name, aux in self.aux.items():
                    if routings:
                        value = aux(routings, batch.mask_BS)
                        loss = loss + aux.coef * value / len(batches)
                        aux_sums[name] += value.item() / len(batches)
                self.accelerator.backward(loss)
            sums.add(batch, nats_B.detach(), count_B)
            loads.add(routings, batch.mask_BS)
        clear_records(self.model)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.train.max_grad_norm)
        rate = self.scheduler.get_last_lr()[0]
        self.move(step, norm, sums, loads, batches)
        return self.line(step, sums, aux_sums, loads, rate, float(norm))

    def move(self, step: int, norm: Tensor, sums: "Sums", loads: "Loads", batches: Sequence[Batch]) -> None:
        """Take the optimizer step, unless a number is not finite: that never reaches the weights."""
        finite = bool(torch.isfinite(norm)) and math.isfinite(float(self.total(sums.nats).sum()))
        self.totals.tokens += int(self.total(torch.tensor(sum(int(b.mask_BS.sum()) for b in batches))))
        self.totals.label_tokens.update(sums.by_task(self.total, sums.count))
        self.totals.rows.update(Counter(task for b in batches for task in b.tasks))
        loads.reduce(self.total)
        if finite:
            self.bad_in_a_row = 0
            self.optimizer.step()
            for name, gate in gates.gates_of(self.model).items():
                gate.after_step(loads.by_gate[name])
        else:
            self.totals.skipped += 1
            self.bad_in_a_row += 1
            if self.bad_in_a_row >= MOST_BAD_STEPS:
                ids = [row_id for batch in batches for row_id in batch.ids]
                raise NumericsError(
                    f"loss or gradients were not finite in {MOST_BAD_STEPS} steps in a row (the last is {step}); rows "
                    f"of that step: {', '.join(ids)}. Lower train.learning_rate, or look at these rows"
                )
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of one step, as many as every other rank has."""
        size, micro, world = self.train.per_device_train_batch_size, self.micro, self.accelerator.num_processes
        rows = self.rows((step - 1) * size * micro * world, size * micro * world)
        if not self.packed:
            found = [collate(batch, self.pad_id) for batch in padded_batches(rows, size)]
        elif self.train.max_tokens is None:
            found = [pack(batch) for batch in packs(rows, micro * world)]
        else:
            found = [pack(batch) for batch in packs_within(rows, self.train.max_tokens, world)]
        return [batch.to(self.accelerator.device) for batch in found[self.accelerator.process_index :: world]]

    def validate(self, step: int) -> dict[str, Any]:
        """Validation scores where they are due, and whether this is the best step so far."""
        every = self.train.eval_steps
        if self.score is None or every is None or (step % every and step != self.steps):
            return {}
        scores = dict(self.score(step))
        self.model.train()
        mean = sum(scores.values()) / len(scores)
        if mean > self.totals.best:
            self.totals.best, self.totals.best_step = mean, step
            if self.main and self.train.load_best:
                checkpoint.save(self.folder / "best", self.snapshot(step), keep=1)
        return {"validation": scores, "validation_mean": mean}

    def line(
        self, step: int, sums: "Sums", aux: Mapping[str, float], loads: "Loads", rate: float, norm: float
    ) -> dict[str, Any]:
        count = self.total(sums.count)
        nats = self.total(sums.nats)
        loss = float(nats.sum() / count.sum())
        tasks = {t: float(n / c) for t, n, c in zip(sums.tasks, nats, count, strict=True) if c > 0}
        return {
            "step": step,
            "loss": finite_or_text(loss),
            "task_losses": {task: finite_or_text(value) for task, value in sorted(tasks.items())},
            "aux_losses": {name: finite_or_text(value) for name, value in aux.items()},
            "learning_rate": rate,
            "grad_norm": finite_or_text(norm),
            "tokens": self.totals.tokens,
            "label_tokens": int(count.sum()),
            "expert_load": loads.summary(),
            "skipped": self.totals.skipped,
            "seconds": round(self.totals.seconds, 3),
        }

    # ---- checkpoints

    def save(self, step: int) -> None:
        self.accelerator.wait_for_everyone()
        if self.main:
            checkpoint.save(self.folder / "checkpoints", self.snapshot(step), keep=self.train.save_total_limit)
        self.accelerator.wait_for_everyone()

    def snapshot(self, step: int) -> checkpoint.Checkpoint:
        state = {"totals": vars(self.totals) | {"best": None if self.totals.best == -math.inf else self.totals.best}}
        optimizer = checkpoint.optimizer_tensors(self.optimizer, self.names)
        return checkpoint.Checkpoint(step, self.adapter, optimizer, state)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Go back to the state after `saved.step`: tensors, optimizer, schedule, totals, and the metrics file."""
        load_tensors(self.adapter, saved.adapter)
        checkpoint.restore_optimizer(
            self.optimizer, saved.optimizer, {id(p): self.names[id(p)] for p in self.parameters}
        )
        for _ in range(saved.step):
            self.scheduler.step()
        totals = dict(saved.state["totals"])
        totals |= {"best": -math.inf if totals["best"] is None else totals["best"]}
        totals |= {key: Counter(totals[key]) for key in ("label_tokens", "rows")}
        self.totals = Totals(**totals)
        path = self.folder / "metrics.jsonl"
        if self.main:
            write_lines(path, [line for line in read_lines(path) if line["step"] <= saved.step])

    def restore_tensors(self, saved: checkpoint.Checkpoint) -> None:
        """Only the adapter, as it was after `saved.step`."""
        load_tensors(self.adapter, saved.adapter)

    # ---- ranks

    @property
    def micro(self) -> int:
        return self.train.gradient_accumulation_steps

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks."""
        tensor = tensor.to(self.accelerator.device)
        if self.accelerator.num_processes > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor


class Sums:
    """Cross-entropy and label tokens of one step, by task (the tasks in one order on every rank)."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = list(tasks)
        self.nats = torch.zeros(len(self.tasks), dtype=torch.float64)
        self.count = torch.zeros(len(self.tasks), dtype=torch.float64)

    def add(self, batch: Batch, nats_B: Tensor, count_B: Tensor) -> None:
        index_B = torch.tensor([self.tasks.index(task) for task in batch.tasks])
        self.nats.index_add_(0, index_B, nats_B.double().cpu())
        self.count.index_add_(0, index_B, count_B.double().cpu())

    def by_task(self, total: Callable[[Tensor], Tensor], values: Tensor) -> dict[str, int]:
        return {task: int(v) for task, v in zip(self.tasks, total(values), strict=True) if v}


class Loads:
    """How many real tokens chose each expert of each gate, over micro-batches and ranks."""

    def __init__(self) -> None:
        self.by_gate: dict[str, Tensor] = {}

    def add(self, routings: Mapping[str, gates.Routing], mask_BS: Tensor) -> None:
        for name, routing in routings.items():
            load_E = gates.load(routing, mask_BS)
            self.by_gate[name] = self.by_gate[name] + load_E if name in self.by_gate else load_E

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        self.by_gate = {name: total(load_E).double() for name, load_E in self.by_gate.items()}

    def summary(self) -> dict[str, float]:
        """Over all gates: variation coefficient of the load (0 is balanced), share of experts that nobody chose."""
        if not self.by_gate:
            return {}
        spread = [float(load.std(unbiased=False) / load.mean()) for load in self.by_gate.values()]
        idle = [float((load == 0).double().mean()) for load in self.by_gate.values()]
        return {"cv_mean": sum(spread) / len(spread), "cv_max": max(spread), "idle": sum(idle) / len(idle)}


def load_tensors(into: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy all of `tensors` or none of them.

    Raises:
        CheckpointError: a name, a shape or a value that does not fit, naming the tensor.
    """
    missing, extra = sorted(set(into) - set(tensors)), sorted(set(tensors) - set(into))
    if missing or extra:
        raise CheckpointError(f"the saved adapter does not fit this model: missing {missing[:3]}, unknown {extra[:3]}")
    for name, tensor in tensors.items():
        if tensor.shape != into[name].shape:
            raise CheckpointError(f"saved tensor {name} has shape {list(tensor.shape)}, not {list(into[name].shape)}")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"saved tensor {name} holds values that are not finite")
    with torch.no_grad():
        for name, tensor in tensors.items():
            into[name].copy_(tensor)


def clear_records(model: nn.Module) -> None:
    """Recomputation under checkpointing leaves a record behind, with its graph."""
    for gate in gates.gates_of(model).values():
        gate.routing = None


def mixed(*numbers: int) -> int:
    """One seed from several numbers."""
    value = 0
    for number in numbers:
        value = (value * 1_000_003 + number + 1) % (2**63 - 1)
    return value


def finite_or_text(value: float) -> float | str:
    """JSON has no NaN."""
    return value if math.isfinite(value) else str(value)


@contextmanager
def interruptions() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM while the block runs; a second one ends the process at once."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        seen.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which alone may handle signals
        yield seen
        return
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
