"""What the benchmarks compute, on values that can be checked by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from edge_rag.store.library import sign_code
from tools.bench.data import Question, load_excerpts, load_squad, locate, squad_document
from tools.bench.metrics import (
    Span,
    agreement,
    any_contained,
    bootstrap,
    contains_answer,
    covered_share,
    exact_match,
    f1,
    percentile,
    reciprocal_rank,
    squad_normalised,
    without_marks,
)
from tools.bench.quality import beats_both, keeps_up, scores
from tools.bench.report import above, at_least
from tools.bench.scale_build import sign_codes, spread_around


def chunk(start: int, end: int, document: str = "a") -> Span:
    return Span(document, start, end)


# --- answers ---------------------------------------------------------------------------------------------------------


def test_normalisation_is_that_of_squad() -> None:
    assert squad_normalised("  The U.S.  Army's a-team, an Ox ") == "us armys ateam ox"
    assert squad_normalised("Theatre and another") == "theatre and another"


@pytest.mark.parametrize(
    ("said", "answers", "expected"),
    [
        pytest.param("the Denver Broncos.", ["Denver Broncos"], 1.0, id="articles and punctuation do not count"),
        pytest.param("Broncos", ["Denver Broncos", "Broncos"], 1.0, id="any answer will do"),
        pytest.param("Denver Broncos won", ["Denver Broncos"], 0.0, id="one word too many"),
        pytest.param("anything", [], 0.0, id="no answers"),
    ],
)
def test_exact_match(said: str, answers: list[str], expected: float) -> None:
    assert exact_match(said, answers) == expected


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


def test_an_answer_is_contained_as_whole_words() -> None:
    assert contains_answer("It takes 80 people, at most.", ["eighty", "80 people"]) == 1
    assert contains_answer("It takes 180 people.", ["80"]) == 0
    assert contains_answer("The.", ["the"]) == 0


def test_citation_marks_are_no_part_of_an_answer() -> None:
    assert without_marks("Use 5 ml [1]. Then wait [2]") == "Use 5 ml. Then wait"


# --- retrieval -------------------------------------------------------------------------------------------------------


def test_covered_share_counts_each_character_once() -> None:
    references = [chunk(10, 20), chunk(15, 30)]  # 20 characters
    assert covered_share([chunk(0, 15)], references) == 5 / 20
    assert covered_share([chunk(0, 15), chunk(0, 15), chunk(25, 40)], references) == 10 / 20
    assert covered_share([chunk(0, 100, "b")], references) == 0
    assert covered_share([chunk(0, 100)], references) == 1
    assert covered_share([chunk(0, 100)], []) == 0


def test_an_answer_span_must_lie_in_one_chunk() -> None:
    assert any_contained([chunk(0, 10), chunk(10, 30)], [chunk(12, 30)]) == 1
    assert any_contained([chunk(0, 10), chunk(10, 30)], [chunk(8, 12)]) == 0
    assert any_contained([chunk(0, 10)], [chunk(8, 12), chunk(2, 4)]) == 1


def test_reciprocal_rank_is_that_of_the_first_overlap() -> None:
    chunks = [chunk(0, 10), chunk(0, 10, "b"), chunk(10, 20)]
    assert reciprocal_rank(chunks, [chunk(9, 12)]) == 1
    assert reciprocal_rank(chunks, [chunk(10, 12)]) == 1 / 3
    assert reciprocal_rank(chunks, [chunk(20, 22)]) == 0


def test_ranks_beyond_the_cut_do_not_count() -> None:
    chunks = [chunk(10 * place, 10 * place + 10) for place in range(60)]
    seventh = scores(Question("?", (chunk(61, 69),)), chunks)
    assert seventh == {"recall@5": 0.0, "recall@10": 1.0, "MRR": 1 / 7}
    assert scores(Question("?", (chunk(501, 509),)), chunks)["MRR"] == 0


def test_alternatives_need_one_span_and_references_all() -> None:
    spans = (chunk(0, 5), chunk(100, 105))
    chunks = [chunk(0, 10)]
    assert scores(Question("?", spans, alternatives=True), chunks)["recall@5"] == 1
    assert scores(Question("?", spans), chunks)["recall@5"] == 0.5


def test_agreement_is_recall_of_the_truth() -> None:
    assert agreement([1, 2, 9], [1, 2, 3, 4]) == 0.5
    assert agreement([], []) == 1


# --- numbers and claims ----------------------------------------------------------------------------------------------


def test_percentiles_are_interpolated() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.75) == 1.75
    assert percentile([5.0], 0.95) == 5.0


def test_the_bootstrap_is_the_same_every_time_and_holds_the_mean() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 0.5] * 5
    first, second = bootstrap(values), bootstrap(values)
    assert first == second
    assert first.low < first.mean < first.high
    assert bootstrap(values, seed=1) != first
    assert bootstrap([1.0] * 5) == (1.0, 1.0, 1.0)
    assert bootstrap([]) == (0.0, 0.0, 0.0)


def test_a_claim_holds_at_its_target_unless_it_must_be_above() -> None:
    assert at_least("x", 0.97, 0.97).holds
    assert not at_least("x", 0.96, 0.97).holds
    assert not above("x", 0.0, 0.0).holds


def test_fusion_is_compared_with_the_better_of_both_for_each_metric() -> None:
    found = {
        "dense": {"recall@5": 0.5, "recall@10": 0.6, "MRR": 0.30},
        "BM25": {"recall@5": 0.4, "recall@10": 0.7, "MRR": 0.20},
        "fused": {"recall@5": 0.5, "recall@10": 0.695, "MRR": 0.25},
    }
    assert [claim.holds for claim in keeps_up("c", found)] == [True, True, False]
    assert [round(claim.value, 3) for claim in beats_both(found)] == [0.0, -0.005, -0.05]
    assert not any(claim.holds for claim in beats_both(found))


# --- data ------------------------------------------------------------------------------------------------------------


def test_locate_prefers_the_given_offset_then_the_nearest_then_other_white_space() -> None:
    text = "one two. one  two. one two."
    assert locate(text, "d", "one two", near=19) == Span("d", 19, 26)
    assert locate(text, "d", "one two", near=17) == Span("d", 19, 26)
    assert locate(text, "d", "one\ntwo", near=10) == Span("d", 9, 17)
    assert locate(text, "d", "three") is None


def test_answers_of_a_squad_article_are_found_in_its_document(tmp_path: Path) -> None:
    answers = [{"text": "ninth", "answer_start": 4}, {"text": "ninth", "answer_start": 4}]
    paragraphs = [
        {"context": "First\none.", "qas": [{"question": "What?", "answers": [], "is_impossible": True}]},
        {"context": "The ninth day.", "qas": [{"question": "Which?", "answers": answers}]},
    ]
    text, (question,) = squad_document("d", "Days", paragraphs)
    (span,) = question.spans
    assert text[span.start : span.end] == "ninth"
    assert question.answers == ("ninth",)
    file = tmp_path / "days.json"
    file.write_text(json.dumps({"data": [{"title": "Days", "paragraphs": paragraphs}]}))
    dataset = load_squad(file, tmp_path / "work")
    assert dataset.files[0].read_text() == text
    assert dataset.questions[0].spans[0][1:] == span[1:]


def test_a_folder_of_excerpts_is_one_dataset_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(b"zero\r\nfirst line\r\nsecond line\r\n")
    (tmp_path / "b.md").write_text("nothing\n")
    references = json.dumps([{"content": "second line", "start_index": 18, "end_index": 29}])
    lost = json.dumps([{"content": "not there", "start_index": 0, "end_index": 9}])
    rows = ["question,references,corpus_id"]
    rows += [
        f'{text},"{value.replace(chr(34), chr(34) * 2)}",{name}'
        for text, value, name in (("which?", references, "a"), ("where?", lost, "b"))
    ]
    (tmp_path / "questions.csv").write_text("\n".join(rows))
    first, second = load_excerpts(tmp_path)
    assert (first.name, first.lost, second.name, second.lost) == ("a", 0, "b", 1)
    assert first.questions[0].spans == (Span(str(tmp_path / "a.md"), 16, 27),)
    assert second.questions == ()


# --- scale -----------------------------------------------------------------------------------------------------------


def test_synthetic_vectors_are_unit_and_as_far_from_their_seed_as_asked() -> None:
    seeds = np.eye(1, 384, dtype=np.float32)
    made = spread_around(seeds, 500, np.random.default_rng(1))
    cosines = made @ seeds[0]
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1.0, atol=1e-5)
    assert 0.6 <= cosines.min() < 0.65
    assert 0.9 < cosines.max() <= 0.951


def test_sign_codes_of_many_are_those_of_the_library() -> None:
    vectors = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    assert sign_codes(vectors) == [sign_code(vector) for vector in vectors]
