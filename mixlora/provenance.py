"""Where a run comes from and what it must share with the one it goes on from: commit, versions, device, differences."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mixlora.errors import CheckpointError
from mixlora.records import differences

PACKAGES = (
    "mixlora-train",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "hydra-core",
    "omegaconf",
    "safetensors",
)

EARLIER = {
    "earlier_commits": ("git_commit", "git_dirty"),
    "earlier_surroundings": ("packages", "python", "device", "threads"),
}


def surroundings(device: torch.device, more: Sequence[str] = ()) -> dict[str, Any]:
    """Commit, versions (of `more` packages as well) and device of this process."""
    return {
        **git_state(Path(__file__)),
        "packages": {name: version(name) for name in (*PACKAGES, *more)},
        "python": sys.version.split()[0],
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }


def with_earlier(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """`now`, after a part of the run that another process made and recorded as `before`.

    `earlier_commits` are the other states of the code that a part was made with, `earlier_surroundings` the other
    devices, threads and versions. A run is dirty where a part is; so a part's own flag speaks for those before it as
    well.
    """
    earlier = {name: parts for name, keys in EARLIER.items() if (parts := others(now, before, name, keys))}
    dirty = any(part["git_dirty"] for part in earlier.get("earlier_commits", []))
    return {**now, **earlier, "git_dirty": True if dirty else now["git_dirty"]}


def others(now: Mapping[str, Any], before: Mapping[str, Any], name: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """What both say of earlier parts under `name`, and the `keys` of `before` where they are not those of `now`."""
    found = list(before.get(name, []))
    found += [part for part in now.get(name, []) if part not in found]
    last = {key: before.get(key) for key in keys}
    return found if last in (*found, {key: now.get(key) for key in keys}) else [*found, last]


def same_origin(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that another configuration, world size, model or data left.

    Raises:
        CheckpointError: naming what differs, with both values where there is room.
    """
    differ = sorted(differences(saved, json.loads(json.dumps(now))).items())
    if differ:
        shown = [f"{key.removeprefix('config.')} was {old!s:.80}, now {new!s:.80}" for key, (old, new) in differ[:4]]
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(shown)}{'; ...' if differ[4:] else ''}. "
            "Use the old values, or leave resume out and set run_dir to a new folder"
        )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a run goes on with that it was not begun with; keys that only one side has are passed over."""
    known = {key: now[key] for key in before.keys() & now.keys()}
    differ = sorted(differences({key: before[key] for key in known}, json.loads(json.dumps(known))).items())
    return [f"{key.removeprefix('packages.')} {new!s:.80}, not {old!s:.80}" for key, (old, new) in differ]


def git_state(file: Path) -> dict[str, Any]:
    """Commit that `file` is of and whether tracked files differ from it; null where it is of none.

    A package that was installed into an environment inside somebody's checkout is of none.
    """

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(file.resolve().parent), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        tracked = git("ls-files", "--error-unmatch", file.name) is not None
        commit = git("rev-parse", "HEAD") if tracked else None
    except OSError:  # no git
        commit = None
    return {
        "git_commit": commit,
        "git_dirty": None if commit is None else bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's with the number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    processor = next(named, "") or platform.processor() or platform.machine()
    return f"{device.type} ({processor}, {os.cpu_count()} cores)"


def peak_memory(device: torch.device) -> int:
    """Bytes: of the accelerator where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
