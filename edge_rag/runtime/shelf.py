"""The adapters that may answer questions here, as the registry has them. Any thread may ask.

What a choice needs is held in memory: members, the vectors of the questions that each was trained on, and how it did
in its exam. It is read anew when the registry has changed (`refresh`). An adapter whose file is not what its name says,
or that cannot be loaded, is marked as failed, and its passages are read as text from then on.
"""

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from edge_rag.errors import StorageError
from edge_rag.policy.covering import Offer
from edge_rag.policy.prompt import LAYOUT_VERSION
from edge_rag.policy.reach import ONLY_TRAINED, closeness, may_use
from edge_rag.records import Adapter
from edge_rag.runtime.adapter_pager import Pager
from edge_rag.store import adapters
from edge_rag.store.database import Connection, Database

logger = logging.getLogger(__name__)

NEAR = 0.5  # cosine of a question to one that an adapter was trained on, from which on its file is read ahead

Vector = npt.NDArray[np.float32]


class Known(Struct, frozen=True):
    """An adapter that may answer. `vectors` [n, d] are of the questions that it was trained on.

    `f1` [n] is how each did in the exam, NaN where it was not asked; `usual` is their mean.
    """

    members: frozenset[int]
    bytes: int
    reach: float
    vectors: Vector
    f1: npt.NDArray[np.float32]
    usual: float

    def offer(self, name: str, asked: Vector, *, resident: bool = False) -> Offer:
        """What it can do for a question with this embedding."""
        nearest = closeness(asked, self.vectors)
        place, close = nearest or (0, 0.0)
        gate = float(self.f1[place]) if nearest and not np.isnan(self.f1[place]) else self.usual
        within = may_use(asked, self.vectors, self.f1, reach=self.reach)
        return Offer(name, self.members, resident, self.bytes, close, gate, within)


def known_of(connection: Connection, adapter: str) -> Known | None:
    """What a choice needs of an adapter, whether or not it may answer; None when there is none with this id."""
    found = next((each for each in adapters.adapters(connection) if each.id == adapter), None)
    return _known(connection, found) if found else None


def _known(connection: Connection, adapter: Adapter) -> Known:
    _, vectors, f1 = adapters.questions_of(connection, adapter.id)
    reach = adapter.gate.reach if adapter.gate else ONLY_TRAINED
    examined = f1[~np.isnan(f1)]
    usual = float(examined.mean()) if examined.size else 0.0
    return Known(frozenset(adapter.members), adapter.bytes, reach, vectors.astype(np.float32), f1, usual)


class Shelf:
    """The adapters of one library for one model (`base`: the sha256 of its file)."""

    def __init__(self, database: Database, pager: Pager, *, base: str) -> None:
        self.database = database
        self.pager = pager
        self._base = base
        self.known: dict[str, Known] = {}
        self.sizes: dict[str, int] = {}  # bytes of each
        self.refresh()

    def refresh(self) -> None:
        """Read the registry: something in it has changed."""
        with self.database.read() as connection:
            usable = adapters.usable(adapters.adapters(connection), base=self._base, layout=LAYOUT_VERSION)
            known = {adapter.id: _known(connection, adapter) for adapter in usable}
        self.known = known
        self.sizes = {name: each.bytes for name, each in known.items()}
        self.pager.pin(frozenset(adapter.id for adapter in usable if adapter.pinned))

    def offers(self, asked: Vector, chunks: Sequence[int]) -> list[Offer]:
        """The adapters that cover any of these chunks, by name, for a question with this embedding."""
        known, resident, wanted = self.known, self.pager.resident(), frozenset(chunks)
        return [
            each.offer(name, asked, resident=name in resident)
            for name, each in sorted(known.items())
            if each.members & wanted
        ]

    def foresee(self, asked: Vector) -> None:
        """A question with this embedding is coming: begin to read the file of the adapter that knows the nearest."""
        near = [(found[1], name) for name, each in self.known.items() if (found := closeness(asked, each.vectors))]
        if near and max(near)[0] >= NEAR:
            self.pager.check(max(near)[1])

    def is_sound(self, adapter: str) -> bool:
        """Whether its file is what its name says; when not, it is not used any more."""
        if self.pager.check(adapter).result():
            return True
        self.disable(adapter, "its file is missing or was changed")
        return False

    def disable(self, adapter: str, reason: str) -> None:
        """It is not used any more."""
        logger.warning("the adapter %s is not used any more: %s", adapter[:12], reason)
        try:
            with self.database.write() as connection:
                adapters.set_state(connection, adapter, "failed", reason)
        except StorageError as error:  # the reader must not lose an answer because the disk is full
            logger.error("that could not be noted: %s", error)
        self.refresh()
