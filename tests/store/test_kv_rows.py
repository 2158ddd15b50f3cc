"""Rows of KV files: they go with their document, agree with the files after every crash, and survive what files do not.

Files and SQLite are real; processes are killed for real.
"""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import pytest

from edge_rag.errors import StorageError
from edge_rag.records import Answer, Chunk, Passage, PassagePlan, Plan, Timings, Usage
from edge_rag.store import journal, kv_audits, kv_rows, library
from edge_rag.store.database import FILE_NAME, Database, migrate
from edge_rag.store.kv_audits import KVAudit
from edge_rag.store.kv_files import KVFolder
from edge_rag.store.kv_rows import KVRow, KVTotals
from edge_rag.store.migrations import MIGRATIONS
from tests.store.kv_samples import fields, key

KILLS = 12


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path) as opened:
        yield opened


@pytest.fixture
def folder(database: Database) -> KVFolder:
    with database.write() as connection:
        return KVFolder(database.path.parent / "kv", library=kv_rows.library_id(connection), generation="now")


def add_document(database: Database, path: str, *texts: str) -> list[int]:
    """Store a document with a chunk a text; returns the chunks' ids."""
    chunks = tuple(
        Chunk(ordinal=n, text=text, heading="", page=None, start=0, end=len(text), tokens=1)
        for n, text in enumerate(texts)
    )
    new = library.NewDocument(path=path, title="", kind="txt", bytes=9, sha256="0", recipe="1", chunks=chunks)
    with database.write() as connection:
        number = library.put_document(connection, new, [np.ones(8, np.float32)] * len(texts), now=1.0)
        found = connection.execute("SELECT id FROM chunks WHERE document_id = ? ORDER BY ordinal", (number,))
        return [chunk_id for (chunk_id,) in found]


def remove_document(database: Database, path: str) -> None:
    with database.write() as connection:
        document = library.find_document(connection, path)
        assert document is not None
        library.remove_document(connection, document.id)


def write_file(folder: KVFolder, number: int, chunk_id: int, **changes: Any) -> KVRow:
    """Write a file; returns the row that belongs to it."""
    new = fields(number, chunk_id, **changes)
    size = folder.write(new, {"codes": os.urandom(200 + number)})
    return kv_rows.new_row(new, generation=folder.generation, bytes=size)


def put(database: Database, row: KVRow) -> bool:
    with database.write() as connection:
        return kv_rows.put_row(connection, row)


def add(database: Database, folder: KVFolder, number: int, chunk_id: int, **changes: Any) -> KVRow:
    row = write_file(folder, number, chunk_id, **changes)
    assert put(database, row)
    return row


def all_rows(database: Database, space: str | None = None) -> list[KVRow]:
    with database.read() as connection:
        return kv_rows.rows(connection, space)


def removed(database: Database) -> list[str]:
    with database.read() as connection:
        return kv_rows.take_removed(connection)


def check(database: Database, folder: KVFolder) -> list[str]:
    with database.read() as connection:
        return list(kv_rows.check(connection, folder))


def reconcile(database: Database, folder: KVFolder) -> list[str]:
    """Reconcile, prove that all is well, and return the keys that are left."""
    with database.write() as connection:
        kv_rows.reconcile(connection, folder)
    assert check(database, folder) == []
    left = [row.key for row in all_rows(database)]
    assert [found for found, _ in folder.sizes()] == left
    return left


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_is_found_as_it_was_put(database: Database, folder: KVFolder) -> None:
    (chunk,) = add_document(database, "a", "text")
    row = add(database, folder, 1, chunk, space="here", tokens=9, seconds=1.5)
    assert row == KVRow(
        key=key(1),
        chunk_id=chunk,
        generation="now",
        space="here",
        bytes=row.bytes,
        tokens=9,
        seconds=1.5,
        uses=0,
        priority=0,
    )
    with database.read() as connection:
        assert kv_rows.find(connection, key(1)) == row
        assert kv_rows.find(connection, key(2)) is None


