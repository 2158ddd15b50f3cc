"""Which passage a sentence is attributed to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.policy.citations import Evidence, best_support, prepare

VOCABULARY = ["filter", "pump", "valve", "pressure", "monday", "warranty", "coffee", "7", "0.5"]
texts = st.lists(st.sampled_from([*VOCABULARY, "the", "is"]), max_size=8).map(" ".join)
passages = st.lists(st.tuples(texts, st.floats(-1, 1)), min_size=1, max_size=5)


def support(
    sentence: str, *evidence: str, question: str = "", similarities: list[float] | None = None
) -> tuple[int, float] | None:
    prepared = [prepare(text) for text in evidence]
    return best_support(sentence, question, prepared, similarities or [0.0] * len(evidence))


def score_of(sentence: str, passage: str, *, question: str = "", similarity: float = 0.0) -> float:
    best = support(sentence, passage, question=question, similarities=[similarity])
    assert best is not None
    return best[1]


def test_a_passage_is_read_into_stems_and_numbers() -> None:
    prepared = prepare("The filters: 1,200 hours")
    assert prepared == Evidence(frozenset({"filter", "1", "200", "hour"}), frozenset({"1200"}))


@given(texts, texts, passages)
def test_the_best_passage_has_a_score_between_zero_and_one(
    sentence: str, question: str, evidence: list[tuple[str, float]]
) -> None:
    prepared = [prepare(text) for text, _ in evidence]
    best = best_support(sentence, question, prepared, [similarity for _, similarity in evidence])
    assert best is None or (best[0] in range(len(evidence)) and 0 <= best[1] <= 1)


@given(texts, texts, passages, st.data())
def test_the_order_of_the_passages_does_not_change_the_score(
    sentence: str, question: str, evidence: list[tuple[str, float]], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(evidence))
    first, second = (
        best_support(sentence, question, [prepare(text) for text, _ in order], [similarity for _, similarity in order])
        for order in (evidence, shuffled)
    )
    assert (first and first[1]) == (second and second[1])


@given(passages)
def test_among_equal_passages_the_first_is_cited(evidence: list[tuple[str, float]]) -> None:
    prepared = [prepare(text) for text, _ in evidence]
    similarities = [similarity for _, similarity in evidence]
    best = best_support("filter pressure", "", prepared * 2, similarities * 2)
    assert best is not None
    assert best[0] < len(evidence)


def test_the_passage_that_says_it_is_found_among_others() -> None:
    sentence = "The filter is cleaned every Monday."
    best = support(sentence, "The pump has a warranty.", f"Care. {sentence} Wear gloves.", "Monday is coffee day.")
    assert best == (1, pytest.approx(0.7))


def test_a_full_match_in_words_and_meaning_has_score_one() -> None:
    assert score_of("Clean the filters.", "clean the filter", similarity=1.0) == 1.0


def test_similarity_counts_where_words_are_equal() -> None:
    assert support("filter", "filter", "filter", similarities=[0.2, 0.9]) == (1, pytest.approx(0.7 + 0.3 * 0.9))


def test_a_negative_similarity_counts_as_none() -> None:
    assert score_of("filter", "filter", similarity=-1.0) == score_of("filter", "filter", similarity=0.0)


@pytest.mark.parametrize(
    ("sentence", "passage"),
    [
        pytest.param("Clean the filter every 3 months.", "Clean the filter every 6 months.", id="another number"),
        pytest.param("The filter takes 0.5 bar.", "The filter takes 5 bar.", id="another decimal"),
        pytest.param("Item 2. Use 4 filters.", "Use 4 filters.", id="a number inside the sentence"),
    ],
)
def test_a_number_that_the_passage_does_not_hold_refutes_it(sentence: str, passage: str) -> None:
    assert score_of(sentence, passage, similarity=1.0) == 0.0


@pytest.mark.parametrize(
    ("sentence", "passage"),
    [
        pytest.param("It holds 1,200 litres.", "holds 1200 litres", id="thousands separator"),
        pytest.param("2. Clean the filter.", "Clean the filter.", id="number of a list item"),
        pytest.param("(3) Clean 4 filters.", "Clean 4 filters.", id="number of a list item in brackets"),
    ],
)
def test_numbers_that_do_not_refute(sentence: str, passage: str) -> None:
    assert score_of(sentence, passage) > 0


def test_a_word_of_the_question_is_weaker_evidence_than_one_of_the_answer() -> None:
    best = support("The filter is blue.", "filter", "blue", question="Which colour has the filter?")
    assert best is not None
    assert best[0] == 1


def test_a_rare_word_is_stronger_evidence_than_one_that_many_passages_hold() -> None:
    best = support("The pump needs the valve.", "pump", "pump and filter", "pump", "valve")
    assert best is not None
    assert best[0] == 3


@pytest.mark.parametrize(
    "sentence",
    [
        pytest.param("", id="empty"),
        pytest.param("It is not.", id="function words only"),
        pytest.param("…!", id="punctuation only"),
    ],
)
def test_a_sentence_without_content_has_no_support(sentence: str) -> None:
    assert support(sentence, "filter", question="Which filter?", similarities=[1.0]) is None


def test_without_passages_there_is_no_support() -> None:
    assert support("Clean the filter.") is None


def test_each_passage_needs_its_similarity() -> None:
    with pytest.raises(ValueError, match="zip"):
        best_support("filter", "", [prepare("filter"), prepare("filter")], [1.0])
