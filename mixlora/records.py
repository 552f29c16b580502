"""Files of a run folder: written whole or not at all, so nobody ever reads half a result.

JSON is written beside its name, synced and renamed. One process at a time owns a folder.
"""

import contextlib
import errno
import fcntl
import gzip
import io
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

from mixlora.errors import ConfigError, ResourceError
from mixlora.failpoints import reach

# A folder that is not there, or in which nothing may be made.
NO_PLACE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
FAILING = (errno.EIO, errno.ESTALE)  # a network's disk that was gone for a moment says so too
LOCK_SECONDS = 1.0  # that a lock is tried for
REQUEUED_SECONDS = 60.0  # the same in a requeued job: the node that it left may still be ending its processes
OWN: dict[Path, TextIO] = {}  # folders that this process owns, with their open lock files


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step.

    Raises:
        ConfigError: it lies in a folder that this process owned, and does no more.
    """
    partial = partial_of(path)
    try:
        require_own(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data)
            reach("write")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        raise disk_error(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """Where `path` is written before it gets its name: two machines may write to one disk."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


@contextlib.contextmanager
def whole_folder(path: Path, *, last: str = "") -> Iterator[Path]:
    """A folder to write into that becomes `path` (empty, or not there) once all is written; else nothing is left.

    Args:
        last: the file without which nobody takes the folder for whole. An empty `path` is filled file by file.
    """
    path = path.resolve()
    there = path.is_dir()  # it may be another disk, or the one folder here that may be written to: it stays itself
    partial = partial_of(path / path.name if there else path)
    try:
        partial.mkdir(parents=True)
        yield partial
        for part in (*partial.rglob("*"), partial):
            sync(part)
        if there:
            for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == last):
                os.replace(entry, path / entry.name)
        else:
            os.replace(partial, path)
        sync(path if there else path.parent)
    except OSError as error:
        raise disk_error(path, error) from None
    except Exception as error:
        if "No space left on device" in str(error):  # safetensors has an error of its own
            raise disk_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """A file's content, or a folder's names, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_error(path: Path, error: OSError) -> Exception:
    """The error to raise instead: a full disk, one that fails and a folder one may not write to have remedies of their
    own. The same error where there is none.

    Args:
        path: what was being written, where the error does not say that it is about something else.
    """
    what = str(error.strerror).lower()
    elsewhere = isinstance(error.filename, str) and not related(Path(error.filename), path.parent)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        if elsewhere:
            return ResourceError(
                f"no space left to write {error.filename}. Free some, or set TMPDIR or HF_HOME to another disk"
            )
        return ResourceError(f"no space left to write {path}. Free some, or set output_root (or `to`) to another disk")
    if error.errno in NO_PLACE:
        if elsewhere:
            return ConfigError(f"{error.filename} cannot be read or written ({what})")
        # Where a file stands in a folder's place, the path may name the folder or what should lie in it.
        file = next((part for part in (path, *path.parents) if part.is_file()), None)
        blocked = error.errno in (errno.ENOTDIR, errno.EEXIST) and file is not None
        why = f"{file} is a file, not a folder" if blocked else f"{path.parent} cannot be written to ({what})"
        return ConfigError(f"{why}. Set output_root or run_dir (or `to`) to a folder of yours")
    if error.errno in FAILING:
        return ResourceError(
            f"{error.filename or path} cannot be read or written ({what}): its disk fails or does not answer. Go on by "
            "the same command when it does"
        )
    return error


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise what `disk_error` says in place of an error of the disk; one that it knows nothing of goes on as it is."""
    try:
        yield
    except OSError as error:
        found = disk_error(path, error)
        if found is error:  # raised from itself it would be its own cause
            raise
        raise found from error


