"""What is no HTTP, or an odd kind of it: one clear answer, no trace in the log, and the next caller is served."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.abusing import CLOSE, HEALTH, connected, posted, problems
from tests.server.fakes import FakeRAG
from tests.server.harness import raw, received

GET = b"GET /documents HTTP/1.1\r\nHost: a\r\n"


@pytest.fixture
def path(socket_path: Path) -> Path:
    """The socket of the fake library that all these tests share."""
    return socket_path


def test_requests_one_behind_the_other_are_answered_in_their_order(path: Path, fake: FakeRAG) -> None:
    before = len(fake.calls)
    sent = posted(b"/ask", b'{"question": "first?"}') + GET + b"\r\n"
    sent += posted(b"/ask", b'{"question": "second?", "stream": true}') + HEALTH + CLOSE
    said = raw(path, sent)
    places = [said.index(word) for word in (b'"question":"first?"', b'/notes/filters.md"', b"event: answer", b'"ok"')]
    assert places == sorted(places)
    assert said.count(b"HTTP/1.1 200") == 4
    assert [call[0] for call in fake.calls[before:]] == ["stream", "documents", "stream"]


def test_a_thousand_requests_at_once_on_one_connection_are_all_answered(path: Path) -> None:
    assert raw(path, (HEALTH + b"\r\n") * 999 + HEALTH + CLOSE).count(b'{"status":"ok"}') == 1000


def test_old_http_is_answered_and_closed(path: Path) -> None:
    said = raw(path, b"GET /health HTTP/1.0\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"connection: close" in said.lower()
    assert said.endswith(b'\r\n\r\n{"status":"ok"}')


GARBAGE = {
    "noise": bytes(range(256)) * 8,
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "zeros": bytes(2000),
    "line ends": b"\r\n" * 50_000,
    "no version": b"GET /health\r\n\r\n",
    "a negative length": HEALTH + b"Content-Length: -1\r\n\r\n",
    "two lengths": HEALTH + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "a very large length": HEALTH + b"Content-Length: 1" + b"0" * 30 + b"\r\n\r\n",
    "two hosts": HEALTH + b"Host: b\r\n\r\n",
    "a bare line": HEALTH + b"hello\r\n\r\n",
    "a zero in a header": HEALTH + b"a: \0\r\n\r\n",
    "a megabyte in a header": HEALTH + b"a: " + b"a" * 1_000_000 + b"\r\n\r\n",
    "a megabyte in a path": b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "a hundred thousand headers": HEALTH + b"a: a\r\n" * 100_000 + b"\r\n",
    "a bad chunk": b"POST /ask HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzzzz\r\n\r\n",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_what_is_no_http_is_refused_in_our_shape(name: str, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    head, _, body = raw(path, GARBAGE[name]).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n")
    assert json.loads(body)["error"]["code"] == "no_http"
    assert raw(path, HEALTH + CLOSE).startswith(b"HTTP/1.1 200")
    assert not problems(caplog)


@pytest.mark.parametrize("version", [b"0.9", b"2.0", b"9.9"])
def test_other_versions_are_answered_as_the_nearest_or_refused(version: bytes, path: Path) -> None:
    said = raw(path, b"GET /health HTTP/%b\r\nHost: a\r\n" % version + CLOSE)
    assert said.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400"))


def test_nonsense_behind_a_response_closes_the_connection_quietly(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unread = b"POST /nothing HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    with connected(path, unread) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 404")
        with contextlib.suppress(BrokenPipeError):  # it is not listened to any more
            connection.sendall(b"no chunk\r\n\r\n")
        assert b"HTTP/1.1" not in received(connection)
    assert raw(path, HEALTH + CLOSE).startswith(b"HTTP/1.1 200")
    assert not problems(caplog)


def test_a_request_that_names_no_host_learns_nothing_of_ours(path: Path) -> None:
    said: dict[str, Any] = json.loads(raw(path, b"GET /no/where HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")[2])
    assert said["error"]["message"] == "there is no /no/where"
    assert str(path).encode() not in raw(path, b"OPTIONS * HTTP/1.0\r\n\r\n")
