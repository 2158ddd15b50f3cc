"""Documents and chunks: rows in, records out. Every function takes an open connection inside a transaction.

A document is put, replaced or removed as a whole, with its chunks, words, vectors and codes, in the caller's
transaction: a crash leaves either all of it or nothing.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import apsw
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from edge_rag.records import Chunk, Document, Filter, Passage
from edge_rag.store.database import Connection

Vectors = npt.NDArray[np.float32]

VIEWS = 2  # at most so many vectors a chunk; part of the schema

_DOCUMENT = "id, path, title, kind, bytes, sha256, recipe, chunks, tokens, added_at"


class NewDocument(Struct, frozen=True):
    """A document that is ready to be stored."""

    path: str
    title: str
    kind: str
    bytes: int
    sha256: str
    recipe: str
    chunks: tuple[Chunk, ...]


class Counts(Struct, frozen=True):
    """How much the library holds."""

    documents: int
    chunks: int
    vectors: int
    tokens: int


def counts(connection: Connection) -> Counts:
    """Totals over all documents."""
    row: Any = connection.execute("SELECT count(*), total(chunks), total(vectors), total(tokens) FROM documents").get
    return Counts(*map(int, row))


def find_document(connection: Connection, path: str) -> Document | None:
    """The document stored under `path`."""
    rows = connection.execute(f"SELECT {_DOCUMENT} FROM documents WHERE path = ?", (path,)).fetchall()
    return _document(rows[0]) if rows else None


def list_documents(connection: Connection, where: Filter | None = None) -> list[Document]:
    """Documents by path."""
    condition, values = document_condition(where)
    rows = connection.execute(f"SELECT {_DOCUMENT} FROM documents WHERE {condition} ORDER BY path", values)
    return [_document(row) for row in rows]


def put_document(connection: Connection, new: NewDocument, vectors: Sequence[Vectors], *, now: float) -> int:
    """Store a document, replacing the one under the same path (which keeps its id). Returns its id.

    `vectors` has one array a chunk, of shape [views, dimensions] (or [dimensions]), unit length, at most two views.
    """
    tokens = sum(chunk.tokens for chunk in new.chunks)
    number = sum(len(np.atleast_2d(views)) for views in vectors)
    document_id: int = connection.execute(
        """INSERT INTO documents (path, title, kind, bytes, sha256, recipe, chunks, vectors, tokens, added_at)
           VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
           ON CONFLICT (path) DO UPDATE SET title = excluded.title, kind = excluded.kind, bytes = excluded.bytes,
               sha256 = excluded.sha256, recipe = excluded.recipe, chunks = excluded.chunks,
               vectors = excluded.vectors, tokens = excluded.tokens, added_at = excluded.added_at
           RETURNING id""",
        (new.path, new.title, new.kind, new.bytes, new.sha256, new.recipe, len(new.chunks), number, tokens, now),
    ).get
    connection.execute("DELETE FROM chunks WHERE document_id = ?", (document_id,))
    for chunk, views in zip(new.chunks, vectors, strict=True):
        _put_chunk(connection, document_id, chunk, views)
    return document_id


def _put_chunk(connection: Connection, document_id: int, chunk: Chunk, views: Vectors) -> None:
    connection.execute(
        """INSERT INTO chunks (document_id, ordinal, heading, page, start, "end", tokens, text)
           VALUES (?, ?, ?, ?, ?, ?, ?, ?)""",
        (document_id, chunk.ordinal, chunk.heading, chunk.page, chunk.start, chunk.end, chunk.tokens, chunk.text),
    )
    put_vectors(connection, connection.last_insert_rowid(), views)


def put_vectors(connection: Connection, chunk_id: int, views: Vectors) -> None:
    """Store the embeddings of a chunk's views, shape [views, dimensions], and their sign codes."""
    for view, vector in enumerate(np.atleast_2d(views)):
        place = VIEWS * chunk_id + view
        connection.execute("INSERT OR REPLACE INTO vectors VALUES (?, ?)", (place, vector.astype("<f4").tobytes()))
        connection.execute("INSERT OR REPLACE INTO codes VALUES (?, ?)", (place, sign_code(vector)))


