"""How a model's words reach OpenAI's clients: chunks and [DONE], or one reply; for chats and completions alike."""

from collections.abc import Generator, Iterable, Mapping
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from edge_rag.errors import InputError
from edge_rag.records import Answer, Event
from edge_rag.server.bodies import answered
from edge_rag.server.errors import error_body
from edge_rag.server.openai_shapes import Shape
from edge_rag.server.service import service_of
from edge_rag.server.streaming import Make, collected, counted, streamed


class Form(Protocol):
    """The shape of one request's answer."""

    def chunks(self, event: Event) -> Iterable[Shape]:
        """The chunks of a stream that tell this event."""

    def reply(self, answer: Answer) -> Shape:
        """The answer in one piece."""


async def respond(request: Request, make: Make, form: Form, streaming: bool) -> Response:
    """Have `make` answer, and send it as a stream or in one piece. Raises Busy, and what `make` raises at once."""
    service = service_of(request)
    stream = service.answers.stream(counted(request, make))

    def encode(event: Event) -> bytes:
        return b"".join(map(_chunk_event, form.chunks(event)))

    if streaming:
        return await streamed(stream, encode, ping=service.settings.server.ping, failed=_error_event, end=_done)
    answer = (await collected(request, stream))[-1]
    assert isinstance(answer, Answer)
    return answered(form.reply(answer))


def renamed(make: Make, names: Mapping[str, str]) -> Generator[Event, None, None]:
    """The events of `make`; an InputError names a field as the caller did, `names` has ours and theirs."""
    try:
        yield from make()
    except InputError as error:
        field = names.get(error.field, error.field)
        raise InputError(error.message, remedy=error.remedy, field=field) from error


def _chunk_event(chunk: Shape) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(chunk)


def _error_event(error: Exception) -> bytes:
    """Clients look for `error` in the data and know no kinds of events."""
    return b"data: %b\n\n" % error_body(error)


def _done() -> bytes:
    return b"data: [DONE]\n\n"
