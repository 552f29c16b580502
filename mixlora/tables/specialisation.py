"""Who does what: how evenly a gate uses its experts, and how much an expert says about the task.

From a load table L [tasks, experts], the tokens of each task that chose each expert; tasks weigh the same:

    p(e | t) = L_te / Σ_e L_te        p(e) = mean over tasks of p(e | t)
    effective experts  exp H(E),  H(E) = −Σ_e p(e) ln p(e)      E when balanced, top_k when always the same are chosen
    specialisation     I(T; E) = Σ_te p(t) p(e | t) log2 (p(e | t) / p(e))  bits      0 when all tasks use the same
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Loads = Mapping[str, Mapping[str, Sequence[float]]]  # task -> gate -> load of each expert
COLLAPSED, UNEVEN = 0.15, 0.6  # of the way from top_k experts to all of them
SPECIALISED = 0.1  # of the bits that the tasks could tell


@dataclass(frozen=True)
class Gate:
    """One gate over all tasks."""

    name: str
    experts: int
    top_k: int  # experts that a token uses at the least
    effective: float
    information: float  # bits
    most_information: float  # bits that this many tasks and experts could have
    variation: float  # population standard deviation of the load over its mean
    idle: int  # experts that nobody chose

    @property
    def use(self) -> float | None:
        """0: always the same top_k experts; 1: all alike; None where a token has no choice."""
        if self.experts <= self.top_k:
            return None
        return float(np.clip((self.effective - self.top_k) / (self.experts - self.top_k), 0.0, 1.0))

    @property
    def collapsed(self) -> bool:
        return self.use is not None and self.use < COLLAPSED


def shares(load_TE: NDArray[np.float64]) -> NDArray[np.float64]:
    """p(e | t); tasks without a token are left out."""
    sums_T = load_TE.sum(1, keepdims=True)
    kept = sums_T[:, 0] > 0
    share_TE: NDArray[np.float64] = load_TE[kept] / sums_T[kept]
    return share_TE


def entropy(p_E: NDArray[np.float64]) -> float:
    """Nats."""
    p_E = p_E[p_E > 0]
    return float(-(p_E * np.log(p_E)).sum())


def effective_experts(load_TE: NDArray[np.float64]) -> float:
    share_TE = shares(load_TE)
    return float(np.exp(entropy(share_TE.mean(0)))) if len(share_TE) else 0.0


def mutual_information(load_TE: NDArray[np.float64]) -> float:
    """I(T; E) in bits."""
    share_TE = shares(load_TE)
    if not len(share_TE):
        return 0.0
    within = float(np.mean([entropy(p_E) for p_E in share_TE]))
    return max(0.0, (entropy(share_TE.mean(0)) - within) / float(np.log(2)))


def variation(load_TE: NDArray[np.float64]) -> float:
    """Standard deviation of p(e) over its mean: 0 is balanced."""
    share_TE = shares(load_TE)
    if not len(share_TE):
        return 0.0
    p_E = share_TE.mean(0)
    return float(p_E.std() / p_E.mean())


def gate(name: str, load_TE: NDArray[np.float64], top_k: int) -> Gate:
    T, E = load_TE.shape
    return Gate(
        name=name,
        experts=E,
        top_k=top_k,
        effective=effective_experts(load_TE),
        information=mutual_information(load_TE),
        most_information=float(np.log2(min(T, max(E / top_k, 1.0)))) if T > 1 else 0.0,
        variation=variation(load_TE),
        idle=int((load_TE.sum(0) == 0).sum()),
    )


def tables(loads: Loads) -> dict[str, NDArray[np.float64]]:
    """gate -> [tasks, experts]."""
    names = list(next(iter(loads.values()), {}))
    return {name: np.array([of[name] for of in loads.values()], dtype=np.float64) for name in names}


def parts(routing: Mapping[str, Any], top_k: int | Sequence[int]) -> tuple[Loads, dict[str, int]]:
    """routing.json: the loads, and how many experts of each gate a token uses at the least.

    Args:
        top_k: what is known of the second where the file is of an earlier version and holds the loads alone: one
            number, or a pattern that is stretched over the layers with a gate.
    """
    if "least_experts" in routing:
        return routing["loads"], routing["least_experts"]
    pattern, made = [top_k] if isinstance(top_k, int) else top_k, tables(routing)
    depth = 1 + max(map(layer, made), default=0)
    at_least = {name: pattern[layer(name) * len(pattern) // depth] for name in made}
    return routing, {name: min(at_least[name], load_TE.shape[1]) for name, load_TE in made.items()}


def gates(loads: Loads, least: Mapping[str, int]) -> list[Gate]:
    """Every gate, by layer. Empty for a method without gates.

    Args:
        least: gate -> experts that a token uses at the least; one where it is not said.
    """
    found = [gate(name, load_TE, least.get(name, 1)) for name, load_TE in tables(loads).items()]
    return sorted(found, key=lambda g: (layer(g.name), g.name))


def layer(name: str) -> int:
    """Number of the layer in a module's name: the first number in it."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else 0


