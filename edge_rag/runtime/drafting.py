"""An answer being written: text in, events out, with a citation behind every sentence that a passage supports."""

import re
from collections.abc import Callable, Iterator

from edge_rag.policy.streaming import SentenceStream
from edge_rag.records import Citation, Cited, Delta

# A mark, and what may yet become one when more text comes.
_MARK = re.compile(r" ?\[\d{1,3}\]")
_BEGUN = re.compile(r" ?(?:\[\d{0,3})?$")

Cite = Callable[[str], tuple[int, float] | None]


class Draft:
    """Collects text and citations. `cite` gives (place of the passage, score) for a sentence, or None.

    `remembered` are the places of passages that do not stand in the prompt.
    """

    def __init__(self, cite: Cite, remembered: frozenset[int] = frozenset()) -> None:
        self._cite = cite
        self.remembered = remembered
        self._sentences = SentenceStream()
        self._sentence_start = 0
        self._held = ""
        self.text = ""
        self.citations: list[Citation] = []

    def feed(self, text: str) -> Iterator[Delta | Cited]:
        """Take more text from the model."""
        text = self._without_marks(text)
        if not self.text:
            text = text.lstrip()
        for cut in self._sentences.feed(text):
            yield from self._write(cut.text)
            if cut.ends:
                yield from self._end_sentence()

    def finish(self) -> Iterator[Delta | Cited]:
        """The model has said its last word."""
        held, self._held = self._held, ""
        yield from self._write(held)
        if self._sentences.finish():
            yield from self._end_sentence()

    def _without_marks(self, text: str) -> str:
        """The text without `[n]` marks of the model's own: only ours say that a passage supports a sentence."""
        text = _MARK.sub("", self._held + text)
        begun = _BEGUN.search(text)
        cut = begun.start() if begun else len(text)
        self._held = text[cut:]
        return text[:cut]

    def _write(self, text: str) -> Iterator[Delta]:
        if text:
            self.text += text
            yield Delta(text=text)

    def _end_sentence(self) -> Iterator[Delta | Cited]:
        raw = self.text[self._sentence_start :]
        sentence = raw.strip()
        start = self._sentence_start + len(raw) - len(raw.lstrip())
        supported = self._cite(sentence) if sentence else None
        if supported:
            place, score = supported
            citation = Citation(
                n=place + 1,
                start=start,
                end=start + len(sentence),
                score=round(score, 4),
                remembered=place in self.remembered,
            )
            self.citations.append(citation)
            yield Cited(citation=citation)
            yield from self._write(f" [{citation.n}]")
        self._sentence_start = len(self.text)
