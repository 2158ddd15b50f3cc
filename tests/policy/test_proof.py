"""When an export counts as proven."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge_rag.policy.proof import SLACK, TIMES, divergence, refuted

VOCABULARY = 40
logits = arrays.arrays(np.float32, VOCABULARY, elements=st.floats(-8, 8, width=32))


def top(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, float]:
    ids = np.argsort(values)[::-1][:count].astype(np.int32)
    return ids, values[ids], float(np.log(np.exp(values.astype(np.float64)).sum()))


@given(logits, st.integers(1, VOCABULARY))
def test_a_distribution_does_not_differ_from_itself(values: np.ndarray, count: int) -> None:
    assert divergence(*top(values, count), values) == pytest.approx(0, abs=1e-5)


@given(logits, st.floats(-5, 5))
def test_what_is_added_to_all_logits_changes_nothing(values: np.ndarray, shift: float) -> None:
    assert divergence(*top(values, 8), (values + shift).astype(np.float32)) == pytest.approx(0, abs=1e-4)


@given(logits, logits)
def test_over_all_tokens_it_is_the_kl(one: np.ndarray, other: np.ndarray) -> None:
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum() for x in (one, other))
    assert divergence(*top(one, VOCABULARY), other) == pytest.approx(float((p * np.log(p / q)).sum()), abs=1e-4)


@given(logits, logits, st.integers(1, VOCABULARY))
def test_it_is_never_negative(one: np.ndarray, other: np.ndarray, count: int) -> None:
    assert divergence(*top(one, count), other) >= -1e-6


def test_an_export_may_err_some_times_as_much_as_the_base_and_no_more() -> None:
    assert refuted([0.01], [TIMES * 0.01 + SLACK]) == ""
    assert "0.100 nats with the adapter, and by 0.010 without" in refuted([0.01, 0.01], [0.15, 0.05])


def test_an_exact_base_leaves_the_adapter_a_little_room() -> None:
    assert refuted([0.0], [SLACK]) == ""
    assert refuted([0.0], [2 * SLACK]) != ""
