"""POST /v1/completions: the language model as it is, without documents (`runtime.completing`)."""

import functools
import secrets
import time
from collections.abc import Iterator
from typing import Any

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_rag.records import Answer, Delta, Event, Progress
from edge_rag.server.bodies import body
from edge_rag.server.openai_requests import Complete, check_model, refuse_unsupported
from edge_rag.server.openai_shapes import ReadShape, TextChoice, TextReply, finish_reason, usage
from edge_rag.server.openai_streams import respond
from edge_rag.server.service import Service, service_of
from edge_rag.server.streaming import Make


async def complete(request: Request) -> Response:
    """Continue a text. Raises InputError, NotFound for another model, and Busy."""
    return await respond(request, *_reading(service_of(request), await body(request, Complete)))


def _reading(service: Service, wanted: Complete) -> tuple[Make, "TextForm", bool]:
    """What answers, in which form, and whether as a stream; the request itself is not needed any more."""
    refuse_unsupported(wanted)
    check_model(wanted.model, service.settings.models.llm)
    make = functools.partial(
        service.rag.complete,
        wanted.prompt if isinstance(wanted.prompt, str) else wanted.prompt[0],
        timeout=service.settings.server.timeout,
        **wanted.sampling,
    )
    return make, TextForm(service.settings.models.llm, wants_usage=wanted.wants_usage), bool(wanted.stream)


class TextForm:
    """A continuation as text completion."""

    def __init__(self, model: str, *, wants_usage: bool) -> None:
        self._id = f"cmpl-{secrets.token_hex(8)}"
        self._model = model
        self._created = int(time.time())
        self._no_usage: UnsetType | None = None if wants_usage else UNSET

    def chunks(self, event: Event) -> Iterator[TextReply]:
        """The chunks that tell an event."""
        if isinstance(event, Progress):
            yield self._chunk(TextChoice(text=""), progress=ReadShape(done=event.done, total=event.total))
        elif isinstance(event, Delta):
            yield self._chunk(TextChoice(text=event.text))
        elif isinstance(event, Answer):
            yield self._chunk(self._last("", event), reason=event.finish_reason)
            if self._no_usage is None:
                yield self._of((), usage=usage(event.usage))

    def reply(self, answer: Answer) -> TextReply:
        """The continuation in one piece."""
        choice = self._last(answer.text, answer)
        return self._of((choice,), usage=usage(answer.usage), reason=answer.finish_reason)

    def _last(self, text: str, answer: Answer) -> TextChoice:
        return TextChoice(text=text, finish_reason=finish_reason(answer.finish_reason))

    def _chunk(self, choice: TextChoice, **ours: Any) -> TextReply:
        return self._of((choice,), usage=self._no_usage, **ours)

    def _of(self, choices: tuple[TextChoice, ...], **fields: Any) -> TextReply:
        return TextReply(id=self._id, created=self._created, model=self._model, choices=choices, **fields)


ROUTES = [Route("/v1/completions", complete, methods=["POST"])]
