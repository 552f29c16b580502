"""Files of a run folder are whole, and one process owns the folder."""

import errno
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixlora import console, records
from mixlora.errors import ConfigError, ResourceError, wrapped
from mixlora.remedies import with_remedies


def test_replaces_in_one_step(tmp_path):
    path = tmp_path / "a" / "x.json"
    records.write_json(path, {"n": 1})
    records.write_json(path, {"n": 2})
    assert records.read_json(path) == {"n": 2}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_differences_are_named_by_dotted_keys():
    a, b = {"x": {"y": 1, "z": 2}, "same": [1]}, {"x": {"y": 3, "z": 2, "new": None}, "same": [1], "more": {"k": 0}}
    assert records.differences(a, b) == {"x.y": (1, 3), "more": (None, {"k": 0})}
    assert records.differences(1, 2, "n.") == {"n": (1, 2)}
    assert records.differences(a, a) == {}


def test_refuses_numbers_that_json_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "m.jsonl"
    records.append_line(path, {"step": 1})
    path.write_text(path.read_text() + '{"step": 2, "lo')
    assert records.read_lines(path) == [{"step": 1}]


def test_a_row_may_hold_what_ends_a_line_elsewhere_and_a_cut_within_a_letter_costs_the_last_row_alone(tmp_path):
    path, rows = tmp_path / "m.jsonl", [{"text": "a\u2028b"}, {"text": "x\x85y\r\x0b"}, {"text": "größe"}]
    records.write_lines(path, rows)
    with open(path, "ab") as file:
        file.write('{"text": "grö'.encode()[:-1])
    assert records.read_lines(path) == rows
    assert records.last_row(path) == rows[-1]


def test_who_only_looks_at_a_lock_does_not_keep_a_run_from_it(tmp_path):
    (tmp_path / ".lock").touch()
    with open(tmp_path / ".lock", "rb") as looks:
        fcntl.flock(looks, fcntl.LOCK_SH)
        threading.Timer(0.3, fcntl.flock, (looks, fcntl.LOCK_UN)).start()
        with records.owned(tmp_path):
            assert records.in_use(tmp_path)


def test_a_living_owner_is_respected_and_a_dead_one_is_not(tmp_path):
    own = f"import time; from mixlora import records as r; l = r.owned(r.Path({str(tmp_path)!r})); l.__enter__()"
    owner = subprocess.Popen([sys.executable, "-c", f"{own}; print('mine', flush=True); time.sleep(60)"], stdout=-1)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"mine\n"
    lock = tmp_path / ".lock"
    said = rf'locked {lock}: {{"pid": {owner.pid}, "host": "{socket.gethostname()}"'
    with pytest.raises(ConfigError, match=said), records.owned(tmp_path):
        pass
    owner.kill()
    owner.communicate()
    assert lock.exists()
    with records.owned(tmp_path):
        assert records.read_json(lock)["pid"] == os.getpid()
    assert not lock.exists()


@pytest.mark.parametrize("again", [False, True], ids=["removed", "begun anew"])
def test_a_folder_that_was_taken_away_is_written_by_nobody_but_its_new_owner(tmp_path, again):
    folder = tmp_path / "run"
    with records.owned(folder):
        shutil.rmtree(folder)
        if again:
            folder.mkdir()
            (folder / ".lock").touch()
        for write in (records.write_json, records.append_line):
            with pytest.raises(ConfigError, match=r"run was removed, moved or begun anew"):
                write(folder / "x", {"by": "the old"})
    assert [path.name for path in tmp_path.rglob("*")] == (["run", ".lock"] if again else [])


