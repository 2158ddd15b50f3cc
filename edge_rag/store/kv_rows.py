"""What the library knows of its KV files. Every function takes an open connection inside a transaction.

Rows and files cannot change together, so their order is fixed. A file is written first and its row put afterwards; a
crash between leaves a file without a row. A row is deleted first, which queues its key in the same transaction
(`kv_removed`, by a trigger), and the file is unlinked afterwards; a crash between leaves the queue. So a document's
files go with it, at the latest when `unlink_removed` or `reconcile` runs next.

A row whose file is gone is harmless: the file is read as a miss, and whoever misses it removes the row.
"""

import json
import logging
import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from edge_rag.errors import StorageError
from edge_rag.records import Record
from edge_rag.store.database import Connection
from edge_rag.store.kv_files import KVFolder
from edge_rag.store.kv_format import KVFields
from edge_rag.store.library import get_meta, set_meta

logger = logging.getLogger(__name__)

LIBRARY_ID = "library_id"


class KVRow(Record, frozen=True):
    """A KV file as the library knows it; see `KVHeader`. `uses` and `priority` belong to the eviction policy."""

    key: str
    chunk_id: int
    generation: str
    space: str
    bytes: int
    tokens: int
    seconds: float
    uses: int
    priority: float


_ROW = ", ".join(KVRow.__struct_fields__)


class KVTotals(Record, frozen=True):
    """How many files have a row, and their bytes."""

    files: int
    bytes: int


def library_id(connection: Connection) -> str:
    """The random id of this library, made when it is first asked for (in a write transaction)."""
    known = get_meta(connection, LIBRARY_ID)
    if known is None:
        known = secrets.token_hex(16)
        set_meta(connection, LIBRARY_ID, known)
    return known


def new_row(fields: KVFields, *, generation: str, bytes: int, uses: int = 0, priority: float = 0.0) -> KVRow:
    """The row of a file that was written with `fields` and has so many bytes."""
    return KVRow(
        key=fields.key,
        chunk_id=fields.chunk_id,
        generation=generation,
        space=fields.space,
        bytes=bytes,
        tokens=fields.tokens,
        seconds=fields.seconds,
        uses=uses,
        priority=priority,
    )


def put_row(connection: Connection, row: KVRow) -> bool:
    """Put or replace a row after its file was written; whether the chunk is still there (0 always is).

    When it is not, nothing is put, and the caller removes the file.
    """
    if not _chunk_exists(connection, row.chunk_id):
        return False
    connection.execute(
        f"INSERT OR REPLACE INTO kv_files ({_ROW}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        tuple(getattr(row, name) for name in KVRow.__struct_fields__),
    )
    # An older file with this key may still wait to be unlinked; this one must not be.
    forget_removed(connection, [row.key])
    return True


def _chunk_exists(connection: Connection, chunk_id: int) -> bool:
    return not chunk_id or bool(connection.execute("SELECT count(*) FROM chunks WHERE id = ?", (chunk_id,)).get)


def find(connection: Connection, key: str) -> KVRow | None:
    """The row with this key."""
    rows: list[Any] = connection.execute(f"SELECT {_ROW} FROM kv_files WHERE key = ?", (key,)).fetchall()
    return KVRow(*rows[0]) if rows else None


def rows(connection: Connection, space: str | None = None) -> list[KVRow]:
    """All rows, or those of one space, by key."""
    found: list[Any] = connection.execute(
        f"SELECT {_ROW} FROM kv_files WHERE space = ?1 OR ?1 IS NULL ORDER BY key", (space,)
    ).fetchall()
    return [KVRow(*row) for row in found]


def touch(connection: Connection, values: Mapping[str, tuple[int, float]]) -> None:
    """Set (uses, priority) by key; keys without a row are passed over."""
    connection.executemany(
        "UPDATE kv_files SET uses = ?, priority = ? WHERE key = ?",
        [(uses, priority, key) for key, (uses, priority) in values.items()],
    )


