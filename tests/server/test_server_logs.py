"""One line a request, without a word of what was asked or answered."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from edge_rag import errors
from edge_rag.server import logs
from tests.server.fakes import FakeRAG
from tests.server.harness import caller, served


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Where the log goes during a test; afterwards logging is as it was."""
    root, stream = logging.getLogger(), io.StringIO()
    before, level = list(root.handlers), root.level
    for handler in before:  # `configure` closes those that it finds
        root.removeHandler(handler)
    logs.configure(stream)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it is the caller here
    yield stream
    logging.getLogger("httpx").setLevel(logging.NOTSET)
    for handler in list(root.handlers):
        root.removeHandler(handler)
    for handler in before:
        root.addHandler(handler)
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def rag(tmp_path: Path) -> FakeRAG:
    return FakeRAG(tmp_path)


@pytest.fixture
def asking(stream: io.StringIO, rag: FakeRAG, tmp_path: Path) -> Iterator[httpx.Client]:
    with served(rag, tmp_path / "a" / "e.sock"), caller(tmp_path / "a" / "e.sock") as client:
        yield client


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def written(asking: httpx.Client, stream: io.StringIO, count: int) -> list[dict[str, Any]]:
    """So many lines, as soon as they are written: a request may be answered before its line is."""
    while len(lines(stream)) < count:
        asking.get("/health")
    return lines(stream)


@pytest.mark.parametrize("streamed", [True, False])
def test_an_answer_is_told_of_in_numbers(streamed: bool, asking: httpx.Client, stream: io.StringIO) -> None:
    response = asking.post("/ask", json={"question": "secret question", "stream": streamed})
    [told] = written(asking, stream, 1)
    assert 0 <= told.pop("seconds") < 60
    assert told.pop("timestamp").endswith("Z")
    assert told == {
        "event": "request",
        "level": "info",
        "id": response.headers["x-request-id"],
        "method": "POST",
        "route": "/ask",
        "status": 200,
        "answer": "abc",
        "finish": "stop",
        "ttft": 0.3,
        "queued": 0.02,
        "plan": {"exact": 1, "splice": 1, "recompute": 0, "remembered": 0, "live": 1},
        "adapter": "",
        "tokens": {"prompt": 20, "cached": 12, "completion": 4},
    }


def test_texts_are_never_in_the_log(asking: httpx.Client, rag: FakeRAG, stream: io.StringIO) -> None:
    rag.errors["secret error"] = errors.InputError("secret message", field="question")
    for question in ("secret question", "secret error"):
        asking.post("/ask", json={"question": question, "instructions": "secret instructions"})
    asking.post("/search", json={"query": "secret query"})
    asking.post("/feedback", json={"answer_id": "abc", "score": 1, "comment": "secret comment"})
    asking.get("/documents?folder=/secret/folder")
    asking.get("/secret/path")
    assert len(written(asking, stream, 6)) == 6
    for word in ("secret", "membrane", "Two years"):
        assert word not in stream.getvalue()


def test_every_request_has_its_own_id(asking: httpx.Client, stream: io.StringIO) -> None:
    told = [asking.get(path).headers["x-request-id"] for path in ("/documents", "/nothing", "/documents")]
    assert len(set(told)) == 3
    assert [line["id"] for line in written(asking, stream, 3)] == told


def test_being_asked_for_health_is_no_news(asking: httpx.Client, stream: io.StringIO) -> None:
    asking.get("/health")
    asking.get("/metrics")
    asking.get("/documents")
    assert [line["route"] for line in written(asking, stream, 1)] == ["/documents"]


def test_faults_are_told_with_their_trace(asking: httpx.Client, rag: FakeRAG, stream: io.StringIO) -> None:
    rag.errors["a?"] = KeyError("inside")
    asking.post("/ask", json={"question": "a?"})
    fault, request = written(asking, stream, 2)
    assert (fault["level"], request["status"]) == ("error", 500)
    assert "Traceback" in fault["exception"]
    assert "KeyError: 'inside'" in fault["exception"]


def test_what_libraries_say_has_the_same_form(stream: io.StringIO) -> None:
    logging.getLogger("edge_rag.runtime").warning("the disk is %d %% full", 99)
    [told] = lines(stream)
    assert (told["event"], told["level"]) == ("the disk is 99 % full", "warning")


def test_people_at_a_terminal_read_words(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    logs.configure(terminal)
    logs.logger.info("request", route="/ask", status=200)
    assert "request" in terminal.getvalue()
    with pytest.raises(json.JSONDecodeError):
        json.loads(terminal.getvalue())