def test_rows_are_listed_by_space_and_summed_up(database: Database, folder: KVFolder) -> None:
    first, second = add(database, folder, 1, 0, space="here"), add(database, folder, 2, 0, space="there")
    assert all_rows(database) == [first, second]
    assert all_rows(database, "there") == [second]
    assert all_rows(database, "nowhere") == []
    with database.read() as connection:
        assert kv_rows.totals(connection) == KVTotals(files=2, bytes=first.bytes + second.bytes)


def test_an_empty_library_has_no_files(database: Database, folder: KVFolder) -> None:
    with database.read() as connection:
        assert kv_rows.totals(connection) == KVTotals(files=0, bytes=0)
    assert reconcile(database, folder) == []


def test_a_row_for_a_chunk_that_is_gone_is_not_put(database: Database, folder: KVFolder) -> None:
    (chunk,) = add_document(database, "a", "text")
    remove_document(database, "a")
    assert not put(database, write_file(folder, 1, chunk))
    assert all_rows(database) == []
    assert put(database, write_file(folder, 2, 0))  # the prompt's prefix belongs to no document


def test_a_row_that_is_put_again_replaces_the_first(database: Database, folder: KVFolder) -> None:
    add(database, folder, 1, 0, space="here")
    again = add(database, folder, 1, 0, space="there")
    assert all_rows(database) == [again]
    assert removed(database) == []


def test_what_the_policy_knows_is_kept(database: Database, folder: KVFolder) -> None:
    add(database, folder, 1, 0)
    add(database, folder, 2, 0)
    with database.write() as connection:
        kv_rows.touch(connection, {key(2): (5, 0.75), key(3): (1, 1.0)})
    assert [(row.uses, row.priority) for row in all_rows(database)] == [(0, 0.0), (5, 0.75)]


def test_a_key_that_is_no_key_is_refused_by_the_schema(database: Database) -> None:
    for bad in ("", "../../etc/passwd", "A" * 64, "a" * 63):
        with pytest.raises(apsw.ConstraintError):
            put(database, kv_rows.new_row(fields(1, 0, key=bad), generation="", bytes=1))


def test_the_librarys_id_is_random_and_stays(tmp_path: Path) -> None:
    ids = []
    for name in ("one", "two", "one"):
        with Database(tmp_path / name) as database, database.write() as connection:
            ids.append(kv_rows.library_id(connection))
    assert ids[0] == ids[2] != ids[1]
    assert len(ids[0]) == 32


# --- removing --------------------------------------------------------------------------------------------------------


def unlink_removed(database: Database, folder: KVFolder) -> None:
    with database.write() as connection:
        kv_rows.unlink_removed(connection, folder)


def test_the_files_of_a_document_go_with_it(database: Database, folder: KVFolder) -> None:
    first, second = add_document(database, "a", "one", "two")
    (other,) = add_document(database, "b", "three")
    for number, chunk in enumerate((first, second, second, other, 0), start=1):
        add(database, folder, number, chunk)
    remove_document(database, "a")
    assert removed(database) == [key(1), key(2), key(3)]
    assert [row.key for row in all_rows(database)] == [key(4), key(5)]
    unlink_removed(database, folder)
    assert [found for found, _ in folder.sizes()] == [key(4), key(5)]
    assert removed(database) == []
    assert check(database, folder) == []


def test_the_files_of_a_document_that_is_replaced_go_too(database: Database, folder: KVFolder) -> None:
    (chunk,) = add_document(database, "a", "old")
    row = add(database, folder, 1, chunk)
    add_document(database, "a", "new")
    assert removed(database) == [row.key]


def test_a_removal_that_is_rolled_back_queues_nothing(database: Database, folder: KVFolder) -> None:
    (chunk,) = add_document(database, "a", "text")
    add(database, folder, 1, chunk)

    def change_ones_mind() -> None:
        with database.write() as connection:
            connection.execute("DELETE FROM documents")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        change_ones_mind()
    assert removed(database) == []
    assert check(database, folder) == []


