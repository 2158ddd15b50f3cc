"""The cache of passages over real files and a real database: what is kept is found again, as it was, within budgets.

Passages are synthetic: a number decides everything in them, so that whatever is fetched can be recognised.
"""

import contextlib
import itertools
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from edge_rag.errors import StorageError
from edge_rag.native import kv_blob
from edge_rag.native.kv_blob import Blob, KVShape
from edge_rag.native.kv_passage import unpack_into
from edge_rag.native.llama.geometry import Geometry
from edge_rag.native.rope import Rope, frequencies
from edge_rag.records import KVCounters, KVStatus
from edge_rag.runtime.kv_cache import PREFIX_CHUNK, Computed, KVCache
from edge_rag.runtime.kv_disk import HEADER_BYTES, TOUCHES, KVDisk
from edge_rag.runtime.kv_keys import Space
from edge_rag.runtime.kv_memory import Held, KVMemory, State
from edge_rag.runtime.parts import sweep_kv
from edge_rag.store import kv_rows
from edge_rag.store.database import Database
from edge_rag.store.kv_files import KVFolder
from edge_rag.store.kv_format import KVFields
from tests.runtime.serving import add_document, kv_files, remove_document

SHAPE = KVShape(layers=2, k_width=16, v_width=8)
GEOMETRY = Geometry(SHAPE, Rope("halves", head_size=8, rotated=8, frequencies=frequencies(8, 10000.0)))
SPACE = Space("model", "engine", GEOMETRY)
START = 7  # where the prefix ends
TOKENS = 10
RAM = TOKENS * SHAPE.bytes_per_token  # what a passage takes there
SSD = RAM + HEADER_BYTES  # and here, by the account
PLENTY = 100 * SSD
DOCUMENT = "notes.txt"
CHUNKS = 12  # of the document: 1 to 12


def key(number: int) -> str:
    return SPACE.key((1, 2, 3), (number,))


def state(number: int, tokens: int = TOKENS) -> Blob:
    """A passage as it was computed behind the prefix."""
    blob = kv_blob.new(SHAPE, np.arange(START, START + tokens))
    random = np.random.default_rng(number)
    for part in (blob.keys, blob.values):
        part[:] = random.normal(size=part.shape)
    return blob


def computed(number: int, *, chunk: int | None = 1, seconds: float = 1.0) -> Computed:
    return Computed(key(number), chunk, state(number), seconds)


def is_right(held: Held | None, number: int) -> bool:
    """Whether it is this passage; its keys have been turned there and back."""
    assert held is not None
    place, made = kv_blob.new(SHAPE, np.arange(START, START + TOKENS)), state(number)
    unpack_into(place, held.codec, held.sections, SHAPE, GEOMETRY.rope)
    return np.array_equal(place.values, made.values) and np.allclose(place.keys, made.keys, atol=2e-2)


@contextlib.contextmanager
def opened(
    data: Path,
    *,
    ram: int = PLENTY,
    quota: int = PLENTY,
    folder: Callable[..., KVFolder] = KVFolder,
    kind: type[KVCache] = KVCache,
) -> Iterator[KVCache]:
    """A cache over a data folder, as a process of its own would have it."""
    with Database(data) as database:
        with database.write() as connection:
            own = kv_rows.library_id(connection)
        files = folder(data / "kv", library=own, generation=SPACE.generation)
        disk = KVDisk(database, files, space=SPACE.name, shape=SHAPE, quota=quota)
        with kind(SPACE, KVMemory(ram), disk, codec="f16") as cache:
            cache.flush()
            yield cache


def keep(cache: KVCache, *numbers: int, **how: Any) -> None:
    for number in numbers:
        cache.keep(computed(number, **how))
    cache.flush()


def status(cache: KVCache) -> KVStatus:
    return cache.status(moving="", link_tokens=4)


def rows(data: Path) -> dict[str, kv_rows.KVRow]:
    with Database(data) as database, database.read() as connection:
        return {row.key: row for row in kv_rows.rows(connection)}


def complaints(data: Path) -> list[str]:
    with Database(data) as database, database.write() as connection:
        own = kv_rows.library_id(connection)
        return list(kv_rows.check(connection, KVFolder(data / "kv", library=own, generation=SPACE.generation)))


