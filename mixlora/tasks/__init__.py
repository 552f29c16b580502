"""Stop-gap loader (parquet folders only)."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from mixlora.tasks.example import Example


@dataclass
class TaskData:
    name: str
    task: object
    train: list
    validation: list
    test: list
    fingerprints: dict
    complete: bool = True
    notes: list = field(default_factory=list)


def get(row, path):
    for p in path.split("."):
        row = row[p]
    return row


def load(mixture, data, seed):
    return {n: one(n, t, Path(data.source)) for n, t in mixture.mixture.items()}


def one(name, task, root):
    out, prints, notes = {}, {}, []
    for split in ("train", "validation", "test"):
        s = getattr(task.splits, split)
        path = root / task.path / task.config / f"{s}.parquet"
        if s is None or not path.is_file():
            out[split] = []
            if s is not None:
                notes.append(f"{name}: no {split} rows")
            continue
        prints[split] = hashlib.sha256(path.read_bytes()).hexdigest()
        out[split] = [example(name, task, split, i, r) for i, r in enumerate(pq.read_table(path).to_pylist())]
    return TaskData(name, task, out["train"], out["validation"], out["test"], prints, True, notes)


def example(name, task, split, i, row):
    o = task.options
    if o.fixed:
        texts, values = o.fixed, task.answer_values
    elif o.columns:
        texts, values = [row[c] for c in o.columns], task.answer_values
    else:
        texts = get(row, o.field)
        values = get(row, o.labels) if o.labels else task.answer_values
    gold = list(values).index(row[task.answer])
    q = task.question.format(**row)
    return Example(id=f"{name}/{split}/{i}", task=name, question=q, answer=texts[gold], options=tuple(texts), gold=gold)
