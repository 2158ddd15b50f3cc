"""How much two answers say the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.policy.agreement import agreement, f1, squad_normalised

answers = st.lists(st.integers(0, 5), max_size=12)


@pytest.mark.parametrize(
    ("full", "spliced", "expected"),
    [
        pytest.param([1, 2, 3], [1, 2, 3], 1.0, id="equal"),
        pytest.param([1, 2, 3], [3, 1, 2], 1.0, id="another order"),
        pytest.param([1, 2], [3, 4], 0.0, id="nothing in common"),
        pytest.param([1, 2, 3, 4], [1, 2], 2 / 3, id="half of it: precision 1, recall 1/2"),
        pytest.param([1, 2], [1, 1, 1, 1], 1 / 3, id="a repeated token counts as often as both have it"),
        pytest.param([1, 1, 2], [1, 1, 3], 2 / 3, id="twice in both"),
        pytest.param([], [], 1.0, id="both silent"),
        pytest.param([1], [], 0.0, id="only one speaks"),
        pytest.param([], [1], 0.0, id="only the other speaks"),
    ],
)
def test_agreement_is_the_f1_of_the_tokens(full: list[int], spliced: list[int], expected: float) -> None:
    assert agreement(full, spliced) == pytest.approx(expected)


@given(answers, answers)
def test_agreement_is_a_share_the_same_both_ways_and_one_only_for_the_same_tokens(
    one: list[int], other: list[int]
) -> None:
    found = agreement(one, other)
    assert 0 <= found <= 1
    assert found == agreement(other, one)
    assert (found == 1) == (sorted(one) == sorted(other))
    assert (found == 0) == (set(one).isdisjoint(other) and one != other)


def test_normalisation_is_that_of_squad() -> None:
    assert squad_normalised("  The U.S.  Army's a-team, an Ox ") == "us armys ateam ox"
    assert squad_normalised("Theatre and another") == "theatre and another"


@pytest.mark.parametrize(
    ("said", "answers", "expected"),
    [
        pytest.param("Denver Broncos", ["the Denver Broncos"], 1.0, id="same"),
        pytest.param("Denver Broncos won", ["Denver Broncos"], 0.8, id="precision 2/3, recall 1"),
        pytest.param("Denver", ["Carolina", "Denver Broncos"], 2 / 3, id="the best answer counts"),
        pytest.param("very very big", ["very big"], 0.8, id="repeated words count as often as in both"),
        pytest.param("Panthers", ["Denver Broncos"], 0.0, id="nothing in common"),
        pytest.param("", ["Denver"], 0.0, id="nothing said"),
        pytest.param("the", ["a"], 1.0, id="nothing left on both sides"),
        pytest.param("x", [], 0.0, id="no answers"),
    ],
)
def test_f1(said: str, answers: list[str], expected: float) -> None:
    assert f1(said, answers) == pytest.approx(expected)
