"""Streams of events to callers (SSE), and answers in one piece; both end as soon as the caller goes away.

Work that fails at once fails with a status of its own; once a stream has begun, a failure is an event in it.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any, Generic, TypeVar

import anyio
import msgspec
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edge_rag.errors import Cancelled
from edge_rag.records import Answer, Event
from edge_rag.server.errors import error_body, log_fault
from edge_rag.server.service import service_of
from edge_rag.server.workers import Put, Stream, Work

BEGIN_PATIENCE = 1.0  # seconds that the status waits for the first event

# sse-starlette would end all streams with the first SIGTERM; `serve` lets them finish.
AppStatus.enable_automatic_graceful_drain = False

T = TypeVar("T")

Make = Callable[[], Generator[Event, None, None]]


def counted(request: Request, make: Make) -> Work[Event]:
    """The work of answering; its end is counted, be it that the caller has not waited for it."""
    service = service_of(request)

    def work(put: Put[Event]) -> None:
        ended = False
        try:
            with contextlib.closing(make()) as events:
                for each in events:
                    if isinstance(each, Answer):
                        service.answered(request, each)
                        ended = True
                    put(each)
        except Cancelled:
            if not ended:
                service.metrics.cancelled()
            raise

    return work


def event(kind: str, data: Any) -> bytes:
    """An event of this kind with a record, or anything else that msgspec knows, as JSON."""
    return raw_event(kind, msgspec.json.encode(data))


def raw_event(kind: str, json: bytes) -> bytes:
    """An event of this kind; JSON by msgspec has no line ends in it."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), json)


def error_event(error: Exception) -> bytes:
    """The event that ends a failed stream."""
    return raw_event("error", error_body(error))


async def streamed(
    stream: Stream[T],
    encode: Callable[[T], bytes],
    *,
    ping: float,
    failed: Callable[[Exception], bytes] = error_event,
    end: Callable[[], bytes] = bytes,
) -> Response:
    """A stream as a response: `encode` gives the bytes of an item (none are fine), `end` what follows the last one.

    Raises what the work raises at once. The response closes the stream, whatever becomes of it.
    """
    try:
        await stream.begin(BEGIN_PATIENCE)
    except BaseException:
        await stream.aclose()
        raise
    return _Events(stream, _encoded(stream, encode, failed, end), ping=ping)


async def _encoded(
    stream: Stream[T], encode: Callable[[T], bytes], failed: Callable[[Exception], bytes], end: Callable[[], bytes]
) -> AsyncGenerator[bytes, None]:
    try:
        async for items in stream:
            yield b"".join(map(encode, items))
        yield end()
    except Exception as error:  # the status is out: the caller learns of it in the stream
        log_fault(error)
        yield failed(error)


class _Events(EventSourceResponse, Generic[T]):
    """The response. Pings come every `ping` seconds."""

    def __init__(self, stream: Stream[T], content: AsyncGenerator[bytes, None], *, ping: float) -> None:
        super().__init__(content, ping=ping, sep="\n")
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # it may never have come to the first event
            with anyio.CancelScope(shield=True):
                await self._stream.aclose()


async def collected(request: Request, stream: Stream[T]) -> list[T]:
    """All items of a stream, at its end. Raises what the work raises, and Cancelled when the caller goes away."""
    watching = asyncio.ensure_future(_left(request))
    watching.add_done_callback(lambda _: stream.stop(Cancelled("the caller went away")))
    try:
        return [item async for items in stream for item in items]
    finally:
        watching.cancel()
        await stream.aclose()


async def _left(request: Request) -> None:
    """Wait until the caller closes the connection; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
