"""The end of a course: what was trained is registered, proved and examined, and used when it passes.

Until then its row says that it was not examined yet, and it is not used. Whatever fails leaves its reason; an adapter
that failed its exam stays to be looked at, one whose export is wrong does not.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from edge_rag.errors import ModelError, StorageError
from edge_rag.learning import gate
from edge_rag.learning.job import ADAPTER, Result, read_proof
from edge_rag.policy.prompt import LAYOUT_VERSION
from edge_rag.records import Adapter, Cluster, GateReport, Item
from edge_rag.runtime.proving import prove
from edge_rag.runtime.workshop import Doing, Tools
from edge_rag.store import adapters, items
from edge_rag.store.adapters import Questions
from edge_rag.store.database import Connection

OTHERS = 64  # items of other clusters that an exam chooses from
EMBEDDED = 128  # questions in one piece of work
UNEXAMINED = "it was not examined yet"
CHANGED = "its passages have changed meanwhile"


class Asked(NamedTuple):
    """Questions of one sort with the vectors of their texts, [n, d]."""

    items: list[Item]
    vectors: npt.NDArray[np.float16]

    def marked(self, f1: npt.NDArray[np.float32]) -> Questions:
        """As they are kept, with the F1 of each [n]."""
        return Questions(tuple(item.question for item in self.items), self.vectors, f1)


class Graduated(Struct, frozen=True):
    """What became of it: the id of an adapter that is used from now on, '' when there is none; `reason` says why."""

    adapter: str = ""
    gate: GateReport | None = None
    reason: str = ""


class Graduation:
    """The exam of what was trained for a cluster in the folder `job`. `tell` is told how far it is."""

    def __init__(self, cluster: Cluster, job: Path, tools: Tools, tell: Callable[[Doing], None]) -> None:
        self._cluster = cluster
        self._job = job
        self._tools = tools
        self._tell = tell

    # --- questions ---------------------------------------------------------------------------------------------------

    def embed(self) -> bool:
        """Embed some of the questions; whether any were left."""
        with self._tools.database.read() as connection:
            wanted = [item for sort in self._sorts(connection) for item in sort]
            known = items.vectors(connection, [item.id for item in wanted])
        missing = [item for item in wanted if item.id not in known][:EMBEDDED]
        if not missing:
            return False
        self._tell(Doing("embedding questions", len(known), len(wanted)))
        vectors = self._tools.embedder.embed([item.question for item in missing])
        with self._tools.database.write() as connection:
            items.put_vectors(connection, {item.id: v for item, v in zip(missing, vectors, strict=True)})
        return True

    def _sorts(self, connection: Connection) -> tuple[list[Item], list[Item], list[Item]]:
        """Questions that were trained on, held-out ones (those that have an answer), and ones of other clusters."""
        members, model = self._cluster.members, self._tools.base
        answered = [item for item in items.items_of(connection, members, model=model) if item.answer is not None]
        others = items.items_elsewhere(connection, members, model=model, exam=True, limit=OTHERS)
        return [each for each in answered if not each.held_out], [each for each in answered if each.held_out], others

    def _asked(self) -> list[Asked]:
        """The sorts with their vectors, read at one time: questions may go while this goes on."""
        with self._tools.database.read() as connection:
            sorts = self._sorts(connection)
            known = items.vectors(connection, [item.id for sort in sorts for item in sort])
        return [_with_vectors([item for item in sort if item.id in known], known) for sort in sorts]

    # --- the way -----------------------------------------------------------------------------------------------------

    def graduate(self, result: Result) -> Graduated:
        """Register, prove and examine what was trained. Raises Cancelled, EngineError and StorageError."""
        self._tell(Doing("examining the adapter"))
        trained, held_out, others = self._asked()
        questions = trained.marked(np.full(len(trained.items), np.nan, np.float32))
        file = self._job / ADAPTER
        adapter = adapters.register(self._tools.database, self._tools.folder, file, self._unexamined(result), questions)
        if adapter is None:
            return Graduated(reason=CHANGED)
        if fault := self._fault(adapter):
            self._discard(adapter)
            return Graduated(reason=fault)
        examined = gate.examine(self._exam(trained, held_out, others), self._answer(adapter.id), self._count)
        marked = trained.marked(examined.f1), held_out.marked(examined.held_out_f1)
        return self._admit(adapter, examined.report, *marked)

    def _unexamined(self, result: Result) -> Adapter:
        return Adapter(
            id="",
            cluster_id=self._cluster.id,
            members=self._cluster.members,
            bytes=0,
            base=self._tools.base,
            layout=LAYOUT_VERSION,
            recipe=result.recipe,
            gate=None,
            state="disabled",
            reason=UNEXAMINED,
            pinned=False,
            made_at=time.time(),
        )

    def _fault(self, adapter: Adapter) -> str:
        """Why it can never be used, whatever it has learned; '' when it can be."""
        engine = self._tools.engine
        assert engine.pager, "adapters are trained where they are used"
        if adapter.bytes > engine.pager.budget:
            return f"it has {adapter.bytes} bytes, more than adapters.memory_mb has room for"
        try:
            refutation = prove(engine, adapter.id, read_proof(self._job))
        except (ModelError, StorageError) as error:
            return str(error)
        return refutation and f"its export is wrong: {refutation}"

    def _exam(self, trained: Asked, held_out: Asked, others: Asked) -> gate.Exam:
        return gate.Exam(
            members=frozenset(self._cluster.members),
            trained=trained.items,
            trained_vectors=trained.vectors,
            held_out=held_out.items,
            held_out_vectors=held_out.vectors,
            others=others.items,
            others_vectors=others.vectors,
            keep=self._tools.settings.keep,
            drift=self._tools.settings.drift,
        )

    def _answer(self, adapter: str) -> gate.Answer:
        def answer(asks: Sequence[gate.Ask]) -> Iterator[str]:
            together = self._tools.together
            for start in range(0, len(asks), together):
                batch = asks[start : start + together]
                asked = [(ask.question, ask.chunks) for ask in batch]
                yield from self._tools.teacher.answers(asked, adapter if batch[0].adapter else "")

        return answer

    def _count(self, done: int, total: int) -> None:
        self._tell(Doing("examining the adapter", done, total))

    def _admit(self, adapter: Adapter, report: GateReport, trained: Questions, held_out: Questions) -> Graduated:
        """Put what the exam has shown; an adapter that passed takes the place of those whose passages it covers."""
        final = msgspec.structs.replace(
            adapter, gate=report, state="ready" if report.passed else "failed", reason=report.reason
        )
        with self._tools.database.write() as connection:
            there = adapters.put_adapter(connection, final, trained, held_out)
            for other in adapters.adapters(connection) if there and report.passed else ():
                if _replaces(final, other):
                    adapters.remove(connection, other.id)
            adapters.sweep(connection, self._tools.folder)
        self._tools.coverer.refresh()
        if not there:
            return Graduated(reason=CHANGED)
        return Graduated(final.id if report.passed else "", report, report.reason)

    def _discard(self, adapter: Adapter) -> None:
        with self._tools.database.write() as connection:
            adapters.remove(connection, adapter.id)
            adapters.sweep(connection, self._tools.folder)


def _with_vectors(sort: list[Item], known: dict[int, Any]) -> Asked:
    return Asked(sort, np.stack([known[item.id] for item in sort]) if sort else np.zeros((0, 0), np.float16))


def _replaces(new: Adapter, other: Adapter) -> bool:
    """Whether another adapter of the same model has nothing that the new one does not cover."""
    return other.id != new.id and other.base == new.base and set(other.members) <= set(new.members)
