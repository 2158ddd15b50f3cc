"""KV before anybody asks: passages computed behind the prefix while the engine has nothing else to do.

Each passage is a chore of the engine: a request interrupts it at once, and it begins anew when the engine is idle
again.
"""

import time
from collections.abc import Callable, Iterable, Sequence

from msgspec import Struct

from edge_rag.records import Passage, WarmReport
from edge_rag.runtime.engine import Desk, Engine
from edge_rag.runtime.kv_cache import KVCache
from edge_rag.runtime.prompting import PromptBuilder, Tokens
from edge_rag.store import library
from edge_rag.store.database import Database

BATCH = 64  # passages whose texts are read at once
FULL = 3  # passages in a row without room: the quota is used up


class WarmProgress(Struct, frozen=True):
    """`done` of `total` passages are looked at; `current` is the document of the last one."""

    done: int
    total: int
    current: str


class Warmer:
    """Computes and keeps the KV of passages that have none yet. Any thread may call it."""

    def __init__(self, database: Database, engine: Engine, builder: PromptBuilder, cache: KVCache) -> None:
        self._database = database
        self._engine = engine
        self._builder = builder
        self._cache = cache

    def warm(
        self, documents: Sequence[int] | None, *, hot: int | None, progress: Callable[[WarmProgress], None] | None
    ) -> WarmReport:
        """Passages of these documents (None = all), the most used first, at most `hot`.

        Waits for each; requests go first. Ends early when the quota is used up.
        """
        started = time.perf_counter()
        with self._database.read() as connection:
            wanted = library.chunks_by_use(connection, documents, limit=hot)
        computed = present = refused = 0
        for passage in self._passages(wanted):
            kept = self.keep(passage)
            computed += kept == "computed"
            present += kept == "present"
            refused = refused + 1 if kept == "refused" else 0
            if progress:
                progress(WarmProgress(computed + present, len(wanted), passage.path))
            if refused >= FULL:
                break
        return WarmReport(
            passages=len(wanted),
            computed=computed,
            present=present,
            full=refused >= FULL,
            seconds=time.perf_counter() - started,
        )

    def next(self) -> bool:
        """Compute one passage that has no KV, the likeliest to be needed; whether there was one and room for it."""
        with self._database.read() as connection:
            wanted = library.chunks_by_use(connection, None, limit=None)
        return any(self.keep(passage) == "computed" for passage in self._missing(wanted))

    def _missing(self, chunk_ids: Sequence[int]) -> Iterable[Passage]:
        """At most one: the next step looks again, for what is likely changes."""
        for passage in self._passages(chunk_ids):
            if self._cache.where(self._key(self._builder.passage(passage)))[0] == "none":
                yield passage
                return

    def _passages(self, chunk_ids: Sequence[int]) -> Iterable[Passage]:
        for start in range(0, len(chunk_ids), BATCH):
            some = chunk_ids[start : start + BATCH]
            with self._database.read() as connection:
                found = library.passages(connection, some)
            yield from (found[chunk_id] for chunk_id in some if chunk_id in found)

    def keep(self, passage: Passage) -> str:
        """'present', 'computed', or 'refused' when the quota has no room. Raises StorageError for a closed library."""
        tokens = self._builder.passage(passage)
        key = self._key(tokens)
        if self._cache.where(key)[0] != "none":
            return "present"

        def compute(desk: Desk) -> None:
            desk.assembler.compute(self._builder.prefix, tokens, passage.chunk_id, desk.decode)

        self._engine.when_idle(compute).result()
        self._cache.flush()
        return "computed" if self._cache.where(key)[0] != "none" else "refused"

    def _key(self, tokens: Tokens) -> str:
        return self._cache.key(self._builder.prefix, tokens)
