"""A whole training step of every method, and its peak memory, against PEFT's LoRA of the same total rank in our loop.

Every linear is adapted and all sides have one dropout. CPU: SmolLM2-135M in float32, eight commonsense rows, packed.
GPU: a LLaMA of about 1B with random weights in bfloat16, 8 rows of 1024 tokens; one more step of each side is profiled.
Peak memory, of some methods also with model.gradient_checkpointing on both sides, is read on a CPU in a process of its
own for each variant (of the same shape with random weights, which are there at once, and rows of 128 random tokens), on
a GPU in this one, less what is there without the variant. Last come, with train.torch_compile, the methods that
--compiled names.
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
from statistics import median

import torch
from common import QUICK, Row, arguments, interleaved, ratio, rounds_within, say, write
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from training import (
    loaded,
    long_rows,
    lora_like,
    ours,
    peft_like,
    products_like,
    rows_from,
    total_ranks,
    trainer,
    training_rows,
)

from mixlora.adapters import targets
from mixlora.config.schema import Compute
from mixlora.training.recompute import enable_gradient_checkpointing

METHODS = ["mole", "mola", "dynmole", "hydralora", "smora", "mixlora"]
EVERY_LINEAR = {"dynmole": ["method.target_modules=all-linear"]}  # the others' files say so
GOALS = {"smora": 1.05, "mixlora": 1.10}
DROPOUT = 0.05
WITH_DROPOUT = ["mola", "mixlora"]
TWICE = ["mole", "mixlora"]
PRODUCTS = ["mole", "mola", "dynmole", "smora"]  # timed alone: a gate on each linear, and A as wide as B
TIMED_ONLY = {"lora", "products"}  # references, of which no memory is read
COMPILED = "mole,mixlora" if torch.cuda.is_available() else "" if QUICK else "mole"
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
        compiled=COMPILED,
        worker="",
        dropout=0.0,
        twice=0,
    )
    gpu = on_gpu(options.device)
    options.model = options.model or ("llama_1b" if gpu else "tiny" if options.quick else "smollm2_135m")
    options.where = options.model, options.device, "bfloat16" if gpu else "float32"
    if options.worker:
        print(json.dumps(peak(options.worker, options.methods, options.dropout, options.where, options.twice)))
        return
    rows: list[Row] = []
    measures = parts(options)
    if not measures:
        raise SystemExit(f"nothing to measure: --only {options.only} --methods {options.methods}")
    for measure in measures:
        rows += measure()
        # After each: the whole takes long, and may be cut off.
        path = write("steps", rows, options, rows_from=rows_from())
    print(f"written: {path}")


def parts(options) -> list[Callable[[], list[Row]]]:
    """What is measured, or --only some of it. What needs a compiler comes last, for there may be none."""
    gpu, methods, compiled = on_gpu(options.device), options.methods.split(","), options.compiled.split(",")
    asked = methods[-1:] if options.quick else methods
    found = {
        "time": [partial(times, method, 0.0, options) for method in methods]
        + [partial(times, method, DROPOUT, options) for method in methods if method in WITH_DROPOUT],
        "memory": [partial(memory, method, DROPOUT if gpu else 0.0, options) for method in asked]
        + [partial(memory, method, 0.0, options, twice=1) for method in asked if method in TWICE],
        "compiled": [partial(times, method, 0.0, options, compiled=True) for method in methods if method in compiled],
    }
    return found[options.only] if options.only else [measure for part in found.values() for measure in part]


def on_gpu(device: str) -> bool:
    return device.startswith("cuda")


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
    if method in PRODUCTS and not on_gpu(where[1]):
        found["products"] = partial(products_like, *where, method, dropout, *changed)
    return found


def setting(method: str, dropout: float, where: Where) -> str:
    ranks = total_ranks(*where, method, f"method.lora_dropout={dropout}", *EVERY_LINEAR.get(method, []))
    every, rank = targets.linears(loaded(*where).model), "/".join(map(str, sorted(set(ranks.values()))))
    model, _, dtype = where
    return f"{model} {dtype}, rank {rank} on {len(ranks)} of {len(every)} linears, dropout {dropout:g}"


def times(method: str, dropout: float, options, compiled: bool = False) -> list[Row]:
    gpu = on_gpu(options.device)
    examples = long_rows(1024, 64, 512) if gpu else training_rows(*options.where, 64)
    built = variants(method, dropout, options.where)
    loops = {name: trainer(build(), examples, 8) for name, build in built.items() if not compiled or name == "peft"}
    if compiled:
        loops |= {
            f"compiled {name}": trainer(build(), examples, 8, torch_compile=True)
            for name, build in built.items()
            if name not in ("lean", "products")
        }
    require_one_way({name: each.packed for name, each in loops.items()})
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
    of_peft = (None if method == "mixlora" else 0.85) if gpu else GOALS.get(method, 1.0)
    of_lora = 1.10 if gpu else None
    if dropout or (compiled and not gpu):
        of_peft = of_lora = None
    pairs = [
        ("fast", "peft", f"{method} / PEFT LoRA", of_peft),
        ("lean", "peft", f"{method} lean / PEFT LoRA", None),
        ("lora", "peft", "our own LoRA / PEFT LoRA", None),
        ("products", "peft", f"{method}, its products alone / PEFT LoRA", None),
        ("fast", "lora", f"{method} / our own LoRA", of_lora),
        ("compiled fast", "peft", f"{method}, layers compiled / PEFT LoRA", of_peft),
        ("compiled fast", "compiled peft", f"{method} / PEFT LoRA, layers of both compiled", None),
        ("compiled lora", "compiled peft", "our own LoRA / PEFT LoRA, layers of both compiled", None),
        ("compiled fast", "compiled lora", f"{method} / our own LoRA, layers of both compiled", of_lora),
    ]
    where = setting(method, dropout, options.where)
    rows = [
        ratio(f"step: {figure}", where, seconds[a], seconds[b], goal=goal)
        for a, b, figure, goal in pairs
        if {a, b} <= loops.keys()
    ]
    profiled = [name for name in loops if gpu and name.startswith("compiled") == compiled]
    return rows + [on_device(f"{method} {name}", where, seconds[name], runs[name]) for name in profiled]


def require_one_way(packed: dict[str, bool]) -> None:
    """Sides of which one alone packs its rows do not compute the same."""
    assert len(set(packed.values())) == 1, f"not all packed alike: {packed}"


def on_device(name: str, where: str, seconds: list[float], run: Callable[[], None]) -> Row:
    """What the profiler sees of one more step: milliseconds of the device, and how often it was asked for something."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    asked = [e for e in seen.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    busy, wall = (sum(e.time_range.elapsed_us() for e in asked) / 1e3), 1e3 * median(seconds)
    note = f"{len(asked)} kernels and copies; {wall:.1f} ms in all"
    row = Row(f"step: device busy in ms: {name}", where, busy, note=note)
    say(row)
    return row


