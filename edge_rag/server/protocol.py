"""uvicorn's protocol, with what it does not do itself: who is at the other end, and an end to patience.

SO_PEERCRED is what the kernel noted when the caller connected; it cannot be forged. A caller that connects and says
nothing, or a byte a second, is dropped before it has said what it wants, and so is one that takes nothing of what it
asked for; the bodies of requests have limits of their own (`bodies`).
"""

import asyncio
import socket
import struct
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from edge_rag.server.access import Peer

PATIENCE = 30.0  # seconds in which the head of a request must have come
READER_PATIENCE = 60.0  # seconds in which a reader must have taken something, when much waits for him
CONNECTIONS = 1000  # at once; who comes later is told so
CREDENTIALS = struct.Struct("=iII")  # struct ucred: process, user, group


def peer_uid(connection: Any) -> int | None:
    """The user at the other end of a Unix socket; None when it is no Unix socket."""
    if connection is None or connection.family != socket.AF_UNIX:
        return None
    _, uid, _ = CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    return int(uid)


class Protocol(H11Protocol):
    """One connection. The app finds its `Peer` as `scope["state"]["peer"]`."""

    _patience: asyncio.TimerHandle | None = None
    _reader_patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Note who called, and begin to wait for what he wants."""
        super().connection_made(transport)
        peer = Peer(peer_uid(transport.get_extra_info("socket")), crowded=len(self.connections) > CONNECTIONS)
        self.app_state = {**self.app_state, "peer": peer}
        self._be_patient()

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

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; what waits for a reader who takes nothing goes with it in the end."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(READER_PATIENCE, self.transport.abort)

    def _be_patient(self, waiting: bool = True) -> None:
        """Start the timer, unless it runs; or stop it."""
        if not waiting and self._patience:
            self._patience.cancel()
            self._patience = None
        elif waiting and self._patience is None:
            self._patience = self.loop.call_later(PATIENCE, self.transport.abort)
