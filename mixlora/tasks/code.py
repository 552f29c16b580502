"""What is particular to answers that are programs."""

import re

DEFINITION = re.compile(r"^(?:async )?def (\w+)", re.MULTILINE)


def newlines(text: str) -> str:
    r"""One kind of line end: MBPP's programs were written with \r\n, which a model should not learn to write."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def function_under_test(program: str, tests: str) -> str:
    """The first function of `program` that `tests` call; "" where there is none."""
    called = set(re.findall(r"\b(\w+)\s*\(", tests))
    return next((name for name in DEFINITION.findall(program) if name in called), "")