def test_rows_that_are_removed_are_queued_and_forgotten_when_their_files_are_gone(
    database: Database, folder: KVFolder
) -> None:
    for number in (1, 2, 3):
        add(database, folder, number, 0)
    with database.write() as connection:
        kv_rows.remove_rows(connection, [key(1), key(2), key(9)])
        assert kv_rows.take_removed(connection) == [key(1), key(2)]
        kv_rows.forget_removed(connection, [key(1)])
        assert kv_rows.take_removed(connection) == [key(2)]


def test_a_file_that_is_computed_again_before_it_was_unlinked_stays(database: Database, folder: KVFolder) -> None:
    add(database, folder, 1, 0)
    with database.write() as connection:
        kv_rows.remove_rows(connection, [key(1)])
    again = add(database, folder, 1, 0)
    unlink_removed(database, folder)
    assert check(database, folder) == []
    assert all_rows(database) == [again]


def test_a_file_that_cannot_be_unlinked_waits_in_the_queue(database: Database, folder: KVFolder) -> None:
    for number in (1, 2):
        add(database, folder, number, 0)
    path = folder.path(key(1))
    path.unlink()
    path.mkdir()
    with database.write() as connection:
        kv_rows.remove_rows(connection, [key(1), key(2)])
    unlink_removed(database, folder)
    assert removed(database) == [key(1)]
    assert f"KV file {key(1)} waits to be unlinked" in check(database, folder)
    with database.write() as connection:
        kv_rows.reconcile(connection, folder)
    assert removed(database) == [key(1)]
    assert all_rows(database) == []
    path.rmdir()
    assert reconcile(database, folder) == []


# --- reconciling -----------------------------------------------------------------------------------------------------


def test_what_agrees_is_left_as_it_is(database: Database, folder: KVFolder) -> None:
    (chunk,) = add_document(database, "a", "text")
    rows = [add(database, folder, 1, chunk, space="other"), add(database, folder, 2, 0)]
    with database.write() as connection:
        kv_rows.touch(connection, {key(1): (3, 2.0)})
    assert reconcile(database, folder) == [key(1), key(2)]
    assert [row.uses for row in all_rows(database)] == [3, 0]
    assert [row.bytes for row in all_rows(database)] == [row.bytes for row in rows]


def test_a_row_without_a_file_goes(database: Database, folder: KVFolder) -> None:
    add(database, folder, 1, 0)
    folder.remove(key(1))
    assert check(database, folder) == [f"KV file {key(1)} is missing"]
    assert reconcile(database, folder) == []


def test_a_file_without_a_row_gets_it_from_its_header(database: Database, folder: KVFolder) -> None:
    (chunk,) = add_document(database, "a", "text")
    rows = [write_file(folder, 1, chunk, space="other", tokens=9), write_file(folder, 2, 0)]
    assert check(database, folder) == [f"KV file {key(n)} has no row" for n in (1, 2)]
    assert reconcile(database, folder) == [key(1), key(2)]
    assert all_rows(database) == rows


def test_a_file_without_a_row_whose_chunk_is_gone_is_removed(database: Database, folder: KVFolder) -> None:
    (chunk,) = add_document(database, "a", "text")
    write_file(folder, 1, chunk)
    remove_document(database, "a")
    assert reconcile(database, folder) == []


def test_files_of_another_generation_go_with_and_without_a_row(database: Database, folder: KVFolder) -> None:
    add(database, folder, 1, 0)
    write_file(folder, 2, 0)
    newer = KVFolder(folder.folder, library=folder.library, generation="later")
    add(database, newer, 3, 0)
    assert reconcile(database, newer) == [key(3)]


def test_files_of_another_library_are_removed(database: Database, folder: KVFolder) -> None:
    other = KVFolder(folder.folder, library="other", generation=folder.generation)
    write_file(other, 1, 0)
    assert check(database, folder) == [f"KV file {key(1)} is damaged or not ours"]
    assert reconcile(database, folder) == []


