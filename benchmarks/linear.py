"""One linear, forward and backward: a mixture of 8 experts of rank 8, top-2, exact routing, against PEFT's LoRA r 64.

The last line has the ratios that have a goal. bfloat16 on a CPU without instructions for it is timed on few tokens, for
PyTorch's own product takes minutes there, and its times have no goal; float32 of the same size stands in for it.
"""

from functools import partial

import torch
from common import Row, arguments, comparable, emulated, interleaved, ratio, rounds_within, saved_bytes, say, write
from layers import GatherLoop, Linear, gated, lora, peft, products_alone, step

STAND_IN = "stands in for bfloat16"
TOKENS = 1024
# dtype, d, tokens that are timed
SHAPES = [("float32", 1024, TOKENS), ("float32", 2048, TOKENS), ("bfloat16", 4096, TOKENS)]
EMULATED = [*SHAPES[:2], ("bfloat16", 4096, 16), ("float32", 4096, TOKENS)]
QUICK = [("float32", 256, 64), ("bfloat16", 256, 64)]


def main() -> None:
    options = arguments(__doc__, budget=55.0)
    shapes = QUICK if options.quick else EMULATED if emulated("bfloat16", options.device) else SHAPES
    rows = [row for shape in shapes for row in measure(*shape, options)]
    path = write("linear", rows, options)
    print(f"written: {path}")
    judged = [r for r in rows if r.goal is not None or options.quick]
    print("; ".join(f"{r.setting} {r.figure.removeprefix('one linear: ')} {r.value:.3f} {r.verdict}" for r in judged))


def measure(name: str, d: int, tokens: int, options) -> list[Row]:
    dtype, device = getattr(torch, name), options.device
    stands_in = (name, d) == ("float32", 4096)
    loop_goal = 0.55 if name == "bfloat16" else 0.8

    def base() -> Linear:
        torch.manual_seed(0)
        return Linear(d).to(device, dtype)

    models = {
        "peft": peft(base(), 64),
        "gated": gated(base(), 8),
        "lora": lora(base(), 64),
        "products": products_alone(gated(base(), 8)),
        "loop": GatherLoop(base().lin, 8),
        "alone": base().requires_grad_(False),
        "peft_dropout": peft(base(), 64, 0.05),
        "gated_dropout": gated(base(), 8, 0.05),
    }
    x_TD, dy_TD = rows_of(tokens, d, dtype, device), rows_of(tokens, d, dtype, device)
    variants = {key: partial(step, model, x_TD, dy_TD) for key, model in models.items()}
    rounds = 2 if emulated(name, device) else rounds_within(options.budget, variants, 301, device)
    seconds = interleaved(variants, rounds, device)
    setting = f"{name} d {d}, {tokens} tokens"
    pairs = [  # ours, reference, goal, figure
        ("gated", "peft", 1.0, "/ PEFT LoRA"),
        ("gated", "loop", loop_goal, "/ gather loop"),
        ("gated", "lora", None, "/ our own LoRA"),
        ("lora", "peft", None, "LoRA / PEFT LoRA"),
        ("products", "peft", None, "products alone / PEFT LoRA"),
        ("gated_dropout", "peft_dropout", None, "dropout / PEFT's"),
        ("alone", "peft", None, "nothing adapted / PEFT LoRA"),
        ("alone", "loop", None, "nothing adapted / gather loop"),
    ]
    rows = []
    for ours, reference, goal, figure in pairs:
        judged = comparable(name, device, goal)
        if stands_in:
            judged["note"] = STAND_IN
        rows.append(ratio(f"one linear: {figure}", setting, seconds[ours], seconds[reference], **judged))
    x_TD, setting = rows_of(TOKENS, d, dtype, device), f"{name} d {d}, {TOKENS} tokens"
    kept = {key: saved_bytes(partial(model, x_TD), *model.parameters()) for key, model in models.items()}
    found = kept["gated"] / kept["peft"], kept["gated_dropout"] / kept["peft_dropout"], kept["gated"] / kept["loop"]
    for figure, value, goal in zip(
        ("/ PEFT", "with dropout / PEFT's", "/ loop"), found, (1.02, 0.55, None), strict=True
    ):
        rows.append(Row(f"one linear: saved bytes {figure}", setting, value, goal))
        say(rows[-1])
    return rows


def rows_of(tokens: int, d: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(tokens, d, device=device, dtype=dtype, requires_grad=True)


if __name__ == "__main__":
    main()
