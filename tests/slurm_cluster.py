"""A real SLURM on loopback, in a folder of its own: one controller, two nodes that are both this machine, own keys."""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
CONF = """\
ClusterName=loopback
SlurmctldHost={host}({address})
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr={address} Port={ports[1]} CPUs=2 RealMemory=8000
NodeName=zz-second NodeHostname=127.0.0.2 NodeAddr=127.0.0.2 Port={ports[2]} CPUs=2 RealMemory=8000
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=15
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


def lacking() -> str:
    """Why no cluster can be started here; empty where one can."""
    missing = [name for name in DAEMONS if where(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge"
    return "" if os.getuid() == 0 else "the daemons need root"


def where(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


class Cluster:
    """Up inside the block, gone after it. Commands reach it with `env`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = socket.gethostname()
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Cluster":
        try:
            self.up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def up(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        ports = free_ports(3)
        address = socket.gethostbyname(self.host)
        text = CONF.format(host=self.host, address=address, folder=self.folder, ports=ports)
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self.folder.chmod(0o755)
        self.start("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", f"--key-file={key}",
                   f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log",
                   f"--seed-file={self.folder}/munged.seed")  # fmt: skip
        self.wait_for(lambda: (self.folder / "munge.socket").exists(), "munged")
        self.start("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        for node in (self.host, "zz-second"):  # sorted: the one whose name resolves comes first
            self.start("slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf"))
        idle = ("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D")
        self.wait_for(lambda: self(*idle).strip() == "2", "two idle nodes")

    def __exit__(self, *error: object) -> None:
        subprocess.run(["scancel", "--user", "root"], env=self.env, capture_output=True)
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()

    def start(self, name: str, *arguments: str) -> None:
        path = where(name)
        assert path is not None
        with open(self.folder / f"{name}.out", "ab") as out:
            self.processes.append(subprocess.Popen([path, *arguments], env=self.env, stdout=out, stderr=out))

    def __call__(self, *command: str) -> str:
        """The output of one of SLURM's commands; empty where it failed."""
        return subprocess.run(command, env=self.env, capture_output=True, text=True).stdout

    def wait_for(self, done: "Callable[[], bool]", what: str, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < until, f"no {what} after {seconds:.0f} s, see {self.folder}"
            time.sleep(0.5)


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
