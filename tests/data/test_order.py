"""Which examples are used at which step."""

import itertools
from collections import Counter

import pytest

from data.order import indices_at


@pytest.mark.parametrize("count, prompts", [(12, 4), (13, 4), (7, 7), (1, 1), (100, 18)])
def test_an_epoch_uses_no_example_twice_and_leaves_less_than_a_step(count, prompts):
    steps = count // prompts
    for epoch in range(4):
        used = [
            i
            for step in range(epoch * steps, (epoch + 1) * steps)
            for i in indices_at(step, count, prompts, seed=3)
        ]
        assert len(used) == len(set(used)) == steps * prompts > count - prompts
        assert set(used) <= set(range(count)) and all(type(i) is int for i in used)


def test_a_function_of_seed_and_step_alone():
    forwards = [indices_at(step, 50, 8, 5) for step in range(40)]
    backwards = [indices_at(step, 50, 8, 5) for step in reversed(range(40))][::-1]
    assert forwards == backwards


def test_pinned():
    """A resumed run must find the order it left: this list may never change, with any numpy, on any
    machine."""
    assert [indices_at(step, 10, 3, seed=0) for step in (0, 1, 3)] == PINNED
    assert indices_at(1_000_000, 150_000, 4, seed=2**40 + 1) == PINNED_FAR


PINNED = [[0, 7, 8], [2, 5, 9], [9, 0, 6]]
PINNED_FAR = [51022, 146267, 38953, 14238]


def test_seeds_and_epochs_differ():
    orders = [
        tuple(i for step in range(5) for i in indices_at(5 * epoch + step, 20, 4, seed))
        for seed in range(10)
        for epoch in range(10)
    ]
    assert len(set(orders)) == 100
    assert indices_at(0, 1000, 50, seed=-1) != indices_at(0, 1000, 50, seed=1)


def test_every_example_is_as_likely_everywhere():
    """First index over 4000 seeds: chi-square, 9 degrees of freedom; 33.7 has probability 1e-4, and the
    seeds are fixed."""
    found = Counter(indices_at(0, 10, 1, seed)[0] for seed in range(4000))
    assert sum((found[i] - 400) ** 2 / 400 for i in range(10)) < 33.7


def test_rounds_are_orders_of_their_own():
    """Round 0 is what it was without rounds (`test_pinned`); each other is as different from it as another
    seed."""
    rounds = [tuple(indices_at(7, 10_000, 20, 0, round)) for round in range(30)]
    assert rounds[0] == tuple(indices_at(7, 10_000, 20, 0)) and len(set(rounds)) == 30
    # 29 pairs that share 0.04 each by chance
    assert sum(len(set(a) & set(b)) for a, b in itertools.pairwise(rounds)) < 10
    for round in range(3):
        used = [i for step in range(3) for i in indices_at(step, 12, 4, 3, round)]
        assert sorted(used) == list(range(12))


def test_left_over_examples_change():
    left = [
        set(range(13)) - {i for step in range(3) for i in indices_at(3 * epoch + step, 13, 4, 0)}
        for epoch in range(200)
    ]
    assert {len(x) for x in left} == {1} and set().union(*left) == set(range(13))


@pytest.mark.parametrize("step, count, prompts", [(0, 3, 4), (0, 0, 1), (-1, 9, 3), (0, 9, 0)])
def test_impossible_steps(step, count, prompts):
    with pytest.raises(ValueError, match="prompts"):
        indices_at(step, count, prompts, 0)
