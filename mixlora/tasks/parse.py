"""From the rows of a table to examples: strict, so that what is wrong with a row is said before anything is trained."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mixlora.config.schema import Answer, BadRow, Options, Replacement, Style, Task
from mixlora.config.typed import suggest
from mixlora.errors import ConfigError, DataError
from mixlora.tasks.code import function_under_test, newlines
from mixlora.tasks.example import Example, Worded
from mixlora.tasks.numbers import last_number, more_than_a_number
from mixlora.tasks.table import Table
from mixlora.tasks.template import BadField, Template, columns, template, text_at, text_of, value_at

PUBLISHED = tuple(style.value for style in (Style.llm_adapters, Style.moe_peft, Style.lm_eval))
MOST_BAD = 0.01  # of the rows may be skipped
OF_OPTION = ("number", "label", "text")  # what wordings say of an option
# (texts, labels) of a row's options; the answer names one of the labels.
OptionReader = Callable[[Mapping[str, Any]], tuple[list[str], Sequence[Any]]]


@dataclass(frozen=True)
class BadRowReport:
    row: int
    field: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}, field '{self.field}': {self.reason}"


def examples(
    task: Task, table: Table, split: str, on_bad_row: BadRow = BadRow.error
) -> tuple[list[Example], list[BadRowReport]]:
    """The examples of `table`, in its order, and the rows that were skipped. Rows are counted from 0.

    Raises:
        DataError: a column is missing; no row is left; a row is bad, or with on_bad_row=skip more than 1 % of them.
        ConfigError: the task's own keys cannot be.
    """
    reader = Reader.of(task)
    if not table.rows:
        raise DataError(f"task {task.name}: {table.origin} has no row. Give it some, or take the task out")
    require_columns(reader.columns, table)
    found, bad, seen = [], [], 0
    for number, row in zip(table.numbers, table.rows, strict=True):
        if task.where and not kept(row, task.where):
            continue
        seen += 1
        try:
            found.append(reader(row, f"{task.name}/{split}/{number}"))
        except BadField as error:
            report = BadRowReport(number, error.field, error.reason)
            if on_bad_row is BadRow.error:
                raise DataError(
                    f"{table.origin}, {report}. Mend it, or leave such rows out where they are no more than "
                    f"{MOST_BAD:.0%}: data.on_bad_row=skip"
                ) from None
            bad.append(report)
    if len(bad) > MOST_BAD * seen:
        raise DataError(
            f"{table.origin}: {len(bad)} of {seen} rows are bad, more than {MOST_BAD:.0%}; the first: {bad[0]}"
        )
    if not found:
        raise DataError(f"task {task.name}: {table.origin} has no row where {task.where}. Mend `where` or the file")
    return found, bad


@dataclass(frozen=True)
class Reader:
    """One task's keys, read once: from a row to its example."""

    task: Task
    question: Template
    options: OptionReader | None
    tests: Template | None
    columns: frozenset[str]
    identity: Template | None = None
    group: Template | None = None
    prefix: Template | None = None
    fixtures: Template | None = None
    wordings: Mapping[str, Worded] = field(default_factory=dict)

    @classmethod
    def of(cls, task: Task) -> "Reader":
        """Raises ConfigError where the task's keys do not fit together."""
        check(task)
        question = template(task.question, f"task {task.name}: question")
        tests = template(task.tests, f"task {task.name}: tests") if task.tests else None
        options = option_reader(task.options, task) if task.options else None
        identity = template(task.identity, f"task {task.name}: identity") if task.identity else None
        group = template(task.group, f"task {task.name}: group") if task.group else None
        prefix = template(task.prefix, f"task {task.name}: prefix") if task.prefix else None
        fixtures = template(task.fixtures, f"task {task.name}: fixtures") if task.fixtures else None
        return cls(task, question, options, tests, columns(task), identity, group, prefix, fixtures, worded(task))

    def __call__(self, row: Mapping[str, Any], id: str) -> Example:
        """Raises BadField."""
        task, question = self.task, self.question(row).lstrip("\n")  # a template may begin with an empty column
        asked = (self.identity or self.question).paths
        if asked and not any(text_at(row, path).strip() for path in asked):
            raise BadField(", ".join(asked), "is empty")
        identity = self.identity(row) if self.identity else ""
        group = tuple(sorted(self.group(row).splitlines())) if self.group else ()
        if self.options is not None:
            texts, labels, gold = self.choice(row)
            return Example(
                id=id,
                task=task.name,
                question=question,
                answer=texts[gold],
                options=texts,
                labels=labels,
                gold=gold,
                cue=task.cue,
                identity=identity,
                group=group,
                row=row if self.wordings else None,
                wordings=self.wordings,
            )
        answer = self.text_answer(row)
        extra = self.program(row, answer) if task.answer_kind is Answer.code else {}
        return Example(
            id=id,
            task=task.name,
            question=question,
            answer=answer,
            cue=task.cue,
            identity=identity,
            group=group,
            **extra,
        )

    def choice(self, row: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...], int]:
        """The texts of the options, their labels and the place of the right one."""
        assert self.options is not None
        texts, labels = self.options(row)
        check_options(texts, labels, self.task)
        value = value_at(row, self.task.answer)
        if value is None or value == "":
            raise BadField(self.task.answer, "is null or empty")
        known = [spelled(label) for label in labels]
        if spelled(value) not in known:
            raise BadField(self.task.answer, f"{value!r} is none of the {len(texts)} options' labels {list(labels)}")
        return tuple(texts), tuple(known), known.index(spelled(value))

    def text_answer(self, row: Mapping[str, Any]) -> str:
        name, contains = self.task.answer, self.task.answer_contains
        text = text_at(row, name)
        if not text.strip():
            raise BadField(name, "is empty")
        if contains and contains not in text:
            raise BadField(name, f"has no {contains!r}")
        end = text.partition(contains)[2] if contains else text
        task_is_number = self.task.answer_kind is Answer.number
        if task_is_number and last_number(end) is None:
            raise BadField(name, f"has no number{f' after {contains!r}' if contains else ''}")
        if task_is_number and (found := more_than_a_number(end)):
            raise BadField(name, f"ends in {found!r}: only the last number of it would be compared")
        return newlines(text) if self.task.answer_kind is Answer.code else text

    def program(self, row: Mapping[str, Any], answer: str) -> dict[str, Any]:
        assert self.tests is not None
        tests = newlines(self.tests(row))
        name = self.task.entry_point
        entry_point = text_at(row, name) if name else function_under_test(answer, tests)
        if not entry_point:
            raise BadField(self.task.answer, "defines no function that the tests call")
        prefix = newlines(self.prefix(row)) if self.prefix else ""
        fixtures = newlines(self.fixtures(row)) if self.fixtures else ""
        return {"tests": tests, "entry_point": entry_point, "prefix": prefix, "fixtures": fixtures, "row": row}


