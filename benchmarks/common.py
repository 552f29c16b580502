"""What every benchmark shares: interleaved rounds, ratios, saved bytes, the machine, the result file."""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
RESULTS = HERE / "results"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy")
CLOCK = [time.perf_counter]
QUICK = "--quick" in sys.argv  # goals are for the full sizes
# Quartiles of a figure's ratios, over their median: further apart they hide a difference of some percent. Ratios are
# judged, not times: both sides of a round see the same rows and the same other programs, and its part in both cancels.
TOO_NOISY = 0.15
EMULATED = "emulated: not comparable"


@dataclass
class Row:
    """One figure: a ratio (or another number), how far it spread, and what it should be."""

    figure: str
    setting: str
    value: float
    goal: float | None = None
    at_least: bool = False  # the goal is a lower bound
    low: float | None = None  # quartiles over the rounds
    high: float | None = None
    rounds: int | None = None
    noisy: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        self.goal = None if QUICK else self.goal

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def arguments(doc: str | None, **extra: Any) -> argparse.Namespace:
    """--quick, --device, --threads, --out, and what a script adds."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds and small sizes: shows that it runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a busy machine, one thread")
    parser.add_argument("--out", type=Path, default=RESULTS)
    for name, default in extra.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    found = parser.parse_args()
    if found.clock == "cpu":
        found.threads, CLOCK[0] = 1, time.process_time
    torch.set_num_threads(found.threads)
    return found


def interleaved(variants: Mapping[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every variant in every round; the order within a round is drawn anew. One round before is not kept."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order, generator = list(variants), random.Random(0)
    for round_ in range(rounds + 1):
        generator.shuffle(order)
        for name in order:
            synchronize(device)
            began = CLOCK[0]()
            variants[name]()
            synchronize(device)
            if round_:
                seconds[name].append(CLOCK[0]() - began)
    return seconds


def emulated(dtype: str, device: str) -> bool:
    """Whether PyTorch multiplies this type without instructions for it; our products run in float32 there."""
    return dtype == "bfloat16" and device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def comparable(dtype: str, device: str, goal: float | None) -> dict[str, Any]:
    """The goal of a ratio of times, or the note that says why it has none here."""
    return {"goal": None, "note": EMULATED} if emulated(dtype, device) else {"goal": goal}


def rounds_within(seconds: float, variants: Mapping[str, Callable[[], Any]], most: int, device: str) -> int:
    """As many rounds as take `seconds`, 5 at least, by the time of one round now; 2 with --quick."""
    synchronize(device)
    began = time.perf_counter()
    for run in variants.values():
        run()
    synchronize(device)
    return 2 if QUICK else int(min(most, max(5, seconds / (time.perf_counter() - began))))


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def ratio(figure: str, setting: str, ours: Sequence[float], reference: Sequence[float], **options: Any) -> Row:
    """The median over rounds of ours / reference, with its quartiles; noisy where they are far apart."""
    ratios = [a / b for a, b in zip(ours, reference, strict=True)]
    low, high = quartiles(ratios)
    value = statistics.median(ratios)
    noisy = (high - low) / value > TOO_NOISY
    row = Row(figure, setting, value, low=low, high=high, rounds=len(ratios), noisy=noisy, **options)
    say(row)
    return row


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4 - (len(ordered) == 4)]


def say(row: Row) -> None:
    spread = "" if row.low is None else f"  [{row.low:.3f}, {row.high:.3f}]"
    mark = {None: "", True: "met", False: "NOT MET"}[row.met]
    goal = "" if row.goal is None else f"  goal {'>=' if row.at_least else '<='} {row.goal:g} {mark}"
    noisy = "  (too noisy to believe)" if row.noisy else ""
    note = f"  ({row.note})" if row.note else ""
    print(f"{row.figure:58} {row.setting:34} {row.value:8.3f}{spread}{goal}{noisy}{note}", flush=True)


def saved_bytes(run: Callable[[], Any], *left_out: torch.Tensor) -> int:
    """Bytes of all storages that autograd keeps for backward, each counted once, parameters left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in left_out}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    del kept
    return sum(storage.nbytes() for pointer, storage in seen.items() if pointer not in known)


def write(name: str, rows: Sequence[Row], options: argparse.Namespace, **extra: Any) -> Path:
    """results/NAME-DEVICE.json: the rows with where they were measured."""
    options.out.mkdir(parents=True, exist_ok=True)
    suffix = "-quick" if options.quick else ""
    path = options.out / f"{name}-{options.device.partition(':')[0]}{suffix}.json"
    noisy = sum(row.noisy for row in rows)
    if noisy:
        print(f"{noisy} of {len(rows)} figures have ratios too far apart over the rounds: do not believe them.")
    values = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        "quick": options.quick,
        "machine": machine(options),
        "rows": [asdict(row) | {"met": row.met} for row in rows],
        **extra,
    }
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return path


def machine(options: argparse.Namespace) -> dict[str, Any]:
    cuda = options.device.startswith("cuda")
    return {
        "kind": options.device.partition(":")[0],
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "clock": options.clock,
        "load_average": os.getloadavg()[0],
        "bfloat16": cuda or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    done = subprocess.run(["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None