def memory(method: str, dropout: float, options, twice: int = 0) -> list[Row]:
    where = SHAPES.get(options.model, options.model), *options.where[1:]
    gpu, described, found = on_gpu(options.device), setting(method, dropout, where), dict[str, dict[str, int]]()
    for name in (name for name in variants(method, dropout, where) if name not in TIMED_ONLY):
        read = peak if gpu else partial(peak_alone, options)
        found[name] = read(name, method, dropout, where, twice)
    require_one_way({name: bool(own["packed"]) for name, own in found.items()})
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


def peak_alone(options, name: str, method: str, dropout: float, where: Where, twice: int) -> dict[str, int]:
    """`peak` in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--worker", name, "--methods", method]
    command += ["--model", where[0], "--device", where[1], "--threads", str(options.threads)]
    command += ["--dropout", str(dropout), "--twice", str(twice), *["--quick"] * options.quick]
    done = subprocess.run(command, env=os.environ | EXACT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak(name: str, method: str, dropout: float, where: Where, twice: int) -> dict[str, int]:
    """Highest memory during a step, weights included, and how far that is above the memory before the first one."""
    gpu = on_gpu(where[1])
    examples = long_rows(16, 8, 8)  # a first short step makes the optimizer's state, which the second one has to carry
    examples += long_rows(1024, 8, 512) if gpu else long_rows(128, 8, 8)
    build = variants(method, dropout, where)[name]
    others = held_without(where) if gpu else 0
    built = build()
    if twice:
        enable_gradient_checkpointing(built[0])
    each = trainer(built, examples, 8)
    each.model.train()
    if not gpu:
        loaded.cache_clear()  # each variant is a copy; the model that it was copied from is in no one's training run
    before = held(gpu)
    for step in (1, 2):
        each.step(step)
    most = torch.cuda.max_memory_allocated() if gpu else resident("VmHWM")
    return {"peak": most - others, "growth": most - before, "packed": each.packed}


def held_without(where: Where) -> int:
    """Bytes of a GPU that are no variant's: the model that all are copies of, and what products work in."""
    loaded(*where)
    x_TD = torch.ones(8, 8, device=where[1], dtype=getattr(torch, where[2]), requires_grad=True)
    (x_TD @ x_TD).sum().backward()  # a work space for forward, and one for backward
    del x_TD
    return held(gpu=True)


def held(gpu: bool) -> int:
    """Bytes that are held now; the peak is counted from here on."""
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident("VmRSS")


def resident(field: str) -> int:
    """Bytes of this process, by the kernel's own count."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
