"""A user's own files as a data set.

    path: questions.jsonl                          path: my_folder
    splits: {train: "[:90%]", test: "[90%:]"}      splits: {train: train.jsonl, test: test.csv}

With one file, a split is a slice of its rows in the order of the file, or a value of its column `split`; `all` is
every row. With a folder, a split is the name of a file in it. Relative paths count from the working directory, whatever
data.source says.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixlora.config.schema import Task
from mixlora.errors import DataError
from mixlora.tasks.table import SUFFIXES, MissingSplit, Table, file_sha256, read_parquet

SLICE = re.compile(r"\[(\d+%?)?:(\d+%?)?\]")


def is_own(task: Task) -> bool:
    """Whether the task names files and no hub id. A file of a kind that cannot be read is one as well."""
    named = [task.path, task.splits.train, task.splits.validation, task.splits.test]
    return any(name is not None and name.endswith(SUFFIXES) for name in named) or Path(task.path).expanduser().is_file()


def read(task: Task, split: str) -> Table:
    """The rows of one split.

    Raises:
        MissingSplit: the file is not there.
        DataError: it cannot be read, or has no such part.
    """
    require(task)
    path = Path(task.path).expanduser()
    if task.path.endswith(SUFFIXES):
        table = read_file(path, task)
        return replace(part(table, split, task), origin=f"{path} {split}")
    return read_file(path / split, task)


def require(task: Task) -> None:
    """Raise a DataError where the file or the folder of `path` is not there, or the file of another kind."""
    path = Path(task.path).expanduser()
    if not path.exists():
        raise absent(path, task)
    if path.is_file() and not path.name.endswith(SUFFIXES):
        raise DataError(f"task {task.name}: {path} is none of {', '.join(SUFFIXES)}. Save its rows as one of them")


def absent(path: Path, task: Task) -> DataError:
    folder = path.parent
    there = sorted(p.name for p in folder.iterdir() if p.name.endswith(SUFFIXES)) if folder.is_dir() else []
    holds = f"{folder} holds {', '.join(there) or 'no data file'}" if folder.is_dir() else f"there is no {folder}"
    return DataError(f"task {task.name}: there is no {path}; {holds}. Mend path or splits of the task")


def read_file(path: Path, task: Task) -> Table:
    if not path.is_file():
        raise absent(path, task)
    if path.name.endswith(".parquet"):
        return read_parquet(path)
    digest = file_sha256(path)
    try:
        rows = read_jsonl(path) if path.name.endswith(".jsonl") else read_csv(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8") from None
    names = frozenset(name for row in rows for name in row)
    return Table(rows=rows, sha256=digest, columns=names, origin=str(path))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: no JSON ({error}). One object a line is expected") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: holds a {type(row).__name__}, one object a line is expected")
            rows.append(row)
    return rows


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Every value is a text; a short row lacks its last columns."""
    csv.field_size_limit(1 << 30)  # of Python's reader, which by itself stops at 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            names = reader.fieldnames or ()
            rows = [{k: v for k, v in row.items() if v is not None} for row in reader]
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: no CSV ({error})") from None
    twice = [name for name, number in Counter(names).items() if name and number > 1]
    if twice:
        raise DataError(f"{path}: its first line names {', '.join(map(repr, twice))} twice. Rename one of the columns")
    long = next((i for i, row in enumerate(rows) if None in row), None)  # the key of what has no name
    if long is not None:
        raise DataError(f"{path}, row {long} has more values than the first line has names. Quote texts with commas")
    return rows


def part(table: Table, split: str, task: Task) -> Table:
    """The rows of one file that make up `split`."""
    size = len(table.rows)
    if split == "all":
        return table
    if found := SLICE.fullmatch(split):
        start, end = bound(found[1], size, 0), bound(found[2], size, size)
        chosen: Sequence[int] = range(start, max(start, end))
    elif "split" in table.columns:
        chosen = [i for i, row in enumerate(table.rows) if row.get("split") == split]
    else:
        raise MissingSplit(
            f"task {task.name}: which rows of {task.path} are '{split}'? Write a slice, such as "
            'splits: {train: "[:90%]", test: "[90%:]"}, or "all", or give the file a column split'
        )
    if not chosen:
        raise MissingSplit(f"task {task.name}: {task.path} has {size} rows, none of them in '{split}'")
    return replace(table, rows=[table.rows[i] for i in chosen], numbers=chosen)


def bound(text: str | None, size: int, default: int) -> int:
    if text is None:
        return default
    return min(size, size * int(text[:-1]) // 100 if text.endswith("%") else int(text))
