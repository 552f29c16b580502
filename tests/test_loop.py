"""Laws of one optimizer step and of a whole run, on one process."""

import dataclasses
import math
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, RwkvConfig, RwkvForCausalLM, get_scheduler

from mixlora import gates, losses, ranks
from mixlora.adapters.attach import attach, paths
from mixlora.config.schema import Compute, Dtype, Method, Schedule, Scope, Train
from mixlora.errors import CheckpointError, ConfigError, NumericsError, ResourceError
from mixlora.records import read_lines
from mixlora.tasks.collate import Row
from mixlora.training import checkpoint, loop
from mixlora.training.loop import Trainer
from mixlora.training.recompute import enable_gradient_checkpointing
from mixlora.training.schedule import factor
from mixlora.training.spent import Spent
from mixlora.training.tally import Tally

GATED = Method(
    name="a", r=2, num_experts=4, top_k=2, gate={"kind": "balanced", "bias_rate": 0.01}, adapter_dtype=Dtype.float64
)
BLOCKS = dataclasses.replace(
    GATED, scope=Scope.feed_forward, target_modules="feed-forward", gate={"kind": "topk"}, compute=Compute.fast
)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).double()


def rows(first: int, number: int) -> list[Row]:
    """Row i has its own length and its own number of answer tokens."""
    made = []
    for i in range(first, first + number):
        ids = torch.randint(3, 64, (4 + i % 7 + 1 + i % 3,), generator=torch.Generator().manual_seed(i)).tolist()
        made.append(Row(f"row {i}", "ab"[i % 2], tuple(ids[: 4 + i % 7]), tuple(ids[4 + i % 7 :])))
    return made


def trainer(folder, *, steps=8, aux=None, score=None, method=GATED, model=None, **train) -> Trainer:
    folder.mkdir(exist_ok=True)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_steps": 3} | train
    model = llama() if model is None else model
    torch.manual_seed(1)
    adapter = attach(model, method)
    with torch.no_grad():
        for name, tensor in adapter.items():
            if name.endswith("B_RO"):
                tensor.normal_(std=0.3)
    return Trainer(
        model=model,
        aux=losses.build(aux or {}),
        rows=rows,
        tasks=["a", "b"],
        train=Train(**options),
        steps=steps,
        seed=0,
        pad_id=0,
        folder=folder,
        accelerator=Accelerator(cpu=True),
        score=score,
    )


def gradients(made: Trainer, step: int = 1) -> torch.Tensor:
    made.gradients(step)
    return torch.cat([p.grad.flatten() for p in made.parameters])


# ---- one step