def test_files_of_a_library_that_was_begun_anew_are_removed(tmp_path: Path) -> None:
    for expected in ([], []):
        with Database(tmp_path) as database:
            with database.write() as connection:
                library_id = kv_rows.library_id(connection)
            folder = KVFolder(tmp_path / "kv", library=library_id, generation="now")
            assert reconcile(database, folder) == expected
            (chunk,) = add_document(database, "a", "text")
            add(database, folder, 1, chunk)
        (tmp_path / FILE_NAME).unlink()


@pytest.mark.parametrize("with_row", [True, False])
def test_a_torn_file_is_removed(database: Database, folder: KVFolder, with_row: bool) -> None:
    row = write_file(folder, 1, 0)
    if with_row:
        put(database, row)
    path = folder.path(key(1))
    path.write_bytes(path.read_bytes()[:-1])
    assert check(database, folder)[0] == f"KV file {key(1)} is damaged or not ours"
    assert reconcile(database, folder) == []


def test_a_row_of_another_size_is_put_right(database: Database, folder: KVFolder) -> None:
    add(database, folder, 1, 0)
    folder.write(fields(1, 0), {"codes": os.urandom(999)})
    assert check(database, folder) == [f"KV file {key(1)} has another size than its row says"]
    assert reconcile(database, folder) == [key(1)]
    assert all_rows(database)[0].bytes == folder.path(key(1)).stat().st_size


def test_a_file_of_another_size_whose_chunk_is_gone_takes_the_row_with_it(database: Database, folder: KVFolder) -> None:
    add(database, folder, 1, 0)
    folder.write(fields(1, 99), {"codes": os.urandom(999)})
    assert reconcile(database, folder) == []


def test_links_and_leftovers_are_removed(database: Database, folder: KVFolder) -> None:
    add(database, folder, 1, 0)
    folder.path(key(1)).rename(folder.folder / "target")
    folder.path(key(1)).symlink_to("../target")
    (folder.folder / "tmp" / "left").touch()
    assert reconcile(database, folder) == []
    assert (folder.folder / "target").exists()
    assert not (folder.folder / "tmp" / "left").exists()


def test_rows_of_files_that_cannot_be_listed_are_kept(database: Database, folder: KVFolder) -> None:
    row = add(database, folder, 1, 0)
    folder.folder.rename(folder.folder.with_name("aside"))
    folder.folder.touch()
    with pytest.raises(StorageError):
        reconcile(database, folder)
    assert all_rows(database) == [row]
    folder.folder.unlink()
    folder.folder.with_name("aside").rename(folder.folder)
    assert reconcile(database, folder) == [row.key]


def test_bodies_are_not_read(database: Database, folder: KVFolder) -> None:
    write_file(folder, 1, 0)
    path = folder.path(key(1))
    header = folder.header(key(1))
    assert header is not None
    path.write_bytes(path.read_bytes()[: header.start] + bytes(header.size - header.start))
    assert reconcile(database, folder) == [key(1)]
    assert folder.read(key(1)) is None


def test_leftovers_of_the_queue_are_unlinked(database: Database, folder: KVFolder) -> None:
    (chunk,) = add_document(database, "a", "text")
    add(database, folder, 1, chunk)
    remove_document(database, "a")
    assert check(database, folder) == [f"KV file {key(1)} waits to be unlinked", f"KV file {key(1)} has no row"]
    assert reconcile(database, folder) == []


def test_a_file_that_was_to_be_unlinked_does_not_get_its_row_back(database: Database, folder: KVFolder) -> None:
    add(database, folder, 1, 0)
    with database.write() as connection:
        kv_rows.remove_rows(connection, [key(1)])
    assert reconcile(database, folder) == []


def test_reconciling_that_is_rolled_back_can_be_done_again(database: Database, folder: KVFolder) -> None:
    (chunk,) = add_document(database, "a", "text")
    add(database, folder, 1, chunk)
    remove_document(database, "a")
    write_file(folder, 2, chunk)
    kept = write_file(folder, 3, 0)

    def fail() -> None:
        with database.write() as connection:
            kv_rows.reconcile(connection, folder)
            raise StorageError("the disk is full")

    with pytest.raises(StorageError):
        fail()
    assert removed(database) == [key(1)]
    assert reconcile(database, folder) == [kept.key]


