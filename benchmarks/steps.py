"""A whole training step of every method, and its peak memory, against PEFT's LoRA of the same total rank in our loop.

CPU: SmolLM2-135M in float32, eight commonsense rows, packed. GPU: a LLaMA of about 1B with random weights in bfloat16,
8 rows of 1024 tokens. Peak memory is read in a process of its own for each variant.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import Row, arguments, interleaved, ratio, say, synchronize, write
from training import long_rows, ours, peft_like, trainer, training_rows

from mixlora.config.schema import Compute

METHODS = ["mole", "mola", "dynmole", "hydralora", "smora", "mixlora"]
GOALS = {"smora": 1.05, "mixlora": 1.10}


def main() -> None:
    options = arguments(__doc__, model="", methods=",".join(METHODS), budget=90.0, only="", worker="")
    gpu = options.device.startswith("cuda")
    options.model = options.model or ("llama_1b" if gpu else "tiny" if options.quick else "smollm2_135m")
    options.dtype = "bfloat16" if gpu else "float32"
    if options.worker:
        print(json.dumps(peak(options)))
        return
    methods = options.methods.split(",")
    rows = []
    if options.only in ("", "time"):
        rows += [row for method in methods for row in times(method, options)]
    if options.only in ("", "memory"):
        rows += [row for method in methods for row in memory(method, options)]
    print(f"written: {write('steps', rows, options)}")


def variants(method: str, options) -> dict:
    """Our forms, our own LoRA where it is a reference, and PEFT's LoRA."""
    where = options.model, options.device, options.dtype
    found = {"fast": lambda: ours(*where, method), "peft": lambda: peft_like(*where, method)}
    if method == "mixlora":
        found["lean"] = lambda: ours(*where, method, Compute.lean)
    if options.device.startswith("cuda"):
        found["peft_dropout"] = lambda: peft_like(*where, method, 0.05)
    return found


def loop(parts, options):
    gpu = options.device.startswith("cuda")
    rows = long_rows(1024, 64) if gpu else training_rows(options.model, options.device, options.dtype, 64)
    return trainer(parts, rows, 8)


def times(method: str, options) -> list[Row]:
    loops = {name: loop(build(), options) for name, build in variants(method, options).items()}
    counts = dict.fromkeys(loops, 0)

    def run(name: str) -> None:
        counts[name] += 1
        loops[name].step(counts[name])  # all variants see the same rows in the same round

    for each in loops.values():
        each.model.train()
    began = time.perf_counter()
    for name in loops:
        run(name)
    synchronize(options.device)
    rounds = 2 if options.quick else int(min(31, max(5, options.budget / (time.perf_counter() - began))))
    seconds = interleaved({name: lambda name=name: run(name) for name in loops}, rounds, options.device)
    gpu = options.device.startswith("cuda")
    goal = (None if method == "mixlora" else 0.85) if gpu else GOALS.get(method, 1.0)
    setting = f"{options.model} {options.dtype}"
    rows = [ratio(f"step: {method} / PEFT LoRA", setting, seconds["fast"], seconds["peft"], goal=goal)]
    for name in sorted(set(seconds) - {"fast", "peft"}):
        rows.append(ratio(f"step: {method} {name} / PEFT LoRA", setting, seconds[name], seconds["peft"]))
    return rows


def memory(method: str, options) -> list[Row]:
    peaks = {}
    for name in variants(method, options):
        command = [sys.executable, __file__, "--worker", name, "--methods", method, "--model", options.model]
        command += ["--device", options.device, "--threads", str(options.threads)] + ["--quick"] * options.quick
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[name] = json.loads(done.stdout.splitlines()[-1])
    gpu, setting = options.device.startswith("cuda"), f"{options.model} {options.dtype}"
    reference = "peft_dropout" if gpu else "peft"
    rows = []
    for name in sorted(set(peaks) - {"peft", "peft_dropout"}):
        goal = 0.6 if gpu else {"mixlora lean": 1.0, "mixlora fast": None}.get(f"{method} {name}", 1.02)
        value = peaks[name]["peak"] / peaks[reference]["peak"]
        note = json.dumps({k: round(v["peak"] / 2**20) for k, v in peaks.items()})
        rows.append(Row(f"peak memory of a step: {method} {name} / PEFT LoRA", setting, value, goal, note=note))
        say(rows[-1])
    return rows


def peak(options) -> dict[str, int]:
    """Highest memory during three steps, weights included; on a CPU the process's, counted from before the steps."""
    each = loop(variants(options.methods, options)[options.worker](), options)
    each.model.train()
    if options.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the kernel counts the peak from here on
    for step in range(1, 4):
        each.step(step)
    if options.device.startswith("cuda"):
        return {"peak": torch.cuda.max_memory_allocated()}
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return {"peak": 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))}


if __name__ == "__main__":
    main()
