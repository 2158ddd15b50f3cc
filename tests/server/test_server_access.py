"""Who is let in: by user id on the socket, by key and Host over TCP; nobody before the models are loaded."""

import contextlib
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from edge_rag.config import Server
from edge_rag.errors import ConfigError
from edge_rag.server.access import own_address, read_key, without_port
from edge_rag.server.protocol import caller_uid
from edge_rag.server.sockets import bind_tcp
from tests.server.fakes import FakeRAG
from tests.server.harness import caller, raw, served

KEY = "0123456789abcdef0123"
STRANGER = 65534


def as_stranger(path: Path, sent: bytes) -> bytes:
    """What another user gets back for these bytes; the user is a child process that has given up root."""
    back, forth = socket.socketpair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child is gone at once
        child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(STRANGER)
            os.setuid(STRANGER)
            forth.sendall(raw(path, sent))
            status = 0
        except OSError as error:
            forth.sendall(type(error).__name__.encode())
        finally:
            os._exit(status)
    forth.close()
    with back:
        said = b"".join(iter(lambda: back.recv(65536), b""))
    os.waitpid(child, 0)
    return said


root_only = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
GET = b"GET /%b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can reach, unlike pytest's."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_the_kernel_says_who_is_at_the_other_end() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        assert caller_uid(ours) == os.getuid()


def test_tcp_has_no_user() -> None:
    with socket.socket() as connection:
        assert caller_uid(connection) is None


@root_only
def test_another_user_is_refused(open_folder: Path) -> None:
    rag = FakeRAG(open_folder)
    with served(rag, open_folder / "e.sock", shared=True):
        said = as_stranger(open_folder / "e.sock", GET % b"documents")
        assert said.startswith(b"HTTP/1.1 403")
        assert b"connection: close" in said.lower()
        assert b"user 65534 may not use this socket" in said
        assert as_stranger(open_folder / "e.sock", GET % b"health").startswith(b"HTTP/1.1 403")
    assert not rag.calls


@root_only
def test_a_user_on_the_list_is_let_in_and_adds_by_upload_only(open_folder: Path) -> None:
    rag = FakeRAG(open_folder, server__users=(STRANGER,))
    with served(rag, open_folder / "e.sock", shared=True):
        assert as_stranger(open_folder / "e.sock", GET % b"documents").startswith(b"HTTP/1.1 200")
        body = b'{"paths": ["/etc"]}'
        add = b"POST /documents HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        said = as_stranger(open_folder / "e.sock", add + body)
        assert said.startswith(b"HTTP/1.1 403")
        assert b"upload the files" in said
    assert [call[0] for call in rag.calls] == ["documents"]


@root_only
def test_the_kernel_keeps_others_off_the_socket(open_folder: Path) -> None:
    folder = open_folder / "own"
    with served(FakeRAG(open_folder), folder / "e.sock"):
        assert as_stranger(folder / "e.sock", GET % b"health") == b"PermissionError"
        folder.chmod(0o755)  # the socket's own mode must do as well
        assert as_stranger(folder / "e.sock", GET % b"health") == b"PermissionError"


@contextlib.contextmanager
def tcp(folder: Path, host: str = "127.0.0.1", **flags: object) -> Iterator[tuple[FakeRAG, str]]:
    """A server with a key, and its address."""
    key = folder / "key"
    key.touch(0o600)
    key.write_text(f"{KEY}\n")
    rag = FakeRAG(folder, server__key_file=str(key), **flags)
    listening = bind_tcp(f"{host}:0")
    address = f"http://{host}:{listening.getsockname()[1]}"
    with served(rag, folder / "e.sock", listening):
        yield rag, address


def test_over_tcp_the_key_opens(tmp_path: Path) -> None:
    with tcp(tmp_path) as (rag, address):
        for key in ("", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, "Bearer \xff"):
            response = httpx.get(f"{address}/documents", headers={"Authorization": key.encode("latin-1")})
            assert (response.status_code, response.json()["error"]["code"]) == (401, "unauthorized")
            assert KEY not in response.text
        assert httpx.get(f"{address}/health").status_code == 401
        assert not rag.calls
        for scheme in ("Bearer", "bearer"):
            right = {"Authorization": f"{scheme} {KEY}"}
            assert httpx.get(f"{address}/documents", headers=right).status_code == 200


