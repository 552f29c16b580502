"""SIGINT and SIGTERM: outside training they end the run at once, in training after the step and its checkpoint."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mixlora.errors import Interrupted

BOTH = (signal.SIGINT, signal.SIGTERM)
# A launcher passes on to its ranks what the terminal has already sent them: that is one signal, not two.
ECHO_SECONDS = 2.0


@contextmanager
def raised() -> Iterator[None]:
    """Raise `Interrupted` where the signal finds the process."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted("interrupted; nothing that was finished is lost, the same command goes on", number)

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
        elif int(os.environ.get("WORLD_SIZE", "1")) == 1 or now - first > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    with handled(note):
        yield seen


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
