"""Turns a simple Markdown file into a paginated A4 PDF: `python tools/make_demo_pdf.py SOURCE.md TARGET.pdf`.

It knows #, ## and ### headings, paragraphs on single lines, `- ` lists, and Latin-1 text. The same source always gives
the same bytes.
"""

import ctypes
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pypdfium2
from pypdfium2 import raw

WIDTH, HEIGHT, MARGIN = 595, 842, 72
LEADING = 1.35  # from line to line, in sizes of the font
BODY, FOOT = 11.0, 9.0
SIZES = {"# ": 20.0, "## ": 14.0, "### ": 12.0}

# pdfium stamps the time of writing and a random id; a fixed one of the same length keeps all offsets right.
_DATE = re.compile(rb"(?<=/CreationDate\(D:)\d{14}")
_ID = re.compile(rb"(?<=/ID\[<)([0-9A-F]{32})><([0-9A-F]{32})")


class Line(NamedTuple):
    """One line of text, in its font size; `space` is the gap above it, `keep` that the next one stays with it."""

    text: str
    size: float = BODY
    bold: bool = False
    indent: float = 0.0
    space: float = 0.0
    keep: bool = False


class Writer:
    """A PDF document being written with pdfium. Close it by leaving `with`."""

    def __init__(self) -> None:
        self.pdf = pypdfium2.PdfDocument.new()
        self.fonts = {
            bold: raw.FPDFText_LoadStandardFont(self.pdf, name)
            for bold, name in ((False, b"Helvetica"), (True, b"Helvetica-Bold"))
        }

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for font in self.fonts.values():
            raw.FPDFFont_Close(font)
        self.pdf.close()

    def width(self, text: str, size: float, bold: bool) -> float:
        """The printed width of a text in points."""
        return sum(self._glyph_width(char, size, bold) for char in text)

    def page(self, number: int, lines: list[tuple[float, Line]]) -> None:
        """Append a page: lines with the height of their base above the lower edge, and the page's number below."""
        page = raw.FPDFPage_New(self.pdf, number - 1, WIDTH, HEIGHT)
        for y, line in lines:
            self._put(page, line, MARGIN + line.indent, y)
        foot = Line(str(number), FOOT)
        self._put(page, foot, (WIDTH - self.width(foot.text, FOOT, False)) / 2, MARGIN / 2)
        raw.FPDFPage_GenerateContent(page)
        raw.FPDF_ClosePage(page)

    def data(self) -> bytes:
        """The finished file."""
        buffer = io.BytesIO()
        self.pdf.save(buffer)
        return _ID.sub(b"0" * 32 + b"><" + b"0" * 32, _DATE.sub(b"20340101000000", buffer.getvalue()))

    def _glyph_width(self, char: str, size: float, bold: bool) -> float:
        width = ctypes.c_float()
        raw.FPDFFont_GetGlyphWidth(self.fonts[bold], ord(char), size, ctypes.byref(width))
        return width.value

    def _put(self, page: object, line: Line, x: float, y: float) -> None:
        text = raw.FPDFPageObj_CreateTextObj(self.pdf, self.fonts[line.bold], line.size)
        # A named buffer: a temporary one would be freed while pdfium reads it.
        buffer = ctypes.create_string_buffer((line.text + "\0").encode("utf-16-le"))
        raw.FPDFText_SetText(text, ctypes.cast(buffer, raw.FPDF_WIDESTRING))
        raw.FPDFPageObj_Transform(text, 1, 0, 0, 1, x, y)
        raw.FPDFPage_InsertObject(page, text)


def lines_of(source: str, writer: Writer) -> Iterator[Line]:
    """The Markdown source as wrapped lines."""
    for block in filter(None, map(str.strip, source.splitlines())):
        mark = next((mark for mark in SIZES if block.startswith(mark)), "")
        if mark:
            style = Line("", SIZES[mark], bold=True, space=SIZES[mark] * 0.8, keep=True)
        elif block.startswith("- "):
            style = Line("", indent=BODY, space=BODY * 0.2)
        else:
            style = Line("", space=BODY * 0.6)
        yield from _wrapped(block.removeprefix(mark), style, writer)


def _wrapped(text: str, style: Line, writer: Writer) -> Iterator[Line]:
    room = WIDTH - 2 * MARGIN - style.indent
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and writer.width(longer, style.size, style.bold) > room:
            yield style._replace(text=line)
            style, line = style._replace(space=0.0), word
        else:
            line = longer
    yield style._replace(text=line)


def pages_of(lines: Iterator[Line]) -> Iterator[list[tuple[float, Line]]]:
    """Lines with their heights, page by page. No page ends with a heading."""
    page: list[tuple[float, Line]] = []
    y = float(HEIGHT - MARGIN)
    for line in lines:
        y -= line.size * LEADING + (line.space if page else 0)
        below = BODY * LEADING * 2 if line.keep else 0
        if page and y - below < MARGIN:
            yield page
            page, y = [], HEIGHT - MARGIN - line.size * LEADING
        page.append((y, line))
    yield page


def make_pdf(source: str) -> bytes:
    """The PDF of a Markdown source."""
    source.encode("latin-1")  # The standard fonts have no other characters, and pdfium would drop them in silence.
    with Writer() as writer:
        for number, page in enumerate(pages_of(lines_of(source, writer)), 1):
            writer.page(number, page)
        return writer.data()


def main(arguments: list[str]) -> None:
    """Read the source, write the target in one step."""
    source, target = map(Path, arguments)
    temporary = target.with_name(target.name + ".part")
    temporary.write_bytes(make_pdf(source.read_text(encoding="utf-8")))
    temporary.replace(target)


if __name__ == "__main__":
    main(sys.argv[1:])
