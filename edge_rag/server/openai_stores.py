"""/v1/vector_stores: the documents as one vector store with the name 'library'. Searching is `EdgeRAG.search`."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from msgspec import UNSET, Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_rag.errors import NotFound
from edge_rag.records import Passage
from edge_rag.server import bounds
from edge_rag.server.bodies import Body, answered, body
from edge_rag.server.native_routes import Where
from edge_rag.server.openai_requests import Unread, refuse_unsupported
from edge_rag.server.openai_shapes import Shape, file_id
from edge_rag.server.service import Service, service_of

STORE = "library"
HITS, MOST_HITS = 10, 50
MOST_QUERIES = 16


class FileCounts(Shape, frozen=True, kw_only=True):
    """How many files the store has; none is ever half-way in."""

    in_progress: int = 0
    completed: int
    failed: int = 0
    cancelled: int = 0
    total: int


class StoreShape(Shape, frozen=True, kw_only=True):
    """The library as a vector store; `usage_bytes` are those of its documents."""

    id: str = STORE
    object: str = "vector_store"
    created_at: int
    name: str = STORE
    usage_bytes: int
    file_counts: FileCounts
    status: str = "completed"
    last_active_at: int


class StorePage(Shape, frozen=True, kw_only=True):
    """The list of the one store."""

    object: str = "list"
    data: tuple[StoreShape, ...]
    first_id: str = STORE
    last_id: str = STORE
    has_more: bool = False


class Content(Shape, frozen=True, kw_only=True):
    """Text of a passage."""

    type: str = "text"
    text: str


class Hit(Shape, frozen=True, kw_only=True):
    """A passage that was found."""

    file_id: str
    filename: str
    score: float
    attributes: dict[str, str | float]
    content: tuple[Content, ...]


class Hits(Shape, frozen=True, kw_only=True):
    """What was found, best first; there is only ever this page."""

    object: str = "vector_store.search_results.page"
    search_query: tuple[str, ...]
    data: tuple[Hit, ...]
    has_more: bool = False
    next_page: None = None


class Ranking(Body, frozen=True):
    """`score_threshold`: passages with a lower score are left out. Which ranker is named does not matter."""

    ranker: Unread = UNSET
    score_threshold: bounds.Score = 0.0
    hybrid_search: Unread = UNSET


class StoreSearch(Body, frozen=True, kw_only=True):
    """Passages are wanted, for one query or what is best for any of several; `where` is ours."""

    query: bounds.Question | Annotated[tuple[bounds.Question, ...], Meta(min_length=1, max_length=MOST_QUERIES)]
    max_num_results: Annotated[int, Meta(ge=1, le=MOST_HITS)] = HITS
    where: Where | None = None
    ranking_options: Ranking | None = None
    filters: Unread = UNSET
    rewrite_query: Unread = UNSET


async def stores(request: Request) -> Response:
    """GET /v1/vector_stores: the one there is."""
    return answered(StorePage(data=(await _store(service_of(request)),)))


async def store(request: Request) -> Response:
    """GET /v1/vector_stores/{id}: how large it is. Raises NotFound."""
    _check_store(request)
    return answered(await _store(service_of(request)))


async def search(request: Request) -> Response:
    """POST /v1/vector_stores/{id}/search: passages, without the language model. Raises InputError and NotFound."""
    _check_store(request)
    service = service_of(request)
    return answered(await service.call(_searching(service, await body(request, StoreSearch))))


def _searching(service: Service, wanted: StoreSearch) -> Callable[[], Hits]:
    """What searches; the request itself is not needed any more. Raises InputError."""
    ranking = wanted.ranking_options or Ranking()
    refuse_unsupported(wanted)
    refuse_unsupported(ranking, "ranking_options.")
    queries = (wanted.query,) if isinstance(wanted.query, str) else wanted.query
    most, least = wanted.max_num_results, ranking.score_threshold
    search = functools.partial(service.rag.search, top_k=most, where=wanted.where.filter() if wanted.where else None)

    def hits() -> Hits:
        near: dict[int, Passage] = {}
        for passage in sorted((each for query in queries for each in search(query)), key=_score, reverse=True):
            if passage.score >= least:
                near.setdefault(passage.chunk_id, passage)
        return Hits(search_query=queries, data=tuple(map(_hit, list(near.values())[:most])))

    return hits


def _score(passage: Passage) -> float:
    return passage.score


def _check_store(request: Request) -> None:
    name = request.path_params["store"]
    if name != STORE:
        raise NotFound(f"there is no store {name[:100]!r}", field="vector_store_id", remedy=f"there is {STORE!r}")


async def _store(service: Service) -> StoreShape:
    documents = await service.call(service.rag.documents)
    times = [int(document.added_at) for document in documents] or [0]
    return StoreShape(
        created_at=min(times),
        usage_bytes=sum(document.bytes for document in documents),
        file_counts=FileCounts(completed=len(documents), total=len(documents)),
        last_active_at=max(times),
    )


def _hit(passage: Passage) -> Hit:
    page: dict[str, str | float] = {} if passage.page is None else {"page": passage.page}
    return Hit(
        file_id=file_id(passage.document_id),
        filename=Path(passage.path).name,
        score=passage.score,
        attributes={"path": passage.path, "title": passage.title, "heading": passage.heading, **page},
        content=(Content(text=passage.text),),
    )


ROUTES = [
    Route("/v1/vector_stores", stores, methods=["GET"]),
    Route("/v1/vector_stores/{store}", store, methods=["GET"]),
    Route("/v1/vector_stores/{store}/search", search, methods=["POST"]),
]
