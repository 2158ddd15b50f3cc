"""What fits into the context."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.errors import InputError
from edge_rag.policy.planner import anything_found, make_plan, newest_turns
from edge_rag.policy.prompt import LAYOUT_VERSION
from edge_rag.records import Passage, PassagePlan, Plan

passage_sizes = st.lists(st.integers(1, 50), max_size=8)
fixed = st.integers(0, 30)


def plan(sizes: list[int], prefix: int, tail: int, answer: int, *, room: int) -> Plan:
    return make_plan(
        list(enumerate(sizes)),
        prefix_tokens=prefix,
        tail_tokens=tail,
        max_tokens=answer,
        n_ctx=prefix + tail + answer + room,
    )


# --- is there anything to read? --------------------------------------------------------------------------------------


def passage(similarity: float | None, matched_words: int) -> Passage:
    return Passage(
        chunk_id=1,
        document_id=1,
        ordinal=0,
        path="a.md",
        title="",
        heading="",
        page=None,
        text="",
        tokens=1,
        score=1.0,
        similarity=similarity,
        matched_words=matched_words,
    )


@pytest.mark.parametrize(
    ("query", "passages", "found"),
    [
        pytest.param("filter", [], False, id="no passage"),
        pytest.param("filter", [passage(0.3, 0)], True, id="near by meaning"),
        pytest.param("filter", [passage(0.29, 0)], False, id="not near enough"),
        pytest.param("filter", [passage(None, 0)], False, id="similarity unknown"),
        pytest.param("pump filter", [passage(0.1, 1)], True, id="half of the words"),
        pytest.param("pump filter valve", [passage(None, 1)], False, id="a third of the words"),
        pytest.param("filter filters pump", [passage(0.1, 1)], True, id="forms of a word count once"),
        pytest.param("what is it?", [passage(0.1, 0)], False, id="no content words and not near"),
        pytest.param("filter", [passage(0.1, 0), passage(0.5, 0)], True, id="one near passage is enough"),
    ],
)
def test_anything_found(query: str, passages: list[Passage], found: bool) -> None:
    assert anything_found(query, passages, min_similarity=0.3) is found


# --- the plan --------------------------------------------------------------------------------------------------------


@given(passage_sizes, fixed, fixed, fixed, st.integers(0, 200))
def test_the_best_passages_are_kept_in_order_and_the_rest_is_counted(
    sizes: list[int], prefix: int, tail: int, answer: int, room: int
) -> None:
    made = plan(sizes, prefix, tail, answer, room=room)
    kept = len(made.passages)
    assert [(p.chunk_id, p.tokens) for p in made.passages] == list(enumerate(sizes))[:kept]
    assert kept + made.dropped == len(sizes)
    assert (made.prefix_tokens, made.tail_tokens) == (prefix, tail)


@given(passage_sizes, fixed, fixed, fixed, st.integers(0, 200))
def test_everything_fits_and_the_first_dropped_passage_would_not(
    sizes: list[int], prefix: int, tail: int, answer: int, room: int
) -> None:
    kept = len(plan(sizes, prefix, tail, answer, room=room).passages)
    assert sum(sizes[:kept]) <= room
    assert kept == len(sizes) or sum(sizes[: kept + 1]) > room


def test_a_small_passage_does_not_take_the_place_of_a_better_one() -> None:
    made = plan([10, 20, 1], 0, 0, 0, room=15)
    assert made.passages == (PassagePlan(chunk_id=0, tokens=10),)
    assert made.dropped == 2


def test_the_plan_remembers_what_was_searched_for() -> None:
    made = make_plan([], prefix_tokens=1, tail_tokens=1, max_tokens=1, n_ctx=3, search_query="filter interval")
    assert made == Plan(prefix_tokens=1, tail_tokens=1, search_query="filter interval", layout=LAYOUT_VERSION)


@given(passage_sizes, fixed, fixed, fixed, st.integers(1, 100))
def test_a_question_that_does_not_fit_is_refused_by_name(
    sizes: list[int], prefix: int, tail: int, answer: int, missing: int
) -> None:
    with pytest.raises(InputError) as caught:
        plan(sizes, prefix, tail, answer, room=-missing)
    assert caught.value.field == "question"
    assert f"holds {prefix + tail + answer - missing}" in caught.value.message


# --- history ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), max_size=9), st.integers(0, 300))
def test_the_newest_pairs_of_turns_are_kept_while_they_fit(sizes: list[int], budget: int) -> None:
    kept = newest_turns(sizes, budget=budget)
    assert kept in range(0, len(sizes) + 1, 2)
    assert sum(sizes[len(sizes) - kept :]) <= budget
    assert kept + 2 > len(sizes) or sum(sizes[len(sizes) - kept - 2 :]) > budget


@pytest.mark.parametrize(
    ("sizes", "budget", "kept"),
    [
        pytest.param([5, 5, 5, 5], 20, 4, id="all fit exactly"),
        pytest.param([5, 5, 5, 5], 19, 2, id="one pair fits"),
        pytest.param([1, 1, 50, 50], 20, 0, id="an old pair is not kept without the newer one"),
        pytest.param([5, 1, 1], 100, 2, id="half a pair is left out"),
        pytest.param([], 100, 0, id="no history"),
    ],
)
def test_newest_turns(sizes: list[int], budget: int, kept: int) -> None:
    assert newest_turns(sizes, budget=budget) == kept