# --- sweeping --------------------------------------------------------------------------------------------------------


def test_a_sweep_takes_only_the_files_of_chunks_that_are_gone(database: Database, folder: KVFolder) -> None:
    (gone,) = add_document(database, "gone", "text")
    (here,) = add_document(database, "here", "text")
    with_row, about_to_get_its_row = add(database, folder, 1, here), write_file(folder, 2, here)
    add(database, folder, 3, gone)
    write_file(folder, 4, gone)
    prefix = write_file(folder, 5, 0)
    torn = folder.path(write_file(folder, 6, here).key)
    torn.write_bytes(torn.read_bytes()[:-1])
    remove_document(database, "gone")
    with database.write() as connection:
        kv_rows.sweep(connection, KVFolder(folder.folder, library="", generation=""))
    assert [found for found, _ in folder.sizes()] == [with_row.key, about_to_get_its_row.key, prefix.key]
    assert all_rows(database) == [with_row]


# --- processes that are killed ---------------------------------------------------------------------------------------

# Adds and removes documents and files for ever, as the runtime would; prints a line when it has begun.
WRITER = """
import itertools, os, random, sys
from pathlib import Path
import numpy as np
from edge_rag.records import Chunk
from edge_rag.store import kv_rows, library
from edge_rag.store.database import Database
from edge_rag.store.kv_files import KVFolder
from edge_rag.store.kv_format import KVFields

place, seed = Path(sys.argv[1]), int(sys.argv[2])
chance = random.Random(seed)
with Database(place) as database:
    with database.write() as connection:
        folder = KVFolder(place / "kv", library=kv_rows.library_id(connection), generation="now")
        kv_rows.reconcile(connection, folder)
    for turn in itertools.count():
        chunk = Chunk(ordinal=0, text="text", heading="", page=None, start=0, end=4, tokens=1)
        new = library.NewDocument(
            path=str(chance.randrange(4)), title="", kind="txt", bytes=9, sha256="0", recipe="1", chunks=(chunk,)
        )
        with database.write() as connection:
            document = library.put_document(connection, new, [np.ones(8, np.float32)], now=1.0)
            chunk_id = connection.execute("SELECT id FROM chunks WHERE document_id = ?", (document,)).get
        for _ in range(3):
            key = f"{chance.randrange(20):064x}"
            fields = KVFields(
                key=key, chunk_id=chunk_id, space="", tokens=1, layers=1, k_width=1, v_width=1, codec="", seconds=0.0
            )
            size = folder.write(fields, {"same": key.encode(), "noise": os.urandom(chance.randrange(200_000))})
            with database.write() as connection:
                kept = kv_rows.put_row(connection, kv_rows.new_row(fields, generation="now", bytes=size))
            if not kept:
                folder.remove(key)
        with database.write() as connection:
            if chance.random() < 0.3:
                library.remove_document(connection, document)
            kv_rows.remove_rows(connection, [f"{chance.randrange(20):064x}"])
        with database.write() as connection:
            kv_rows.unlink_removed(connection, folder)
        if not turn:
            print("writing", flush=True)
"""


def start_writer(place: Path, seed: int) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", WRITER, str(place), str(seed)], stdout=subprocess.PIPE, text=True)


def killed_after(process: "subprocess.Popen[str]", seconds: float) -> None:
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()


def assert_all_readable(folder: KVFolder, keys: list[str]) -> None:
    for one in keys:
        stored = folder.read(one)
        assert stored is not None
        assert bytes(stored.sections["same"]) == one.encode()


def test_rows_and_files_agree_after_every_kill(tmp_path: Path) -> None:
    chance = random.Random(1)
    disagreed = 0
    for seed in range(KILLS):
        killed_after(start_writer(tmp_path, seed), chance.random() * 0.1)
        with Database(tmp_path) as database:
            with database.write() as connection:
                folder = KVFolder(tmp_path / "kv", library=kv_rows.library_id(connection), generation="now")
            disagreed += bool(check(database, folder)) or any((folder.folder / "tmp").iterdir())
            assert_all_readable(folder, reconcile(database, folder))
            assert list((folder.folder / "tmp").iterdir()) == []
            with database.read() as connection:
                assert list(library.check(connection)) == []
    assert disagreed, "no kill hit anything: the test proves nothing"


