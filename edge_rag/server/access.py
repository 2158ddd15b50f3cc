"""Who may ask. On the socket the kernel says which user calls; over TCP, on loopback only, callers send a key.

Over TCP the Host header must be a name of loopback, the address that was called, or in `server.hosts`: a web page whose
name was made to point at 127.0.0.1 (DNS rebinding) sends its own. No CORS header is ever sent, so pages of other
origins can read nothing.
"""

import hmac
import os
import stat
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from edge_rag.config import Server
from edge_rag.errors import ConfigError, EdgeRAGError
from edge_rag.server.errors import Loading, Refused, error_response

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
WHILE_LOADING = ("/health", "/metrics")
LEAST_KEY = 16  # characters


class Peer(Struct, frozen=True):
    """Who is at the other end: a user id on the socket, None over TCP."""

    uid: int | None


class Access:
    """ASGI middleware: lets through whom the settings name, once the models are loaded. Others get a refusal.

    Without a key nobody comes in over TCP.
    """

    def __init__(self, app: ASGIApp, *, settings: Server, key: bytes, ready: Callable[[], bool]) -> None:
        self.app = app
        self._users = {os.getuid(), *settings.users}
        self._hosts = {*LOOPBACK, *(host.lower() for host in settings.hosts)}
        self._key = key
        self._ready = ready

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check an HTTP request, and pass it on."""
        if scope["type"] == "http":
            try:
                self._check(scope)
            except EdgeRAGError as error:
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        peer: Peer | None = scope.get("state", {}).get("peer")
        if peer is None:
            raise Refused(403, "forbidden", "nobody knows who is asking")
        if peer.uid is None:
            self._check_headers(Headers(scope=scope), own_address(scope))
        elif peer.uid not in self._users:
            raise Refused(403, "forbidden", f"user {peer.uid} may not use this socket", remedy="see server.users")
        if not self._ready() and scope["path"] not in WHILE_LOADING:
            raise Loading

    def _check_headers(self, headers: Headers, called: str) -> None:
        host = without_port(headers.get("host", ""))
        if host not in self._hosts and host != called:
            raise Refused(403, "forbidden", "this Host may not be asked", field="Host", remedy="see server.hosts")
        scheme, _, key = headers.get("authorization", "").partition(" ")
        sent = key.strip().encode() if scheme.lower() == "bearer" else b""
        if not (self._key and hmac.compare_digest(sent, self._key)):
            raise Refused(401, "unauthorized", "the key is missing or wrong", field="Authorization")


def owner_asks(request: Request) -> bool:
    """Whether it is the server's own user who asks, over the socket."""
    peer: Peer = request.scope["state"]["peer"]
    return peer.uid == os.getuid()


def own_address(scope: Scope) -> str:
    """The address of ours that a TCP caller has called, as a Host header names it."""
    called = str(scope["server"][0])
    return f"[{called}]" if ":" in called else called


def without_port(host: str) -> str:
    """The name in a Host header, in lower case."""
    name, colon, port = host.strip().lower().rpartition(":")
    return name if colon and port.isdigit() else host.strip().lower()


def read_key(settings: Server) -> bytes:
    """The key, from a file that is ours and that nobody else can read; b"" without one. Raises ConfigError."""
    if not settings.key_file:
        return b""
    path = Path(settings.key_file).expanduser()
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            key = file.read(10_000).strip()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", field="server.key_file") from error
    if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077:
        raise ConfigError(
            f"{path} can be read by others", field="server.key_file", remedy=f"chown it to this user, chmod 600 {path}"
        )
    if len(key) < LEAST_KEY or not key.isascii():
        raise ConfigError(
            f"{path} holds less than {LEAST_KEY} plain characters",
            field="server.key_file",
            remedy=f"openssl rand -hex 32 > {path}",
        )
    return key
