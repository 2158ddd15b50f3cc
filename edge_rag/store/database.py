"""The one SQLite file: opening it, its schema's versions, transactions, and SQLite's failures mapped to ours.

apsw instead of the standard library's sqlite3: it carries its own SQLite, while many Pythons are built without
extension loading or FTS5; and it opens no transaction behind our back.

Sharing: WAL lets one process write while others read, and writers of several processes queue behind `BEGIN IMMEDIATE`
(up to BUSY_SECONDS). So `ask` works while `add` runs elsewhere. Within a process each transaction borrows a
connection from a pool; a connection is used by one thread at a time.
"""

import contextlib
import fcntl
import os
import queue
from collections.abc import Iterator
from pathlib import Path

import apsw
import sqlite_vec

from edge_rag.closing import Closing
from edge_rag.errors import InputError, StorageError
from edge_rag.store.migrations import MIGRATIONS

Connection = apsw.Connection

BUSY_SECONDS = 30
FILE_NAME = "library.db"
PRAGMAS = (
    "journal_mode = wal",
    "synchronous = full",
    "foreign_keys = on",
    "secure_delete = on",  # what is removed shall not be found in free pages
    "mmap_size = 1073741824",
)


class Database(Closing):
    """The library's database in `folder`, created when missing. Thread-safe.

    Raises StorageError when it cannot be opened: newer version, damage, no permission, missing extensions.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._closed = False
        with _mapped(self.path):
            with _mapped_system(self.path):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _only_one(folder):
                connection = self._connect()
            smoke_test(connection)
            migrate(connection, MIGRATIONS)
        self._idle.put(connection)

    def close(self) -> None:
        """Close all idle connections; one that is in use is closed when its transaction ends. Idempotent."""
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection inside a read transaction: all its queries see one state of the library."""
        with self._transaction("BEGIN") as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """A connection inside a write transaction: committed when the block ends, rolled back when it raises."""
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[Connection]:
        with _mapped(self.path):
            connection = self._borrow()
            try:
                connection.execute(begin)
                try:
                    yield connection
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
                connection.execute("COMMIT")
            finally:
                self._give_back(connection)

    def _borrow(self) -> Connection:
        if self._closed:
            raise StorageError("the library is closed", field=str(self.path))
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return self._connect()

    def _give_back(self, connection: Connection) -> None:
        # A commit that failed (disk full) leaves its transaction open; such a connection is not used again.
        if self._closed or connection.in_transaction:
            connection.close()
        else:
            self._idle.put(connection)

    def _connect(self) -> Connection:
        connection = Connection(str(self.path))
        with _mapped_system(self.path):
            self.path.chmod(0o600)  # as private as the documents it holds
        connection.set_busy_timeout(BUSY_SECONDS * 1000)
        load_vector_extension(connection)
        for pragma in PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        return connection


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Let one process at a time into the block: two that switch a new file to WAL at once would lock each other out."""
    with _mapped_system(folder):
        held = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _mapped_system(folder):
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def load_vector_extension(connection: Connection) -> None:
    """Load sqlite-vec into `connection`. Raises StorageError when it cannot be loaded."""
    connection.enable_load_extension(True)
    try:
        connection.load_extension(sqlite_vec.loadable_path())
    except apsw.ExtensionLoadingError as error:
        raise _unusable(str(error)) from error
    connection.enable_load_extension(False)


def smoke_test(connection: Connection) -> dict[str, str]:
    """Prove that sqlite-vec and FTS5 really work here, and return their versions. Raises StorageError otherwise."""
    try:
        distance = connection.execute("SELECT vec_distance_l2(?, ?)", (b"\0" * 8, b"\0\0\x40\x40\0\0\x80\x40")).get
        connection.execute("CREATE VIRTUAL TABLE temp.smoke USING fts5(text, tokenize = 'porter unicode61')")
        connection.execute("INSERT INTO temp.smoke VALUES ('filters are cleaned')")
        found = connection.execute("SELECT count(*) FROM temp.smoke WHERE smoke MATCH 'filter'").get
        connection.execute("DROP TABLE temp.smoke")
        version, vec = connection.execute("SELECT sqlite_version(), vec_version()").get
    except apsw.Error as error:
        raise _unusable(str(error)) from error
    if distance != 5.0 or found != 1:
        raise _unusable(f"distance {distance} instead of 5, {found} words found instead of 1")
    return {"sqlite": version, "sqlite_vec": vec, "apsw": apsw.apsw_version()}


def migrate(connection: Connection, migrations: tuple[str, ...]) -> None:
    """Bring the schema to the newest version, each step in one transaction with its number.

    Raises StorageError when the file was written by a newer version of this program.
    """
    while connection.pragma("user_version") < len(migrations):
        connection.execute("BEGIN IMMEDIATE")
        with connection:  # a savepoint inside: a statement that fails undoes the whole step
            version = connection.pragma("user_version")  # another process may have been first
            if version < len(migrations):
                connection.execute(migrations[version])
                connection.execute(f"PRAGMA user_version = {version + 1}")
        connection.execute("COMMIT")
    version = connection.pragma("user_version")
    if version > len(migrations):
        raise StorageError(
            f"the library has version {version}; this program knows up to {len(migrations)}",
            field=connection.filename,
            remedy="upgrade edge-rag, or use another data folder",
        )


def _unusable(reason: str) -> StorageError:
    return StorageError(
        f"sqlite-vec or FTS5 does not work here: {reason}",
        remedy="reinstall apsw and sqlite-vec (pip install --force-reinstall apsw sqlite-vec)",
    )


_REMEDIES: tuple[tuple[type[apsw.Error], str, str], ...] = (
    (apsw.FullError, "the disk is full", "free some space; nothing that was stored is lost"),
    (apsw.ReadOnlyError, "the data folder is read-only", "make it writable or choose another with --data"),
    (apsw.CantOpenError, "the database cannot be opened", "check the folder's permissions or choose another (--data)"),
    (apsw.BusyError, "another process has been writing for too long", "let it finish, then try again"),
    (apsw.LockedError, "another process has been writing for too long", "let it finish, then try again"),
    (apsw.NotADBError, "the file is not a database", "move it away; `edge-rag add` builds a new one"),
    (apsw.CorruptError, "the database is damaged", "restore a backup, or move it away and add the documents again"),
    (apsw.SQLError, "the database has not the expected form", "restore a backup, or move it away and add again"),
    (apsw.IOError, "reading or writing failed", "check the disk"),
)


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[None]:
    """Map SQLite's errors to StorageError, and text that it cannot hold to InputError."""
    try:
        yield
    except apsw.Error as error:
        for kind, reason, remedy in _REMEDIES:
            if isinstance(error, kind):
                raise StorageError(f"{reason} ({error})", field=str(path), remedy=remedy) from error
        raise
    except UnicodeEncodeError as error:
        raise InputError(f"{error.object!r} is not valid Unicode", remedy="write it in UTF-8") from error


@contextlib.contextmanager
def _mapped_system(path: Path) -> Iterator[None]:
    """Map the file system's errors to StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"the data folder cannot be used ({error.strerror})", field=str(path), remedy="choose another with --data"
        ) from error
