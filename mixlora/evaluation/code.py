"""Generated programs: taken out of the model's replies, run against their tests in the sandbox."""

from collections.abc import Mapping, Sequence
from typing import Any

from mixlora.console import say
from mixlora.evaluation.sandbox import Problem, Sandbox, Verdict, completion_of, pass_at_k
from mixlora.evaluation.sandbox.boxed.values import UNFIT
from mixlora.evaluation.sandbox.problem import imports_for, standing
from mixlora.evaluation.sandbox.scores import KS
from mixlora.tasks.example import Example
from mixlora.tasks.overlap import listed


def judge_code(examples: Sequence[Example], replies: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """One prediction an example, from one or more replies to it."""
    problems = [problem_of(example) for example in examples]
    programs = [[completion_of(r, problem) for r in some] for problem, some in zip(problems, replies, strict=True)]
    asked = [(problem, one) for problem, some in zip(problems, programs, strict=True) for one in some]
    with Sandbox() as box:
        verdicts = iter(box.judge(asked))
    judged = [[next(verdicts) for _ in some] for some in programs]
    return [prediction(*parts) for parts in zip(examples, replies, programs, judged, strict=True)]


def tell_unfit(task: str, predictions: Sequence[Mapping[str, Any]]) -> None:
    """Name the rows that count against every model, for their own tests cannot work."""
    unfit = f"failed: {UNFIT}"
    ids = [p["id"] for p in predictions if any(one["verdict"].startswith(unfit) for one in p["samples"])]
    if ids:
        rows = f"{len(ids)} of {len(predictions)} rows of task {task}"
        say(f"Note: {UNFIT} (docs/tasks.md) in {rows}, which no program can pass: {listed(ids)}. Leave them out")


def prediction(
    example: Example, replies: Sequence[str], programs: Sequence[str], verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    """Every sample with its verdict, and pass@k for each k up to their number. `prediction` is the first sample."""
    samples = [
        {"reply": reply, "program": program, "verdict": verdict.result}
        for reply, program, verdict in zip(replies, programs, verdicts, strict=True)
    ]
    n, c = len(verdicts), sum(verdict.passed for verdict in verdicts)
    return {
        "id": example.id,
        "prompt": example.question,
        "target": example.answer,
        "prediction": replies[0],
        "samples": samples,
        "sandbox": verdicts[0].sandbox,
        **{f"pass@{k}": pass_at_k(n, c, k) for k in KS if k <= n},
    }


def problem_of(example: Example) -> Problem:
    """What an answer may go on from stands before it, and runs beside the tests, which may call its helpers. So do the
    imports of the reference solution that they use: some of MBPP's tests say `math` without a word."""
    imports = imports_for(example.tests, example.prefix + example.answer, example.fixtures)
    return Problem(
        task_id=example.id,
        prompt=example.question,
        tests=example.tests,
        entry_point=example.entry_point,
        prefix=example.prefix,
        fixtures=example.fixtures,
        context=standing(example.prefix) + "\n" + imports,
    )
