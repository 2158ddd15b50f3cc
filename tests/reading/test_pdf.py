import ctypes
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pypdfium2
import pytest
from pypdfium2 import raw

from edge_rag.errors import DocumentError
from edge_rag.reading.pdf import unwrap
from edge_rag.reading.readers import parse, read_document

# The smallest file with a standard security handler. No password gives these keys, not even the empty one.
ENCRYPTED = b"""%%PDF-1.4
1 0 obj <</Type/Catalog/Pages 2 0 R>> endobj
2 0 obj <</Type/Pages/Kids[3 0 R]/Count 1>> endobj
3 0 obj <</Type/Page/Parent 2 0 R/MediaBox[0 0 99 99]>> endobj
4 0 obj <</Filter/Standard/V 1/R 2/P -4/O<%b>/U<%b>>> endobj
trailer <</Root 1 0 R/Encrypt 4 0 R/ID[<00><00>]/Size 5>>
%%%%EOF
""" % (b"41" * 32, b"42" * 32)


def make_pdf(*pages: list[str], title: str = "") -> bytes:
    """A PDF with the given lines on each page."""
    with pypdfium2.PdfDocument.new() as pdf:
        for number, lines in enumerate(pages):
            page = raw.FPDFPage_New(pdf, number, 595, 842)
            for row, line in enumerate(lines):
                text = raw.FPDFPageObj_NewTextObj(pdf, b"Helvetica", 11)
                buffer = ctypes.create_string_buffer((line + "\0").encode("utf-16-le"))
                raw.FPDFText_SetText(text, ctypes.cast(buffer, raw.FPDF_WIDESTRING))
                raw.FPDFPageObj_Transform(text, 1, 0, 0, 1, 72, 770 - 15 * row)
                raw.FPDFPage_InsertObject(page, text)
            raw.FPDFPage_GenerateContent(page)
            raw.FPDF_ClosePage(page)
        file = io.BytesIO()
        pdf.save(file)
    # pdfium has no call that sets a title. Its reader repairs the offsets that this shifts.
    return file.getvalue().replace(b"/Creator(PDFium)", b"/Creator(PDFium)/Title(%b)" % title.encode())


def refusal(data: bytes) -> DocumentError:
    with pytest.raises(DocumentError) as caught:
        parse(Path("a.pdf"), data)
    assert caught.value.field == "a.pdf"
    return caught.value


def test_each_page_is_a_section_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "report.pdf").write_bytes(make_pdf(["First page."], ["Second: Größe – 5 µm."]))
    document = read_document(tmp_path / "report.pdf", max_bytes=1 << 20)
    assert (document.title, document.kind, document.warnings) == ("report", "pdf", ())
    assert [(section.page, section.start, section.text) for section in document.sections] == [
        (1, 0, "First page."),
        (2, 13, "Second: Größe – 5 µm."),
    ]


def test_words_broken_at_line_ends_are_whole_again() -> None:
    page = [
        "This line is as long as the others and has an exam-",
        "ple at its end, and a second one against COVID-",
        "19 too.",
    ]
    (section,) = parse(Path("a.pdf"), make_pdf(page)).sections
    assert section.text == (
        "This line is as long as the others and has an example at its end, and a second one against COVID-19 too."
    )


def test_pages_without_text_are_named_and_the_others_read() -> None:
    document = parse(Path("a.pdf"), make_pdf([], ["text"], []))
    assert [section.page for section in document.sections] == [2]
    assert document.warnings == ("pages 1, 3: no text (empty or scanned; OCR would add it)",)


def test_the_title_comes_from_the_metadata_unless_it_says_nothing() -> None:
    assert parse(Path("a.pdf"), make_pdf(["text"], title="Annual report")).title == "Annual report"
    assert parse(Path("a.pdf"), make_pdf(["text"], title="Microsoft Word - x.doc")).title == "a"


def test_a_scanned_pdf_is_refused_with_the_remedy() -> None:
    error = refusal(make_pdf([], []))
    assert "scanned" in error.message
    assert "OCR" in error.remedy


def test_an_encrypted_pdf_is_refused() -> None:
    assert "password" in refusal(ENCRYPTED).message


@pytest.mark.parametrize("data", [b"no pdf", make_pdf(["x"])[:300], b"%PDF-1.7\n%%EOF"])
def test_a_broken_pdf_is_refused(data: bytes) -> None:
    assert "broken" in refusal(data).message


def test_a_damaged_page_is_named_and_the_others_read() -> None:
    data = make_pdf(["one"], ["two"])
    first = data.index(b"/Type/Page>>")
    document = parse(Path("a.pdf"), data[:first] + b"/Type/Pagf>>" + data[first + 12 :])
    assert [section.text for section in document.sections] == ["two"]
    assert document.warnings == ("page 1: could not be read (damaged)",)


def test_several_threads_can_read_at_once() -> None:
    data = [make_pdf([f"document {number}"]) for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        documents = pool.map(lambda one: parse(Path("a.pdf"), one), data)
        assert [document.sections[0].text for document in documents] == [f"document {n}" for n in range(8)]


WIDE = "This line goes on to the right margin of the page, as do most"
SHORTER = "others, but this one ends a paragraph before it."


@pytest.mark.parametrize(
    ("page", "text"),
    [
        pytest.param(f"{WIDE}\r\nothers.", f"{WIDE} others.", id="wrapped lines are joined"),
        pytest.param(f"Heading\r\n{WIDE}", f"Heading\n{WIDE}", id="a short line ends its block"),
        pytest.param(f"{WIDE}\r\n- item\r\n- item", f"{WIDE}\n- item\n- item", id="list items stay lines"),
        pytest.param(f"{WIDE}\r\n{SHORTER}\r\nNext", f"{WIDE} {SHORTER}\nNext", id="paragraphs stay apart"),
        pytest.param(f"{WIDE}-\r\nOld", f"{WIDE}-Old", id="a hyphen before a capital stays"),
        pytest.param(f"{WIDE} -\r\nyes", f"{WIDE} - yes", id="a dash is no hyphen"),
        pytest.param("e\ufb03cient  \t words", "efficient words", id="ligatures are taken apart"),
        pytest.param("7\r\ntext\r\n- 7 -", "text", id="the page's own number goes"),
        pytest.param(f"{WIDE}\r\n12 34", f"{WIDE}\n12 34", id="lines of numbers stay lines"),
        pytest.param("7", "", id="a page of nothing but its number"),
    ],
)
def test_unwrapping(page: str, text: str) -> None:
    assert unwrap(page, 7) == text
