"""A whole training step of every method, and its peak memory, against PEFT's LoRA of the same total rank in our loop.

Every linear is adapted and all sides have one dropout. CPU: SmolLM2-135M in float32, eight commonsense rows, packed.
GPU: a LLaMA of about 1B with random weights in bfloat16, 8 rows of 1024 tokens. Peak memory is read in a process of its
own for each variant (on a CPU of the same shape with random weights, which are there at once, and rows of 128 random
tokens), of some methods also with model.gradient_checkpointing on both sides. On a GPU mole and PEFT's LoRA are also
measured with train.torch_compile; elsewhere the methods that --compiled names.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import Row, arguments, interleaved, ratio, rounds_within, say, write
from training import loaded, long_rows, lora_like, ours, peft_like, rows_from, total_ranks, trainer, training_rows

from mixlora.adapters import targets
from mixlora.config.schema import Compute
from mixlora.training.recompute import enable_gradient_checkpointing

METHODS = ["mole", "mola", "dynmole", "hydralora", "smora", "mixlora"]
EVERY_LINEAR = {"dynmole": ["method.target_modules=all-linear"]}  # the others' files say so
GOALS = {"smora": 1.05, "mixlora": 1.10}
DROPOUT = 0.05
WITH_DROPOUT = ["mola", "mixlora"]
TWICE = ["mole", "mixlora"]
# A CPU's memory is the kernel's count of pages, so what is freed must go back at once. glibc keeps it in its heap
# otherwise: a step of mole was 0.83 to 0.87 of PEFT's that way, and is 1.01 of it by what both ask for.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
# For memory, where weights do not matter: a GGUF file takes a minute to read.
SHAPES = {"smollm2_135m": "smollm2_135m_shape"}

Where = tuple[str, str, str]  # model, device, dtype


def main() -> None:
    options = arguments(
        __doc__,
        model="",
        methods=",".join(METHODS),
        budget=120.0,
        only="",
        compiled="",
        worker="",
        dropout=0.0,
        twice=0,
    )
    gpu = options.device.startswith("cuda")
    options.compiled = options.compiled or ("mole" if gpu else "")
    options.model = options.model or ("llama_1b" if gpu else "tiny" if options.quick else "smollm2_135m")
    options.where = options.model, options.device, "bfloat16" if gpu else "float32"
    if options.worker:
        print(json.dumps(peak(options)))
        return
    methods, measured = options.methods.split(","), list[Callable[[], list[Row]]]()
    if options.only in ("", "time"):
        measured += [partial(times, method, 0.0, options) for method in methods]
        measured += [partial(times, method, DROPOUT, options) for method in methods if method in WITH_DROPOUT]
    if options.only in ("", "memory"):
        asked = methods[-1:] if options.quick else methods
        measured += [partial(memory, method, DROPOUT if gpu else 0.0, options) for method in asked]
        measured += [partial(memory, method, 0.0, options, twice=1) for method in asked if method in TWICE]
    rows: list[Row] = []
    for measure in measured:
        rows += measure()
        # After each: the whole takes long, and may be cut off.
        path = write("steps", rows, options, rows_from=rows_from())
    print(f"written: {path}")


def variants(method: str, dropout: float, where: Where) -> dict:
    """Our forms, PEFT's LoRA, and our own LoRA where it is a reference."""
    changed = [f"method.lora_dropout={dropout}", *EVERY_LINEAR.get(method, [])]
    found = {
        "fast": partial(ours, *where, method, Compute.fast, *changed),
        "peft": partial(peft_like, *where, method, dropout, *changed),
    }
    if method == "mixlora":
        found["lean"] = partial(ours, *where, method, Compute.lean, *changed)
        found["lora"] = partial(lora_like, *where, method, dropout, *changed)
    return found


def setting(method: str, dropout: float, where: Where) -> str:
    ranks = total_ranks(*where, method, f"method.lora_dropout={dropout}", *EVERY_LINEAR.get(method, []))
    every, rank = targets.linears(loaded(*where).model), "/".join(map(str, sorted(set(ranks.values()))))
    model, _, dtype = where
    return f"{model} {dtype}, rank {rank} on {len(ranks)} of {len(every)} linears, dropout {dropout:g}"


