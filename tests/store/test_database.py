"""The SQLite file: real files, real processes, real SQLite failures."""

import multiprocessing
import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import apsw
import pytest
import sqlite_vec

from edge_rag.errors import StorageError
from edge_rag.store import library
from edge_rag.store.database import FILE_NAME, Database, load_vector_extension, migrate, smoke_test
from edge_rag.store.migrations import MIGRATIONS

WRITES = 40


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path) as opened:
        yield opened


def set_note(database: Database, key: str, value: str) -> None:
    with database.write() as connection:
        library.set_meta(connection, key, value)


def note(database: Database, key: str) -> str | None:
    with database.read() as connection:
        return library.get_meta(connection, key)


def count_up(database: Database) -> None:
    with database.write() as connection:
        library.set_meta(connection, "number", str(int(library.get_meta(connection, "number") or "0") + 1))


# --- opening ---------------------------------------------------------------------------------------------------------


def test_a_missing_folder_is_created_with_its_parents_and_holds_an_empty_whole_library(tmp_path: Path) -> None:
    with Database(tmp_path / "a" / "b") as database, database.write() as connection:
        assert library.counts(connection) == library.Counts(0, 0, 0, 0)
        assert list(library.check(connection)) == []
        assert connection.pragma("user_version") == len(MIGRATIONS)


def test_folder_and_files_are_private(tmp_path: Path) -> None:
    folder = tmp_path / "library"
    with Database(folder) as database:
        set_note(database, "key", "value")
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert FILE_NAME in modes
        assert len(modes) == 3, "the write-ahead log and its index stand beside the file"
        assert set(modes.values()) == {0o600}


def test_what_was_written_is_there_after_reopening(tmp_path: Path) -> None:
    with Database(tmp_path) as database:
        set_note(database, "key", "value")
    with Database(tmp_path) as database:
        assert note(database, "key") == "value"


def test_a_library_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    with Database(tmp_path) as database, database.write() as connection:
        library.set_meta(connection, "key", "value")
        connection.pragma("user_version", 999)
    with pytest.raises(StorageError, match=r"version 999.*upgrade edge-rag"):
        Database(tmp_path)
    connection = apsw.Connection(str(tmp_path / FILE_NAME))
    assert connection.pragma("user_version") == 999
    assert library.get_meta(connection, "key") == "value"
    connection.close()


@pytest.mark.parametrize(
    "content",
    [pytest.param(b"Dear diary, " * 1000, id="text"), pytest.param(bytes(range(256)) * 64, id="bytes")],
)
def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(StorageError, match="not a database"):
        Database(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == content


def test_a_file_where_the_folder_should_be_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "library").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot be used"):
        Database(tmp_path / "library")


def test_a_damaged_page_is_reported_as_damage(tmp_path: Path) -> None:
    with Database(tmp_path) as database:
        for number in range(200):
            set_note(database, f"key {number}", "x" * 1000)
    content = bytearray((tmp_path / FILE_NAME).read_bytes())
    content[8192:] = b"\xa5" * (len(content) - 8192)
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(StorageError, match="damaged"), Database(tmp_path) as database, database.read() as connection:
        connection.execute("SELECT * FROM meta").fetchall()


def test_an_extension_that_does_not_load_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "vec0.so"
    broken.write_bytes(b"not a shared library")
    monkeypatch.setattr(sqlite_vec, "loadable_path", lambda: str(broken))
    with pytest.raises(StorageError, match=r"sqlite-vec.*reinstall"):
        Database(tmp_path / "library")


def test_the_smoke_test_names_the_versions_it_proved() -> None:
    connection = apsw.Connection(":memory:")
    load_vector_extension(connection)
    assert smoke_test(connection).keys() == {"sqlite", "sqlite_vec", "apsw"}
    connection.close()


def test_the_smoke_test_refuses_a_connection_without_sqlite_vec() -> None:
    connection = apsw.Connection(":memory:")
    with pytest.raises(StorageError, match="sqlite-vec or FTS5 does not work here"):
        smoke_test(connection)
    connection.close()


# --- no permission ---------------------------------------------------------------------------------------------------

# Permissions do not bind root, so the check runs in a process that has given root up. What that user may not import
# any more is loaded before, and an open library keeps the extension loaded.
UNPRIVILEGED = """
import os, sys, tempfile
from pathlib import Path
from typing import Any
from edge_rag.errors import StorageError
from edge_rag.store.database import Database

folder = Path(sys.argv[1])
with tempfile.TemporaryDirectory() as other, Database(Path(other)):
    root = os.geteuid()
    if root == 0:
        os.seteuid(65534)
    try:
        with Database(folder) as database, database.write() as connection:
            connection.execute("INSERT INTO meta VALUES ('key', 'value')")
    except StorageError as error:
        print("refused:", error)
    else:
        print("opened")
    os.seteuid(root)
"""


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that every user can reach, owned by the user that the check runs as."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        give_away(folder)
        folder.chmod(0o755)
        yield folder
        folder.chmod(0o755)


