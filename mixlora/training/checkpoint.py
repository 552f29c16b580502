"""Checkpoints that are whole or absent: safetensors and JSON, a manifest written last, then a rename.

A folder is a checkpoint if and only if its manifest is there and every file has the size and sha256 that it says. What
dropout and data order need is a function of (seed, step), so no generator state is stored.
"""

import contextlib
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
from mixlora.adapters.files import require_same_tensors
from mixlora.errors import CheckpointError
from mixlora.failpoints import reach
from mixlora.records import read_json, read_lines, require_own, sync, write_bytes, write_json, write_lines

MANIFEST = "manifest.json"
FILES = {"adapter.safetensors", "optimizer.safetensors", "state.json"}


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name (adapter and optimizer) and everything else that resumption needs, after `step` steps."""

    step: int
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/step-N` beside its name, then rename it."""
    final = folder / f"step-{checkpoint.step}"
    partial = folder / f"step-{checkpoint.step}.tmp-{os.getpid()}"
    require_own(folder)
    clean(folder)
    partial.mkdir(parents=True)
    sync(folder.parent)
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
            remove(final)
        os.replace(partial, final)
        sync(folder)
        reach("checkpoint.after_rename")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def remove(path: Path) -> None:
    """Out of its name at once, so that half a folder never counts; what does not go now is a stray of the next save."""
    stray = path.with_name(f"{path.name}.tmp-{os.getpid()}-old")
    os.replace(path, stray)
    shutil.rmtree(stray, ignore_errors=True)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep`; where the disk refuses it, after the next checkpoint."""
    clean(folder)
    for old in steps(folder)[:-keep]:
        reach("checkpoint.prune")
        with contextlib.suppress(OSError):
            remove(old)


def prune_best(best: Path, folder: Path, keep: int = 0) -> None:
    """Remove the best adapters that no checkpoint in `folder` names: a run may go on from any of those.

    Args:
        keep: the step of one that stays: the run's own best, which may come from a checkpoint in another folder.
    """
    clean(best)
    if not steps(best):
        return
    named = {keep}
    for path in steps(folder):
        # Not `damage`, which reads every byte: one that cannot be read is nothing to go on from.
        with contextlib.suppress(ValueError, OSError):
            named.add(best_step(path))
    for old in steps(best):
        if step_of(old) not in named:
            with contextlib.suppress(OSError):
                remove(old)


def best_step(path: Path) -> int:
    """The step whose adapter was the best when this checkpoint was written; 0 for none."""
    return int(read_json(path / "state.json").get("totals", {}).get("best_step", 0))


def marks(path: Path) -> list[str]:
    """What a checkpoint is known by: its place, and its manifest, which stays the same where its run is moved."""
    manifest = path / MANIFEST
    return [str(path.resolve()), *([fingerprint(manifest)["sha256"]] if manifest.is_file() else [])]


def went_on_from(path: Path, asked_for: Path) -> bool:
    """Whether a checkpoint was written by a run that had been sent back to `asked_for` before."""
    before = read_json(path / "state.json").get("resumed_from") or []
    return not {*marks(asked_for)}.isdisjoint([before] if isinstance(before, str) else before)


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
            with contextlib.suppress(OSError):
                remove(path)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def damage(path: Path) -> str | None:
    """Why `path` is not a whole checkpoint that can be read; None when it is one."""
    try:
        return flaw(path)
    except OSError as error:
        return f"{error.filename or path} cannot be read ({str(error.strerror).lower()})"


def flaw(path: Path) -> str | None:
    """Why `path` is not a whole checkpoint; raises an OSError where the disk does not say."""
    if not path.is_dir():
        return f"{path} is not there"
    if not (path / MANIFEST).is_file():
        return f"{path} has no {MANIFEST}"
    try:
        manifest = read_json(path / MANIFEST)
    except ValueError:
        return f"{path / MANIFEST} is not JSON"
    if not isinstance(manifest, dict) or set(manifest) != FILES:
        return f"{path / MANIFEST} does not name {', '.join(sorted(FILES))}"
    for name, expected in manifest.items():
        if not (path / name).is_file():
            return f"{path / name} is missing"
        if fingerprint(path / name) != expected:
            return f"{path / name} does not match its sha256"
    return None


def newest(folder: Path, best: Path | None = None) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint and what is wrong with the ones after it.

    Where a run keeps its best adapter in `best`, the one that a checkpoint names must be whole as well.
    """
    wrong: list[str] = []
    for path in reversed(steps(folder)):
        reason = damage(path) or (damage_of_best(path, best) if best else None)
        if reason is None:
            return path, wrong
        wrong.append(reason)
    return None, wrong


def damage_of_best(path: Path, best: Path) -> str | None:
    step = best_step(path)
    reason = damage(best / f"step-{step}") if step else None
    return reason and f"{path} names a best adapter, and {reason}"


def require_best(path: Path, best: Path) -> None:
    """Raise a CheckpointError where the adapter in `best` that a checkpoint names is not whole."""
    reason = damage_of_best(path, best)
    if reason is not None:
        raise CheckpointError(f"{reason}. Put it back, or choose another checkpoint")


def require_there(folder: Path) -> None:
    """Raise a CheckpointError where `folder` is a link to a disk that is not there: what lies there is not lost."""
    if folder.is_symlink() and not folder.exists():
        raise CheckpointError(
            f"{folder} is a link to {os.readlink(folder)}, which is not there. Put that back, or remove the link to "
            "begin again"
        )


def require_some(folder: Path) -> None:
    """Raise a CheckpointError where a checkpoint in `folder` is whole, and what is wrong with it lies elsewhere, or may
    be whole, and cannot be read now."""
    for path in steps(folder):
        try:
            flaw(path)
        except OSError:
            raise CheckpointError(f"{damage(path)}. Make it readable, or remove {folder} to begin again") from None
    whole, _ = newest(folder)
    reason = damage_of_best(whole, folder.parent / "best") if whole is not None else None
    if reason is not None:
        raise CheckpointError(f"{reason}. Put it back, or remove {folder} to begin again")


def adopt(path: Path, theirs: Path, folder: Path, *, with_best: bool) -> None:
    """Take over into `folder` what a checkpoint of another run folder builds on: metrics, and its best adapter.

    Raises:
        CheckpointError: the best adapter that it names is damaged or gone.
    """
    if with_best and best_step(path):
        require_best(path, theirs / "best")
        save(folder / "best", read(theirs / "best" / f"step-{best_step(path)}"))
    if (theirs / "metrics.jsonl").is_file():  # a copy of a checkpoint has none beside it: ours stay
        write_lines(folder / "metrics.jsonl", read_lines(theirs / "metrics.jsonl"))


def read(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: it is damaged, naming the file.
    """
    reason = damage(path)
    if reason is not None:
        near = (path, path / "checkpoints") if path.is_dir() else (path.parent,)  # a run folder was named, or a step
        meant = next((found for found, _ in map(newest, near) if found), None)
        remedy = f"Did you mean {meant}?" if meant else "Use an earlier one, or resume=null for the newest whole one"
        raise CheckpointError(f"{reason}. {remedy}")
    state = read_json(path / "state.json")
    adapter, optimizer = (tensors_in(path / f"{name}.safetensors") for name in ("adapter", "optimizer"))
    return Checkpoint(state.pop("step"), adapter, optimizer, state)


def tensors_in(path: Path) -> dict[str, Tensor]:
    """In the order of their names: safetensors gives them in one of its own in each process, and where a model is in
    shards all ranks must take up the same tensor at a time."""
    return dict(sorted(load_safetensors(path.read_bytes()).items()))


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """AdamW's moments and step counts by the name of their parameter, whole on every rank."""
    return {
        f"{names[parameter]}|{key}": ranks.whole(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_adapter(into: Mapping[str, Tensor], saved: Checkpoint) -> None:
    """Copy all tensors of the adapter or none of them; on every rank, where the model is in shards.

    Raises:
        CheckpointError: a name, a shape or a value that does not fit, naming the tensor.
    """
    remedy = (
        "Where another version of mixlora wrote it, finish the run with that one; else use an earlier checkpoint, or "
        "set run_dir to a new folder"
    )
    require_same_tensors(saved.adapter, into, f"adapter.safetensors of the checkpoint of step {saved.step}", remedy)
    with torch.no_grad():
        for name, tensor in saved.adapter.items():
            into[name].copy_(ranks.spread_as(into[name], tensor))


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], names: Mapping[Tensor, str]
) -> None:
    parameters = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
    for full, value in tensors.items():
        name, _, key = full.rpartition("|")
        parameter = parameters[name]
        # The step count, the one value without a dimension, lies whole on every rank.
        made = ranks.spread_as(parameter, value) if value.dim() else value.to(parameter.device)
        optimizer.state[parameter][key] = made