def totals(connection: Connection) -> KVTotals:
    """Totals over all rows."""
    found: Any = connection.execute("SELECT count(*), coalesce(sum(bytes), 0) FROM kv_files").get
    return KVTotals(*found)


def remove_rows(connection: Connection, keys: Iterable[str]) -> None:
    """Delete rows; their files are queued to be unlinked. Keys without a row are passed over."""
    connection.execute("DELETE FROM kv_files WHERE key IN (SELECT value FROM json_each(?))", (json.dumps(list(keys)),))


def take_removed(connection: Connection) -> list[str]:
    """Keys of the files to be unlinked."""
    return [key for (key,) in connection.execute("SELECT key FROM kv_removed ORDER BY key")]


def forget_removed(connection: Connection, keys: Iterable[str]) -> None:
    """Take keys out of the queue: their files are unlinked."""
    connection.execute(
        "DELETE FROM kv_removed WHERE key IN (SELECT value FROM json_each(?))", (json.dumps(list(keys)),)
    )


def unlink_removed(connection: Connection, folder: KVFolder) -> None:
    """Unlink the files that wait for it. A file that cannot be unlinked now is logged and stays in the queue.

    In one write transaction, and one after that which removed the rows: unlinking is not undone by a rollback.
    """
    forget_removed(connection, [key for key in take_removed(connection) if _unlinked(folder, key)])


def _unlinked(folder: KVFolder, key: str) -> bool:
    try:
        folder.remove(key)
    except StorageError as error:
        logger.warning("KV file %s cannot be removed: %s", key, error)
        return False
    return True


def sweep(connection: Connection, folder: KVFolder) -> None:
    """Unlink the files of documents that were removed or replaced, in a write transaction; `folder` may be anybody's.

    Killed processes leave files without rows. One whose chunk is there stays: it may be about to get its row.
    """
    folder.sweep_temps()
    unlink_removed(connection, folder)
    known = {row.key for row in rows(connection)}
    for key, _ in folder.sizes():
        if key not in known and not _is_owned(connection, folder.owner(key)):
            _unlinked(folder, key)


def _is_owned(connection: Connection, chunk_id: int | None) -> bool:
    return chunk_id is not None and _chunk_exists(connection, chunk_id)


def reconcile(connection: Connection, folder: KVFolder) -> None:
    """Make rows and files agree, at start-up, in a write transaction. File bodies are not read.

    Rows without a file or of another generation go; a file without a row gets one from its header when it is ours and
    its chunk is there (another process may be about to put that row), and is removed otherwise. Raises StorageError
    when the folder cannot be listed.
    """
    folder.sweep_temps()
    sizes = dict(folder.sizes())  # after the transaction has begun: every row it sees had its file by then
    known = {row.key: row for row in rows(connection)}
    remove_rows(
        connection, [key for key, row in known.items() if key not in sizes or row.generation != folder.generation]
    )
    waiting = set(take_removed(connection))
    for key, size in sizes.items():
        if key not in waiting and (key not in known or known[key].bytes != size):
            _settle(connection, folder, key, size)
    unlink_removed(connection, folder)


def _settle(connection: Connection, folder: KVFolder, key: str, size: int) -> None:
    """Give a file its row from its header, or remove both."""
    header = folder.header(key)  # which removes a file that is not ours
    if header is None or not put_row(connection, new_row(header, generation=header.generation, bytes=size)):
        remove_rows(connection, [key])
        if header is not None:
            _unlinked(folder, key)


def check(connection: Connection, folder: KVFolder) -> Iterator[str]:
    """Every disagreement between rows and files, in words; nothing when there is none. File bodies are not read."""
    found = dict(folder.scan())
    known = {row.key: row for row in rows(connection)}
    for key in take_removed(connection):
        yield f"KV file {key} waits to be unlinked"
    for key in sorted(known.keys() - found.keys()):
        yield f"KV file {key} is missing"
    for key, header in found.items():
        if header is None:
            yield f"KV file {key} is damaged or not ours"
        elif key not in known:
            yield f"KV file {key} has no row"
        elif known[key].bytes != header.size:
            yield f"KV file {key} has another size than its row says"
