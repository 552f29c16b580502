"""One linear, forward and backward: a mixture of 8 experts of rank 8, top-2, exact routing, against PEFT's LoRA r 64.

The last line has the ratios. bfloat16 on a CPU without instructions for it is measured on fewer tokens: PyTorch's own
product takes minutes there.
"""

import time
from functools import partial

import torch
from common import Row, arguments, interleaved, ratio, saved_bytes, say, write
from layers import GatherLoop, Linear, gated, lora, peft, step

LIMIT = 4.0  # seconds of one PEFT step


def main() -> None:
    options = arguments(__doc__, budget=60.0)
    shapes = [("float32", 1024), ("float32", 2048), ("bfloat16", 4096)]
    if options.quick:
        shapes = [("float32", 256), ("bfloat16", 256)]
    rows = [row for dtype, d in shapes for row in measure(dtype, d, options)]
    path = write("linear", rows, options)
    print(f"written: {path}")
    print("; ".join(f"{r.setting} {r.figure.removeprefix('one linear: ')} {r.value:.3f}" for r in rows))


def measure(name: str, d: int, options) -> list[Row]:
    dtype, device, bf16 = getattr(torch, name), options.device, name == "bfloat16"

    def base() -> Linear:
        torch.manual_seed(0)
        return Linear(d).to(device, dtype)

    tokens = 1024 if not options.quick else 64
    models = {
        "peft": peft(base(), 64),
        "gated": gated(base(), 8),
        "lora": lora(base(), 64),
        "loop": GatherLoop(base().lin, 8),
        "peft_dropout": peft(base(), 64, 0.05),
        "gated_dropout": gated(base(), 8, 0.05),
    }
    while tokens > 16 and once(models["peft"], tokens // 16, d, dtype, device) * 16 > LIMIT:
        tokens //= 2
    x_TD = torch.randn(tokens, d, device=device, dtype=dtype, requires_grad=True)
    dy_TO = torch.randn(tokens, d, device=device, dtype=dtype)
    variants = {key: partial(step, model, x_TD, dy_TO) for key, model in models.items()}
    began = time.perf_counter()
    for run in variants.values():
        run()
    rounds = 2 if options.quick else int(min(61, max(5, options.budget / (time.perf_counter() - began))))
    seconds = interleaved(variants, rounds, device)
    setting = f"{name} d {d}, {tokens} tokens"
    rows = [
        ratio("one linear: / PEFT LoRA", setting, seconds["gated"], seconds["peft"], goal=1.0),
        ratio("one linear: / gather loop", setting, seconds["gated"], seconds["loop"], goal=0.55 if bf16 else 0.8),
        ratio("one linear: / our own LoRA", setting, seconds["gated"], seconds["lora"]),
        ratio("one linear: LoRA / PEFT LoRA", setting, seconds["lora"], seconds["peft"]),
        ratio("one linear: dropout / PEFT's", setting, seconds["gated_dropout"], seconds["peft_dropout"]),
    ]
    kept = {key: saved_bytes(partial(model, x_TD), *model.parameters()) for key, model in models.items()}
    found = kept["gated"] / kept["peft"], kept["gated_dropout"] / kept["peft_dropout"], kept["gated"] / kept["loop"]
    for figure, value, goal in zip(
        ("/ PEFT", "with dropout / PEFT's", "/ loop"), found, (1.02, 0.55, None), strict=True
    ):
        rows.append(Row(f"one linear: saved bytes {figure}", setting, value, goal))
        say(rows[-1])
    return rows


def once(model, tokens: int, d: int, dtype: torch.dtype, device: str) -> float:
    x_TD = torch.randn(tokens, d, device=device, dtype=dtype, requires_grad=True)
    began = time.perf_counter()
    step(model, x_TD, torch.randn_like(x_TD))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
