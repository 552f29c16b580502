"""Synthetic loads whose specialisation is known."""

import numpy as np
import pytest

from mixlora.tables import specialisation as s
from mixlora.tables.report import top_k

E, T = 8, 4
COLLAPSED = np.array([[500.0, 500, 0, 0, 0, 0, 0, 0]] * T)
UNIFORM = np.full((T, E), 25.0)
PERFECT = np.kron(np.eye(T), np.ones((1, 2))) * 100  # each task has two experts of its own


def loads(load_TE: np.ndarray) -> dict[str, dict[str, list[float]]]:
    return {f"task{t}": {"model.layers.3.mlp.gate": row.tolist()} for t, row in enumerate(load_TE)}


def test_uniform():
    assert s.effective_experts(UNIFORM) == pytest.approx(E)
    assert s.mutual_information(UNIFORM) == pytest.approx(0, abs=1e-12)
    assert s.variation(UNIFORM) == pytest.approx(0)
    assert s.reading(s.gates(loads(UNIFORM), 2))[0].startswith("Not collapsed")


def test_collapsed():
    assert s.effective_experts(COLLAPSED) == pytest.approx(2)
    found = s.gates(loads(COLLAPSED), 2)
    assert found[0].collapsed
    assert found[0].idle == 6
    assert s.reading(found)[0].startswith("COLLAPSED: 1 of 1")


def test_perfectly_specialised_is_not_collapsed():
    found = s.gates(loads(PERFECT), 2)
    assert found[0].effective == pytest.approx(E)
    assert found[0].information == pytest.approx(found[0].most_information) == pytest.approx(2.0)
    assert not found[0].collapsed
    assert "Experts specialise" in s.reading(found)[-1]


def test_information_is_that_of_the_definition():
    load = np.random.default_rng(0).integers(1, 50, (3, 5)).astype(float)
    p = load / load.sum(1, keepdims=True) / 3
    slow = sum(p[t, e] * np.log2(p[t, e] / (p[t].sum() * p[:, e].sum())) for t in range(3) for e in range(5))
    assert s.mutual_information(load) == pytest.approx(slow)


def test_a_long_task_weighs_no_more_than_a_short_one():
    assert s.mutual_information(PERFECT * [[1], [10], [100], [1000]]) == pytest.approx(2.0)


def test_no_choice_is_neither_balanced_nor_collapsed():
    found = s.gates(loads(np.full((T, 2), 9.0)), 2)
    assert found[0].use is None
    assert "No gate leaves a choice" in s.reading(found)[0]
    assert "no gates" in s.reading(s.gates({}, 2))[0]


def test_a_task_without_tokens_is_left_out():
    assert s.mutual_information(np.vstack([PERFECT, np.zeros(E)])) == pytest.approx(2.0)


def test_what_a_task_prefers():
    name, expert, share, lift = s.preferred(loads(PERFECT))["task2"][0]
    assert (name, expert, share) == ("model.layers.3.mlp.gate", 4, 0.5)
    assert lift == pytest.approx(T)
    assert s.layer(name) == 3
    assert s.short("model.layers.0.self_attn.q_proj.gate") == "q_proj"


def test_no_task_prefers_anything_in_a_gate_that_sends_all_to_the_same_experts():
    """Be the first expert among them or idle."""
    for same in ([500, 0, 0, 500], [0, 0, 500, 500]):
        assert s.preferred({task: {"model.layers.0.gate": same} for task in "ab"}) == {"a": [], "b": []}


def test_a_pattern_of_top_k_goes_by_the_layer():
    """Four of eight experts, always the same, have collapsed where four are chosen, and not where one is."""
    same = [1, 1, 1, 1, 0, 0, 0, 0]
    found = {"task": {f"model.layers.{i}.q_proj.gate": same for i in range(4)}}
    first, *_, last = s.gates(found, [1, 4])
    assert (first.top_k, first.collapsed) == (1, False)
    assert (last.top_k, last.collapsed) == (4, True)


def test_a_gate_that_adds_up_probabilities_uses_one_expert_at_the_least():
    config = {"method": {"top_k": None, "num_experts": 6, "gate": {"kind": "entropy", "top_p": 0.75}}}
    assert top_k(config) == 1
    assert top_k({"method": {"top_k": None, "num_experts": 6, "gate": {"kind": "dense"}}}) == 6
