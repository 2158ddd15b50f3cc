"""The protocol of sd_notify, against a datagram socket as systemd has one."""

import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_rag.server.notify import Notifier


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """systemd's end, and its name in the environment."""
    name = str(tmp_path / "notify") if request.param == "file" else f"@edge_rag-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.settimeout(10)
        listening.bind(f"\0{name[1:]}" if name.startswith("@") else name)
        yield listening, name


def test_each_word_is_one_datagram(manager: tuple[socket.socket, str]) -> None:
    listening, name = manager
    with Notifier({"NOTIFY_SOCKET": name}) as notifier:
        notifier.status("loading models")
        notifier.ready("serving")
        notifier.alive()
        notifier.stopping("finishing answers")
    assert [listening.recv(4096) for _ in range(4)] == [
        b"STATUS=loading models",
        b"READY=1\nSTATUS=serving",
        b"WATCHDOG=1",
        b"STOPPING=1\nSTATUS=finishing answers",
    ]


def test_without_a_manager_nothing_is_said() -> None:
    with Notifier({"WATCHDOG_USEC": "1000000"}) as notifier:
        notifier.ready("serving")
        assert notifier.watchdog == 0.0


def test_a_manager_that_is_gone_does_no_harm(tmp_path: Path) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    notifier.ready("serving")
    notifier.close()
    notifier.close()
    notifier.ready("serving")


def test_a_manager_that_does_not_read_holds_nothing_up(manager: tuple[socket.socket, str]) -> None:
    with Notifier({"NOTIFY_SOCKET": manager[1]}) as notifier:
        for _ in range(10_000):  # far more than a datagram socket holds
            notifier.alive()
    assert manager[0].recv(4096) == b"WATCHDOG=1"


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "3000000"}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid() + 1)}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
        ({}, 0.0),
    ],
)
def test_the_watchdog_is_fed_at_half_its_time(
    environment: dict[str, str], seconds: float, manager: tuple[socket.socket, str]
) -> None:
    with Notifier({"NOTIFY_SOCKET": manager[1]} | environment) as notifier:
        assert notifier.watchdog == seconds
