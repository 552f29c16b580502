"""An example: one row of one task, as every other room sees it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question with its answer.

    `answer` is what training teaches: the text of the right option, the reasoning that ends in the number, the body of
    the function. `options` is empty for generated answers. `tests`, `entry_point` and `row` are for code only.
    """

    id: str  # "<task>/<split>/<row>"
    task: str
    question: str
    answer: str
    options: tuple[str, ...] = ()
    gold: int | None = None  # index of the right option
    cue: str = "\nAnswer:"  # what follows the question where there is no chat template
    tests: str = ""
    entry_point: str = ""
    row: Mapping[str, Any] | None = None  # the row as it came, from which a sandbox makes its problem
