"""Nearest neighbours by cosine: exact with sqlite-vec up to a limit, coarse with exact rescoring beyond.

The coarse index holds one sign bit a dimension of every vector in memory (48 bytes at 384 dimensions), ranks
all by Hamming distance, and the best few are rescored with their float vectors from the database. sqlite-vec has bit
vectors of its own, but the time of its top-k grows with k: at k = 1000 a bit search took longer than an exact one
(docs/log.md). Ids of chunks only grow, so new codes are appended; when the counts disagree, the codes of removed chunks
are dropped.
"""

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_rag.records import Filter
from edge_rag.store import library
from edge_rag.store.database import Connection
from edge_rag.store.library import VIEWS, Vectors

Ids = npt.NDArray[np.int64]
Hits = list[tuple[int, float]]

BLOCK = 65_536  # codes compared at a time: the partial distances stay in the processor's cache


def search(
    connection: Connection,
    index: "CoarseIndex",
    vector: Vectors,
    *,
    limit: int,
    exact_limit: int,
    rescore: int,
    where: Filter | None = None,
) -> Hits:
    """(chunk id, cosine) of the nearest chunks, nearest first; exact while at most `exact_limit` chunks qualify."""
    if library.filtered_chunks(connection, where) <= exact_limit:
        return search_exact(connection, vector, limit=limit, where=where)
    candidates = index.nearest(connection, vector, limit=max(rescore, limit), where=where)
    return rescored(connection, vector, candidates)[:limit]


def search_exact(connection: Connection, vector: Vectors, *, limit: int, where: Filter | None = None) -> Hits:
    """As `search`, comparing every chunk that passes the filter."""
    condition, values = library.chunk_condition(where, f"id / {VIEWS}")
    rows = connection.execute(
        f"""SELECT id / {VIEWS}, vec_distance_l2(embedding, ?) AS distance FROM vectors
            WHERE 1 {condition} ORDER BY distance LIMIT ?""",
        (vector.astype("<f4").tobytes(), *values, VIEWS * limit),
    )
    # For unit vectors |a - b|² = 2 - 2 cos, so both orders agree. The first view of a chunk is its nearest.
    nearest: dict[int, float] = {}
    for chunk_id, distance in rows:
        nearest.setdefault(chunk_id, 1.0 - distance * distance / 2.0)
    return list(nearest.items())[:limit]


def rescored(connection: Connection, vector: Vectors, chunk_ids: Ids) -> Hits:
    """(chunk id, cosine) of those chunks that still exist, nearest first."""
    ids, matrix = read_vectors(connection, chunk_ids.tolist())
    if not ids:
        return []
    cosines = matrix @ vector
    nearest: dict[int, float] = {}
    for place in np.argsort(-cosines, kind="stable"):
        nearest.setdefault(ids[place], float(cosines[place]))
    return list(nearest.items())


def read_vectors(connection: Connection, chunk_ids: list[int]) -> tuple[list[int], Vectors]:
    """The embeddings of those chunks that exist: (chunk id of each row, matrix of shape [rows, dimensions]).

    A chunk has a row for each of its views.
    """
    rows: list[Any] = connection.execute(
        f"""SELECT v.id / {VIEWS}, v.embedding FROM json_each(?) j
            JOIN vectors v ON v.id BETWEEN {VIEWS} * j.value AND {VIEWS} * j.value + {VIEWS - 1}""",
        (str(chunk_ids),),
    ).fetchall()
    data = b"".join(row[1] for row in rows)
    matrix = np.frombuffer(data, dtype="<f4").reshape(len(rows), -1) if rows else np.zeros((0, 0), np.float32)
    return [row[0] for row in rows], matrix


class CoarseIndex:
    """Sign codes of all vectors in memory, filled from the database when first asked. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids: Ids = np.zeros(0, dtype=np.int64)
        # [words, capacity]: a word of all codes lies together, so that one pass is one long vector operation.
        self._codes = np.zeros((0, 0), dtype=np.uint64)

    @property
    def bytes(self) -> int:
        """Memory held."""
        return self._codes.nbytes + self._ids.nbytes

    def clear(self) -> None:
        """Forget everything (the vectors were computed anew)."""
        with self._lock:
            self._ids = self._ids[:0]
            self._codes = self._codes[:, :0]

    def nearest(self, connection: Connection, vector: Vectors, *, limit: int, where: Filter | None = None) -> Ids:
        """The chunks of at least `limit` vectors (all, when there are fewer) with the smallest Hamming distance."""
        with self._lock:
            self._refresh(connection)
            ids, codes = self._ids, self._codes
        if where is not None:
            condition, values = library.chunk_condition(where, f"id / {VIEWS}")
            rows = connection.execute(f"SELECT id FROM codes WHERE 1 {condition}", values).fetchall()
            passing = np.isin(ids, _ids(rows), assume_unique=True)
            ids, codes = ids[passing], codes[:, passing]
        if len(ids) <= limit:
            return np.unique(ids // VIEWS)
        distances = hamming(codes, np.frombuffer(library.sign_code(vector), dtype=np.uint64))
        # Distances are small integers: counting them finds the cut-off without sorting.
        reached = np.cumsum(np.bincount(distances))
        return np.unique(ids[distances <= np.searchsorted(reached, limit)] // VIEWS)

    def _refresh(self, connection: Connection) -> None:
        last = int(self._ids[-1]) if len(self._ids) else 0
        rows: list[Any] = connection.execute("SELECT id, code FROM codes WHERE id > ? ORDER BY id", (last,)).fetchall()
        if rows:
            new = np.frombuffer(b"".join(row[1] for row in rows), dtype=np.uint64).reshape(len(rows), -1).T
            self._ids = np.concatenate([self._ids, _ids(rows)])
            self._codes = np.ascontiguousarray(np.concatenate([self._codes, new], axis=1) if self._codes.size else new)
        if len(self._ids) != library.counts(connection).vectors:
            living = np.isin(self._ids, _ids(connection.execute("SELECT id FROM codes").fetchall()), assume_unique=True)
            self._ids, self._codes = self._ids[living], np.ascontiguousarray(self._codes[:, living])


def _ids(rows: list[tuple[Any, ...]]) -> Ids:
    return np.array([row[0] for row in rows], dtype=np.int64)


def hamming(codes: npt.NDArray[np.uint64], query: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint16]:
    """Number of differing bits between `query` [words] and each column of `codes` [words, n]."""
    distances = np.zeros(codes.shape[1], dtype=np.uint16)
    for start in range(0, codes.shape[1], BLOCK):
        block = distances[start : start + BLOCK]
        for word, bits in zip(codes[:, start : start + BLOCK], query, strict=True):
            block += np.bitwise_count(word ^ bits)
    return distances
