import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from edge_rag.reading.readers import read_document

TOOL = Path(__file__).parents[2] / "tools" / "make_demo_pdf.py"

SENTENCES = [
    f"Sentence number {n} of the handbook says that a half-open valve, a café's for instance, lets {n} litres through."
    for n in range(120)
]
PARAGRAPHS = [" ".join(SENTENCES[n : n + 5]) for n in range(0, len(SENTENCES), 5)]
SOURCE = "# The handbook\n\n" + "".join(
    f"## Part {n}\n\n{paragraph}\n\n- first item of {n}\n- second item of {n}, 5 µm\n\n"
    for n, paragraph in enumerate(PARAGRAPHS)
)


def test_the_reader_finds_every_sentence_on_its_page(tmp_path: Path) -> None:
    source, target = tmp_path / "in.md", tmp_path / "handbook.pdf"
    source.write_text(SOURCE, encoding="utf-8")
    subprocess.run([sys.executable, str(TOOL), str(source), str(target)], check=True)
    document = read_document(target, max_bytes=1 << 20)
    assert document.title == "handbook"
    assert [section.page for section in document.sections] == list(range(1, len(document.sections) + 1))
    assert len(document.sections) > 3
    assert document.warnings == ()
    text = " ".join(section.text.replace("\n", " ") for section in document.sections)
    missing = [part for paragraph in PARAGRAPHS for part in paragraph.split(". ") if part not in text]
    assert missing == []
    lines = "\n".join(section.text for section in document.sections).split("\n")
    assert lines[0] == "The handbook"
    assert all(line in lines for line in ("Part 0", "Part 23", "- first item of 7", "- second item of 7, 5 µm"))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["handbook.pdf", "in.md"]


def test_the_same_source_gives_the_same_bytes() -> None:
    make_pdf = runpy.run_path(str(TOOL))["make_pdf"]
    first, second = make_pdf(SOURCE), make_pdf(SOURCE)
    assert first == second
    assert b"/CreationDate(D:20340101000000" in first
    assert first.count(b"0" * 32) == 2


def test_text_beyond_latin1_is_refused() -> None:
    with pytest.raises(UnicodeEncodeError):
        runpy.run_path(str(TOOL))["make_pdf"]("# Ω")
