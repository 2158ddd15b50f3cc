"""PDF files through pdfium: a section a page, with wrapped lines joined again."""

import re
import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pypdfium2
from pypdfium2 import raw

from edge_rag.errors import DocumentError
from edge_rag.reading.kinds import printable
from edge_rag.reading.text import clean, one_line
from edge_rag.records import ParsedDocument, Section

# pdfium keeps global state: one thread at a time in the whole process, whatever the document.
_PDFIUM = threading.Lock()

_PAGE_GAP = "\n\n"
_LIGATURES = str.maketrans({"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"})
# pdfium itself joins a line that ends in a hyphen to the next one, and marks the place with one of these.
_HYPHENATION = re.compile("(?:[\x02\ufffe]|\u00ad(?=\r?\n))(?:\r?\n)?")

_BULLET = re.compile(r"\s*(?:[-–—•▪◦‣●■*]\s|\(?(?:\d{1,3}|[A-Za-z])[.)]\s)")
_SENTENCE_END = re.compile(r"[.!?:;…][\"'”’»)\]]*$")
# Shares of the width of the page's text. A line this short is a heading, a table row or the end of a paragraph.
_SHORT = 0.6
# A line that ends a sentence and is at most this long ends a paragraph as well.
_NEARLY_FULL = 0.85
_NO_TITLE = re.compile(r"(?i)(?:untitled|microsoft word|document\d*$|title$)")


def parse_pdf(path: Path, data: bytes) -> ParsedDocument:
    """A section for every page that has text; waits while another thread reads a PDF."""
    with _PDFIUM:
        title, pages = _extract(path, data)
    texts = {number: unwrap(text, number) for number, text in pages.items() if text is not None}
    sections = tuple(_sections(texts))
    if not sections:
        raise DocumentError("the PDF has no text layer (it is scanned)", remedy="run OCR first", field=printable(path))
    damaged = [number for number, text in pages.items() if text is None]
    textless = [number for number, text in texts.items() if not text]
    return ParsedDocument(
        title=title or printable(path.stem),
        kind="pdf",
        sections=sections,
        warnings=(
            *_warning(damaged, "could not be read (damaged)"),
            *_warning(textless, "no text (empty or scanned; OCR would add it)"),
        ),
    )


def unwrap(text: str, number: int = 0) -> str:
    """A page's text with hyphenated words whole, the lines of a paragraph joined, and the page's own number gone."""
    text = clean(_HYPHENATION.sub("-\n", text)).translate(_LIGATURES)
    lines = [line for line in (" ".join(line.split()) for line in text.split("\n")) if line]
    # The number at the head or foot would end up in the middle of a sentence.
    lines = lines[_is_number(lines[:1], number) : len(lines) - _is_number(lines[1:][-1:], number)]
    if not lines:
        return ""
    width = max(map(len, lines))
    out = lines[0]
    for last, line in pairwise(lines):
        out = _joined(out, last, line, width)
    return out


def _is_number(line: list[str], number: int) -> bool:
    return bool(line) and line[0].strip("-–— ") == str(number)


def _joined(out: str, last: str, line: str, width: int) -> str:
    if last.endswith("-") and last[-2:-1].isalpha():
        # Before a capital or a digit the hyphen belongs to the word (COVID-19).
        return out[:-1] + line if line[0].islower() else out + line
    return out + ("\n" if _ends_block(last, line, width) else " ") + line


def _ends_block(last: str, line: str, width: int) -> bool:
    if _BULLET.match(line) or len(last) < width * _SHORT or not any(map(str.isalpha, line)):
        return True
    return len(last) < width * _NEARLY_FULL and bool(_SENTENCE_END.search(last))


def _sections(texts: dict[int, str]) -> Iterator[Section]:
    start = 0
    for number, text in texts.items():
        if text:
            yield Section(text=text, start=start, page=number)
            start += len(text) + len(_PAGE_GAP)


def _extract(path: Path, data: bytes) -> tuple[str, dict[int, str | None]]:
    """The title in the metadata, and the raw text of each page by number; None for a page that does not load."""
    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        raise _open_error(path, error) from error
    with closing(pdf):
        title = one_line(clean(pdf.get_metadata_value("Title")))
        pages = {number: _page_text(pdf, number) for number in range(1, len(pdf) + 1)}
        return "" if _NO_TITLE.match(title) else title, pages


def _page_text(pdf: pypdfium2.PdfDocument, number: int) -> str | None:
    try:
        with closing(pdf[number - 1]) as page, closing(page.get_textpage()) as textpage:
            # Not get_text_range: that one is limited to 16-bit characters.
            return str(textpage.get_text_bounded())
    except pypdfium2.PdfiumError:
        return None


def _open_error(path: Path, error: pypdfium2.PdfiumError) -> DocumentError:
    if error.err_code in (raw.FPDF_ERR_PASSWORD, raw.FPDF_ERR_SECURITY):
        reason, remedy = "the PDF is encrypted with a password", "save a copy without the password (qpdf --decrypt)"
    else:
        reason, remedy = "the PDF is broken", "open it in a viewer and print it to a new PDF"
    return DocumentError(reason, remedy=remedy, field=printable(path))


def _warning(numbers: list[int], what: str) -> Iterator[str]:
    if numbers:
        shown = ", ".join(map(str, numbers[:10])) + (" and more" if len(numbers) > 10 else "")
        yield f"page{'s' if len(numbers) > 1 else ''} {shown}: {what}"
