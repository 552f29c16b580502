"""A split from the Hugging Face hub, or from its cache; what cannot be reached is said within ten seconds."""

from mixlora import online
from mixlora.config.schema import Task
from mixlora.errors import DataError, wrapped
from mixlora.tasks.table import MissingSplit, Table, table_of


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
    if problem := online.problem():
        raise DataError(remedy(task, problem))


def remedy(task: Task, reason: str) -> str:
    lines = [
        f"task {task.name}: {task.path} ({task.config}) cannot be loaded from the hub: {reason}",
        "What works without it:",
        "  data.source=sample             the project's own sample rows",
        f"  data.source=/path/to/folder    a folder that holds {task.path}/{task.config}/<split>.parquet",
        "  HF_HUB_OFFLINE=1               in the environment, where the set has been downloaded before",
    ]
    return "\n".join(lines[:-1] if online.offline() else lines)
