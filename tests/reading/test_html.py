from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.errors import DocumentError
from edge_rag.reading.readers import parse
from edge_rag.records import ParsedDocument


def read(source: str | bytes) -> ParsedDocument:
    return parse(Path("page.html"), source.encode() if isinstance(source, str) else source)


def text(source: str | bytes) -> str:
    return "".join(section.text for section in read(source).sections)


def test_a_page_becomes_lines_under_its_headings() -> None:
    document = read(
        "<html><head><title>T &amp; more</title></head><body><p>intro   text\n <b>bo</b>ld &lt;x&gt;</p>"
        "<h1>Main <em>part</em></h1><div>a<div>b</div>c</div>d<br>e<h2>Sub</h2><h3></h3>end</body></html>"
    )
    assert document.title == "T & more"
    assert [(section.start, section.headings, section.text) for section in document.sections] == [
        (0, (), "intro text bold <x>\n\n"),
        (21, ("Main part",), "Main part\n\na\n\nb\n\nc\n\nd\ne\n\n"),
        (46, ("Main part", "Sub"), "Sub\n\nend"),
    ]


def test_what_no_reader_sees_is_dropped() -> None:
    hidden = ["script", "style", "nav", "noscript", "template", "svg", "form", "iframe"]
    page = "".join(f"<{tag}>hidden</{tag}>" for tag in hidden)
    assert text(f"<!-- hidden -->{page}<p>seen</p>") == "seen"


def test_a_page_inside_a_form_is_still_read() -> None:
    assert text("<form><p>all of it</p></form>") == "all of it"


def test_lists_have_dashes_and_nest() -> None:
    assert text("<ul><li>one<li>two<ol><li><p>inner</p></ol></ul>") == "- one\n- two\n\n  - inner"


def test_tables_become_rows() -> None:
    source = (
        "<table><caption>Cap</caption><tr><th>A<th>B</tr><tr><td><p>1</p><td>x<br>y</tr>"
        "<tr><td></td><td><ul><li>z</ul></tr><tr><td>2<td></tr></table>after"
    )
    assert text(source) == "Cap\nA | B\n1 | x y\n| z\n2\n\nafter"


def test_a_table_that_arranges_the_page_is_no_data() -> None:
    source = "<table><tr><td><h1>H</h1><p>a</p><table><tr><td>1<td>2</table><td>right</table>"
    document = read(source)
    assert [section.text for section in document.sections] == ["H\n\na\n\n1 | 2\n\nright"]
    assert document.title == "H"


def test_preformatted_text_keeps_its_spaces() -> None:
    assert text("<p>a</p><pre>\n x\n   y<br>z</pre>b") == "a\n\n x\n   y\nz\n\nb"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('<meta charset="iso-8859-2"><p>ąćę</p>'.encode("iso8859-2"), "ąćę"),
        ('<meta http-equiv="x" content="text/html; charset=latin1"><p>€ é</p>'.encode("cp1252"), "€ é"),
        ('<meta charset="utf-16"><p>é</p>'.encode(), "é"),
        ('<meta charset="hex"><p>déjà vu là-bas</p>'.encode("cp1252"), "déjà vu là-bas"),
        ('<meta charset="nonsense"><p>déjà vu là-bas</p>'.encode("cp1252"), "déjà vu là-bas"),
    ],
)
def test_the_declared_encoding_helps_when_it_is_not_utf8(source: bytes, expected: str) -> None:
    assert text(source) == expected


def test_a_page_without_text_is_refused() -> None:
    with pytest.raises(DocumentError, match="no text"):
        read("<html><head><title>T</title></head><body><script>x()</script></body></html>")


def test_a_heading_that_is_a_whole_text_is_cut_short_as_a_title() -> None:
    document = read(f"<h1>{'word ' * 1000}</h1>")
    assert len(document.sections[0].text) == 4999
    assert len(document.title) == len(document.sections[0].headings[0]) == 200


def test_deep_nesting_is_read() -> None:
    assert text("<div>" * 3000 + "deep") == "deep"


TAGS = st.sampled_from(
    [
        *("<p>", "</p>", "<h1>", "</h2>", "<table>", "<tr>", "<td>", "</table>", "<ul>", "<li>", "</ul>", "<pre>"),
        *("</pre>", "<br>", "<b>", "&lt;", "&#0;", "&bogus;", "<!--", "-->", "<form>", "<svg>", "</svg>", "<title>"),
        *("word", "<", ">", "\n", "<select>", "<option>", "<template>", "<h3>", "</h3>"),
    ]
)


@given(st.lists(TAGS, max_size=40))
def test_malformed_pages_are_read_in_sections_without_gaps(tags: list[str]) -> None:
    document = read("start " + "".join(tags))
    start = document.sections[0].start
    for section in document.sections:
        assert section.start == start
        start += len(section.text)
