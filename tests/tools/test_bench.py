"""What the benchmarks compute, on values that can be checked by hand."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from rich.console import Console

from edge_rag.config import Settings
from edge_rag.native.kv_blob import KVShape
from edge_rag.native.kv_codec import encode
from edge_rag.records import PassagePlan
from edge_rag.store.library import sign_code
from tools.bench import codec, throughput, ttft
from tools.bench.__main__ import parser
from tools.bench.data import Question, load_excerpts, load_squad, locate, squad_document
from tools.bench.kv import PLAIN_BATCH, cut, described
from tools.bench.metrics import (
    Span,
    agreement,
    any_contained,
    bootstrap,
    contains_answer,
    covered_share,
    exact_match,
    percentile,
    reciprocal_rank,
    without_marks,
)
from tools.bench.quality import beats_both, keeps_up, scores
from tools.bench.report import above, at_least, at_most
from tools.bench.scale_build import sign_codes, spread_around


def chunk(start: int, end: int, document: str = "a") -> Span:
    return Span(document, start, end)


# --- answers ---------------------------------------------------------------------------------------------------------


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


# --- passages as KV --------------------------------------------------------------------------------------------------


def quick(name: str, *more: str) -> argparse.Namespace:
    return parser().parse_args([name, "--quick", *more])


def one_size(settings: Settings) -> Settings:
    """Settings with which the baseline has no two sizes of batches to be measured with."""
    return replace(settings, engine=replace(settings.engine, n_batch=PLAIN_BATCH))


def test_parts_of_a_text_are_even_and_hold_every_word() -> None:
    text = "  one two three four five six seven eight  "
    parts = [text[start:end] for start, end in cut(text, 3)]
    assert parts == ["one two three", "four five six", "seven eight"]
    assert cut("one", 5) == [(0, 3)]
    assert cut(" one two", 0) == [(1, 8)]
    assert cut("  ", 2) == []


def test_a_claim_of_at_most_holds_at_its_target() -> None:
    assert at_most("x", 2.5, 2.5).holds
    assert not at_most("x", 2.6, 2.5).holds


def test_it_is_said_how_passages_came() -> None:
    ram = PassagePlan(chunk_id=1, tokens=9, how="splice", source="ram")
    assert described([ram, PassagePlan(chunk_id=2, tokens=9), ram]) == "1 recompute, 2 splice from ram"


def cell(**seconds: float) -> ttft.Cell:
    return ttft.Cell(5, [{way: ttft.Sample(value, 10) for way, value in seconds.items()}])


def test_the_faster_plain_prefill_is_what_ours_must_beat() -> None:
    measured = cell(**{"plain 128": 15.0, "plain 512": 12.0, "ram": 1.0, "ssd": 1.5, ttft.FLOOR_WAY: 0.5})
    assert measured.baseline == "plain 512"
    assert [(claim.value, claim.holds) for claim in ttft.claims(measured)] == [
        (12.0, True),
        (8.0, False),
        (2.0, True),
        (3.0, False),
    ]


def test_a_passage_from_elsewhere_than_the_row_says_is_told() -> None:
    plans = (PassagePlan(chunk_id=1, tokens=9, how="exact", source="state"),)
    good, bad = ttft.Sample(1.0, 9, (PassagePlan(chunk_id=1, tokens=9),)), ttft.Sample(1.0, 9, plans)
    assert list(ttft.strangers(ttft.Cell(1, [{"ram": good, "ssd": good}]))) == []
    assert len(list(ttft.strangers(ttft.Cell(1, [{"ram": good, "ssd": bad}])))) == 1


def test_time_to_the_first_token_is_measured_from_ram_and_from_the_ssd(
    small_settings: Settings, tmp_path: Path
) -> None:
    options = quick("ttft", "--k", "2", "--links", "4")
    result = ttft.run(options, one_size(small_settings), tmp_path, Console(quiet=True))
    passages = {row["way"]: row.get("passages") for row in result.rows if "way" in row}
    assert passages["ram"] == "1 exact from ram, 1 splice from ram"
    assert passages["ssd"] == "1 exact from ssd, 1 splice from ssd"
    assert passages["prefix"] == "2 recompute"
    assert not [note for note in result.notes if note.startswith("NOT AS")]
    stages = [(row["codec"], row["linked tokens"], row["seams"]) for row in result.rows if "seams" in row]
    assert stages == [("q8", 4, "together"), ("q8", 8, "one by one"), ("q8", 8, "together"), ("f16", 4, "together")]
    assert all(row["passages"] == "1 exact from ram, 1 splice from ram" for row in result.rows if "seams" in row)


def test_codecs_lose_little_and_what_float16_keeps_is_all_of_it(small_settings: Settings, tmp_path: Path) -> None:
    result = codec.run(quick("codec"), small_settings, tmp_path, Console(quiet=True))
    quality = {row["codec"]: row for row in result.rows if row["table"] == "quality"}
    sizes = [row["÷ f16"] for row in result.rows if row["table"] == "bytes and rates"]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 1.0
    assert all(0 <= row["KL"] < 0.1 for row in quality.values())
    assert quality["f16"]["added KL"] == 0


def test_throughput_counts_where_passages_came_from(small_settings: Settings, tmp_path: Path) -> None:
    options = quick("throughput", "--questions", "2", "--plain", "1", "--passages", "4", "--exponents", "1.0")
    result = throughput.run(options, one_size(small_settings), tmp_path, Console(quiet=True))
    ours = {row["way"]: row for row in result.rows if row["table"] == "questions" and row["passages"] == 3}
    assert ours["ours, empty"]["new"] > 0
    assert ours["ours, warmed"]["new"] < ours["ours, empty"]["new"]
    shares = [ours["ours, empty"][source] for source in ("none", "new", "ram", "ssd", "state")]
    assert sum(shares) == pytest.approx(1)
    assert {row["policy"] for row in result.rows if row["table"] == "eviction"} == {"ours", "LRU", "LFU"}


def test_a_trace_has_as_many_questions_as_asked_for_and_no_passage_twice_in_one() -> None:
    trace = throughput.make_trace(5, 1.1, 3, 40, 0)
    assert len(trace) == 40
    assert all(len(set(places)) == 3 for places in trace)
    assert throughput.make_trace(2, 1.1, 3, 1, 0) in ([[0, 1]], [[1, 0]])


def test_the_predicted_bytes_are_those_that_are_kept() -> None:
    shape = KVShape(layers=2, k_width=64, v_width=32)
    k, v = np.zeros((2, 7, 64), np.float32), np.zeros((2, 7, 32), np.float16)
    kept = encode("q5", k, v)
    assert throughput.kept_bytes("q5", shape, 7) == sum(section.nbytes for section in kept.values())