def names(data: Path) -> set[str]:
    return {path.stem for path in kv_files(data)}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    with Database(tmp_path) as database:
        assert add_document(database, DOCUMENT, CHUNKS) == tuple(range(1, CHUNKS + 1))
    return tmp_path


class CountingFolder(KVFolder):
    """Counts reads."""

    reads = 0

    def read(self, key: str) -> Any:
        self.reads += 1
        return super().read(key)


class FullFolder(KVFolder):
    """A disk that is full from a certain file on."""

    room = 2

    def write(self, fields: KVFields, sections: Mapping[str, Any]) -> int:
        if not self.room:
            raise StorageError("the disk is full")
        self.room -= 1
        return super().write(fields, sections)


# --- where things are ------------------------------------------------------------------------------------------------


def test_what_nobody_has_kept_is_a_miss(data: Path) -> None:
    with opened(data) as cache:
        assert cache.where(key(1)) == ("none", 0)
        assert cache.fetch(key(1)) is None
        cache.check()


def test_what_was_kept_is_in_memory_and_in_a_file_with_a_row(data: Path) -> None:
    with opened(data) as cache:
        keep(cache, 1)
        assert cache.where(key(1)) == ("ram", 0)
        assert is_right(cache.fetch(key(1)), 1)
        cache.check()
        [file] = kv_files(data)
        assert file.stem == key(1)
        row = rows(data)[key(1)]
        assert (row.chunk_id, row.space, row.tokens, row.seconds) == (1, SPACE.name, TOKENS, 1.0)
        assert row.bytes == file.stat().st_size == status(cache).counters.bytes_written
        assert complaints(data) == []


def test_a_passage_is_had_while_it_is_still_being_kept(data: Path) -> None:
    with opened(data) as cache:
        for number in range(1, 9):
            cache.keep(computed(number))
            assert cache.where(key(number)) == ("ram", 0)
            assert is_right(cache.fetch(key(number)), number)


def test_what_another_run_kept_is_read_from_the_ssd_and_then_in_memory(data: Path) -> None:
    with opened(data) as cache:
        keep(cache, 1)
    with opened(data) as cache:
        source, size = cache.where(key(1))
        assert (source, size) == ("ssd", kv_files(data)[0].stat().st_size)
        held = cache.fetch(key(1))
        assert is_right(held, 1)
        assert held is not None
        assert (held.tokens, held.seconds) == (TOKENS, 1.0)
        read, seconds = cache.take_reads()
        assert read == size
        assert seconds > 0
        assert cache.where(key(1)) == ("ssd", 0)  # until it has served a prompt
        cache.used([key(1)], KVCounters(ssd=1))
        assert cache.where(key(1)) == ("ram", 0)
        assert is_right(cache.fetch(key(1)), 1)
        assert cache.take_reads() == (0, 0.0)
        assert status(cache).counters.bytes_read == size
        cache.check()


def test_the_prefix_is_kept_for_no_document_and_exactly(data: Path) -> None:
    with opened(data) as cache:
        keep(cache, 1, chunk=PREFIX_CHUNK)
        assert rows(data)[key(1)].chunk_id == 0
        assert (held := cache.fetch(key(1))) is not None
        assert held.codec == "f16"


def test_a_text_that_belongs_to_no_document_is_kept_in_memory_only(data: Path) -> None:
    with opened(data) as cache:
        keep(cache, 1, chunk=None)
        assert is_right(cache.fetch(key(1)), 1)
        assert kv_files(data) == []
        cache.check()


def test_many_threads_that_want_one_passage_cause_one_read(data: Path) -> None:
    with opened(data) as cache:
        keep(cache, 1)
    gate, waiting = threading.Event(), threading.Semaphore(0)

    class GatedFolder(CountingFolder):
        def read(self, key: str) -> Any:
            gate.wait()
            return super().read(key)

    class TellingCache(KVCache):
        def _read_once(self, key: str) -> Any:
            read = super()._read_once(key)
            waiting.release()
            return read

    made: list[CountingFolder] = []

    def folder(*arguments: Any, **options: Any) -> KVFolder:
        made.append(GatedFolder(*arguments, **options))
        return made[0]

    with opened(data, folder=folder, kind=TellingCache) as cache, ThreadPoolExecutor(6) as threads:
        fetched = [threads.submit(cache.fetch, key(1)) for _ in range(6)]
        for _ in fetched:
            waiting.acquire()
        gate.set()
        assert all(is_right(future.result(), 1) for future in fetched)
        assert made[0].reads == 1


