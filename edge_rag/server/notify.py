"""Telling systemd how we are (sd_notify): a datagram with lines of KEY=VALUE to the socket that NOTIFY_SOCKET names.

Without that variable nothing is sent.
"""

import contextlib
import os
import socket
from collections.abc import Mapping

from edge_rag.closing import Closing


class Notifier(Closing):
    """Speaks to the service manager, if there is one. What cannot be delivered is dropped: it is only news."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if self._address else None
        if self._socket:
            self._socket.setblocking(False)
        self.watchdog = _watchdog(environment) if self._socket else 0.0

    def close(self) -> None:
        """Say no more. Idempotent."""
        if self._socket:
            self._socket.close()
            self._socket = None

    def ready(self, status: str) -> None:
        """Requests can be served now."""
        self._send("READY=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        """What is going on, for people."""
        self._send(f"STATUS={status}")

    def stopping(self, status: str) -> None:
        """The end has begun."""
        self._send("STOPPING=1", f"STATUS={status}")

    def alive(self) -> None:
        """The watchdog need not bite. To be called every `watchdog` seconds; 0 = never."""
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if self._socket:
            with contextlib.suppress(OSError):
                self._socket.sendto("\n".join(lines).encode(), self._address)


def _address(named: str) -> str:
    """An abstract name begins with '@' in the environment, with a zero byte for the kernel."""
    return "\0" + named[1:] if named.startswith("@") else named


def _watchdog(environment: Mapping[str, str]) -> float:
    """Half of the time that systemd allows, in seconds; 0 when it does not watch, or watches another process."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    given = environment.get("WATCHDOG_USEC", "0")
    return int(given) / 2e6 if given.isdigit() else 0.0
