"""The training loop: draw, forward, two kinds of loss, backward, clip, step, move the gates, record.

Everything random is a function of (seed, step, rank): which rows a step sees comes from the mixture's plan, dropout
from a generator that is seeded anew for each micro-batch, the learning rate from the step. So a resumed run does not
need to know how it got here.
"""

import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mixlora import gates, ranks, signals
from mixlora.adapters.attach import adapter_tensors, make_lean, paths
from mixlora.config.schema import Train
from mixlora.console import say
from mixlora.errors import CheckpointError, ConfigError, Interrupted, NumericsError, ResourceError
from mixlora.failpoints import reach
from mixlora.losses import AuxLoss
from mixlora.models import packing
from mixlora.models.compiled import compiled
from mixlora.models.likelihood import AnswerLosses, packs_rows, pads_rows
from mixlora.records import append_line, read_lines, sync_file, write_lines
from mixlora.tasks.collate import Batch, Row, collate, pack, packs_for, packs_within, padded_batches
from mixlora.training import checkpoint
from mixlora.training.distribute import apart_again, distribute, synchronised
from mixlora.training.recompute import clear_records, keepers
from mixlora.training.schedule import factor
from mixlora.training.spent import Spent
from mixlora.training.tally import Tally

Rows = Callable[[int, int], list[Row]]  # (first draw, count) -> tokenised rows
MOST_BAD_STEPS = 3
# float16 has no number below 6e-8, and a gradient is the smaller the more labels share a step: with 5,400 of them those
# of SmolLM2-135M were 13 % off in the median (1 % with a scale, 11 % in bfloat16), with 21,600 of them 35 %.
FLOAT16_SCALE = 2.0**16
STEPS_TO_DOUBLE = 2000


@dataclass
class Totals:
    """What has happened since the first step, over all ranks; saved with every checkpoint."""

    tokens: int = 0  # real tokens that went through the model
    tokens_by_task: Counter[str] = field(default_factory=Counter)  # the same, by task
    label_tokens: Counter[str] = field(default_factory=Counter)  # tokens with loss, by task
    rows: Counter[str] = field(default_factory=Counter)
    skipped: int = 0  # steps that were not taken because a number was not finite
    bad_in_a_row: int = 0
    seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    first_seconds: float = 0.0  # of each process's first step, which may compile
    first_tokens: int = 0
    run_seconds: float = 0.0  # of the whole run, loading and scoring too, in all tries of which it keeps a part
    peak_memory_bytes: int = 0  # the greatest of those tries, of this rank
    best: float | None = None  # mean validation score
    best_step: int = 0
    micro_batch_size: int = 0  # rows of a forward: fewer after memory ran out
    lean_from_step: int | None = None  # the step in which mixtures in a block turned lean, for memory ran out
    loss_scale: float = 1.0  # of the loss that is differentiated; above 1 where the model computes in float16
    scaled_steps: int = 0  # since that last changed

    @property
    def tokens_per_second(self) -> float | None:
        """Of all steps but each process's first; None where there are no others."""
        tokens = self.tokens - self.first_tokens
        return tokens / max(self.seconds - self.first_seconds, 1e-9) if tokens else None

    def add(self, tally: Tally) -> None:
        """What went through the model in one step, be it taken or skipped."""
        self.tokens += int(tally.tokens.sum())
        self.tokens_by_task.update(tally.by_task(tally.tokens))
        self.label_tokens.update(tally.by_task(tally.count))
        self.rows.update(tally.by_task(tally.rows))


