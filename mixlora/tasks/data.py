"""Load the tasks of a mixture: which rows are trained on, tuned on and tested on, and what a user must know of them."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

from mixlora.config.schema import Data, Mixture, Overlap, Task
from mixlora.errors import ConfigError, DataError
from mixlora.tasks import overlap, sources
from mixlora.tasks.example import Example
from mixlora.tasks.mixture import seed_of
from mixlora.tasks.parse import check, examples
from mixlora.tasks.table import MissingSplit, Table

HELD_OUT, MOST_HELD_OUT = 0.05, 500
LISTED = 5  # skipped rows that a note names
SPLITS = ("train", "validation", "test")
SCORED = ("validation", "test")
Asked = Mapping[str, Mapping[str, Sequence[Sequence[bytes]]]]  # task -> split -> the keys of each row (see overlap.py)


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """One task with its examples. `notes` are what a user must see; `complete` is False where rows are missing."""

    name: str
    task: Task
    train: Sequence[Example] = ()
    validation: Sequence[Example] = ()
    test: Sequence[Example] = ()
    fingerprints: dict[str, str] = field(default_factory=dict)  # split -> sha256 of what was read
    complete: bool = True
    held_out: int = 0  # rows of the training split that are the validation split
    trained_on: dict[str, list[str]] = field(
        default_factory=dict
    )  # split -> ids of scored rows that are also trained on
    resembling: list[str] = field(default_factory=list)  # ids of test rows with 13 words in a row of a training row
    notes: list[str] = field(default_factory=list)

    @property
    def drawn(self) -> bool:
        """Whether training draws rows of it."""
        return bool(self.train) and self.task.weight != 0


def load(
    tasks: Mixture, data: Data, seed: int = 0, trained: Mapping[str, TaskData] | None = None
) -> dict[str, TaskData]:
    """Read and parse what each task of the mixture needs. Everything that is wrong with the keys is said first.

    A task whose source has no training split is only evaluated, with a note. Validation rows are never trained on.
    The result does not depend on `seed`: runs that differ in it must see the same held-out rows.

    Args:
        trained: the tasks of an earlier run whose model is only scored here. Which of its rows are scored again is then
            said, whatever data.overlap is, for training is over. None: this mixture is trained on.

    Raises:
        ConfigError: a task's keys do not fit together.
        DataError: rows that are not there, cannot be reached, or are bad; with overlap=error, a row both trained on
            and tested on.
    """
    if not tasks.mixture:
        raise ConfigError(f"tasks={tasks.name} is an empty mixture. Give it tasks: tasks/<name>.yaml shows how")
    named = {name: replace(task, name=name) for name, task in tasks.mixture.items()}
    for task in named.values():
        check(task)
    found = {name: load_task(task, data) for name, task in named.items()}
    return against_overlap(found, data.overlap, trained)


def load_task(task: Task, data: Data) -> TaskData:
    """One task's splits, those that it needs."""
    reading = Reading(task, data)
    test = [] if task.train_only else reading.split("test")
    train = [] if task.eval_only else reading.split("train", optional=not task.train_only)
    scored = not task.train_only
    own_validation = scored and task.splits.validation not in (None, task.splits.test)
    validation = reading.split("validation", optional=True) if own_validation else []
    held_out = 0
    if scored and train and not validation:
        train, validation = hold_out(task.name, train)
        held_out = len(validation)
    return TaskData(
        name=task.name,
        task=task,
        train=train,
        validation=validation,
        test=test,
        fingerprints=reading.fingerprints,
        complete=reading.complete,
        held_out=held_out,
        notes=reading.notes,
    )


@dataclass
class Reading:
    """The splits of one task as they are read, and what there is to say about them."""

    task: Task
    data: Data
    fingerprints: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    complete: bool = True

    def split(self, split: str, *, optional: bool = False) -> list[Example]:
        """The examples of a split; none, with a note, where an optional one is missing."""
        try:
            table = sources.read(self.task, self.data.source, split)
        except MissingSplit as error:
            if not optional:
                raise
            if getattr(self.task.splits, split) is not None:
                self.complete = False
                self.notes.append(missing_note(self.task, split, error))
            return []
        return self.parsed(table, split)

    def parsed(self, table: Table, split: str) -> list[Example]:
        found, bad = examples(self.task, table, split, self.data.on_bad_row)
        self.fingerprints[split] = table.sha256
        self.complete &= table.complete
        self.notes += [f"task {self.task.name}: {note}" for note in table.notes]
        if bad:
            listed = "; ".join(map(str, bad[:LISTED])) + ("; ..." if len(bad) > LISTED else "")
            self.notes.append(f"{table.origin}: {len(bad)} of {len(table.rows):,} rows skipped: {listed}")
        return found


def missing_note(task: Task, split: str, error: MissingSplit) -> str:
    what = "it is evaluated but not trained" if split == "train" else "training rows are held out in its place"
    return f"{error}: {what}"


