"""Markdown: sections at headings, with the source text left exactly as it is."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from edge_rag.reading.kinds import printable
from edge_rag.reading.text import decode, one_line
from edge_rag.records import ParsedDocument, Section

_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})")
_ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*))?$")
_CLOSING_HASHES = re.compile(r"(?:^|[ \t])#+[ \t]*$")
_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*$")
# Lines that an underline does not turn into a heading: code, quotes, lists, tables, rules, underlines, headings.
_NO_PARAGRAPH = re.compile(r"[ \t]*$| {4}|\t| {0,3}(?:>|[-+*][ \t]|\d+[.)][ \t]|\||#{1,6}[ \t]|[-=_*]{2,}[ \t]*$)")

_LINK = re.compile(r"!?\[([^\[\]]*)\](?:\([^)]*\)|\[[^\]]*\])")
_ATTRIBUTES = re.compile(r"\s*\{[#.:][^}]*\}\s*$")
_EMPHASIS = re.compile(r"(\*{1,3}|_{2,3}|`+|~~)(?=\S)(.+?)(?<=\S)\1")

_FRONT_MATTER = re.compile(r"---[ \t]*\n((?:.*\n)*?)(?:---|\.\.\.)[ \t]*(?:\n|$)")
_FRONT_KEY = re.compile(r"^[\w-]+[ \t]*:", re.MULTILINE)
_FRONT_TITLE = re.compile(r"^title[ \t]*:[ \t]*(.+?)[ \t]*$", re.MULTILINE | re.IGNORECASE)


class Heading(NamedTuple):
    """A heading in a text: the offset of its first character, its level 1..6 and its title."""

    start: int
    level: int
    title: str


def parse_markdown(path: Path, data: bytes) -> ParsedDocument:
    """A section a heading, which stays the first line of its section."""
    text, warnings = decode(path, data)
    return markdown_document(path, text, kind="md", warnings=warnings)


def markdown_document(path: Path, text: str, *, kind: str, warnings: tuple[str, ...] = ()) -> ParsedDocument:
    """The document in Markdown source that was read or converted from `path`."""
    body, front_title = _front_matter(text)
    found = list(headings(text, body))
    first = next((heading.title for heading in found if heading.level == 1), "")
    return ParsedDocument(
        title=front_title or first or printable(path.stem),
        kind=kind,
        sections=cut_at_headings(text, body, found),
        warnings=warnings,
    )


def cut_at_headings(text: str, start: int, found: list[Heading]) -> tuple[Section, ...]:
    """Contiguous sections from `start` to the end of `text`: one before the first heading, one from each heading on."""
    bounds = [start, *(heading.start for heading in found), len(text)]
    trail: list[Heading] = []
    paths: list[tuple[str, ...]] = [()]
    for heading in found:
        trail = [*(outer for outer in trail if outer.level < heading.level), heading]
        paths.append(tuple(outer.title for outer in trail))
    pieces = zip(paths, bounds, bounds[1:], strict=False)
    return tuple(
        Section(text=text[begin:end], start=begin, headings=path)
        for path, begin, end in pieces
        if text[begin:end].strip()
    )


def headings(text: str, start: int = 0) -> Iterator[Heading]:
    """The ATX and setext headings of Markdown source outside code fences, from offset `start` on."""
    fence = ""
    before, last = "", ""
    for offset, line in _lines(text, start):
        if mark := _FENCE.match(line):
            fence = _after_fence(fence, mark[1], line)
        elif not fence and (heading := _atx(line, offset) or _setext(before, last, line, offset)):
            yield heading
        before, last = last, "" if fence or mark else line


def plain(title: str) -> str:
    """A heading without its inline markup (links, emphasis, code), lightly."""
    title = _LINK.sub(r"\1", _ATTRIBUTES.sub("", one_line(title)))
    # Twice: emphasis may hold code, or code emphasis.
    return one_line(_EMPHASIS.sub(r"\2", _EMPHASIS.sub(r"\2", title)))


def _lines(text: str, start: int) -> Iterator[tuple[int, str]]:
    # Not splitlines: it also splits at characters that are no line ends here.
    for line in text[start:].split("\n"):
        yield start, line
        start += len(line) + 1


def _after_fence(fence: str, mark: str, line: str) -> str:
    if not fence:
        return mark
    closes = mark[0] == fence[0] and len(mark) >= len(fence) and line.strip() == mark
    return "" if closes else fence


def _atx(line: str, offset: int) -> Heading | None:
    if not (match := _ATX.match(line)):
        return None
    title = plain(_CLOSING_HASHES.sub("", match[2] or ""))
    return Heading(offset, len(match[1]), title) if title else None


def _setext(before: str, last: str, line: str, offset: int) -> Heading | None:
    # Only single lines: under a longer paragraph, a row of dashes is nearly always meant as a rule.
    match = _UNDERLINE.match(line)
    if not match or _NO_PARAGRAPH.match(last) or not _NO_PARAGRAPH.match(before):
        return None
    title = plain(last)
    return Heading(offset - len(last) - 1, 1 if match[1][0] == "=" else 2, title) if title else None


def _front_matter(text: str) -> tuple[int, str]:
    """Where the body starts, and the title in a YAML block before it."""
    match = _FRONT_MATTER.match(text)
    if not match or not _FRONT_KEY.search(match[1]):
        return 0, ""
    title = _FRONT_TITLE.search(match[1])
    # A file of front matter alone is still a document: better its keys than nothing.
    body = match.end() if text[match.end() :].strip() else 0
    return body, one_line(_unquoted(title[1])) if title else ""


def _unquoted(value: str) -> str:
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1].strip() if quoted else value
