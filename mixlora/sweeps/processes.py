"""One run as processes: the command that starts them on a machine, and the log they write."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import yaml

from mixlora.config.overrides import config_dir
from mixlora.config.schema import Launch
from mixlora.errors import ConfigError, MixloraError
from mixlora.signals import LAUNCHED

LOG_TAIL = 2**20  # bytes at the end of a log in which the message of a failed run is looked for


class Refused(MixloraError):
    """A point could not be started now; it may be later."""


@dataclass(frozen=True)
class Machine:
    """Which of a run's machines this is, and where its processes meet."""

    number: int = 0
    of: int = 1
    address: str = "localhost"
    port: int = 0


def command(arguments: Sequence[str], launch: Launch, machine: Machine) -> list[str]:
    """What starts one run's processes on one machine."""
    python, run = [sys.executable, "-m"], ["mixlora.train", *arguments]
    if launch.accelerate is None:
        if launch.processes == machine.of == 1:
            return [*python, *run]
        meet = ["--standalone"] if machine.of == 1 else [
            f"--nnodes={machine.of}", f"--node-rank={machine.number}", "--rdzv-backend=static",
            f"--rdzv-endpoint={machine.address}:{machine.port}",
        ]  # fmt: skip
        return [*python, "torch.distributed.run", *meet, f"--nproc-per-node={launch.processes}", "-m", *run]
    meet = ["--main_process_port=0"] if machine.of == 1 else [
        f"--machine_rank={machine.number}", f"--main_process_ip={machine.address}",
        f"--main_process_port={machine.port}",
    ]  # fmt: skip
    size = [f"--num_machines={machine.of}", f"--num_processes={machine.of * launch.processes}"]
    file = f"--config_file={accelerate_file(launch.accelerate)}"
    # All that the point was given: a file's own gpu_ids would stand over them.
    devices = "--gpu_ids=all"
    return [*python, "accelerate.commands.accelerate_cli", "launch", file, devices, *size, *meet, "-m", *run]


def accelerate_file(name: str) -> Path:
    """configs/distributed/NAME.yaml, or the file of that path.

    Raises:
        ConfigError: it is neither.
    """
    folder = Path(config_dir()) / "distributed"
    for path in (folder / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path.resolve()
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ConfigError(f"accelerate={name}: neither a file nor one of {known}")


def check_accelerate(launch: Launch) -> None:
    """That `accelerate` names a way to run so many processes.

    Raises:
        ConfigError: there is no such way, or it cuts a model into parts for one process.
    """
    if launch.accelerate is None:
        return
    path = accelerate_file(launch.accelerate)
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        said = None
    if not isinstance(said, dict):
        raise ConfigError(f"accelerate={launch.accelerate}: {path} is not what `accelerate config` writes")
    if said.get("distributed_type") == "FSDP" and launch.processes * launch.slurm.nodes == 1:
        raise ConfigError(
            f"accelerate={launch.accelerate} cuts the model into a part for each process, but a point has one. "
            "Set processes=N, the devices of a point, or leave accelerate out"
        )


def spawn(
    line: Sequence[str], output: IO[bytes], save_seconds: float, more: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    """Start what `command` has put together, in a session of its own.

    The terminal's Ctrl-C must reach a run once, through the place where it runs, which can also end the whole group.

    Args:
        save_seconds: that the run may take to save once it is told to end.
        more: of its environment.
    """
    return subprocess.Popen(
        line,
        stdout=output,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={**patience(save_seconds), **os.environ, "PYTHONUNBUFFERED": "1", LAUNCHED: "1", **more},
    )


def threads(processes: int) -> dict[str, str]:
    """Processes that share a machine share its cores, unless the user said how many threads each may have."""
    if processes == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // processes))}


def patience(seconds: float) -> dict[str, str]:
    """torchrun kills its ranks this long after it was told to end, a little before its own starter loses patience.

    Without it torch gives them 30 seconds for the step and its checkpoint.
    """
    return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, round(seconds) - 2))}


def size_of(log: Path) -> int:
    """Where what a run prints from now on begins: a log keeps every try."""
    with contextlib.suppress(OSError):
        return log.stat().st_size
    return 0


def last_line(log: Path, start: int) -> str:
    """What a failed run said after `start`: its own message where there is one, else the last line, or nothing: a disk
    that does not answer must not end the other runs of a sweep."""
    try:
        with open(log, "rb") as file:
            file.seek(max(start, size_of(log) - LOG_TAIL))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("mixlora: ")]
    return (own[-1].removeprefix("mixlora: ") if own else lines[-1])[:300] if lines else ""
