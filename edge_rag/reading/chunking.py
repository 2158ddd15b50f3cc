"""Cutting a document into chunks, the units of retrieval and of KV.

A chunk is a slice of the extracted text, on one page, of at most `chunk_tokens` tokens. semchunk cuts each section;
then small pieces are joined to their neighbours, because a lone heading or half a sentence retrieves badly. Where a
small piece does not fit beside its neighbour, the neighbour is cut in the middle and the small piece takes a half.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import semchunk

from edge_rag.errors import InputError
from edge_rag.records import Chunk, ParsedDocument, Section

# Below this, a single rare character may have more tokens than half a chunk, and could not be cut.
MIN_CHUNK_TOKENS = 16
# Longer texts are cut at white space before any counting: tokenizers and semchunk may take quadratic time. Also the
# most characters in a chunk, whatever the counter says of a line without spaces.
_BLOCK = 20_000

SEPARATOR = " › "

_Count = Callable[[str], int]


def make_chunks(document: ParsedDocument, *, count_tokens: _Count, chunk_tokens: int = 256) -> tuple[Chunk, ...]:
    """The document's chunks in order. Together they hold all its text but white space between them, once.

    `count_tokens` must always say the same of the same text; it is called for some seven times the text in total.
    """
    if chunk_tokens < MIN_CHUNK_TOKENS:
        raise InputError(f"{chunk_tokens} is too small", remedy=f"use {MIN_CHUNK_TOKENS} or more", field="chunk_tokens")
    chunks: list[Chunk] = []
    for run in _runs(document.sections):
        for start, end in _Packer(run, count_tokens, chunk_tokens).pack():
            text = run.text[start:end]
            chunks.append(
                Chunk(
                    ordinal=len(chunks),
                    text=text,
                    heading=_heading(document.title, run.headings_at(start)),
                    page=run.page,
                    start=run.start + start,
                    end=run.start + end,
                    tokens=count_tokens(text),
                )
            )
    return tuple(chunks)


def _heading(title: str, path: tuple[str, ...]) -> str:
    return SEPARATOR.join(path if path[:1] == (title,) else (title, *path))


class _Run(NamedTuple):
    """Sections that follow each other without a gap on one page: chunks may cross their borders, but not the run's."""

    text: str
    start: int
    page: int | None
    borders: tuple[int, ...]  # the offset of each section in `text`
    headings: tuple[tuple[str, ...], ...]

    def section_at(self, offset: int) -> int:
        return bisect_right(self.borders, offset) - 1

    def headings_at(self, offset: int) -> tuple[str, ...]:
        return self.headings[self.section_at(offset)]


class _Piece(NamedTuple):
    """A slice of a run's text; `tokens` counts the white space up to the next piece as well."""

    start: int
    end: int
    tokens: int


def _runs(sections: tuple[Section, ...]) -> Iterator[_Run]:
    group: list[Section] = []
    for section in sections:
        if group and (section.page != group[-1].page or section.start != group[-1].start + len(group[-1].text)):
            yield _run(group)
            group = []
        group.append(section)
    if group:
        yield _run(group)


def _run(group: list[Section]) -> _Run:
    return _Run(
        text="".join(section.text for section in group),
        start=group[0].start,
        page=group[0].page,
        borders=tuple(section.start - group[0].start for section in group),
        headings=tuple(section.headings for section in group),
    )


