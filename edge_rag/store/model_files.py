"""Hashes, memos of hashes, atomic writes and space: what the model folder does to single files."""

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

import msgspec

from edge_rag.errors import StorageError
from edge_rag.store.fetching import Progress, chunks, storage_errors, tell
from edge_rag.store.manifest import MEMO_SUFFIX


class Memo(msgspec.Struct, frozen=True, kw_only=True):
    """The hash of a file that had this size and mtime when it was read."""

    sha256: str
    size: int
    mtime_ns: int


def sha256_of(file: Path, *, fresh: bool = False, progress: Progress | None = None) -> str:
    """The file's hash, from its memo unless `fresh` or the file was touched since."""
    with storage_errors(file):
        stat = file.stat()  # before the file is read: a change meanwhile makes the memo stale, not wrong
        memo = None if fresh else _read_memo(file)
        if memo and (memo.size, memo.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return memo.sha256
    digest = hash_file(file, progress)
    write_memo(file, Memo(sha256=digest, size=stat.st_size, mtime_ns=stat.st_mtime_ns))
    return digest


def hash_file(file: Path, progress: Progress | None) -> str:
    """The sha256 of a file that is read now; progress in bytes."""
    digest = hashlib.sha256()
    done = 0
    with storage_errors(file), file.open("rb") as stream:
        total = os.fstat(stream.fileno()).st_size
        for chunk in chunks(stream):
            digest.update(chunk)
            done += len(chunk)
            tell(progress, "verify", done, total)
    return digest.hexdigest()


def _read_memo(file: Path) -> Memo | None:
    try:
        return msgspec.json.decode(file.with_name(file.name + MEMO_SUFFIX).read_bytes(), type=Memo)
    except (OSError, msgspec.DecodeError):
        return None


def write_memo(file: Path, memo: Memo) -> None:
    """Remember a hash beside its file."""
    try:
        write_atomically(file.with_name(file.name + MEMO_SUFFIX), msgspec.json.encode(memo))
    except StorageError:
        return  # a read-only models folder is fine; hashing again next time is all that is lost


def write_atomically(file: Path, content: bytes) -> None:
    """Replace a small file as a whole, or not at all. Raises StorageError."""
    with storage_errors(file):
        beside = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            beside.write_bytes(content)
            sync(beside)
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def bytes_below(folder: Path) -> int:
    """Bytes of all files below `folder`; 0 when it does not exist."""
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            with suppress(FileNotFoundError):  # a pull in another process just finished
                total += (Path(parent) / file).stat().st_size
    return total


def check_space(folder: Path, need: int) -> None:
    """Raise StorageError unless `need` bytes are free in `folder`."""
    with storage_errors(folder):
        free = shutil.disk_usage(folder).free
    if need > free:
        message = f"needs {need / 1e6:,.0f} MB of free disk space, {free / 1e6:,.0f} MB are free"
        raise StorageError(message, remedy="free some, or choose another data folder", field=str(folder))
