"""An example: one row of one task, as every other room sees it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question with its answer.

    `answer` is what training teaches: the text of the right option, the reasoning that ends in the number, the body of
    the function. `options` is empty for generated answers. `tests` and `entry_point` are for code only.
    """

    id: str  # "<task>/<split>/<row>"
    task: str
    question: str
    answer: str
    options: tuple[str, ...] = ()
    gold: int | None = None  # index of the right option
    tests: str = ""
    entry_point: str = ""