class _Packer:
    """Makes the chunks of one run, from left to right."""

    def __init__(self, run: _Run, count: _Count, limit: int) -> None:
        self.run = run
        self.count = count
        self.limit = limit
        self.small = limit // 4
        self.rest = deque(self._pieces())

    def pack(self) -> Iterator[tuple[int, int]]:
        """The bounds of each chunk."""
        group: list[_Piece] = []
        while self.rest or group:
            piece = self.rest.popleft() if self.rest else None
            if piece is None:
                # This may put pieces back, and the loop goes on with them.
                yield from self._close(group)
                group = []
            elif not group or self._joins(group, piece):
                group.append(piece)
            elif halves := self._shares(group, piece):
                group.append(halves[0])
                self.rest.appendleft(halves[1])
            elif halves := self._pulls_back(group, piece):
                yield halves[0].start, halves[0].end
                group = [halves[1], piece]
            else:
                self.rest.appendleft(piece)
                yield from self._close(group)
                group = []

    # --- decisions ---------------------------------------------------------------------------------------------------

    def _joins(self, group: list[_Piece], piece: _Piece) -> bool:
        if not self._fits(group, piece):
            return False
        if self._same_section(group, piece):
            return True
        small_group = _tokens(group) < self.small
        return small_group or (piece.tokens < self.small and not self._leads(piece))

    def _shares(self, group: list[_Piece], piece: _Piece) -> tuple[_Piece, _Piece] | None:
        """Halves of a piece that does not fit, the first of them for a group that must not end here."""
        if _tokens(group) >= self.small and not self._ends_in_heading(group, piece):
            return None
        halves = self._halves(piece)
        return halves if halves and self._fits(group, halves[0]) else None

    def _pulls_back(self, group: list[_Piece], piece: _Piece) -> tuple[_Piece, _Piece] | None:
        """Halves of a group, the second of them for a small piece that has nothing after it to join."""
        if piece.tokens >= self.small or self._leads(piece):
            return None
        if self.rest and not self._same_section(group, piece):
            return None
        halves = self._halves(_Piece(group[0].start, group[-1].end, _tokens(group)))
        return halves if halves and self._fits([halves[1]], piece) else None

    def _ends_in_heading(self, group: list[_Piece], piece: _Piece) -> bool:
        """Whether the group's last piece is the small beginning of the section that `piece` goes on with."""
        last = group[-1]
        begins = len(group) > 1 and not self._same_section(group[:-1], last)
        return begins and last.tokens < self.small and self._same_section(group, piece)

    def _leads(self, piece: _Piece) -> bool:
        """Whether what follows stands under the same heading as this piece, or under one below it."""
        if not self.rest:
            return False
        own, following = self.run.headings_at(piece.start), self.run.headings_at(self.rest[0].start)
        return following[: len(own)] == own

    def _fits(self, group: list[_Piece], piece: _Piece) -> bool:
        return _tokens(group) + piece.tokens <= self.limit and piece.end - group[0].start <= _BLOCK

    def _same_section(self, group: list[_Piece], piece: _Piece) -> bool:
        return self.run.section_at(group[-1].start) == self.run.section_at(piece.start)

    # --- cutting -----------------------------------------------------------------------------------------------------

    def _close(self, group: list[_Piece]) -> Iterator[tuple[int, int]]:
        """The group as a chunk. Joined text may have more tokens than its parts: then the last ones go back."""
        while len(group) > 1 and self.count(self.run.text[group[0].start : group[-1].end]) > self.limit:
            self.rest.appendleft(group.pop())
        yield group[0].start, group[-1].end

    def _halves(self, piece: _Piece) -> tuple[_Piece, _Piece] | None:
        """A piece cut near its middle, at the best place that semchunk finds."""
        spans = list(self._cut(piece.start, piece.end, self.limit // 2))
        if len(spans) < 2:
            return None
        middle = (piece.start + piece.end) / 2
        at = min(range(1, len(spans)), key=lambda index: abs(spans[index][0] - middle))
        first = self._piece(spans[0][0], spans[at - 1][1], spans[at][0])
        second = self._piece(spans[at][0], spans[-1][1], spans[-1][1])
        fit = all(self.count(self.run.text[half.start : half.end]) <= self.limit for half in (first, second))
        return (first, second) if fit else None

    def _pieces(self) -> Iterator[_Piece]:
        borders = (*self.run.borders, len(self.run.text))
        spans = [
            span
            for start, end in pairwise(borders)
            for block in _blocks(self.run.text, start, end)
            for span in self._cut(*block, self.limit)
        ]
        nexts = [start for start, _ in spans[1:]] + [spans[-1][1]] if spans else []
        for (start, end), following in zip(spans, nexts, strict=True):
            yield self._piece(start, end, following)

    def _piece(self, start: int, end: int, following: int) -> _Piece:
        return _Piece(start, end, self.count(self.run.text[start:following]))

    def _cut(self, start: int, end: int, limit: int) -> Iterator[tuple[int, int]]:
        """Bounds of pieces of at most `limit` tokens, without white space at their ends."""
        _, bounds = semchunk.chunk(self.run.text[start:end], limit, self.count, memoize=False, offsets=True)
        for low, high in bounds:
            yield from self._trimmed(start + low, start + high, limit)

    def _trimmed(self, start: int, end: int, limit: int) -> Iterator[tuple[int, int]]:
        text = self.run.text[start:end]
        start, end = start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())
        if start >= end:
            return
        # Without its white space a text may, if rarely, have more tokens than with it.
        if end - start > 1 and self.count(self.run.text[start:end]) > limit:
            middle = (start + end) // 2
            yield from self._trimmed(start, middle, limit)
            yield from self._trimmed(middle, end, limit)
        else:
            yield start, end


def _tokens(group: list[_Piece]) -> int:
    return sum(piece.tokens for piece in group)


def _blocks(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    while end - start > _BLOCK:
        middle, last = start + _BLOCK // 2, start + _BLOCK
        # After a line end, else before white space, else anywhere.
        cut = text.rfind("\n", middle, last) + 1 or start + len((text[start:last].rsplit(None, 1) or [""])[0])
        cut = cut if middle < cut < last else last
        yield start, cut
        start = cut
    yield start, end
