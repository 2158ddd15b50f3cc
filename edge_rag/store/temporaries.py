"""Files that are being written: locked, so that those of a killed process can be told from those of a living one."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edge_rag.store.fetching import storage_errors


@contextlib.contextmanager
def locked_temporary(folder: Path, prefix: str = "") -> Iterator[tuple[int, Path]]:
    """A new locked file in `folder` (made when missing), open for writing; it goes away unless it is renamed.

    Raises StorageError when it cannot be made.
    """
    with storage_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, path = _locked(folder, prefix)
    try:
        yield descriptor, path
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def _locked(folder: Path, prefix: str) -> tuple[int, Path]:
    while True:
        descriptor, name = tempfile.mkstemp(prefix=prefix, dir=folder)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)  # a sweep came between: it saw a file that nobody had locked yet


def sweep_temporaries(folder: Path) -> None:
    """Remove the files of `folder` that no living process is writing. Raises StorageError when it cannot be listed."""
    paths: list[Path] = []
    with storage_errors(folder), contextlib.suppress(FileNotFoundError):
        paths = sorted(folder.iterdir())
    for path in paths:
        with contextlib.suppress(OSError):
            _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    # Without O_NONBLOCK, opening a pipe would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(descriptor)
