"""Small Python functions with their tests, as in MBPP (a sentence, assertions) and HumanEval (a docstring, a check).

The expected values come from a second definition of each problem (see `families`), so the tests do not only repeat the
solution. Held out: a family of problems that differ in a number is in one part as a whole, and HumanEval's are its own.
"""

from typing import Any

from mixlora.tasks.sample.draw import Draw, Row
from mixlora.tasks.sample.families import FAMILIES, Problem
from mixlora.tasks.sample.problems import ALONE

# What the tests call with, by the name of the argument.
INPUTS: dict[str, tuple[Any, ...]] = {
    "items": ([1, 2, 3, 4, 5, 6], [10, -3, 7, 0, 12], [5, 5, 20, 8], []),
    "number": (3, 0, 12, -7),
    "text": ("banana", "Hello world", "a", ""),
    "words": (["apple", "fig", "banana"], ["to", "be", "or", "not"], ["Zebra"], []),
}


def mbpp(draw: Draw, number: int) -> list[Row]:
    problems = [(family, k) for family in draw.share(FAMILIES) for k in family.numbers]
    first = 100 * (draw.places[0] + 1)  # the parts' numbers must differ
    return [mbpp_row(first + n, *problem) for n, problem in enumerate(draw.few(problems, number))]


def mbpp_row(task_id: int, family: Problem, k: int) -> Row:
    name = family.name.format(k=k)
    calls = [f"assert {name}({given!r}) == {family.solve(given, k)!r}" for given in INPUTS[family.argument]]
    return {
        "task_id": task_id,
        "text": f"Write a python function to {family.text.format(k=k)}.",
        "code": f"def {name}({family.argument}):\n{indented(family.body.format(k=k))}",
        "test_list": calls[:3],
        "test_setup_code": "",
        "challenge_test_list": [],
    }


def humaneval(draw: Draw, number: int) -> list[Row]:
    return [humaneval_row(n, problem) for n, problem in enumerate(ALONE[:number])]


def humaneval_row(n: int, problem: Problem) -> Row:
    values = [(repr(given), repr(problem.solve(given))) for given in INPUTS[problem.argument]]
    example = f">>> {problem.name}({values[0][0]})\n{values[0][1]}"
    calls = "\n".join(f"    assert candidate({given}) == {value}" for given, value in values)
    return {
        "task_id": f"Sample/{n}",
        "prompt": f'def {problem.name}({problem.argument}):\n    """{problem.text}\n{indented(example)}\n    """\n',
        "canonical_solution": f"{indented(problem.body)}\n",
        "test": f"\n\ndef check(candidate):\n{calls}\n",
        "entry_point": problem.name,
    }


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
