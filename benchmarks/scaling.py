"""Step time of a gated linear against tokens, experts, rank and k, and of a small model against adapted linears.

A curve is as good as its worst point: time over the line through its two nearest neighbours in the same round (1 is
straight). They lie on both sides of a point, but for the first and the last one: a curve that grows faster and faster
lies under the line between its neighbours, and is found by its end.
"""

from functools import partial
from operator import truediv
from statistics import median

import torch
from common import Any, Row, arguments, interleaved, ratio, rounds_within, write
from layers import Linear, gated, ours, step
from torch import nn

from mixlora.config.schema import Method


def main() -> None:
    options = arguments(__doc__, budget=25.0, d=1024)
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
        rounds = rounds_within(options.budget, variants, 201, options.device)
        seconds = interleaved(variants, rounds, options.device)
        points[name] = {n: median(values) for n, values in seconds.items()}
        judged = slowest if name == "k" else worst
        rows.append(judged(name, seconds, f"d {d}, {T} tokens"))
    print(f"written: {write('scaling', rows, options, curves=points)}")


def slowest(name: str, seconds: dict[int, list[float]], setting: str) -> Row:
    """The slowest point over the fastest."""
    ordered = sorted(seconds.values(), key=median)
    return ratio(f"scaling: {name}, slowest / fastest", setting, ordered[-1], ordered[0], goal=1.02)


def worst(name: str, seconds: dict[int, list[float]], setting: str) -> Row:
    """The point that is highest over the line through its two nearest neighbours."""
    points, sides = list(seconds), []
    for i, n in enumerate(points):
        first = min(max(i - 1, 0), len(points) - 3)
        a, b = (point for point in points[first : first + 3] if point != n)
        lines = [t + (n - a) / (b - a) * (u - t) for t, u in zip(seconds[a], seconds[b], strict=True)]
        sides.append((seconds[n], lines))
    time, line = max(sides, key=lambda side: median(map(truediv, *side)))
    return ratio(f"scaling: {name}, worst point / its neighbours' line", setting, time, line, goal=1.3)


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
