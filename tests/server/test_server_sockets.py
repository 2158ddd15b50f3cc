"""The sockets are ours: nobody else can reach them, a dead server's is replaced, a living one's never."""

import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import platformdirs
import pytest

from edge_rag.config import Server, socket_path
from edge_rag.errors import ConfigError, StorageError, UsageError
from edge_rag.server.sockets import Sockets, bind_tcp, bind_unix, inherited, loopback

root_only = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def abandoned(path: Path) -> None:
    """A socket whose server is dead."""
    path.parent.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


@contextlib.contextmanager
def answering(path: Path) -> Iterator[socket.socket]:
    """A living server's socket."""
    with bind_unix(path) as living:
        yield living


def test_folder_and_socket_are_closed_to_others_from_the_start(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with bind_unix(tmp_path / "a" / "b" / "e.sock"):
            assert mode(tmp_path / "a") == mode(tmp_path / "a" / "b") == 0o700
            assert mode(tmp_path / "a" / "b" / "e.sock") == 0o600
        assert os.umask(0) == 0  # it was put back
    finally:
        os.umask(before)


def test_a_shared_socket_can_be_connected_to_but_not_replaced(tmp_path: Path) -> None:
    with bind_unix(tmp_path / "a" / "e.sock", shared=True):
        assert mode(tmp_path / "a") == 0o755
        assert mode(tmp_path / "a" / "e.sock") == 0o666


@pytest.mark.parametrize(("loose", "shared"), [(0o755, False), (0o710, False), (0o701, False), (0o777, True)])
def test_a_folder_that_others_can_enter_is_refused(loose: int, shared: bool, tmp_path: Path) -> None:
    tmp_path.chmod(loose)
    with pytest.raises(StorageError, match="closed to others"):
        bind_unix(tmp_path / "e.sock", shared=shared)
    assert list(tmp_path.iterdir()) == []


def test_a_link_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(StorageError, match="closed to others"):
        bind_unix(tmp_path / "link" / "e.sock")


@root_only
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o700)
    os.chown(tmp_path / "a", 65534, 65534)
    with pytest.raises(StorageError, match="closed to others"):
        bind_unix(tmp_path / "a" / "e.sock")


def test_a_file_where_the_folder_should_be_is_an_error_of_the_place(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(StorageError, match="no socket can be made there"):
        bind_unix(tmp_path / "a" / "e.sock")


def test_a_path_that_is_too_long_is_an_error_of_the_place(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no socket can be made there"):
        bind_unix(tmp_path / ("a" * 100) / "e.sock")


def test_a_dead_servers_socket_is_replaced(tmp_path: Path) -> None:
    abandoned(tmp_path / "e.sock")
    with bind_unix(tmp_path / "e.sock"), socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(tmp_path / "e.sock"))


def test_a_living_servers_socket_is_left_alone(tmp_path: Path) -> None:
    with answering(tmp_path / "e.sock") as living:
        inode = (tmp_path / "e.sock").lstat().st_ino
        with pytest.raises(UsageError, match="another server answers there"):
            bind_unix(tmp_path / "e.sock")
        assert (tmp_path / "e.sock").lstat().st_ino == inode
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(tmp_path / "e.sock"))
            living.accept()[0].close()


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "e.sock").write_text("mine")
    with pytest.raises(StorageError, match="is no socket"):
        bind_unix(tmp_path / "e.sock")
    assert (tmp_path / "e.sock").read_text() == "mine"


def test_of_two_servers_that_start_at_once_one_wins(tmp_path: Path) -> None:
    abandoned(tmp_path / "e.sock")
    won: list[socket.socket] = []
    lost: list[UsageError] = []

    def start() -> None:
        try:
            won.append(bind_unix(tmp_path / "e.sock"))
        except UsageError as error:
            lost.append(error)

    before = os.umask(0o027)
    try:
        starting = [threading.Thread(target=start) for _ in range(8)]
        for thread in starting:
            thread.start()
        for thread in starting:
            thread.join()
        assert (len(won), len(lost)) == (1, 7)
        assert os.umask(0o027) == 0o027  # it was put back
    finally:
        os.umask(before)
    won[0].close()


# --- all sockets of a server -----------------------------------------------------------------------------------------


def test_the_file_goes_when_the_server_ends(tmp_path: Path) -> None:
    path = tmp_path / "a" / "e.sock"
    with Sockets(Server(uds=str(path)), {}) as sockets:
        assert [each.family for each in sockets.listening] == [socket.AF_UNIX]
        assert path.is_socket()
    assert not path.exists()


def test_another_servers_file_stays_when_the_server_ends(tmp_path: Path) -> None:
    path = tmp_path / "a" / "e.sock"
    sockets = Sockets(Server(uds=str(path)), {})
    path.unlink()
    abandoned(path)
    sockets.close()
    sockets.close()
    assert path.is_socket()


