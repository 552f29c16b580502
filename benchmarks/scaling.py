"""Step time of a gated linear against tokens, experts, rank and k, and of a small model against adapted linears.

A curve is as good as its worst point: time over the line between its neighbours (1 is straight).
"""

import time
from functools import partial

import torch
from common import Any, Row, arguments, interleaved, say, write
from layers import Linear, gated, ours, step
from torch import nn

from mixlora.config.schema import Method


def main() -> None:
    options = arguments(__doc__, budget=40.0, d=1024)
    d, T = (64, 32) if options.quick else (options.d, 512)

    def linear(r: int = 8, top_k: int = 2, num_experts: int = 8, tokens: int = T) -> Any:
        return partial(
            step, gated(Linear(d).to(options.device), r, 0.0, top_k, num_experts), *inputs(tokens, d, options.device)
        )

    curves = {
        "tokens": {n: linear(tokens=n) for n in (T // 2, T, 2 * T, 3 * T, 4 * T)},
        "experts": {n: linear(num_experts=n) for n in (2, 4, 8, 16, 32)},
        "rank of an expert": {n: linear(r=n) for n in (2, 4, 8, 16, 32)},
        "k": {n: linear(top_k=n) for n in (1, 2, 4, 8)},
        "adapted linears": {n: stack(n, d, T, options.device) for n in (0, 2, 4, 6, 8)},
    }
    rows, points = [], {}
    for name, variants in curves.items():
        began = time.perf_counter()
        for run in variants.values():
            run()
        rounds = 2 if options.quick else int(min(41, max(7, options.budget / (time.perf_counter() - began))))
        seconds = interleaved(variants, rounds, options.device)
        # The fastest quarter: other work on the machine only ever adds time.
        points[name] = {n: sorted(values)[len(values) // 4] for n, values in seconds.items()}
        rows += worst(name, points[name], rounds, f"d {d}, {T} tokens")
    print(f"written: {write('scaling', rows, options, curves=points)}")


def worst(name: str, curve: dict[int, float], rounds: int, setting: str) -> list[Row]:
    if name == "k":
        row = Row(
            "scaling: k, slowest / fastest", setting, max(curve.values()) / min(curve.values()), 1.02, rounds=rounds
        )
    else:
        off = 0.0
        for a, b, c in zip(list(curve)[:-2], list(curve)[1:-1], list(curve)[2:], strict=True):
            between = curve[a] + (curve[c] - curve[a]) * (b - a) / (c - a)
            off = max(off, curve[b] / between)
        row = Row(f"scaling: {name}, worst point / its neighbours' line", setting, off, 1.3, rounds=rounds)
    say(row)
    return [row]


def stack(adapted: int, d: int, tokens: int, device: str) -> Any:
    """Eight linears one after the other, of which some carry a mixture."""
    model: Any = nn.Sequential(*(nn.Linear(d, d, bias=False) for _ in range(8))).to(device).requires_grad_(False)
    if adapted:
        names = "|".join(map(str, range(adapted)))
        ours(model, Method(name="m", r=8, num_experts=8, top_k=2, gate={"kind": "topk"}, target_modules=f"({names})"))
    return partial(step, model, *inputs(tokens, d, device))


def inputs(tokens: int, d: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    x_TD = torch.randn(tokens, d, device=device, requires_grad=True)
    return x_TD, torch.randn(tokens, d, device=device)


if __name__ == "__main__":
    main()
