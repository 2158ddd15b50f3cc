"""Event streams over a real socket: pings, callers that leave, readers that are slow, places that are freed."""

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from edge_rag.runtime.warming import WarmProgress
from edge_rag.server.service import Service
from tests.server.fakes import FakeRAG, events
from tests.server.harness import caller, parsed, received

pytestmark = pytest.mark.usefixtures("service")

ASK = b"POST /ask HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b"


@pytest.fixture
def rag(tmp_path: Path) -> FakeRAG:
    return FakeRAG(tmp_path, server__ping=1)


def wait_until_stopped(service: Service, http: httpx.Client) -> None:
    """Until the server has heard that the only streaming caller is gone."""
    while not any(stream._stopped for stream in (*service.answers.streams, *service.jobs.streams)):
        http.get("/health")


def asked(path: Path, question: str, stream: str) -> socket.socket:
    """A connection on which this was asked."""
    body = b'{"question": "%b", "stream": %b}' % (question.encode(), stream.encode())
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(60)
    connection.connect(str(path))
    connection.sendall(ASK % (len(body), body))
    return connection


def read_stream(connection: socket.socket) -> bytes:
    """Everything to the end of the response."""
    said = b""
    while not said.endswith(b"0\r\n\r\n"):
        piece = connection.recv(65536)
        assert piece, said
        said += piece
    return said


def test_a_stream_has_the_records_as_events(path: Path) -> None:
    with caller(path) as http:
        response = http.post("/ask", json={"question": "how long?", "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    told = parsed(response.text)
    assert [kind for kind, _ in told] == ["sources", "progress", "delta", "citation", "delta", "answer"]
    assert [data["type"] for _, data in told] == [kind for kind, _ in told]
    assert "".join(data["text"] for kind, data in told if kind == "delta") == told[-1][1]["text"]
    assert len(told) == len(events(""))


def test_sources_come_before_anything_is_waited_for(path: Path, rag: FakeRAG) -> None:
    rag.gates["slow?"] = threading.Event()
    with caller(path) as http, http.stream("POST", "/ask", json={"question": "slow?", "stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines) == "event: sources"
        rag.gates["slow?"].set()
        assert "event: answer" in list(lines)


def test_a_silent_stream_pings(path: Path, rag: FakeRAG) -> None:
    rag.gates["slow?"] = threading.Event()
    with caller(path) as http, http.stream("POST", "/ask", json={"question": "slow?", "stream": True}) as response:
        lines = response.iter_lines()
        assert any(line.startswith(": ping") for line in lines)
        rag.gates["slow?"].set()
        assert any(line == "event: answer" for line in lines)


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_caller_who_leaves_ends_the_work(stream: str, path: Path, rag: FakeRAG, service: Service) -> None:
    rag.gates["slow?"] = threading.Event()
    with asked(path, "slow?", stream):
        assert rag.held.acquire(timeout=60)
    with caller(path) as http:
        wait_until_stopped(service, http)
    rag.gates["slow?"].set()
    assert rag.ended.acquire(timeout=60)
    assert rag.closed == ["slow?"]
    with caller(path) as http:
        while service.answers.streams:
            http.get("/health")
        assert 'edge_rag_answers_total{finish_reason="cancelled"} 1.0' in http.get("/metrics").text


def test_a_half_closed_connection_is_taken_for_leaving(path: Path) -> None:
    with asked(path, "how long?", "false") as connection:
        connection.shutdown(socket.SHUT_WR)
        assert received(connection).count(b"HTTP/1.1") <= 1  # and does not hang


def test_one_question_too_many_is_busy_and_the_place_is_freed(path: Path, rag: FakeRAG) -> None:
    room = rag.settings.engine.slots + rag.settings.engine.queue
    rag.gates["slow?"] = threading.Event()
    connections = [asked(path, "slow?", "true") for _ in range(room)]
    try:
        for _ in range(room):
            assert rag.held.acquire(timeout=60)
        with caller(path) as http:
            for stream in (True, False):
                response = http.post("/ask", json={"question": "too many?", "stream": stream})
                assert (response.status_code, response.headers["retry-after"]) == (503, "2")
            assert http.post("/search", json={"query": "a"}).status_code == 200  # others are not held up
            rag.gates["slow?"].set()
            for connection in connections:
                read_stream(connection)
            assert http.post("/ask", json={"question": "now?"}).status_code == 200
    finally:
        for connection in connections:
            connection.close()


def test_a_slow_reader_does_not_hold_up_the_work(path: Path, rag: FakeRAG) -> None:
    with asked(path, "how long?", "true"):  # nothing is ever read
        assert rag.ended.acquire(timeout=60)
    assert rag.closed == []


def test_killed_callers_leave_nothing_behind(path: Path, rag: FakeRAG) -> None:
    for _ in range(20):
        connection = asked(path, "how long?", "true")
        connection.close()
    with caller(path) as http:
        answers = [http.post("/ask", json={"question": "still there?"}) for _ in range(2)]
    assert [response.status_code for response in answers] == [200, 200]


def test_a_long_job_ends_when_its_caller_leaves(path: Path, rag: FakeRAG, service: Service) -> None:
    left, stopped = threading.Event(), threading.Event()

    def warm(*paths: object, hot: object, progress: Callable[[WarmProgress], None]) -> None:
        try:
            progress(WarmProgress(1, 3, "a"))
            assert left.wait(60)
            progress(WarmProgress(2, 3, "b"))
            raise AssertionError("it goes on")
        finally:
            stopped.set()

    rag.warm = warm  # type: ignore[assignment,method-assign]
    with caller(path) as http:
        with http.stream("POST", "/warm", json={}) as response:
            assert next(response.iter_lines()) == "event: progress"
        wait_until_stopped(service, http)
    left.set()
    assert stopped.wait(60)


def test_http_of_the_same_connection_goes_on_after_a_stream(path: Path) -> None:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://edge-rag") as http:
        for _ in range(3):
            assert http.post("/ask", json={"question": "a", "stream": True}).status_code == 200
            assert http.get("/health").status_code == 200
