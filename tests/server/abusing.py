"""What tests of ill-behaved callers share: connections by hand, and what must not be logged."""

import socket
from pathlib import Path

import pytest

HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n"
CLOSE = b"Connection: close\r\n\r\n"


def connected(path: Path, sent: bytes = b"") -> socket.socket:
    """A connection on which this was sent."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))  # with a limit of time it would fail at once when many wait to be accepted
    connection.settimeout(60)
    if sent:  # sending nothing fails too, once the server has hung up
        connection.sendall(sent)
    return connection


def posted(route: bytes, body: bytes, kind: bytes = b"application/json") -> bytes:
    """A request with a body."""
    head = b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n"
    return head % (route, kind, len(body)) + body


def problems(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as an error: callers can cause none."""
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