def test_an_expected_passage_is_read_ahead(data: Path) -> None:
    with opened(data) as cache:
        keep(cache, 1)
    with opened(data) as cache:
        cache.expect([key(1), key(2)])
        assert (fetched := cache.fetch(key(1))) is not None
        assert is_right(fetched, 1)
        assert cache.where(key(1)) == ("ssd", 0)  # read, but it has served nobody yet
        cache.release([key(1), key(2)])


# --- budgets ---------------------------------------------------------------------------------------------------------


def test_expected_passages_are_no_victims_until_they_are_released(data: Path) -> None:
    with opened(data, ram=2 * RAM) as cache:
        cache.expect([key(1), key(2)])
        keep(cache, 1, 2)
        for _ in range(4):  # a newcomer that is worth more than both
            keep(cache, 3, seconds=100.0)
        assert [cache.where(key(number))[0] for number in (1, 2, 3)] == ["ram", "ram", "ssd"]
        cache.release([key(1)])
        keep(cache, 3, seconds=100.0)
        assert [cache.where(key(number))[0] for number in (1, 2, 3)] == ["ssd", "ram", "ram"]
        cache.check()


def test_two_requests_that_expect_a_passage_must_both_release_it(data: Path) -> None:
    with opened(data, ram=RAM) as cache:
        cache.expect([key(1)])
        cache.expect([key(1)])
        keep(cache, 1)
        cache.release([key(1)])
        keep(cache, 2, seconds=100.0)
        assert cache.where(key(1))[0] == "ram"
        cache.release([key(1)])
        keep(cache, 2, seconds=100.0)
        assert cache.where(key(1))[0] == "ssd"


def test_a_memory_for_two_passages_serves_three_that_are_expected(data: Path) -> None:
    with opened(data) as cache:
        keep(cache, 1, 2, 3)
    with opened(data, ram=2 * RAM) as cache:
        cache.expect([key(1), key(2), key(3)])
        cache.read_ahead([key(1), key(4)])
        for number in (1, 2, 3, 3, 2, 1):
            assert is_right(cache.fetch(key(number)), number)
        assert status(cache).ram_entries == 2
        cache.check()


def test_without_memory_everything_comes_from_the_ssd(data: Path) -> None:
    with opened(data, ram=0) as cache:
        keep(cache, 1, 2)
        for number in (1, 2, 1):
            assert cache.where(key(number))[0] == "ssd"
            assert is_right(cache.fetch(key(number)), number)
            assert cache.take_reads()[0] > 0
        assert status(cache).ram_used == 0
        cache.check()


def test_without_a_disk_everything_is_in_memory() -> None:
    with KVCache(SPACE, KVMemory(PLENTY), None, codec="f16") as cache:
        keep(cache, 1)
        assert is_right(cache.fetch(key(1)), 1)
        assert cache.fetch(key(2)) is None
        cache.discard(key(1))
        cache.used([key(1)], KVCounters(ram=1))
        cache.take_stock()
        assert cache.fetch(key(1)) is None
        assert (status(cache).disk_budget, status(cache).counters) == (0, KVCounters(ram=1))
        cache.check()


def test_a_full_quota_refuses_a_newcomer_and_gives_way_to_one_that_returns(data: Path) -> None:
    with opened(data, ram=0, quota=2 * SSD) as cache:
        keep(cache, 1, 2)
        keep(cache, 3)
        assert names(data) == {key(1), key(2)}, "a first use must not push out what is worth as much"
        keep(cache, 3)
        assert len(names(data)) == 2
        assert key(3) in names(data)
        assert set(rows(data)) == names(data)
        cache.check()


def test_a_passage_larger_than_the_quota_is_refused(data: Path) -> None:
    with opened(data, quota=SSD - 1) as cache:
        keep(cache, 1, 1)
        assert (kv_files(data), rows(data), status(cache).disk_files) == ([], {}, 0)
        assert is_right(cache.fetch(key(1)), 1)


