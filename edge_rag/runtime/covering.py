"""Which adapter answers a question, by rule: the one that covers most of what was retrieved. Any thread may ask.

What becomes of the choice is counted here. An adapter that fails while it answers is replaced by its passages, and is
not used any more when it cannot be loaded at all.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from edge_rag.policy.covering import NONE, Chosen, choose
from edge_rag.records import AdapterStatus, Plan
from edge_rag.runtime.shelf import Shelf, Vector

# What predicts the seconds of reading a prompt without the passages of some chunks; made when it is needed.
Waits = Callable[[], Callable[[frozenset[int]], float]]


def no_waits() -> Callable[[frozenset[int]], float]:
    """For when nobody waits."""
    return lambda without: 0.0


class Covering(Protocol):
    """Chooses an adapter for a question."""

    def choose(
        self,
        asked: Vector,
        chunks: Sequence[int],
        scores: Sequence[float] = (),
        waits: Waits = no_waits,
        *,
        tries: bool = True,
    ) -> Chosen:
        """The adapter for a question with this embedding, for which these chunks were retrieved with these scores.

        Without `tries` nothing is done in order to learn from it.
        """

    def foresee(self, asked: Vector) -> None:
        """A question with this embedding is coming; its passages are searched for now."""

    def failed(self, adapter: str) -> None:
        """It could not answer; its passages are read as text instead."""

    def count(self, plan: Plan, chosen: Chosen) -> None:
        """A question was answered in this way, after this choice."""


class NoAdapters:
    """For when there are none."""

    def choose(
        self,
        asked: Vector,
        chunks: Sequence[int],
        scores: Sequence[float] = (),
        waits: Waits = no_waits,
        *,
        tries: bool = True,
    ) -> Chosen:
        """None."""
        return NONE

    def foresee(self, asked: Vector) -> None:
        """Nothing."""

    def failed(self, adapter: str) -> None:
        """Does not happen."""

    def count(self, plan: Plan, chosen: Chosen) -> None:
        """Counts nothing."""


class Coverer:
    """Chooses by coverage among the adapters of a shelf whose exam allows the question.

    An adapter must cover at least the share `least` of the retrieved passages.
    """

    def __init__(self, shelf: Shelf, *, least: float) -> None:
        self.shelf = shelf
        self._least = least
        self._lock = threading.Lock()
        self._answers = self._remembered = self._fallbacks = 0

    def refresh(self) -> None:
        """The registry has changed."""
        self.shelf.refresh()

    def choose(
        self,
        asked: Vector,
        chunks: Sequence[int],
        scores: Sequence[float] = (),
        waits: Waits = no_waits,
        *,
        tries: bool = True,
    ) -> Chosen:
        """The adapter for a question with this embedding, for which these chunks were retrieved."""
        offers = [offer for offer in self.shelf.offers(asked, chunks) if offer.within]
        while (chosen := choose(chunks, offers, least=self._least)).adapter:
            if self.shelf.is_sound(chosen.adapter):
                return chosen
            offers = [offer for offer in offers if offer.adapter != chosen.adapter]
        return NONE

    def foresee(self, asked: Vector) -> None:
        """A question with this embedding is coming: begin to read the file of the likeliest adapter."""
        self.shelf.foresee(asked)

    def failed(self, adapter: str) -> None:
        """It could not answer; its passages are read as text instead."""
        with self._lock:
            self._fallbacks += 1
        if not self.shelf.pager.loads(adapter):
            self.shelf.disable(adapter, "it could not be loaded")
            self.refresh()

    def count(self, plan: Plan, chosen: Chosen) -> None:
        """A question was answered in this way, after this choice."""
        if plan.adapter:
            with self._lock:
                self._answers += 1
                self._remembered += len(plan.passages) - len(plan.read)

    def status(self) -> AdapterStatus:
        """How many there are, what is in fast memory, and what has come of them."""
        return AdapterStatus(
            ready=len(self.shelf.known),
            pager=self.shelf.pager.status(),
            answers=self._answers,
            remembered=self._remembered,
            fallbacks=self._fallbacks,
        )
