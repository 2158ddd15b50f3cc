"""The bundled corpus keeps what its question files promise."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edge_rag.reading.readers import read_document
from tools import make_demo_pdf

PAGE_WORDS = 400


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
