"""What tests of the OpenAI-shaped routes share: OpenAI's client at a server's socket, and a library of fixed words."""

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
from msgspec import Struct

from edge_rag.config import Settings, load_settings
from edge_rag.errors import EdgeRAGError, NotFound
from edge_rag.records import (
    Answer,
    Citation,
    Cited,
    Delta,
    Document,
    Event,
    Filter,
    Passage,
    Plan,
    Progress,
    Sources,
    Timings,
    Usage,
)
from edge_rag.server.service import Service
from tests.server.harness import served

BASE = "http://localhost/v1"
MODEL, EMBEDDER = "some-llm", "some-embedder"
PATIENCE = 30.0  # seconds; only a broken server needs them


class Served(Struct):
    """A running server, and callers of it."""

    service: Service
    http: httpx.Client
    openai: openai.OpenAI


@contextlib.contextmanager
def openai_served(rag: Any, path: Path) -> Iterator[Served]:
    """Serve a library on a socket at `path`, until the end of the block; then it is closed."""
    with served(rag, path) as service, httpx.HTTPTransport(uds=str(path)) as transport:
        http = httpx.Client(transport=transport, base_url=BASE, timeout=PATIENCE)
        yield Served(service, http, openai.OpenAI(api_key="unused", base_url=BASE, http_client=http, max_retries=0))


# --- a library of fixed words ----------------------------------------------------------------------------------------


def passage(number: int, page: int | None = None) -> Passage:
    return Passage(
        chunk_id=100 + number,
        document_id=number,
        ordinal=0,
        path=f"/library/doc {number}.md",
        title=f"Doc {number}",
        heading=f"Doc {number} › Part",
        page=page,
        text=f"Passage {number}. " + "word " * 200,
        tokens=210,
        score=1 / number,
    )


PASSAGES = (passage(1), passage(2, page=7))
ANSWER = Answer(
    id="abc",
    question="What?",
    text="It is so. [2] Perhaps.",
    passages=PASSAGES,
    citations=(Citation(n=2, start=0, end=9, score=0.75),),
    usage=Usage(prompt_tokens=50, cached_tokens=40, completion_tokens=6),
    timings=Timings(retrieve=0.1, queued=0.1, first_token=0.3, total=0.5),
    finish_reason="stop",
    plan=Plan(),
    model=MODEL,
)
EVENTS: tuple[Event, ...] = (
    Sources(id="abc", passages=PASSAGES, dropped=0),
    Progress(done=40, total=50),
    Delta(text="It is so."),
    Cited(citation=ANSWER.citations[0]),
    Delta(text=" [2]"),
    Delta(text=" Perhaps."),
    ANSWER,
)


def document(number: int) -> Document:
    return Document(
        id=number,
        path=f"/library/doc {number}.md",
        title=f"Doc {number}",
        kind="md",
        bytes=1000 * number,
        sha256="0",
        recipe="1",
        chunks=1,
        tokens=210,
        added_at=1_700_000_000.5 + number,
    )


class FixedLibrary:
    """`EdgeRAG`'s methods without a model: they say what they are told to, and remember what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings: Settings = load_settings(
            {"models.llm": MODEL, "models.embedder": EMBEDDER, "server.timeout": 77}, environment={}
        )
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget everything: for the next test."""
        self.asked: list[dict[str, Any]] = []
        self.events: Sequence[Event | Exception] | Callable[[], Iterator[Event]] = EVENTS
        self.refusal: EdgeRAGError | None = None
        self.ended = threading.Event()
        self.held = [document(1), document(2), document(3)]

    def close(self) -> None:
        """There is nothing to close."""

    def stream(self, question: str, **options: Any) -> Generator[Event, None, None]:
        return self._asked(question=question, **options)

    def complete(self, text: str, **options: Any) -> Generator[Event, None, None]:
        return self._asked(text=text, **options)

    def _asked(self, **options: Any) -> Generator[Event, None, None]:
        self.asked.append(options)
        if self.refusal:
            raise self.refusal
        return self._told()

    def _told(self) -> Generator[Event, None, None]:
        try:
            for event in self.events() if callable(self.events) else self.events:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.ended.set()

    def embed(self, texts: Sequence[str]) -> tuple[Any, int]:
        """A vector that depends on the text alone; each text has two tokens."""
        self.asked.append({"texts": list(texts)})
        return np.array([[len(text), 0.1, -1.0] for text in texts], dtype=np.float32), 2 * len(texts)

    def search(self, query: str, *, top_k: int | None = None, where: Filter | None = None) -> list[Passage]:
        self.asked.append({"query": query, "top_k": top_k, "where": where})
        return list(PASSAGES)

    def documents(self, where: Filter | None = None) -> list[Document]:
        return list(self.held)

    def remove(self, *paths: str | Path) -> list[Document]:
        gone = [held for held in self.held if Path(held.path) in paths]
        if not gone:
            raise NotFound("is not in the library", field=str(paths))
        self.held = [held for held in self.held if held not in gone]
        return gone

    def status(self) -> Any:
        raise AssertionError("nobody asks for it here")
