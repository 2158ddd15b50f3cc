"""What OpenAI's clients send, and what becomes of it.

Three kinds of fields: those that mean something here; those that change nothing about an answer (`user`, `metadata`),
which are ignored; and those that would change it and that we cannot do, which are refused by name unless they hold the
value that changes nothing (`n` = 1, `tools` = []). A field that is in no list is refused, as OpenAI does: a mistyped
`max_token` must not be lost. Messages may carry more than we know, because clients send back what they were given.

Fields of the last two kinds stay JSON: as objects they would take twenty times its length. That JSON is a view into the
body, so a request is let go of before the answer is waited for.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from edge_rag.errors import InputError, NotFound
from edge_rag.records import Turn
from edge_rag.server import bounds
from edge_rag.server.bodies import Body
from edge_rag.server.native_routes import Sampled, Where

MOST_MESSAGES = 2000
MOST_HISTORY = 1_000_000  # characters of earlier messages that are looked at, the newest; most will not fit anyway
MOST_INSTRUCTIONS = 200_000  # characters of all system messages

MOST_NEUTRAL = 100  # bytes of a value that may be one that changes nothing

Unread = Raw | UnsetType
Prompt = Annotated[str, Meta(min_length=1)]
Embedded = Annotated[str, Meta(min_length=1, max_length=32_000)]


class TextPart(Struct, frozen=True, tag="text", tag_field="type"):
    """A part of a message."""

    text: bounds.Content


class ChatMessage(Struct, frozen=True):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: bounds.Content | Annotated[tuple[TextPart, ...], Meta(max_length=200)] | None = None
    tool_calls: Unread = UNSET
    function_call: Unread = UNSET

    @property
    def text(self) -> str:
        """Its text; parts stand on lines of their own."""
        content = self.content or ""
        return content if isinstance(content, str) else "\n".join(part.text for part in content)


class StreamOptions(Struct, frozen=True):
    """`include_usage`: a last chunk tells the tokens."""

    include_usage: bool = False


class Asked(Sampled, frozen=True):
    """Base of requests that have the model write: how it does, and fields that change nothing."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Unread = UNSET
    logprobs: Unread = UNSET
    logit_bias: Unread = UNSET
    presence_penalty: Unread = UNSET
    frequency_penalty: Unread = UNSET

    user: Unread = UNSET
    metadata: Unread = UNSET
    store: Unread = UNSET
    service_tier: Unread = UNSET
    safety_identifier: Unread = UNSET
    prompt_cache_key: Unread = UNSET
    prompt_cache_options: Unread = UNSET
    prompt_cache_retention: Unread = UNSET

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def sampling(self) -> dict[str, Any]:
        """What the Python interface calls sampling."""
        return {name: getattr(self, name) for name in Sampled.__struct_fields__}


class Chat(Asked, frozen=True, kw_only=True):
    """A conversation that ends with a question. `top_k` and `where` are ours: how many passages, and from where."""

    messages: Annotated[tuple[ChatMessage, ...], Meta(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: bounds.MaxTokens | None = None
    top_k: bounds.TopK | None = None
    where: Where | None = None

    tools: Unread = UNSET
    tool_choice: Unread = UNSET
    functions: Unread = UNSET
    function_call: Unread = UNSET
    response_format: Unread = UNSET
    top_logprobs: Unread = UNSET
    modalities: Unread = UNSET
    audio: Unread = UNSET
    web_search_options: Unread = UNSET
    moderation: Unread = UNSET

    parallel_tool_calls: Unread = UNSET
    prediction: Unread = UNSET
    reasoning_effort: Unread = UNSET
    verbosity: Unread = UNSET

    @property
    def sampling(self) -> dict[str, Any]:
        """As above; `max_completion_tokens` is the newer name, and wins."""
        given = super().sampling
        return given | {"max_tokens": self.max_completion_tokens or self.max_tokens}


class Complete(Asked, frozen=True, kw_only=True):
    """A text to be continued."""

    # Not tuple[Prompt]: on that msgspec.inspect of 0.22 crashes.
    prompt: Prompt | Annotated[tuple[Prompt, ...], Meta(min_length=1, max_length=1)]
    echo: Unread = UNSET
    best_of: Unread = UNSET
    suffix: Unread = UNSET


class Embed(Body, frozen=True, kw_only=True):
    """Texts to be embedded; tokens are not taken."""

    input: Embedded | Annotated[tuple[Embedded, ...], Meta(min_length=1, max_length=2048)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Unread = UNSET
    user: Unread = UNSET


# Values that change nothing, besides null.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "top_logprobs": (0,),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "tool_calls": ([],),
    "dimensions": (),
    "filters": (),
    "rewrite_query": (False,),
    "hybrid_search": (),
}
_REMEDIES: Mapping[str, str] = {
    "filters": "use `where`, with `documents`, `folder` or `kinds`",
    "hybrid_search": "the server's settings retrieval.embedding_weight and retrieval.text_weight hold for all",
}


def refuse_unsupported(request: Struct, place: str = "") -> None:
    """Raise InputError naming the first field that asks for what we cannot do. `place` stands before its name."""
    for name in request.__struct_fields__:
        if name in NEUTRAL and not _changes_nothing(getattr(request, name), NEUTRAL[name]):
            remedy = _REMEDIES.get(name, "leave it out")
            raise InputError("is not supported", field=f"{place}{name}", remedy=remedy)


def _changes_nothing(unread: Unread, neutral: Sequence[Any]) -> bool:
    """Whether it is null or one of these; to Python 0 and false are equal."""
    if isinstance(unread, UnsetType):
        return True
    if len(memoryview(unread)) > MOST_NEUTRAL:
        return False
    try:
        value = msgspec.json.decode(unread)
    except (msgspec.DecodeError, UnicodeDecodeError):  # numbers and letters are looked at only here
        return False
    return value is None or any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)


def check_model(asked: str | None, served: str) -> None:
    """Raise NotFound for another model than the one that is served; no name means that one.

    OpenAI's client shows the message only, so what to do stands there.
    """
    if asked not in (None, served):
        raise NotFound(f"{asked[:100]!r} is not served, {served!r} is", field="model")


class Conversation(Struct, frozen=True):
    """Messages as the Python interface takes them; `instructions` is None when there were none."""

    question: str
    history: tuple[Turn, ...]
    instructions: str | None


def conversation(messages: Sequence[ChatMessage]) -> Conversation:
    """System messages are instructions, the last of the others is the question, those before it are the history.

    Raises InputError when the last word was not the user's, for too many instructions and for messages about tools.
    """
    for number, message in enumerate(messages):
        refuse_unsupported(message, f"messages[{number}].")
    rules = [message.text for message in messages if message.role in ("system", "developer")]
    if sum(map(len, rules)) > MOST_INSTRUCTIONS:
        raise InputError(f"system messages may have {MOST_INSTRUCTIONS} characters together", field="messages")
    said = [message for message in messages if message.role in ("user", "assistant")]
    if not said or said[-1].role != "user":
        raise InputError("must end with one of the user", field="messages", remedy="put the question last")
    return Conversation(said[-1].text, _newest(said[:-1]), "\n\n".join(rules) if rules else None)


def _newest(said: Sequence[ChatMessage]) -> tuple[Turn, ...]:
    """The newest messages that are not too much to look at."""
    turns: list[Turn] = []
    room = MOST_HISTORY
    for message in reversed(said):
        room -= len(message.text)
        if room < 0:
            break
        turns.append(Turn(role="user" if message.role == "user" else "assistant", content=message.text))
    return tuple(reversed(turns))
