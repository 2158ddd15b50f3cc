"""The KV of passages in two tiers, for the engine's thread to take from and to leave to.

    fetch   RAM, else SSD (read, checked, left in RAM); what is being read is read once, whoever wants it
    keep    write-behind: quantised into RAM, then onto the SSD, by a thread of its own

Nothing here is needed to answer: whatever fails is a miss and a line in the log. Keys of waiting requests are
`expect`ed: their passages are read ahead and are no victims until `release`.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from msgspec import Struct

from edge_rag.closing import Closing
from edge_rag.errors import EdgeRAGError, EngineError
from edge_rag.native.kv_blob import Blob
from edge_rag.native.kv_codec import Codec
from edge_rag.native.kv_passage import pack, unpack_into
from edge_rag.records import KVCounters, KVSource, KVStatus
from edge_rag.runtime.kv_disk import KVDisk
from edge_rag.runtime.kv_keys import Space
from edge_rag.runtime.kv_memory import Found, Held, KVMemory, State
from edge_rag.runtime.prompting import Prompt, Tokens

PREFIX_CHUNK = 0  # the prefix belongs to no document
FULL = 3  # passages in a row that the SSD's quota had no room for
PREFIX_CODEC: Codec = "f16"  # it is small, and everything stands on it

logger = logging.getLogger(__name__)


class Computed(Struct, frozen=True):
    """KV that was computed directly behind the prefix (or the prefix itself), to be kept.

    `chunk_id` is the chunk it is of, PREFIX_CHUNK, or None for a text that belongs to no document: kept in RAM only.
    """

    key: str
    chunk_id: int | None
    state: Blob
    seconds: float


class KVCache(Closing):
    """Both tiers of one model's KV. Thread-safe. Without `disk`, RAM only."""

    def __init__(self, space: Space, memory: KVMemory, disk: KVDisk | None, *, codec: Codec) -> None:
        self._space = space
        self._memory = memory
        self._disk = disk
        self._codec: Codec = codec
        self._lock = threading.RLock()
        self._wanted: Counter[str] = Counter()
        self._reads: dict[str, Future[Held | None]] = {}
        self._leaving: dict[str, Future[Held | None]] = {}
        self._counters = KVCounters()
        self._refused = 0
        self._read_ahead: set[str] = set()
        self._timed_reads = (0, 0.0)
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="edge_rag kv read")
        self._packer = ThreadPoolExecutor(1, thread_name_prefix="edge_rag kv pack")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="edge_rag kv write")
        if disk:
            self._behind(disk.start)

    def close(self) -> None:
        """Write what is to be written, stop the threads. Idempotent."""
        self._readers.shutdown()
        self._packer.shutdown()
        if self._disk:
            self._behind(self._disk.flush)
        self._writer.shutdown()

    # --- keys --------------------------------------------------------------------------------------------------------

    def key(self, prefix: Tokens, passage: Tokens = ()) -> str:
        """The key of a passage behind `prefix`, or of the prefix."""
        return self._space.key(prefix, passage)

    def keys(self, prompt: Prompt) -> tuple[str, ...]:
        """The keys of a prompt's segments: its passages, and its tail."""
        passages = tuple(self.key(prompt.prefix, passage) for passage in prompt.passages)
        kind = f"tail {prompt.adapter}" if prompt.adapter else "tail"  # it is computed under the adapter
        return (*passages, self._space.key(prompt.prefix, prompt.tail, kind=kind))

    # --- taking ------------------------------------------------------------------------------------------------------

    def where(self, key: str) -> tuple[KVSource, int]:
        """Where a passage is ('ram', 'ssd' or 'none'), and how many bytes would have to be read. Reads nothing.

        What was read ahead for a prompt counts as 'ssd' until it has served one.
        """
        with self._lock:
            if key in self._memory or key in self._leaving:
                return ("ssd" if key in self._read_ahead else "ram"), 0
        size = self._disk.size(key) if self._disk else 0
        return ("ssd", size) if size else ("none", 0)

    def is_kept(self, key: str) -> bool:
        """Whether a passage will be there after a restart; without an SSD tier, whether it is in RAM."""
        with self._lock:
            leaving = key in self._leaving
        return leaving or (self._disk.size(key) > 0 if self._disk else self.where(key)[0] == "ram")

    def fetch(self, key: str) -> Held | None:
        """A passage, or None: a miss. Waits for the SSD."""
        with self._lock:
            held, packed = self._memory.get(key), self._leaving.get(key)
        if held is None and packed:
            held = packed.result()
        return held or self._read_once(key).result()

    def unpack(self, key: str, held: Held, place: Blob) -> bool:
        """Dequantise a passage into its place in a state, turned to its positions, in any thread.

        False when it does not fit: it is not ours after all, and is removed.
        """
        geometry = self._space.geometry
        assert geometry, "only what can be moved is kept"
        try:
            unpack_into(place, held.codec, held.sections, geometry.shape, geometry.rope)
        except EngineError as error:  # of another shape than its key says
            logger.warning("KV %s does not fit: %s", key, error)
            self.discard(key)
            return False
        return True

    def expect(self, keys: Sequence[str]) -> None:
        """A request will need these: read them ahead, and keep them until `release`."""
        with self._lock:
            self._wanted.update(keys)
        self.read_ahead(keys)

    def read_ahead(self, keys: Sequence[str]) -> None:
        """Begin to read what is on the SSD only."""
        for key in keys:
            if self.where(key)[0] == "ssd":
                self._read_once(key)

    def release(self, keys: Sequence[str]) -> None:
        """Take one `expect` back."""
        with self._lock:
            self._wanted -= Counter(keys)

    def _needed(self) -> set[str]:
        with self._lock:
            return set(self._wanted)

    def _read_once(self, key: str) -> Future[Held | None]:
        with self._lock:
            if key not in self._reads:
                try:
                    self._reads[key] = self._readers.submit(self._read, key)
                except RuntimeError:  # closed
                    miss: Future[Held | None] = Future()
                    miss.set_result(None)
                    return miss
            return self._reads[key]

    def _read(self, key: str) -> Held | None:
        started = time.perf_counter()
        try:
            found = self._disk.read(key) if self._disk else None
        except Exception as error:  # a fault here must not cost the answer
            logger.warning("KV %s could not be read: %s", key, error)
            found = None
        seconds = time.perf_counter() - started
        with self._lock:
            del self._reads[key]
            if found is None:
                return None
            held, size = found
            self._memory.put(key, held, keep=self._needed())
            self._counters = self._counters.plus(KVCounters(bytes_read=size))
            self._read_ahead.add(key)
            self._timed_reads = (self._timed_reads[0] + size, self._timed_reads[1] + seconds)
            return held

    def take_reads(self) -> tuple[int, float]:
        """Bytes read from the SSD since the last call, and the seconds that took."""
        with self._lock:
            taken, self._timed_reads = self._timed_reads, (0, 0.0)
        return taken

    def state(self, keys: Sequence[str], *, whole: bool) -> Found | None:
        """The longest kept beginning of a prompt with these segments; see `KVMemory.state`."""
        with self._lock:
            return self._memory.state(keys, whole=whole)

    # --- leaving -----------------------------------------------------------------------------------------------------

    def keep(self, computed: Computed) -> None:
        """Keep what was computed, behind the caller's back."""
        with self._lock:
            if computed.key in self._leaving:
                return
            packed: Future[Held | None] = Future()
            self._leaving[computed.key] = packed
        if not _submitted(self._packer, partial(self._keep, computed, packed)):
            packed.set_result(None)
            self._has_left(computed.key)

    def _keep(self, computed: Computed, packed: "Future[Held | None]") -> None:
        held = None
        try:
            held = self._pack(computed)
            with self._lock:
                self._memory.put(computed.key, held, keep=self._needed())
        finally:
            packed.set_result(held)
            if not (held and self._behind(partial(self._write, computed, held))):
                self._has_left(computed.key)

    def _write(self, computed: Computed, held: Held) -> None:
        try:
            if self._disk and computed.chunk_id is not None:
                written = self._disk.write(computed.key, computed.chunk_id, held, keep=self._needed())
                self._refused = 0 if written else self._refused + 1
                self._count(KVCounters(bytes_written=written))
        finally:
            self._has_left(computed.key)

    def _has_left(self, key: str) -> None:
        with self._lock:
            self._leaving.pop(key, None)

    def _pack(self, computed: Computed) -> Held:
        assert self._space.geometry, "only what can be moved is computed apart"
        codec = PREFIX_CODEC if computed.chunk_id == PREFIX_CHUNK else self._codec
        sections = pack(computed.state, codec, self._space.geometry.rope)
        return Held(codec, computed.state.tokens, sections, computed.seconds)

    def keep_state(self, keys: Sequence[str], state: State) -> None:
        """Keep the state of a prompt with these segments, in RAM."""
        with self._lock:
            self._memory.put_state(keys, state, keep=self._needed())

    def forget_states(self) -> None:
        """Forget the states of prompts; passages stay."""
        with self._lock:
            self._memory.forget_states()

    def discard(self, key: str) -> None:
        """Remove a passage that cannot be used."""
        self._has_left(key)
        with self._lock:
            self._memory.remove(key)
        if self._disk:
            self._behind(partial(self._disk.discard, key))

    def used(self, keys: Sequence[str], counted: KVCounters) -> None:
        """These passages served a prompt; `counted` says how."""
        self._count(counted)
        with self._lock:
            self._read_ahead.difference_update(keys)
        if self._disk:
            self._behind(partial(self._disk.used, keys))

    def _count(self, more: KVCounters) -> None:
        with self._lock:
            self._counters = self._counters.plus(more)

    def take_stock(self) -> None:
        """Look at the rows again: documents were removed."""
        self._refused = 0  # there may be room again
        self._behind(self._take_stock)

    def _take_stock(self) -> None:
        kept: set[str] = set()
        if self._disk:
            self._disk.take_stock(keep=self._needed())
            kept = set(self._disk.tier.keys())
        with self._lock:
            self._memory.retain(kept)

    def flush(self) -> None:
        """Wait until everything that was left is written."""
        for executor in (self._packer, self._writer):
            done = threading.Event()
            if _submitted(executor, done.set):
                done.wait()

    def _behind(self, work: Callable[[], object]) -> bool:
        """Do `work` on the writing thread; False when the cache is closed."""
        return _submitted(self._writer, work)

    # --- looking -----------------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether the SSD's quota has had no room for the last passages: to compute more ahead is a waste."""
        return self._refused >= FULL

    def status(self, *, moving: str, link_tokens: int) -> KVStatus:
        """Budgets, what is used of them, and what has happened since the start."""
        disk = self._disk.tier if self._disk else None
        with self._lock:
            return KVStatus(
                codec=self._codec,
                moving=moving,
                link_tokens=link_tokens,
                ram_used=self._memory.tier.used,
                ram_budget=self._memory.tier.capacity,
                ram_entries=len(self._memory.tier),
                disk_used=disk.used if disk else 0,
                disk_budget=disk.capacity if disk else 0,
                disk_files=len(disk) if disk else 0,
                counters=self._counters,
            )

    def faults(self) -> list[str]:
        """Disagreements between files and rows, in words; waits for what is being written."""
        self.flush()
        return self._disk.faults() if self._disk else []

    def check(self) -> None:
        """Raise AssertionError unless both accounts are right, to the byte."""
        with self._lock:
            self._memory.check()
        self.flush()
        if self._disk:
            self._disk.check()


def _submitted(executor: ThreadPoolExecutor, work: Callable[[], object]) -> bool:
    """Let `work` be done behind the caller's back; False when the cache is closed. A failure is logged, no more."""

    def guarded() -> None:
        try:
            work()
        except EdgeRAGError as error:
            logger.warning("KV could not be kept: %s", error)
        except Exception:
            logger.exception("KV could not be kept; this is a fault of ours")

    try:
        executor.submit(guarded)
    except RuntimeError:  # shut down
        return False
    return True
