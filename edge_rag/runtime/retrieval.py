"""Question → passages: dense and word search, fused, in document order where ranks are close."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from msgspec.structs import replace

from edge_rag.config import Retrieval
from edge_rag.native.embedder import Embedder
from edge_rag.policy.fusion import in_document_order, reciprocal_rank_fusion
from edge_rag.policy.words import content_words, fts_query, stem
from edge_rag.records import Filter, Passage
from edge_rag.store import library, vectors
from edge_rag.store.database import Connection, Database

Vectors = npt.NDArray[np.float32]


class Found(Struct, frozen=True):
    """Passages with the embeddings of their views: one array of shape [views, dimensions] each, in the same order.

    `asked` is the embedding of the query, shape [dimensions].
    """

    passages: tuple[Passage, ...]
    vectors: tuple[Vectors, ...]
    asked: Vectors

    def first(self, count: int) -> "Found":
        """The first `count` passages."""
        return replace(self, passages=self.passages[:count], vectors=self.vectors[:count])

    def similarities(self, vector: Vectors) -> list[float]:
        """The cosine of `vector` to the nearest view of each passage."""
        return [float((views @ vector).max()) for views in self.vectors]


class Retriever:
    """Searches one library. Thread-safe."""

    def __init__(self, database: Database, embedder: Embedder, settings: Retrieval) -> None:
        self._database = database
        self._embedder = embedder
        self._settings = settings
        self.index = vectors.CoarseIndex()

    def search(
        self,
        query: str,
        *,
        top_k: int | None = None,
        where: Filter | None = None,
        document_order: bool = False,
        embedded: Callable[[Vectors], None] = lambda vector: None,
    ) -> Found:
        """The `top_k` passages for `query` (settings' number by default) among those that pass `where`.

        Best first; with `document_order`, passages of one document whose scores are close follow the document: they
        read better in a prompt. `embedded` is told of the query's embedding [dimensions] before anything is searched.
        """
        settings = self._settings
        vector = self._embedder.embed([query])[0]
        embedded(vector)
        with self._database.read() as connection:
            dense = self.search_dense(connection, vector, where)
            words = library.search_words(connection, fts_query(query), limit=settings.candidates, where=where)
            fused = reciprocal_rank_fusion(
                [(settings.embedding_weight, dense), (settings.text_weight, words)], k=settings.rrf_k
            )[: top_k or settings.top_k]
            found = self._found(connection, query, vector, fused)
        return self._in_document_order(found) if document_order else found

    def search_dense(self, connection: Connection, vector: Vectors, where: Filter | None = None) -> list[int]:
        """Chunk ids by cosine to `vector`, nearest first."""
        settings = self._settings
        hits = vectors.search(
            connection,
            self.index,
            vector,
            limit=settings.candidates,
            exact_limit=settings.exact_limit,
            rescore=settings.rescore,
            where=where,
        )
        return [chunk_id for chunk_id, _ in hits]

    def _found(self, connection: Connection, query: str, vector: Vectors, fused: list[tuple[int, float]]) -> Found:
        texts = library.passages(connection, [chunk_id for chunk_id, _ in fused])
        ids, matrix = vectors.read_vectors(connection, list(texts))
        places = np.array(ids, dtype=np.int64)
        views = {chunk_id: matrix[places == chunk_id] for chunk_id in texts}
        asked = {stem(word) for word in content_words(query)}
        passages = [
            replace(
                texts[chunk_id],
                score=score,
                similarity=float((views[chunk_id] @ vector).max()),
                matched_words=_matched(asked, texts[chunk_id]),
            )
            for chunk_id, score in fused
            if chunk_id in texts
        ]
        return Found(tuple(passages), tuple(views[passage.chunk_id] for passage in passages), vector)

    def _in_document_order(self, found: Found) -> Found:
        ordered = in_document_order(found.passages, margin=self._settings.order_margin)
        views = dict(zip((passage.chunk_id for passage in found.passages), found.vectors, strict=True))
        return replace(found, passages=tuple(ordered), vectors=tuple(views[each.chunk_id] for each in ordered))


def _matched(asked: set[str], passage: Passage) -> int:
    return len(asked & {stem(word) for word in content_words(f"{passage.heading} {passage.text}")})
