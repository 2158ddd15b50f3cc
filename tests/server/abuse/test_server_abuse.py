"""Callers who are too many, too slow or half gone: others are served, and nothing of them stays."""

import contextlib
import resource
import select
import socket
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import httpx
import pytest

from edge_rag.records import Delta, Event
from edge_rag.server import bodies, protocol
from edge_rag.server.service import Service
from edge_rag.server.sockets import bind_tcp
from tests.server.abusing import CLOSE, HEALTH, connected, posted, problems
from tests.server.fakes import FakeRAG, document, events
from tests.server.harness import caller, raw, received, served

GET = b"GET /documents HTTP/1.1\r\nHost: a\r\n"
CROWD = 5000


@pytest.fixture
def rag(tmp_path: Path) -> FakeRAG:
    return FakeRAG(tmp_path, server__max_body_mb=1)


def until(http: httpx.Client, done: Callable[[], bool]) -> None:
    """Ask the server until it is so."""
    while not done():
        assert http.get("/health").status_code == 200


def hung_up(connection: socket.socket) -> bool:
    """Whether the server hangs up, without a byte having been read here."""
    closed = select.poll()
    closed.register(connection, select.POLLHUP)
    return bool(closed.poll(60_000))


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def read_stream(connection: socket.socket) -> bytes:
    """Everything to the end of the response."""
    said = b""
    while not said.endswith(b"0\r\n\r\n"):
        piece = connection.recv(65536)
        assert piece, said
        said += piece
    return said


# --- too many --------------------------------------------------------------------------------------------------------


@pytest.fixture
def room_for_files() -> Iterator[None]:
    """Both ends of all connections of a crowd are open in this process."""
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 2 * CROWD + 500:
        pytest.skip(f"this process may open {most} files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))


@pytest.mark.usefixtures("room_for_files")
def test_of_five_thousand_connections_a_thousand_are_held_and_all_come_back(
    service: Service, path: Path, rag: FakeRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "PATIENCE", 600)
    rag.gates["slow?"] = threading.Event()
    assert raw(path, HEALTH + CLOSE).startswith(b"HTTP/1.1 200")  # the server runs, and has all that it needs
    before = open_files()
    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(connected(path, posted(b"/ask", b'{"question": "slow?", "stream": true}')))
        assert rag.held.acquire(timeout=60)
        crowd = [stack.enter_context(connected(path)) for _ in range(CROWD)]
        held = protocol.CONNECTIONS - 1
        for late in crowd[held:]:
            said = received(late)
            assert said.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert b"\r\nretry-after: 2\r\n" in said.lower()
        told = select.poll()
        for early in crowd[:held]:
            told.register(early)
        assert {state for _, state in told.poll(0)} == {select.POLLOUT}  # neither answered nor closed
        with caller(path) as honest:
            refused = honest.get("/documents")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "busy")
        rag.gates["slow?"].set()
        assert b"event: answer" in read_stream(asked)  # who is in is served
    while raw(path, GET + CLOSE).startswith(b"HTTP/1.1 503") or open_files() > before:
        pass


def test_the_crowd_of_one_user_does_not_keep_out_another(
    rag: FakeRAG, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "CONNECTIONS", 2)
    listening = bind_tcp("127.0.0.1:0")
    with served(rag, path, listening), contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(socket.create_connection(listening.getsockname(), 60)) for _ in range(3)]
        assert received(crowd[-1]).startswith(b"HTTP/1.1 503")
        assert raw(path, GET + CLOSE).startswith(b"HTTP/1.1 200")


