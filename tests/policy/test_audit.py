"""Audits of spliced answers: how far two distributions are from each other, and what follows from audits."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.policy.audit import ENOUGH, LADDER, OFF, divergence, next_link

steps = st.sampled_from(LADDER)
pairs = st.lists(st.tuples(st.floats(-20, 20), st.floats(-20, 20)), min_size=1, max_size=30)


def naive_divergence(full: Sequence[float], other: Sequence[float]) -> float:
    """By the book: exp, sum, divide, log."""
    exact = [np.array(logits, np.float64) for logits in (full, other)]
    wanted, given = (np.exp(logits) / np.exp(logits).sum() for logits in exact)
    return sum(p * (math.log(p) - math.log(q)) for p, q in zip(wanted, given, strict=True) if p > 0)


def logits(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.array(values, np.float32)


# --- divergence ------------------------------------------------------------------------------------------------------


def test_divergence_is_in_nats_and_not_the_same_both_ways() -> None:
    even, uneven = logits([0.0, 0.0]), logits([math.log(3), 0.0])
    assert divergence(even, uneven) == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert divergence(uneven, even) == pytest.approx(0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))


@given(pairs)
def test_divergence_is_what_the_formula_says_and_never_negative(both: list[tuple[float, float]]) -> None:
    full, other = zip(*both, strict=True)
    found = divergence(logits(full), logits(other))
    assert found >= 0
    assert found == pytest.approx(naive_divergence(logits(full), logits(other)), rel=1e-6, abs=1e-9)


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=30), st.floats(-50, 50))
def test_equal_distributions_do_not_diverge_however_their_logits_are_shifted(values: list[float], shift: float) -> None:
    assert divergence(logits(values), logits(values)) == 0
    assert divergence(logits(values), logits([value + shift for value in values])) == pytest.approx(0, abs=1e-9)


def test_logits_that_would_overflow_do_not() -> None:
    assert divergence(logits([2000.0, -2000.0]), logits([2000.0, -2000.0])) == 0
    assert divergence(logits([1000.0, 0.0]), logits([0.0, 1000.0])) == pytest.approx(1000.0)


# --- what follows ----------------------------------------------------------------------------------------------------


@given(steps, st.lists(st.floats(0, 1), max_size=ENOUGH - 1))
def test_nothing_is_decided_before_there_are_enough_audits(link: int, few: list[float]) -> None:
    assert next_link(link, few, floor=1.0) == link


@given(steps, st.lists(st.floats(0, 1), min_size=ENOUGH, max_size=2 * ENOUGH), st.floats(0, 1))
def test_the_link_changes_only_when_the_mean_is_below_the_floor(link: int, found: list[float], floor: float) -> None:
    low = sum(found) / len(found) < floor
    assert (next_link(link, found, floor=floor) != link) == low


def test_a_mean_just_at_the_floor_is_good_enough() -> None:
    assert next_link(4, [0.5] * ENOUGH, floor=0.5) == 4
    assert next_link(4, [0.5] * ENOUGH, floor=0.51) == 8


def test_each_failure_is_a_step_up_the_ladder_and_at_its_end_nothing_is_moved() -> None:
    climbed = [LADDER[0]]
    while climbed[-1] != OFF:
        climbed.append(next_link(climbed[-1], [0.0] * ENOUGH, floor=0.4))
    assert climbed == [*LADDER, OFF]


@pytest.mark.parametrize(("own", "expected"), [(1, 4), (5, 8), (31, 32), (33, OFF), (256, OFF)])
def test_a_number_of_ones_own_goes_to_the_next_step_above_it(own: int, expected: int) -> None:
    assert next_link(own, [0.0] * ENOUGH, floor=0.4) == expected


def test_what_was_switched_off_stays_off() -> None:
    assert next_link(OFF, [0.0] * ENOUGH, floor=0.4) == OFF