def test_over_tcp_a_foreign_host_is_refused_even_with_the_key(tmp_path: Path) -> None:
    with tcp(tmp_path, server__hosts=("Desk.local",)) as (_, address):
        port = address.rpartition(":")[2]
        right = {"Authorization": f"Bearer {KEY}"}
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example", ""):
            response = httpx.get(f"{address}/documents", headers=right | {"Host": host})
            assert (response.status_code, response.json()["error"]["param"]) == (403, "Host")
        for host in ("localhost", f"localhost:{port}", "127.0.0.1", "[::1]", f"[::1]:{port}", "desk.local:1"):
            assert httpx.get(f"{address}/documents", headers=right | {"Host": host}).status_code == 200


@pytest.mark.parametrize(("listening", "other"), [("127.0.0.2", "127.0.0.3"), ("[::1]", "[::2]")])
def test_over_tcp_the_address_that_is_listened_on_may_be_asked(listening: str, other: str, tmp_path: Path) -> None:
    with tcp(tmp_path, listening) as (_, address):
        right = {"Authorization": f"Bearer {KEY}"}
        assert httpx.get(f"{address}/documents", headers=right).status_code == 200
        assert httpx.get(f"{address}/documents", headers=right | {"Host": other}).status_code == 403


@pytest.mark.parametrize(("called", "name"), [("127.0.0.2", "127.0.0.2"), ("::1", "[::1]")])
def test_an_address_is_named_as_in_a_host_header(called: str, name: str) -> None:
    assert own_address({"server": (called, 80)}) == name


def test_over_tcp_nothing_is_added_by_path(tmp_path: Path) -> None:
    with tcp(tmp_path) as (rag, address):
        right = {"Authorization": f"Bearer {KEY}"}
        response = httpx.post(f"{address}/documents", headers=right, json={"paths": [str(tmp_path)]})
        assert response.status_code == 403
        assert not rag.calls


def test_pages_of_other_origins_get_no_permission(http: httpx.Client) -> None:
    origin = {"Origin": "http://evil.example"}
    asked = http.options("/ask", headers=origin | {"Access-Control-Request-Method": "POST"})
    assert asked.status_code == 405
    answered = http.get("/documents", headers=origin)
    for response in (asked, answered):
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_on_the_socket_any_host_will_do(http: httpx.Client) -> None:
    assert http.get("/documents", headers={"Host": "whatever.example"}).status_code == 200


def test_a_server_without_a_key_lets_nobody_in_over_tcp(tmp_path: Path) -> None:
    listening = bind_tcp("127.0.0.1:0")
    with served(FakeRAG(tmp_path), tmp_path / "e.sock", listening):
        for key in ({}, {"Authorization": "Bearer a"}):
            response = httpx.get(f"http://127.0.0.1:{listening.getsockname()[1]}/health", headers=key)
            assert response.status_code == 401


def test_while_models_are_loaded_only_health_and_metrics_answer(tmp_path: Path) -> None:
    rag = FakeRAG(tmp_path)
    with served(rag, tmp_path / "e.sock", ready=False) as service, caller(tmp_path / "e.sock") as http:
        response = http.get("/documents")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
        assert response.headers["retry-after"] == "2"
        assert not rag.calls
        assert http.get("/metrics").status_code == 200
        health = http.get("/health")
        assert health.status_code == 503
        assert health.json() == {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}
        service.ready = True
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/documents").status_code == 200


# --- the key's file --------------------------------------------------------------------------------------------------


def key_file(path: Path, text: str, mode: int = 0o600) -> Server:
    path.write_text(text)
    path.chmod(mode)
    return Server(key_file=str(path))


def test_a_key_is_read_without_its_line_end(tmp_path: Path) -> None:
    assert read_key(key_file(tmp_path / "key", f"{KEY}\n")) == KEY.encode()
    assert read_key(Server()) == b""


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o601])
def test_a_key_that_others_can_read_is_refused(mode: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can be read by others"):
        read_key(key_file(tmp_path / "key", KEY, mode))


@pytest.mark.parametrize("text", ["", "short", "                    ", "ключ" * 8])
def test_a_key_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="plain characters"):
        read_key(key_file(tmp_path / "key", text))


def test_a_key_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key(Server(key_file=str(tmp_path / "key")))


@root_only
def test_a_key_of_another_user_is_refused(tmp_path: Path) -> None:
    server = key_file(tmp_path / "key", KEY)
    os.chown(tmp_path / "key", STRANGER, STRANGER)
    with pytest.raises(ConfigError, match="can be read by others"):
        read_key(server)


@pytest.mark.parametrize(
    ("host", "name"),
    [("a:80", "a"), ("A", "a"), ("[::1]:80", "[::1]"), ("[::1]", "[::1]"), ("a:", "a:"), (":80", ""), ("a:b", "a:b")],
)
def test_a_host_is_compared_without_its_port(host: str, name: str) -> None:
    assert without_port(host) == name
