"""Two processes are one run: the same losses, one folder, one message, one end."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from tiny_runs import (
    METHODS,
    REPOSITORY,
    TORCHRUN,
    contents,
    environments,
    first_of,
    launched,
    ranks,
    start,
    task_folder,
    train,
    train_on,
)
from torch import nn
from torch.distributed import HashStore

from mixlora.ranks import Watch
from mixlora.records import read_lines
from mixlora.training import checkpoint
from mixlora.training.distribute import distribute, synchronised

# Global micro-batches are the same rows: 4 on one process, 2 on each of two.
ONE = ("train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=2")
TWO = ("train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2")
STEPS = ("train.max_steps=20", "train.save_steps=50", "method.lora_dropout=0", "eval.before=false")
# In float64 rounding cannot hide a term that is wrong, nor AdamW blow it up.
PRECISE = ("model.dtype=float64", "method.adapter_dtype=float64")
OFTEN = ("mixlora",)  # with a router over whole blocks and an auxiliary loss; the rest in make test-full


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    return task_folder(tmp_path_factory.mktemp("configs"))


def ended(done) -> None:
    assert [rank.returncode for rank in done] == [0] * len(done), done


def agree(one, two, rel: float = 1e-9) -> None:
    """Two run folders hold the same training."""
    ours, theirs = read_lines(one / "metrics.jsonl"), read_lines(two / "metrics.jsonl")
    assert len(ours) == len(theirs) == 20
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "task_losses", "aux_losses", "label_tokens", "tokens"):
            assert b[key] == pytest.approx(a[key], rel=rel), (a["step"], key)
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        assert torch.dist(adapters[1][name], tensor) <= 100 * rel * tensor.norm(), name
    record, other = (json.loads((folder / "run.json").read_text()) for folder in (one, two))
    assert other["rows"] == record["rows"]
    assert other["label_tokens"] == record["label_tokens"]
    results = [json.loads((folder / "results.json").read_text())["sums"] for folder in (one, two)]
    assert results[0]["n"] == results[1]["n"] == 10
    predictions = [read_lines(folder / "predictions" / "sums.jsonl") for folder in (one, two)]
    for a, b in zip(*predictions, strict=True):
        assert b["id"] == a["id"]
        assert b["log_likelihoods"] == pytest.approx(a["log_likelihoods"], rel=1e-4)


def compare(configs, folder, method, **env) -> None:
    alone = train(configs, folder / "one" / "run", f"method={method}", *STEPS, *PRECISE, *ONE)
    assert alone.returncode == 0, alone.stderr
    both = train_on(configs, folder / "two" / "run", f"method={method}", *STEPS, *PRECISE, *TWO, **env)
    ended(both)
    assert both[1].stdout == ""
    agree(folder / "one" / "run", folder / "two" / "run")


@pytest.mark.parametrize("method", [m if m in OFTEN else pytest.param(m, marks=pytest.mark.full) for m in METHODS])
def test_two_processes_train_as_one(configs, tmp_path, method):
    compare(configs, tmp_path, method)


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


@pytest.mark.full
def test_three_processes_train_as_one(configs, tmp_path):
    """A number that does not divide the questions. LLaMA's norm computes in float32 even here, where a gradient times 3
    is rounded and one times 2 is not."""
    job = ("method=mixlora", *STEPS, *PRECISE, "train.gradient_accumulation_steps=1")
    sixes, twos = "train.per_device_train_batch_size=6", "train.per_device_train_batch_size=2"
    alone = train(configs, tmp_path / "one" / "run", *job, sixes)
    assert alone.returncode == 0, alone.stderr
    ended(train_on(configs, tmp_path / "three" / "run", *job, twos, processes=3))
    agree(tmp_path / "one" / "run", tmp_path / "three" / "run", rel=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_a_model_in_shards_trains_as_one(configs, tmp_path, method):
    compare(configs, tmp_path, method, **FSDP)
    assert json.loads((tmp_path / "two" / "run" / "run.json").read_text())["sharded"] is True


@pytest.mark.full
@pytest.mark.parametrize("sharded", [False, True])
def test_compiled_layers_train_as_one(configs, tmp_path, sharded):
    """Against one process that compiles nothing. Machine code rounds otherwise within norms, which are in float32."""
    alone = train(configs, tmp_path / "one" / "run", "method=lora", *STEPS, *PRECISE, *ONE)
    assert alone.returncode == 0, alone.stderr
    compiled = ("method=lora", *STEPS, *PRECISE, *TWO, "train.torch_compile=true")
    both = ranks(configs, tmp_path / "two" / "run", *compiled, **(FSDP if sharded else {}))
    ended([rank.done(600) for rank in both])  # minutes of compiling on a busy machine
    agree(tmp_path / "one" / "run", tmp_path / "two" / "run", rel=1e-4)
    record = json.loads((tmp_path / "two" / "run" / "run.json").read_text())
    assert (record["torch_compile"], record["sharded"]) == (True, sharded)


@pytest.mark.full
def test_a_model_in_shards_goes_on_and_mixes_dtypes(configs, tmp_path):
    """A bfloat16 base under float32 adapters, killed and resumed by processes without a common parent's memory:
    safetensors gives tensors in an order of its own in each."""
    job = ("method=mola", *TWO, "model.dtype=bfloat16", "train.max_steps=4", "train.save_steps=2", "rank_timeout=20")
    ended(train_on(configs, tmp_path / "whole", *job, **FSDP))
    dead = train_on(configs, tmp_path / "run", *job, **FSDP, MIXLORA_FAIL="1/step.forward@7:kill")
    assert all(rank.returncode for rank in dead)
    done = launched(TORCHRUN, configs, tmp_path / "run", *job, **FSDP)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.full
def test_layers_that_stay_whole_are_scored_with_the_best_adapter(configs, tmp_path):
    """zero2.yaml: what a forward has gathered stays, and the best adapter is written into the parts after one."""
    job = ("method=mole", *TWO, "train.max_steps=6", "train.eval_steps=1", "train.load_best=true", "train.eval_limit=4")
    stay = FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}
    ended(train_on(configs, tmp_path / "run", *job, "train.learning_rate=0.05", **stay))
    scores = {line["step"]: line["validation_mean"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")}
    assert max(scores.values()) > scores[6], "the best step must not be the last one for this to show anything"
    line = [sys.executable, "-m", "mixlora.evaluate", "--config-dir", str(configs), f"run={tmp_path / 'run'}"]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(line, env=env, check=True, capture_output=True)
    (again,) = (tmp_path / "run" / "evaluations").iterdir()
    want, found = (read_lines(folder / "predictions" / "sums.jsonl") for folder in (again, tmp_path / "run"))
    for a, b in zip(want, found, strict=True):
        assert b["log_likelihoods"] == pytest.approx(a["log_likelihoods"], rel=1e-4)


@pytest.mark.full
def test_parameters_of_two_dtypes_in_shards_are_refused_with_the_remedy(configs, tmp_path):
    job = (
        "method=mole",
        *TWO,
        "model.dtype=bfloat16",
        "method.adapter_dtype=auto",
        "train.max_steps=1",
        "eval.before=true",
    )
    done = train_on(configs, tmp_path / "run", *job, **FSDP)
    assert [rank.returncode for rank in done] == [2, 2]
    said = "".join(rank.stderr for rank in done)
    assert said.count("bfloat16 and float32") == 1
    assert "method.adapter_dtype=float32" in said
    assert not (tmp_path / "run").exists()  # said before the base model is scored


# ---- how a job ends


SMALL = ("method=mole", "train.max_steps=4", "eval.before=false")


def test_a_mistake_is_said_once(configs, tmp_path):
    done = first_of(ranks(configs, tmp_path / "run", "method=mole", "train.learning_rat=1"))
    assert done.returncode == 2
    assert "Did you mean 'train.learning_rate'" in done.stderr
    assert "Traceback" not in done.stderr


ERRORS = [("data", 3, "a bad row"), ("oom", 5, "train.micro_batch_size=1")]


@pytest.mark.parametrize(
    ("rank", "error"), [(1, 0), *(pytest.param(*x, marks=pytest.mark.full) for x in ((0, 0), (0, 1), (1, 1)))]
)
def test_an_error_of_one_rank_ends_all_with_its_status(configs, tmp_path, rank, error):
    action, status, message = ERRORS[error]
    done = train_on(configs, tmp_path / "run", *SMALL, MIXLORA_FAIL=f"{rank}/step.forward@3:{action}")
    assert [one.returncode for one in done] == [status, status], done
    assert done[0].stderr.count(message) == 1
    assert "Traceback" not in done[0].stderr + done[1].stderr
    assert done[1].stderr == ""
    if rank == 1:
        assert "rank 1: " in done[0].stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["exit_status"]) == ("failed", status)
    assert message in record["message"]


ENDS = [(rank, "step.forward@3", action) for action in ("kill", "hang", "stop") for rank in (0, 1)]
ENDS += [(1, "step.before_optimizer@3", "hang"), (0, "checkpoint.before_rename", "hang"), (1, "evaluate.after", "hang")]


@pytest.mark.parametrize(
    ("rank", "point", "action"),
    [x if x == (1, "step.forward@3", "kill") else pytest.param(*x, marks=pytest.mark.full) for x in ENDS],
)
def test_a_rank_that_dies_or_hangs_is_named_and_all_end(configs, tmp_path, rank, point, action):
    started = ranks(configs, tmp_path / "run", *SMALL, "rank_timeout=6", MIXLORA_FAIL=f"{rank}/{point}:{action}")
    other = started[1 - rank].done()
    if action != "hang":
        started[rank].process.kill()
    said = other.stderr
    assert other.returncode not in (None, 0)
    if action == "hang":  # its own watch sees that the job is over
        lost = started[rank].done()
        assert lost.returncode
        said += lost.stderr
        # By the watch, whatever the backend says; within a forward, where copies wait for each other, gloo says it.
        assert "has not gone on for 6 s" in said or point == "step.forward@3"
    assert f"mixlora: rank {rank}" in said, said
    assert said.count("mixlora: ") == 1
    started[rank].wait()


def test_who_stands_still_is_behind_only_while_others_are_further(monkeypatch):
    watch, clock = Watch(10), [0.0]
    monkeypatch.setattr("mixlora.ranks.time.monotonic", lambda: clock[0])

    def behind(own: int, **others: int) -> dict[int, float]:
        clock[0] += 1
        watch.marks = own
        return watch.behind_for({int(name[1]): json.dumps([0, marks, "here"]) for name, marks in others.items()})

    assert behind(3, r1=3, r2=3) == {}  # at one place, however long
    assert behind(4, r1=3, r2=4) == {1: 0}
    assert behind(4, r1=3, r2=4) == {1: 1}
    assert behind(4, r1=3, r2=5) == {1: 2}  # this rank is behind as well, which the others see
    assert behind(4, r1=4, r2=5) == {1: 0}  # it went on, and is behind anew
    assert behind(5, r1=5, r2=5) == {}
    assert behind(6, r1=5, r2=6) == {1: 0}


def test_a_restarted_job_does_not_hear_what_ended_the_one_before(monkeypatch):
    """torchrun --max-restarts keeps one store for all tries."""
    store = HashStore()
    kept = SimpleNamespace(clone=lambda: store)
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: kept)
    tries = [Watch(10), Watch(10)]
    for watch in tries:
        watch.start()
        watch.stop()
    tries[0].store.set("failed", "1")
    assert tries[0].store.check(["failed"])
    assert not tries[1].store.check(["failed"])


@pytest.mark.full
def test_a_job_that_was_suspended_longer_than_the_timeout_goes_on(configs, tmp_path):
    started = ranks(configs, tmp_path / "run", *SMALL, "rank_timeout=3", "train.max_steps=60")
    until = time.monotonic() + 100
    while not (tmp_path / "run" / "metrics.jsonl").is_file():
        assert time.monotonic() < until
        time.sleep(0.05)
    for rank in reversed(started):  # nodes do not fall asleep in the same moment: the first has heard the second's last
        rank.send(signal.SIGSTOP)
        time.sleep(1)
    time.sleep(10)
    for rank in started:  # nor do they wake
        rank.send(signal.SIGCONT)
        time.sleep(1.5)
    ended([rank.done() for rank in started])


@pytest.mark.full
def test_a_signal_to_one_rank_saves_on_all(configs, tmp_path):
    started = ranks(configs, tmp_path / "run", *SMALL, MIXLORA_FAIL="1/step.forward@3:term")
    done = [rank.done() for rank in started]
    assert [rank.returncode for rank in done] == [128 + signal.SIGTERM] * 2, done
    assert "saved after step 2" in done[0].stderr
    assert (tmp_path / "run" / "checkpoints" / "step-2").is_dir()


@pytest.mark.full
def test_ranks_with_other_data_or_configuration_are_named(configs, tmp_path):
    started = [
        start(configs, tmp_path / "run", *SMALL, f"seed={i}", **environment)
        for i, environment in enumerate(environments(2))
    ]
    done = [rank.done() for rank in started]
    assert [rank.returncode for rank in done] == [2, 2]
    assert "rank 1 has another configuration" in done[0].stderr


def test_a_sweep_inside_a_process_group_is_refused_with_the_right_command(configs, tmp_path):
    done = first_of(ranks(configs, tmp_path / "run", "-m", "method=mole,lora"))
    assert done.returncode == 2
    assert "python -m mixlora.train" in done.stderr
    assert "method=mole,lora" in done.stderr


def test_one_process_trains_plainly_whatever_accelerate_is_set_to():
    """On a GPU it would ask for model and optimizer together, where several processes are set to share a model."""
    model, alone = nn.Linear(2, 2), SimpleNamespace(num_processes=1, distributed_type=DistributedType.FSDP)
    assert distribute(model, alone) is model
    with synchronised(model, alone, last=False):  # no_sync would ask FSDP's model for what a plain one does not have
        pass


# ---- real launchers


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(p.stem for p in (REPOSITORY / "configs" / "distributed").glob("*.yaml")))
def test_accelerate_launch_with_each_config(configs, tmp_path, name):
    file = REPOSITORY / "configs" / "distributed" / f"{name}.yaml"
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)]
    done = launched([*launcher, "--num_processes=2"], configs, tmp_path / "run", *SMALL)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["world_size"], record["sharded"]) == (2, name != "ddp")
    for saved in checkpoint.steps(tmp_path / "run" / "checkpoints"):
        assert checkpoint.read(saved).state["made_with"]["sharded"] == (name != "ddp")


@pytest.mark.full
def test_torchrun(configs, tmp_path):
    done = launched(TORCHRUN, configs, tmp_path / "run", *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Run folder") == 1
    for i, rank in enumerate(("", "0/", "1/")):  # of those that are left torchrun ends each with a signal
        fail = {"MIXLORA_FAIL": f"{rank}step.forward@3:oom"}
        short = launched(TORCHRUN, configs, tmp_path / str(i), *SMALL, **fail)
        assert short.stderr.count("out of memory in step") == 1, short.stderr
        assert "interrupted" not in short.stderr
    mistake = launched(TORCHRUN, configs, tmp_path / "other", *SMALL, "train.learning_rat=1")
    assert mistake.returncode != 0
    assert mistake.stderr.count("Did you mean 'train.learning_rate'") == 1
