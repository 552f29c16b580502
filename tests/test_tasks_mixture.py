"""Laws of the draw plan."""

import time

import numpy as np
import pytest

from mixlora.config.schema import Sampling
from mixlora.errors import ConfigError, DataError
from mixlora.tasks.mixture import plan, probabilities

SIZES = {"large": 900, "middle": 90, "small": 7}
EVEN = dict.fromkeys(SIZES, 1.0)


def draw(total=1000, *, sizes=SIZES, weights=EVEN, seed=0, **options):
    return plan(sizes, weights, total=total, seed=seed, **options)


def rows(drawn, task) -> list[int]:
    return [row for name, row in drawn.draws(0, len(drawn.row_N)) if name == task]


def test_one_epoch_takes_every_row_once():
    drawn = draw(sum(SIZES.values()))
    assert sorted(drawn.draws(0, 997)) == sorted((task, row) for task, n in SIZES.items() for row in range(n))
    assert {t: (d.rows, d.distinct, d.passes) for t, d in drawn.drawn().items()} == {
        t: (n, n, 1.0) for t, n in SIZES.items()
    }


@pytest.mark.parametrize("sampling", Sampling)
def test_every_stretch_has_the_right_shares(sampling):
    drawn = draw(2000, sampling=sampling, temperature=2.0)
    for length in (100, 500, 2000):
        counts = np.bincount(drawn.task_N[:length], minlength=3)
        wanted = length * np.array([drawn.shares[task] for task in drawn.tasks])
        assert np.abs(counts - wanted).max() <= len(SIZES)


def test_a_longer_plan_goes_on_from_a_shorter_one():
    assert draw(3000).draws(0, 800) == draw(800).draws(0, 800)


def test_a_plan_of_many_small_tasks_goes_on_as_well():
    """With many tasks one may be ahead of its share by more than a draw, since the others are behind theirs."""
    sizes = {"a": 900} | {f"b{i}": 10 for i in range(10)}
    for seed in range(60):
        short, long = (
            draw(n, sizes=sizes, weights=dict.fromkeys(sizes, 1.0), seed=seed).draws(0, 90) for n in (90, 900)
        )
        assert short == long


def test_every_pass_is_a_fresh_permutation():
    taken = rows(draw(1000, sampling=Sampling.equal), "small")
    passes = [taken[i : i + 7] for i in range(0, len(taken) - 6, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) > len(passes) / 2


def test_another_task_does_not_reorder_the_rows_of_the_others():
    few = rows(draw(500), "middle")
    many = rows(draw(3000, sizes=SIZES | {"new": 400}, weights=EVEN | {"new": 3.0}), "middle")
    shorter = min(len(few), len(many))
    assert shorter > 20
    assert few[:shorter] == many[:shorter]


def test_the_seed_decides_and_nothing_else():
    assert draw(300, seed=1).draws(0, 300) == draw(300, seed=1).draws(0, 300)
    assert draw(300, seed=1).draws(0, 300) != draw(300, seed=2).draws(0, 300)
    backwards = dict(reversed(SIZES.items()))
    assert draw(300, sizes=backwards).draws(0, 300) == draw(300).draws(0, 300)


def test_probabilities_are_weight_times_a_power_of_the_size():
    weights = {"large": 1.0, "middle": 2.0, "small": 0.0}
    sizes = {"large": 900, "middle": 100, "small": 5}

    def shares(sampling, **options):
        return [round(p, 6) for p in probabilities(sizes, weights, sampling=sampling, **options).values()]

    assert shares(Sampling.proportional) == [round(9 / 11, 6), round(2 / 11, 6), 0]
    assert shares(Sampling.equal) == [round(1 / 3, 6), round(2 / 3, 6), 0]
    assert shares(Sampling.temperature, temperature=2.0) == [0.6, 0.4, 0]
    assert shares(Sampling.proportional, size_cap=300) == [0.6, 0.4, 0]


def test_a_cap_uses_the_same_rows_under_every_seed():
    one, two = (draw(500, caps={"large": 50}, seed=seed) for seed in (0, 1))
    assert one.sizes["large"] == 50
    assert set(rows(one, "large")) == set(rows(two, "large")) != set(range(50))
    assert set(rows(draw(500, caps={"large": 20}), "large")) <= set(rows(one, "large"))


def test_a_weight_of_zero_is_never_drawn():
    assert not rows(draw(weights=EVEN | {"large": 0.0}), "large")


@pytest.mark.parametrize(
    ("error", "message", "values"),
    [
        (DataError, "task small has weight", {"sizes": SIZES | {"small": 0}}),
        (ConfigError, "sum to 0", {"weights": dict.fromkeys(SIZES, 0.0)}),
        (ConfigError, "sum to 0", {"sizes": {}, "weights": {}}),
        (ConfigError, "small.weight", {"weights": EVEN | {"small": -1.0}}),
        (ConfigError, "small.weight", {"weights": EVEN | {"small": float("nan")}}),
        (ConfigError, "tasks.temperature", {"temperature": 0.0}),
        (ConfigError, "tasks.size_cap", {"size_cap": 0}),
    ],
)
def test_what_cannot_be_drawn_is_named(error, message, values):
    with pytest.raises(error, match=message):
        draw(**values)


def test_a_million_draws_are_cheap():
    began = time.perf_counter()
    draw(1_000_000)
    assert time.perf_counter() - began < 5
