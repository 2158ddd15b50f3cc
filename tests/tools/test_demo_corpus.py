"""The bundled corpus keeps what its question files promise."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edge_rag.errors import InputError
from edge_rag.reading.readers import read_document
from tools import make_demo_pdf
from tools.bench.data import TwoPassageQuestion, extracted_text, two_passage_questions

PAGE_WORDS = 400
# More characters than a chunk has, with room for a table of figures.
TWO_CHUNKS = 1200


@pytest.fixture(scope="module")
def folder(repository: Path) -> Path:
    return repository / "tools" / "demo_corpus"


@pytest.fixture(scope="module")
def texts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every document's text as our own readers see it, white space folded."""
    handbook = tmp_path_factory.mktemp("pdf") / "handbook.pdf"
    make_demo_pdf.main([str(folder / "handbook.md"), str(handbook)])
    files = {
        str(path.relative_to(folder / "documents")): path
        for path in (folder / "documents").rglob("*")
        if path.suffix in (".md", ".html")
    }
    files["handbook.pdf"] = handbook
    return {
        name: " ".join(" ".join(section.text for section in read_document(path, max_bytes=10**7).sections).split())
        for name, path in files.items()
    }


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_there_are_forty_pages_an_html_file_and_sixty_questions(folder: Path) -> None:
    words = sum(len(path.read_text().split()) for path in folder.rglob("*.md"))
    assert words >= 40 * PAGE_WORDS
    assert len(list(folder.rglob("*.html"))) == 1
    assert len(rows(folder / "questions.jsonl")) >= 60


def test_every_question_is_answered_by_its_evidence_in_its_document(folder: Path, texts: dict[str, str]) -> None:
    for row in rows(folder / "questions.jsonl"):
        evidence = " ".join(str(row["evidence"]).split())
        assert evidence in texts[str(row["document"])], row["question"]
        assert row["answers"][0] in evidence  # type: ignore[index]


def test_no_question_stands_twice(folder: Path) -> None:
    asked = [row["question"] for name in ("questions", "unanswerable") for row in rows(folder / f"{name}.jsonl")]
    assert len(asked) == len(set(asked))


def test_every_document_is_asked_about(folder: Path, texts: dict[str, str]) -> None:
    assert {row["document"] for row in rows(folder / "questions.jsonl")} == set(texts)


def test_the_faq_is_well_formed(folder: Path) -> None:
    open_tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "link", "br", "hr", "img", "input"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Checker().feed((folder / "documents" / "faq.html").read_text())
    assert open_tags == []


# --- questions that take two passages --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_passages(folder: Path) -> list[TwoPassageQuestion]:
    return two_passage_questions(folder)


def pairs(folder: Path) -> list[tuple[dict[str, Any], list[str]]]:
    """Each row and its excerpts in lower case, white space folded."""
    return [
        (row, [" ".join(part["excerpt"].split()).lower() for part in row["evidence"]])
        for row in map(json.loads, (folder / "two_passages.jsonl").read_text(encoding="utf-8").splitlines())
    ]


def test_there_are_forty_questions_over_two_passages_of_all_kinds(two_passages: list[TwoPassageQuestion]) -> None:
    kinds = [question.kind for question in two_passages]
    assert len(kinds) >= 40
    assert set(kinds) == {"bridge", "condition", "conjunction", "comparison"}
    assert kinds.count("comparison") < len(kinds) / 2  # a guess is right half of the time


def test_no_question_over_two_passages_stands_twice(folder: Path, two_passages: list[TwoPassageQuestion]) -> None:
    assert len({question.id for question in two_passages}) == len(two_passages)
    asked = {question.text for question in two_passages}
    assert len(asked) == len(two_passages)
    assert asked.isdisjoint(str(row["question"]) for row in rows(folder / "questions.jsonl"))


def test_every_excerpt_stands_once_in_its_document(folder: Path, texts: dict[str, str]) -> None:
    for row, _ in pairs(folder):
        assert len(row["evidence"]) == 2, row["id"]
        for part in row["evidence"]:
            assert texts[part["document"]].count(" ".join(part["excerpt"].split())) == 1, row["id"]


def test_the_spans_of_a_question_hold_its_excerpts(folder: Path, two_passages: list[TwoPassageQuestion]) -> None:
    for (row, excerpts), question in zip(pairs(folder), two_passages, strict=True):
        assert question.id == row["id"]
        for part, excerpt, span in zip(row["evidence"], excerpts, question.spans, strict=True):
            assert Path(span.document) == folder / "documents" / part["document"]
            found = extracted_text(Path(span.document))[span.start : span.end]
            assert " ".join(found.split()).lower() == excerpt


def test_the_two_excerpts_of_a_question_stand_too_far_apart_for_one_chunk(
    two_passages: list[TwoPassageQuestion],
) -> None:
    for question in two_passages:
        first, second = sorted(question.spans)
        assert first.document != second.document or second.start - first.end >= TWO_CHUNKS, question.id


def test_a_bridge_and_a_condition_are_answered_by_the_second_excerpt_only(folder: Path) -> None:
    for row, (first, second) in pairs(folder):
        if row["kind"] in ("bridge", "condition"):
            assert row["answers"][0].lower() in second, row["id"]
            assert not any(answer.lower() in first for answer in row["answers"]), row["id"]


def test_a_conjunction_is_answered_by_what_both_excerpts_name(folder: Path) -> None:
    for row, excerpts in pairs(folder):
        if row["kind"] == "conjunction":
            assert all(row["answers"][0].lower() in excerpt for excerpt in excerpts), row["id"]


def test_only_the_answer_of_a_comparison_stands_in_its_question(folder: Path) -> None:
    for row, _ in pairs(folder):
        stands = [answer.lower() in row["question"].lower() for answer in row["answers"]]
        assert row["answers"], row["id"]
        assert stands[0] == (row["kind"] == "comparison"), row["id"]


def test_an_excerpt_that_is_not_in_its_document_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "documents").symlink_to(folder / "documents")
    row = {"id": "lost-01", "kind": "bridge", "question": "Who?", "answers": ["Nobody"]}
    evidence = [{"document": "faq.html", "excerpt": "Nobody ever wrote this."}]
    (tmp_path / "two_passages.jsonl").write_text(json.dumps(row | {"evidence": evidence}))
    with pytest.raises(InputError, match=r"lost-01.*faq\.html"):
        two_passage_questions(tmp_path)
