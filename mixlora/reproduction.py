"""What `python -m mixlora.reproduce` does: run what a recipe lacks, each point a process of its own, then show it.

A point that is done is skipped, an interrupted one goes on, a failed one leaves the others running. With several
learning rates the first round chooses them and the second runs the other seeds.
"""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from mixlora.console import say
from mixlora.errors import ConfigError, Interrupted, MixloraError
from mixlora.records import write_json
from mixlora.tables.recipe import Point
from mixlora.tables.study import DIRTY, DONE, Study, log_path

STATUSES = {2: "configuration", 3: "data", 4: "checkpoint", 5: "memory or disk", 6: "numbers", 7: "sandbox"}


class Runner:
    """Runs points, `jobs` at a time; a signal is passed on once, so that each run saves and ends."""

    def __init__(self, study: Study, *, launcher: str, jobs: int) -> None:
        if jobs < 1:
            raise ConfigError(f"jobs must be at least 1, got {jobs}")
        self.study, self.launcher, self.jobs = study, launcher, jobs
        self.lock = threading.Lock()
        self.processes: dict[Point, subprocess.Popen[bytes]] = {}
        self.caught = 0
        self.tried: set[Point] = set()
        self.failed: dict[Point, Path] = {}

    def run(self) -> None:
        """Rounds until nothing new can be run."""
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while points := self.lacking():
                say(f"{len(points)} of {len(self.study.points())} runs are to be made, {self.jobs} at a time")
                with ThreadPoolExecutor(self.jobs) as pool:
                    running = {pool.submit(self.one, point) for point in points}
                    while running:  # a wait that ends by itself lets a signal be seen whichever thread it reached
                        done, running = wait(running, timeout=1)
                        for future in done:
                            future.result()
                self.study.forget()
                if self.caught:
                    message = "the runs were stopped after saving; the same command goes on from there"
                    raise Interrupted(message, self.caught)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def lacking(self) -> list[Point]:
        points = [point for point in self.study.points() if point not in self.tried]
        return [point for point in points if self.study.run(point).state not in (DONE, DIRTY)]

    def one(self, point: Point) -> None:
        folder = self.study.run(point).folder
        log = log_path(folder)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.with_suffix(".json").unlink(missing_ok=True)
        with self.lock:
            if self.caught:
                return
            self.tried.add(point)
            say(f"Running {point}  (log: {log})")
            with open(log, "ab") as output:
                # A session of its own: the terminal's Ctrl-C must reach a run once, through `stop`.
                process = subprocess.Popen(
                    command(self.study, point, self.launcher),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            self.processes[point] = process
        status = process.wait()
        with self.lock:
            del self.processes[point]
            if status and not self.caught:
                self.failed[point] = log
                message = last_line(log)
                write_json(log.with_suffix(".json"), {"status": status, "message": message})
                say(f"FAILED {point}: exit status {status} ({STATUSES.get(status, 'see the log')}): {message}")
                say(f"  log: {log}")
            elif not status:
                say(f"Done {point}")

    def stop(self, number: int, frame: object) -> None:
        """Pass the first signal on; it is not repeated, for a second one would end a run before it has saved."""
        if not self.caught:
            self.caught = number
            for process in list(self.processes.values()):
                process.send_signal(signal.SIGTERM)


def command(study: Study, point: Point, launcher: str) -> list[str]:
    switches = [] if launcher == "local" else ["-m", f"launcher={launcher}"]
    return [sys.executable, "-m", "mixlora.train", *switches, *study.command(point)]


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def reproduce(study: Study, *, launcher: str, jobs: int) -> Runner:
    """Run what is missing. Raises Interrupted after a signal."""
    os.makedirs(study.root, exist_ok=True)
    runner = Runner(study, launcher=launcher, jobs=jobs)
    runner.run()
    return runner


def complain(runner: Runner) -> None:
    """Raise for the runs that failed, after everything else has been shown."""
    if runner.failed:
        logs = "\n".join(f"  {point}: {log}" for point, log in runner.failed.items())
        raise MixloraError(f"{len(runner.failed)} of {len(runner.tried)} runs failed:\n{logs}")
