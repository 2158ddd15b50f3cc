"""The life of a server process: loading, ready, signals, draining, exit code. Only the library is fake."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.harness import caller, parsed, received


class Child:
    """A server process, and systemd's end of its notifications."""

    def __init__(self, folder: Path, *, drain: float, **environment: str) -> None:
        self.path = folder / "s" / "e.sock"
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.settimeout(60)
        self.manager.bind(str(folder / "notify"))
        own = {
            key: value for key, value in os.environ.items() if not key.startswith(("EDGE_RAG_", "NOTIFY", "WATCHDOG"))
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.fake_server", str(folder), str(self.path), str(drain)],
            env=own | {"NOTIFY_SOCKET": str(folder / "notify")} | environment,
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell starts what it puts into the background with interrupts ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def told(self, word: bytes) -> bytes:
        """The next notification that contains this."""
        while word not in (said := self.manager.recv(4096)):
            pass
        return said

    def open(self, gate: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{gate}\n")
        self.process.stdin.flush()

    def ready(self) -> None:
        self.open("load")
        self.told(b"READY=1")

    def ended(self) -> tuple[int, str, list[str]]:
        """Exit code, the last line of stdout, and the events in the log."""
        out, err = self.process.communicate(timeout=60)
        logged = [json.loads(line)["event"] if line.startswith("{") else line for line in err.splitlines()]
        return self.process.returncode, out.splitlines()[-1], logged


@contextlib.contextmanager
def child(folder: Path, *, drain: float = 60, **environment: str) -> Iterator[Child]:
    child = Child(folder, drain=drain, **environment)
    try:
        yield child
    finally:
        child.process.kill()
        child.process.communicate()
        child.manager.close()


def test_a_quiet_server_stops_at_once(tmp_path: Path) -> None:
    with child(tmp_path, drain=3600) as server:
        server.ready()
        server.process.send_signal(signal.SIGINT)
        assert server.told(b"STOPPING=1")
        code, last, logged = server.ended()
    assert (code, last) == (0, "closed")
    assert "ready" in logged
    assert not server.path.exists()


def test_a_server_without_its_models_says_so_and_ends(tmp_path: Path) -> None:
    with child(tmp_path) as server:
        server.open("No model")
        code, last, logged = server.ended()
    assert (code, last) == (3, "closed")
    assert "fake: is not on this machine — run `edge-rag models pull`" in logged
    assert "ready" not in logged


def test_a_server_can_be_stopped_while_it_loads(tmp_path: Path) -> None:
    with child(tmp_path, WATCHDOG_USEC="20000") as server:
        assert server.told(b"STATUS") == b"STATUS=loading models"
        for _ in range(3):
            assert server.told(b"WATCHDOG") == b"WATCHDOG=1"
        server.process.terminate()
        server.told(b"STOPPING=1")
        code, last, logged = server.ended()
    assert (code, last) == (0, "closed")
    assert "listening" in logged[0]


@contextlib.contextmanager
def streaming(server: Child) -> Iterator[Iterator[str]]:
    """An answer that has begun and waits; its lines."""
    with (
        caller(server.path) as http,
        http.stream("POST", "/ask", json={"question": "slow?", "stream": True}) as response,
    ):
        lines = response.iter_lines()
        assert next(lines) == "event: sources"
        yield lines


def test_a_server_loads_serves_and_finishes_what_it_has_begun(tmp_path: Path) -> None:
    with child(tmp_path) as server:
        with caller(server.path) as http:
            server.told(b"STATUS=loading models")
            assert http.get("/health").status_code == 503
            assert http.post("/ask", json={"question": "a"}).json()["error"]["message"] == "Loading model"
            server.ready()
            assert http.get("/health").json() == {"status": "ok"}
        with streaming(server) as lines:
            server.process.terminate()
            server.told(b"STOPPING=1")
            with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
                knock_on(server.path)
            server.open("slow?")
            assert "event: answer" in list(lines)
        assert server.ended()[:2] == (0, "closed")


def knock_on(path: Path) -> None:
    """Connect as long as somebody accepts."""
    while True:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))


