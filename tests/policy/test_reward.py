"""What answers were worth: words of short ones, meaning of long ones, refusals, weights, and a bound on floods."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.policy.agreement import f1
from edge_rag.policy.reward import SHORT, UNRELATED, WEIGHTS, Allowance, score

LONG = " ".join(f"word{n}" for n in range(SHORT + 1))
REFUSAL = "The passages do not contain the answer."


def unasked(said: str, reference: str) -> float:
    raise AssertionError("nobody should want it")


# --- short answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        pytest.param("Every 12 weeks.", 1.0, id="the same"),
        pytest.param("every  12 WEEKS", 1.0, id="in other letters"),
        pytest.param("It must be oiled every 12 weeks.", 0.6, id="with more around it"),
        pytest.param("Every 13 weeks.", 2 / 3, id="with a wrong word"),
        pytest.param("Never.", 0.0, id="another one"),
    ],
)
def test_short_answers_are_compared_by_words(said: str, expected: float) -> None:
    assert score(said, "Every 12 weeks.", unasked) == pytest.approx(expected)


def test_marks_of_citations_count_nowhere() -> None:
    assert score("Every 12 weeks. [1] At night. [12]", "Every 12 weeks. At night.", unasked) == 1.0
    assert score("Every 12 weeks.", "Every 12 weeks. [3]", unasked) == 1.0
    assert score("It has [1200] litres.", "It has [1200] litres.", unasked) == 1.0


def test_the_reference_decides_what_is_short() -> None:
    reference = " ".join(LONG.split()[:SHORT])
    assert score(LONG, reference, unasked) == f1(LONG, [reference])
    assert score("word1", LONG, lambda said, wanted: 1.0) == 1.0


# --- long answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cosine", "expected"),
    [(1.0, 1.0), (0.75, 0.5), (UNRELATED, 0.0), (0.2, 0.0), (-1.0, 0.0), (1.0000002, 1.0)],
)
def test_long_answers_are_compared_by_meaning(cosine: float, expected: float) -> None:
    asked: list[tuple[str, str]] = []

    def compare(*texts: str) -> float:
        asked.append((texts[0], texts[1]))
        return cosine

    assert score("Something else. [1]", f"{LONG} [2]", compare) == pytest.approx(expected)
    assert asked == [("Something else.", LONG)]


# --- nothing, and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["", "  ", "[1]", "The.", "?!"])
def test_a_reference_that_says_nothing_judges_nothing(reference: str) -> None:
    assert score("Every 12 weeks.", reference, unasked) is None
    assert score("", reference, unasked) is None


@pytest.mark.parametrize("said", ["", " ", "?", "[2]", "I do not know.", REFUSAL])
@pytest.mark.parametrize("reference", ["Every 12 weeks.", LONG])
def test_who_does_not_answer_what_could_be_answered_is_worth_nothing(said: str, reference: str) -> None:
    assert score(said, reference, unasked) == 0.0


@pytest.mark.parametrize(
    ("said", "expected"),
    [("I cannot answer this.", 1.0), (REFUSAL, 1.0), ("Every 12 weeks.", 0.0), ("", 0.0), ("[1]", 0.0)],
)
def test_where_the_passages_hold_no_answer_a_refusal_is_right(said: str, expected: float) -> None:
    assert score(said, REFUSAL, unasked) == expected


@given(st.text(max_size=80), st.text(max_size=80), st.floats(-1.5, 1.5))
def test_every_score_is_from_0_to_1_and_who_says_the_same_gets_1(said: str, reference: str, cosine: float) -> None:
    found = score(said, reference, lambda *texts: cosine)
    assert found is None or 0 <= found <= 1
    same = score(reference, reference, lambda *texts: 1.0)
    assert same in (None, 1.0)
    assert (same is None) == (found is None)


# --- weights and floods ----------------------------------------------------------------------------------------------


def test_what_somebody_said_counts_in_full_and_a_comparison_half() -> None:
    assert dict(WEIGHTS) == {"feedback": 1.0, "review": 0.5, "trial": 0.5}


def test_of_a_flood_so_many_are_taken_in_any_minute() -> None:
    allowance = Allowance(3)
    assert [allowance.take(now) for now in (0.0, 10.0, 20.0, 30.0, 59.9)] == [True] * 3 + [False] * 2
    assert [allowance.take(now) for now in (60.0, 61.0, 70.0, 79.9, 80.0)] == [True, False, True, False, True]


def test_an_allowance_of_nothing_takes_nothing() -> None:
    assert not Allowance(0).take(5.0)


def test_a_clock_that_is_set_back_does_not_stop_learning_and_one_that_jumps_ahead_neither() -> None:
    allowance = Allowance(2)
    assert [allowance.take(now) for now in (1e9, 1e9, 1e9)] == [True, True, False]
    assert [allowance.take(now) for now in (5.0, 5.0, 5.0)] == [True, True, False]
    assert [allowance.take(now) for now in (2e9, 2e9, 2e9)] == [True, True, False]


QUARTERS = st.integers(0, 1200).map(lambda quarter: quarter / 4)  # of seconds: differences are exact


@given(st.lists(QUARTERS, max_size=60).map(sorted), st.integers(1, 8))
def test_no_minute_holds_more_than_are_allowed_and_none_is_refused_without_need(times: list[float], most: int) -> None:
    allowance, taken = Allowance(most), list[float]()
    for now in times:
        recent = sum(now - at < 60 for at in taken)
        assert allowance.take(now) == (recent < most)
        if recent < most:
            taken.append(now)
    assert all(taken[n + most] - taken[n] >= 60 for n in range(len(taken) - most))
