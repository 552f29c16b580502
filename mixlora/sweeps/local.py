"""Points as processes on this machine, each with devices of its own."""

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mixlora.config.schema import Launch
from mixlora.console import say
from mixlora.errors import ConfigError
from mixlora.records import in_use
from mixlora.sweeps.points import Point
from mixlora.sweeps.processes import Machine, command, patience, threads

SAVE_SECONDS = 120.0  # that the ranks of a run may take to save; as long, where one fails, the others may hang


class Local:
    """As many points at a time as there are groups of devices; on a CPU, `jobs` of them."""

    pause = 0.2  # seconds between two looks

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.groups = groups(visible_devices(), launch)
        self.free = list(self.groups)

    def describe(self) -> str:
        each = "" if not self.groups[0] else f" on {self.launch.processes} device(s) each"
        return f"{len(self.groups)} at a time{each}"

    def room(self) -> bool:
        return bool(self.free)

    def start(self, point: Point, log: Path) -> "Process":
        group = self.free.pop(0)
        shared = {} if group else threads(len(self.groups) * self.launch.processes)
        devices = {"CUDA_VISIBLE_DEVICES": ",".join(group)} if group else {}
        with open(log, "ab") as output:
            # A session of its own: the terminal's Ctrl-C must reach a run once, through `leave`.
            process = subprocess.Popen(
                command(point.arguments, self.launch, Machine()),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**patience(SAVE_SECONDS), **os.environ, "PYTHONUNBUFFERED": "1", **shared, **devices},
            )
        return Process(self, point, process, group)

    def leave(self, handles: "Sequence[Process]") -> str:
        if handles:
            say(f"Stopping {len(handles)} runs as soon as they have saved; a second signal does not wait for them")
        for handle in handles:
            handle.process.send_signal(signal.SIGTERM)
        for handle in handles:
            handle.process.wait()
        return "the runs were stopped after saving; the same command goes on from there"


class Process:
    """One point that runs here, or that was found to run already, for another sweep or for one that is gone."""

    def __init__(self, place: Local, point: Point, process: "subprocess.Popen[bytes]", group: list[str]) -> None:
        self.place, self.point, self.process = place, point, process
        self.group: list[str] | None = group
        self.state, self.silence = "running", "it printed nothing"

    def poll(self) -> int | None:
        """The exit status, once nobody is at the point any more; the devices are free when this process has ended."""
        status = self.process.poll()
        if status is None:
            return None
        if self.group is not None:
            self.place.free.append(self.group)
            self.group = None
        if status and in_use(self.point.folder):
            self.state = "runs elsewhere"
            return None
        return 0 if self.point.finished else status


def visible_devices() -> list[str]:
    """The accelerators as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()  # does not start CUDA in this process
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ([name.strip() for name in named.split(",")] if named else [str(i) for i in range(count)])[:count]


def groups(devices: list[str], launch: Launch) -> list[list[str]]:
    """The devices of each point that runs at the same time.

    Raises:
        ConfigError: there are too few.
    """
    if launch.slurm.nodes > 1:
        raise ConfigError(f"slurm.nodes={launch.slurm.nodes} needs launcher=slurm")
    if not devices:
        return [[] for _ in range(launch.jobs or 1)]
    size = launch.processes
    found = [devices[i : i + size] for i in range(0, len(devices) - size + 1, size)]
    if len(found) < (launch.jobs or 1):
        raise ConfigError(
            f"{launch.jobs or 1} point(s) at a time with {size} device(s) each need {size * (launch.jobs or 1)}; "
            f"this machine has {len(devices)}. Lower jobs or processes"
        )
    return found[: launch.jobs]