def worded(task: Task) -> dict[str, Worded]:
    """The task's wordings with their templates and patterns read."""
    found = {}
    for style, keys in task.wordings.items():
        place = f"task {task.name}: wordings.{style}"
        question = template(keys.question, f"{place}.question") if keys.question is not None else None
        option = template(keys.option, f"{place}.option") if keys.option is not None else None
        for path in option.paths if option else ():
            if path not in OF_OPTION:
                raise ConfigError(f"{place}.option: '{{{path}}}' is nothing of an option. {suggest(path, OF_OPTION)}")
        found[style] = Worded(keys, question, option, cleaner(keys.clean, f"{place}.clean"))
    return found


@dataclass(frozen=True)
class Cleaner:
    """A text with all replacements made, in their order."""

    steps: tuple[tuple[re.Pattern[str], str], ...]

    def __call__(self, text: str) -> str:
        for pattern, by in self.steps:
            text = pattern.sub(by, text)
        return text


def cleaner(replacements: Sequence[Replacement], key: str) -> Cleaner:
    """Raises ConfigError: a pattern that is not a regular expression, or names a group that it does not have."""
    steps = []
    for number, step in enumerate(replacements):
        try:
            pattern = re.compile(step.pattern)
            pattern.sub(step.by, "")
        except (re.error, IndexError) as error:
            raise ConfigError(f"{key}[{number}]: {step.pattern!r} by {step.by!r}: {error}") from None
        steps.append((pattern, step.by))
    return Cleaner(tuple(steps))


