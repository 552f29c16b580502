"""Rows with their origin: what every source gives and what the parser reads."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixlora.config.schema import Task
from mixlora.errors import DataError
from mixlora.tasks.template import columns

SUFFIXES = (".parquet", ".jsonl", ".csv")


class MissingSplit(DataError):
    """The set is there, this split of it is not."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows as they came, and where they came from."""

    rows: Sequence[Mapping[str, Any]]
    sha256: str  # of the file, or of the rows where there is no one file
    columns: frozenset[str]  # all that the source has; rows may hold only those that the task reads
    origin: str  # what a message calls it: a file, or "google/boolq default train on the hub"
    complete: bool = True
    hub_rows: int | None = None
    numbers: Sequence[int] = field(default=())  # the place of each row in its file, from 0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.numbers:
            object.__setattr__(self, "numbers", range(len(self.rows)))


def table_of(rows: list[dict[str, Any]], origin: str, *, complete: bool = True, hub_rows: int | None = None) -> Table:
    """A table of rows that come from no one file: their digest is of their JSON."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    names = frozenset(name for row in rows for name in row)
    return Table(
        rows=rows, sha256=digest.hexdigest(), columns=names, origin=origin, complete=complete, hub_rows=hub_rows
    )


def read_parquet(path: Path, task: Task | None = None) -> Table:
    """A parquet file, only the columns that `task` reads; a program's task keeps them all, its sandbox may need any."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    digest = file_sha256(path)
    try:
        names = pq.read_schema(path).names
        wanted = {p if p in names else p.split(".")[0] for p in columns(task)} if task and not task.tests else names
        found = pq.read_table(path, columns=[name for name in names if name in wanted])
        rows = found.to_pylist()
    except UnicodeDecodeError as error:
        row, name = first_undecodable(found)
        raise DataError(f"{path}, row {row}, field '{name}': is not UTF-8 ({error.reason}). Mend the file") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} cannot be read as parquet: {reason} Copy it again from where it came") from None
    return Table(rows=rows, sha256=digest, columns=frozenset(names), origin=str(path))


def first_undecodable(table: Any) -> tuple[int, str]:
    """(row, column) of the first value of an Arrow table that is no UTF-8."""
    for row in range(table.num_rows):
        for name in table.column_names:
            try:
                table.column(name)[row].as_py()
            except UnicodeDecodeError:
                return row, name
    raise AssertionError("every value can be decoded")


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()
