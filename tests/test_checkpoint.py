"""A checkpoint is whole or it is not one."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from mixlora.errors import CheckpointError, ConfigError
from mixlora.records import owned, partial_of
from mixlora.training import checkpoint
from mixlora.training.checkpoint import Checkpoint


def made(step: int, best: int = 0) -> Checkpoint:
    tensors = {"a": torch.arange(6.0).view(2, 3) + step, "b": torch.ones(3)}
    return Checkpoint(step, tensors, {"a|exp_avg": torch.zeros(2, 3)}, {"totals": {"tokens": step, "best_step": best}})


def test_reads_back_what_was_written(tmp_path):
    path = checkpoint.save(tmp_path, made(3))
    again = checkpoint.read(path)
    assert again.step == 3
    assert again.state == {"totals": {"tokens": 3, "best_step": 0}}
    assert torch.equal(again.adapter["a"], made(3).adapter["a"])


def test_the_nearest_whole_one_is_named_where_another_path_was_given(tmp_path):
    whole = checkpoint.save(tmp_path / "checkpoints", made(3))
    for given in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "step-99"):
        with pytest.raises(CheckpointError, match=rf"Did you mean {whole}\?"):
            checkpoint.read(given)
    with pytest.raises(CheckpointError, match=r"elsewhere is not there. .*resume=null"):
        checkpoint.read(tmp_path / "elsewhere")


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10):
        checkpoint.save(tmp_path, made(step))
    checkpoint.prune(tmp_path, 2)
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step-3", "step-10"]


def test_any_changed_byte_is_found(tmp_path):
    path = checkpoint.save(tmp_path, made(1))
    generator = torch.Generator().manual_seed(0)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for _ in range(25):
            at = int(torch.randint(len(whole), (), generator=generator))
            bit = 1 << int(torch.randint(8, (), generator=generator))
            file.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            assert checkpoint.damage(path), f"{file.name} byte {at}"
        file.write_bytes(whole)
    assert checkpoint.damage(path) is None


@pytest.mark.parametrize("harm", ["truncate", "remove", "rename", "empty", "swap"])
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path, harm):
    checkpoint.save(tmp_path, made(1))
    path = checkpoint.save(tmp_path, made(2))
    file = path / "adapter.safetensors"
    {
        "truncate": lambda: file.write_bytes(file.read_bytes()[:-1]),
        "remove": file.unlink,
        "rename": lambda: file.rename(file.with_name("adapter_model.safetensors")),
        "empty": lambda: file.write_bytes(b""),
        "swap": lambda: file.write_bytes((tmp_path / "step-1" / file.name).read_bytes()),
    }[harm]()
    found, wrong = checkpoint.newest(tmp_path)
    assert found == tmp_path / "step-1"
    assert "step-2/adapter.safetensors" in wrong[0]
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors"):
        checkpoint.read(path)


def test_a_half_written_folder_is_never_a_checkpoint_and_goes(tmp_path):
    checkpoint.save(tmp_path, made(1))
    stray = tmp_path / "step-2.tmp-999"
    stray.mkdir()
    (stray / "adapter.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "step-1"
    checkpoint.save(tmp_path, made(3))
    assert not stray.exists()


def test_a_write_that_fails_leaves_the_old_ones(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, made(1))

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_bytes", full)
    with pytest.raises(OSError, match="space"):
        checkpoint.save(tmp_path, made(2))
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    assert checkpoint.damage(tmp_path / "step-1") is None


def test_nothing_is_saved_into_a_folder_that_was_taken_away(tmp_path):
    folder = tmp_path / "run"
    with owned(folder):
        shutil.rmtree(folder)
        with pytest.raises(ConfigError, match="removed, moved or begun anew"):
            checkpoint.save(folder / "checkpoints", made(1))
    assert not folder.exists()


def test_what_cannot_be_removed_now_counts_no_more_and_goes_later(tmp_path, monkeypatch):
    """NFS keeps a file that somebody has open under another name, in its folder."""
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, made(step))

    def held(path: Path, ignore_errors: bool = False) -> None:
        (path / "manifest.json").rename(path / ".nfs0001")
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", held)
        checkpoint.prune(tmp_path, 2)
        checkpoint.forget_after(tmp_path, 2)
        assert [p.name for p in checkpoint.steps(tmp_path)] == ["step-2"]
    checkpoint.prune(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-2"]


def test_a_disk_that_lets_nothing_go_does_not_end_a_run(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "checkpoints", made(step))
    checkpoint.save(tmp_path / "best", made(1))

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(source))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refuse)
        checkpoint.prune(tmp_path / "checkpoints", 2)
        checkpoint.prune_best(tmp_path / "best", tmp_path / "checkpoints")
    assert [len(checkpoint.steps(tmp_path / name)) for name in ("checkpoints", "best")] == [3, 1]
    checkpoint.prune(tmp_path / "checkpoints", 2)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-2", "step-3"}


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_one_that_cannot_be_read_is_named_and_the_one_before_is_used_and_none_is_lost(tmp_path, monkeypatch, number):
    for step in (1, 2):
        checkpoint.save(tmp_path, made(step))
    unread, read = {tmp_path / "step-2" / "state.json"}, Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path in unread:
            raise OSError(number, os.strerror(number))  # read() names no file
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    found, wrong = checkpoint.newest(tmp_path)
    assert found == tmp_path / "step-1"
    assert wrong == [f"{tmp_path / 'step-2'} cannot be read ({os.strerror(number).lower()})"]
    unread.add(tmp_path / "step-1" / "manifest.json")
    with pytest.raises(CheckpointError, match=r"step-1 cannot be read \(.*\)\. Make it readable, or remove"):
        checkpoint.require_some(tmp_path)  # before all are forgotten


def test_a_run_that_was_sent_back_knows_it_after_a_move_too(tmp_path):
    asked = checkpoint.save(tmp_path / "run", made(1))
    state = {"resumed_from": checkpoint.marks(asked)}
    later = checkpoint.save(tmp_path / "run", Checkpoint(2, made(2).adapter, {}, state))
    other = checkpoint.save(tmp_path / "other", made(1, best=1))
    assert checkpoint.went_on_from(later, asked)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    asked, later = moved / asked.name, moved / later.name
    assert checkpoint.went_on_from(later, asked)
    assert not checkpoint.went_on_from(later, other)
    shutil.rmtree(asked)  # pruned: it is known by its place
    assert not checkpoint.went_on_from(later, asked)


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"state.json": {}}', "{"])
def test_a_manifest_that_does_not_name_every_file_is_none(tmp_path, text):
    path = checkpoint.save(tmp_path, made(1))
    (path / "manifest.json").write_text(text)
    assert checkpoint.damage(path)
    assert checkpoint.newest(tmp_path)[0] is None


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Each file, then its folder, then the rename, then the folder that holds the new name."""
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def noted_replace(source, target) -> None:
        done.append(("name", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    checkpoint.save(tmp_path / "checkpoints", made(1))
    assert done[-2:] == [("name", "step-1"), ("sync", "checkpoints")]
    assert ("sync", tmp_path.name) in done  # where the folder of checkpoints itself stands
    for name in (*sorted(checkpoint.FILES), "manifest.json"):
        at = done.index(("name", name))
        assert done[at - 1] == ("sync", partial_of(Path(name)).name)
        assert done[at + 1][0] == "sync"
        assert at < len(done) - 2


def test_the_best_adapters_that_a_checkpoint_names_are_kept_and_must_be_whole(tmp_path):
    folder, best = tmp_path / "checkpoints", tmp_path / "best"
    for step in (3, 6, 9):
        checkpoint.save(best, made(step))
    checkpoint.save(folder, made(5, best=3))
    checkpoint.save(folder, made(10, best=9))
    checkpoint.prune_best(best, folder)
    assert [p.name for p in checkpoint.steps(best)] == ["step-3", "step-9"]
    assert checkpoint.newest(folder, best) == (folder / "step-10", [])
    shutil.rmtree(best / "step-9")
    found, wrong = checkpoint.newest(folder, best)
    assert found == folder / "step-5"
    assert "step-10 names a best adapter" in wrong[0]
    assert checkpoint.newest(folder) == (folder / "step-10", [])  # a run that keeps no best does not look for one
    for step in (9, 3):
        shutil.rmtree(best / f"step-{step}", ignore_errors=True)
    with pytest.raises(CheckpointError, match=r"step-10 names a best adapter, and .*Put it back"):
        checkpoint.require_some(folder)
    for path in checkpoint.steps(folder):
        (path / "state.json").write_text("{}")
    checkpoint.require_some(folder)  # none is whole, so none is lost by starting over


def test_another_run_takes_over_the_best_adapter_and_the_metrics(tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    path = checkpoint.save(theirs / "checkpoints", made(5, best=3))
    (theirs / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(CheckpointError, match=r"names a best adapter, and .*step-3 is not there"):
        checkpoint.adopt(path, theirs, ours, with_best=True)
    checkpoint.save(theirs / "best", made(3))
    checkpoint.adopt(path, theirs, ours, with_best=True)
    assert (ours / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert checkpoint.damage(ours / "best" / "step-3") is None
    shutil.copytree(path, tmp_path / "backup" / "deep" / "step-5")
    checkpoint.adopt(tmp_path / "backup" / "deep" / "step-5", tmp_path / "backup", ours, with_best=False)
    assert (ours / "metrics.jsonl").read_text() == '{"step": 1}\n'  # no lines beside a copy: ours are not lost
