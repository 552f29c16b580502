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


def gates(load_TE: np.ndarray, least: int = 2) -> list[s.Gate]:
    return s.gates(loads(load_TE), {"model.layers.3.mlp.gate": least})


def test_uniform():
    assert s.effective_experts(UNIFORM) == pytest.approx(E)
    assert s.mutual_information(UNIFORM) == pytest.approx(0, abs=1e-12)
    assert s.variation(UNIFORM) == pytest.approx(0)
    assert s.reading(gates(UNIFORM))[0].startswith("Not collapsed")


def test_collapsed():
    assert s.effective_experts(COLLAPSED) == pytest.approx(2)
    found = gates(COLLAPSED)
    assert found[0].collapsed
    assert found[0].idle == 6
    assert s.reading(found)[0].startswith("COLLAPSED: 1 of 1")


def test_perfectly_specialised_is_not_collapsed():
    found = gates(PERFECT)
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
    found = gates(np.full((T, 2), 9.0))
    assert found[0].use is None
    assert "No gate leaves a choice" in s.reading(found)[0]
    assert "no gates" in s.reading(s.gates({}, {}))[0]


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


def test_what_a_gate_uses_at_the_least_is_its_own_and_in_files_of_before_a_pattern_over_the_layers():
    """Four of eight experts, always the same, have collapsed where four are chosen, and not where one is."""
    same, names = [1, 1, 1, 1, 0, 0, 0, 0], [f"model.layers.{i}.q_proj.gate" for i in range(4)]
    found = {"task": dict.fromkeys(names, same)}
    for file, least in (
        (found, [1, 1, 4, 4]),
        ({"least_experts": dict.fromkeys(names, 1), "loads": found}, [1, 1, 1, 1]),  # those of a deeper model's first
    ):
        read = s.gates(*s.parts(file, [1, 4]))
        assert [(gate.top_k, gate.collapsed) for gate in read] == [(k, k == 4) for k in least]
    assert s.parts(found, 9)[1] == dict.fromkeys(names, 8)
    assert s.parts({}, 2) == ({}, {})


@pytest.mark.parametrize(
    ("tasks", "experts", "least", "bits"), [(2, 8, 1, 1), (8, 4, 2, 1), (8, 8, 1, 3), (1, 8, 1, 0)]
)
def test_no_more_bits_than_tasks_and_choices_can_tell(tasks, experts, least, bits):
    """Each task as far from the others as so many choices allow."""
    load = np.array([np.arange(experts) // least == t % (experts // least) for t in range(tasks)], dtype=float)
    (found,) = gates(load, least)
    assert found.most_information == pytest.approx(bits)
    assert found.information == pytest.approx(bits)


def test_variation_is_the_deviation_of_the_mean_share_over_its_mean():
    assert s.variation(np.array([[1.0, 3], [300, 100], [20, 60]])) == pytest.approx(1 / 6)  # 5/12 and 7/12
    assert s.variation(np.zeros((2, 4))) == 0


def test_a_task_prefers_most_where_it_departs_most_from_the_mean_of_all():
    """A greater share of its own, or a greater multiple, is not a greater departure; the third gate has no task a."""
    a = {"model.layers.0.gate": [90, 10, 0], "model.layers.1.gate": [0, 40, 60], "model.layers.2.gate": [0, 0, 0]}
    b = {"model.layers.0.gate": [80, 20, 0], "model.layers.1.gate": [0, 100, 0], "model.layers.2.gate": [1, 0, 0]}
    found = s.preferred({"a": a, "b": b})
    assert found["a"] == [
        ("model.layers.1.gate", 2, 0.6, pytest.approx(2)),
        ("model.layers.0.gate", 0, 0.9, pytest.approx(0.9 / 0.85)),
    ]
    assert [row[:2] for row in found["b"]] == [("model.layers.1.gate", 1), ("model.layers.0.gate", 1)]
    assert [row[:2] for row in s.preferred({"a": a, "b": b}, top=1)["a"]] == [("model.layers.1.gate", 2)]


ONE, EVEN = [100, 0, 0, 0], [25, 25, 25, 25]
SENTENCES = {
    "COLLAPSED: 2 of 3 gates send nearly every token to the same experts.": [[ONE], [ONE], [EVEN]],
    "Collapsed in part: 1 of 2 gates send nearly every token to the same experts (layers 1).": [[EVEN], [ONE]],
    "Uneven: no gate has collapsed, but some experts do most of the work.": [[[50, 50, 0, 0]], [[50, 50, 0, 0]]],
    "Not collapsed: the experts share the work.": [[EVEN], [[40, 30, 20, 10]]],
    "A gate uses 2.5 of 4.0 experts in effect (mean over 2 gates).": [[ONE], [EVEN]],
    "3 of 8 experts were chosen by no token.": [[ONE], [EVEN]],
    "One task only: nothing can be said about specialisation.": [[EVEN]],
    "Experts do not specialise by task: 0.000 of at most 1.00 bits.": [[EVEN, EVEN]],
    "Experts specialise by task: 1.000 of at most 1.00 bits.": [[[50, 50, 0, 0], [0, 0, 50, 50]]],
    "Experts specialise by task: 0.500 of at most 1.00 bits.": [[[50, 50, 0, 0], [0, 0, 50, 50]], [EVEN, EVEN]],
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_each_sentence_is_said_of_its_loads(sentence):
    """A list of gates, each of tasks, each of experts, of which a token uses one at the least."""
    tasks = zip(*SENTENCES[sentence], strict=True)
    found = {f"t{t}": {f"model.layers.{i}.gate": load for i, load in enumerate(of)} for t, of in enumerate(tasks)}
    assert sentence in s.reading(s.gates(found, {}))


def test_an_idle_expert_is_mentioned_where_there_is_one():
    assert not any("by no token" in line for line in s.reading(gates(UNIFORM)))


def test_a_gate_that_adds_up_probabilities_uses_one_expert_at_the_least():
    config = {"method": {"top_k": None, "num_experts": 6, "gate": {"kind": "entropy", "top_p": 0.75}}}
    assert top_k(config) == 1
    assert top_k({"method": {"top_k": None, "num_experts": 6, "gate": {"kind": "dense"}}}) == 6
