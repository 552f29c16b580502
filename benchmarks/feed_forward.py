"""A feed-forward block of 8 experts, top-2, r 8, forward and backward, against LoRA r 64 on its three linears.

Where bfloat16 has no instructions its times have no goal; a smaller block in float32 stands in for it.
"""

from functools import partial

import torch
from common import Row, arguments, comparable, emulated, interleaved, ratio, rounds_within, saved_bytes, say, write
from layers import Block, lora, mixture, peft, step
from linear import STAND_IN, TOKENS, rows_of

from mixlora.config.schema import Compute

# dtype, d, hidden, tokens that are timed
SHAPES = [("float32", 576, 1536, TOKENS), ("float32", 1024, 2816, TOKENS), ("bfloat16", 4096, 11008, TOKENS)]
EMULATED = [*SHAPES[:2], ("bfloat16", 4096, 11008, 4), ("float32", 2048, 5504, TOKENS)]
QUICK = [("float32", 64, 96, 64), ("bfloat16", 64, 96, 64)]


def main() -> None:
    options = arguments(__doc__, budget=90.0)
    shapes = QUICK if options.quick else EMULATED if emulated("bfloat16", options.device) else SHAPES
    rows = [row for shape in shapes for row in measure(*shape, options)]
    print(f"written: {write('feed_forward', rows, options)}")


def measure(name: str, d: int, ff: int, tokens: int, options) -> list[Row]:
    dtype, device = getattr(torch, name), options.device
    stands_in = (name, d) == ("float32", 2048)

    def base() -> Block:
        torch.manual_seed(0)
        return Block(d, ff).to(device, dtype)

    models = {"peft": peft(base(), 64), "lora": lora(base(), 64)}
    models |= {compute.value: mixture(base(), 8, compute) for compute in Compute}
    goals = {"fast": 1.05, "lean": 1.15, "eager": None}
    if emulated(name, device):
        del models["eager"], goals["eager"]  # a minute a step
    x_TD, dy_TD = rows_of(tokens, d, dtype, device), rows_of(tokens, d, dtype, device)
    variants = {key: partial(step, model, x_TD, dy_TD) for key, model in models.items()}
    rounds = 2 if emulated(name, device) else rounds_within(options.budget, variants, 61, device)
    seconds = interleaved(variants, rounds, device)
    setting = f"{name} d {d} ff {ff}, {tokens} tokens"
    rows = []
    for key, goal in goals.items():
        for reference, called, its in (("peft", "PEFT LoRA", goal), ("lora", "our own LoRA", None)):
            judged = comparable(name, device, its if name == "bfloat16" or stands_in else None)
            if stands_in:
                judged["note"] = STAND_IN
            figure = f"feed-forward: {key} / {called}"
            rows.append(ratio(figure, setting, seconds[key], seconds[reference], **judged))
    x_TD, setting = rows_of(TOKENS, d, dtype, device), f"{name} d {d} ff {ff}, {TOKENS} tokens"
    kept = {key: saved_bytes(partial(model, x_TD), *model.parameters()) for key, model in models.items()}
    for key in goals:
        goal = 0.56 if key == "lean" and name == "bfloat16" else None
        rows.append(Row(f"feed-forward: saved bytes of {key} / PEFT", setting, kept[key] / kept["peft"], goal))
        say(rows[-1])
    return rows


if __name__ == "__main__":
    main()