def test_another_servers_file_stays_that_came_while_this_one_was_finishing_answers(tmp_path: Path) -> None:
    path = tmp_path / "a" / "e.sock"
    sockets = Sockets(Server(uds=str(path)), {})
    for each in sockets.listening:  # the kernel lets go of the inode: a file system may use its number at once
        each.close()
    path.unlink()
    abandoned(path)
    sockets.close()
    assert path.is_socket()


def test_the_default_place_is_the_users_runtime_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert socket_path(Server()) == Path(platformdirs.user_runtime_path("edge_rag", False)) / "edge_rag.sock"
    with Sockets(Server(), {}):
        assert socket_path(Server()).is_socket()


def test_users_on_the_list_can_connect(tmp_path: Path) -> None:
    with Sockets(Server(uds=str(tmp_path / "a" / "e.sock"), users=(1234,)), {}):
        assert mode(tmp_path / "a" / "e.sock") == 0o666


def test_tcp_without_a_key_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a key"):
        Sockets(Server(uds=str(tmp_path / "a" / "e.sock"), tcp="127.0.0.1:0"), {})
    assert not (tmp_path / "a" / "e.sock").exists()


def test_tcp_comes_beside_the_socket(tmp_path: Path) -> None:
    settings = Server(uds=str(tmp_path / "a" / "e.sock"), tcp="[::1]:0", key_file="key")
    with Sockets(settings, {}) as sockets:
        assert [each.family for each in sockets.listening] == [socket.AF_UNIX, socket.AF_INET6]


def test_a_port_that_is_taken_is_an_error() -> None:
    with bind_tcp("127.0.0.1:0") as first, pytest.raises(UsageError, match="cannot listen there"):
        bind_tcp(f"127.0.0.1:{first.getsockname()[1]}")


@pytest.mark.parametrize(
    ("address", "pair"),
    [("127.0.0.1:80", ("127.0.0.1", 80)), ("localhost:0", ("127.0.0.1", 0)), ("[::1]:65535", ("::1", 65535))],
)
def test_loopback_addresses_are_taken(address: str, pair: tuple[str, int]) -> None:
    assert loopback(address) == pair


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0:80", "192.168.0.1:80", "[::]:80", ":80", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:65536", "a:1", ""],
)
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        loopback(address)


# --- sockets that systemd hands over ---------------------------------------------------------------------------------

HANDED = """
import os, sys
from edge_rag.config import Server, socket_path
from edge_rag.errors import EdgeRAGError
from edge_rag.server.sockets import Sockets
os.environ["LISTEN_PID"] = str(os.getpid() + int(sys.argv[1]))
os.dup2(int(sys.argv[2]), 3)
try:
    with Sockets(Server(uds=sys.argv[3])) as sockets:
        print(*(f"{each.fileno()} {each.getsockname()}" for each in sockets.listening))
        print(os.get_inheritable(sockets.listening[0].fileno()), sorted(set(os.environ) & {"LISTEN_FDS", "LISTEN_PID"}))
except EdgeRAGError as error:
    print(error)
"""


def handed_over(passed: socket.socket, path: Path, *, other_process: bool = False) -> list[str]:
    """What a child process that was handed the socket says of the sockets it listens on."""
    command = [sys.executable, "-c", HANDED, str(int(other_process)), str(passed.fileno()), str(path)]
    own = os.environ | {"LISTEN_FDS": "1"}
    done = subprocess.run(command, env=own, pass_fds=[passed.fileno()], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_socket_that_is_handed_over_is_taken(tmp_path: Path) -> None:
    with bind_unix(tmp_path / "a" / "passed.sock") as passed:
        said = handed_over(passed, tmp_path / "a" / "own.sock")
    assert said == [f"3 {tmp_path}/a/passed.sock", "False []"]
    assert (tmp_path / "a" / "passed.sock").exists()  # it is systemd's
    assert not (tmp_path / "a" / "own.sock").exists()


def test_a_socket_for_another_process_is_not_taken(tmp_path: Path) -> None:
    with bind_unix(tmp_path / "a" / "passed.sock") as passed:
        said = handed_over(passed, tmp_path / "a" / "own.sock", other_process=True)
    assert said[0].endswith(f" {tmp_path}/a/own.sock")


def test_a_socket_that_does_not_listen_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as passed:
        assert "does not listen" in handed_over(passed, tmp_path / "a" / "own.sock")[0]


def test_tcp_that_is_handed_over_needs_loopback_and_a_key(tmp_path: Path) -> None:
    with bind_tcp("127.0.0.1:0") as passed:
        assert "needs a key" in handed_over(passed, tmp_path / "own.sock")[0]
    with socket.create_server(("0.0.0.0", 0)) as passed:
        assert "loopback" in handed_over(passed, tmp_path / "own.sock")[0]


def test_without_systemd_nothing_is_handed_over() -> None:
    assert inherited({}) == []
    assert inherited({"LISTEN_FDS": "1"}) == []