def test_reconciling_beside_writing_processes_does_not_disturb_them(tmp_path: Path) -> None:
    with Database(tmp_path) as database:
        with database.write() as connection:
            folder = KVFolder(tmp_path / "kv", library=kv_rows.library_id(connection), generation="now")
        writers = [start_writer(tmp_path, seed) for seed in (1, 2)]
        for _ in range(20):
            with database.write() as connection:
                kv_rows.reconcile(connection, folder)
        for writer in writers:
            killed_after(writer, 0.2)  # which fails if it has ended by itself
        assert_all_readable(folder, reconcile(database, folder))


# --- audits and old questions ----------------------------------------------------------------------------------------


def answer(number: str, document_id: int) -> Answer:
    passage = Passage(
        chunk_id=1,
        document_id=document_id,
        ordinal=0,
        path="a",
        title="",
        heading="",
        page=None,
        text="",
        tokens=1,
        score=1.0,
    )
    return Answer(
        id=number,
        question="Why?",
        text="Because",
        passages=(passage,),
        citations=(),
        usage=Usage(),
        timings=Timings(),
        finish_reason="stop",
        plan=Plan(),
        model="small",
    )


def audit(question: str, when: float, **changes: Any) -> KVAudit:
    values: dict[str, Any] = {"model": "small", "link_tokens": 16, "kl": 0.5, "agreement": 0.75}
    return KVAudit(question_id=question, audited_at=when, **values | changes)


def test_the_newest_audits_of_a_model_are_found(database: Database) -> None:
    add_document(database, "a", "text")
    audits = [audit("q", 1.0), audit("q", 3.0, kl=0.1), audit("q", 2.0), audit("q", 4.0, model="large")]
    audits.append(audit("q", 5.0, link_tokens=8))
    with database.write() as connection:
        journal.record(connection, answer("q", 1), now=1.0)
        assert all(kv_audits.put_audit(connection, one) for one in audits)
    with database.read() as connection:
        assert kv_audits.recent_audits(connection, "small", 16, 10) == [audits[2], audits[1], audits[0]]
        assert kv_audits.recent_audits(connection, "small", 16, 2) == [audits[2], audits[1]]
        assert kv_audits.recent_audits(connection, "small", 8, 10) == [audits[4]]
        assert kv_audits.recent_audits(connection, "tiny", 16, 10) == []


def test_audits_go_with_the_documents_of_their_question(database: Database) -> None:
    add_document(database, "a", "text")
    with database.write() as connection:
        journal.record(connection, answer("q", 1), now=1.0)
        assert kv_audits.put_audit(connection, audit("q", 1.0))
    remove_document(database, "a")
    with database.write() as connection:
        assert kv_audits.recent_audits(connection, "small", 16, 10) == []
        assert not kv_audits.put_audit(connection, audit("q", 2.0))
        assert connection.execute("SELECT count(*) FROM kv_audits").get == 0


def test_the_plans_of_old_questions_speak_todays_language(tmp_path: Path) -> None:
    connection = apsw.Connection(str(tmp_path / FILE_NAME))
    migrate(connection, MIGRATIONS[:2])
    plan = Plan(
        passages=(PassagePlan(chunk_id=1, tokens=5), PassagePlan(chunk_id=2, tokens=5)), search_query='"prefill"'
    )
    text = journal._json(plan).replace('"how":"recompute"', '"how":"prefill"')
    assert text.count('"how":"prefill"') == 2
    connection.execute("INSERT INTO questions VALUES ('q', 1.0, '', '', '', 'stop', '', ?, '[]', '{}', '{}')", (text,))
    migrate(connection, MIGRATIONS)
    assert connection.execute("SELECT plan FROM questions").get == text.replace('"how":"prefill"', '"how":"recompute"')
    connection.close()
