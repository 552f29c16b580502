"""Means, deviations and the paired test against slow or known answers."""

import itertools

import numpy as np
import pytest
from scipy import stats

from mixlora.tables import statistics


def test_one_seed_is_the_ordinary_paired_test():
    d = np.random.default_rng(0).normal(0.3, 1, (1, 40))
    mine, scipys = statistics.difference([d]), stats.ttest_1samp(d[0], 0)
    assert mine.p == pytest.approx(scipys.pvalue)
    assert mine.mean == pytest.approx(d.mean())


def test_equal_seeds_add_nothing():
    d = np.random.default_rng(1).normal(0.3, 1, (1, 40))
    assert statistics.difference([np.repeat(d, 3, 0)]).p == pytest.approx(statistics.difference([d]).p)


def test_seeds_that_disagree_make_one_less_sure():
    rng = np.random.default_rng(2)
    d = rng.normal(0.4, 0.5, (3, 200))
    assert statistics.difference([d]).p < 1e-6
    assert statistics.difference([d + np.array([[-0.6], [0.0], [0.6]])]).p > 0.2


@pytest.mark.parametrize(
    ("seeds", "points", "examples"), [(1, 0, 200), (3, 0, 200), (3, 1, 200), (3, 2, 200), (3, 2, 2000)]
)
def test_the_best_of_six_equal_methods_is_told_apart_from_another_in_five_of_a_hundred_tables(seeds, points, examples):
    """`points` is the deviation of a method's seeds. One seed knows nothing of it, as the legend of a table says."""
    rng = np.random.default_rng(0)
    alarms = sum(tells_apart(equal_methods(rng, seeds, points / 100, examples)) for _ in range(200))
    assert alarms / 200 <= 0.06


def equal_methods(rng: np.random.Generator, seeds: int, deviation: float, n: int) -> np.ndarray:
    """0/1 scores [6, seeds, n]: examples share a difficulty, but for what a method makes of it, and a seed."""
    share = rng.beta(1.2, 0.8, n) + rng.normal(0, 0.1, (6, n))
    return (rng.random((6, seeds, n)) < share[:, None] + rng.normal(0, deviation, (6, seeds, 1))).astype(float)


def tells_apart(scores: np.ndarray) -> bool:
    """Whether the best is told apart from any other, of all pairs."""
    best, pairs = int(scores.mean((1, 2)).argmax()), list(itertools.combinations(range(len(scores)), 2))
    seeds = statistics.usual(scores.mean(2))
    p = statistics.holm([statistics.difference([scores[a] - scores[b]], seeds).p for a, b in pairs])
    return any(value < 0.05 for value, pair in zip(p, pairs, strict=True) if best in pair)


def test_what_is_usual_is_what_seeds_vary_by_where_all_methods_vary_alike():
    found = [statistics.usual(np.random.default_rng(i).normal(0, 3, (6, 3))) for i in range(400)]
    assert np.median([one.variance for one in found]) == pytest.approx(2 * 3**2, rel=0.1)
    assert {one.freedom for one in found} == {10}


def test_one_method_that_fails_once_does_not_hide_what_the_others_differ_by():
    """Two calm methods ten points apart, beside three more and one that is at .8, .8 and .2."""
    rng = np.random.default_rng(6)
    means = np.array([[0.5] * 3, [0.6] * 3, [0.55] * 3, [0.56] * 3, [0.57] * 3, [0.8, 0.8, 0.2]])
    means[:5] += rng.normal(0, 0.003, (5, 3))
    a, b = ((rng.random((3, 4000)) < mean[:, None]).astype(float) for mean in means[:2])
    assert statistics.difference([b - a], statistics.usual(means)).p < 1e-6
    assert statistics.usual(means).variance < 0.02**2


def test_one_seed_or_two_methods_tell_nothing_of_what_is_usual():
    assert statistics.usual([[0.1], [0.2], [0.3]]) is None
    assert statistics.usual([[0.1, 0.2, 0.3], [0.3, 0.1, 0.2]]) is None
    assert statistics.usual([]) is None


def test_seeds_that_agree_by_chance_do_not_hide_that_the_others_do_not():
    d = np.random.default_rng(7).normal(0.05, 0.5, (3, 4000))
    calm, others = statistics.difference([d]), statistics.difference([d], statistics.Spread(0.04**2, 10))
    examples, seeds = d.mean(0).var(ddof=1) / 4000, 0.04**2 / 3
    assert others.error**2 == pytest.approx(examples + seeds)
    freedom = (examples + seeds) ** 2 / (examples**2 / 3999 + seeds**2 / 10)
    assert others.p == pytest.approx(2 * stats.t.sf(abs(d.mean()) / others.error, freedom))
    assert others.p > calm.p


def test_a_pair_that_varies_more_than_is_usual_is_judged_by_itself():
    d = np.random.default_rng(8).normal(0, 0.5, (3, 400)) + np.array([[0.0], [0.1], [0.2]])
    assert statistics.difference([d], statistics.Spread(1e-6, 10)) == statistics.difference([d])


def test_the_variance_is_the_sum_of_what_examples_and_seeds_add():
    d = np.random.default_rng(4).normal(0.1, 1, (3, 50))
    examples, seeds = d.mean(0).var(ddof=1) / 50, d.mean(1).var(ddof=1) / 3
    found = statistics.difference([d])
    assert found.error**2 == pytest.approx(examples + seeds)
    freedom = (examples + seeds) ** 2 / (examples**2 / 49 + seeds**2 / 2)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(d.mean()) / found.error, freedom))


def test_the_mean_of_tasks_weighs_tasks_and_not_examples():
    d = statistics.difference([np.ones((2, 10)), -np.ones((2, 1000))])
    assert d.mean == 0.0
    assert d.p == 1.0


def test_a_difference_without_spread_is_a_sign_test():
    assert statistics.difference([np.ones((1, 8))]).p == pytest.approx(2 / 2**8)
    assert statistics.difference([np.zeros((2, 8))]).p == 1.0


def test_different_numbers_of_seeds_are_refused():
    with pytest.raises(ValueError, match="same seeds"):
        statistics.difference([np.ones((1, 8)), np.ones((2, 8))])


def test_holm_is_what_the_book_says():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.9, 0.5]) == [1.0, 1.0]
    assert statistics.holm([0.02]) == [0.02]
    assert statistics.holm([]) == []


def test_a_single_value_has_no_deviation():
    assert statistics.mean_and_deviation([0.5]) == (0.5, None)
    assert statistics.mean_and_deviation([0.0, 1.0]) == (0.5, pytest.approx(0.5**0.5))


def test_pairs_are_by_seed_and_example():
    a, b = {0: {"x": 1.0, "y": 0.0}, 1: {"x": 1.0}}, {0: {"y": 1.0, "x": 1.0}, 2: {"x": 0.0}}
    assert statistics.paired(a, b).tolist() == [[0.0, -1.0]]
    assert statistics.paired({0: {"x": 1.0}}, {1: {"x": 1.0}}) is None
    assert statistics.paired({0: {"x": 1.0}}, {0: {"y": 1.0}}) is None