def require_place(folder: Path) -> None:
    """Say that a folder cannot be made, or not be written to, before there is anything to write.

    Raises:
        ConfigError: as writing would; what only shows in writing, a quota say, is raised then.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    number = errno.ENOTDIR if not there.is_dir() else errno.EACCES if not os.access(there, os.W_OK | os.X_OK) else 0
    if number:
        raise disk_error(folder / "run.json", OSError(number, os.strerror(number)))


def related(one: Path, other: Path) -> bool:
    """Whether one of them holds the other."""
    a, b = (Path(os.path.abspath(path)) for path in (one, other))
    return a.is_relative_to(b) or b.is_relative_to(a)


def log_path(run_folder: Path) -> Path:
    """Where a launcher keeps what a run printed."""
    return run_folder.parent / "logs" / f"{run_folder.name}.log"


def attempt_path(run_folder: Path) -> Path:
    """Where a launcher keeps how a failed run ended."""
    return log_path(run_folder).with_suffix(".json")


def finished(run_folder: Path) -> bool:
    """Whether the run in this folder has come to its end."""
    record = run_folder / "run.json"
    return record.is_file() and read_json(record).get("status") == "finished"


def finished_as(run_folder: Path, config_sha256: str, world_size: int) -> bool:
    """Whether the run of this configuration, on so many processes, has come to its end.

    Raises:
        ConfigError: another configuration's has, in this folder, or that of other processes, whose batches are others;
            or the folder cannot be read.
    """
    try:
        if not finished(run_folder):
            return False
        record = read_json(run_folder / "run.json")
    except OSError as error:
        what = str(error.strerror).lower()
        raise ConfigError(
            f"{run_folder} cannot be read ({what}). Set output_root or run_dir to a folder of yours"
        ) from None
    if record.get("config_sha256") != config_sha256:
        raise ConfigError(f"{run_folder} holds a finished run of another configuration. Set run_dir to a new folder")
    before = record.get("world_size", world_size)
    if before != world_size:
        raise ConfigError(
            f"{run_folder} was finished by {before} process(es) and would now be run by {world_size}, on other "
            "batches. Start it as before, or set output_root or run_dir to a new folder"
        )
    return True


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_packed(path: Path, text: str) -> None:
    """Write `path`.gz, without the clock that gzip puts in by itself: the same text gives the same bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, filename="") as file:
        file.write(text.encode())
    write_bytes(packed(path), buffer.getvalue())


def packed(path: Path) -> Path:
    return path.with_name(path.name + ".gz")


def is_there(path: Path) -> bool:
    """As it is, or packed as `path`.gz."""
    return path.is_file() or packed(path).is_file()


def read_bytes(path: Path) -> bytes:
    return gzip.decompress(packed(path).read_bytes()) if packed(path).is_file() else path.read_bytes()


def read_text(path: Path) -> str:
    return read_bytes(path).decode()


def read_json(path: Path) -> Any:
    return json.loads(read_text(path))


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_lines(path: Path) -> list[Any]:
    """The rows of a JSONL file; a last line that a crash cut short is left out."""
    if not is_there(path):
        return []
    rows = []
    # Of bytes: a text may hold what else ends a line (U+2028), and a line may be cut within a letter.
    for line in read_bytes(path).split(b"\n"):
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def last_row(path: Path) -> Any | None:
    """The last whole row of a JSONL file, however long the file is; None where there is none."""
    if not path.is_file():
        return None
    size, wanted = path.stat().st_size, 2**16
    with open(path, "rb") as file:
        while True:
            start = max(0, size - wanted)
            file.seek(start)
            lines = file.read(size - start).splitlines()
            for line in reversed(lines if start == 0 else lines[1:]):
                with contextlib.suppress(ValueError):
                    return json.loads(line)
            if start == 0:
                return None
            wanted *= 8


