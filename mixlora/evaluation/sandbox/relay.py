"""One judgement: the host stands between candidate and checker, passes frames on and watches the clock.

The host never parses what the candidate sends: it reads a kind and a length, and hands the payload to the checker. Only
the checker's own frame T is a pass. Writing never blocks, so a process that does not read cannot hold the host.
"""

import contextlib
import json
import os
import select
import signal
import threading
import time
from typing import Any

from mixlora.evaluation.sandbox.boxed.values import LARGEST_FRAME
from mixlora.evaluation.sandbox.boxes import Box, Limits
from mixlora.evaluation.sandbox.launchers import Launcher

START_SECONDS = 60.0  # for two bare Pythons; only a machine that cannot run them at all needs more
KILLED = 128 + signal.SIGKILL  # a box cannot do that to itself: it was the CPU limit, or memory ran out on the host
ALMOST = 0.8  # the kernel counts CPU time in ticks where it limits it and in nanoseconds where it reports it
TICK_SECONDS = 0.5  # how soon a cancelled judgement stops

Program = dict[str, Any]  # role, context, source, entry_point: see `boxed/inside.py`


class StartFault(Exception):
    """A box did not come up: the machine's fault, never the candidate's."""


class Cancelled(Exception):
    """Another judgement failed for good, or the user stopped the run."""


class Line:
    """Frames to and from one box: kind (1 byte), length (4 bytes, big endian), payload."""

    def __init__(self, name: str, box: Box):
        self.name, self.box, self.inbox, self.outbox = name, box, bytearray(), bytearray()
        self.ended = False

    def put(self, kind: bytes, payload: bytes) -> None:
        self.outbox += kind + len(payload).to_bytes(4, "big") + payload

    def take(self) -> tuple[bytes, bytes] | None:
        """The next whole frame, if it is here. Raises ValueError on one that announces too much."""
        if len(self.inbox) < 5:
            return None
        size = int.from_bytes(self.inbox[1:5], "big")
        if size > LARGEST_FRAME:
            raise ValueError(f"a reply of {size} bytes, more than {LARGEST_FRAME}")
        if len(self.inbox) < 5 + size:
            return None
        frame = bytes(self.inbox[:1]), bytes(self.inbox[5 : 5 + size])
        del self.inbox[: 5 + size]
        return frame

    def read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            part = os.read(self.box.read_fd, 1 << 16)
            self.inbox += part
            self.ended = not part

    def write(self) -> None:
        try:
            del self.outbox[: os.write(self.box.write_fd, self.outbox[: 1 << 16])]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # it has closed its end; reading tells how it ended
            self.outbox.clear()


class Conversation:
    """Whose turn it is. `result` is None until the verdict is known: "passed", "failed: ..." or "timed out"."""

    def __init__(self, candidate: Line, checker: Line, limits: Limits):
        self.candidate, self.checker, self.limits = candidate, checker, limits
        self.greeted: set[Line] = set()
        self.loaded = self.asked = False
        self.call: bytes | None = None
        self.result: str | None = None

    def advance(self) -> None:
        """Handle every whole frame that is here, then every end of a process."""
        while self.result is None and (frame := self.checker.take()):
            self._from_checker(*frame)
        while self.result is None and (frame := self._from_untrusted()):
            self._from_candidate(*frame)
        if self.result is None and self.loaded and not self.asked and self.call is not None:
            self.candidate.put(b"C", self.call)
            self.call, self.asked = None, True
        if self.result is None:
            self._notice_ends()

    def _from_untrusted(self) -> tuple[bytes, bytes] | None:
        try:
            return self.candidate.take()
        except ValueError as error:
            self.result = f"failed: {error}"
            return None

    def _from_checker(self, kind: bytes, payload: bytes) -> None:
        if kind == b"H":
            self.greeted.add(self.checker)
        elif kind == b"C":
            self.call = payload
        else:
            self.result = "passed" if kind == b"T" else f"failed: {payload.decode(errors='replace')}"

    def _from_candidate(self, kind: bytes, payload: bytes) -> None:
        if self.candidate not in self.greeted and kind == b"H":
            self.greeted.add(self.candidate)
        elif not self.loaded and kind == b"R":
            self.loaded = True
        elif not self.loaded and kind == b"F":
            self.result = f"failed: {printable(payload)}"
        elif self.asked and kind in (b"V", b"E"):
            self.checker.put(kind, payload)
            self.asked = False
        else:
            self.result = "failed: the candidate spoke out of turn"

    def _notice_ends(self) -> None:
        for line in (self.candidate, self.checker):
            if line.ended and line not in self.greeted:
                raise StartFault(line.box.complaint())
        if self.checker.ended:
            self.result = how_it_ended(self.checker, self.limits)
        elif self.candidate.ended and (self.asked or not self.loaded):
            self.result = how_it_ended(self.candidate, self.limits)