def test_what_hits_have_taught_decides_who_stays_also_after_a_restart(data: Path) -> None:
    with opened(data, ram=0, quota=2 * SSD) as cache:
        keep(cache, 1, 2)
        for _ in range(5):
            cache.used([key(1)], KVCounters())
    assert rows(data)[key(1)].uses == 6
    with opened(data, ram=0, quota=2 * SSD) as cache:
        keep(cache, 3, 3, seconds=5.0)
        assert names(data) == {key(1), key(3)}
        cache.check()


def test_hits_are_written_in_batches_and_at_the_end(data: Path) -> None:
    numbers = range(1, TOUCHES + 1)
    with opened(data) as cache:
        keep(cache, *numbers)
        cache.used([key(number) for number in numbers[:-1]], KVCounters())
        cache.flush()
        assert {row.uses for row in rows(data).values()} == {1}
        cache.used([key(TOUCHES)], KVCounters())
        cache.flush()
        assert {row.uses for row in rows(data).values()} == {2}
        cache.used([key(1)], KVCounters())
    assert rows(data)[key(1)].uses == 3


def test_a_smaller_quota_is_kept_from_the_start(data: Path) -> None:
    with opened(data) as cache:
        keep(cache, *range(1, 9))
    with opened(data, quota=3 * SSD) as cache:
        total = sum(file.stat().st_size for file in kv_files(data))
        assert 0 < total <= 3 * SSD
        assert status(cache).disk_used == total
        assert complaints(data) == []
        cache.check()


# --- states of prompts -----------------------------------------------------------------------------------------------


def a_state(size: int, *ends: int) -> State:
    return State(np.zeros(size, dtype=np.uint8), ends, (), 1.0)


def test_states_and_passages_share_one_budget(data: Path) -> None:
    with opened(data, ram=3 * RAM) as cache:
        cache.keep_state(("a", "b"), a_state(2 * RAM, 3, 5))
        keep(cache, 1)
        assert status(cache).ram_used == 3 * RAM
        for _ in range(3):
            keep(cache, 2, seconds=100.0)
        assert cache.state(("a", "b"), whole=False) is None or cache.where(key(1))[0] == "ssd"
        cache.check()


def test_a_state_serves_prompts_that_begin_as_it_does(data: Path) -> None:
    with opened(data) as cache:
        kept = a_state(RAM, 3, 5, 8)
        cache.keep_state(("a", "b", "c"), kept)
        for path, segments in {("a", "b", "c"): 3, ("a", "b", "x"): 2, ("a",): 1, ("b", "a"): 0, (): 0}.items():
            found = cache.state(path, whole=False)
            assert (found.segments if found else 0) == segments
            assert found is None or found.state is kept


def test_states_are_forgotten_and_passages_stay(data: Path) -> None:
    with opened(data) as cache:
        keep(cache, 1)
        cache.keep_state(("a", "b"), a_state(20, 3, 5))
        cache.forget_states()
        assert cache.state(("a", "b"), whole=False) is None
        assert is_right(cache.fetch(key(1)), 1)
        cache.check()