def differences(a: Any, b: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys at which two nested mappings differ, with both values; None for a key that is not there.

    Two values that are no mappings differ at the key of `prefix`, by itself "".
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = [*a, *(key for key in b if key not in a)]
        return {d: pair for k in keys for d, pair in differences(a.get(k), b.get(k), f"{prefix}{k}.").items()}
    return {} if a == b else {prefix.rstrip("."): (a, b)}


def append_line(path: Path, row: Any) -> None:
    try:
        require_own(path)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise disk_error(path, error) from None


def sync_file(path: Path) -> None:
    """What was appended is on disk before anything relies on it."""
    if path.is_file():
        sync(path)


def remove_strays(folder: Path) -> None:
    """Remove what killed processes left beside the files that they were writing."""
    for stray in folder.rglob(".*.tmp"):
        if "evaluations" in stray.relative_to(folder).parts:  # of processes that own folders there
            continue
        if stray.is_dir():
            shutil.rmtree(stray, ignore_errors=True)
        else:
            stray.unlink(missing_ok=True)


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own `folder` while the block runs. The system lets go of the lock of a process that is gone, however it went.

    Raises:
        ConfigError: another process owns it.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = locked(path)
    except OSError as error:
        raise disk_error(path, error) from None
    OWN[folder] = lock
    try:
        lock.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        lock.flush()
        yield
    finally:
        del OWN[folder]
        if is_open_as(lock, path):
            path.unlink(missing_ok=True)
        lock.close()


def require_own(path: Path) -> None:
    """Refuse to write into a folder that was taken away under its owner: another process may have begun it anew.

    Raises:
        ConfigError: naming the folder.
    """
    for folder, lock in [*OWN.items()]:  # another thread may be letting go of one
        if path.is_relative_to(folder) and not is_open_as(lock, folder / ".lock"):
            raise ConfigError(
                f"{folder} was removed, moved or begun anew while this process was at work in it: nothing more is "
                "written there. Start the command again, with run_dir set to another folder where it is in use"
            )


def is_open_as(file: IO[Any], path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def in_use(folder: Path) -> bool:
    """Whether a living process owns `folder`."""
    try:
        with open(folder / ".lock", "rb") as lock:
            lock_or_say(lock, fcntl.LOCK_SH, folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except BlockingIOError:
        return True
    return False


def lock_or_say(lock: IO[Any], kind: int, folder: Path) -> None:
    """Lock an open file at once, or not at all.

    Raises:
        BlockingIOError: another process has it.
        ConfigError: the disk of `folder` knows no locks.
    """
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        why = f"the file system of {folder} has no file locks, which keep two runs out of one folder"
        remedy = "Set output_root to another disk, or mount this one with locks (Lustre: -o flock)"
        raise ConfigError(f"{why}. {remedy}") from None


def locked(path: Path) -> TextIO:
    """The lock file, open and locked. Somebody who only looks has it for a moment, so it is tried for a while."""
    until = time.monotonic() + (REQUEUED_SECONDS if "SLURM_RESTART_COUNT" in os.environ else LOCK_SECONDS)
    while True:
        lock = open(path, "a+", encoding="utf-8")  # noqa: SIM115  closing it lets go of the lock
        try:
            lock_or_say(lock, fcntl.LOCK_EX, path.parent)
        except BlockingIOError:
            if time.monotonic() < until:
                lock.close()
                time.sleep(LOCK_SECONDS / 20)
                continue
            lock.seek(0)
            owner = lock.read().strip()
            lock.close()
            raise ConfigError(
                f"{path.parent} is in use by another run, which has locked {path}: {owner}. Wait for it, or set "
                "run_dir to another folder"
            ) from None
        if is_open_as(lock, path):
            lock.truncate(0)
            return lock
        lock.close()  # its owner finished and took the file away between our two calls


def of_mean(results: Mapping[str, Mapping[str, Any]]) -> tuple[str, list[str]]:
    """What a mean over scored tasks is called, and the tasks: those that were trained on, or all where none was."""
    scored = [name for name, result in results.items() if result.get("value") is not None]
    trained = [name for name in scored if results[name].get("trained", True)]
    return ("mean of trained", trained) if trained else ("mean", scored)


def by_metric(metrics: Mapping[str, str]) -> str:
    """Names and what each is scored by: `acc (boolq, siqa), acc_norm (piqa)`, or the one metric of all."""
    of = {metric: [name for name, own in metrics.items() if own == metric] for metric in metrics.values()}
    return ", ".join(of) if len(of) < 2 else ", ".join(f"{metric} ({', '.join(names)})" for metric, names in of.items())


def caveats(result: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """What else to know of a task's score: what it is of, how many, of how many; none that is of nothing."""
    n, cut, protocol = result["n"], result.get("cut") or {}, result.get("protocol", {})
    tokens, replies = protocol.get("max_new_tokens"), n * protocol.get("num_samples", 1)
    found = {
        "prompts were too long and lost shots or their beginning": (cut.get("prompts", 0), n),
        f"answers had no end within {tokens} tokens (max_new_tokens of the task)": (cut.get("replies", 0), replies),
        "answers name no option and count as wrong": (round(n * (1 - result.get("metrics", {}).get("parsed", 1))), n),
        "rows were also trained on": (result.get("also_trained_on") or 0, n),
    }
    return {what: counts for what, counts in found.items() if counts[0]}


def error_of_mean(errors: Sequence[float | None]) -> float | None:
    """Standard error of a mean over tasks; None where one of them has none, for it is of a single row."""
    known = [error for error in errors if error is not None]
    return sum(error**2 for error in known) ** 0.5 / len(errors) if len(known) == len(errors) else None
