"""The loop of a sweep: start what there is room for, look at what runs, pass on a signal, tell what happened."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mixlora import signals
from mixlora.config.schema import Launch, Launcher
from mixlora.console import say
from mixlora.errors import Interrupted, MixloraError
from mixlora.records import attempt_path, disk_errors, log_path, write_json
from mixlora.sweeps.local import Local
from mixlora.sweeps.points import Point
from mixlora.sweeps.processes import Refused, check_accelerate, last_line, size_of
from mixlora.sweeps.show import Board

KINDS = {2: "configuration", 3: "data", 4: "checkpoint", 5: "memory or disk", 6: "numbers", 7: "sandbox"}


class Handle(Protocol):
    """A point that was started."""

    state: str  # "running", or what it waits for
    silence: str  # what to say of a run that failed without a word

    def poll(self) -> int | None:
        """The exit status of the run once it has ended."""


class Place(Protocol):
    """Where points run."""

    pause: float

    def describe(self) -> str: ...

    def room(self) -> bool:
        """Whether one more may start."""

    def knows(self, point: Point) -> bool:
        """Whether a run of an earlier sweep, or of another, is at the point or waits to be."""

    def start(self, point: Point, log: Path) -> Handle:
        """Start a run, or find the one that is known.

        Raises:
            Refused: not now.
        """

    def leave(self, handles: Sequence[Any]) -> str:
        """End what ends with this process, once it has saved; say what becomes of the points."""


@dataclass
class Failure:
    """How a point ended that did not finish."""

    status: int
    message: str
    log: Path

    def __str__(self) -> str:
        return f"exit status {self.status} ({self.kind}): {self.message}"

    @property
    def kind(self) -> str:
        if self.status < 0:
            return signal.Signals(-self.status).name + (", as from a machine out of memory" * (self.status == -9))
        return KINDS.get(self.status, "see the log")


@dataclass
class Started:
    """A point that runs, and where in its log this try begins."""

    handle: Handle
    log: Path
    begins: int


def place_of(launch: Launch) -> Place:
    """Where points run.

    Raises:
        ConfigError: what was asked for is not there.
    """
    check_accelerate(launch)
    if launch.launcher is Launcher.slurm:
        from mixlora.sweeps.slurm import Slurm  # submitit is an extra

        return Slurm(launch)
    return Local(launch)


def run(points: Sequence[Point], place: Place, board: Board) -> dict[Point, Failure]:
    """Run every point; one that fails leaves the others running.

    Raises:
        Interrupted: after SIGINT or SIGTERM, or where the terminal was closed.
    """
    # Those that another sweep has left running come first, so that it is known what they take.
    waiting = sorted(points, key=lambda point: not place.knows(point))
    running, failed = dict[Point, Started](), dict[Point, Failure]()
    with signals.collected() as caught, hangup_ends(), board:
        try:
            while (running or waiting) and not caught:
                start_waiting(waiting, running, place, board, caught)
                failed |= ended(running, board)
                time.sleep(place.pause)
        finally:  # after a signal, or where this process itself fails
            what_remains = place.leave([start.handle for start in running.values()])
            if running and not caught:
                say(what_remains[0].upper() + what_remains[1:])
    if caught:
        raise Interrupted(what_remains, caught[0])
    return failed


def start_waiting(
    waiting: list[Point], running: dict[Point, Started], place: Place, board: Board, caught: Sequence[int]
) -> None:
    """Move points from `waiting` to `running` while there is room for one more and no signal was caught.

    Raises:
        Refused: nothing runs after whose end it could be tried again.
    """
    while waiting and place.room() and not caught:
        try:
            running[waiting[0]] = started(waiting[0], place)
        except Refused as error:
            if not running:
                raise
            board.refused(str(error))
            return
        board.told(waiting.pop(0), "started")


def ended(running: dict[Point, Started], board: Board) -> dict[Point, Failure]:
    """Take what has ended out of `running`; returns those that did not finish."""
    failed = {}
    for point, start in list(running.items()):
        status = start.handle.poll()
        board.sees(point, start.handle.state)
        if status is None or (finished := point.finished) is None:
            continue
        del running[point]
        if not finished:
            failed[point] = failure(point, start, status)
            board.told(point, "failed", failed[point])
        else:
            board.told(point, "done")
    return failed


@contextlib.contextmanager
def hangup_ends() -> Iterator[None]:
    """A terminal that is closed ends the sweep as SIGTERM does; under nohup it does not."""
    main = threading.current_thread() is threading.main_thread()  # which alone may handle signals
    if not main or signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: Any) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a shell sends its own after the terminal's: that is not a second
        signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGHUP, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def started(point: Point, place: Place) -> Started:
    """How an earlier try failed is forgotten.

    Raises:
        ConfigError, ResourceError: its log cannot be written.
    """
    log = log_path(point.folder)
    with disk_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        attempt_path(point.folder).unlink(missing_ok=True)
        begins = size_of(log)
        return Started(place.start(point, log), log, begins)


def failure(point: Point, start: Started, status: int) -> Failure:
    """Written beside the log, where tables find it."""
    log = start.log
    message = last_line(log, start.begins) or start.handle.silence
    if status == 0:
        message = f"it ended well, yet no finished run is in {point.folder}. Does run_dir change with every start?"
    found = Failure(status, message, log)
    with contextlib.suppress(MixloraError, OSError):  # a disk that is full must not end the other runs; the log has it
        write_json(attempt_path(point.folder), {"status": status, "message": found.message})
    return found