def short(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.gate` -> `q_proj`."""
    parts = [part for part in name.split(".") if part != "gate"]
    return parts[-1] if parts else name


def by_layer(found: Sequence[Gate]) -> dict[int, list[Gate]]:
    layers: dict[int, list[Gate]] = {}
    for one in found:
        layers.setdefault(layer(one.name), []).append(one)
    return layers


def preferred(loads: Loads, top: int = 3) -> dict[str, list[tuple[str, int, float, float]]]:
    """task -> (gate, expert, p(e | t), p(e | t) / p(e)) where the task departs most from the mean of the tasks; nothing
    of a gate in which it has no expert more often than they."""
    found: dict[str, list[tuple[float, str, int, float, float]]] = {task: [] for task in loads}
    for name, load_TE in tables(loads).items():
        if (load_TE.sum(1) == 0).any():
            continue
        share_TE = shares(load_TE)
        mean_E = share_TE.mean(0)
        for t, task in enumerate(loads):
            more_E = share_TE[t] - mean_E
            e = int(np.argmax(more_E))
            if more_E[e] > 0:
                share = float(share_TE[t, e])
                found[task].append((float(more_E[e]), name, e, share, share / float(mean_E[e])))
    by_departure = {task: sorted(rows, key=lambda row: (-row[0], row[1])) for task, rows in found.items()}
    return {task: [row[1:] for row in rows[:top]] for task, rows in by_departure.items()}


def reading(found: Sequence[Gate]) -> list[str]:
    """What the numbers say, in plain words."""
    if not found:
        return ["This method has no gates: every token uses the whole adapter."]
    choosing = [g for g in found if g.use is not None]
    if not choosing:
        return ["No gate leaves a choice: every token uses every expert, so the load says nothing."]
    return [evenness(choosing), in_effect(choosing), *idle_line(choosing), by_task(choosing)]


def evenness(choosing: Sequence[Gate]) -> str:
    """Of gates that leave a choice, here and below."""
    collapsed = [g for g in choosing if g.collapsed]
    counted = f"{len(collapsed)} of {len(choosing)} gates send nearly every token to the same experts"
    if len(collapsed) > len(choosing) / 2:
        return f"COLLAPSED: {counted}."
    if collapsed:
        layers = sorted({layer(g.name) for g in collapsed})
        return f"Collapsed in part: {counted} (layers {', '.join(map(str, layers))})."
    if np.mean([g.use for g in choosing if g.use is not None]) < UNEVEN:
        return "Uneven: no gate has collapsed, but some experts do most of the work."
    return "Not collapsed: the experts share the work."


def in_effect(choosing: Sequence[Gate]) -> str:
    effective, experts = np.mean([g.effective for g in choosing]), np.mean([g.experts for g in choosing])
    return f"A gate uses {effective:.1f} of {experts:.1f} experts in effect (mean over {len(choosing)} gates)."


def idle_line(choosing: Sequence[Gate]) -> list[str]:
    idle, experts = sum(g.idle for g in choosing), sum(g.experts for g in choosing)
    return [f"{idle} of {experts} experts were chosen by no token."] if idle else []


def by_task(choosing: Sequence[Gate]) -> str:
    bits, most = np.mean([g.information for g in choosing]), np.mean([g.most_information for g in choosing])
    if most <= 0:
        return "One task only: nothing can be said about specialisation."
    if bits < SPECIALISED * most:
        return f"Experts do not specialise by task: {bits:.3f} of at most {most:.2f} bits."
    return f"Experts specialise by task: {bits:.3f} of at most {most:.2f} bits."