def test_a_job_that_was_requeued_waits_for_the_node_that_it_left(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LOCK_SECONDS", 0.1)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with open(tmp_path / ".lock", "wb") as dying:
        fcntl.flock(dying, fcntl.LOCK_EX)
        threading.Timer(0.5, fcntl.flock, (dying, fcntl.LOCK_UN)).start()
        with records.owned(tmp_path):
            pass


def test_strays_go_but_those_of_an_evaluation_that_may_be_running(tmp_path):
    records.write_json(tmp_path / "a" / "x.json", {"n": 1})
    running = tmp_path / "evaluations" / "b" / ".y.json.here.78.tmp"
    for stray in (tmp_path / "a" / ".x.json.here.77.tmp", running):
        stray.parent.mkdir(parents=True, exist_ok=True)
        stray.write_text("{")
    (tmp_path / ".merged.here.79.tmp").mkdir()
    records.remove_strays(tmp_path)
    assert {p.name for p in tmp_path.rglob("*") if not p.is_dir() or p.name[0] == "."} == {"x.json", running.name}


def test_a_full_disk_says_so(tmp_path):
    with pytest.raises(ResourceError, match="no space left"):
        records.append_line(Path("/dev/full"), {"step": 1})


def test_a_file_system_without_locks_says_so(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(ConfigError, match=r"has no file locks.*Set output_root"), records.owned(tmp_path):
        pass
    with pytest.raises(ConfigError, match="has no file locks"):  # what a sweep asks
        records.in_use(tmp_path)


def test_the_last_row_is_found_without_reading_the_rest(tmp_path):
    path = tmp_path / "m.jsonl"
    assert records.last_row(path) is None
    path.write_text('{"step": 1, "lo')
    assert records.last_row(path) is None
    long = {"load": ["é" * 50_000] * 4}  # longer than what is read first, and cut within a letter
    path.write_text("".join(f'{{"step": {i}}}\n' for i in range(9)), encoding="utf-8")
    records.append_line(path, long)
    path.write_bytes(path.read_bytes() + b'{"step": 10, "lo')
    assert records.last_row(path) == long
    assert records.last_row(path) == records.read_lines(path)[-1]


def fill(path: Path, ends: Exception) -> None:
    with records.whole_folder(path) as partial:
        (partial / "a").write_text("1")
        raise ends


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    for ends in (OSError(errno.ENOSPC, "full"), ValueError("I/O error: No space left on device (os error 28)")):
        with pytest.raises(ResourceError, match="no space left"):
            fill(tmp_path / "to", ends)
        assert list(tmp_path.iterdir()) == []
    with records.whole_folder(tmp_path / "to") as partial:
        (partial / "a").write_text("1")
    assert [path.name for path in tmp_path.rglob("*")] == ["to", "a"]
    with (
        pytest.raises(ConfigError, match="to/a is a file, not a folder"),
        records.whole_folder(tmp_path / "to" / "a" / "b"),
    ):
        pass
    empty = tmp_path / "empty"  # stays itself: it may be another disk
    empty.mkdir()
    (tmp_path / "link").symlink_to(empty)
    number = empty.stat().st_ino
    with records.whole_folder(tmp_path / "link") as partial:
        (partial / "a").write_text("1")
    assert ([path.name for path in empty.iterdir()], empty.stat().st_ino) == (["a"], number)
    with pytest.raises(ConfigError, match="to/a is a file, not a folder"):
        records.write_text(tmp_path / "to" / "a" / "b", "1")


def test_a_folder_is_on_disk_before_it_is_named_and_what_makes_it_whole_comes_last(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted(handle: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def noted_replace(source: Path, target: Path) -> None:
        done.append(f"to {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", noted_replace)
    for there in (False, True):
        done.clear()
        to = tmp_path / str(there)
        if there:
            to.mkdir()
        with records.whole_folder(to, last="config.json") as partial:
            for name in ("a", "config.json", "z"):
                (partial / name).write_text("1")
        assert {"a", "config.json", "z", partial.name} == {*done[:4]}
        assert done[-2:] == (["to config.json", "True"] if there else ["to False", tmp_path.name])


def test_a_file_that_is_elsewhere_is_named_and_not_the_run_folder(tmp_path):
    def said(number: int, file: str | None) -> str:
        return str(records.disk_error(tmp_path / "runs" / "a", OSError(number, os.strerror(number), file)))

    assert (
        said(errno.EACCES, "/data/step-5/state.json")
        == "/data/step-5/state.json cannot be read or written (permission denied)"
    )
    assert said(errno.ENOSPC, "/dev/shm/x").startswith(
        "no space left to write /dev/shm/x. Free some, or set TMPDIR or HF_HOME"
    )
    for file in (None, str(tmp_path), str(tmp_path / "runs" / "a" / "b")):
        assert "Set output_root" in said(errno.EACCES, file)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ECONNRESET])
def test_an_error_that_has_no_remedy_here_is_raised_as_it_is_and_ends(tmp_path, number):
    """Raised from itself it was its own cause, which the doors followed for ever."""
    error = OSError(number, os.strerror(number))
    with pytest.raises((ResourceError, OSError)) as found, with_remedies(tmp_path):
        raise error
    assert (found.value is error) == (number == errno.ECONNRESET)
    assert found.value.__cause__ is (None if found.value is error else error)
    error.__cause__ = error
    assert wrapped(error, KeyboardInterrupt) is None
    assert wrapped(error, OSError) is error


def test_the_time_that_is_left_is_of_the_steps_that_were_made_here(monkeypatch, capsys):
    now = iter([100.0, 110.0, 110.0])
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(console.console, "quiet", False)
    with console.bar("train", 1000, 900) as shown:
        shown.advance(1, "")
    assert "train 901/1000    10 s, 990 s left" in capsys.readouterr().out
