"""The sockets we listen on, made by us: uvicorn would make the Unix socket writable for everybody.

The Unix socket lies in a folder that only we can enter (0700) and is 0600 from its first moment on, so the kernel keeps
other users out before `access` asks who they are. With `server.users` both are opened to connect, and only `access`
decides. systemd may hand us sockets instead (LISTEN_FDS); the folder is then its business. To be opened before threads
start: the umask is the whole process'.
"""

import contextlib
import ipaddress
import os
import socket
import stat
import threading
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from filelock import FileLock

from edge_rag.closing import Closing
from edge_rag.config import Server, socket_path
from edge_rag.errors import ConfigError, StorageError, UsageError

FIRST_FD = 3  # of those that systemd hands over
BACKLOG = 2048
_UMASK = threading.Lock()


class Sockets(Closing):
    """The sockets to listen on. Closing them removes the Unix socket's file, if it is still ours."""

    def __init__(self, settings: Server, environment: MutableMapping[str, str] = os.environ) -> None:
        """Raises ConfigError, StorageError when the path cannot be had, UsageError when another server is there."""
        self._ours: int | None = None
        self.path: Path | None = None
        self.listening: list[socket.socket] = inherited(environment)
        try:
            if not self.listening:
                self.path = socket_path(settings)
                self.listening.append(bind_unix(self.path, shared=bool(settings.users)))
                # While it is open, no other file can have its inode's number; the socket that listens is no such thing.
                self._ours = os.open(self.path, os.O_PATH | os.O_NOFOLLOW)
            if settings.tcp:
                self.listening.append(bind_tcp(settings.tcp))
            if not settings.key_file and any(each.family != socket.AF_UNIX for each in self.listening):
                raise ConfigError(
                    "TCP needs a key", field="server.key_file", remedy="name a file (0600) with --key-file"
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop to listen. Idempotent."""
        for each in self.listening:
            each.close()
        if self.path and self._ours is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(self.path.lstat(), os.fstat(self._ours)):
                    self.path.unlink()
            os.close(self._ours)
        self._ours = None


def bind_unix(path: Path, *, shared: bool = False) -> socket.socket:
    """Listen on a Unix socket; a file left behind by a dead server is replaced.

    `shared`: other users may connect. Raises UsageError when a server answers there, StorageError for a bad place.
    """
    with _mapped(path):
        make_folder(path.parent, shared=shared)
        with FileLock(f"{path}.lock", mode=0o600):  # two servers that start at once must not unlink each other's
            _clear(path)
            with contextlib.ExitStack() as undo:
                listening = undo.enter_context(socket.socket(socket.AF_UNIX))
                with _umask(0o111 if shared else 0o177):
                    listening.bind(str(path))
                listening.listen(BACKLOG)
                undo.pop_all()
    return listening


def make_folder(folder: Path, *, shared: bool) -> None:
    """A folder for a socket that only we can enter; when `shared`, that only we can write. Raises StorageError."""
    with _umask(0o022 if shared else 0o077):
        folder.mkdir(parents=True, exist_ok=True)
    about = folder.lstat()
    closed = 0o022 if shared else 0o077
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & closed:
        raise StorageError(
            "is not a folder of this user that is closed to others",
            field=str(folder),
            remedy=f"chmod {'755' if shared else '700'} {folder}, or name another place with --uds",
        )


def bind_tcp(address: str) -> socket.socket:
    """Listen on HOST:PORT of loopback. Raises ConfigError, and UsageError when it is taken."""
    host, port = loopback(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise UsageError(
            f"cannot listen there: {error.strerror}", field=address, remedy="choose another port"
        ) from error
    return listening


def loopback(address: str) -> tuple[str, int]:
    """HOST:PORT as a pair, when the host is this machine for itself. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    name = "127.0.0.1" if host == "localhost" else host.strip("[]")
    try:
        inside = ipaddress.ip_address(name).is_loopback and 0 <= int(port) < 65536
    except ValueError:
        inside = False
    if not inside:
        raise ConfigError(
            f"{address} is not HOST:PORT of this machine's loopback", field="server.tcp", remedy="as in 127.0.0.1:8080"
        )
    return name, int(port)


def inherited(environment: MutableMapping[str, str]) -> list[socket.socket]:
    """The sockets that systemd hands over (sd_listen_fds), if these are for us. Raises ConfigError."""
    count = environment.pop("LISTEN_FDS", "0")
    process = environment.pop("LISTEN_PID", "")
    environment.pop("LISTEN_FDNAMES", None)
    if process != str(os.getpid()):
        return []
    sockets = [socket.socket(fileno=number) for number in range(FIRST_FD, FIRST_FD + int(count))]
    for each in sockets:
        each.set_inheritable(False)
        _check_inherited(each)
    return sockets


def _check_inherited(each: socket.socket) -> None:
    if not each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ConfigError("a socket that does not listen was handed over", field="LISTEN_FDS")
    if each.family != socket.AF_UNIX:
        host, port = each.getsockname()[:2]
        loopback(f"{host}:{port}")


def _clear(path: Path) -> None:
    """Make way for a socket. Raises UsageError when somebody answers there, StorageError when it is another file."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise StorageError("is there and is no socket", field=str(path), remedy="remove it, or choose another path")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except (TimeoutError, BlockingIOError):  # alive, and busy
            pass
    raise UsageError("another server answers there", field=str(path), remedy="stop it, or choose another path (--uds)")


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    with _UMASK:  # of two threads the second would put back what the first had set
        before = os.umask(mask)
        try:
            yield
        finally:
            os.umask(before)


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"no socket can be made there: {error.strerror or error}",
            field=str(path),
            remedy="choose another path (--uds)",
        ) from error
