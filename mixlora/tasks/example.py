"""An example: one row of one task, as every other room sees it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mixlora.config.schema import Wording

Filled = Callable[[Mapping[str, Any]], str]  # a template


@dataclass(frozen=True)
class Worded:
    """A task's wording for one style, its templates and patterns read."""

    keys: Wording
    question: Filled | None
    option: Filled | None
    clean: Callable[[str], str]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question with its answer.

    `answer` is what training teaches: the text of the right option, the reasoning that ends in the number, the body of
    the function. `options` is empty for generated answers. `tests`, `entry_point`, `prefix` and `fixtures` are for code
    only. `row` is kept for code and where `wordings` word it in other ways.
    """

    id: str  # "<task>/<split>/<row>"
    task: str
    question: str
    answer: str
    group: tuple[str, ...] = ()  # what it shares with the rows that are held out together with it; (): nothing
    identity: str = ""  # what makes it the same question as another; "": the question
    options: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()  # of the options, as the row calls them: A B C, 1 2 3
    gold: int | None = None  # index of the right option
    cue: str = "\nAnswer:"  # what follows the question where there is no chat template
    tests: str = ""
    entry_point: str = ""
    prefix: str = ""  # code that the answer may go on from
    fixtures: str = ""  # code that runs after it
    row: Mapping[str, Any] | None = None
    wordings: Mapping[str, Worded] = field(default_factory=dict)  # of the task, one mapping for all its rows