def rows_held_out(number: int) -> int:
    """Of so many training rows."""
    return min(MOST_HELD_OUT, max(1, int(number * HELD_OUT))) if number > 1 else 0


def hold_out(name: str, train: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """(rest, held out): 5 % of the rows, at least one of two and at most 500, the same for every seed. Of rows that
    share a `group` all or none, so there may be one more or some less; larger groups than that stay in training."""
    import numpy as np

    number = rows_held_out(len(train))
    order = np.random.default_rng(seed_of("held out", name)).permutation(len(train)).tolist()
    mates: dict[Any, list[int]] = {}
    for i in order:
        mates.setdefault(train[i].group or i, []).append(i)
    chosen: list[int] = []  # in the order of the draw: the first of them are a sample of the file as well
    for group in mates.values():
        if len(group) <= max(2, number - len(chosen)) and len(chosen) < number and len(group) < len(train):
            chosen += group
    held = set(chosen)
    return [example for i, example in enumerate(train) if i not in held], [train[i] for i in chosen]


def against_overlap(
    found: dict[str, TaskData], policy: Overlap, trained: Mapping[str, TaskData] | None = None
) -> dict[str, TaskData]:
    """Find the rows that one task of the mixture scores and any task trains on; see `overlap`.

    Args:
        trained: the tasks that were trained on, which is over: nothing is refused. None: those of `found`.
    """
    asked: Asked = {name: {s: [*map(overlap.keys, getattr(data, s))] for s in SPLITS} for name, data in found.items()}
    if trained is None:
        known = set[bytes]().union(*(keys for name, of in asked.items() if found[name].drawn for keys in of["train"]))
    else:
        known = set[bytes]().union(*(overlap.keys(example) for data in trained.values() for example in data.train))
    seen = {name: {s: among(getattr(found[name], s), of[s], known) for s in SCORED} for name, of in asked.items()}
    if policy is Overlap.error and trained is None:
        refuse(found, seen)
    if policy is Overlap.drop:
        fewer = without_scored(found, asked)
        if trained is None:  # and nothing is left to say but what was dropped
            found, seen = fewer, {name: {split: [] for split in of} for name, of in seen.items()}
        else:  # solved examples are drawn of what training left in
            found = {name: replace(data, train=fewer[name].train) for name, data in found.items()}
    found = {
        name: replace(data, trained_on=seen[name], notes=[*data.notes, *messages(data, seen[name]).values()])
        for name, data in found.items()
    }
    return with_resembling(found, {n: d for n, d in found.items() if d.drawn} if trained is None else trained)


def messages(data: TaskData, seen: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """split -> what to say of its rows that are also trained on."""
    return {split: overlap.message(ids, getattr(data, split), split) for split, ids in seen.items() if ids}


def refuse(found: Mapping[str, TaskData], seen: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    """Raise a DataError for scored rows that are also trained on. It is only said of held-out rows: these are no
    published test set."""
    wrong = [
        text
        for name, data in found.items()
        for split, text in messages(data, seen[name]).items()
        if split == "test" or not data.held_out
    ]
    if wrong:
        raise DataError("\n".join(f"{text}. {overlap.REMEDY}" for text in wrong))


def without_scored(found: Mapping[str, TaskData], asked: Asked) -> dict[str, TaskData]:
    """The tasks without the training rows that any of them scores."""
    scored = set[bytes]().union(*(keys for of in asked.values() for split in SCORED for keys in of[split]))
    return {name: dropped(data, among(data.train, asked[name]["train"], scored)) for name, data in found.items()}


def with_resembling(found: dict[str, TaskData], trained: Mapping[str, TaskData]) -> dict[str, TaskData]:
    """Note the test rows that share a run of words with training rows and are not the same question."""
    rows = [example for data in trained.values() for example in data.train]
    tested = [example for data in found.values() for example in data.test]
    ids = overlap.resembling(tested, rows) if rows and tested else []
    out = {}
    for name, data in found.items():
        same = {*data.trained_on.get("test", [])}
        near = [i for i in ids if i.startswith(f"{name}/") and i not in same]
        text = (
            f"task {name}: {len(near)} of {len(data.test):,} test rows have {overlap.RUN} words in a row in common with"
        )
        note = [f"{text} training rows: {overlap.listed(near)}"] if near else []
        out[name] = replace(data, resembling=near, notes=[*data.notes, *note])
    return out


def among(examples: Sequence[Example], asked: Sequence[Sequence[bytes]], known: AbstractSet[bytes]) -> list[str]:
    """The ids of the examples whose question is known, by one of the keys beside them."""
    return [example.id for example, keys in zip(examples, asked, strict=True) if not known.isdisjoint(keys)]


def dropped(data: TaskData, again: Sequence[str]) -> TaskData:
    """The task without the training rows that are scored somewhere."""
    if not again:
        return data
    note = f"task {data.name}: {len(again)} of {len(data.train):,} training rows are dropped: they are also scored"
    left_out = set(again)
    return replace(data, train=[e for e in data.train if e.id not in left_out], notes=[*data.notes, note])
