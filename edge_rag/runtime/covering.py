"""The adapters that may answer questions here, and what has become of them. Any thread may ask.

What a choice needs is held in memory: members, the vectors of the questions that each was trained on, and how it did
in its exam. It is read anew when the registry has changed (`refresh`). An adapter whose file is not what its name says,
or that cannot be loaded, is marked as failed, and its passages are read as text from then on.
"""

import logging
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from edge_rag.errors import StorageError
from edge_rag.policy.covering import NONE, Chosen, Offer, choose
from edge_rag.policy.prompt import LAYOUT_VERSION
from edge_rag.policy.reach import ONLY_TRAINED, may_use
from edge_rag.records import AdapterStatus, Plan
from edge_rag.runtime.adapter_pager import Pager
from edge_rag.store import adapters
from edge_rag.store.database import Database

logger = logging.getLogger(__name__)

Vector = npt.NDArray[np.float32]


class Covering(Protocol):
    """Chooses an adapter for a question."""

    def choose(self, asked: Vector, chunks: Sequence[int]) -> Chosen:
        """The adapter for a question with this embedding, for which these chunks were retrieved."""

    def failed(self, adapter: str) -> None:
        """It could not answer; its passages are read as text instead."""

    def count(self, plan: Plan) -> None:
        """A question was answered in this way."""


class NoAdapters:
    """For when there are none."""

    def choose(self, asked: Vector, chunks: Sequence[int]) -> Chosen:
        """None."""
        return NONE

    def failed(self, adapter: str) -> None:
        """Does not happen."""

    def count(self, plan: Plan) -> None:
        """Counts nothing."""


class _Known(Struct, frozen=True):
    members: frozenset[int]
    reach: float
    vectors: Vector  # of the questions that it was trained on, [n, dimensions]
    f1: npt.NDArray[np.float32]  # [n], NaN where it was not examined

    def may_answer(self, asked: Vector) -> bool:
        """Whether its exam says that it may be asked this."""
        return may_use(asked, self.vectors, self.f1, reach=self.reach)


class Coverer:
    """Chooses among the adapters of one library and one model (`base`: the sha256 of its file)."""

    def __init__(self, database: Database, pager: Pager, *, base: str, least: float) -> None:
        self._database = database
        self._pager = pager
        self._base = base
        self._least = least
        self._known: dict[str, _Known] = {}
        self._lock = threading.Lock()
        self._answers = self._remembered = self._fallbacks = 0
        self.refresh()

    def refresh(self) -> None:
        """Read the registry: something in it has changed."""
        with self._database.read() as connection:
            usable = adapters.usable(adapters.adapters(connection), base=self._base, layout=LAYOUT_VERSION)
            known = {}
            for adapter in usable:
                _, vectors, f1 = adapters.questions_of(connection, adapter.id)
                reach = adapter.gate.reach if adapter.gate else ONLY_TRAINED
                known[adapter.id] = _Known(frozenset(adapter.members), reach, vectors.astype(np.float32), f1)
        self._known = known
        self._pager.pin(frozenset(adapter.id for adapter in usable if adapter.pinned))

    def choose(self, asked: Vector, chunks: Sequence[int]) -> Chosen:
        """The adapter for a question with this embedding, for which these chunks were retrieved."""
        known, resident, wanted = self._known, self._pager.resident(), frozenset(chunks)
        offers = [
            Offer(name, each.members, name in resident)
            for name, each in known.items()
            if each.members & wanted and each.may_answer(asked)
        ]
        while (chosen := choose(chunks, offers, least=self._least)).adapter:
            if self._pager.check(chosen.adapter).result():
                return chosen
            self._disable(chosen.adapter, "its file is missing or was changed")
            offers = [offer for offer in offers if offer.adapter != chosen.adapter]
        return NONE

    def failed(self, adapter: str) -> None:
        """It could not answer; its passages are read as text instead."""
        with self._lock:
            self._fallbacks += 1
        if not self._pager.loads(adapter):
            self._disable(adapter, "it could not be loaded")

    def _disable(self, adapter: str, reason: str) -> None:
        logger.warning("the adapter %s is not used any more: %s", adapter[:12], reason)
        try:
            with self._database.write() as connection:
                adapters.set_state(connection, adapter, "failed", reason)
        except StorageError as error:  # the reader must not lose an answer because the disk is full
            logger.error("that could not be noted: %s", error)
        self.refresh()

    def count(self, plan: Plan) -> None:
        """A question was answered in this way."""
        if plan.adapter:
            with self._lock:
                self._answers += 1
                self._remembered += len(plan.passages) - len(plan.read)

    def status(self) -> AdapterStatus:
        """How many there are, what is in fast memory, and what has come of them."""
        return AdapterStatus(
            ready=len(self._known),
            pager=self._pager.status(),
            answers=self._answers,
            remembered=self._remembered,
            fallbacks=self._fallbacks,
        )