def collect_vectors(connection: Connection, embedded: Mapping[int, Vectors]) -> None:
    """Keep new embeddings by chunk id, shape [views, dimensions] each, beside the old ones. Chunks may be gone."""
    for chunk_id, views in embedded.items():
        for view, vector in enumerate(views):
            connection.execute(
                "INSERT INTO new_vectors SELECT ?, id, ?, ? FROM chunks WHERE id = ?",
                (VIEWS * chunk_id + view, vector.astype("<f4").tobytes(), sign_code(vector), chunk_id),
            )


def place_new_vectors(connection: Connection) -> None:
    """Put the collected embeddings in the place of all old ones."""
    for table, column in (("vectors", "embedding"), ("codes", "code")):
        connection.execute(f"DELETE FROM {table}")
        connection.execute(f"INSERT INTO {table} SELECT id, {column} FROM new_vectors")
    drop_new_vectors(connection)


def drop_new_vectors(connection: Connection) -> None:
    """Forget what was collected."""
    connection.execute("DELETE FROM new_vectors")


def sign_code(vector: Vectors) -> bytes:
    """One bit a dimension: whether the value is positive; padded to whole 64-bit words."""
    bits = np.packbits(vector > 0)
    return bits.tobytes() + b"\0" * (-len(bits) % 8)


def remove_document(connection: Connection, document_id: int) -> None:
    """Remove a document with all that was derived from it, and the questions that were answered from it."""
    connection.execute("DELETE FROM documents WHERE id = ?", (document_id,))


def passages(connection: Connection, ids: Sequence[int]) -> dict[int, Passage]:
    """The chunks with these ids as passages with score 0, by id. Ids that are gone are left out."""
    rows = connection.execute(
        """SELECT c.id, c.document_id, c.ordinal, d.path, d.title, c.heading, c.page, c.text, c.tokens
           FROM json_each(?) j JOIN chunks c ON c.id = j.value JOIN documents d ON d.id = c.document_id""",
        (_json(ids),),
    )
    return {
        row[0]: Passage(
            chunk_id=row[0],
            document_id=row[1],
            ordinal=row[2],
            path=row[3],
            title=row[4],
            heading=row[5],
            page=row[6],
            text=row[7],
            tokens=row[8],
            score=0.0,
        )
        for row in rows
    }


def chunk_texts(connection: Connection, *, after: int, limit: int) -> list[tuple[int, str, str, str, int]]:
    """The next (id, title, heading, text, tokens) in order of ids: for work over all chunks, a batch at a time."""
    rows: list[Any] = connection.execute(
        """SELECT c.id, d.title, c.heading, c.text, c.tokens FROM chunks c JOIN documents d ON d.id = c.document_id
           WHERE c.id > ? ORDER BY c.id LIMIT ?""",
        (after, limit),
    ).fetchall()
    return rows


def chunks_by_use(connection: Connection, documents: Sequence[int] | None, *, limit: int | None) -> list[int]:
    """Chunk ids of these documents (None = all): the most often answered from first.

    Never used ones follow, newest documents first, in the order of the text.
    """
    rows = connection.execute(
        """SELECT c.id FROM chunks c JOIN documents d ON d.id = c.document_id
           LEFT JOIN (SELECT chunk_id, count(*) AS uses FROM question_passages GROUP BY chunk_id) u ON u.chunk_id = c.id
           WHERE ?1 IS NULL OR d.id IN (SELECT value FROM json_each(?1))
           ORDER BY coalesce(u.uses, 0) DESC, d.added_at DESC, d.id DESC, c.ordinal LIMIT ?2""",
        (None if documents is None else _json(documents), -1 if limit is None else limit),
    )
    return [row[0] for row in rows]


