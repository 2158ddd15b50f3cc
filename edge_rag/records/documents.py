"""Documents, what they are cut into, and what adding them came to."""

from typing import Literal

from edge_rag.records.base import Record


class Section(Record, frozen=True):
    """A stretch of a document under one heading (and, in a PDF, on one page).

    `start` is the offset of `text` in the document's extracted text; sections are in order and do not overlap.
    """

    text: str
    start: int
    headings: tuple[str, ...] = ()
    page: int | None = None


class ParsedDocument(Record, frozen=True):
    """What a reader made of a file: its sections, and warnings worth showing (not errors)."""

    title: str
    kind: str
    sections: tuple[Section, ...]
    warnings: tuple[str, ...] = ()


class Chunk(Record, frozen=True):
    """The unit of retrieval, of KV and of adapters: at most `chunk_tokens` LLM tokens, never overlapping another.

    `heading` is the path of headings joined by ' › ', beginning with the document's title.
    """

    ordinal: int
    text: str
    heading: str
    page: int | None
    start: int
    end: int
    tokens: int


class Document(Record, frozen=True):
    """A document in the library. `recipe` names how it was cut; another recipe means cutting it again."""

    id: int
    path: str
    title: str
    kind: str
    bytes: int
    sha256: str
    recipe: str
    chunks: int
    tokens: int
    added_at: float


class FileReport(Record, frozen=True):
    """What `add` did with one file."""

    path: str
    outcome: Literal["added", "replaced", "unchanged", "failed", "vanished", "removed"]
    chunks: int = 0
    reason: str = ""
    warnings: tuple[str, ...] = ()


class AddReport(Record, frozen=True):
    """What `add` did: one `FileReport` a file, in the order in which they were finished."""

    files: tuple[FileReport, ...]
    seconds: float

    def count(self, outcome: str) -> int:
        """How many files had this outcome."""
        return sum(file.outcome == outcome for file in self.files)

    @property
    def failed(self) -> tuple[FileReport, ...]:
        """The files that could not be read."""
        return tuple(file for file in self.files if file.outcome == "failed")
