"""What libraries say of a process that is gone, and of one that has a fault of its own."""

import pytest
import torch

from mixlora import ranks
from mixlora.errors import ConfigError
from mixlora.models import base
from mixlora.parts import require_usable

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
        RuntimeError(NCCL.format("unhandled cuda error", "ncclUnhandledCudaError", "Cuda failure 2 'out of memory'")),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:50],
)
def test_memory_that_is_out_is_known_however_it_is_said(error):
    assert ranks.is_out_of_memory(error)


def test_other_errors_are_not_of_memory():
    assert not ranks.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not ranks.is_out_of_memory(ValueError("out of memory"))


def test_a_gpu_that_cannot_be_used_is_said_and_refused_beside_other_processes(monkeypatch, capsys):
    monkeypatch.setattr(base, "unusable_gpu", lambda: False)
    require_usable(8)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(base, "unusable_gpu", lambda: True)
    require_usable(1)
    assert "It computes on the CPU" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES= to compute on CPUs"):
        require_usable(8)
