"""uvicorn's protocol, with what it does not do itself: who is at the other end, and an end to patience.

SO_PEERCRED is what the kernel noted when the caller connected; it cannot be forged. A caller that connects and says
nothing, or a byte a second, is dropped before it has said what it wants, and so is one that takes nothing of what it
asked for; the bodies of requests have limits of their own (`bodies`). Connections are counted by user, so that nobody
can keep another one out, and one too many is answered and closed before it has said anything: it costs no patience.
"""

import asyncio
import socket
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from edge_rag.errors import Busy, EdgeRAGError
from edge_rag.peers import peer_uid
from edge_rag.server.access import Peer
from edge_rag.server.errors import Refused, error_response

PATIENCE = 30.0  # seconds in which the head of a request must have come
READER_PATIENCE = 60.0  # seconds in which a reader must have taken what waits for him here; the kernel holds some too
CONNECTIONS = 1000  # of one user at once; who comes later is told so


def caller_uid(connection: Any) -> int | None:
    """The user at the other end of a Unix socket; None when it is no Unix socket."""
    return peer_uid(connection) if connection is not None and connection.family == socket.AF_UNIX else None


class Protocol(H11Protocol):
    """One connection. The app finds its `Peer` as `scope["state"]["peer"]`."""

    peer: Peer
    _patience: asyncio.TimerHandle | None = None
    _reader_patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Note who called, and begin to wait for what he wants."""
        super().connection_made(transport)
        # Whatever the kernel does not take starts the reader's timer, be the connection closed already.
        transport.set_write_buffer_limits(high=0)
        self.peer = Peer(caller_uid(transport.get_extra_info("socket")))
        self.app_state = {**self.app_state, "peer": self.peer}
        if self._is_crowded():
            self._refuse(Busy("there are too many connections", remedy="try again later"))
        else:
            self._be_patient()

    def _is_crowded(self) -> bool:
        peers = [each.peer for each in self.connections if isinstance(each, Protocol)]
        return peers.count(self.peer) > CONNECTIONS

    def data_received(self, data: bytes) -> None:
        """Take what has come; while no request is being answered, more must come soon."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._be_patient()
        else:
            self._be_patient(False)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._be_patient(False)
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The reader is slow; begin to wait for him."""
        super().pause_writing()
        self._reader_patience = self.loop.call_later(READER_PATIENCE, self.transport.abort)

    def resume_writing(self) -> None:
        """The reader goes on."""
        if self._reader_patience:
            self._reader_patience.cancel()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP. Behind a response that has begun there is no room for another: it is only closed."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(Refused(400, "no_http", "this is not HTTP that can be read", field="body"))
        else:
            self.transport.close()

    def _refuse(self, error: EdgeRAGError) -> None:
        """Answer without another question, and close."""
        response = error_response(error)
        status = HTTPStatus(response.status_code)
        head = [b"HTTP/1.1 %d %b" % (status, status.phrase.encode()), b"connection: close"]
        head += [b"%b: %b" % pair for pair in response.raw_headers if pair[0] != b"connection"]
        self.transport.write(b"\r\n".join([*head, b"", bytes(response.body)]))
        self.transport.close()

    def _be_patient(self, waiting: bool = True) -> None:
        """Start the timer, unless it runs; or stop it."""
        if not waiting and self._patience:
            self._patience.cancel()
            self._patience = None
        elif waiting and self._patience is None:
            self._patience = self.loop.call_later(PATIENCE, self.transport.abort)
