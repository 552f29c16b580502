"""A split from the Hugging Face hub, or from its cache; what cannot be reached is said within ten seconds."""

import functools
import os
import threading
import urllib.error
import urllib.request

from mixlora.config.schema import Task
from mixlora.errors import DataError, wrapped
from mixlora.tasks.table import MissingSplit, Table, table_of

PATIENCE = 6.0  # seconds, name look-up included; with the time to start and to say so it stays below ten


def read(task: Task, split: str) -> Table:
    """One split of `task.path`.

    Raises:
        MissingSplit: the set has no such split.
        DataError: the hub cannot be reached, has no such set, or does not let us read it.
    """
    require(task)
    import datasets

    origin = f"{task.path} {task.config} {split} on the hub"
    try:
        loaded = datasets.load_dataset(task.path, task.config, split=split)
    except Exception as error:
        if own := wrapped(error):
            raise own from None
        # What load_dataset raises has no common base; every one of these means that the rows cannot be had.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "unknown split" in reason.lower():
            raise MissingSplit(f"{origin}: {reason}") from None
        raise DataError(remedy(task, reason)) from None
    # Straight from Arrow: pictures stay bytes and are not decoded.
    return table_of(loaded.data.table.to_pylist(), origin, hub_rows=len(loaded))


def require(task: Task) -> None:
    """Raise a DataError where the hub would be asked and cannot be reached."""
    if not offline() and (problem := unreachable(endpoint(), PATIENCE)):
        raise DataError(remedy(task, f"{endpoint()} cannot be reached ({problem})"))


def remedy(task: Task, reason: str) -> str:
    lines = [
        f"task {task.name}: {task.path} ({task.config}) cannot be loaded from the hub: {reason}",
        "What works without it:",
        "  data.source=sample             the project's own sample rows",
        f"  data.source=/path/to/folder    a folder that holds {task.path}/{task.config}/<split>.parquet",
        "  HF_HUB_OFFLINE=1               in the environment, where the set has been downloaded before",
    ]
    return "\n".join(lines[:-1] if offline() else lines)


def offline() -> bool:
    """Whether the user has told the Hugging Face libraries to use their cache alone."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


@functools.lru_cache
def unreachable(url: str, patience: float) -> str | None:
    """Why `url` gives no answer within `patience` seconds; None where it answers, were it with an error.

    In a thread of its own, because looking a name up knows no time limit. Asked once a process.
    """
    found = ["no answer in time"]

    def probe() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=patience).close()
            found[0] = ""
        except urllib.error.HTTPError:
            found[0] = ""
        except (OSError, ValueError) as error:
            found[0] = str(getattr(error, "reason", error))

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(patience)
    return found[0] or None
