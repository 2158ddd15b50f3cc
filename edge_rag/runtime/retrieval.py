"""Question → passages: dense and word search, fused, in document order where ranks are close."""

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
    """Passages, best first, with their embeddings (same order, shape [n, dimensions])."""

    passages: tuple[Passage, ...]
    vectors: Vectors


class Retriever:
    """Searches one library. Thread-safe."""

    def __init__(self, database: Database, embedder: Embedder, settings: Retrieval) -> None:
        self._database = database
        self._embedder = embedder
        self._settings = settings
        self.index = vectors.CoarseIndex()

    def search(self, query: str, *, top_k: int | None = None, where: Filter | None = None) -> Found:
        """The `top_k` passages for `query` (settings' number by default) among those that pass `where`."""
        settings = self._settings
        vector = self._embedder.embed([query])[0]
        with self._database.read() as connection:
            dense = self.search_dense(connection, vector, where)
            words = library.search_words(connection, fts_query(query), limit=settings.candidates, where=where)
            fused = reciprocal_rank_fusion(
                [(settings.embedding_weight, dense), (settings.text_weight, words)], k=settings.rrf_k
            )[: top_k or settings.top_k]
            return self._found(connection, query, vector, fused)

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
        rows = dict(zip(ids, matrix, strict=True))
        asked = {stem(word) for word in content_words(query)}
        passages = [
            replace(
                texts[chunk_id],
                score=score,
                similarity=float(rows[chunk_id] @ vector),
                matched_words=_matched(asked, texts[chunk_id]),
            )
            for chunk_id, score in fused
            if chunk_id in texts
        ]
        ordered = in_document_order(passages, margin=self._settings.order_margin)
        empty = np.zeros((0, len(vector)), dtype=np.float32)
        return Found(tuple(ordered), np.stack([rows[p.chunk_id] for p in ordered]) if ordered else empty)


def _matched(asked: set[str], passage: Passage) -> int:
    return len(asked & {stem(word) for word in content_words(f"{passage.heading} {passage.text}")})
