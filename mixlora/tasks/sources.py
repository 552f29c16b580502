"""Where the rows of a split come from: the hub, the embedded sample, a folder laid out like the hub, or own files.

A folder laid out like the hub holds `<owner>/<name>/<config>/<split>.parquet` and may hold `manifest.json`:
`{"<owner>/<name>": {"configs": {"<config>": {"<split>": {"complete", "hub_rows", "sha256"}}}}}`.
Files are read one by one, never by `load_dataset(folder)`, whose cache does not see that a file has changed.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixlora.config.schema import Task
from mixlora.errors import DataError
from mixlora.tasks import hub, own
from mixlora.tasks.table import MissingSplit, Table, read_parquet, table_of


def read(task: Task, source: str, split: str) -> Table:
    """The rows that play the part of `split` (train, validation or test) in `task`.

    Raises:
        MissingSplit: the source has this set without that split.
        DataError: anything else that is not there, cannot be reached or cannot be read, with the remedy.
    """
    name = getattr(task.splits, split)
    if name is None:
        raise MissingSplit(f"task {task.name} has no {split} split: its splits.{split} is null")
    if own.is_own(task):
        return own.read(task, name)
    if source == "hub":
        return hub.read(task, name)
    return from_sample(task, name) if source == "sample" else from_folder(task, Path(source), name)


def require(tasks: Iterable[Task], source: str) -> None:
    """Say that a whole source is not there before anything else is done.

    Raises:
        DataError: the hub cannot be reached, or the folder or a user's own file or folder does not exist.
    """
    for task in tasks:
        if own.is_own(task):
            own.require(task)
        elif source == "sample":
            continue
        elif source == "hub":
            hub.require(task)
        elif not Path(source).is_dir():
            raise absent(task, Path(source), Path(source))


def from_sample(task: Task, split: str) -> Table:
    """Rows that the project brings along. They are not the data set, so they never count as complete."""
    from mixlora.tasks import sample

    rows = sample.rows(task.path, task.config, split)
    if not rows:
        raise MissingSplit(f"The embedded sample of {task.path} {task.config} has no split '{split}'")
    return table_of(rows, f"{task.path} {task.config} {split} of the embedded sample", complete=False)


def from_folder(task: Task, root: Path, split: str) -> Table:
    """A split of a folder laid out like the hub."""
    path = root / task.path / task.config / f"{split}.parquet"
    if not path.is_file():
        raise absent(task, root, path)
    table = read_parquet(path, task)
    stated = manifest(root).get(task.path, {}).get("configs", {}).get(task.config, {}).get(split, {})
    hub_rows = stated.get("hub_rows")
    notes = []
    if not (complete := bool(stated.get("complete", True))):
        of = f" of {hub_rows:,}" if hub_rows else ""
        notes.append(f"{split} has {len(table.rows):,}{of} rows of {task.path} {task.config}: it is not complete")
    if stated.get("sha256", table.sha256) != table.sha256:
        notes.append(f"{path} is not the file that {root / 'manifest.json'} describes: their sha256 differ")
    return replace(table, complete=complete, hub_rows=hub_rows, notes=tuple(notes))


def absent(task: Task, root: Path, path: Path) -> DataError:
    """Why a file of a folder is not there, from the outermost folder that is missing inwards."""
    looked = f"task {task.name}: there is no {path}"
    if not root.is_dir():
        near = "It is a file" if root.exists() else "There is no such folder"
        return DataError(f"data.source={root}: {near}. Give a folder laid out like the hub, data.source=sample or hub")
    if not path.parent.parent.is_dir():
        sets = sorted(f"{p.parent.name}/{p.name}" for p in root.glob("*/*") if p.is_dir())
        nearest = difflib.get_close_matches(task.path, sets, n=1)
        hint = f"Did you mean {nearest[0]}? " if nearest else ""
        listed = ", ".join(sets[:8]) + (", ..." if len(sets) > 8 else "") or "nothing"
        return DataError(f"{looked}. {hint}{root} holds {listed}. Use data.source=sample, or add the file")
    if not path.parent.is_dir():
        configs = sorted(p.name for p in path.parent.parent.iterdir() if p.is_dir())
        return DataError(f"{looked}. {path.parent.parent} holds the configs {', '.join(configs) or 'none'}")
    files = sorted(p.name for p in path.parent.iterdir())
    return MissingSplit(f"{looked}. {path.parent} holds {', '.join(files) or 'nothing'}")


def manifest(root: Path) -> Mapping[str, Any]:
    """What manifest.json says of each set; nothing where there is none."""
    path = root / "manifest.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}. Mend it, or take it away") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no mapping from data sets to what is known of them. Mend it, or take it away")
    return found