@dataclass
class Trainer:
    """One run of training.

    Args:
        model: with the adapter attached; only its trainable parameters move.
        rows: tokenised training rows by draw, the same on every rank.
        tasks: their names, in one order on every rank.
        origin: what a checkpoint must share with a run that goes on from it.
        made_with: what a checkpoint should share with it, or its bytes may differ; saved with every checkpoint.
        score: validation scores of the current model; called every `train.eval_steps` steps.
        on_step: hears each line of metrics; on every rank.
        at: hears where this rank is.
        spent: on the whole run, what came before training included.
    """

    model: nn.Module
    aux: Mapping[str, AuxLoss]
    rows: Rows
    tasks: Sequence[str]
    train: Train
    steps: int
    seed: int
    pad_id: int
    folder: Path
    accelerator: Accelerator
    origin: Mapping[str, Any] = field(default_factory=dict)
    made_with: Mapping[str, Any] = field(default_factory=dict)
    score: Callable[[int], Mapping[str, float]] | None = None
    on_step: Callable[[Mapping[str, Any]], None] = lambda line: None
    at: Callable[[str], None] = lambda place: None
    spent: Spent = field(default_factory=Spent)

    def __post_init__(self) -> None:
        train = self.train
        # What the model can do is tried before it is spread over devices.
        self.answer_losses = AnswerLosses(self.model)
        self.packed = packed(self.model, train)
        size = train.micro_batch_size or train.per_device_train_batch_size
        self.gates, self.keepers = gates.gates_of(self.model), keepers(self.model)
        clear_records(self.keepers)
        self.wrapped = distribute(self.model, self.accelerator)
        self.compiled = compiled(self.model) if train.torch_compile else nullcontext
        # FSDP puts parameters of its own into the model, so they are looked up after it.
        self.adapter = adapter_tensors(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.names = {tensor: name for name, tensor in self.adapter.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            weight_decay=train.weight_decay,
            fused=True,  # one pass over a parameter, its gradient and its moments, where there would be a dozen
        )
        self.warmup = round(train.warmup_ratio * self.steps)
        self.scaled = getattr(self.model, "dtype", None) is torch.float16
        self.totals = Totals(micro_batch_size=size, loss_scale=FLOAT16_SCALE if self.scaled else 1.0)
        self.resumed_from: list[str] | None = None  # marks of the checkpoint that was asked for by its path, if any

    # ---- the run

    def run(self, start: int = 0) -> Totals:
        """Train from after step `start` to the last step."""
        self.model.train()
        with signals.collected() as seen:
            for step in range(start + 1, self.steps + 1):
                began, tokens = time.monotonic(), self.totals.tokens
                line, stop = self.step(step, seen)
                taken = time.monotonic() - began
                self.totals.seconds += taken
                if step == start + 1:
                    self.totals.first_seconds += taken
                    self.totals.first_tokens += self.totals.tokens - tokens
                scores = self.validate(step)
                line |= {"seconds": round(self.totals.seconds, 3)} | scores
                reach("step.metrics")
                if self.main and (scores or step % self.train.logging_steps == 0 or step == self.steps):
                    append_line(self.metrics, line)
                self.on_step(line)
                last = step == self.steps
                if scores or last:  # a signal that came in the meantime is not left to a step that may never be
                    stop = stop or any_rank_is_told_to_stop(seen)
                if step % self.train.save_steps == 0 or last or stop:
                    self.save(step)
                if last:
                    stop = stop or any_rank_is_told_to_stop(seen)
                if stop:
                    number = seen[0] if seen else signal.SIGTERM
                    raise Interrupted(f"saved after step {step}; {signals.GOES_ON} from there", number)
        return self.totals

    def step(self, step: int, seen: Sequence[int] = ()) -> tuple[dict[str, Any], bool]:
        """One optimizer step over all micro-batches; its line of metrics, and whether a rank was told to stop."""
        rate = self.train.learning_rate * factor(self.train.lr_scheduler, step, warmup=self.warmup, steps=self.steps)
        batches, tally, aux_losses, norm = self.finite_gradients(step, seen)
        reach("step.before_optimizer")
        self.totals.add(tally)
        if math.isfinite(norm) and math.isfinite(tally.loss):
            self.take_step(step, rate, tally)
        else:
            self.skip_step(step, batches)
        line = {
            "step": step,
            "loss": finite_or_text(tally.loss),
            "task_losses": {task: finite_or_text(value) for task, value in tally.task_losses().items()},
            "aux_losses": {name: finite_or_text(value) for name, value in aux_losses.items()},
            "learning_rate": rate,
            "grad_norm": finite_or_text(norm),
            "tokens": self.totals.tokens,
            "label_tokens": int(tally.count.sum()),
            "expert_load": tally.balance(),
            "skipped": self.totals.skipped,
            **({"loss_scale": self.totals.loss_scale} if self.scaled else {}),
        }
        return line, bool(tally.signals)

    def finite_gradients(self, step: int, seen: Sequence[int]) -> tuple[list[Batch], Tally, dict[str, float], float]:
        """Clipped gradients and their norm before clipping; a float16 overflow halves the loss scale and tries again.

        What is over all ranks is the same on each, and so is the scale.
        """
        totals, scale = self.totals, self.totals.loss_scale
        while True:
            batches, tally, found = self.gradients_that_fit(step)
            if self.scaled:
                torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], totals.loss_scale)
            clipped = ranks.whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.train.max_grad_norm))
            tally.signals += len(seen)
            tally.reduce(self.accelerator.device)  # waits for the device, as what follows then does not
            norm, aux_losses = float(clipped), {name: float(value) for name, value in found.items()}
            if totals.loss_scale == 1 or math.isfinite(norm) or not math.isfinite(tally.loss):
                if not math.isfinite(norm):
                    totals.loss_scale = scale  # which is not to blame
                return batches, tally, aux_losses, norm
            self.release()
            totals.loss_scale, totals.scaled_steps = totals.loss_scale / 2, 0

    def gradients_that_fit(self, step: int) -> tuple[list[Batch], Tally, dict[str, Tensor]]:
        """The step's gradients; where memory runs out, again in what keeps less of the same rows."""
        while True:
            try:
                return self.gradients(step)
            except (RuntimeError, MemoryError) as error:
                if not ranks.is_out_of_memory(error):
                    raise
            self.release()
            self.keep_less(step)

    def gradients(self, step: int) -> tuple[list[Batch], Tally, dict[str, Tensor]]:
        """Forward and backward over this rank's micro-batches."""
        batches = self.batches(step)
        own_labels = float(sum(sum(batch.label_tokens) for batch in batches))
        label_tokens = ranks.summed(torch.full((), own_labels, device=self.accelerator.device))
        tally, aux_losses = Tally(self.tasks), dict.fromkeys(self.aux, torch.zeros((), dtype=torch.float64))
        for i, batch in enumerate(batches):
            nats_B, chosen, values = self.micro_batch(step, i, batches, label_tokens)
            tally.add(batch, nats_B, chosen)
            aux_losses = {name: total + values[name] for name, total in aux_losses.items()}
        clear_records(self.keepers)
        return batches, tally, aux_losses

    def micro_batch(
        self, step: int, i: int, batches: Sequence[Batch], label_tokens: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Forward and backward over one of the step's micro-batches: nats [B], which experts each gate chose [T, E] and
        its part of the auxiliary losses. What else gates noted goes before backward, but for what that needs."""
        batch, number = batches[i], len(batches)
        self.at(f"step {step}, forward {i + 1} of {number}")
        reach("step.forward")
        torch.manual_seed(mixed(self.seed, step, i, self.accelerator.process_index))
        with packing.by_row(), self.compiled(), synchronised(self.wrapped, self.accelerator, last=i == number - 1):
            nats_B = self.answer_losses(self.wrapped, batch)
            self.at(f"step {step}, losses {i + 1} of {number}")
            routings = gates.popped(self.gates)
            chosen = {name: routing.chosen_TE for name, routing in routings.items()}
            # Gradients are averaged over ranks; the loss is a sum over all ranks' tokens.
            loss, values = nats_B.sum() / label_tokens * self.accelerator.num_processes, dict[str, Tensor]()
            for name, aux in self.aux.items():
                value = aux(routings, batch.mask_BS) / number
                loss, values[name] = loss + aux.coef * value, value.detach()
            del routings
            self.at(f"step {step}, backward {i + 1} of {number}")
            self.accelerator.backward(self.totals.loss_scale * loss)
        return nats_B.detach(), chosen, values

    def take_step(self, step: int, rate: float, tally: Tally) -> None:
        """Move the weights, then the gates that keep state.

        Raises:
            ResourceError: no memory for the optimizer's moments.
        """
        totals = self.totals
        totals.bad_in_a_row = 0
        totals.scaled_steps += self.scaled
        if totals.scaled_steps == STEPS_TO_DOUBLE:
            totals.loss_scale, totals.scaled_steps = 2 * totals.loss_scale, 0
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        try:
            self.optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if not ranks.is_out_of_memory(error):
                raise
            raise ResourceError(
                f"out of memory for the optimizer's moments in step {step}. "
                f"{self.ways_to_less(totals.micro_batch_size, fast=False)}. Or: Begin another run with less than "
                "method.r or method.num_experts"
            ) from error
        for name, gate in self.gates.items():
            gate.after_step(tally.loads[name])
        self.optimizer.zero_grad(set_to_none=True)

    def skip_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Let go of the gradients: a number that is not finite never reaches the weights.

        Raises:
            NumericsError: the last of too many such steps in a row.
        """
        self.totals.skipped += 1
        self.totals.bad_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.totals.bad_in_a_row >= MOST_BAD_STEPS:
            ids = sorted(row_id for share in ranks.gathered([i for b in batches for i in b.ids]) for row_id in share)
            raise NumericsError(
                f"loss or gradients were not finite in {MOST_BAD_STEPS} steps in a row (the last is {step}); rows "
                f"of that step: {', '.join(ids)}. Lower train.learning_rate, or look at these rows"
            )

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of one step, as many as every other rank has."""
        size, world = self.totals.micro_batch_size, self.accelerator.num_processes
        number = self.train.per_device_train_batch_size * self.train.gradient_accumulation_steps * world
        rows = self.rows((step - 1) * number, number)
        if not self.packed:
            found = padded_batches(rows, size, world)
        elif self.train.max_tokens is None:
            found = packs_for(rows, -(-number // (size * world)), world)
        else:
            max_tokens = self.train.max_tokens * size // self.train.per_device_train_batch_size
            found = packs_within(rows, max_tokens, world)
        own = found[self.accelerator.process_index :: world]
        batches = [pack(batch) if self.packed else collate(batch, self.pad_id) for batch in own]
        return [batch.to(self.accelerator.device) for batch in batches]

    # ---- memory

    def release(self) -> None:
        """Let go of what a failed forward or backward holds."""
        self.optimizer.zero_grad(set_to_none=True)
        clear_records(self.keepers)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def keep_less(self, step: int) -> None:
        """Mixtures in a block in their lean form; where they are, half the rows in a forward. The step stays the same.

        Raises:
            ResourceError: one row is already too much, or other ranks would have to follow.
        """
        size, fast = self.totals.micro_batch_size, "fast" in paths(self.model) and not self.train.torch_compile
        alone = self.accelerator.num_processes == 1
        if alone and fast:
            make_lean(self.model)
            self.totals.lean_from_step = step
            say(f"Out of memory in step {step}: from here on method.compute=lean, which keeps half as much of a block")
            return
        if not alone or size == 1:
            alone_in_it = size == 1 and self.train.max_tokens is None
            rows = " with one row in a micro-batch" if alone_in_it else ""
            raise ResourceError(f"out of memory in step {step}{rows}. {self.ways_to_less(size, fast)}")
        self.totals.micro_batch_size = size // 2
        say(f"Out of memory in step {step}: from here on {size // 2} rows a micro-batch, not {size}; the same a step")

    def ways_to_less(self, size: int, fast: bool) -> str:
        """What the user can do about memory."""
        twice = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        each = (
            ("method.compute=lean", fast),
            (f"train.micro_batch_size={size // 2}", size > 1),
            ("model.gradient_checkpointing=true", not twice and not self.train.torch_compile),
        )
        found, ways = list[str](), [way for way, possible in each if possible]
        if ways:
            found.append(f"Go on by the same command with {' or '.join(ways)}: the rows of a step stay the same")
        if size == 1:
            budget = "" if self.train.max_tokens is None else f"train.max_tokens={self.train.max_tokens} or "
            found.append(f"Begin another run with less than {budget}train.max_length={self.train.max_length}")
        return ". Or: ".join(found)

    # ---- validation and checkpoints

    def validate(self, step: int) -> dict[str, Any]:
        """Validation scores where they are due; the best adapter so far is kept."""
        every = self.train.eval_steps
        if self.score is None or every is None or (step % every and step != self.steps):
            return {}
        scores = ranks.agree(dict(self.score(step)))  # what is the best so far is for one of them to say
        self.model.train()
        if not scores:
            return {}
        # Of the trained tasks, as everywhere; where none of those has validation rows, of all.
        counted = [score for task, score in scores.items() if task in self.tasks] or [*scores.values()]
        mean = sum(counted) / len(counted)
        if self.totals.best is None or mean > self.totals.best:
            self.totals.best, self.totals.best_step = mean, step
            if self.train.load_best:
                self.write(step, "best")
                if self.main:
                    self.prune_best()
        return {"validation": scores, "validation_mean": mean}

    def save(self, step: int) -> None:
        """A checkpoint to go on from; those before it that are no longer needed go."""
        self.write(step, "checkpoints")
        if self.main:
            self.prune()

    def write(self, step: int, name: str) -> None:
        began = time.monotonic()
        self.at(f"checkpoint of step {step}")
        optimizer = checkpoint.optimizer_tensors(self.optimizer, self.names)
        self.measure()
        state = {
            "totals": dict(vars(self.totals)),
            "origin": self.origin,
            "made_with": self.made_with,
            "resumed_from": self.resumed_from,
        }
        saved = checkpoint.Checkpoint(step, self.tensors(), optimizer, state)
        if self.main:
            sync_file(self.metrics)
            checkpoint.save(self.folder / name, saved)
        ranks.wait_for_rank_0()
        self.totals.checkpoint_seconds += time.monotonic() - began

    def measure(self) -> None:
        """Bring time and memory of the whole run up to now."""
        self.totals.run_seconds = self.spent.seconds
        self.totals.peak_memory_bytes = self.spent.peak_memory_bytes

    def prune(self) -> None:
        checkpoint.prune(self.folder / "checkpoints", self.train.save_total_limit)
        self.prune_best()

    def prune_best(self) -> None:
        checkpoint.prune_best(self.folder / "best", self.folder / "checkpoints", keep=self.totals.best_step)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Go back to the state after `saved.step`: tensors, optimizer, totals, and the files of the run folder."""
        checkpoint.restore_adapter(self.adapter, saved)
        checkpoint.restore_optimizer(self.optimizer, saved.optimizer, self.names)
        asked, self.totals = self.totals.micro_batch_size, totals_of(saved)
        self.spent.add_earlier(self.totals.run_seconds, self.totals.peak_memory_bytes)
        self.totals.micro_batch_size = min(asked, self.totals.micro_batch_size)
        if self.totals.lean_from_step is not None:
            make_lean(self.model)
        if self.main:
            checkpoint.forget_after(self.folder / "checkpoints", saved.step)
            checkpoint.forget_after(self.folder / "best", saved.step)
            # Only then: a later checkpoint would go on with lines that are gone.
            write_lines(self.metrics, [line for line in read_lines(self.metrics) if line["step"] <= saved.step])
            self.prune()  # killed between the rename and the pruning, a run may have no later checkpoint to prune
        ranks.wait_for_rank_0()

    def restore_best(self) -> None:
        """The adapter as it was at the best validation score."""
        best = checkpoint.read(self.folder / "best" / f"step-{self.totals.best_step}")
        checkpoint.restore_adapter(self.adapter, best)
        apart_again(self.wrapped)

    def tensors(self) -> dict[str, Tensor]:
        """The whole adapter; every rank must ask for it."""
        return {name: ranks.whole(tensor.detach()) for name, tensor in self.adapter.items()}

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process


def packed(model: nn.Module, train: Train) -> bool:
    """Whether rows lie in one line: asked for, and each is then computed as if alone."""
    with packing.by_row():
        return train.packing and packs_rows(model)


def require_way(model: nn.Module, train: Train) -> None:
    """Raise a ConfigError where the rows of a forward can neither be packed nor padded."""
    size = train.micro_batch_size or train.per_device_train_batch_size
    if size > 1 and not packed(model, train) and not pads_rows(model):
        raise ConfigError(
            f"{size} rows in a forward: padding changes what this model computes, so rows must stand alone. Set "
            "train.micro_batch_size=1"
        )


def any_rank_is_told_to_stop(seen: Sequence[int]) -> bool:
    """Whether any rank was told to stop; every rank must ask."""
    return any(ranks.gathered(bool(seen)))


def totals_of(saved: checkpoint.Checkpoint) -> Totals:
    """Raises CheckpointError where another version of this package counted other things."""
    values = dict(saved.state["totals"])
    try:
        counted = ("tokens_by_task", "label_tokens", "rows")
        return Totals(**values | {key: Counter(values.get(key, {})) for key in counted})
    except TypeError:
        raise CheckpointError(
            f"the checkpoint of step {saved.step} was written by another version of mixlora, which counted other "
            "things. Finish the run with that version, or set run_dir to a new folder"
        ) from None


def mixed(*numbers: int) -> int:
    """One seed from several numbers."""
    value = 0
    for number in numbers:
        value = (value * 1_000_003 + number + 1) % (2**63 - 1)
    return value


def finite_or_text(value: float) -> float | str:
    """JSON has no NaN."""
    return value if math.isfinite(value) else str(value)
