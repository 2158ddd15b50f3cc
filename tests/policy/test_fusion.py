"""Joining rankings, and giving neighbours of one document their order back."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.policy.fusion import in_document_order, reciprocal_rank_fusion
from edge_rag.records import Passage

ids = st.lists(st.integers(1, 12), unique=True, max_size=10)
weights = st.floats(0.01, 10)
ks = st.floats(0.5, 100)


def passage(chunk_id: int, *, score: float, document: int = 1, ordinal: int = 0) -> Passage:
    return Passage(
        chunk_id=chunk_id,
        document_id=document,
        ordinal=ordinal,
        path=f"{document}.md",
        title="",
        heading="",
        page=None,
        text="",
        tokens=1,
        score=score,
    )


@st.composite
def ranked_passages(draw: st.DrawFn) -> list[Passage]:
    """Passages as a search returns them: best first, chunk ids and places in a document unique."""
    scores = sorted(draw(st.lists(st.integers(1, 20), max_size=10)), reverse=True)
    ordinals = draw(st.permutations(range(len(scores))))
    documents = [draw(st.integers(1, 3)) for _ in scores]
    return [
        passage(place, score=score / 20, document=document, ordinal=ordinal)
        for place, (score, document, ordinal) in enumerate(zip(scores, documents, ordinals, strict=True))
    ]


# --- reciprocal rank fusion ------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.just(0.0) | weights, ids), max_size=5), ks)
def test_scores_lie_above_zero_and_up_to_one_and_fall(rankings: list[tuple[float, list[int]]], k: float) -> None:
    scores = [score for _, score in reciprocal_rank_fusion(rankings, k=k)]
    assert all(0 < score <= 1 for score in scores)
    assert scores == sorted(scores, reverse=True)


@given(st.lists(st.tuples(weights, ids), max_size=5))
def test_every_id_of_every_ranking_comes_out_once(rankings: list[tuple[float, list[int]]]) -> None:
    fused = [item for item, _ in reciprocal_rank_fusion(rankings, k=5)]
    assert sorted(fused) == sorted({item for _, ranking in rankings for item in ranking})


@given(st.lists(st.tuples(weights, ids), min_size=1, max_size=5), ks)
def test_what_is_first_in_every_ranking_has_exactly_one(rankings: list[tuple[float, list[int]]], k: float) -> None:
    led = [(weight, [99, *ranking]) for weight, ranking in rankings]
    assert reciprocal_rank_fusion(led, k=k)[0] == (99, 1.0)


@given(st.lists(ids, max_size=5), weights, st.data())
def test_rankings_of_equal_weight_may_be_given_in_any_order(
    rankings: list[list[int]], weight: float, data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(rankings))
    first, second = ([(weight, ranking) for ranking in order] for order in (rankings, shuffled))
    assert reciprocal_rank_fusion(first, k=5) == reciprocal_rank_fusion(second, k=5)


@given(st.lists(st.tuples(weights, ids), max_size=3), ids, st.integers(0, 3))
def test_a_ranking_of_weight_zero_changes_nothing(
    rankings: list[tuple[float, list[int]]], ignored: list[int], place: int
) -> None:
    with_zero = [*rankings[:place], (0.0, ignored), *rankings[place:]]
    assert reciprocal_rank_fusion(with_zero, k=5) == reciprocal_rank_fusion(rankings, k=5)


def test_equal_scores_are_ordered_by_id() -> None:
    fused = reciprocal_rank_fusion([(1, [7, 3]), (1, [3, 7])], k=5)
    assert [item for item, _ in fused] == [3, 7]


def test_scores_are_those_of_the_formula() -> None:
    fused = dict(reciprocal_rank_fusion([(2, [1, 2]), (1, [2])], k=10))
    best = 3 / 11
    assert fused == {1: pytest.approx(2 / 11 / best), 2: pytest.approx((2 / 12 + 1 / 11) / best)}


def test_a_small_k_trusts_the_first_rank_more() -> None:
    rankings = [(1.0, [1, 2, 3]), (1.0, [4, 2, 3])]
    assert reciprocal_rank_fusion(rankings, k=0.5)[1][0] == 1
    assert reciprocal_rank_fusion(rankings, k=60)[0][0] == 2


# --- document order --------------------------------------------------------------------------------------------------


@given(ranked_passages(), st.floats(0, 1))
def test_reordering_is_a_permutation_in_which_documents_keep_their_places(
    passages: list[Passage], margin: float
) -> None:
    ordered = in_document_order(passages, margin=margin)
    assert sorted(p.chunk_id for p in ordered) == [p.chunk_id for p in passages]
    assert [p.document_id for p in ordered] == [p.document_id for p in passages]


@given(ranked_passages(), st.floats(0, 1))
def test_no_passage_overtakes_one_that_is_better_by_more_than_the_margin(
    passages: list[Passage], margin: float
) -> None:
    ordered = in_document_order(passages, margin=margin)
    slack = margin * max((p.score for p in passages), default=0.0)
    rounding = 1e-12  # two differences of the same size may round apart
    for before, behind in itertools.combinations(ordered, 2):
        if before.chunk_id > behind.chunk_id:
            times = 1 if before.document_id == behind.document_id else 2
            assert behind.score - before.score <= times * slack + rounding


@given(ranked_passages())
def test_with_the_widest_margin_each_document_is_in_its_own_order(passages: list[Passage]) -> None:
    ordered = in_document_order(passages, margin=1)
    for document in (1, 2, 3):
        ordinals = [p.ordinal for p in ordered if p.document_id == document]
        assert ordinals == sorted(ordinals)


@given(ranked_passages())
def test_margin_zero_moves_nothing_when_scores_differ(passages: list[Passage]) -> None:
    distinct = [next(equal) for _, equal in itertools.groupby(passages, key=lambda p: p.score)]
    assert in_document_order(distinct, margin=0) == distinct


def test_passages_of_equal_score_follow_the_document_even_without_a_margin() -> None:
    late, early = passage(1, score=0.5, ordinal=2), passage(2, score=0.5, ordinal=1)
    assert in_document_order([late, early], margin=0) == [early, late]


def test_only_neighbours_in_score_swap() -> None:
    best, close, far = (passage(n, score=score, ordinal=9 - n) for n, score in enumerate((1.0, 0.95, 0.5), start=1))
    assert in_document_order([best, close, far], margin=0.1) == [close, best, far]


def test_the_margin_is_a_share_of_the_best_score() -> None:
    low = [passage(1, score=0.10, ordinal=2), passage(2, score=0.08, ordinal=1)]
    assert in_document_order(low, margin=0.1) == low
    assert in_document_order(low, margin=0.3) == low[::-1]
