"""Where boxed processes come from: bubblewrap, or, where a user accepts it, no box at all.

bubblewrap gives new user, mount, pid, network, ipc, uts and cgroup namespaces; a file system of the system's shared
libraries, a bare Python (read-only), an empty folder of bounded size, and nothing else (no /proc, no /etc, no shell);
no capabilities, no environment; the system calls of `seccomp.py`. Limits are set inside, before any generated code.
"""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Protocol

from mixlora.errors import SandboxError
from mixlora.evaluation.sandbox import interpreter, seccomp
from mixlora.evaluation.sandbox.boxes import Box, Limits

NOBODY = 65534
INSTALL = "Install bubblewrap: apt-get install bubblewrap (or dnf, pacman, apk)."
ALLOW = (
    "Allow user namespaces: sysctl -w kernel.unprivileged_userns_clone=1 (older Debian), "
    "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu 24.04), "
    "docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined (Docker). "
    "In a container that is itself a sandbox: --i-accept-unsandboxed-code."
)
NAMESPACES = [f"--unshare-{name}" for name in ("user", "pid", "net", "ipc", "uts", "cgroup-try")]
PRIVILEGES = (
    f"--die-with-parent --as-pid-1 --new-session --clearenv --uid {NOBODY} --gid {NOBODY} --hostname box --cap-drop ALL"
).split()


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
    """bubblewrap's options that no sample changes; `python` is the bare copy.

    Python is pid 1 of its namespace: bubblewrap then reaps it, where its own pid 1 would be left to the host's init.
    """
    options = [*NAMESPACES, *PRIVILEGES]
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
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        options += ["--dev-bind", device, device]
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
    identity: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if drop else {}
    try:
        return subprocess.Popen(
            command,
            bufsize=0,
            cwd=cwd,
            env=env or {},
            pass_fds=pass_fds,
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **identity,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        as_root = " Root cannot become nobody here: run as an ordinary user." if drop else ""
        raise SandboxError(f"cannot start {command[0]}: {error}.{as_root} {ALLOW}") from error
