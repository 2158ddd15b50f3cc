"""A large synthetic library in the product's own schema, grown step by step, and the same vectors in a vec0 table."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import apsw
import numpy as np
from msgspec import Struct
from rich.progress import track

from edge_rag.store import library
from edge_rag.store.database import Connection, Database, load_vector_extension
from edge_rag.store.library import Vectors
from tools.bench import libraries

BATCH = 20_000
CHUNKS_A_DOCUMENT = 100
LOWEST_COSINE, HIGHEST_COSINE = 0.6, 0.95
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


class Seeds(Struct, frozen=True):
    """Real vectors of shape [n, dimensions] and real sentences."""

    vectors: Vectors
    sentences: list[str]


def seeds_of(folders: list[Path]) -> Seeds:
    """The vectors and sentences of filled libraries."""
    data: list[bytes] = []
    texts: list[str] = []
    for folder in folders:
        with libraries.opened(folder) as database, database.read() as connection:
            rows: list[Any] = connection.execute(
                "SELECT embedding, text FROM vectors v JOIN chunks c ON c.id = v.id / 2 ORDER BY v.id"
            ).fetchall()
        data += [row[0] for row in rows]
        texts += [row[1] for row in rows]
    sentences = [part.strip() for text in texts for part in _SENTENCE.split(text) if 20 <= len(part.strip()) <= 200]
    return Seeds(np.frombuffer(b"".join(data), dtype="<f4").reshape(len(data), -1), sentences)


def spread_around(seeds: Vectors, count: int, rng: np.random.Generator) -> Vectors:
    """`count` unit vectors, each at a random cosine (uniform between the bounds) to a random one of `seeds`."""
    centres = seeds[rng.integers(len(seeds), size=count)]
    noise = rng.standard_normal(centres.shape, dtype=np.float32)
    noise -= (noise * centres).sum(axis=1, keepdims=True) * centres
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    cosines = rng.uniform(LOWEST_COSINE, HIGHEST_COSINE, size=(count, 1)).astype(np.float32)
    return np.asarray(cosines * centres + np.sqrt(1 - cosines**2) * noise, dtype=np.float32)


def sign_codes(vectors: Vectors) -> list[bytes]:
    """`library.sign_code` of all rows at once."""
    bits = np.packbits(vectors > 0, axis=1)
    padded = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8)))
    return [row.tobytes() for row in padded]


class Builder:
    """Appends synthetic chunks to `database` and their vectors to a vec0 table in `vec0_file`."""

    def __init__(self, database: Database, vec0_file: Path, seeds: Seeds) -> None:
        self.database = database
        self.size = 0
        self._seeds = seeds
        self._rng = np.random.default_rng(0)
        self._file = vec0_file
        self._vec0 = apsw.Connection(str(vec0_file))
        load_vector_extension(self._vec0)
        for pragma in ("journal_mode = off", "synchronous = off", "mmap_size = 1073741824"):
            self._vec0.execute(f"PRAGMA {pragma}")
        self._vec0.execute(f"CREATE VIRTUAL TABLE nearest USING vec0 (embedding float[{seeds.vectors.shape[1]}])")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._vec0.close()

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.stat().st_size for file in self._file.parent.iterdir())

    def grow(self, size: int) -> float:
        """Append chunks until there are `size`. Returns the seconds."""
        started = time.perf_counter()
        starts = range(self.size, size, BATCH)
        for start in track(starts, description=f"building {size:,}", transient=True):
            count = min(BATCH, size - start)
            vectors = spread_around(self._seeds.vectors, count, self._rng)
            with self.database.write() as connection:
                self._append(connection, start, vectors)
            self._append_vec0(start, vectors)
        self.size = size
        return time.perf_counter() - started

    def vec0_search(self, vector: Vectors, limit: int) -> list[int]:
        """Ids of the nearest by sqlite-vec's own table."""
        rows = self._vec0.execute(
            "SELECT rowid FROM nearest WHERE embedding MATCH ? AND k = ?", (vector.tobytes(), limit)
        )
        return [row[0] for row in rows]

    def _append(self, connection: Connection, start: int, vectors: Vectors) -> None:
        count = len(vectors)
        documents = range(start // CHUNKS_A_DOCUMENT, -(-(start + count) // CHUNKS_A_DOCUMENT))
        connection.executemany(
            "INSERT INTO documents VALUES (?, ?, ?, 'md', 1, '', 'bench', ?, ?, ?, 0.0)",
            (
                (number + 1, f"/synthetic/{number}.md", f"document {number}", *[CHUNKS_A_DOCUMENT] * 3)
                for number in documents
            ),
        )
        connection.executemany(
            """INSERT INTO chunks (id, document_id, ordinal, heading, page, start, "end", tokens, text)
               VALUES (?, ?, ?, ?, NULL, 0, 1, 1, ?)""",
            self._chunks(start, count),
        )
        # Short chunks have one view each, so every vector is view 0 of its chunk.
        ids = range(library.VIEWS * (start + 1), library.VIEWS * (start + count + 1), library.VIEWS)
        blobs = (row.tobytes() for row in vectors)
        connection.executemany("INSERT INTO vectors VALUES (?, ?)", zip(ids, blobs, strict=True))
        connection.executemany("INSERT INTO codes VALUES (?, ?)", zip(ids, sign_codes(vectors), strict=True))

    def _chunks(self, start: int, count: int) -> Iterator[tuple[int, int, int, str, str]]:
        picks = self._rng.integers(len(self._seeds.sentences), size=count).tolist()
        for place, pick in zip(range(start, start + count), picks, strict=True):
            document, ordinal = divmod(place, CHUNKS_A_DOCUMENT)
            yield place + 1, document + 1, ordinal, f"document {document}", self._seeds.sentences[pick]

    def _append_vec0(self, start: int, vectors: Vectors) -> None:
        self._vec0.execute("BEGIN")
        self._vec0.executemany(
            "INSERT INTO nearest (rowid, embedding) VALUES (?, ?)",
            ((start + place + 1, row.tobytes()) for place, row in enumerate(vectors)),
        )
        self._vec0.execute("COMMIT")
