"""How far from what it was trained on an adapter may be used."""

from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.policy.reach import ONLY_TRAINED, PASSED, closeness, may_use, reach

NAN = float("nan")

exams = st.lists(st.tuples(st.sampled_from([-0.5, 0.0, 0.25, 0.5, 0.75, 1.0]), st.floats(0, 1)), max_size=30)


def unit(*degrees: float) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Unit vectors at these angles, [n, 2]."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


# --- closeness -------------------------------------------------------------------------------------------------------


def test_closeness_is_the_cosine_to_the_nearest() -> None:
    assert closeness(unit(50)[0], unit(0, 90, 180)) == (1, pytest.approx(np.cos(np.radians(40)), abs=1e-6))


def test_what_was_stored_in_half_precision_is_still_the_same_question() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    stored = vectors.astype(np.float16)
    assert all(closeness(vector, stored) == (place, 1.0) for place, vector in enumerate(vectors))
    other = closeness(vectors[0], stored[1:])
    assert other is not None
    assert other[1] < 0.5


def test_closeness_never_passes_one_and_of_equals_the_first_is_nearest() -> None:
    longer = np.float32(1.001) * unit(30, 30)
    assert closeness(longer[0], longer) == (0, 1.0)


def test_without_trained_questions_nothing_is_near() -> None:
    assert closeness(unit(0)[0], np.empty((0, 2), np.float16)) is None
    assert not may_use(unit(0)[0], np.empty((0, 0), np.float16), [], reach=-1.0)


# --- reach -----------------------------------------------------------------------------------------------------------


@given(exams, st.floats(0, 1), st.integers(1, 6))
def test_at_its_reach_enough_questions_kept_enough_and_at_no_lower_closeness(
    exam: list[tuple[float, float]], keep: float, enough: int
) -> None:
    found = reach([close for close, _ in exam], [f1 for _, f1 in exam], keep=keep, enough=enough)
    proven = {
        tau
        for tau, _ in exam
        if len(f1s := [f1 for close, f1 in exam if close >= tau]) >= enough and fmean(f1s) >= keep
    }
    assert found == min(proven, default=ONLY_TRAINED)


@given(exams, st.floats(0, 1))
def test_the_order_of_questions_does_not_matter(exam: list[tuple[float, float]], keep: float) -> None:
    there = reach([close for close, _ in exam], [f1 for _, f1 in exam], keep=keep, enough=2)
    back = reach([close for close, _ in exam[::-1]], [f1 for _, f1 in exam[::-1]], keep=keep, enough=2)
    assert there == back


def test_a_mean_just_at_what_is_asked_for_is_enough() -> None:
    assert reach([0.5] * 10, [0.85] * 10, keep=0.85) == 0.5
    assert reach([0.5] * 10, [0.85] * 9 + [0.84], keep=0.85) == ONLY_TRAINED


def test_few_questions_prove_nothing() -> None:
    assert reach([], [], keep=0.0) == ONLY_TRAINED
    assert reach([0.5] * 9, [1.0] * 9, keep=0.5) == ONLY_TRAINED
    assert reach([0.5] * 10, [1.0] * 10, keep=0.5) == 0.5


# --- use -------------------------------------------------------------------------------------------------------------


def test_an_adapter_is_used_within_its_reach_only() -> None:
    trained, far = unit(0, 90), float(np.cos(np.radians(30)))
    assert may_use(unit(30)[0], trained, [1.0, 1.0], reach=far - 0.01)
    assert not may_use(unit(30)[0], trained, [1.0, 1.0], reach=far + 0.01)


def test_an_adapter_that_reaches_nowhere_is_used_for_its_own_questions() -> None:
    trained = unit(0, 90).astype(np.float16)
    assert may_use(unit(90)[0], trained, [1.0, 1.0], reach=ONLY_TRAINED)
    assert not may_use(unit(80)[0], trained, [1.0, 1.0], reach=ONLY_TRAINED)


@pytest.mark.parametrize(("f1", "used"), [(PASSED, True), (PASSED - 0.01, False), (NAN, True)])
def test_a_failed_question_keeps_an_adapter_from_its_neighbourhood(f1: float, used: bool) -> None:
    f1s = np.array([1.0, f1], np.float32)
    assert may_use(unit(89)[0], unit(0, 90), f1s, reach=0.5) == used
    assert may_use(unit(1)[0], unit(0, 90), f1s, reach=0.5)
