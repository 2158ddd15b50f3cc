"""What callers send has bounds: its size, its time, its fields, its numbers."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_rag.server import bodies
from tests.server.fakes import FakeRAG
from tests.server.harness import raw, received, served

MEGABYTE = 1_000_000

BAD = [
    (b'{"question": 1}', "question"),
    (b'{"question": ""}', "question"),
    (b"{}", "question"),
    (b"", "question"),
    (b'{"question": "a", "n_predict": 1000000000}', "n_predict"),
    (b'{"question": "a", "max_tokens": 1000000000}', "max_tokens"),
    (b'{"question": "a", "max_tokens": -1}', "max_tokens"),
    (b'{"question": "a", "max_tokens": 1.5}', "max_tokens"),
    (b'{"question": "a", "max_tokens": 1e400}', "max_tokens"),
    (b'{"question": "a", "temperature": NaN}', "body"),
    (b'{"question": "a", "temperature": -0.1}', "temperature"),
    (b'{"question": "a", "top_p": 0}', "top_p"),
    (b'{"question": "a", "min_p": 2}', "min_p"),
    (b'{"question": "a", "seed": -1}', "seed"),
    (b'{"question": "a", "top_k": 0}', "top_k"),
    (b'{"question": "a", "top_k": 65}', "top_k"),
    (b'{"question": "a", "stop": [""]}', "stop[0]"),
    (b'{"question": "a", "where": {"kind": "md"}}', "where.kind"),
    (b'{"question": "a", "history": [{"role": "system", "content": "a"}]}', "history[0].role"),
    (b'{"question": "a", "history": [{"role": "user"}]}', "history[0].content"),
    (b'{"question": "\\ud800"}', "body"),
    (b'{"question": "\xff"}', "body"),
    (b"[1]", "body"),
    (b'{"question": "a"', "body"),
    (b'{"where": ' + b'{"a":' * 100_000, "where.a"),
    (b'{"stop": ' + b"[" * 100_000, "stop[0]"),
]


@pytest.mark.parametrize(("body", "field"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_a_bad_body_is_refused_and_its_field_named(body: bytes, field: str, http: httpx.Client, fake: FakeRAG) -> None:
    before = list(fake.calls)
    response = http.post("/ask", content=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    assert fake.calls == before


def test_texts_and_lists_have_a_longest(http: httpx.Client) -> None:
    turn = {"role": "user", "content": "a"}
    for field, value in (
        ("question", "a" * 20_001),
        ("history", [turn] * 201),
        ("stop", ["a"] * 17),
        ("instructions", "a" * 200_001),
    ):
        response = http.post("/ask", json={"question": "a"} | {field: value})
        assert (response.status_code, response.json()["error"]["param"]) == (400, field)


def test_the_largest_that_is_allowed_is_allowed(http: httpx.Client, fake: FakeRAG) -> None:
    turn = {"role": "user", "content": "a"}
    assert http.post("/ask", json={"question": "a" * 20_000, "history": [turn] * 200}).status_code == 200
    assert len(fake.calls[-1][2]["history"]) == 200


def test_a_body_that_is_announced_too_large_is_not_read(socket_path: Path) -> None:
    said = raw(socket_path, b"POST /ask HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n{")
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == "too_large"


def test_a_body_that_grows_too_large_is_not_read_to_its_end(socket_path: Path) -> None:
    chunk = b"%x\r\n%b\r\n" % (100_000, b" " * 100_000)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(socket_path))
        connection.sendall(b"POST /ask HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(chunk * 10)  # exactly what is allowed
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(chunk)
        assert received(connection).startswith(b"HTTP/1.1 413")


def test_a_body_of_the_largest_size_is_read(http: httpx.Client) -> None:
    body = b'{"question": "a"}'
    assert http.post("/ask", content=body.ljust(MEGABYTE)).status_code == 200
    assert http.post("/ask", content=body.ljust(MEGABYTE + 1)).status_code == 413


def test_a_body_that_does_not_come_is_not_waited_for(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "PATIENCE", 0.05)
    said = raw(socket_path, b"POST /ask HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\n{")
    assert said.startswith(b"HTTP/1.1 408")
    assert b'"code":"too_slow"' in said


def test_a_hundred_megabytes_are_refused_while_they_are_sent(http: httpx.Client) -> None:
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += MEGABYTE
            yield b" " * MEGABYTE

    try:
        response = http.post("/ask", content=pieces())
        assert response.status_code == 413
    except httpx.TransportError:  # the connection was closed while it was still sending
        pass
    assert sent < 100 * MEGABYTE


@pytest.mark.parametrize(("query", "ok"), [("", True), ("?limit=1", True), ("?limit=100000", True)])
def test_a_limit_in_the_query_is_a_whole_number(query: str, ok: bool, http: httpx.Client) -> None:
    assert (http.get(f"/journal{query}").status_code == 200) is ok


@pytest.mark.parametrize("limit", ["0", "-1", "1.5", "", "NaN", "100001", "1" * 500, "٣"])
def test_a_bad_limit_in_the_query_is_refused(limit: str, http: httpx.Client) -> None:
    response = http.get("/journal", params={"limit": limit})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "limit")


def test_callers_who_leave_while_they_send_do_no_harm(socket_path: Path, http: httpx.Client) -> None:
    def leave(body: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(socket_path))
            connection.sendall(b"POST /ask HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\n" + body)

    leaving = [threading.Thread(target=leave, args=(b"{" * number,)) for number in range(10)]
    for thread in leaving:
        thread.start()
    for thread in leaving:
        thread.join()
    answer: dict[str, Any] = http.post("/ask", json={"question": "a"}).json()
    assert answer["text"] == "Two years [1]."


def test_who_is_answered_before_he_has_said_all_is_hung_up_on(tmp_path: Path) -> None:
    path = tmp_path / "a" / "e.sock"
    with served(FakeRAG(tmp_path), path, ready=False), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(path))
        connection.sendall(b"POST /ask HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n{")
        said = received(connection)  # to the end: it is not kept open until the rest has come
    assert b"Loading model" in said
    assert b"connection: close" in said.lower()


def test_who_is_refused_after_he_has_said_all_may_ask_again(socket_path: Path) -> None:
    bad = b'{"question": ""}'
    asking = b"POST /ask HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(bad), bad)
    last = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    said = raw(socket_path, asking + last)
    assert said.count(b"HTTP/1.1 ") == 2
