"""The best set of arms: against all sets there are."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.policy.resident_set import Array, choose, losses, worth


def best_of_all(lift: Array, sizes: Array, tolls: Array, budget: float) -> float:
    sets = itertools.chain.from_iterable(itertools.combinations(range(len(sizes)), n) for n in range(len(sizes) + 1))
    return max(worth(some, lift, tolls) for some in sets if sizes[list(some)].sum() <= budget)


def instance(seed: int) -> tuple[Array, Array, Array, float]:
    """Random lifts of up to 8 arms of one size or several, with and without tolls."""
    rng = np.random.default_rng(seed)
    arms, requests = int(rng.integers(1, 9)), int(rng.integers(1, 13))
    lift = np.maximum(rng.normal(0, 1, (arms, requests)), 0)
    sizes = rng.integers(1, 6, arms).astype(np.float64) if seed % 2 else np.ones(arms)
    return lift, sizes, rng.uniform(0, 1, arms) * (seed % 3 == 0), float(rng.integers(0, 1 + int(sizes.sum())))


def test_what_is_chosen_is_worth_nine_tenths_of_the_best_set_at_least() -> None:
    for seed in range(200):
        lift, sizes, tolls, budget = instance(seed)
        chosen = choose(lift, sizes, tolls, budget)
        assert sizes[chosen].sum() <= budget
        assert worth(chosen, lift, tolls) >= 0.9 * best_of_all(lift, sizes, tolls, budget)


@given(st.integers(0, 10_000))
def test_every_arm_that_is_chosen_is_worth_its_toll(seed: int) -> None:
    lift, sizes, tolls, budget = instance(seed)
    chosen = choose(lift, sizes, tolls, budget)
    assert chosen == sorted(set(chosen))
    assert all(loss >= tolls[row] - 1e-9 for row, loss in zip(chosen, losses(chosen, lift), strict=True))


def one_request(*lifts: float) -> Array:
    return np.array(lifts, np.float64)[:, None]


def test_nothing_is_chosen_of_nothing_into_nothing_or_for_nothing() -> None:
    flat = np.ones(2)
    assert choose(np.zeros((0, 3)), np.zeros(0), np.zeros(0), 5) == []
    assert choose(one_request(1, 1), flat, 0 * flat, 0) == []
    assert choose(one_request(0, 0), flat, 0 * flat, 5) == []
    assert choose(one_request(1, 1), flat, 2 * flat, 5) == []
    assert choose(np.zeros((2, 0)), flat, 0 * flat, 5) == []


def test_what_is_larger_than_the_budget_is_not_chosen() -> None:
    assert choose(one_request(9, 1), np.array([6.0, 5.0]), np.zeros(2), 5) == [1]


def test_all_that_lift_anything_are_chosen_when_all_fit() -> None:
    assert choose(np.diag([1.0, 2.0, 0.0]), np.ones(3), np.zeros(3), 3) == [0, 1]


def test_of_equals_the_first_is_chosen() -> None:
    assert choose(one_request(1, 1, 1), np.ones(3), np.zeros(3), 1) == [0]


def test_one_large_arm_is_chosen_before_a_small_one_of_more_for_each_byte() -> None:
    assert choose(np.array([[1.0, 0.0], [0.0, 3.0]]), np.array([1.0, 4.0]), np.zeros(2), 4) == [1]


def test_two_small_arms_are_chosen_before_a_large_one_of_more_than_each() -> None:
    lift = np.array([[3.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0]])
    assert choose(lift, np.array([4.0, 2.0, 2.0]), np.zeros(3), 4) == [1, 2]


def test_an_arm_that_others_have_made_needless_is_exchanged() -> None:
    # The first is best alone, and then both halves of it are better together with another one.
    lift = np.array([[3.0, 3.0, 0, 0], [4.0, 0, 1.0, 0], [0, 4.0, 0, 1.0]])
    assert choose(lift, np.ones(3), np.zeros(3), 2) == [1, 2]


def test_an_arm_that_is_no_longer_worth_its_toll_is_left_out() -> None:
    lift = np.array([[3.0, 3.0, 0, 0], [4.0, 0, 1.0, 0], [0, 4.0, 0, 1.0]])
    assert choose(lift, np.ones(3), np.array([0.5, 0.0, 0.0]), 3) == [1, 2]


def test_the_worth_of_a_set_is_what_it_lifts_less_its_tolls() -> None:
    lift = np.array([[3.0, 1.0], [2.0, 2.0]])
    assert worth([0, 1], lift, np.array([0.5, 0.25])) == 4.25
    assert worth([], lift, np.zeros(2)) == 0
    assert losses([0, 1], lift) == pytest.approx([1.0, 1.0])
