"""One line a request: JSON on stderr, or for people when that is a terminal. Texts of questions and documents never.

Whatever the libraries say through `logging` goes out in the same form.
"""

import asyncio
import logging
import secrets
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, TextIO

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_rag.records import Answer
from edge_rag.server.errors import CLIENT_GONE, error_response, log_fault
from edge_rag.server.metrics import Metrics
from edge_rag.server.service import Told, too_late

QUIET = ("/health", "/metrics")  # asked every few seconds; told of at debug level
UNKNOWN = "none"  # the route of a request that came to none

logger = structlog.stdlib.get_logger("edge_rag.requests")


def configure(stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Send all logging to `stream` (default: stderr), by structlog."""
    stream = stream or sys.stderr
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_rendering(stream.isatty())],
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def _rendering(terminal: bool) -> list[structlog.typing.Processor]:
    if terminal:
        return [structlog.dev.ConsoleRenderer()]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]


class RequestLog:
    """ASGI middleware, around all that answers: gives each request an id, counts it and logs it when it has ended.

    What nothing else has caught becomes a 500 here.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, routes: Mapping[Any, str]) -> None:
        self.app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve an HTTP request, and tell of it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        told = Told(secrets.token_hex(6))
        scope.setdefault("state", {})["told"] = told
        started = time.perf_counter()
        status = CLIENT_GONE  # until there is another one

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = told.id
            await send(message)

        try:
            await self._guarded(scope, receive, noting)
        finally:
            self._tell(scope, told, status, time.perf_counter() - started)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except asyncio.CancelledError:  # the server cannot wait any longer; the request ends here
            if not begun:
                await error_response(too_late())(scope, receive, send)
        except Exception as error:
            log_fault(error)
            if not begun:
                await error_response(error)(scope, receive, send)

    def _tell(self, scope: Scope, told: Told, status: int, seconds: float) -> None:
        route = self._routes.get(scope.get("endpoint"), UNKNOWN)
        self._metrics.requested(route, status)
        say = logger.debug if route in QUIET else logger.info
        about = of_answer(told.answer) if told.answer else {}
        say(
            "request",
            id=told.id,
            method=scope["method"],
            route=route,
            status=status,
            seconds=round(seconds, 4),
            **about,
        )


def of_answer(answer: Answer) -> dict[str, Any]:
    """What may be told of an answer: its id, timings, tokens, and how its passages came into the prompt."""
    hows = Counter(plan.how for plan in answer.plan.passages)
    live = sum(plan.source == "live" for plan in answer.plan.passages)
    timings, usage = answer.timings, answer.usage
    return {
        "answer": answer.id,
        "finish": answer.finish_reason,
        "ttft": round(timings.first_token, 4),
        "queued": round(timings.queued, 4),
        "plan": {how: hows[how] for how in ("exact", "splice", "recompute", "remembered")} | {"live": live},
        "adapter": answer.plan.adapter[:12],
        "tokens": {"prompt": usage.prompt_tokens, "cached": usage.cached_tokens, "completion": usage.completion_tokens},
    }
