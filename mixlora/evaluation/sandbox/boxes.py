"""One boxed process: what it may use, and how it ends."""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """What one boxed process may use."""

    cpu: float  # seconds of CPU time
    wall: float  # seconds on the clock, from the moment both processes run
    memory: int = 1 << 30  # bytes of address space
    files: int = 16 << 20  # bytes in the private folder
    threads: int = 32

    def inside(self) -> list[tuple[str, int, int]]:
        """(name, soft, hard) of each limit that the process sets for itself before it sees any generated code."""
        cpu = max(1, -int(-self.cpu // 1))
        # a core limit of 1 (and not 0) also keeps a crash handler that core_pattern pipes to from starting: core(5)
        return [
            ("RLIMIT_CPU", cpu, cpu),  # SIGKILL at once: a soft limit's SIGXCPU does not reach a pid 1
            ("RLIMIT_AS", self.memory, self.memory),
            ("RLIMIT_FSIZE", self.files, self.files),
            ("RLIMIT_NOFILE", 64, 64),
            ("RLIMIT_NPROC", self.threads, self.threads),
            ("RLIMIT_CORE", 1, 1),
            ("RLIMIT_MEMLOCK", 0, 0),
            ("RLIMIT_MSGQUEUE", 0, 0),
        ]


@dataclass(frozen=True)
class Ending:
    """How a process ended: its exit status (128 + signal where a signal ended it) and the CPU seconds it used."""

    status: int
    cpu: float


class Box:
    """One running process, with non-blocking pipes to its standard input, output and error."""

    def __init__(self, process: "subprocess.Popen[bytes]", info_fd: int | None = None, folder: str | None = None):
        assert process.stdin
        assert process.stdout
        assert process.stderr
        self.process, self.info_fd, self.folder = process, info_fd, folder
        self.ending: Ending | None = None
        self.write_fd, self.read_fd = process.stdin.fileno(), process.stdout.fileno()
        for fd in (self.write_fd, self.read_fd, process.stderr.fileno()):
            os.set_blocking(fd, False)

    def end(self, grace: float = 0.0) -> Ending:
        """Give it `grace` seconds to end by itself, kill whatever is left in the box, wait until it is gone."""
        if self.ending is not None:
            return self.ending
        pidfd = os.pidfd_open(self.process.pid)
        try:
            if not select.select([pidfd], [], [], grace)[0]:
                self._kill_inside()
            if not select.select([pidfd], [], [], 5.0)[0]:
                self._kill_group()
            _, status, usage = os.wait4(self.process.pid, 0)
        finally:
            os.close(pidfd)
            self._release()
        code = os.waitstatus_to_exitcode(status)
        self.process.returncode = code
        self.ending = Ending(128 - code if code < 0 else code, usage.ru_utime + usage.ru_stime)
        return self.ending

    def complaint(self) -> str:
        """What was written to standard error before the box ran: bubblewrap's or the loader's reason."""
        assert self.process.stderr
        try:
            return os.read(self.process.stderr.fileno(), 2000).decode(errors="replace").strip()
        except OSError:
            return ""

    def _kill_inside(self) -> None:
        """Kill pid 1 of the box; the kernel then kills all of its pid namespace and bubblewrap reaps it.

        SIGKILL on bubblewrap itself would leave that pid 1 to the init of the host.
        """
        if self.info_fd is None:
            self._kill_group()
            return
        with contextlib.suppress(OSError, ValueError, KeyError):
            told = b""
            while b"}" not in told and select.select([self.info_fd], [], [], 2.0)[0]:
                part = os.read(self.info_fd, 4096)
                if not part:
                    break
                told += part
            self._kill_child(json.loads(told)["child-pid"])

    def _kill_child(self, pid: int) -> None:
        """SIGKILL `pid` if it is a child of this bubblewrap and not a later process with the same number."""
        pidfd = os.pidfd_open(pid)
        try:
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if parent == self.process.pid:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _release(self) -> None:
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        if self.info_fd is not None:
            os.close(self.info_fd)
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
