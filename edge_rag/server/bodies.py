"""Reading requests: JSON into records whose fields have bounds; never more than `server.max_body_mb`, or for ever.

A body is in memory until it has come; so many large ones at once are turned away, or a hundred callers would fill it.
JSON has a closer limit than files: as objects it takes many times its length, and no good request needs more.
"""

import contextlib
import re
from collections.abc import AsyncGenerator, Iterator
from typing import Any, TypeVar

import anyio
import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_rag.errors import Busy, InputError
from edge_rag.server.errors import JSON, Refused
from edge_rag.server.service import Service, service_of, too_late

MEGABYTE = 1_000_000
JSON_MB = 8  # of JSON at most
AT_ONCE = 4  # times the largest body may be coming, in small pieces and large ones together
PATIENCE = 30.0  # seconds in which a JSON body must have come

T = TypeVar("T", bound=msgspec.Struct)


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of request bodies; an unknown field is an error."""


class HangUp:
    """ASGI middleware: whoever is answered before all that he says has come is not listened to any more."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve an HTTP request, and close its connection when its body has not been read."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope)
        coming = "transfer-encoding" in announced or announced.get("content-length", "0") != "0"

        async def hearing() -> Message:
            nonlocal coming
            message = await receive()
            coming = coming and message.get("more_body", False)
            return message

        async def saying(message: Message) -> None:
            if coming and message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        await self.app(scope, hearing, saying)


async def body(request: Request, kind: type[T]) -> T:
    """The request's JSON as a `kind`; an empty body counts as {}.

    Raises InputError naming the field, Refused (413 when it is too large, 408 when it does not come), and Busy.
    """
    with patience(service_of(request), PATIENCE):
        data = b"".join([chunk async for chunk in limited(request, JSON_MB)])
    return decoded(data or b"{}", kind)


async def limited(request: Request, most_mb: int | None = None) -> AsyncGenerator[bytes, None]:
    """The request's body as it comes.

    Raises Refused as soon as more has come, or is announced, than is allowed, and Busy when too much comes at once.
    """
    service = service_of(request)
    largest = service.settings.server.max_body_mb
    limit = min(largest, most_mb or largest) * MEGABYTE
    announced = request.headers.get("content-length", "0")
    if int(announced) > limit:  # uvicorn has checked that it is a number
        raise _too_large(limit)
    size = 0
    try:
        async with contextlib.aclosing(request.stream()) as stream:
            async for chunk in stream:
                size += len(chunk)
                service.coming += len(chunk)
                if size > limit:
                    raise _too_large(limit)
                if size > MEGABYTE and service.coming > AT_ONCE * largest * MEGABYTE:
                    raise Busy("too many large requests come at once", remedy="try again later")
                yield chunk
    finally:
        service.coming -= size


def decoded(data: bytes, kind: type[T]) -> T:
    """JSON as a `kind`. Raises InputError naming the field."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InputError(f"is not JSON that can be read: {error}", field="body") from error


def query_number(request: Request, name: str, *, default: int, most: int) -> int:
    """A whole number from the query string, from 1 to `most`. Raises InputError."""
    given = request.query_params.get(name)
    if given is None:
        return default
    if not (given.isascii() and given.isdigit() and len(given) <= 9 and 1 <= int(given) <= most):
        raise InputError(f"must be from 1 to {most}, not {given[:20]!r}", field=name)
    return int(given)


def answered(value: Any, status: int = 200) -> Response:
    """A record, or anything else that msgspec knows, as a JSON response."""
    return Response(msgspec.json.encode(value), status, media_type=JSON)


@contextlib.contextmanager
def patience(service: Service, seconds: float) -> Iterator[None]:
    """A body that takes longer is refused with 408; one that still comes when the server is stopped is Busy."""
    if service.stopping:
        raise too_late()
    with anyio.move_on_after(seconds) as scope:
        service.bodies.add(scope)
        try:
            yield
        finally:
            service.bodies.remove(scope)
    if scope.cancelled_caught:
        if service.stopping:
            raise too_late()
        raise Refused(408, "too_slow", f"the request had not come after {seconds:g} s", field="body")


def _too_large(limit: int) -> Refused:
    return Refused(
        413,
        "too_large",
        f"is larger than {limit // MEGABYTE} MB",
        field="body",
        remedy="send less, or add by path; files also have server.max_body_mb",
    )


def _invalid(message: str) -> InputError:
    """msgspec says where, or names the field in its words."""
    reason, _, place = message.partition(" - at `$")
    named = re.search(r"(?:unknown|missing required) field `([^`]*)`", reason)
    path = place.rstrip("`").lstrip(".")
    field = ".".join(part for part in (path, named[1] if named else "") if part)
    return InputError(reason, field=field or "body")