def option_reader(options: Options, task: Task) -> OptionReader:
    """How a row of this task gives its options."""
    values = task.answer_values
    if options.fixed is not None:
        fixed, labels = list(options.fixed), values or options.fixed
        return lambda row: (fixed, labels)
    if options.columns is not None:
        names = list(options.columns)
        numbers = values or list(range(len(names)))
        return lambda row: ([text_at(row, name) for name in names], numbers)
    path, label_path = options.field, options.labels
    assert path is not None

    def listed(row: Mapping[str, Any]) -> tuple[list[str], Sequence[Any]]:
        found = value_at(row, path)
        if isinstance(found, Mapping):  # parquet fills the labels that a row lacks with nulls
            found = {label: text for label, text in found.items() if text is not None}
            return [text_of(text, path) for text in found.values()], list(found)
        if not isinstance(found, (list, tuple)):
            raise BadField(path, f"holds {found!r:.40}, not a list of options or a mapping label: text")
        labels = value_at(row, label_path) if label_path else values or range(len(found))
        if not isinstance(labels, (list, tuple, range)):
            raise BadField(label_path or path, f"holds {labels!r:.40}, not a list of labels")
        return [text_of(text, path) for text in found], labels

    return listed


def check_options(texts: Sequence[str], labels: Sequence[Any], task: Task) -> None:
    """Raises BadField."""
    assert task.options is not None
    field = task.options.field or ", ".join(task.options.columns or ["options"])
    if len(texts) < 2:
        raise BadField(field, f"has {len(texts)} option, a question needs 2")
    if len(labels) != len(texts):
        raise BadField(field, f"has {len(texts)} options for {len(labels)} labels {list(labels)}")
    if not all(map(str.strip, texts)):
        raise BadField(field, "has an empty option")
    if len(set(map(spelled, labels))) < len(labels):
        raise BadField(field, f"has a label twice: {list(labels)}")
    if not task.repeated_options and len(set(texts)) < len(texts):
        raise BadField(field, f"has an option twice: {list(texts)!r:.200}")


def spelled(value: Any) -> str:
    """One spelling for a label however its file types it: True and "true" (CSV), 1 and "1" (JSON)."""
    text = str(value).strip()
    return text.lower() if text in ("True", "False") else text


def kept(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Whether a row has these values, be they texts or numbers in its file; null is what is not there, or empty."""
    for path, wanted in where.items():
        try:
            value = value_at(row, path)
        except BadField:
            value = None
        if (value in (None, "")) != (wanted in (None, "")):
            return False
        if value not in (None, "") and value != wanted and spelled(value) != spelled(wanted):
            return False
    return True


def require_columns(paths: frozenset[str], table: Table) -> None:
    for path in sorted(paths):
        name = path if path in table.columns else path.split(".")[0]
        if name not in table.columns:
            near = suggest(name, table.columns)
            has = f" It has: {', '.join(sorted(table.columns))}" if near.startswith("Did") else ""
            raise DataError(f"{table.origin} has no column '{name}'. {near}{has}")


def check(task: Task) -> None:
    """Raises ConfigError where the keys of a task file do not fit together."""
    options, kind, name = task.options, task.answer_kind, f"task {task.name}"
    if (options is not None) != (kind is Answer.options):
        raise ConfigError(f"{name}: answer_kind={kind.value} {'takes no' if options else 'needs'} options")
    if kind is Answer.code and not task.tests:
        raise ConfigError(f"{name}: answer_kind=code needs tests, a template of the test program")
    if task.eval_only and task.train_only:
        raise ConfigError(f"{name}: eval_only and train_only are both true; set one to false")
    if task.cap is not None and task.cap < 1:
        raise ConfigError(f"{name}: cap must be at least 1, got {task.cap}. Use eval_only=true to train on nothing")
    for style in task.wordings:
        if style not in PUBLISHED:
            raise ConfigError(f"{name}: there is no style 'wordings.{style}'. {suggest(style, PUBLISHED)}")
    if options is None:
        return
    if sum(part is not None for part in (options.field, options.columns, options.fixed)) != 1:
        raise ConfigError(f"{name}: options needs exactly one of field, columns and fixed")
    if options.labels is not None and (options.field is None or task.answer_values is not None):
        other = "answer_values" if options.field else "columns" if options.columns else "fixed"
        raise ConfigError(
            f"{name}: options.labels names the labels of options.field, and {other} gives others. Set one"
        )
    texts, values = options.fixed or options.columns, task.answer_values
    if texts is not None and values is not None and len(texts) != len(values):
        raise ConfigError(f"{name}: {len(texts)} options but {len(values)} answer_values {values}")