def search_words(connection: Connection, query: str, *, limit: int, where: Filter | None = None) -> list[int]:
    """Chunk ids by BM25, best first. `query` is in FTS5 syntax ('' finds nothing). Words in a heading count double."""
    if not query:
        return []
    condition, values = chunk_condition(where, "rowid")
    rows = connection.execute(
        f"SELECT rowid FROM words WHERE words MATCH ? {condition} ORDER BY bm25(words, 2.0, 1.0) LIMIT ?",
        (query, *values, limit),
    )
    return [row[0] for row in rows]


def filtered_chunks(connection: Connection, where: Filter | None) -> int:
    """How many chunks pass the filter."""
    condition, values = document_condition(where)
    count: int = connection.execute(f"SELECT coalesce(sum(chunks), 0) FROM documents WHERE {condition}", values).get
    return count


def document_condition(where: Filter | None) -> tuple[str, tuple[object, ...]]:
    """A filter as SQL over `documents`, with its values."""
    if where is None:
        return "1", ()
    folder = where.folder.rstrip("/")
    parts: list[tuple[str, tuple[object, ...]]] = []
    if where.documents:
        # One value however many there are: a statement takes 32,766.
        parts.append(("path IN (SELECT value FROM json_each(?))", (json.dumps(where.documents),)))
    if folder:
        parts.append(("substr(path, 1, ?) = ?", (len(folder) + 1, folder + "/")))
    if where.kinds:
        parts.append((f"kind IN ({_marks(where.kinds)})", where.kinds))
    return " AND ".join(part for part, _ in parts) or "1", tuple(value for _, values in parts for value in values)


def chunk_condition(where: Filter | None, column: str) -> tuple[str, tuple[object, ...]]:
    """A filter as SQL to be appended to a WHERE over chunk ids in `column`; '' when nothing is restricted."""
    condition, values = document_condition(where)
    if condition == "1":
        return "", ()
    ids = f"SELECT c.id FROM chunks c JOIN documents ON documents.id = c.document_id WHERE {condition}"
    return f"AND {column} IN ({ids})", values


def get_meta(connection: Connection, key: str) -> str | None:
    """A value of the library's own notes, None when it was never set."""
    rows: list[Any] = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchall()
    return rows[0][0] if rows else None


def set_meta(connection: Connection, key: str, value: str) -> None:
    """Set a value of the library's own notes."""
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))


def check(connection: Connection) -> Iterator[str]:
    """Every inconsistency found in the library, in words; nothing when it is whole."""
    for (line,) in connection.execute("PRAGMA integrity_check"):
        if line != "ok":
            yield f"SQLite: {line}"
    for row in connection.execute("PRAGMA foreign_key_check"):
        yield f"row {row[1]} of {row[0]} has lost its {row[2]}"
    questions = {
        "documents whose number of chunks is wrong": "SELECT count(*) FROM documents d WHERE chunks <> "
        "(SELECT count(*) FROM chunks WHERE document_id = d.id)",
        "chunks without a vector": "SELECT count(*) FROM chunks WHERE 2 * id NOT IN (SELECT id FROM vectors)",
        "vectors without a chunk": "SELECT count(*) FROM vectors WHERE id / 2 NOT IN (SELECT id FROM chunks)",
        "vectors without a code": "SELECT count(*) FROM vectors WHERE id NOT IN (SELECT id FROM codes)",
        "codes without a vector": "SELECT count(*) FROM codes WHERE id NOT IN (SELECT id FROM vectors)",
    }
    for what, sql in questions.items():
        if number := connection.execute(sql).get:
            yield f"{number} {what}"
    try:
        connection.execute("INSERT INTO words (words, rank) VALUES ('integrity-check', 1)")
    except apsw.CorruptError:
        yield "the word index does not agree with the chunks"


def _document(row: tuple[object, ...]) -> Document:
    return Document(**dict(zip(_DOCUMENT.split(", "), row, strict=True)))  # type: ignore[arg-type]


def _marks(values: Sequence[object]) -> str:
    return ", ".join("?" * len(values))


def _json(ids: Sequence[int]) -> str:
    return "[" + ",".join(str(int(item)) for item in ids) + "]"
