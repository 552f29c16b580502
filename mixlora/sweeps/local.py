"""Points as processes on this machine, each with devices of its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mixlora import signals
from mixlora.config.schema import Launch
from mixlora.console import say
from mixlora.errors import ConfigError
from mixlora.sweeps.points import Point
from mixlora.sweeps.processes import Machine, command, last_line, size_of, spawn, threads

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

    def knows(self, point: Point) -> bool:
        return bool(point.in_use)

    def start(self, point: Point, log: Path) -> "Process":
        begins = size_of(log)
        if point.in_use:  # a second process would load its model beside it only to be turned away
            return Process(self, point, None, self.taken(devices_of_owner(point.folder)), log, begins)
        group = self.free.pop(0)
        shared = {} if group else threads(len(self.groups) * self.launch.processes)
        devices = {"CUDA_VISIBLE_DEVICES": ",".join(group)} if group else {}
        with open(log, "ab") as output:
            process = spawn(command(point.arguments, self.launch, Machine()), output, SAVE_SECONDS, shared | devices)
        return Process(self, point, process, [group], log, begins)

    def taken(self, devices: set[str] | None) -> list[list[str]]:
        """The free groups that a run on these devices leaves no room on, which are free no more; one, if unknown."""
        found = self.free[:1] if devices is None else [group for group in self.free if devices & set(group)]
        for group in found:
            self.free.remove(group)
        return found

    def leave(self, handles: "Sequence[Process]") -> str:
        own = {handle: handle.process for handle in handles if handle.process is not None}
        for process in own.values():  # before anything is said: the terminal may be closed
            process.send_signal(signal.SIGTERM)
        if own:
            say(f"Stopping {len(own)} runs as soon as they have saved; a second signal does not wait for them")
        ended = {handle: process.wait() for handle, process in own.items()}
        others = [handle.told(status) for handle, status in ended.items() if not handle.as_told(status)]
        but = f"\n{len(others)} of {len(own)} ended otherwise:\n" + "\n".join(others) if others else ""
        return f"the runs were stopped after saving; {signals.GOES_ON} from there{but}"


class Process:
    """One point that runs here, or that was found to run already, for another sweep or for one that is gone.

    Args:
        process: None where the point was found to run.
        groups: of devices, held until it ends.
        begins: where in its log this try begins.
    """

    def __init__(
        self,
        place: Local,
        point: Point,
        process: "subprocess.Popen[bytes] | None",
        groups: list[list[str]],
        log: Path,
        begins: int,
    ) -> None:
        self.place, self.point, self.process, self.groups = place, point, process, groups
        self.log, self.begins = log, begins
        self.state, self.silence = "running", "it printed nothing"
        if process is None:
            self.state, self.silence = "runs elsewhere", "the run that was found at it ended before it was finished"

    def poll(self) -> int | None:
        """The exit status, once nobody is at the point any more; the devices are free when this process has ended."""
        status = 1
        if self.process is not None:
            ended = self.process.poll()
            if ended is None:
                return None
            status = ended
            self.release()
        if status and self.point.in_use is not False:
            self.state = "runs elsewhere"
            return None
        self.release()
        return 0 if self.point.finished else status

    def as_told(self, status: int) -> bool:
        """Whether a run ended as a signal asks for; the status of torchrun and accelerate launch does not tell."""
        by_word = status == 1 and signals.GOES_ON in last_line(self.log, self.begins)
        return by_word or status in (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)

    def told(self, status: int) -> str:
        why = last_line(self.log, self.begins) or self.silence
        return f"  {self.point.name}: exit status {status}: {why}\n    log: {self.log}"

    def release(self) -> None:
        self.place.free += self.groups
        self.groups = []


def devices_of_owner(folder: Path) -> set[str] | None:
    """The devices of the run that owns `folder`, as far as they are of this machine; None where that is not known."""
    with contextlib.suppress(OSError, ValueError):
        owner = json.loads((folder / ".lock").read_text())
        if owner["host"] != socket.gethostname():
            return set()
        for variable in Path(f"/proc/{owner['pid']}/environ").read_text(errors="replace").split("\0"):
            name, _, devices = variable.partition("=")
            if name == "CUDA_VISIBLE_DEVICES" and devices:
                return {device.strip() for device in devices.split(",")}
    return None


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
