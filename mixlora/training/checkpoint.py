"""Checkpoints that are whole or absent: safetensors and JSON, a manifest written last, then a rename.

A folder is a checkpoint if and only if its manifest is there and every file has the size and sha256 that it says. What
dropout and data order need is a function of (seed, step), so no generator state is stored.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from mixlora import ranks
from mixlora.errors import CheckpointError
from mixlora.failpoints import reach
from mixlora.records import read_json, sync_folder, write_bytes, write_json

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name (adapter and optimizer) and everything else that resumption needs, after `step` steps."""

    step: int
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write `folder/step-N` beside its name, rename it, then remove all but the newest `keep`."""
    final = folder / f"step-{checkpoint.step}"
    partial = folder / f"step-{checkpoint.step}.tmp-{os.getpid()}"
    clean(folder)
    partial.mkdir(parents=True)
    try:
        reach("checkpoint.adapter")
        write_bytes(partial / "adapter.safetensors", save_safetensors(on_cpu(checkpoint.adapter)))
        reach("checkpoint.optimizer")
        write_bytes(partial / "optimizer.safetensors", save_safetensors(on_cpu(checkpoint.optimizer)))
        reach("checkpoint.state")
        write_json(partial / "state.json", {"step": checkpoint.step, **checkpoint.state})
        reach("checkpoint.before_manifest")
        write_json(partial / MANIFEST, {p.name: fingerprint(p) for p in sorted(partial.iterdir())})
        reach("checkpoint.before_rename")
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        sync_folder(folder)
        reach("checkpoint.after_rename")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    prune(folder, keep)
    return final


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep`."""
    for old in steps(folder)[:-keep]:
        reach("checkpoint.prune")
        shutil.rmtree(old)


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def fingerprint(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def steps(folder: Path) -> list[Path]:
    """The checkpoints' folders, oldest first; temporary ones are not among them."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of)


def clean(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for stray in folder.glob("step-*.tmp-*"):
        shutil.rmtree(stray, ignore_errors=True)


def forget_after(folder: Path, step: int) -> None:
    """Remove what lies after the step that a run goes on from: a damaged one must not count among those kept."""
    for path in steps(folder):
        if step_of(path) > step:
            shutil.rmtree(path)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def damage(path: Path) -> str | None:
    """Why `path` is not a whole checkpoint; None when it is one."""
    if not (path / MANIFEST).is_file():
        return f"{path} has no {MANIFEST}"
    try:
        manifest = read_json(path / MANIFEST)
    except ValueError:
        return f"{path / MANIFEST} is not JSON"
    for name, expected in manifest.items():
        if not (path / name).is_file():
            return f"{path / name} is missing"
        if fingerprint(path / name) != expected:
            return f"{path / name} does not match its sha256"
    return None


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint and what is wrong with the ones after it."""
    wrong: list[str] = []
    for path in reversed(steps(folder)):
        reason = damage(path)
        if reason is None:
            return path, wrong
        wrong.append(reason)
    return None, wrong


def read(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: it is damaged, naming the file.
    """
    reason = damage(path)
    if reason is not None:
        raise CheckpointError(f"{reason}. Use an earlier checkpoint, or resume=null for the newest whole one")
    state = read_json(path / "state.json")
    adapter = load_safetensors((path / "adapter.safetensors").read_bytes())
    optimizer = load_safetensors((path / "optimizer.safetensors").read_bytes())
    return Checkpoint(state.pop("step"), adapter, optimizer, state)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """AdamW's moments and step counts by the name of their parameter, whole on every rank."""
    return {
        f"{names[parameter]}|{key}": ranks.whole(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], names: Mapping[Tensor, str]
) -> None:
    parameters = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
    for full, value in tensors.items():
        name, _, key = full.rpartition("|")
        parameter = parameters[name]
        # AdamW keeps its step count, the one value without a dimension, on the CPU.
        optimizer.state[parameter][key] = ranks.spread_as(parameter, value) if value.dim() else value
