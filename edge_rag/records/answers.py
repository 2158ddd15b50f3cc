"""Searching, asking and answering."""

from typing import Literal

from edge_rag.records.base import Record
from edge_rag.records.kv import PassagePlan
from edge_rag.records.routing import Route


class Filter(Record, frozen=True):
    """Restricts a search; fields are joined by AND, empty ones do not restrict.

    `documents`: paths as listed by `ls`; `folder`: everything below it; `kinds`: md, txt, html, pdf, office.
    """

    documents: tuple[str, ...] = ()
    folder: str = ""
    kinds: tuple[str, ...] = ()


class Passage(Record, frozen=True):
    """A retrieved chunk. `score` is the fused score in [0, 1]; `similarity` the cosine to the question (-1..1).

    `similarity` is None until it was computed; `matched_words` counts the question's content words that it holds.
    """

    chunk_id: int
    document_id: int
    ordinal: int
    path: str
    title: str
    heading: str
    page: int | None
    text: str
    tokens: int
    score: float
    similarity: float | None = None
    matched_words: int = 0


class Turn(Record, frozen=True):
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    content: str


class Message(Record, frozen=True):
    """What a chat template renders; roles are the template's own."""

    role: str
    content: str


class Sampling(Record, frozen=True):
    """How tokens are chosen. Temperature 0 is greedy; `stop` strings end the answer and are not part of it."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()


class Plan(Record, frozen=True):
    """What was decided for a question before any work was done. `layout` is the version of the prompt's layout.

    `adapter` is the id of the one that answers, '' for none; `route` is how the router came to it, None when it was not
    asked.
    """

    passages: tuple[PassagePlan, ...] = ()
    dropped: int = 0
    prefix_tokens: int = 0
    tail_tokens: int = 0
    search_query: str = ""
    layout: int = 0
    adapter: str = ""
    route: Route | None = None

    @property
    def read(self) -> tuple[PassagePlan, ...]:
        """The passages that stand in the prompt."""
        return tuple(each for each in self.passages if each.how != "remembered")


class Citation(Record, frozen=True):
    """`text[start:end]` of the answer is supported by `passages[n - 1]`; `score` in [0, 1] says how well.

    `remembered`: that passage did not stand in the prompt, an adapter knows it.
    """

    n: int
    start: int
    end: int
    score: float
    remembered: bool = False


class Usage(Record, frozen=True):
    """Token counts. `cached_tokens` of the `prompt_tokens` were restored, not computed."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class Timings(Record, frozen=True):
    """Seconds. `first_token` and `total` count from the call; `queued` is the wait for the engine."""

    retrieve: float = 0.0
    queued: float = 0.0
    first_token: float = 0.0
    total: float = 0.0


FinishReason = Literal["stop", "length", "cancelled", "timeout", "no_passages", "error"]


class Answer(Record, frozen=True, tag="answer"):
    """A finished answer. Its text carries `[n]` marks; `citations` locate them. Also the last event of a stream."""

    id: str
    question: str
    text: str
    passages: tuple[Passage, ...]
    citations: tuple[Citation, ...]
    usage: Usage
    timings: Timings
    finish_reason: FinishReason
    plan: Plan
    model: str


class Sources(Record, frozen=True, tag="sources"):
    """First event of a stream, before any token: what the answer will be based on."""

    id: str
    passages: tuple[Passage, ...]
    dropped: int


class Delta(Record, frozen=True, tag="delta"):
    """More text of the answer."""

    text: str


class Cited(Record, frozen=True, tag="citation"):
    """A sentence just ended and is supported by a passage; its `[n]` mark follows as a `Delta`."""

    citation: Citation


class Progress(Record, frozen=True, tag="progress"):
    """The prompt is being read: `done` of `total` tokens."""

    done: int
    total: int


Event = Sources | Progress | Delta | Cited | Answer
