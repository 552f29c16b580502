"""What every benchmark shares: interleaved rounds, ratios, saved bytes, the machine, the result file."""

import argparse
import json
import logging
import math
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
BEGAN = time.perf_counter()
QUICK = "--quick" in sys.argv  # goals are for the full sizes
# Quartiles of a figure's ratios, over their median: further apart they hide a difference of some percent. Ratios are
# judged, not times: both sides of a round see the same rows and the same other programs, and its part in both cancels.
TOO_NOISY = 0.15
EMULATED = "emulated: not comparable"
# PEFT imports it where it is installed, and it says which kernels it lacks on a CPU; nothing here uses them.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


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
    least: float | None = None  # where the median of more such rounds would lie
    most: float | None = None
    rounds: int | None = None
    noisy: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        self.goal = None if QUICK else self.goal

    @property
    def verdict(self) -> str:
        """Against the goal: met or not met where the whole interval of the median says so, or there is no interval."""
        if self.goal is None:
            return ""
        ends = [end for end in (self.least, self.most) if end is not None] or [self.value]
        reached = {end >= self.goal if self.at_least else end <= self.goal for end in ends}
        if len(reached) > 1:
            return "too noisy" if self.noisy else "undecided"
        return "met" if reached.pop() else "not met"


def arguments(doc: str | None, **extra: Any) -> argparse.Namespace:
    """--quick, --device, --threads, --out, --commit, and what a script adds."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds and small sizes: shows that it runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a busy machine, one thread")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="of a copy that has no history to ask: its parts are put together by it")
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
    for _ in range(2):  # the first time of all is longer: memory is asked for, kernels are looked up
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
    """The median over rounds of ours / reference, with its spread; noisy where the quartiles are far apart."""
    ratios = [a / b for a, b in zip(ours, reference, strict=True)]
    value, found = statistics.median(ratios), spread(ratios)
    noisy = (found["high"] - found["low"]) / value > TOO_NOISY
    row = Row(figure, setting, value, **found, rounds=len(ratios), noisy=noisy, **options)
    say(row)
    return row


def spread(values: Sequence[float]) -> dict[str, float]:
    """The quartiles, and an interval of the median."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * list(values)
    least, most = interval(values)
    return {"low": low, "high": high, "least": least, "most": most}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median of what `values` are drawn from lies, with 95 % certainty whatever its distribution.

    The k-th value from below and from above, by the sign test; from fewer than six values the first and the last,
    which is less certain (94 % for five, 88 % for four).
    """
    ordered, n, k, below = sorted(values), len(values), 0, 0.5 ** len(values)
    while below <= 0.025:
        k += 1
        below += math.comb(n, k) * 0.5**n
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def say(row: Row) -> None:
    between = "" if row.least is None else f"  [{row.least:.3f}, {row.most:.3f}]"
    goal = "" if row.goal is None else f"  goal {'>=' if row.at_least else '<='} {row.goal:g}: {row.verdict.upper()}"
    noisy = "  (ratios far apart)" if row.noisy and row.verdict != "too noisy" else ""
    note = f"  ({row.note})" if row.note else ""
    print(f"{row.figure:58} {row.setting:34} {row.value:8.3f}{between}{goal}{noisy}{note}", flush=True)


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
    """results/NAME-DEVICE.json: the rows with where they were measured. Other figures of the same commit on the same
    machine stay, so that a script may be run a part at a time (--only, --methods)."""
    options.out.mkdir(parents=True, exist_ok=True)
    suffix = "-quick" if options.quick else ""
    path = options.out / f"{name}-{options.device.partition(':')[0]}{suffix}.json"
    noisy = sum(row.noisy for row in rows)
    if noisy:
        print(f"{noisy} of {len(rows)} figures have ratios too far apart over the rounds: do not believe their digits.")
    found = [asdict(row) | {"verdict": row.verdict} for row in rows]
    values = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        "quick": options.quick,
        "seconds": round(time.perf_counter() - BEGAN),
        "machine": machine(options),
        "rows": found,
        **extra,
    }
    measured_code = values["machine"]["commit"]
    if path.is_file() and measured_code is not None and "changes" not in measured_code:  # else it may be other code
        before = json.loads(path.read_text(encoding="utf-8"))
        same = ("device", "threads", "clock", "commit", "versions")
        if all(before["machine"].get(key) == values["machine"][key] for key in same):
            measured = {(row["figure"], row["setting"]) for row in found}
            kept = [row for row in before["rows"] if (row["figure"], row["setting"]) not in measured]
            values |= {"rows": kept + found, "seconds": values["seconds"] + (before["seconds"] if kept else 0)}
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
        "commit": commit() or options.commit,
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
    """What is checked out, and whether the code that is measured was changed since."""
    git = ["git", "-C", str(HERE.parent)]
    try:
        done = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except OSError:  # no git here
        return None
    if done.returncode:  # a copy of the files alone
        return None
    measured = ["mixlora", "configs", "benchmarks/*.py"]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *measured]).returncode
    return done.stdout.strip() + (" and changes" if changed else "")
