"""HTML: the visible text in lines, with sections at h1..h6. Offsets refer to this text, not to the source."""

import codecs
import re
from pathlib import Path

from selectolax.lexbor import LexborHTMLParser, LexborNode

from edge_rag.errors import DocumentError
from edge_rag.reading.kinds import printable
from edge_rag.reading.markdown import Heading, cut_at_headings
from edge_rag.reading.text import clean, decode, one_line
from edge_rag.records import ParsedDocument

_DROPPED = frozenset({"script", "style", "nav", "noscript", "template", "svg", "form", "head", "iframe"})
_LEVELS = {f"h{level}": level for level in range(1, 7)}
# How many line ends stand before and after an element.
_BREAKS = {
    **dict.fromkeys(("address", "article", "aside", "blockquote", "details", "dialog", "div", "dl", "fieldset"), 2),
    **dict.fromkeys(("figure", "footer", "header", "hr", "main", "ol", "p", "pre", "section", "table", "ul"), 2),
    **dict.fromkeys(("body", "br", "caption", "dd", "dt", "figcaption", "li", "option", "summary", "tr"), 1),
    **dict.fromkeys(_LEVELS, 2),
}
_CELLS = frozenset({"td", "th"})
# A table that holds these arranges the page; its cells are no data.
_LAYOUT = "h1, h2, h3, h4, h5, h6, table, pre"

_MAX_LAYOUT = 20  # nested tables deeper down are not searched for such

_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
# Of the codecs that Python knows, those that a page can mean.
_PAGE_CODEC = re.compile(r"iso8859|cp\d|koi8|gb|big5|euc_|shift_jis|mac|tis_620|johab")
_SPACE = re.compile(r"\s+")


def parse_html(path: Path, data: bytes) -> ParsedDocument:
    """The text that a reader of the page would see, without navigation, scripts and forms."""
    source, warnings = decode(path, data, _declared(data))
    tree = LexborHTMLParser(source)
    # Some servers wrap the whole page in a form; then its content is what there is to read.
    writer = _write(tree, _DROPPED) or _write(tree, _DROPPED - {"form"})
    if writer is None:
        remedy = "save the page from a browser after its scripts have run"
        raise DocumentError("no text is left of the page", remedy=remedy, field=printable(path))
    text = writer.text()
    title = _title(tree) or next((found.title for found in writer.headings if found.level == 1), "")
    return ParsedDocument(
        title=title or printable(path.stem),
        kind="html",
        sections=cut_at_headings(text, 0, writer.headings),
        warnings=warnings,
    )


def _declared(data: bytes) -> str:
    match = _CHARSET.search(data[:4096])
    if not match:
        return ""
    try:
        name = codecs.lookup(match[1].decode("ascii")).name
    except LookupError:
        return ""
    # As browsers do: pages that name the standard mean the Windows encoding.
    return "cp1252" if name in ("iso8859-1", "ascii") else name if _PAGE_CODEC.match(name) else ""


def _title(tree: LexborHTMLParser) -> str:
    node = tree.css_first("head > title")
    return one_line(node.text()) if node else ""


def _write(tree: LexborHTMLParser, dropped: frozenset[str]) -> "_Writer | None":
    writer = _Writer()
    if tree.root is not None:
        _walk(tree.root, dropped, writer)
    writer.leave_heading()
    return writer if writer.parts else None


def _walk(root: LexborNode, dropped: frozenset[str], writer: "_Writer") -> None:
    # A stack, not recursion: broken pages nest thousands of elements.
    stack: list[tuple[LexborNode, bool]] = [(root, False)]
    while stack:
        node, leaving = stack.pop()
        tag = node.tag or ""
        if leaving:
            _leave(tag, writer)
        elif tag == "-text":
            writer.write(node.text_content or "")
        elif tag not in dropped and not tag.startswith("-"):
            _enter(node, tag, writer)
            stack.append((node, True))
            stack.extend((child, False) for child in reversed(_children(node)))


def _children(node: LexborNode) -> list[LexborNode]:
    children = []
    child = node.first_child
    while child is not None:
        children.append(child)
        child = child.next
    return children


