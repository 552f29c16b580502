"""SIGINT and SIGTERM: outside training they end the run at once, in training after the step and its checkpoint."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mixlora.environment import world_size
from mixlora.errors import Interrupted

BOTH = (signal.SIGINT, signal.SIGTERM)
# A launcher passes on to its ranks what the terminal has already sent them: that is one signal, not two.
ECHO_SECONDS = 2.0
GOES_ON = "the same command goes on"  # in the last word of every run that was interrupted
LAUNCHED = "MIXLORA_LAUNCHED"  # set for the runs of a sweep, which passes its signals on to them


@contextmanager
def raised() -> Iterator[None]:
    """Raise `Interrupted` where the signal finds the process."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(f"interrupted; nothing that was finished is lost, {GOES_ON}", number)

    with handled(stop):
        yield


@contextmanager
def collected() -> Iterator[list[int]]:
    """Collect the signal while the block runs; a second one ends the process at once."""
    seen: list[int] = []
    first = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal first
        now = time.monotonic()
        if not seen:
            first = now
            seen.append(number)
        elif not has_launcher() or now - first > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    with handled(note):
        yield seen


def has_launcher() -> bool:
    """Whether somebody passes signals on to this process, who may have had them from the terminal or from SLURM."""
    return world_size() > 1 or bool({LAUNCHED, "TORCHELASTIC_RUN_ID"} & os.environ.keys())


@contextmanager
def held() -> Iterator[None]:
    """A signal that comes while the block runs is heard after it; processes that are started in it never hear it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*BOTH, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    try:
        before = {number: signal.signal(number, handler) for number in BOTH}
    except ValueError:  # not the main thread, which alone may handle signals
        yield
        return
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