def times(method: str, dropout: float, options) -> list[Row]:
    gpu = options.device.startswith("cuda")
    examples = long_rows(1024, 64, 512) if gpu else training_rows(*options.where, 64)
    loops = {name: trainer(build(), examples, 8) for name, build in variants(method, dropout, options.where).items()}
    if method in options.compiled.split(",") and not dropout:
        for name, build in variants(method, dropout, options.where).items():
            if name in ("fast", "peft"):
                loops[f"compiled {name}"] = trainer(build(), examples, 8, torch_compile=True)
    counts = dict.fromkeys(loops, 0)

    def run(name: str) -> None:
        counts[name] += 1
        loops[name].step(counts[name])  # all variants see the same rows in the same round

    for each in loops.values():
        each.model.train()
    runs = {name: partial(run, name) for name in loops}
    for name in runs:
        run(name)  # compiles what is to be compiled
    seconds = interleaved(runs, rounds_within(options.budget, runs, 31, options.device), options.device)
    goal = (None if method == "mixlora" else 0.85) if gpu else GOALS.get(method, 1.0)
    pairs = [("fast", "peft", f"{method} / PEFT LoRA", None if dropout else goal)]
    if method == "mixlora":
        pairs += [
            ("lean", "peft", "mixlora lean / PEFT LoRA", None),
            ("lora", "peft", "our own LoRA / PEFT LoRA", None),
        ]
        pairs += [("fast", "lora", "mixlora / our own LoRA", 1.10 if gpu and not dropout else None)]
    if "compiled fast" in loops:
        pairs += [
            ("compiled fast", "peft", f"{method}, layers compiled / PEFT LoRA", None),
            ("compiled fast", "compiled peft", f"{method} / PEFT LoRA, layers of both compiled", None),
        ]
    where = setting(method, dropout, options.where)
    return [ratio(f"step: {figure}", where, seconds[a], seconds[b], goal=goal) for a, b, figure, goal in pairs]


def memory(method: str, dropout: float, options, twice: int = 0) -> list[Row]:
    where = SHAPES.get(options.model, options.model), *options.where[1:]
    found: dict[str, dict[str, int]] = {}
    for name in (name for name in variants(method, dropout, where) if name != "lora"):
        command = [sys.executable, "-W", "ignore", __file__, "--worker", name, "--methods", method]
        command += ["--model", where[0], "--device", options.device]
        command += ["--threads", str(options.threads), "--dropout", str(dropout), "--twice", str(twice)]
        command += ["--quick"] * options.quick
        done = subprocess.run(command, env=os.environ | EXACT, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    gpu, described = options.device.startswith("cuda"), setting(method, dropout, where)
    peft, rows = found.pop("peft"), list[Row]()
    for name, own in found.items():
        goal = 0.6 if gpu else {"mixlora lean": 1.0, "mixlora fast": None}.get(f"{method} {name}", 1.02)
        goal, computed = (None, ", layers computed twice") if twice else (goal, "")
        for figure, what, its in (("peak memory", "peak", goal), ("growth to the peak", "growth", None)):
            note = f"{own[what] / 2**20:.0f} / {peft[what] / 2**20:.0f} MiB"
            figure = f"{figure} of a step{computed}: {method} {name} / PEFT LoRA"
            rows.append(Row(figure, described, own[what] / peft[what], its, note=note))
            say(rows[-1])
    return rows


def peak(options) -> dict[str, int]:
    """Highest memory during a step, weights included, and how far that is above the memory before the first one."""
    gpu = options.device.startswith("cuda")
    examples = long_rows(16, 8, 8)  # a first short step makes the optimizer's state, which the second one has to carry
    examples += long_rows(1024, 8, 512) if gpu else long_rows(128, 8, 8)
    built = variants(options.methods, options.dropout, options.where)[options.worker]()
    if options.twice:
        enable_gradient_checkpointing(built[0])
    each = trainer(built, examples, 8)
    each.model.train()
    loaded.cache_clear()  # each variant is a copy; the model that it was copied from is in no one's training run
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the kernel counts the peak from here on
        before = resident("VmRSS")
    for step in (1, 2):
        each.step(step)
    most = torch.cuda.max_memory_allocated() if gpu else resident("VmHWM")
    return {"peak": most, "growth": most - before}


def resident(field: str) -> int:
    """Bytes of this process, by the kernel's own count."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
