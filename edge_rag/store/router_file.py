"""The file that keeps what the router has learned: `<folder>/router.state`. Whole or not there, mode 0600.

A line of JSON says in which space it was learned (`tag`) and what the bytes behind it are. Losing the file costs only
time: the journal has everything that it was learned from. So what cannot be used is no error but as good as nothing,
and is removed; what the disk does not give us now is left alone.
"""

import hashlib
import logging
import os
import stat
from pathlib import Path

import msgspec
from msgspec import Struct

from edge_rag.errors import StorageError
from edge_rag.store.fetching import storage_errors
from edge_rag.store.model_files import sync
from edge_rag.store.temporaries import locked_temporary, sweep_temporaries

logger = logging.getLogger(__name__)

NAME = "router.state"
TEMPORARY = "router.tmp"
FORMAT = "edge_rag router 1"
HEAD = 4096  # bytes that the first line may have
# Without O_NONBLOCK, opening a pipe that has our name would wait for ever.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class _Head(Struct, frozen=True):
    format: str
    tag: str
    bytes: int
    sha256: str


class _NotOurs(Exception):
    """It is torn, foreign, or was learned in another space."""


def put(folder: Path, content: bytes, tag: str) -> None:
    """Keep `content` that was learned in the space `tag`, instead of what was kept before.

    Raises StorageError when the disk is full or cannot be written; nothing has changed then.
    """
    path, temporaries = folder / NAME, folder / TEMPORARY
    head = msgspec.json.encode(_Head(FORMAT, tag, len(content), hashlib.sha256(content).hexdigest()))
    with storage_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    sweep_temporaries(temporaries)
    with locked_temporary(temporaries) as (descriptor, beside), storage_errors(path):
        with open(descriptor, "wb", closefd=False) as file:
            file.writelines((head, b"\n", content))
            file.flush()
            os.fsync(descriptor)
        beside.replace(path)
        sync(folder)


def take(folder: Path, tag: str) -> bytes | None:
    """What was kept of the space `tag`; None when there is nothing, or nothing whole and of that space."""
    path = folder / NAME
    try:
        return _content(path, tag)
    except FileNotFoundError:
        return None
    except _NotOurs as fault:
        logger.warning("what the router had learned is read from the journal again: %s", fault)
        _discard(path)
    except OSError as error:
        logger.warning("what the router had learned cannot be read: %s", error)
    return None


def _content(path: Path, tag: str) -> bytes:
    """The bytes behind the first line. Raises _NotOurs, and OSError as the disk does."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise _NotOurs("it is not a regular file")
    with os.fdopen(os.open(path, _READ), "rb") as file:
        head = _parse(file.readline(HEAD), tag)
        content = file.read()
    if (len(content), hashlib.sha256(content).hexdigest()) != (head.bytes, head.sha256):
        raise _NotOurs("the file is damaged")
    return content


def _parse(line: bytes, tag: str) -> _Head:
    try:
        head = msgspec.json.decode(line, type=_Head)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _NotOurs("the file is damaged or not ours") from error
    if (head.format, head.tag) != (FORMAT, tag):
        raise _NotOurs("it belongs to other questions, another encoder or another version")
    return head


def _discard(path: Path) -> None:
    try:
        with storage_errors(path):
            path.unlink(missing_ok=True)
    except StorageError as error:
        logger.warning("the router's file cannot be removed: %s", error)
