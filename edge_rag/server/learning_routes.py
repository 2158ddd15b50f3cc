"""Routes to what was learned from questions, and to learning now. Whoever is let in may look, the owner may change.

Learning takes hours: it is a stream with `progress` events and a `report` at its end; it ends when the caller leaves.
"""

import re
from typing import Annotated

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_rag.errors import NotFound
from edge_rag.records import Adapter, Record
from edge_rag.runtime.rag import EdgeRAG
from edge_rag.server import bounds
from edge_rag.server.access import owner_asks
from edge_rag.server.bodies import Body, answered, body
from edge_rag.server.document_routes import JobEvent, Nothing
from edge_rag.server.errors import Refused
from edge_rag.server.roots import below
from edge_rag.server.service import Service, service_of
from edge_rag.server.streaming import event, streamed
from edge_rag.server.workers import Put, Work

MOST_RULES = 16  # in a comparison; each takes a time in the number of all questions so far


class Change(Body, frozen=True):
    """What to change of an adapter; what is left out stays as it is."""

    pinned: bool | None = None
    enabled: bool | None = None


class Place(Body, frozen=True):
    """The absolute path of a file below `server.roots`."""

    path: bounds.Name


class Learn(Body, frozen=True):
    """Which clusters: those whose questions weigh at least `least` (null: as `learning.least_questions` has it).

    `until`: seconds since the epoch.
    """

    least: Annotated[float, Meta(ge=0)] | None = None
    until: Annotated[float, Meta(ge=0)] | None = None


class Replay(Body, frozen=True):
    """Residency rules to be compared, by their names in `router.residency`."""

    rules: Annotated[tuple[bounds.Name, ...], Meta(max_length=MOST_RULES)] = ("polar", "lru")


class Done(Record, frozen=True):
    """What was done, in words; '' when there was nothing to do."""

    done: str


async def clusters(request: Request) -> Response:
    """GET /clusters: passages that are asked for together, the most asked for first."""
    service = service_of(request)
    return answered(await service.call(service.rag.clusters))


async def cluster(request: Request) -> Response:
    """GET /clusters/{cluster}: one of them, with its passages and the questions about them. Raises NotFound."""
    service, named = service_of(request), request.path_params["cluster"]
    if not re.fullmatch("[0-9]{1,18}", named):
        raise NotFound("there is no cluster with this number", field=named[:100], remedy="see `edge-rag clusters`")
    return answered(await service.call(service.rag.cluster, int(named)))


async def adapters(request: Request) -> Response:
    """GET /adapters: what was learned of them, the oldest first."""
    service = service_of(request)
    return answered(await service.call(service.rag.adapters))


async def adapter(request: Request) -> Response:
    """GET /adapters/{adapter}: the one whose id begins so. Raises NotFound."""
    service = service_of(request)
    return answered(await service.call(service.rag.adapter, request.path_params["adapter"]))


async def change(request: Request) -> Response:
    """POST /adapters/{adapter}: pin it or not, use it or not; answers with what it is then. Raises NotFound."""
    service = _for_owner(request)
    wanted = await body(request, Change)
    return answered(await service.call(changed, service.rag, request.path_params["adapter"], wanted))


def changed(rag: EdgeRAG, adapter_id: str, wanted: Change) -> Adapter:
    """The adapter, with the changes that are wanted. Raises what the library raises."""
    found = rag.adapter(adapter_id)
    if wanted.enabled is not None:  # first: it may be refused
        found = rag.enable_adapter(found.id) if wanted.enabled else rag.disable_adapter(found.id)
    if wanted.pinned is not None:
        found = rag.pin_adapter(found.id, wanted.pinned)
    return found


async def delete(request: Request) -> Response:
    """DELETE /adapters/{adapter}: delete it and its file; answers with what it was. Raises NotFound."""
    service = _for_owner(request)
    return answered(await service.call(service.rag.delete_adapter, request.path_params["adapter"]))


async def export(request: Request) -> Response:
    """POST /adapters/{adapter}/export: write it into a new file that the server may write. Raises NotFound."""
    service = _for_owner(request)
    wanted = await body(request, Place)
    path = await service.call(below, wanted.path, service.settings.server.roots)
    return answered(await service.call(service.rag.export_adapter, request.path_params["adapter"], path))


async def import_(request: Request) -> Response:
    """POST /adapters: take one in from a file that was exported elsewhere."""
    service = _for_owner(request)
    wanted = await body(request, Place)
    path = await service.call(below, wanted.path, service.settings.server.roots)
    return answered(await service.call(service.rag.import_adapter, path))


async def router(request: Request) -> Response:
    """GET /router: how questions were routed, and which adapters are to stay in fast memory."""
    service = service_of(request)
    return answered(await service.call(service.rag.router))


async def replay(request: Request) -> Response:
    """POST /router/replay: whether other residency rules would have done better on the journal's questions."""
    service = service_of(request)
    wanted = await body(request, Replay)
    return answered(await service.call(service.rag.replay_router, wanted.rules))


async def learn(request: Request) -> Response:
    """POST /learn: learn now instead of while nobody asks; reports what became of each cluster."""
    service = _for_owner(request)
    wanted = await body(request, Learn)
    least = service.settings.learning.least_questions if wanted.least is None else wanted.least

    def work(put: Put[JobEvent]) -> None:
        lessons = service.rag.learn(least=least, until=wanted.until, progress=lambda now: put(("progress", now)))
        put(("report", lessons))

    return await _streamed(service, work)


async def idle(request: Request) -> Response:
    """POST /idle: do a piece of the work that is done while nobody asks; reports what it was."""
    service = _for_owner(request)
    await body(request, Nothing)

    def work(put: Put[JobEvent]) -> None:
        put(("report", Done(service.rag.idle_once())))

    return await _streamed(service, work)


def _for_owner(request: Request) -> Service:
    """The service, for the server's own user. Raises Refused for others."""
    if not owner_asks(request):
        raise Refused(
            403, "forbidden", "only the server's own user changes what is learned", remedy="ask as that user, by socket"
        )
    return service_of(request)


async def _streamed(service: Service, work: Work[JobEvent]) -> Response:
    return await streamed(service.jobs.stream(work), lambda told: event(*told), ping=service.settings.server.ping)


ROUTES = [
    Route("/clusters", clusters, methods=["GET"]),
    Route("/clusters/{cluster}", cluster, methods=["GET"]),
    Route("/adapters", adapters, methods=["GET"]),
    Route("/adapters", import_, methods=["POST"]),
    Route("/adapters/{adapter}", adapter, methods=["GET"]),
    Route("/adapters/{adapter}", change, methods=["POST"]),
    Route("/adapters/{adapter}", delete, methods=["DELETE"]),
    Route("/adapters/{adapter}/export", export, methods=["POST"]),
    Route("/router", router, methods=["GET"]),
    Route("/router/replay", replay, methods=["POST"]),
    Route("/learn", learn, methods=["POST"]),
    Route("/idle", idle, methods=["POST"]),
]
