"""Templates over the columns of a row: "{context} {question}", "{choices.text}", "{test_list.0}".

Only names of columns and, behind dots, keys of mappings and places in lists: no attributes, no conversions, no formats.
A filter may follow: "{text|capitalize}" is the text with a capital at its beginning and small letters after it, as
Python and Jinja know it. What a row holds is never read as a template. `{{` and `}}` are braces.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mixlora.config.schema import Options, Task
from mixlora.config.typed import suggest
from mixlora.errors import ConfigError

PIECE = re.compile(r"(\{\{|\}\})|\{([^{}]*)\}|([{}])")
NAME = re.compile(r"[^\s.!:|\[\]{}][^!:|\[\]{}]*")
FILTERS: dict[str, Callable[[str], str]] = {"capitalize": str.capitalize}


class BadField(Exception):
    """A value of a row that cannot be used."""

    def __init__(self, field: str, reason: str):
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


@dataclass(frozen=True)
class Template:
    """Literal texts with a column's path, and what is done to its text, after each but the last."""

    literals: tuple[str, ...]
    paths: tuple[str, ...]
    filters: tuple[str, ...]

    def __call__(self, row: Mapping[str, Any]) -> str:
        """Fill in `row`. Raises BadField: a missing column, a null, or something that is no text."""
        parts = [self.literals[0]]
        for path, filter_name, literal in zip(self.paths, self.filters, self.literals[1:], strict=True):
            parts += (FILTERS.get(filter_name, str)(text_at(row, path)), literal)
        return "".join(parts)


def template(text: str, key: str) -> Template:
    """Read the template `text` that stands under the config key `key`.

    Raises:
        ConfigError: a brace without its partner, a field that is more than a name, or an unknown filter.
    """
    literals, paths, filters, literal, end = [], [], [], "", 0
    for piece in PIECE.finditer(text):
        literal += text[end : piece.start()]
        end = piece.end()
        brace, field, stray = piece.groups()
        path, bar, filter_name = (field or "").partition("|")
        if brace:
            literal += brace[0]
        elif stray or not NAME.fullmatch(path):
            raise ConfigError(f"{key}: '{piece[0]}' is not a column in braces. Write {{column}}, and {{{{ for a brace")
        elif bar and filter_name not in FILTERS:
            raise ConfigError(f"{key}: '{piece[0]}' has no known filter. {suggest(filter_name, FILTERS)}")
        else:
            literals.append(literal)
            paths.append(path)
            filters.append(filter_name)
            literal = ""
    return Template((*literals, literal + text[end:]), tuple(paths), tuple(filters))


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """What `row` holds at a dotted path. Raises BadField where there is nothing."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, (list, tuple)) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise BadField(path, "is missing")
    return value


def text_at(row: Mapping[str, Any], path: str) -> str:
    """The text at `path`: a number as it prints, a list one entry a line. Raises BadField on anything else."""
    return text_of(value_at(row, path), path)


def text_of(value: Any, path: str) -> str:
    if isinstance(value, str):
        return whole(value, path)
    if value is None:
        raise BadField(path, "is null")
    if isinstance(value, float) and math.isnan(value):
        raise BadField(path, "is NaN")
    if isinstance(value, (bool, int, float)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return "\n".join(text_of(entry, path) for entry in value)
    raise BadField(path, f"holds a {type(value).__name__}, not a text")


def whole(text: str, path: str) -> str:
    """`text`, if it is Unicode: JSON can hold half a surrogate pair, which no tokenizer reads. Raises BadField."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadField(path, "holds a lone surrogate, which is not Unicode text") from None
    return text


def columns(task: Task) -> frozenset[str]:
    """Paths that a row of this task must have."""
    texts = [
        task.question,
        task.tests or "",
        task.identity or "",
        task.group or "",
        task.prefix or "",
        task.fixtures or "",
        *(wording.question or "" for wording in task.wordings.values()),
    ]
    paths = [path for text in texts for path in template(text, f"task {task.name}").paths]
    options = task.options or Options()
    paths += [task.answer, task.entry_point or "", options.field or "", options.labels or ""]
    return frozenset(filter(None, [*paths, *(options.columns or []), *(task.where or {})]))
