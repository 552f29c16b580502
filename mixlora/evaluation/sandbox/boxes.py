"""Starting and ending one boxed Python process: under bubblewrap, or, where a user accepts it, without a box.

bubblewrap gives new user, mount, pid, network, ipc, uts and cgroup namespaces; a file system of the system's shared
libraries, a bare Python (read-only), an empty folder of bounded size, and nothing else (no /proc, no /etc, no shell);
no capabilities, no environment; the system calls of `seccomp.py`. Limits are set inside, before any generated code.
"""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mixlora.errors import SandboxError
from mixlora.evaluation.sandbox import interpreter, seccomp

NOBODY = 65534
INSTALL = "Install bubblewrap: apt-get install bubblewrap (or dnf, pacman, apk)."
ALLOW = (
    "Allow user namespaces: sysctl -w kernel.unprivileged_userns_clone=1 (older Debian), "
    "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu 24.04), "
    "docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined (Docker). "
    "In a container that is itself a sandbox: --i-accept-unsandboxed-code."
)


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
    """One running process with pipes to its standard input and output (non-blocking) and its complaints at the start."""

    def __init__(self, process: "subprocess.Popen[bytes]", info_fd: int | None = None, folder: str | None = None):
        assert process.stdin and process.stdout and process.stderr
        self.process, self.info_fd, self.folder = process, info_fd, folder
        self.ending: Ending | None = None
        self.write_fd, self.read_fd = process.stdin.fileno(), process.stdout.fileno()
        for fd in (self.write_fd, self.read_fd, process.stderr.fileno()):
            os.set_blocking(fd, False)

    def end(self, grace: float = 0.0) -> Ending:
        """Give the process `grace` seconds to end by itself, kill whatever is left in the box, and wait until it is gone."""
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
            return self._kill_group()
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


class Launcher(Protocol):
    """Where boxed processes come from."""

    description: str  # as results record it

    def start(self, limits: Limits) -> Box: ...

    def close(self) -> None: ...


class Bubblewrap:
    """Boxes under bubblewrap. Root gives its privileges up first: the kernel exempts root from RLIMIT_NPROC."""

    def __init__(self) -> None:
        program = shutil.which("bwrap")
        if program is None:
            raise SandboxError(f"bubblewrap (bwrap) is not installed, and generated code runs in it only. {INSTALL}")
        filter_program = seccomp.program_bytes()
        self.folder = Path(tempfile.mkdtemp(prefix="mixlora-sandbox-", dir="/tmp" if os.getuid() == 0 else None))
        try:
            version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
            self.description = f"bubblewrap {(re.findall(r'[0-9.]+', version) or ['?'])[0]}"
            interpreter.copy_python(self.folder)
            self.filter = self.folder / "filter.bpf"
            self.filter.write_bytes(filter_program)
            self.command = [program, *walls(self.folder)]
        except BaseException:
            self.close()
            raise

    def start(self, limits: Limits) -> Box:
        filter_fd = os.open(self.filter, os.O_RDONLY)
        info_read, info_write = os.pipe()
        room = ["--size", str(limits.files), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]
        wiring = ["--seccomp", str(filter_fd), "--info-fd", str(info_write)]
        try:
            process = spawn(
                [*self.command, *room, *wiring, f"/python/{interpreter.PYTHON}", *interpreter.COMMAND],
                pass_fds=(filter_fd, info_write),
                unprivileged=True,
            )
        except BaseException:
            os.close(info_read)
            raise
        finally:
            os.close(filter_fd)
            os.close(info_write)
        return Box(process, info_fd=info_read)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Unsandboxed:
    """A separate process with limits and nothing more, for a container that is itself a sandbox."""

    description = "none (accepted)"

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mixlora-sandbox-"))
        try:
            interpreter.copy_python(self.folder)
        except BaseException:
            self.close()
            raise

    def start(self, limits: Limits) -> Box:
        work = tempfile.mkdtemp(prefix="work-", dir=self.folder)
        command = [str(self.folder / interpreter.PYTHON), *interpreter.COMMAND]
        return Box(spawn(command, cwd=work, env=interpreter.environment(self.folder)), folder=work)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def walls(python: Path) -> list[str]:
    """bubblewrap's options that no sample changes; `python` is the bare copy."""
    options = "--unshare-user --unshare-pid --unshare-net --unshare-ipc --unshare-uts --unshare-cgroup-try".split()
    options += f"--die-with-parent --as-pid-1 --new-session --clearenv --uid {NOBODY} --gid {NOBODY} --hostname box".split()
    options += ["--cap-drop", "ALL"]
    # Python is pid 1 of its namespace: bubblewrap then reaps it, where its own pid 1 would be left to the host's init
    for name, value in interpreter.environment("/python").items():
        options += ["--setenv", name, value]
    for folder in ("/usr/lib", "/usr/lib64"):
        if os.path.isdir(folder):
            options += ["--ro-bind", folder, folder]
            for packages in sorted(Path(folder).glob("python*")):
                options += ["--tmpfs", str(packages), "--remount-ro", str(packages)]
    for folder in ("/lib", "/lib64"):
        if os.path.islink(folder):
            options += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            options += ["--ro-bind", folder, folder]
    for device in ("null", "zero", "urandom"):
        options += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    return [*options, "--ro-bind", str(python), "/python"]


def spawn(
    command: list[str],
    *,
    cwd: str = "/",
    env: dict[str, str] | None = None,
    pass_fds: tuple[int, ...] = (),
    unprivileged: bool = False,
) -> "subprocess.Popen[bytes]":
    """A process with pipes, no environment but `env`, a session of its own; `unprivileged`: root becomes nobody."""
    drop = unprivileged and os.getuid() == 0
    identity = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if drop else {}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        return subprocess.Popen(
            command,
            bufsize=0,
            cwd=cwd,
            env=env or {},
            pass_fds=pass_fds,
            start_new_session=True,
            **pipes,  # type: ignore[arg-type]
            **identity,  # type: ignore[arg-type]
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        as_root = " Root cannot become nobody here: run as an ordinary user." if drop else ""
        raise SandboxError(f"cannot start {command[0]}: {error}.{as_root} {ALLOW}") from error
