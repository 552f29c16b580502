"""Where a whole training step spends what it takes more, or less, than PEFT's LoRA: products, or what is between them.

The operators of a step as PyTorch's profiler counts them, each kind's time as a part of PEFT's whole step. What is left
over is Python and the engine of autograd. The profiler makes small operators dearer than they are. On a CPU alone.
"""

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import median

from common import Row, arguments, say, spread, write
from steps import setting, variants
from torch.profiler import ProfilerActivity, profile
from training import trainer, training_rows

KINDS = {
    "choosing": ("topk", "sort", "scatter", "cumsum", "softmax", "masked_fill", "bitwise_not"),
    "attention": ("attention",),
    "products": ("mm", "linear", "matmul"),
    "copies": ("cat", "copy", "clone", "index", "gather", "fill", "zero", "stack", "split"),
}
OTHERS, REST = "other operators", "Python and autograd's engine"


def main() -> None:
    options = arguments(__doc__, model="", methods="mole,smora", rounds=3)
    if options.device.startswith("cuda"):
        print("Left out: where.py, whose times are those of a CPU's operators (--device cpu).")
        return
    options.model = options.model or ("tiny" if options.quick else "smollm2_135m")
    options.rounds = 2 if options.quick else options.rounds
    options.where = options.model, options.device, "float32"
    methods = options.methods.split(",")[: 1 if options.quick else None]
    rows = [row for method in methods for row in differences(method, options)]
    print(f"written: {write('where', rows, options)}")


def differences(method: str, options) -> list[Row]:
    """(ours - PEFT's) / PEFT's whole step, for each kind and in all, with the number of operators of both."""
    examples, built = training_rows(*options.where, 64), variants(method, 0.0, options.where)
    loops = {name: trainer(built[name](), examples, 8) for name in ("fast", "peft")}
    found: dict[str, list[tuple[Counter, Counter]]] = {name: [] for name in loops}
    for loop in loops.values():
        loop.model.train()
    for step in range(1, options.rounds + 2):
        for name, loop in loops.items():
            profiled = operators(partial(loop.step, step))
            if step > 1:
                found[name].append(profiled)
    where, rows = setting(method, 0.0, options.where), []
    for kind in (*KINDS, OTHERS, REST, "all"):
        pairs = list(zip(found["fast"], found["peft"], strict=True))
        parts = [(ours[0][kind] - peft[0][kind]) / peft[0]["all"] for ours, peft in pairs]
        note = f"{pairs[0][0][1][kind]} / {pairs[0][1][1][kind]} operators"
        rows.append(Row(f"{method} - PEFT LoRA: {kind}", where, median(parts), **spread(parts), note=note))
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
