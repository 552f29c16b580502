"""What libraries say of a process that is gone, and of one that has a fault of its own."""

import pickle

import pytest
import torch
from hydra import compose, initialize_config_dir

from mixlora import parts, ranks, tasks
from mixlora.config.load import config_of
from mixlora.config.overrides import config_dir
from mixlora.config.schema import Config, Data
from mixlora.errors import ConfigError, DataError, Interrupted
from mixlora.models import base

NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3687, {}, NCCL version 2.27.5\n{}\nLast error:\n{}"


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1, OpType=ALLREDUCE)", True),
        ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:17654", True),
        ("Timed out waiting 1815000ms for recv operation to complete", True),
        (NCCL.format("remote process exited or there was a network error", "ncclRemoteError: ...", ""), True),
        (NCCL.format("unhandled cuda error", "ncclUnhandledCudaError", "Cuda failure 2 'out of memory'"), False),
        (NCCL.format("unhandled system error", "ncclSystemError", "Bootstrap : no socket interface found"), False),
        (NCCL.format("invalid usage", "ncclInvalidUsage", "Duplicate GPU detected : rank 1 and rank 0"), False),
        ("CUDA error: the launch timed out and was terminated", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_another_rank_is_lost_where_a_backend_says_so_and_not_where_it_is_this_one(monkeypatch, text, lost):
    monkeypatch.setattr(ranks, "world", lambda: 2)
    assert ranks.is_lost(RuntimeError(text)) is lost
    assert not ranks.is_lost(ValueError(text))
    monkeypatch.setattr(ranks, "world", lambda: 1)
    assert not ranks.is_lost(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError(NCCL.format("unhandled cuda error", "ncclUnhandledCudaError", "Cuda failure 2 'out of memory'")),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:50],
)
def test_memory_that_is_out_is_known_however_it_is_said(error):
    assert ranks.is_out_of_memory(error)


def test_other_errors_are_not_of_memory():
    assert not ranks.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not ranks.is_out_of_memory(ValueError("out of memory"))


def test_what_the_first_rank_does_ends_alike_on_all(monkeypatch):
    def fails() -> None:
        raise DataError("no such set")

    monkeypatch.setattr(ranks, "world", lambda: 2)
    sent = []
    monkeypatch.setattr(ranks, "agree", lambda found: sent.append(pickle.loads(pickle.dumps(found))) or sent[0])
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "rank", lambda number=rank: number)
        with pytest.raises(DataError, match="no such set"):
            ranks.of_first(fails)
    assert sent[1] == [None, None]  # the second did not ask

    def told_to_end() -> None:
        raise Interrupted("by a signal", 15)

    monkeypatch.setattr(ranks, "rank", lambda: 0)
    with pytest.raises(Interrupted):
        ranks.of_first(told_to_end)
    assert len(sent) == 2  # that is not sent: the others hear of it as of any end


@pytest.mark.parametrize(
    ("visible", "opens", "found"),
    [("0,1", True, True), ("GPU-3f", True, True), ("", True, False), ("NoDevFiles", True, False), ("0", False, False)],
)
def test_a_gpu_that_was_not_given_is_not_missed(monkeypatch, visible, opens, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(base, "accelerator", lambda: None)
    monkeypatch.setattr(base.Path, "glob", lambda self, pattern: [base.Path("/dev/nvidia0")])
    monkeypatch.setattr(base, "can_be_opened", lambda path: opens)
    assert base.unusable_gpu() is found


def test_a_gpu_that_cannot_be_used_is_said_and_refused_beside_other_processes(monkeypatch, capsys):
    monkeypatch.setattr(base, "unusable_gpu", lambda: False)
    parts.require_usable(8)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(base, "unusable_gpu", lambda: True)
    parts.require_usable(1)
    assert "It computes on the CPU" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES= to compute on CPUs"):
        parts.require_usable(8)


def test_of_a_hub_one_process_asks_for_all(monkeypatch):
    asked = []
    monkeypatch.setattr(parts.tasks, "load", lambda *arguments: asked.append(arguments) or {"rows": 1})
    monkeypatch.setattr(ranks, "agree", lambda found: found if any(found) else [{"rows": "rank 0's"}, None])
    for world, rank, source, found in ((1, 0, "hub", 1), (2, 0, "hub", 1), (2, 1, "hub", "rank 0's"), (2, 1, "x", 1)):
        monkeypatch.setattr(ranks, "world", lambda number=world: number)
        monkeypatch.setattr(ranks, "rank", lambda number=rank: number)
        assert parts.Parts(Config(data=Data(source=source))).data == {"rows": found}
    assert len(asked) == 3


@pytest.mark.parametrize("name", ["commonsense", "multi"])
def test_rows_can_be_sent_to_other_processes(name):
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = config_of(compose("train", overrides=["method=lora", f"tasks={name}", "data.source=sample"]))
    data = tasks.load(config.tasks, config.data)
    sent = pickle.loads(pickle.dumps(data))
    assert {name: found.test for name, found in sent.items()} == {name: found.test for name, found in data.items()}
