"""What we send to OpenAI's clients. Fields and their order are OpenAI's; ours stand at the top level, behind theirs.

Clients drop what they do not know inside `choices`, but keep it at the top level of a reply or chunk: so `sources`,
`citations`, `progress` and `reason` stand there. `sources` are the passages that were read, in the order of their
numbers; a citation repeats its passage, so that it can be shown by itself.
"""

from collections.abc import Sequence
from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from edge_rag.records import Answer, Citation, FinishReason, Passage, Usage

TEXT_START = 300  # characters of a passage that are shown with a source
FILE_PREFIX = "file-"

# 'stop' is the model's own end or a stop string, and our sentence that nothing was found. All other ends cut the answer
# short, which clients know as 'length'; `reason` beside it has the true one.
_FINISH: dict[FinishReason, Literal["stop", "length"]] = {"stop": "stop", "no_passages": "stop"}


def finish_reason(reason: FinishReason) -> Literal["stop", "length"]:
    """The nearest reason that OpenAI's clients know."""
    return _FINISH.get(reason, "length")


def file_id(document_id: int) -> str:
    """The name of a document among files."""
    return f"{FILE_PREFIX}{document_id}"


class Shape(Struct, frozen=True, kw_only=True):
    """Base of all replies."""


# --- usage -----------------------------------------------------------------------------------------------------------


class PromptDetails(Shape, frozen=True, kw_only=True):
    """`cached_tokens` of the prompt were restored, not computed."""

    cached_tokens: int


class UsageShape(Shape, frozen=True, kw_only=True):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


def usage(counted: Usage) -> UsageShape:
    """Token counts in OpenAI's shape."""
    return UsageShape(
        prompt_tokens=counted.prompt_tokens,
        completion_tokens=counted.completion_tokens,
        total_tokens=counted.prompt_tokens + counted.completion_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=counted.cached_tokens),
    )


class ReadShape(Shape, frozen=True, kw_only=True):
    """`done` of `total` prompt tokens are read."""

    done: int
    total: int


# --- sources and citations -------------------------------------------------------------------------------------------


class Source(Shape, frozen=True, kw_only=True):
    """A passage that was read; `n` is its number in `[n]` marks, `text` its start. `score` is in [0, 1]."""

    n: int
    file_id: str
    chunk_id: int
    path: str
    title: str
    heading: str
    page: int | None
    score: float
    text: str


class CitedShape(Shape, frozen=True, kw_only=True):
    """`content[start:end]` is supported by `passage`, its source `n`; positions count code points.

    `remembered`: an adapter knows the passage, it was not read.
    """

    n: int
    start: int
    end: int
    score: float
    remembered: bool
    passage: Source


def source(n: int, passage: Passage) -> Source:
    """Passage number `n` of an answer."""
    return Source(
        n=n,
        file_id=file_id(passage.document_id),
        chunk_id=passage.chunk_id,
        path=passage.path,
        title=passage.title,
        heading=passage.heading,
        page=passage.page,
        score=passage.score,
        text=passage.text[:TEXT_START],
    )


def sources(passages: Sequence[Passage]) -> tuple[Source, ...]:
    """All passages of an answer."""
    return tuple(source(n, passage) for n, passage in enumerate(passages, 1))


def citations(answer: Answer) -> tuple[CitedShape, ...]:
    """All citations of an answer."""
    return tuple(_cited(citation, answer.passages[citation.n - 1]) for citation in answer.citations)


def _cited(citation: Citation, passage: Passage) -> CitedShape:
    return CitedShape(
        n=citation.n,
        start=citation.start,
        end=citation.end,
        score=citation.score,
        remembered=citation.remembered,
        passage=source(citation.n, passage),
    )


# --- chat ------------------------------------------------------------------------------------------------------------


class Said(Shape, frozen=True, kw_only=True):
    """The answer."""

    role: str = "assistant"
    content: str
    refusal: None = None


class Choice(Shape, frozen=True, kw_only=True):
    """There is always one."""

    index: int = 0
    message: Said
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatReply(Shape, frozen=True, kw_only=True):
    """`chat.completion`. `id` is 'chatcmpl-' and the answer's id, which `/feedback` takes."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: tuple[Choice, ...]
    usage: UsageShape
    citations: tuple[CitedShape, ...]
    sources: tuple[Source, ...]
    reason: FinishReason


class ChatDelta(Shape, frozen=True, kw_only=True):
    """More text. Never without `content`: many clients add it up unseen."""

    role: str | UnsetType = UNSET
    content: str = ""


class ChunkChoice(Shape, frozen=True, kw_only=True):
    """There is one, but for the chunk with the usage."""

    index: int = 0
    delta: ChatDelta
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(Shape, frozen=True, kw_only=True):
    """`chat.completion.chunk`. `usage` is left out unless the caller asked for it: then it is null but in the last."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: tuple[ChunkChoice, ...]
    usage: UsageShape | UnsetType | None = UNSET
    sources: tuple[Source, ...] | UnsetType = UNSET
    progress: ReadShape | UnsetType = UNSET
    citations: tuple[CitedShape, ...] | UnsetType = UNSET
    reason: FinishReason | UnsetType = UNSET


# --- raw completions -------------------------------------------------------------------------------------------------


class TextChoice(Shape, frozen=True, kw_only=True):
    """More text, or all of it."""

    text: str
    index: int = 0
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = None


class TextReply(Shape, frozen=True, kw_only=True):
    """`text_completion`, whole or a chunk of a stream; `usage` as in `ChatChunk`."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: tuple[TextChoice, ...]
    usage: UsageShape | UnsetType | None = UNSET
    progress: ReadShape | UnsetType = UNSET
    reason: FinishReason | UnsetType = UNSET
