"""A feed-forward block of 8 experts, top-2, r 8, forward and backward, against LoRA r 64 on its three linears."""

import time
from functools import partial

import torch
from common import Row, arguments, interleaved, ratio, saved_bytes, say, write
from layers import Block, lora, mixture, peft, step
from linear import LIMIT, once

from mixlora.config.schema import Compute


def main() -> None:
    options = arguments(__doc__, budget=120.0)
    shapes = [("float32", 576, 1536), ("float32", 1024, 2816), ("bfloat16", 4096, 11008)]
    if options.quick:
        shapes = [("float32", 64, 96), ("bfloat16", 64, 96)]
    rows = [row for dtype, d, ff in shapes for row in measure(dtype, d, ff, options)]
    print(f"written: {write('feed_forward', rows, options)}")


def measure(name: str, d: int, ff: int, options) -> list[Row]:
    dtype, device = getattr(torch, name), options.device

    def base() -> Block:
        torch.manual_seed(0)
        return Block(d, ff).to(device, dtype)

    models = {"peft": peft(base(), 64), "lora": lora(base(), 64)}
    models |= {compute.value: mixture(base(), 8, compute) for compute in Compute}
    tokens = 64 if options.quick else 1024
    while tokens > 16 and once(models["peft"], tokens // 16, d, dtype, device) * 16 > 2 * LIMIT:
        tokens //= 2
    x_TD = torch.randn(tokens, d, device=device, dtype=dtype, requires_grad=True)
    variants = {key: partial(step, model, x_TD, torch.randn_like(x_TD)) for key, model in models.items()}
    began = time.perf_counter()
    for run in variants.values():
        run()
    rounds = 2 if options.quick else int(min(31, max(5, options.budget / (time.perf_counter() - began))))
    seconds = interleaved(variants, rounds, device)
    setting = f"{name} d {d} ff {ff}, {tokens} tokens"
    goals = {"fast": 1.05, "lean": 1.15, "eager": None}
    rows = []
    for key, goal in goals.items():
        goal = goal if name == "bfloat16" else None
        rows.append(ratio(f"feed-forward: {key} / PEFT LoRA", setting, seconds[key], seconds["peft"], goal=goal))
        rows.append(ratio(f"feed-forward: {key} / our own LoRA", setting, seconds[key], seconds["lora"]))
    kept = {key: saved_bytes(partial(model, x_TD), *model.parameters()) for key, model in models.items()}
    for key in goals:
        goal = 0.56 if key == "lean" and name == "bfloat16" else None
        rows.append(Row(f"feed-forward: saved bytes of {key} / PEFT", setting, kept[key] / kept["peft"], goal))
        say(rows[-1])
    return rows


if __name__ == "__main__":
    main()
