"""Where a training step, or one linear, spends what it takes more, or less, than PEFT's LoRA: products, or the rest.

The operators as PyTorch's profiler counts them, each kind's time as a part of PEFT's whole step. What is left
over is Python and the engine of autograd. The profiler makes small operators dearer than they are. On a CPU alone.
"""

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from common import Row, arguments, say, spread, write
from layers import Linear, gated, peft, step
from linear import TOKENS, rows_of
from steps import setting, variants
from torch.profiler import ProfilerActivity, profile
from training import trainer, training_rows

KINDS = {
    "choosing": ("topk", "sort", "scatter", "gather", "cumsum", "softmax", "sigmoid"),
    "attention": ("attention",),
    "products": ("mm", "linear", "matmul"),
    "copies": ("cat", "copy", "clone", "index", "fill", "zero", "stack", "split"),
}
OTHERS, REST = "other operators", "Python and autograd's engine"


def main() -> None:
    options = arguments(__doc__, model="", methods="mole,smora", rounds=3, d=1024)
    if options.device.startswith("cuda"):
        print("Left out: where.py, whose times are those of a CPU's operators (--device cpu).")
        return
    options.model = options.model or ("tiny" if options.quick else "smollm2_135m")
    options.rounds = 2 if options.quick else options.rounds
    options.where = options.model, options.device, "float32"
    methods = options.methods.split(",")[: 1 if options.quick else None]
    rows = linear(options.d, options)
    rows += [row for method in methods for row in steps(method, options)]
    print(f"written: {write('where', rows, options)}")


def linear(d: int, options) -> list[Row]:
    """The mixture of linear.py."""
    d = 64 if options.quick else d
    ours, theirs = gated(Linear(d), 8), peft(Linear(d), 64)
    x_TD, dy_TD = rows_of(TOKENS, d, torch.float32, options.device), torch.randn(TOKENS, d)
    pair = [lambda round_, model=model: step(model, x_TD, dy_TD) for model in (ours, theirs)]
    return differences("one linear", f"float32 d {d}, {TOKENS} tokens", *pair, 20 * options.rounds)


def steps(method: str, options) -> list[Row]:
    examples, built = training_rows(*options.where, 64), variants(method, 0.0, options.where)
    loops = [trainer(built[name](), examples, 8) for name in ("fast", "peft")]
    for loop in loops:
        loop.model.train()
    return differences(method, setting(method, 0.0, options.where), *(loop.step for loop in loops), options.rounds)


def differences(
    what: str, where: str, ours: Callable[[int], object], peft: Callable[[int], object], rounds: int
) -> list[Row]:
    """(ours - PEFT's) / PEFT's whole time, for each kind and in all, with the number of operators of both."""
    found: list[tuple[tuple[Counter, Counter], ...]] = []
    for round_ in range(1, rounds + 2):
        profiled = tuple(operators(partial(run, round_)) for run in (ours, peft))
        if round_ > 1:
            found.append(profiled)
    rows = []
    for kind in (*KINDS, OTHERS, REST, "all"):
        parts = [(mine[kind] - theirs[kind]) / theirs["all"] for (mine, _), (theirs, _) in found]
        note = " / ".join(str(number[kind]) for _, number in found[0]) + " operators"
        rows.append(Row(f"{what} - PEFT LoRA: {kind}", where, median(parts), **spread(parts), note=note))
        say(rows[-1])
    return rows


def operators(run: Callable[[], object]) -> tuple[Counter, Counter]:
    """Microseconds and numbers of operators by kind."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        began = time.perf_counter()
        run()
        whole = 1e6 * (time.perf_counter() - began)
    spent, number = Counter[str](), Counter[str]()
    for event in seen.key_averages():
        if event.key.startswith("aten::"):
            kind = kind_of(event.key.removeprefix("aten::"))
            spent[kind] += event.self_cpu_time_total
            number[kind] += event.count
    spent[REST] = whole - spent.total()
    spent["all"], number["all"] = whole, number.total()
    return spent, number


def kind_of(operator: str) -> str:
    """The first kind one of whose words is in the operator's name."""
    return next((kind for kind, words in KINDS.items() if any(word in operator for word in words)), OTHERS)


if __name__ == "__main__":
    main()