def give_away(path: Path) -> None:
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)


def opened_without_privileges(folder: Path) -> str:
    command = [sys.executable, "-c", UNPRIVILEGED, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout


def test_a_user_who_owns_the_folder_can_use_it(reachable: Path) -> None:
    assert opened_without_privileges(reachable) == "opened\n"


def test_a_folder_that_may_not_be_written_is_a_clear_error(reachable: Path) -> None:
    reachable.chmod(0o555)
    assert opened_without_privileges(reachable).startswith("refused: ")
    assert opened_without_privileges(reachable / "new").startswith("refused: ")


def test_a_library_in_a_folder_that_became_read_only_is_a_clear_error(reachable: Path) -> None:
    assert opened_without_privileges(reachable) == "opened\n"
    reachable.chmod(0o555)
    said = opened_without_privileges(reachable)
    assert said.startswith("refused: ")
    assert str(reachable) in said


def test_a_library_of_another_user_is_a_clear_error(reachable: Path) -> None:
    if os.geteuid() == 0:
        Database(reachable).close()
        os.chown(reachable, 0, 0)
    else:
        reachable.chmod(0o000)
    assert opened_without_privileges(reachable).startswith("refused: ")


def test_a_connection_that_may_only_read_is_a_clear_error(database: Database) -> None:
    with database.read() as connection:
        connection.pragma("query_only", True)
    with pytest.raises(StorageError, match="read-only"):
        set_note(database, "key", "value")
    with database.read() as connection:
        connection.pragma("query_only", False)
    set_note(database, "key", "value")
    assert note(database, "key") == "value"


# --- a full disk -----------------------------------------------------------------------------------------------------


def test_a_full_disk_loses_nothing_and_the_library_stays_usable(database: Database) -> None:
    set_note(database, "before", "kept")
    with database.read() as connection:
        connection.pragma("max_page_count", connection.pragma("page_count") + 2)
    with pytest.raises(StorageError, match="the disk is full"):
        set_note(database, "large", "x" * 1_000_000)
    assert note(database, "before") == "kept"
    assert note(database, "large") is None
    with database.write() as connection:
        assert list(library.check(connection)) == []
        connection.pragma("max_page_count", 1_000_000)
    set_note(database, "large", "x" * 1_000_000)
    assert note(database, "large") == "x" * 1_000_000


FILE_LIMIT = """
import resource, sys
from pathlib import Path
from typing import Any
from edge_rag.errors import StorageError
from edge_rag.store import library
from edge_rag.store.database import Database

with Database(Path(sys.argv[1])) as database:
    def note(key, value):
        with database.write() as connection:
            library.set_meta(connection, key, value)

    note("before", "kept")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512 * 1024, hard))
    written = 0
    try:
        for number in range(100):
            note(f"key {number}", "x" * 50_000)
            written += 1
    except StorageError as error:
        print("refused:", error.message)
    with database.read() as connection:
        assert library.get_meta(connection, "before") == "kept"
        assert library.get_meta(connection, f"key {written}") is None
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    note("after", "usable")
print(written)
"""


def test_a_commit_that_cannot_be_written_loses_nothing_and_the_library_stays_usable(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILE_LIMIT, str(tmp_path)]
    refused, written = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert refused.startswith("refused: ")
    with Database(tmp_path) as database:
        assert note(database, "before") == "kept"
        assert note(database, "after") == "usable"
        kept = [note(database, f"key {number}") for number in range(100)]
        assert kept == ["x" * 50_000] * int(written) + [None] * (100 - int(written))
        with database.write() as connection:
            assert list(library.check(connection)) == []


# --- transactions ----------------------------------------------------------------------------------------------------


def test_an_exception_undoes_the_whole_transaction_and_passes_through(database: Database) -> None:
    def change_ones_mind() -> None:
        with database.write() as connection:
            library.set_meta(connection, "key", "value")
            raise KeyError

    with pytest.raises(KeyError):
        change_ones_mind()
    assert note(database, "key") is None
    set_note(database, "key", "later")
    assert note(database, "key") == "later"


def test_a_commit_that_fails_leaves_no_open_transaction_behind(database: Database) -> None:
    def lose_a_document() -> None:
        with database.write() as connection:
            library.set_meta(connection, "key", "value")
            connection.pragma("defer_foreign_keys", True)  # so that the commit finds what is wrong
            connection.execute(
                "INSERT INTO feedback (question_id, given_at, score, comment) VALUES ('nobody', 0, 0, '')"
            )

    with pytest.raises(apsw.ConstraintError):
        lose_a_document()
    assert note(database, "key") is None
    set_note(database, "key", "later")
    assert note(database, "key") == "later"


def test_a_foreign_system_error_in_the_callers_block_is_not_blamed_on_the_data_folder(database: Database) -> None:
    with pytest.raises(BrokenPipeError), database.write():
        raise BrokenPipeError


def test_a_reader_sees_one_state_while_others_write(database: Database) -> None:
    set_note(database, "key", "old")
    with database.read() as connection:
        assert library.get_meta(connection, "key") == "old"
        set_note(database, "key", "new")
        assert library.get_meta(connection, "key") == "old"
    assert note(database, "key") == "new"


def test_a_writer_that_waits_too_long_is_told_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_rag.store.database.BUSY_SECONDS", 0)
    error = pytest.raises(StorageError, match="another process has been writing")
    with Database(tmp_path) as database, database.write(), error:
        set_note(database, "key", "value")


def test_use_after_close_is_a_clear_error(tmp_path: Path) -> None:
    database = Database(tmp_path)
    database.close()
    database.close()
    with pytest.raises(StorageError, match="closed"):
        note(database, "key")
    with pytest.raises(StorageError, match="closed"):
        set_note(database, "key", "value")


def test_a_transaction_in_use_survives_close_and_its_connection_is_closed_after_it(tmp_path: Path) -> None:
    database = Database(tmp_path)
    with database.write() as connection:
        database.close()
        library.set_meta(connection, "key", "value")
    with pytest.raises(apsw.ConnectionClosedError):
        connection.execute("SELECT 1")
    with Database(tmp_path) as again:
        assert note(again, "key") == "value"


# --- many at once ----------------------------------------------------------------------------------------------------


def test_threads_that_write_at_once_lose_no_write(database: Database) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(WRITES):
                count_up(database)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert note(database, "number") == str(4 * WRITES)


_start: Barrier


def _remember(barrier: Barrier) -> None:
    global _start
    _start = barrier


def _count_up_in_process(folder: Path) -> None:
    with Database(folder) as database:
        _start.wait()
        for _ in range(WRITES):
            count_up(database)


def _open_in_process(folders: list[Path]) -> list[int]:
    versions = []
    for folder in folders:
        _start.wait()
        with Database(folder) as database, database.read() as connection:
            versions.append(connection.pragma("user_version"))
    return versions


def in_processes(count: int, work: Callable[[Any], object], argument: object) -> list[object]:
    """Run `work(argument)` in `count` processes; `_start` holds them at one line."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count, timeout=30)
    with ProcessPoolExecutor(count, context, initializer=_remember, initargs=(barrier,)) as pool:
        return [future.result() for future in [pool.submit(work, argument) for _ in range(count)]]


def test_processes_that_write_at_once_lose_no_write(tmp_path: Path) -> None:
    in_processes(2, _count_up_in_process, tmp_path)
    with Database(tmp_path) as database:
        assert note(database, "number") == str(2 * WRITES)


def test_processes_that_create_the_same_library_at_once_all_open_it(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(15)]
    versions = in_processes(4, _open_in_process, folders)
    assert versions == [[len(MIGRATIONS)] * len(folders)] * 4


# --- migrations ------------------------------------------------------------------------------------------------------


def test_a_library_of_an_older_version_keeps_its_documents_when_it_is_migrated(tmp_path: Path) -> None:
    connection = apsw.Connection(str(tmp_path / FILE_NAME))
    migrate(connection, MIGRATIONS[:1])
    connection.execute("INSERT INTO meta VALUES ('key', 'value')")
    connection.close()
    with Database(tmp_path) as database:
        assert note(database, "key") == "value"
        with database.read() as connection:
            assert connection.pragma("user_version") == len(MIGRATIONS)


def test_a_migration_that_fails_leaves_the_version_before_it() -> None:
    connection = apsw.Connection(":memory:")
    steps = ("CREATE TABLE one (x);", "CREATE TABLE two (x); CREATE TABLE broken (;")
    with pytest.raises(apsw.SQLError):
        migrate(connection, steps)
    assert connection.pragma("user_version") == 1
    assert connection.execute("SELECT name FROM sqlite_schema").fetchall() == [("one",)]
    connection.close()