def test_an_answer_that_takes_too_long_is_cut_off_and_told_so(tmp_path: Path) -> None:
    with child(tmp_path, drain=0.1) as server:
        server.ready()
        with streaming(server) as lines:
            server.process.terminate()
            until_error = []
            for line in lines:
                until_error.append(line)
                if line.startswith("data:") and "the server is stopping" in line:
                    break
            server.open("slow?")
            assert parsed("\n".join(until_error[-2:]))[0][1]["error"]["code"] == "busy"
            assert "event: answer" not in list(lines)
        code, last, logged = server.ended()
    assert (code, last) == (1, "closed")
    assert "answers that were cut off: 1" in logged


def test_a_second_signal_cuts_answers_off_at_once(tmp_path: Path) -> None:
    with child(tmp_path, drain=3600) as server:
        server.ready()
        with streaming(server) as lines:
            server.process.terminate()
            server.told(b"STOPPING=1")
            server.process.terminate()
            assert any("the server is stopping" in line for line in lines)
            server.open("slow?")
        assert server.ended()[:2] == (1, "closed")


@contextlib.contextmanager
def sending(path: Path, request: bytes) -> Iterator[socket.socket]:
    """A connection on which this has been sent and the server has begun to work on it."""
    with socket.socket(socket.AF_UNIX) as connection, caller(path) as http:
        connection.settimeout(60)
        connection.connect(str(path))
        connection.sendall(request)
        http.get("/health")
        yield connection


BODY = b'{"query": "slow?"}'
SEARCH = b"POST /search HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"


@pytest.mark.parametrize(("drain", "hurried"), [(0.1, False), (3600, True)], ids=["late", "hurried"])
def test_a_body_that_is_still_coming_at_the_cut_is_refused_and_counts(
    drain: float, hurried: bool, tmp_path: Path
) -> None:
    with child(tmp_path, drain=drain) as server:
        server.ready()
        with sending(server.path, SEARCH % len(BODY) + BODY[:5]) as connection:
            server.process.terminate()
            server.told(b"STOPPING=1")
            if hurried:
                server.process.terminate()
            assert b"the server is stopping" in received(connection)
        code, last, logged = server.ended()
    assert (code, last) == (1, "closed")
    assert "answers that were cut off: 1" in logged


def test_a_call_that_does_not_end_is_left_alone_and_counts(tmp_path: Path) -> None:
    with child(tmp_path, drain=0.1) as server:
        server.ready()
        with sending(server.path, SEARCH % len(BODY) + BODY) as connection:
            server.process.terminate()
            assert b"the server is stopping" in received(connection)
        code, last, logged = server.ended()
    assert (code, last) == (1, "closed")
    assert "requests that did not end: 1" in logged
    assert not any("Traceback" in line or "Exception in" in line for line in logged)


def test_a_server_whose_engine_has_failed_for_good_ends_so_that_another_is_started(tmp_path: Path) -> None:
    with child(tmp_path, drain=3600) as server:
        server.ready()
        with streaming(server) as lines:
            server.open("Engine")
            server.told(b"STOPPING=1")
            assert any("the server is stopping" in line for line in lines)
            server.open("slow?")
        code, last, logged = server.ended()
    assert (code, last) == (70, "closed")
    assert "the engine failed: a bug" in logged


def test_a_living_servers_socket_is_respected_and_a_killed_ones_taken_over(tmp_path: Path) -> None:
    with child(tmp_path) as first:
        first.ready()
        late = subprocess.run(
            [sys.executable, "-m", "tests.server.fake_server", str(tmp_path), str(first.path), "1"],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert late.returncode == 2
        assert "another server answers there" in late.stderr
        first.process.kill()
        first.process.wait()
        assert first.path.is_socket()
    (tmp_path / "notify").unlink()
    with child(tmp_path) as second:
        second.ready()
        with caller(second.path) as http:
            assert http.get("/health").status_code == 200
