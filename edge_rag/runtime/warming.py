"""KV before anybody asks: passages computed behind the prefix while the engine has nothing else to do.

Each passage is a chore of the engine: a request interrupts it at once, and it begins anew when the engine is idle
again.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError

from msgspec import Struct

from edge_rag.errors import Cancelled, EngineError
from edge_rag.records import Passage, WarmReport
from edge_rag.runtime.engine import Engine
from edge_rag.runtime.generations import current_scope
from edge_rag.runtime.kv_cache import KVCache
from edge_rag.runtime.prompting import PromptBuilder, Tokens
from edge_rag.runtime.requests import Desk
from edge_rag.store import library
from edge_rag.store.database import Database

AHEAD = 8  # passages that may wait to be written
BATCH = 64  # passages whose texts are read at once


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
        self._looked_at: set[int] = set()  # by `next`: chunks that have their KV, or had no room

    def warm(
        self, documents: Sequence[int] | None, *, hot: int | None, progress: Callable[[WarmProgress], None] | None
    ) -> WarmReport:
        """Passages of these documents (None = all), the most used first, at most `hot`.

        Waits for each; requests go first. Ends early when the quota is used up.
        """
        started = time.perf_counter()
        with self._database.read() as connection:
            wanted = library.chunks_by_use(connection, documents, limit=hot)
        computed = present = 0
        for passage in self._passages(wanted):
            new = self._compute(passage)
            computed, present = computed + new, present + (not new)
            if computed % AHEAD == 0:
                self._cache.flush()
            if progress:
                progress(WarmProgress(computed + present, len(wanted), passage.path))
            if self._cache.full:
                break
        self._cache.flush()
        return WarmReport(
            passages=len(wanted),
            computed=computed,
            present=present,
            full=self._cache.full,
            seconds=time.perf_counter() - started,
        )

    def next(self) -> bool:
        """Compute one passage that has no KV, the likeliest to be needed; whether there was one and room for it.

        Only one: what is likely changes with every question.
        """
        if self._cache.full:
            return False
        with self._database.read() as connection:
            wanted = library.chunks_by_use(connection, None, limit=None)
        for passage in self._passages([chunk_id for chunk_id in wanted if chunk_id not in self._looked_at]):
            computed = self._compute(passage)
            self._looked_at.add(passage.chunk_id)
            if computed:
                return True
        return False

    def _passages(self, chunk_ids: Sequence[int]) -> Iterable[Passage]:
        for start in range(0, len(chunk_ids), BATCH):
            some = chunk_ids[start : start + BATCH]
            with self._database.read() as connection:
                found = library.passages(connection, some)
            yield from (found[chunk_id] for chunk_id in some if chunk_id in found)

    def _compute(self, passage: Passage) -> bool:
        """Compute and keep a passage, unless it is kept already."""
        tokens = self._builder.passage(passage)
        if self._cache.is_kept(self._key(tokens)):
            return False

        def compute(desk: Desk) -> None:
            desk.assembler.compute(self._builder.prefix, tokens, passage.chunk_id, desk.decode)

        scope, done = current_scope(), self._engine.when_idle(compute)
        with scope.holding(done):
            try:
                done.result()
            except CancelledError as error:
                if scope.cancelled:
                    raise Cancelled("nobody waits for it any more") from error
                raise EngineError("the engine was closed", remedy="open the library again") from error
        return True

    def _key(self, tokens: Tokens) -> str:
        return self._cache.key(self._builder.prefix, tokens)