def test_who_is_turned_away_and_comes_again_loses_nothing(http: httpx.Client, path: Path, rag: FakeRAG) -> None:
    answered, told_to_wait = list[str](), list[str]()

    def ask(number: int) -> None:
        with caller(path) as own:
            while (response := own.post("/ask", json={"question": f"number {number}?"})).status_code == 503:
                told_to_wait.append(response.headers["retry-after"])
            answered.append(response.json()["question"])

    room = rag.settings.engine.slots + rag.settings.engine.queue
    rag.gates["slow?"] = threading.Event()
    with contextlib.ExitStack() as stack:
        for _ in range(room):
            stack.enter_context(connected(path, posted(b"/ask", b'{"question": "slow?", "stream": true}')))
            assert rag.held.acquire(timeout=60)
        asking = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for thread in asking:
            thread.start()
        until(http, lambda: len(told_to_wait) >= len(asking))
        rag.gates["slow?"].set()
        for thread in asking:
            thread.join()
    assert set(told_to_wait) == {"2"}
    assert sorted(answered) == sorted(f"number {number}?" for number in range(6))
    assert sorted(call[1] for call in rag.calls if call[1] != "slow?") == sorted(answered)


# --- too slow --------------------------------------------------------------------------------------------------------


def test_a_reader_who_takes_nothing_of_a_long_stream_is_left_and_others_are_served(
    http: httpx.Client, path: Path, rag: FakeRAG, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "READER_PATIENCE", 0.2)
    long = [*events("long?")[:-1], *[Delta("word " * 1000)] * 400, events("long?")[-1]]  # 2 MB, no socket holds it
    told = rag._events

    def stream(question: str) -> Generator[Event, None, None]:
        for event in told(question):
            yield from long if question == "long?" else [event]

    monkeypatch.setattr(rag, "_events", stream)
    with connected(path, posted(b"/ask", b'{"question": "long?", "stream": true}')) as connection:
        assert rag.ended.acquire(timeout=60)  # the work does not wait for the reader
        assert http.post("/ask", json={"question": "another?", "stream": True}).text.count("event: answer") == 1
        assert hung_up(connection)
        until(http, lambda: not service.answers.streams)
        assert b"event: answer" not in received(connection)


@pytest.mark.parametrize("documents", [1000, 1300, 1600, 1900, 2200])
def test_a_closed_connection_does_not_wait_for_its_reader_for_ever(
    documents: int, service: Service, path: Path, rag: FakeRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of these answers fit into the kernel's buffer but for a few thousand bytes."""
    monkeypatch.setattr(protocol, "READER_PATIENCE", 0.05)
    rag.stored = [document(f"/notes/{number}.md", number) for number in range(documents)]
    with connected(path, GET + CLOSE) as connection:
        assert hung_up(connection)


def test_a_body_that_comes_a_byte_at_a_time_is_given_up(
    service: Service, path: Path, rag: FakeRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "PATIENCE", 0.2)
    with connected(path, b"POST /ask HTTP/1.1\r\nHost: a\r\nContent-Length: 99999\r\n\r\n") as one:
        one.settimeout(0.01)
        said = b""
        while not said:
            one.send(b" ")
            with contextlib.suppress(TimeoutError):
                said = one.recv(65536)
        assert said.startswith(b"HTTP/1.1 408")
    assert not rag.calls


# --- half gone -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [b"true", b"false"])
def test_who_closes_his_half_has_left(
    stream: bytes, http: httpx.Client, path: Path, rag: FakeRAG, service: Service
) -> None:
    rag.gates["slow?"] = threading.Event()
    with connected(path, posted(b"/ask", b'{"question": "slow?", "stream": %b}' % stream)) as connection:
        assert rag.held.acquire(timeout=60)
        connection.shutdown(socket.SHUT_WR)
        until(http, lambda: any(each._stopped for each in service.answers.streams))
        rag.gates["slow?"].set()
        assert b"event: answer" not in received(connection)
        assert rag.ended.acquire(timeout=60)
    assert rag.closed == ["slow?"]


@pytest.mark.parametrize("cut", [10, -1])
def test_a_request_that_ends_in_the_middle_is_none(
    cut: int, http: httpx.Client, path: Path, rag: FakeRAG, caplog: pytest.LogCaptureFixture
) -> None:
    with connected(path, posted(b"/ask", b'{"question": "whole?"}')[:cut]) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert received(connection) == b""
    assert http.get("/health").status_code == 200
    assert not rag.calls
    assert not problems(caplog)