def test_a_passage_counts_as_kept_until_it_is_written_whatever_RAM_does(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = threading.Event(), threading.Event()
    write = KVDisk.write

    def slow_write(*arguments: Any, **options: Any) -> int:
        reached.set()
        assert go_on.wait(60)
        return write(*arguments, **options)

    monkeypatch.setattr(KVDisk, "write", slow_write)
    with opened(data) as cache:
        cache.keep(computed(1))
        assert reached.wait(60)
        try:
            assert cache.is_kept(key(1))
            assert cache.fetch(key(1)) is not None
        finally:
            go_on.set()
        cache.flush()
        assert cache.is_kept(key(1))
        assert cache._leaving == {}
        cache.discard(key(1))
        cache.flush()
        assert not cache.is_kept(key(1))


def test_an_opaque_state_serves_only_as_a_whole(data: Path) -> None:
    with opened(data) as cache:
        cache.keep_state(("a",), short := a_state(10, 3))
        cache.keep_state(("a", "b", "c"), long := a_state(20, 3, 5, 8))
        for path, kept in {("a", "b", "c", "d"): long, ("a", "b", "x"): short, ("a", "x"): short}.items():
            found = cache.state(path, whole=True)
            assert found is not None
            assert found.state is kept
        assert cache.state(("b",), whole=True) is None


# --- what goes -------------------------------------------------------------------------------------------------------


def test_a_discarded_passage_is_nowhere(data: Path) -> None:
    with opened(data) as cache:
        keep(cache, 1, 2)
        cache.discard(key(1))
        cache.flush()
        assert cache.fetch(key(1)) is None
        assert names(data) == set(rows(data)) == {key(2)}
        cache.check()


def test_a_removed_documents_files_and_their_bytes_go_when_swept(data: Path) -> None:
    with opened(data) as cache:
        keep(cache, 1, 2, chunk=1)
        keep(cache, 3, chunk=PREFIX_CHUNK)
        with Database(data) as other:
            remove_document(other, DOCUMENT)
            sweep_kv(other, data)
        assert names(data) == set(rows(data)) == {key(3)}
        cache.take_stock()
        cache.flush()
        assert status(cache).disk_used == kv_files(data)[0].stat().st_size
        cache.check()
        assert complaints(data) == []


def test_what_is_kept_for_a_document_that_has_gone_stays_off_the_ssd(data: Path) -> None:
    with opened(data) as cache:
        with Database(data) as other:
            remove_document(other, DOCUMENT)
        keep(cache, 1)
        assert kv_files(data) == []
        assert rows(data) == {}
        cache.check()


def test_a_full_disk_costs_the_files_only(data: Path) -> None:
    with opened(data, folder=FullFolder) as cache:
        keep(cache, 1, 2, 3, 4)
        assert names(data) == set(rows(data)) == {key(1), key(2)}
        assert all(is_right(cache.fetch(key(number)), number) for number in (1, 2, 3, 4))
        cache.check()


def test_a_failed_rewriting_leaves_the_old_file_in_the_account(data: Path) -> None:
    # Shows a fault: `KVDisk.write` forgets the entry although the older file and its row are still there.
    with opened(data, folder=FullFolder) as cache:
        keep(cache, 1, 2)
        keep(cache, 1)
        assert names(data) == set(rows(data)) == {key(1), key(2)}
        cache.check()


def test_what_two_documents_hold_is_in_the_account_as_long_as_it_has_a_row(data: Path) -> None:
    # Shows a fault: kept for a chunk that has gone, the file of another chunk with the same text goes, its row stays.
    with Database(data) as other, opened(data) as cache:
        [twin] = add_document(other, "twin.txt", 1)
        keep(cache, 1, chunk=1)
        remove_document(other, "twin.txt")
        keep(cache, 1, chunk=twin)
        assert set(rows(data)) == names(data)
        cache.check()


def test_a_file_that_cannot_be_read_is_a_miss_and_no_error(data: Path) -> None:
    class BrokenFolder(KVFolder):
        def read(self, key: str) -> Any:
            raise OSError("the controller is on fire")

    with opened(data, ram=0, folder=BrokenFolder) as cache:
        keep(cache, 1)
        assert cache.fetch(key(1)) is None
        cache.check()


def test_closing_writes_what_was_left(data: Path) -> None:
    with opened(data) as cache:
        for number in range(1, 9):
            cache.keep(computed(number))
        cache.close()
        cache.close()
    assert names(data) == set(rows(data)) == {key(number) for number in range(1, 9)}


# --- two processes ---------------------------------------------------------------------------------------------------


def test_two_processes_share_files_and_keep_the_common_quota(data: Path) -> None:
    quota = 5 * SSD
    with opened(data, ram=0, quota=quota) as one, opened(data, ram=0, quota=quota) as other:
        keep(one, 1, 2, 3)
        keep(other, 4, 5)
        for cache, number in itertools.product((one, other), range(1, 6)):
            assert is_right(cache.fetch(key(number)), number)
        for cache, number in zip(itertools.cycle((one, other)), (6, 7, 8, 9, 10, 6, 7, 8, 9, 10, 11, 11), strict=False):
            keep(cache, number)
            total = sum(file.stat().st_size for file in kv_files(data))
            assert total <= quota
            assert complaints(data) == []
        for cache, number in itertools.product((one, other), range(1, 12)):
            fetched = cache.fetch(key(number))
            assert (fetched is not None) == (key(number) in names(data))
            assert fetched is None or is_right(fetched, number)


def test_two_processes_that_keep_the_same_passages_have_each_once(data: Path) -> None:
    with opened(data) as one, opened(data) as other:
        for number in range(1, 9):
            one.keep(computed(number))
            other.keep(computed(number))
        one.flush()
        other.flush()
        assert names(data) == set(rows(data)) == {key(number) for number in range(1, 9)}
        assert complaints(data) == []


# --- long histories --------------------------------------------------------------------------------------------------

NUMBERS = st.integers(1, CHUNKS)


class Histories(RuleBasedStateMachine):
    """Anything may happen in any order: what is fetched is right, accounts agree with files, budgets are kept."""

    @initialize(ram=st.integers(0, 4), quota=st.integers(0, 5))
    def start(self, ram: int, quota: int) -> None:
        self.stack = contextlib.ExitStack()
        self.data = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        with Database(self.data) as database:
            add_document(database, DOCUMENT, CHUNKS)
        self.budgets = {"ram": ram * RAM + 1, "quota": quota * SSD + 1}
        self.expected: list[str] = []
        self.documents = True
        self.open()

    def open(self) -> None:
        self.life = contextlib.ExitStack()
        self.cache = self.life.enter_context(opened(self.data, **self.budgets))

    @rule(number=NUMBERS, seconds=st.sampled_from([0.1, 1.0, 10.0]))
    def keep(self, number: int, seconds: float) -> None:
        self.cache.keep(computed(number, chunk=(0, 1, 2, None)[number % 4], seconds=seconds))

    @rule(number=NUMBERS)
    def fetch(self, number: int) -> None:
        fetched = self.cache.fetch(key(number))
        assert fetched is None or is_right(fetched, number)

    @rule(numbers=st.lists(NUMBERS, max_size=3))
    def expect(self, numbers: list[int]) -> None:
        self.expected += (keys := [key(number) for number in numbers])
        self.cache.expect(keys)

    @rule()
    def release(self) -> None:
        self.cache.release(self.expected)
        self.expected = []

    @rule(numbers=st.lists(NUMBERS, max_size=3))
    def use(self, numbers: list[int]) -> None:
        self.cache.used([key(number) for number in numbers], KVCounters())

    @rule(number=NUMBERS)
    def discard(self, number: int) -> None:
        self.cache.discard(key(number))

    @rule(path=st.lists(NUMBERS, min_size=1, max_size=3), size=st.integers(1, 3 * RAM))
    def keep_state(self, path: list[int], size: int) -> None:
        self.cache.keep_state([key(number) for number in path], a_state(size, *range(1, len(path) + 1)))

    @rule(path=st.lists(NUMBERS, max_size=4), whole=st.booleans())
    def state(self, path: list[int], whole: bool) -> None:
        found = self.cache.state([key(number) for number in path], whole=whole)
        assert found is None or 0 < found.segments <= len(path)

    @rule(number=NUMBERS)
    def damage(self, number: int) -> None:
        self.cache.flush()
        for file in kv_files(self.data):
            if file.stem == key(number):
                content = bytearray(file.read_bytes())
                content[len(content) * 2 // 3] ^= 64
                file.write_bytes(content)

    @rule(ram=st.integers(0, 4), quota=st.integers(0, 5))
    def restart(self, ram: int, quota: int) -> None:
        self.life.close()
        self.budgets = {"ram": ram * RAM + 1, "quota": quota * SSD + 1}
        self.expected = []
        self.open()
        assert complaints(self.data) == []

    @precondition(lambda self: self.documents)
    @rule()
    def remove_document(self) -> None:
        with Database(self.data) as database:
            remove_document(database, DOCUMENT)
            sweep_kv(database, self.data)
        self.cache.take_stock()
        self.cache.flush()
        self.documents = False
        assert set(rows(self.data)) == names(self.data)
        assert {row.chunk_id for row in rows(self.data).values()} <= {0}

    @invariant()
    def accounts_are_right(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.flush()
        self.cache.check()
        now = status(self.cache)
        assert now.ram_used <= now.ram_budget
        assert sum(file.stat().st_size for file in kv_files(self.data)) <= now.disk_budget

    def teardown(self) -> None:
        if hasattr(self, "life"):
            self.life.close()
            self.stack.close()


def test_accounts_and_budgets_hold_over_long_histories() -> None:
    run_state_machine_as_test(Histories, settings=settings(max_examples=50, stateful_step_count=30, deadline=None))