def printable(payload: bytes) -> str:
    """The reason that a candidate gives for not loading: text for a person, of bounded size, trusted with nothing."""
    return "".join(c if c.isprintable() else " " for c in payload[:1200].decode(errors="replace"))[:300]


def how_it_ended(line: Line, limits: Limits) -> str:
    """A process that ended without a word: by its CPU limit, by a signal, or by its own exit, which is never a pass."""
    ending = line.box.end(grace=0.5)
    if ending.cpu >= limits.cpu or (ending.status == KILLED and ending.cpu >= ALMOST * limits.cpu):
        return "timed out"
    if ending.status > 128:
        with contextlib.suppress(ValueError):
            return f"failed: {line.name} was ended by {signal.Signals(ending.status - 128).name}"
    return f"failed: {line.name} ended with status {ending.status}"


def converse(candidate: Line, checker: Line, limits: Limits, cancelled: threading.Event) -> str:
    """Pass frames on until there is a result. The clock of `limits.wall` starts when both boxes run.

    Raises:
        StartFault: a box did not come up.
        Cancelled: `cancelled` was set.
    """
    talk = Conversation(candidate, checker, limits)
    running, deadline = False, time.monotonic() + START_SECONDS
    while True:
        talk.advance()
        if talk.result is not None:
            return talk.result
        if not running and talk.greeted == {candidate, checker}:
            running, deadline = True, time.monotonic() + limits.wall
        left = deadline - time.monotonic()
        if left <= 0 and running:
            return "timed out"
        if left <= 0:
            raise StartFault(f"no sign of life within {START_SECONDS:.0f} s")
        if cancelled.is_set():
            raise Cancelled
        exchange((candidate, checker), min(left, TICK_SECONDS))


def exchange(lines: tuple[Line, ...], seconds: float) -> None:
    """Wait until a box says something or takes something, at most `seconds`, and read and write once."""
    poll = select.poll()
    for line in lines:
        if not line.ended:
            poll.register(line.box.read_fd, select.POLLIN)
        if line.outbox:
            poll.register(line.box.write_fd, select.POLLOUT)
    ready = {fd for fd, _ in poll.poll(max(1, int(seconds * 1000)))}
    for line in lines:
        if line.box.read_fd in ready:
            line.read()
        if line.box.write_fd in ready:
            line.write()


def judge(launcher: Launcher, candidate: Program, checker: Program, limits: Limits, cancelled: threading.Event) -> str:
    """Run one candidate against its tests in two fresh boxes -> "passed", "failed: reason" or "timed out".

    Nothing of either box is left when this returns or raises.
    """
    lines: list[Line] = []
    try:
        for name, program in (("the process", candidate), ("the process of the tests", checker)):
            lines.append(Line(name, launcher.start(limits)))
            lines[-1].put(b"P", json.dumps({**program, "limits": limits.inside()}).encode())
        return converse(lines[0], lines[1], limits, cancelled)
    finally:
        for line in lines:
            line.box.end()
