"""Servers for tests: the real application under uvicorn, on a real socket, in a thread of this process."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from edge_rag.server.serve import config
from edge_rag.server.service import Service
from edge_rag.server.sockets import bind_unix

Event = tuple[str, Any]


@contextlib.contextmanager
def served(rag: Any, path: Path, *others: socket.socket, ready: bool = True, shared: bool = False) -> Iterator[Service]:
    """Serve a library, real or fake, on a Unix socket and on `others`; the library is closed at the end."""
    with serving(Service(rag), bind_unix(path, shared=shared), *others, ready=ready) as service:
        yield service


@contextlib.contextmanager
def serving(service: Service, *sockets: socket.socket, ready: bool = True) -> Iterator[Service]:
    """Serve on these sockets."""
    service.ready = ready
    server = uvicorn.Server(config(service))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=list(sockets))))
    thread.start()
    try:
        yield service
    finally:
        service.rag.close()
        server.should_exit = True
        thread.join()
        service.close()


def caller(path: Path) -> httpx.Client:
    """Who asks over the socket."""
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://edge-rag", timeout=60)


def parsed(text: str) -> list[Event]:
    """The events of a stream; comments (pings) are left out."""
    told = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if fields:
            told.append((fields.get("event", "message"), json.loads(fields["data"])))
    return told


def raw(path: Path, sent: bytes) -> bytes:
    """What comes back for these bytes until the server closes."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(path))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has heard enough
            connection.sendall(sent)
        return received(connection)


def received(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    pieces = []
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)
