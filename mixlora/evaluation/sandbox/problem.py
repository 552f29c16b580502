"""One programming problem, from HumanEval's rows, MBPP's rows or anywhere else."""

import ast
import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a model is asked, and how its answer is tested.

    The candidate's program is `prefix + completion`, then `fixtures`. The checker's is `context`, then `tests`; every
    name in `tests` that neither `context` nor Python defines stands for the candidate's, and `entry_point` always does.
    """

    task_id: str
    prompt: str  # what the model reads
    tests: str  # a program that raises unless the candidate is right; it must come to its end
    entry_point: str  # the function under test
    prefix: str = ""  # code that the completion continues: HumanEval's prompt
    fixtures: str = ""  # code on top of the candidate's, in its process: MBPP builds trees of the candidate's own Node
    context: str = ""  # trusted code beside the tests: helpers and imports that they use

    @property
    def continues(self) -> bool:
        """Whether a completion starts inside the body of the function, as HumanEval's do."""
        return re.search(rf"\bdef {re.escape(self.entry_point)}\b", self.prefix) is not None


def from_humaneval(row: Mapping[str, Any]) -> Problem:
    """A row of HumanEval: task_id, prompt, entry_point, test.

    The prompt also runs beside the tests: some call its helper functions (poly of HumanEval/32, encode_shift of 50).
    """
    prompt, entry_point = text(row, "prompt"), text(row, "entry_point")
    return Problem(
        task_id=str(row["task_id"]),
        prompt=prompt,
        prefix=prompt,
        context=standing(prompt),
        tests=f"{text(row, 'test')}\ncheck({entry_point})\n",
        entry_point=entry_point,
    )


def from_mbpp(row: Mapping[str, Any]) -> Problem:
    """A row of MBPP: task_id (11 or "MBPP/11"), text (or prompt), code, test_list, test_setup_code (or test_imports).

    Tests are plain assertions. The imports of the reference solution run beside them: some use `math` without a word.
    The prompt is the task and its tests, as in the paper (arXiv:2108.07732, section 3).
    """
    tests, reference = list(row["test_list"]), normal(text(row, "code"))
    if not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError(f"test_list must be a list of assertions, got {row['test_list']!r:.80}")
    setup = normal(row.get("test_setup_code") or "\n".join(row.get("test_imports") or ()))
    question = row.get("text") or text(row, "prompt")
    task_id = str(row["task_id"])
    return Problem(
        task_id=task_id if "/" in task_id else f"MBPP/{task_id}",
        prompt=f"{question.strip()}\nYour code should pass these tests:\n" + "\n".join(tests) + "\n",
        fixtures=setup,
        context=imports_for("\n".join(tests), reference, setup),
        tests=normal("\n".join(tests)) + "\n",
        entry_point=called_function(tests, reference),
    )


def from_row(row: Mapping[str, Any]) -> Problem:
    """Either kind of row, told apart by its columns. Raises ValueError, KeyError or TypeError on any other."""
    return from_mbpp(row) if "test_list" in row else from_humaneval(row)


def text(row: Mapping[str, Any], column: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"{column} must be a text, got {row[column]!r:.80}")
    return str(row[column])


def standing(prompt: str) -> str:
    """The prompt as a program: its last function has a docstring for a body, or gets one. One that breaks off elsewhere
    is none: then the tests find its names in the candidate's program alone."""
    for program in (prompt, f"{prompt.rstrip()}\n    pass\n"):
        with contextlib.suppress(SyntaxError):
            ast.parse(program)
            return program
    return ""


def normal(code: str) -> str:
    """MBPP's rows end their lines in CR LF."""
    return code.replace("\r\n", "\n").replace("\r", "\n")


def imports_for(tests: str, *programs: str) -> str:
    """The top-level imports of trusted programs that bind a name which the tests say; what is no program by itself has
    none."""
    said, lines = set(re.findall(r"\w+", tests)), []
    for program in programs:
        with contextlib.suppress(SyntaxError):
            for node in ast.parse(program).body:
                if not isinstance(node, ast.Import | ast.ImportFrom):
                    continue
                bound = {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
                if bound & said or "*" in bound:
                    lines.append(ast.unparse(node) + "\n")
    return "".join(lines)


def called_function(tests: list[str], reference: str) -> str:
    """The function under test: the first one of the reference solution that the first test calls."""
    defined = {node.name for node in ast.parse(reference).body if isinstance(node, ast.FunctionDef)}
    calls = [node.func for node in ast.walk(ast.parse(normal(tests[0]))) if isinstance(node, ast.Call)]
    names = [function.id for function in calls if isinstance(function, ast.Name)]
    for name in names:
        if name in defined:
            return name
    raise ValueError(f"no function of the reference solution is called by its first test: {tests[0]!r:.120}")