def test_gradients_do_not_depend_on_how_a_step_is_cut(tmp_path):
    want = gradients(trainer(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=1))
    for size in (4, 2, 1):
        cut = trainer(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
        torch.testing.assert_close(gradients(cut), want, rtol=1e-6, atol=1e-12)


def test_every_label_token_of_the_step_weighs_the_same(tmp_path):
    """Against the plain definition: the mean over all answer tokens of single unpadded rows."""
    made = trainer(tmp_path)
    nats, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows(0, 8):
        ids = torch.tensor([[*row.prompt_ids, *row.answer_ids]])
        logits = made.model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]
        nats = nats + nn.functional.cross_entropy(logits, torch.tensor(row.answer_ids), reduction="sum")
        count += len(row.answer_ids)
    want = torch.autograd.grad(nats / count, made.parameters)
    torch.testing.assert_close(gradients(made), torch.cat([g.flatten() for g in want]), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("most", [1e9, 0.1])
def test_steps_are_those_of_adamw_written_out(tmp_path, most):
    """m and v by their recursions, corrected for their start; clipped by the norm of all; decay beside, not within, the
    gradient (Loshchilov & Hutter, arXiv 1711.05101)."""
    options = {"learning_rate": 0.02, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    made = trainer(tmp_path, max_grad_norm=most, lr_scheduler=Schedule.linear, warmup_ratio=0.25, **options)
    (lr, decay, b1, b2, eps), clipped = options.values(), 0
    p = torch.cat([parameter.detach().flatten() for parameter in made.parameters])
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(1, 5):
        g = gradients(made, step)
        made.optimizer.zero_grad()
        clipped += int(g.norm() > most)
        g = g * min(1.0, most / float(g.norm()))
        rate = lr * factor(Schedule.linear, step, warmup=2, steps=8)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = (1 - rate * decay) * p - rate * (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + eps)
        line, _ = made.step(step)
        assert line["learning_rate"] == pytest.approx(rate)
        torch.testing.assert_close(torch.cat([q.detach().flatten() for q in made.parameters]), p, rtol=1e-5, atol=1e-7)
    assert clipped == (4 if most < 1 else 0)


def test_the_newest_checkpoints_are_kept(tmp_path):
    trainer(tmp_path, save_steps=1, save_total_limit=3).run()
    assert [path.name for path in checkpoint.steps(tmp_path / "checkpoints")] == ["step-6", "step-7", "step-8"]


@pytest.mark.parametrize("method", [GATED, BLOCKS], ids=["linear", "block"])
def test_layers_that_are_computed_twice_leave_no_graph_behind(tmp_path, method):
    """Nobody goes through what a gate noted in a second forward: it would hold all that the layer should not keep."""
    want = gradients(trainer(tmp_path, method=method))
    made = trainer(tmp_path, method=method)
    enable_gradient_checkpointing(made.model)
    torch.testing.assert_close(gradients(made), want)
    nats_B = made.answer_losses(made.wrapped, made.batches(1)[0])
    assert all(routing.logits_TS.requires_grad for routing in gates.popped(made.gates).values())
    nats_B.sum().backward()
    assert [name for name, gate in made.gates.items() if gate.routing is not None] == []


def test_rows_of_a_forward_may_be_fewer_than_those_of_a_device(tmp_path):
    want = trainer(tmp_path)
    made = trainer(tmp_path, micro_batch_size=1)
    assert [len(batch.ids) for batch in made.batches(1)] == [1] * 8
    torch.testing.assert_close(gradients(made), gradients(want), rtol=1e-6, atol=1e-12)
    want.totals.micro_batch_size = 2  # after memory ran out
    want.save(1)
    for asked, size in ((1, 1), (4, 2), (None, 2)):
        again = trainer(tmp_path, micro_batch_size=asked)
        again.restore(checkpoint.read(tmp_path / "checkpoints" / "step-1"))
        assert again.totals.micro_batch_size == size


def test_packs_keep_within_their_tokens_and_change_no_gradient(tmp_path):
    """As few of them as do; where micro-batches are smaller, within as much less."""
    tokens, want = sum(map(len, rows(0, 8))), gradients(trainer(tmp_path))
    for most in (30, 15, tokens):
        made = trainer(tmp_path, max_tokens=most)
        lengths = [sum(batch.lengths) for batch in made.batches(1)]
        assert max(lengths) <= most
        assert sum(lengths) == tokens
        assert len(lengths) <= tokens // most + 1
        torch.testing.assert_close(gradients(made), want, rtol=1e-6, atol=1e-12)
    halves = trainer(tmp_path, max_tokens=30, micro_batch_size=2)
    assert [batch.ids for batch in halves.batches(1)] == [
        batch.ids for batch in trainer(tmp_path, max_tokens=15).batches(1)
    ]


@pytest.mark.parametrize("job", [{}, {"packing": False}, {"max_tokens": 30}], ids=str)
def test_a_rank_makes_its_own_micro_batches_alone(tmp_path, monkeypatch, job):
    """On 64 ranks the other 63 parts of a step took each of them longer than its own."""
    made, seen = trainer(tmp_path, per_device_train_batch_size=2, **job), []
    for name, real in (("pack", loop.pack), ("collate", loop.collate)):
        monkeypatch.setattr(loop, name, lambda rows, *pad, real=real: seen.append(1) or real(rows, *pad))
    ids = []
    for rank in range(4):
        there = SimpleNamespace(num_processes=4, process_index=rank, device=torch.device("cpu"))
        monkeypatch.setattr(made, "accelerator", there)
        seen.clear()
        own = made.batches(1)
        assert len(seen) == len(own)
        ids += [i for batch in own for i in batch.ids]
    assert len(ids) == len({*ids}) == 8 * made.train.gradient_accumulation_steps


def test_a_pack_that_is_too_much_is_not_called_one_row(tmp_path):
    made = trainer(tmp_path, per_device_train_batch_size=1, max_tokens=40)
    with pytest.raises(ResourceError, match=r"step 1\. .*less than train\.max_tokens=40 or train\.max_length"):
        made.keep_less(1)


def test_where_memory_runs_out_on_several_ranks_the_message_names_what_the_run_goes_on_with(tmp_path, monkeypatch):
    made = trainer(tmp_path, method=BLOCKS)
    monkeypatch.setattr(made, "accelerator", SimpleNamespace(num_processes=2))
    ways = "method.compute=lean or train.micro_batch_size=2 or model.gradient_checkpointing=true"
    with pytest.raises(ResourceError, match=f"Go on by the same command with {ways}: the rows of a step stay the same"):
        made.keep_less(3)


def test_gates_move_once_a_step_by_all_micro_batches(tmp_path):
    whole = trainer(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    cut = trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    whole.step(1), cut.step(1)
    biases = {name: t for name, t in whole.adapter.items() if name.endswith("bias_E")}
    assert biases
    assert all(torch.equal(t, cut.adapter[name]) for name, t in biases.items())
    assert all(math.isclose(float(t.abs().max()), 0.01, rel_tol=1e-5) for t in biases.values())


def test_an_aux_loss_is_the_mean_over_micro_batches_and_adds_its_coefficient_times_its_gradient(tmp_path):
    """It is logged without its coefficient."""
    aux = {"load_balance": {"coef": 0.5}, "router_z": {"coef": 0.02}}
    plain, made = gradients(trainer(tmp_path, packing=False)), trainer(tmp_path, packing=False, aux=aux)
    _, _, values = made.gradients(1)
    got, batches = torch.cat([p.grad.flatten() for p in made.parameters]), made.batches(1)
    assert len(batches) == 2
    means = dict.fromkeys(aux, 0.0)
    for batch in batches:
        given = {"attention_mask": batch.attention_mask_BS, "position_ids": batch.position_ids_BS}
        made.model(input_ids=batch.input_ids_BS, **given)
        routings = gates.popped(made.gates)
        means = {name: mean + made.aux[name](routings, batch.mask_BS) / 2 for name, mean in means.items()}
    for name, mean in means.items():
        assert float(values[name]) == pytest.approx(mean.item(), rel=1e-6)
    whole = sum(options["coef"] * means[name] for name, options in aux.items())
    want = torch.autograd.grad(whole, made.parameters, materialize_grads=True)
    want = torch.cat([g.flatten() for g in want])
    torch.testing.assert_close(got - plain, want, rtol=0, atol=1e-5)  # LLaMA's norm computes in float32
    assert want.abs().max() > 0.1


def test_dropout_is_another_in_each_step_micro_batch_and_process_and_the_same_again(tmp_path, monkeypatch):
    method = dataclasses.replace(LORA, lora_dropout=0.5, adapter_dtype=Dtype.float64)
    made = trainer(tmp_path, method=method)
    batch, count = made.batches(1)[0], torch.tensor(1.0)

    def gradient(step: int, i: int, process: int = 0, seed: int = 0) -> tuple[float, ...]:
        made.seed = seed
        with monkeypatch.context() as patched:
            patched.setattr(Accelerator, "process_index", process)
            made.micro_batch(step, i, [batch] * 2, count)
        found = torch.cat([p.grad.flatten() for p in made.parameters])
        made.optimizer.zero_grad()
        return tuple(found.tolist())

    places = [(1, 0), (2, 0), (1, 1), (1, 0, 1), (1, 0, 0, 1)]
    assert len({gradient(*place) for place in places}) == len(places)
    assert gradient(*places[0]) == gradient(*places[0])


@pytest.mark.parametrize("packing", [True, False])
def test_tokens_are_counted_by_task_without_padding(tmp_path, packing):
    made = trainer(tmp_path, packing=packing)
    made.step(1)
    want = {task: sum(len(row) for row in rows(0, 8) if row.task == task) for task in "ab"}
    assert dict(made.totals.tokens_by_task) == want
    assert made.totals.tokens == sum(want.values())


def test_a_checkpoint_from_before_tokens_were_counted_by_task_is_gone_on_from(tmp_path):
    made = trainer(tmp_path, steps=2, save_steps=1)
    whole = made.run()
    saved = checkpoint.read(tmp_path / "checkpoints" / "step-1")
    del saved.state["totals"]["tokens_by_task"]
    again = trainer(tmp_path, steps=2)
    again.restore(saved)
    assert again.run(1).tokens == whole.tokens
    assert sum(again.totals.tokens_by_task.values()) < whole.tokens


def test_time_and_memory_are_of_all_processes_that_trained_a_part(tmp_path):
    made = trainer(tmp_path, steps=2, save_steps=1)
    made.spent = Spent(lambda: 7, time.monotonic() - 1000)
    made.run()
    saved = checkpoint.read(tmp_path / "checkpoints" / "step-1")
    again = trainer(tmp_path, steps=2)
    again.spent = Spent(lambda: 5, time.monotonic() - 500)
    again.restore(saved)
    again.measure()
    assert 1500 <= again.totals.run_seconds < 1600
    assert again.totals.peak_memory_bytes == 7
    again.measure()
    assert again.totals.run_seconds < 1600  # the earlier part once
    for key in ("run_seconds", "peak_memory_bytes"):
        del saved.state["totals"][key]  # a checkpoint from before they were kept
    again.spent = Spent(lambda: 5, time.monotonic() - 500)
    again.restore(saved)
    again.measure()
    assert again.totals.run_seconds < 600
    assert again.totals.peak_memory_bytes == 5


def test_loads_are_summed_up_by_how_far_they_are_from_even():
    """Of three gates: 1 and 3, all to one of four, and even."""
    tally = Tally(["a"])
    assert tally.balance() == {}
    tally.loads = {"x": torch.tensor([1.0, 3]), "y": torch.tensor([0.0, 0, 4, 0]), "z": torch.tensor([5.0, 5])}
    want = {"cv_mean": (1 / 2 + 3**0.5 + 0) / 3, "cv_max": 3**0.5, "idle": (0 + 3 / 4 + 0) / 3}
    assert tally.balance() == pytest.approx(want)


def test_the_first_step_of_each_process_is_left_out_of_tokens_a_second(tmp_path, monkeypatch):
    """It compiles. Here it takes 100 s, each other step 2 s."""
    clock = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])

    class Timed(Trainer):
        first = True

        def step(self, step, seen=()):
            clock[0] += 100.0 if self.first else 2.0
            self.first = False
            return super().step(step, seen)

    def timed(folder, steps):
        made = trainer(folder, steps=steps, save_steps=2)
        made.__class__ = Timed
        return made

    tokens = [sum(len(row) for row in rows(8 * step, 8)) for step in range(4)]
    whole = timed(tmp_path, 4).run()
    assert whole.seconds == 106
    assert whole.tokens_per_second == pytest.approx(sum(tokens[1:]) / 6)
    again = timed(tmp_path, 4)
    again.restore(checkpoint.read(tmp_path / "checkpoints" / "step-2"))
    totals = again.run(2)
    assert totals.seconds == 204
    assert totals.tokens_per_second == pytest.approx((tokens[1] + tokens[3]) / 4)
    assert timed(tmp_path / "one", 1).run().tokens_per_second is None


# ---- numbers that are not finite


class Poisoned(Trainer):
    """In some steps one gradient is not finite."""

    bad: set = set()  # noqa: RUF012
    value = math.nan

    def gradients(self, step):
        found = super().gradients(step)
        if step in self.bad:
            self.parameters[0].grad[0, 0] = self.value
        return found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_never_reaches_the_weights(tmp_path, monkeypatch, value):
    monkeypatch.setattr(Poisoned, "bad", {2})
    monkeypatch.setattr(Poisoned, "value", value)
    made = trainer(tmp_path)
    made.__class__ = Poisoned
    made.step(1)
    before = {name: t.clone() for name, t in made.tensors().items()}
    line, _ = made.step(2)
    assert line["skipped"] == 1
    assert all(torch.equal(before[name], t) for name, t in made.tensors().items())
    made.step(3)
    assert not all(torch.equal(before[name], t) for name, t in made.tensors().items())


def test_three_bad_steps_in_a_row_stop_the_run_and_two_do_not(tmp_path, monkeypatch):
    made = trainer(tmp_path)
    made.__class__ = Poisoned
    monkeypatch.setattr(Poisoned, "bad", {2, 3, 5, 6, 7})
    with pytest.raises(NumericsError, match=r"the last is 7.*row 48.*row 55") as raised:
        made.run()
    assert raised.value.status == 6
    assert [line["skipped"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 2, 3, 4]


def test_bad_steps_are_counted_across_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(Poisoned, "bad", {5, 6, 7})
    made = trainer(tmp_path)
    made.__class__ = Poisoned
    with pytest.raises(NumericsError):
        made.run()
    again = trainer(tmp_path)
    again.__class__ = Poisoned
    again.restore(checkpoint.read(tmp_path / "checkpoints" / "step-6"))
    with pytest.raises(NumericsError, match="the last is 7"):
        again.run(6)


def test_a_kill_while_a_run_goes_back_leaves_no_checkpoint_whose_lines_are_gone(tmp_path, monkeypatch):
    made = trainer(tmp_path)
    made.run()
    left: list[list[str]] = []

    def note(path, rows):
        left.append([saved.name for saved in checkpoint.steps(tmp_path / "checkpoints")])

    monkeypatch.setattr(loop, "write_lines", note)
    made.restore(checkpoint.read(tmp_path / "checkpoints" / "step-6"))
    assert left == [["step-6"]]


# ---- schedules


@pytest.mark.parametrize(("kind", "theirs"), [("cosine",) * 2, ("linear",) * 2, ("constant", "constant_with_warmup")])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_schedules_have_the_shapes_of_transformers(kind, theirs, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(theirs, optimizer, warmup, 20)
    for step in range(1, 21):
        assert math.isclose(factor(Schedule(kind), step, warmup=warmup, steps=20), scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


# ---- runs


def state(made: Trainer) -> dict:
    return made.tensors() | checkpoint.optimizer_tensors(made.optimizer, made.names)


def metrics(folder) -> list:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(folder / "metrics.jsonl")]


@pytest.mark.parametrize("start", [3, 6])
def test_going_on_from_a_checkpoint_changes_no_bit(tmp_path, start):
    whole = trainer(tmp_path / "whole", save_total_limit=9)
    whole.run()
    again = trainer(tmp_path / "whole", save_total_limit=9)
    again.restore(checkpoint.read(tmp_path / "whole" / "checkpoints" / f"step-{start}"))
    assert len(metrics(tmp_path / "whole")) == start
    again.run(start)
    assert state(again).keys() == state(whole).keys()
    assert all(torch.equal(state(again)[name], t) for name, t in state(whole).items())
    times = dict.fromkeys(("seconds", "checkpoint_seconds", "run_seconds", "first_seconds", "first_tokens"), 0)
    assert vars(again.totals) | times == vars(whole.totals) | times
    fresh = trainer(tmp_path / "fresh")
    fresh.run()
    assert metrics(tmp_path / "fresh") == metrics(tmp_path / "whole")


def test_the_best_adapter_is_kept_though_later_steps_are_worse(tmp_path):
    seen = {}

    def score(step):
        seen[step] = {name: t.clone() for name, t in made.tensors().items()}
        return {"a": {2: 0.3, 4: 0.9, 6: 0.8, 8: 0.9}[step]}

    made = trainer(tmp_path, eval_steps=2, load_best=True, score=score)
    totals = made.run()
    assert (totals.best, totals.best_step) == (0.9, 4)
    made.restore_best()
    assert all(torch.equal(seen[4][name], t) for name, t in made.tensors().items())


def test_of_the_best_adapters_no_more_are_kept_than_a_run_may_go_back_to(tmp_path):
    """Each is three times an adapter: with few checkpoints and a score that rises they filled a disk."""
    kept = []

    def score(step):
        kept.append(len(checkpoint.steps(tmp_path / "best")))
        return {"a": step / 10}

    trainer(tmp_path, eval_steps=1, save_steps=100, load_best=True, score=score).run()
    assert max(kept) == 1


def test_the_best_adapter_is_that_of_the_trained_tasks(tmp_path):
    """A task that is scored and not trained on counts where none of the others has validation rows."""
    mixed, others = ({"a": 0.2, "other": 0.9}, 0.2), ({"other": 0.9, "more": 0.1}, 0.5)
    for i, (scores, mean) in enumerate((mixed, others)):
        made = trainer(tmp_path / str(i), steps=1, eval_steps=1, score=lambda step, scores=scores: scores)
        made.run()
        assert made.totals.best == mean
        assert metrics(tmp_path / str(i))[-1]["validation"] == scores


def test_going_on_in_another_folder_keeps_the_best_adapter(tmp_path):
    """The new folder has no checkpoint yet that names it."""
    job = {"eval_steps": 2, "load_best": True, "score": lambda step: {"a": 1 / step}}
    whole, again = trainer(tmp_path / "whole", **job), trainer(tmp_path / "again", **job)
    whole.run()
    path = tmp_path / "whole" / "checkpoints" / "step-6"
    checkpoint.adopt(path, tmp_path / "whole", tmp_path / "again", with_best=True)
    again.restore(checkpoint.read(path))
    assert again.run(6).best_step == 2
    for made in (whole, again):
        made.restore_best()
    assert all(torch.equal(whole.tensors()[name], t) for name, t in again.tensors().items())


def test_a_validation_score_is_written_whatever_steps_are_logged(tmp_path):
    made = trainer(tmp_path, eval_steps=3, logging_steps=4, score=lambda step: {"a": step / 10})
    made.run()
    lines = {line["step"]: line.get("validation_mean") for line in metrics(tmp_path)}
    assert lines == {3: 0.3, 4: None, 6: 0.6, 8: 0.8}


def test_a_checkpoint_of_another_model_changes_nothing(tmp_path):
    made = trainer(tmp_path)
    made.save(1)
    saved = checkpoint.read(tmp_path / "checkpoints" / "step-1")
    name = sorted(saved.adapter)[0]
    saved.adapter[name] = saved.adapter[name][:1]
    before = {name: t.clone() for name, t in made.tensors().items()}
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors .* of step 1: .* shape .* an earlier checkpoint"):
        made.restore(saved)
    assert all(torch.equal(before[name], t) for name, t in made.tensors().items())


# ---- memory


class Small(Trainer):
    """A machine on which a forward of more than `fits` rows runs out of memory."""

    fits = 1

    def gradients(self, step):
        for batch in self.batches(step):
            if len(batch.ids) > self.fits:
                super().gradients(step)  # what was computed before must not count twice
                raise torch.OutOfMemoryError("out of memory")
        return super().gradients(step)


def test_smaller_micro_batches_after_memory_ran_out_give_the_same_run(tmp_path, capsys):
    whole = trainer(tmp_path / "whole")
    whole.run()
    small = trainer(tmp_path / "small")
    small.__class__ = Small
    totals = small.run()
    assert totals.micro_batch_size == 1
    assert "from here on 2 rows" in capsys.readouterr().out
    assert totals.rows == whole.totals.rows
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(small.tensors()[name], tensor, rtol=1e-5, atol=1e-7)
    again = trainer(tmp_path / "small")
    again.restore(checkpoint.read(tmp_path / "small" / "checkpoints" / "step-6"))
    assert again.totals.micro_batch_size == 1


class NoRoomForFast(Small):
    """A machine on which two rows fit into memory, and only where no mixture computes in its fast form."""

    fits = 2

    def gradients(self, step):
        assert all(gate.routing is None for gate in self.gates.values())
        if "fast" in paths(self.model):
            self.model(input_ids=torch.ones(1, 4, dtype=torch.long))
            raise torch.OutOfMemoryError("out of memory")
        return super().gradients(step)


def test_mixtures_in_a_block_turn_lean_before_micro_batches_get_smaller(tmp_path, capsys):
    whole = trainer(tmp_path / "whole", method=BLOCKS)
    whole.run()
    assert paths(whole.model) == {"fast": 2}
    assert whole.totals.lean_from_step is None
    small = trainer(tmp_path / "small", method=BLOCKS)
    small.__class__ = NoRoomForFast
    totals = small.run()
    assert paths(small.model) == {"lean": 2}
    assert (totals.lean_from_step, totals.micro_batch_size) == (1, 2)
    said = capsys.readouterr().out
    assert said.index("method.compute=lean") < said.index("from here on 2 rows")
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(small.tensors()[name], tensor, rtol=1e-5, atol=1e-7)
    again = trainer(tmp_path / "small", method=BLOCKS)
    again.restore(checkpoint.read(tmp_path / "small" / "checkpoints" / "step-6"))
    assert paths(again.model) == {"lean": 2}


def test_one_row_that_does_not_fit_names_the_setting(tmp_path, monkeypatch):
    made = trainer(tmp_path)
    made.__class__ = Small
    monkeypatch.setattr(Small, "fits", 0)
    with pytest.raises(ResourceError, match=r"train\.max_length") as raised:
        made.run()
    assert raised.value.status == 5


def test_rows_that_padding_changes_are_trained_one_by_one_or_refused(tmp_path):
    sizes = {"vocab_size": 256, "hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48}

    def rwkv() -> RwkvForCausalLM:
        torch.manual_seed(0)
        return RwkvForCausalLM(RwkvConfig(**sizes, num_hidden_layers=2, use_cache=False)).eval()

    method = dataclasses.replace(GATED, target_modules=["receptance"])  # it reads the weights of others itself
    with pytest.raises(ConfigError, match=r"8 rows in a forward: padding changes .* Set train\.micro_batch_size=1"):
        loop.require_way(rwkv(), Train())
    loop.require_way(rwkv(), Train(micro_batch_size=1))
    for single in ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}, {"micro_batch_size": 1}):
        made = trainer(tmp_path / "one", model=rwkv(), method=method, **single)
        assert [len(batch.ids) for batch in made.batches(1)] == [1] * 8


# ---- float16


LORA = Method(name="lora", r=4)  # without a gate, whose choices differ where logits are rounded


def in_float16(folder, **options) -> Trainer:
    return trainer(folder, method=LORA, model=llama().half(), **options)


def taken(made: Trainer, step: int = 1) -> torch.Tensor:
    """The gradients that a step is taken with, which are small enough not to be clipped."""
    made.optimizer.zero_grad()
    *_, norm = made.finite_gradients(step, ())
    assert norm < made.train.max_grad_norm
    return torch.cat([p.grad.flatten() for p in made.parameters])


@pytest.fixture
def _many_ranks(monkeypatch):
    """As if a thousand other ranks had as many labels in the step: the gradients of each are as small."""
    monkeypatch.setattr(ranks, "summed", lambda tensor: 1000 * tensor)


@pytest.mark.usefixtures("_many_ranks")
def test_small_gradients_survive_float16(tmp_path):
    want = taken(trainer(tmp_path, method=LORA, model=llama().float()))
    made = in_float16(tmp_path)

    def off() -> float:
        return float((taken(made) - want).norm() / want.norm())

    with_scale, made.totals.loss_scale = off(), 1.0
    assert with_scale < 0.01
    assert off() > 5 * with_scale


def test_a_scale_that_float16_cannot_hold_is_halved_within_the_step(tmp_path):
    made, want = in_float16(tmp_path), in_float16(tmp_path)
    want.totals.loss_scale = 2.0**10
    made.totals.loss_scale = 2.0**40
    line, _ = made.step(1)
    assert line["skipped"] == 0
    assert line["loss_scale"] == made.totals.loss_scale < 2.0**20
    assert made.totals.rows.total() == 8
    want.step(1)
    for name, tensor in made.tensors().items():
        torch.testing.assert_close(tensor, want.tensors()[name], rtol=1e-3, atol=1e-5)


def test_a_scale_that_has_held_is_doubled_and_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "STEPS_TO_DOUBLE", 3)
    made = in_float16(tmp_path, steps=5, save_steps=4)
    made.totals.loss_scale = 4.0
    made.run()
    scales = [line["loss_scale"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert scales == [4, 4, 8, 8, 8]
    again = in_float16(tmp_path, steps=7)
    again.restore(checkpoint.read(tmp_path / "checkpoints" / "step-5"))
    again.run(5)
    assert [line["loss_scale"] for line in read_lines(tmp_path / "metrics.jsonl")][5:] == [16, 16]


def test_rows_that_no_scale_helps_do_not_lower_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Poisoned, "bad", {2})
    monkeypatch.setattr(Poisoned, "value", math.nan)
    made = in_float16(tmp_path)
    made.__class__ = Poisoned
    lines = [made.step(step)[0] for step in (1, 2, 3)]
    assert [line["skipped"] for line in lines] == [0, 1, 1]
    assert {line["loss_scale"] for line in lines} == {loop.FLOAT16_SCALE}


def test_a_loss_that_is_no_number_is_not_computed_again_with_half_the_scale(tmp_path):
    made = in_float16(tmp_path)
    with torch.no_grad():
        made.model.model.norm.weight.fill_(math.nan)
    line, _ = made.step(1)
    assert line["skipped"] == 1
    assert line["loss_scale"] == loop.FLOAT16_SCALE


def test_other_dtypes_have_no_scale(tmp_path):
    assert "loss_scale" not in trainer(tmp_path).step(1)[0]
