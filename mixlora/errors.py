"""One error type for each exit status: what went wrong, where, and what to do next, in one message.

A door (`mixlora.config.cli`, or `exit_status` here) prints the message without a traceback and exits with `status`. Set
MIXLORA_DEBUG=1 to see the traceback.
"""

import os
import sys
from collections.abc import Callable


class MixloraError(Exception):
    """Base of everything that a user can mend."""

    status = 1


class ConfigError(MixloraError, ValueError):
    """A key, a value, a combination or a folder that cannot be: nothing has been trained or scored yet, but where a run
    folder is taken away from under its run."""

    status = 2


class DataError(MixloraError):
    """A data set that is missing, unreachable or does not hold what its task file says."""

    status = 3


class CheckpointError(MixloraError):
    """A checkpoint or adapter file that is damaged or belongs to another run."""

    status = 4


class ResourceError(MixloraError):
    """Out of memory or out of disk."""

    status = 5


class NumericsError(MixloraError):
    """Loss, gradients or scores that are not finite."""

    status = 6
    WIDER = "Where it computes in float16, set model.dtype=bfloat16 or float32; else its weights or adapter are damaged"


class SandboxError(MixloraError):
    """Generated code cannot be run safely on this machine."""

    status = 7


class Interrupted(MixloraError):
    """SIGINT or SIGTERM arrived; the state was saved."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.status = 128 + signal_number


def wrapped(error: BaseException | None, kind: type[BaseException] = MixloraError) -> BaseException | None:
    """An error of this kind that a library caught and raised one of its own for: a signal may find a process in its
    code."""
    seen = set[int]()  # an error may be its own cause
    while error is not None and id(error) not in seen:
        if isinstance(error, kind):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def first_line(error: BaseException) -> str:
    """Of an error's message; its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def exit_status(work: Callable[[], object]) -> int:
    """Do the work of a command without Hydra -> its exit status, an error's message printed."""
    try:
        work()
    except MixloraError as error:
        if os.environ.get("MIXLORA_DEBUG"):
            raise
        print(f"mixlora: {error}", file=sys.stderr)
        return error.status
    return 0
