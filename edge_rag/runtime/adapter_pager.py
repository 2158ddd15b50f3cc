"""Which adapters are in fast memory: ONE byte budget, filled from files when a request needs one.

Loading and freeing touch the model, so both belong to the engine's thread; what a request holds stays until it is
answered. Of the others those go first that nobody wants to keep, the least recently used before others, then wanted
ones in their order, pinned ones last. Ahead of a request, any thread may have a file checked: its hash is compared once
before each load, which also brings it into the page cache.
"""

import contextlib
import hashlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from edge_rag.closing import Closing
from edge_rag.errors import EngineError, ModelError
from edge_rag.native.llama import LoRA, Model
from edge_rag.policy.costs import WEIGHT
from edge_rag.records import PagerStatus

logger = logging.getLogger(__name__)


class Pager(Closing):
    """Adapters of one model. `path` says where an adapter's file is; `budget` is in bytes of those files.

    `take`, `drop`, `loaded`, `held` and `close` are for the engine's thread; `check`, `pin`, `status` for any.
    """

    def __init__(self, model: Model, path: Callable[[str], Path], budget: int) -> None:
        self.budget = budget
        self._model = model
        self._path = path
        self._resident: dict[str, LoRA] = {}  # the least recently used first
        self._held: Counter[str] = Counter()
        self._pinned: frozenset[str] = frozenset()
        self._wanted: dict[str, int] = {}  # place in the order in which they may leave
        self._checks: dict[str, Future[bool]] = {}
        self._lock = threading.Lock()
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="edge_rag adapter check")
        self._refused: set[str] = set()  # could not be loaded
        self._page_ins = 0
        self._page_in_seconds = 0.0
        self._per_byte = 0.0  # running mean

    def close(self) -> None:
        """Free all adapters. Idempotent."""
        self._checker.shutdown()
        for name in list(self._resident):
            self._evict(name)

    # --- the engine's thread -----------------------------------------------------------------------------------------

    def take(self, name: str) -> LoRA:
        """The adapter, loaded when it is not resident; it stays until `drop`.

        Raises ModelError when it cannot be loaded, and EngineError when there is no room for it now.
        """
        if name not in self._resident:
            self._load(name)
        with self._lock:
            adapter = self._resident[name] = self._resident.pop(name)
            self._held[name] += 1
        return adapter

    def drop(self, name: str) -> None:
        """Take one `take` back."""
        with self._lock:
            self._held -= Counter([name])

    def drop_all(self) -> None:
        """Nobody holds anything any more: all work has ended."""
        with self._lock:
            self._held.clear()

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Inside, the adapter is resident. Nothing happens without a name. Raises as `take`."""
        if name:
            self.take(name)
        try:
            yield
        finally:
            if name:
                self.drop(name)

    def loaded(self, name: str) -> LoRA:
        """An adapter that somebody has taken."""
        return self._resident[name]

    def _load(self, name: str) -> None:
        path, size = self._path(name), self._size(name)
        self._make_room(size)
        started = time.perf_counter()
        try:
            adapter = LoRA(self._model, path)
        except ModelError:
            self._refused.add(name)
            raise
        seconds = time.perf_counter() - started
        with self._lock:
            self._resident[name] = adapter
            self._checks.pop(name, None)  # the next load looks at the file again
            self._page_ins += 1
            self._page_in_seconds += seconds
            per_byte = seconds / max(1, size)
            self._per_byte = (1 - WEIGHT) * self._per_byte + WEIGHT * per_byte if self._per_byte else per_byte

    def _make_room(self, size: int) -> None:
        used = self._used()
        for name in sorted((name for name in self._resident if not self._held[name]), key=self._worth):
            if used + size <= self.budget:
                break
            used -= self._resident[name].size
            self._evict(name)
        if used + size > self.budget:
            raise EngineError(
                f"an adapter of {size} bytes does not fit beside {used} bytes in use, of {self.budget}",
                field="adapters.memory_mb",
                remedy="raise adapters.memory_mb",
            )

    def _size(self, name: str) -> int:
        path = self._path(name)
        return path.stat().st_size if path.is_file() else 0

    def _worth(self, name: str) -> tuple[bool, int]:
        return name in self._pinned, self._wanted.get(name, -1)

    def _evict(self, name: str) -> None:
        with self._lock:
            adapter = self._resident.pop(name)
        adapter.close()

    def _used(self) -> int:
        return sum(adapter.size for adapter in self._resident.values())

    # --- any thread --------------------------------------------------------------------------------------------------

    def check(self, name: str) -> "Future[bool]":
        """Whether the file is what its name says, read now unless the adapter is resident. The next load is quick.

        Raises EngineError when the pager is closed.
        """
        with self._lock:
            if name in self._resident:
                sound: Future[bool] = Future()
                sound.set_result(True)
                return sound
            known = self._checks.get(name)
            if known is None or (known.done() and not known.result()):
                self._checks[name] = self._submitted(name)
            return self._checks[name]

    def _submitted(self, name: str) -> "Future[bool]":
        try:
            return self._checker.submit(_is_sound, self._path(name), name)
        except RuntimeError as error:  # it takes nothing any more
            raise EngineError("the engine is closed", remedy="open the library again") from error

    def loads(self, name: str) -> bool:
        """Whether it has never been refused when it was to be loaded."""
        return name not in self._refused

    def pin(self, names: frozenset[str]) -> None:
        """These are evicted last from now on."""
        with self._lock:
            self._pinned = names

    def want(self, names: Sequence[str]) -> None:
        """These are evicted behind all others but pinned ones from now on, in this order."""
        with self._lock:
            self._wanted = {name: place for place, name in enumerate(names)}

    def missing(self) -> tuple[str, ...]:
        """The wanted adapters that are not resident, the last to leave first.

        Left out are those that find no room beside pinned and wanted ones, and those that could not be loaded.
        """
        with self._lock:
            staying = sum(each.size for name, each in self._resident.items() if self._worth(name) >= (False, 0))
            absent = [name for name in self._wanted if name not in self._resident and name not in self._refused]
        return tuple(name for name in reversed(absent) if staying + self._size(name) <= self.budget)

    def resident(self) -> frozenset[str]:
        """The adapters in fast memory."""
        with self._lock:
            return frozenset(self._resident)

    def page_in_time(self, size: int) -> float:
        """Predicted seconds to load so many bytes; 0 before the first load."""
        return size * self._per_byte

    def status(self) -> PagerStatus:
        """What is in fast memory, and what loading has taken."""
        with self._lock:
            return PagerStatus(
                resident=tuple(self._resident),
                used=self._used(),
                budget=self.budget,
                page_ins=self._page_ins,
                page_in_seconds=self._page_in_seconds,
            )


def _is_sound(path: Path, name: str) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == name
    except OSError as error:
        logger.warning("the adapter %s cannot be read: %s", name[:12], error)
        return False
