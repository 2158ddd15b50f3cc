"""POST /v1/chat/completions: a question over the documents, asked as a chat.

A stream's first chunk has the `sources`, before any token; chunks with `progress` come while the prompt is read; the
chunk with the `finish_reason` has the `citations`; with `stream_options.include_usage` one with the usage is the last.
All but that one have a choice with text in it, if only '': many clients look for nothing else.
"""

import functools
import time
from collections.abc import Generator, Iterator
from typing import Any

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_rag.records import Answer, Delta, Event, Progress, Sources
from edge_rag.server.bodies import body
from edge_rag.server.openai_requests import Chat, check_model, conversation, refuse_unsupported
from edge_rag.server.openai_shapes import (
    ChatChunk,
    ChatDelta,
    ChatReply,
    Choice,
    ChunkChoice,
    ReadShape,
    Said,
    citations,
    finish_reason,
    sources,
    usage,
)
from edge_rag.server.openai_streams import renamed, respond
from edge_rag.server.service import Service, service_of
from edge_rag.server.streaming import Make

ID_PREFIX = "chatcmpl-"  # before the answer's id


async def chat(request: Request) -> Response:
    """Answer the last message of a conversation. Raises InputError, NotFound for another model, and Busy."""
    return await respond(request, *_reading(service_of(request), await body(request, Chat)))


def _reading(service: Service, wanted: Chat) -> tuple[Make, "ChatForm", bool]:
    """What answers, in which form, and whether as a stream; the request itself is not needed any more."""
    refuse_unsupported(wanted)
    check_model(wanted.model, service.settings.models.llm)
    ask = _asking(service, wanted)
    limit = "max_tokens" if wanted.max_completion_tokens is None else "max_completion_tokens"
    names = {"question": "messages", "history": "messages", "instructions": "messages", "max_tokens": limit}
    form = ChatForm(service.settings.models.llm, wants_usage=wanted.wants_usage)
    return lambda: renamed(ask, names), form, bool(wanted.stream)


def _asking(service: Service, wanted: Chat) -> "functools.partial[Generator[Event, None, None]]":
    """What asks the library. Raises InputError for messages that are no conversation."""
    asked = conversation(wanted.messages)
    return functools.partial(
        service.rag.stream,
        asked.question,
        history=asked.history,
        instructions=asked.instructions,
        where=wanted.where.filter() if wanted.where else None,
        top_k=wanted.top_k,
        timeout=service.settings.server.timeout,
        **wanted.sampling,
    )


class ChatForm:
    """An answer as chat completion."""

    def __init__(self, model: str, *, wants_usage: bool) -> None:
        self._id = ""
        self._model = model
        self._created = int(time.time())
        self._no_usage: UnsetType | None = None if wants_usage else UNSET

    def chunks(self, event: Event) -> Iterator[ChatChunk]:
        """The chunks that tell an event; `Cited` has none, its mark follows as text."""
        if isinstance(event, Sources):
            self._id = ID_PREFIX + event.id
            yield self._chunk(ChatDelta(role="assistant"), sources=sources(event.passages))
        elif isinstance(event, Progress):
            yield self._chunk(ChatDelta(), progress=ReadShape(done=event.done, total=event.total))
        elif isinstance(event, Delta):
            yield self._chunk(ChatDelta(content=event.text))
        elif isinstance(event, Answer):
            yield from self._end(event)

    def _chunk(self, delta: ChatDelta, **ours: Any) -> ChatChunk:
        return self._of((ChunkChoice(delta=delta),), usage=self._no_usage, **ours)

    def _end(self, answer: Answer) -> Iterator[ChatChunk]:
        choice = ChunkChoice(delta=ChatDelta(), finish_reason=finish_reason(answer.finish_reason))
        yield self._of((choice,), usage=self._no_usage, citations=citations(answer), reason=answer.finish_reason)
        if self._no_usage is None:
            yield self._of((), usage=usage(answer.usage))

    def _of(self, choices: tuple[ChunkChoice, ...], **fields: Any) -> ChatChunk:
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=choices, **fields)

    def reply(self, answer: Answer) -> ChatReply:
        """The answer in one piece."""
        said = Choice(message=Said(content=answer.text), finish_reason=finish_reason(answer.finish_reason))
        return ChatReply(
            id=ID_PREFIX + answer.id,
            created=self._created,
            model=answer.model,
            choices=(said,),
            usage=usage(answer.usage),
            citations=citations(answer),
            sources=sources(answer.passages),
            reason=answer.finish_reason,
        )


ROUTES = [Route("/v1/chat/completions", chat, methods=["POST"])]
