"""A checkpoint is whole or it is not one."""

import pytest
import torch

from mixlora.errors import CheckpointError
from mixlora.training import checkpoint
from mixlora.training.checkpoint import Checkpoint


def made(step: int) -> Checkpoint:
    tensors = {"a": torch.arange(6.0).view(2, 3) + step, "b": torch.ones(3)}
    return Checkpoint(step, tensors, {"a|exp_avg": torch.zeros(2, 3)}, {"totals": {"tokens": step}})


def test_reads_back_what_was_written(tmp_path):
    path = checkpoint.save(tmp_path, made(3), keep=2)
    again = checkpoint.read(path)
    assert again.step == 3
    assert again.state == {"totals": {"tokens": 3}}
    assert torch.equal(again.adapter["a"], made(3).adapter["a"])


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10):
        checkpoint.save(tmp_path, made(step), keep=2)
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step-3", "step-10"]


def test_any_changed_byte_is_found(tmp_path):
    path = checkpoint.save(tmp_path, made(1), keep=2)
    generator = torch.Generator().manual_seed(0)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for _ in range(25):
            at = int(torch.randint(len(whole), (), generator=generator))
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert checkpoint.damage(path), f"{file.name} byte {at}"
        file.write_bytes(whole)
    assert checkpoint.damage(path) is None


@pytest.mark.parametrize("harm", ["truncate", "remove", "empty", "swap"])
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path, harm):
    checkpoint.save(tmp_path, made(1), keep=3)
    path = checkpoint.save(tmp_path, made(2), keep=3)
    file = path / "adapter.safetensors"
    {
        "truncate": lambda: file.write_bytes(file.read_bytes()[:-1]),
        "remove": file.unlink,
        "empty": lambda: file.write_bytes(b""),
        "swap": lambda: file.write_bytes((tmp_path / "step-1" / file.name).read_bytes()),
    }[harm]()
    found, wrong = checkpoint.newest(tmp_path)
    assert found == tmp_path / "step-1"
    assert "step-2/adapter.safetensors" in wrong[0]
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors"):
        checkpoint.read(path)


def test_a_half_written_folder_is_never_a_checkpoint_and_goes(tmp_path):
    checkpoint.save(tmp_path, made(1), keep=2)
    stray = tmp_path / "step-2.tmp-999"
    stray.mkdir()
    (stray / "adapter.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "step-1"
    checkpoint.save(tmp_path, made(3), keep=2)
    assert not stray.exists()


def test_a_write_that_fails_leaves_the_old_ones(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, made(1), keep=2)

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_bytes", full)
    with pytest.raises(OSError, match="space"):
        checkpoint.save(tmp_path, made(2), keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    assert checkpoint.damage(tmp_path / "step-1") is None
