"""Whose program is at the other end of a Unix socket: what the kernel noted (SO_PEERCRED), which nobody can forge."""

import socket
import struct
from pathlib import Path

CREDENTIALS = struct.Struct("=iII")  # struct ucred: process, user, group
KNOCK = 2.0  # seconds that a living program may take to let us in


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end of a connected Unix socket; of a listening side, who began to listen."""
    _, uid, _ = CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    return int(uid)


def listener_uid(path: Path) -> int | None:
    """The user whose program listens on the socket `path`; None when none does, or none that lets us in."""
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(KNOCK)
        try:
            caller.connect(str(path))
        except OSError:
            return None
        return peer_uid(caller)