def _enter(node: LexborNode, tag: str, writer: "_Writer") -> None:
    if tag == "table":
        writer.tables.append(len(writer.tables) < _MAX_LAYOUT and not writer.in_data() and _is_layout(node))
    if tag in _BREAKS:
        writer.line_break(_BREAKS[tag], tag)
    if tag in _CELLS:
        writer.cell()
    elif tag in ("ul", "ol"):
        writer.lists += 1
    elif tag == "li":
        writer.bullet()
    elif tag in _LEVELS:
        writer.enter_heading(_LEVELS[tag])
    writer.preformatted += tag == "pre"


def _is_layout(table: LexborNode) -> bool:
    # The search includes the table itself.
    return any(inner.mem_id != table.mem_id for inner in table.css(_LAYOUT))


def _leave(tag: str, writer: "_Writer") -> None:
    if tag in _LEVELS:
        writer.leave_heading()
    if tag in _BREAKS and tag != "br":
        writer.line_break(_BREAKS[tag], tag)
    writer.lists -= tag in ("ul", "ol")
    writer.preformatted -= tag == "pre"
    if tag == "table":
        writer.tables.pop()


class _Writer:
    """Collects text; breaks and separators wait until text follows, so that none is doubled or left over."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.headings: list[Heading] = []
        self.lists = 0
        self.preformatted = 0
        self.tables: list[bool] = []  # of the open tables: whether it only arranges the page
        self._length = 0
        self._breaks = 0
        self._space = False
        self._prefix = ""
        self._cells = 0  # cells begun in the current row
        self._level = 0
        self._heading_start = -1  # its offset, and the first of its parts
        self._heading_part = 0

    def text(self) -> str:
        """All that was written."""
        return "".join(self.parts)

    def in_data(self) -> bool:
        """Whether the innermost table holds data, so that its rows stay on one line."""
        return bool(self.tables) and not self.tables[-1]

    def line_break(self, count: int, tag: str) -> None:
        """At least `count` line ends come before the next text."""
        if self.preformatted and tag == "br":
            self._put("\n")
        elif self.in_data() and tag not in ("tr", "table", "caption"):
            self._space = True
        else:
            self._breaks = max(self._breaks, count)
            if tag == "tr":
                self._cells, self._prefix = 0, ""

    def bullet(self) -> None:
        """The next text starts a list item."""
        if not self.in_data():
            self._prefix = "  " * (self.lists - 1) + "- "

    def cell(self) -> None:
        """A table cell begins."""
        if not self.in_data():
            self.line_break(1, "tr")
            return
        if self._cells:
            self._prefix += "| " if self._breaks else " | "
        self._cells += 1

    def enter_heading(self, level: int) -> None:
        """What is written until `leave_heading` is a heading."""
        self._level, self._heading_start = level, -1

    def leave_heading(self) -> None:
        """Keep the heading just written, unless it was empty."""
        if self._level and self._heading_start >= 0:
            title = one_line("".join(self.parts[self._heading_part :]))
            self.headings.append(Heading(self._heading_start, self._level, title))
        self._level = 0

    def write(self, text: str) -> None:
        """Write text as a browser would: white space counts once, except in `pre`."""
        if self.preformatted:
            self._put(clean(text))
            return
        words = _SPACE.sub(" ", clean(text))
        if stripped := words.strip(" "):
            self._space |= words[0] == " "
            self._put(stripped)
        self._space |= words.endswith(" ")

    def _put(self, text: str) -> None:
        if not text:
            return
        lead = self._lead()
        if self._level and self._heading_start < 0:
            self._heading_start, self._heading_part = self._length + len(lead), len(self.parts)
        self.parts.append(lead + text)
        self._length += len(lead) + len(text)
        self._breaks, self._space, self._prefix = 0, False, ""

    def _lead(self) -> str:
        if not self.parts:
            return self._prefix.lstrip()
        if self._breaks:
            return "\n" * self._breaks + self._prefix
        return self._prefix or (" " if self._space else "")
