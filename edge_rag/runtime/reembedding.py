"""All vectors computed anew with another embedding model: hours for a large library, so nobody must wait for it.

New vectors are collected beside the old ones, batch by batch, each in a transaction of its own; the last transaction
puts them in the old ones' place, with those of chunks that came meanwhile. Until then searches use the old ones.
"""

from collections.abc import Callable, Sequence

from edge_rag.native.embedder import Embedder
from edge_rag.policy.views import embedded_views
from edge_rag.runtime.ingest import BATCH_CHUNKS, embed_chunks
from edge_rag.store import library
from edge_rag.store.database import Connection, Database

Row = tuple[int, str, str, str, int]


def reembed(
    database: Database,
    embedder: Embedder,
    finish: Callable[[Connection], None],
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Compute every chunk's vectors anew; `finish` is called in the transaction that puts them in place.

    The library never holds vectors of two models. Returns the number of chunks.
    """
    with database.write() as connection:
        library.drop_new_vectors(connection)  # of a run that was interrupted
        total = library.counts(connection).chunks
    done, last = 0, 0
    while rows := _next(database, last):
        embedded = _embedded(embedder, rows)
        with database.write() as connection:
            library.collect_vectors(connection, embedded)
        last, done = rows[-1][0], done + len(rows)
        if progress:
            progress(done, max(done, total))
    with database.write() as connection:
        while rows := library.chunk_texts(connection, after=last, limit=BATCH_CHUNKS):
            library.collect_vectors(connection, _embedded(embedder, rows))
            last, done = rows[-1][0], done + len(rows)
        library.place_new_vectors(connection)
        finish(connection)
    return done


def _next(database: Database, last: int) -> Sequence[Row]:
    with database.read() as connection:
        return library.chunk_texts(connection, after=last, limit=BATCH_CHUNKS)


def _embedded(embedder: Embedder, rows: Sequence[Row]) -> dict[int, library.Vectors]:
    views = embed_chunks(embedder, [embedded_views(*row[1:]) for row in rows])
    return {row[0]: vectors for row, vectors in zip(rows, views, strict=True)}
