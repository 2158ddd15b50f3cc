"""Errors on their way to a caller: one status and one JSON shape, OpenAI's, for all of them.

    {"error": {"message": …, "type": …, "param": field or null, "code": …, "remedy": … or null}}

`code` names the class of the error, so that a client can raise the same one again. What we did not foresee tells the
caller nothing of its inside; it is logged with its trace instead.
"""

import logging
import re
from collections.abc import Mapping

import msgspec
from msgspec import Struct
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route

from edge_rag.errors import Busy, Cancelled, EdgeRAGError, EngineError, MachineError, NotFound, UsageError

CLIENT_GONE = 499  # nginx's "client closed request"; it stands in the log only
RETRY_AFTER = "2"  # seconds
JSON = "application/json"

# The first class that an error belongs to decides.
STATUSES: tuple[tuple[type[EdgeRAGError], int], ...] = (
    (NotFound, 404),
    (UsageError, 400),
    (Busy, 503),
    (MachineError, 503),
    (Cancelled, CLIENT_GONE),
    (EngineError, 500),
)
TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    500: "server_error",
    503: "unavailable_error",
}
# Ours must not reveal more than that they are.
FAULT = EngineError("a fault of ours; the server's log has it", remedy="report it with the log's lines")

logger = logging.getLogger(__name__)


class Shown(Struct, frozen=True):
    """An error as callers see it; `param` is the field that it is about."""

    message: str
    type: str
    param: str | None
    code: str
    remedy: str | None


class ErrorBody(Struct, frozen=True):
    """What stands in a response, or in the last event of a failed stream."""

    error: Shown


class Refused(UsageError):
    """A request that HTTP has a status of its own for; `code` names it."""

    def __init__(self, status: int, code: str, message: str, *, remedy: str = "", field: str = "") -> None:
        super().__init__(message, remedy=remedy, field=field)
        self.status = status
        self.code = code


class Loading(Busy):
    """The models are still being loaded."""

    def __init__(self) -> None:
        super().__init__("Loading model", remedy="wait until GET /health says ok")


def status_of(error: Exception) -> int:
    """The HTTP status of any error."""
    if isinstance(error, Refused):
        return error.status
    return next((status for kind, status in STATUSES if isinstance(error, kind)), 500)


def code_of(error: EdgeRAGError) -> str:
    """The name of an error's class in lower case with underscores, as in `model_missing`; a refusal's own code."""
    if isinstance(error, Refused):
        return error.code
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).lower()


def error_body(error: Exception) -> bytes:
    """Any error as JSON in OpenAI's shape, for a response or for an event of a stream."""
    shown = error if isinstance(error, EdgeRAGError) else FAULT
    told = Shown(
        message=shown.message,
        type=TYPES.get(status_of(shown), "invalid_request_error"),
        param=shown.field or None,
        code=code_of(shown),
        remedy=shown.remedy or None,
    )
    return msgspec.json.encode(ErrorBody(told))


def error_response(error: Exception) -> Response:
    """Any error as a response."""
    headers = {"Retry-After": RETRY_AFTER} if isinstance(error, Busy) else {}
    if isinstance(error, Refused):  # what it has still to say is not read
        headers["Connection"] = "close"
    return Response(error_body(error), status_of(error), headers, media_type=JSON)


def log_fault(error: Exception) -> None:
    """Log what is ours to repair, with its trace; a caller's errors are no news."""
    if status_of(error) == 500:
        logger.error("a request failed: %s", error, exc_info=error)


async def handle(request: Request, error: Exception) -> Response:
    """Starlette's handler of errors that routes raise."""
    log_fault(error)
    return error_response(error)


async def handle_http(request: Request, error: Exception) -> Response:
    """Starlette's handler of its own errors: unknown paths and methods, bad forms."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message, remedy = f"there is no {request.scope['path']}", "see docs/server.md"
    else:
        message, remedy = error.detail, ""
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "input_error")
    refused = Refused(error.status_code, code, message, remedy=remedy)
    headers = {"Allow": ", ".join(_methods(request))} if error.status_code == 405 else error.headers
    return Response(error_body(refused), error.status_code, headers, media_type=JSON)


def _methods(request: Request) -> list[str]:
    """Those of all routes with this path; Starlette names those of the first one only."""
    routes: list[Route] = request.app.routes
    found = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in found for method in route.methods or ()})


async def handle_gone(request: Request, error: Exception) -> Response:
    """Starlette's handler of callers that went away: nobody reads this, but the log has its status."""
    return Response(status_code=CLIENT_GONE)


HANDLERS = {EdgeRAGError: handle, HTTPException: handle_http, ClientDisconnect: handle_gone}
