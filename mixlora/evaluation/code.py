"""Generated programs: taken out of the model's reply, run against their tests in the sandbox."""

from collections.abc import Sequence
from typing import Any

from mixlora.evaluation.sandbox import Problem, Sandbox, completion_of
from mixlora.tasks.example import Example


def judge_code(examples: Sequence[Example], replies: Sequence[str]) -> list[dict[str, Any]]:
    """One prediction an example: the program, its verdict, and pass@1."""
    problems = [problem_of(example) for example in examples]
    programs = [completion_of(reply, problem) for reply, problem in zip(replies, problems, strict=True)]
    with Sandbox() as box:
        verdicts = box.judge(list(zip(problems, programs, strict=True)))
    return [
        {
            "id": example.id,
            "prompt": example.question,
            "target": example.answer,
            "prediction": reply,
            "program": program,
            "verdict": verdict.result,
            "sandbox": verdict.sandbox,
            "pass@1": float(verdict.passed),
        }
        for example, reply, program, verdict in zip(examples, replies, programs, verdicts, strict=True)
    ]


def problem_of(example: Example) -> Problem:
    return Problem(task_id=example.id, prompt=example.question, tests=example.tests, entry_point=example.entry_point)
