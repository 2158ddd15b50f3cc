"""What all routes share: the library, the threads that ask it, what is counted, and what is told of each request."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import anyio
from msgspec import Struct
from starlette.requests import Request

from edge_rag.closing import Closing
from edge_rag.errors import Busy
from edge_rag.records import Answer
from edge_rag.runtime.rag import EdgeRAG
from edge_rag.server.metrics import Metrics
from edge_rag.server.uploads import Uploads
from edge_rag.server.workers import Workers

CALLS, CALLS_WAITING = 8, 256  # searches, lists, status: short ones
JOBS = 4  # adding, warming, embedding anew: long ones

T = TypeVar("T")
P = ParamSpec("P")


class Told(Struct):
    """What a request's log line will tell, besides what HTTP knows."""

    id: str
    answer: Answer | None = None


def too_late() -> Busy:
    """The error of whoever is cut off, or comes when the server is about to end."""
    return Busy("the server is stopping", remedy="ask again in a moment")


class Service(Closing):
    """One library being served. `answers`, `calls` and `jobs` are the threads for each kind of work.

    `ready` is false until the models are loaded. `coming` are the bytes of requests' bodies that are being received,
    `bodies` what stops to receive them.
    """

    def __init__(self, rag: EdgeRAG) -> None:
        self.rag = rag
        self.settings = rag.settings
        self.ready = False
        self.stopping = False
        self.coming = 0
        self.bodies: set[anyio.CancelScope] = set()
        self.metrics = Metrics(rag.status)
        engine = rag.settings.engine
        # As many as the engine takes: each has a thread that waits for it, and one more is told to come again.
        self.answers = Workers("answer", threads=engine.slots + engine.queue)
        self.calls = Workers("call", threads=CALLS, waiting=CALLS_WAITING)
        self.jobs = Workers("job", threads=JOBS)
        self.uploads = Uploads(rag)

    def close(self) -> None:
        """Wait for all threads; the library must be closed before, so that they end. Idempotent."""
        for workers in (self.answers, self.calls, self.jobs):
            workers.close()

    async def call(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a short blocking call. Raises Busy, and what the call raises."""
        return await self.calls.call(work, *args, **kwargs)

    def answered(self, request: Request, answer: Answer) -> None:
        """Count a finished answer, and have the request's log line tell of it."""
        told_of(request).answer = answer
        self.metrics.answered(answer)

    def stop(self) -> int:
        """Begin nothing more, and cut off streams and bodies that come; how many there were.

        Short calls end by themselves.
        """
        self.stopping = True
        for scope in self.bodies:
            scope.cancel()
        return len(self.bodies) + sum(workers.stop(too_late) for workers in (self.answers, self.calls, self.jobs))


def service_of(request: Request) -> Service:
    """The service of the app that a request came to."""
    service: Service = request.app.state.service
    return service


def told_of(request: Request) -> Told:
    """What will be logged about a request."""
    told: Told = request.scope["state"]["told"]
    return told
