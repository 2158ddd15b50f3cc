"""Connections that say nothing, or too little, or are too many."""

import contextlib
import json
import select
import socket
import threading
from pathlib import Path

import pytest

from edge_rag.server import protocol
from tests.server.fakes import FakeRAG, document
from tests.server.harness import raw, received

GET = b"GET /documents HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize("said", [b"", b"G", GET])
def test_who_does_not_say_what_he_wants_is_dropped(
    said: bytes, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "PATIENCE", 0.05)
    assert raw(socket_path, said) == b""


def dribble(connection: socket.socket) -> None:
    """Send a byte now and then, until the other side has had enough. Raises then."""
    while True:
        connection.send(b"a")
        with contextlib.suppress(TimeoutError):
            if not connection.recv(1):
                raise EOFError


def test_who_sends_a_byte_at_a_time_is_dropped_as_well(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "PATIENCE", 0.2)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(0.01)
        connection.connect(str(socket_path))
        with pytest.raises((BrokenPipeError, ConnectionResetError, EOFError)):
            dribble(connection)


def test_who_begins_a_second_request_and_stops_is_dropped(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "PATIENCE", 0.05)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(socket_path))
        connection.sendall(GET + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(GET)
        assert b"HTTP/1.1" not in received(connection)


def test_answers_may_take_longer_than_requests(
    socket_path: Path, fake: FakeRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "PATIENCE", 0.05)
    fake.gates["slow?"] = threading.Event()
    late = threading.Timer(0.2, fake.gates["slow?"].set)  # gives the fault its chance
    late.start()
    body = b'{"question": "slow?"}'
    ask = b"POST /ask HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert raw(socket_path, ask + body).startswith(b"HTTP/1.1 200")
    late.join()


def test_a_reader_who_takes_nothing_is_left(socket_path: Path, fake: FakeRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "READER_PATIENCE", 0.05)
    monkeypatch.setattr(fake, "stored", [document(f"/notes/{number}.md", number) for number in range(20_000)])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(socket_path))
        connection.sendall(GET + b"\r\n")
        closed = select.poll()
        closed.register(connection, select.POLLHUP)
        assert closed.poll(60_000)  # without a byte having been read
        assert not received(connection).endswith(b"]")


def test_one_connection_too_many_is_told_to_come_again(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "CONNECTIONS", 0)
    head, _, body = raw(socket_path, GET + b"Connection: close\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 2" in head.lower()
    assert json.loads(body)["error"]["code"] == "busy"


def test_what_is_no_http_is_refused(socket_path: Path) -> None:
    assert raw(socket_path, b"hello?\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert raw(socket_path, GET + b"a: " + b"a" * 100_000).startswith(b"HTTP/1.1 400")
