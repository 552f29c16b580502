"""Places where a test can make a run die, hang or run out of something; without the variable they do nothing.

MIXLORA_FAIL=checkpoint.after_rename:kill        kill -9 there
MIXLORA_FAIL=1/step.forward@3:hang               on rank 1, the third time it gets there
"""

import errno
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable

from mixlora.errors import ConfigError, DataError

POINTS = (
    "start",
    "data.load",
    "data.tokenise",
    "evaluate.before",
    "evaluate.task",
    "step.forward",
    "step.before_optimizer",
    "step.metrics",
    "checkpoint.adapter",
    "checkpoint.optimizer",
    "checkpoint.state",
    "checkpoint.before_manifest",
    "checkpoint.before_rename",
    "checkpoint.after_rename",
    "checkpoint.prune",
    "adapter.write",
    "evaluate.after",
    "results.write",
    "finish",
    "report.write",
    "write",  # of any file
)
seen: Counter[str] = Counter()


def reach(point: str) -> None:
    """Fail here if MIXLORA_FAIL names this point, this time and this rank."""
    wanted = os.environ.get("MIXLORA_FAIL")
    if not wanted:
        return
    assert point in POINTS, point
    parts = re.fullmatch(r"(?:(\d+)/)?([\w.]+)(?:@(\d+))?:(\w+)", wanted)
    if parts is None or parts[2] not in POINTS or parts[4] not in ACTIONS:
        raise ConfigError(
            f"MIXLORA_FAIL={wanted} must read [rank/]point[@time]:action. "
            f"Points: {', '.join(POINTS)}. Actions: {', '.join(ACTIONS)}"
        )
    if parts[2] != point or (parts[1] and parts[1] != os.environ.get("RANK", "0")):
        return
    seen[point] += 1
    if seen[point] == int(parts[3] or 1):
        ACTIONS[parts[4]]()


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def hang() -> None:
    threading.Event().wait()


def out_of_memory() -> None:
    import torch

    raise torch.OutOfMemoryError("injected: out of memory")


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def bad_data() -> None:
    raise DataError("injected: a bad row")


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": send(signal.SIGKILL),
    "stop": send(signal.SIGSTOP),
    "term": send(signal.SIGTERM),
    "int": send(signal.SIGINT),
    "hang": hang,
    "oom": out_of_memory,
    "full": disk_full,
    "data": bad_data,
}
