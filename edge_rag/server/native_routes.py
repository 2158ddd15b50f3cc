"""Our own routes: search, questions, feedback, journal, and how the server is. Bodies mirror `EdgeRAG`'s arguments."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import asdict
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_rag.records import Event, Filter, Turn
from edge_rag.server import bounds
from edge_rag.server.bodies import Body, answered, body, query_number
from edge_rag.server.errors import JSON, RETRY_AFTER
from edge_rag.server.service import Service, service_of
from edge_rag.server.streaming import Make, collected, counted, event, streamed

MOST_ENTRIES = 100_000  # of the journal, at once


class Where(Body, frozen=True):
    """A `Filter`, with bounds."""

    documents: bounds.Names = ()
    folder: Annotated[str, Meta(max_length=4096)] = ""
    kinds: bounds.Names = ()

    def filter(self) -> Filter:
        """The record."""
        return Filter(documents=self.documents, folder=self.folder, kinds=self.kinds)


class OneTurn(Body, frozen=True):
    """A `Turn`, with bounds."""

    role: Literal["user", "assistant"]
    content: bounds.Content


class Search(Body, frozen=True):
    """What to look for."""

    query: bounds.Question
    top_k: bounds.TopK | None = None
    where: Where | None = None


class Sampled(Body, frozen=True, kw_only=True):
    """Base of requests that have the model write: how tokens are chosen."""

    max_tokens: bounds.MaxTokens | None = None
    temperature: bounds.Temperature | None = None
    top_p: bounds.TopP | None = None
    min_p: bounds.MinP | None = None
    seed: bounds.Seed | None = None
    stop: bounds.Stop | None = None


class Ask(Sampled, frozen=True, kw_only=True):
    """A question. What is left out is as the server's settings have it."""

    question: bounds.Question
    history: Annotated[tuple[OneTurn, ...], Meta(max_length=bounds.MOST_TURNS)] = ()
    where: Where | None = None
    top_k: bounds.TopK | None = None
    instructions: bounds.Content | None = None
    timeout: bounds.Seconds | None = None
    private: bool = False
    stream: bool = False

    def arguments(self) -> dict[str, Any]:
        """What `EdgeRAG.stream` takes."""
        values = {name: value for name, value in asdict(self).items() if name != "stream"}
        turns = tuple(Turn(role=turn.role, content=turn.content) for turn in self.history)
        return values | {"history": turns, "where": self.where and self.where.filter()}


class Feedback(Body, frozen=True):
    """How good an answer was, from 0 (bad) to 1 (good)."""

    answer_id: bounds.Name
    score: bounds.Score
    comment: bounds.Comment = ""


class Health(Struct, frozen=True):
    """Questions can be asked."""

    status: Literal["ok"] = "ok"


class Unready(Struct, frozen=True):
    """What is wrong, in llama-server's shape and, while loading, in its words."""

    code: Literal[503] = 503
    message: str = "Loading model"
    type: str = "unavailable_error"


class NotYet(Struct, frozen=True):
    """Questions cannot be asked: the models are still being loaded, or the engine has failed."""

    error: Unready = Unready()


async def search(request: Request) -> Response:
    """POST /search: the passages for a query, best first."""
    wanted = await body(request, Search)
    service = service_of(request)
    where = wanted.where.filter() if wanted.where else None
    return answered(await service.call(service.rag.search, wanted.query, top_k=wanted.top_k, where=where))


async def ask(request: Request) -> Response:
    """POST /ask: the answer, or with `stream` its events: sources, progress, delta, citation, answer."""
    wanted = await body(request, Ask)
    service = service_of(request)
    stream = service.answers.stream(counted(request, asking(service, wanted.arguments())))
    if wanted.stream:
        return await streamed(stream, _told, ping=service.settings.server.ping)
    return answered((await collected(request, stream))[-1])


def _told(each: Event) -> bytes:
    return event(str(each.__struct_config__.tag), each)


def asking(service: Service, arguments: dict[str, Any]) -> Make:
    """What answers a question; the caller's limit of time holds within the server's own."""
    most = service.settings.server.timeout
    limited = arguments | {"timeout": min(arguments["timeout"] or most, most)}
    return lambda: service.rag.stream(**limited)


async def feedback(request: Request) -> Response:
    """POST /feedback: say how good an answer was."""
    given = await body(request, Feedback)
    service = service_of(request)
    await service.call(service.rag.feedback, given.answer_id, given.score, given.comment)
    return Response(status_code=204)


async def journal(request: Request) -> Response:
    """GET /journal?limit=…: the last questions, newest first."""
    limit = query_number(request, "limit", default=20, most=MOST_ENTRIES)
    service = service_of(request)
    return answered(await service.call(service.rag.journal, limit))


async def status(request: Request) -> Response:
    """GET /status: what is stored, what is loaded, what the engine does."""
    service = service_of(request)
    return answered(await service.call(service.rag.status))


async def health(request: Request) -> Response:
    """GET /health: 200 when questions can be asked, 503 while the models are loaded and when the engine has failed."""
    service = service_of(request)
    engine = service.rag.engine
    if engine and engine.failure:
        return answered(NotYet(Unready(message="the engine has failed; the server's log has it")), 503)
    if service.ready:
        return answered(Health())
    return Response(msgspec.json.encode(NotYet()), 503, {"Retry-After": RETRY_AFTER}, media_type=JSON)


async def metrics(request: Request) -> Response:
    """GET /metrics: numbers in Prometheus' text format."""
    service = service_of(request)
    return Response(await service.call(service.metrics.text), media_type=CONTENT_TYPE_LATEST)


ROUTES = [
    Route("/search", search, methods=["POST"]),
    Route("/ask", ask, methods=["POST"]),
    Route("/feedback", feedback, methods=["POST"]),
    Route("/journal", journal, methods=["GET"]),
    Route("/status", status, methods=["GET"]),
    Route("/health", health, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
]
