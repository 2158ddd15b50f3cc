"""The folder of KV files: `<folder>/ab/ab12….kv`, one a passage, named by its key. Whole files or none.

The folder knows nothing of quantisation: it keeps named sections of bytes and a header (`kv_format`).

A file is written beside its place, synced and renamed, so that a crash or a full disk leaves the old file, the new one
or none. It is never changed afterwards: whoever has opened it reads it to its end, also when it is removed meanwhile.
Files that are being written stand in `<folder>/tmp` and are locked, so that those of a killed process can be told from
those of a living one.

Losing a file costs only time: what it holds can be computed again. So a file that cannot be used is a miss and never an
error. One that will never be usable (damaged, another library's, another generation's) is removed at once; one that
the disk does not give us now (no permission, a read error) is left alone.
"""

import contextlib
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from msgspec import Struct

from edge_rag.errors import InputError, StorageError
from edge_rag.store.fetching import storage_errors
from edge_rag.store.kv_format import (
    KVFields,
    KVHeader,
    NotOurs,
    Packed,
    Sections,
    header_end,
    lay_out,
    pack,
    parse_header,
    unpack,
)
from edge_rag.store.model_files import sync
from edge_rag.store.temporaries import locked_temporary, sweep_temporaries

logger = logging.getLogger(__name__)

T = TypeVar("T")

KEY = re.compile("[0-9a-f]{64}")
SUFFIX = ".kv"
TEMPORARY = "tmp"
HEAD = 4096  # read first: more than most headers need
# Without O_NONBLOCK, opening a pipe that has our name would wait for ever.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class StoredKV(Struct, frozen=True):
    """A file that was read: its header, and its sections by name, read-only. They share one buffer of the file's bytes.

    Sections that were stored compressed have buffers of their own.
    """

    header: KVHeader
    sections: dict[str, memoryview]


class KVFolder:
    """The KV files of one library. Any number of processes and threads may use a folder at once.

    library: the library's id; generation: see `KVHeader`; zstd_level: for sections where compression pays.
    Keys must be 64 hexadecimal digits in lower case, else InputError is raised.
    """

    def __init__(self, folder: Path, *, library: str, generation: str, zstd_level: int = 1) -> None:
        self.folder = folder
        self.library = library
        self.generation = generation
        self._level = zstd_level

    def path(self, key: str) -> Path:
        """Where the file with this key is, if there is one."""
        if not KEY.fullmatch(key):
            raise InputError(f"{key!r} is no key", field="key")
        return self.folder / key[:2] / (key + SUFFIX)

    def write(self, fields: KVFields, sections: Sections) -> int:
        """Write a file, replacing the one with the same key, and return its bytes. Sections must be C-contiguous.

        Raises StorageError when the disk is full or cannot be written; nothing has changed then.
        """
        path = self.path(fields.key)
        packed = [pack(name, content, self._level) for name, content in sections.items()]
        header, head = lay_out(fields, self.library, self.generation, packed)
        with storage_errors(path):
            for folder in (self.folder, path.parent):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked_temporary(self.folder / TEMPORARY, fields.key + ".") as (descriptor, temporary):
                _fill(descriptor, head, header, packed)
                temporary.replace(path)
            sync(path.parent)
        return header.size

    def read(self, key: str) -> StoredKV | None:
        """The file with this key, all checksums verified, or None: a miss. A file that is not ours is removed."""
        return self._attempt(key, self._read_all)

    def header(self, key: str) -> KVHeader | None:
        """The header of the file with this key or None, as `read`, but the sections are not looked at."""
        return self._attempt(key, self._read_header)

    def _attempt(self, key: str, reader: Callable[[str, int], T]) -> T | None:
        try:
            with _opened(self.path(key)) as descriptor:
                return reader(key, descriptor)
        except FileNotFoundError:
            return None
        except NotOurs as fault:
            logger.warning("KV file %s is removed: %s", key, fault)
            self._discard(key)
        except OSError as error:
            logger.warning("KV file %s cannot be read: %s", key, error)
        return None

    def _discard(self, key: str) -> None:
        try:
            self.remove(key)
        except StorageError as error:
            logger.warning("KV file %s cannot be removed: %s", key, error)

    def owner(self, key: str) -> int | None:
        """The chunk that a file says it is of, whichever library or generation made it; None when it says nothing."""
        try:
            with _opened(self.path(key)) as descriptor:
                return _parse(key, descriptor).chunk_id
        except (NotOurs, OSError):
            return None

    def _read_header(self, key: str, descriptor: int) -> KVHeader:
        header = _parse(key, descriptor)
        if header.library != self.library:
            raise NotOurs("it belongs to another library")
        if header.generation != self.generation:
            raise NotOurs(f"it was made by {header.generation}")
        return header

    def _read_all(self, key: str, descriptor: int) -> StoredKV:
        header = self._read_header(key, descriptor)
        buffer = _read_exactly(descriptor, header.start, header.size - header.start)
        sections = {}
        for section in header.sections:
            start = section.offset - header.start
            sections[section.name] = unpack(section, buffer[start : start + section.stored])
        return StoredKV(header, sections)

    def remove(self, key: str) -> None:
        """Remove the file with this key, if there is one. Raises StorageError when it cannot be removed."""
        path = self.path(key)
        with storage_errors(path):
            path.unlink(missing_ok=True)

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Key and bytes of every file, none of them opened; -1 bytes for what has a file's name and is none.

        Raises StorageError when a folder cannot be listed: its files are not gone.
        """
        for shard in _entries(self.folder):
            if re.fullmatch("[0-9a-f]{2}", shard.name) and shard.is_dir(follow_symlinks=False):
                for entry in _entries(Path(shard.path)):
                    key = entry.name.removesuffix(SUFFIX)
                    if entry.name != key and KEY.fullmatch(key) and key.startswith(shard.name):
                        yield from _size(key, entry)

    def scan(self) -> Iterator[tuple[str, KVHeader | None]]:
        """Key and header of every file; None for one that is not ours and should be removed. Bodies are not read.

        A file that the disk does not give us now is left out. Raises StorageError as `sizes`.
        """
        for key, _ in self.sizes():
            try:
                with _opened(self.path(key)) as descriptor:
                    yield key, self._read_header(key, descriptor)
            except NotOurs:
                yield key, None
            except OSError as error:
                logger.warning("KV file %s cannot be read: %s", key, error)

    def sweep_temps(self) -> None:
        """Remove the temporary files that no living process is writing."""
        sweep_temporaries(self.folder / TEMPORARY)


def _size(key: str, entry: os.DirEntry[str]) -> Iterator[tuple[str, int]]:
    with contextlib.suppress(FileNotFoundError):  # it was just removed
        status = entry.stat(follow_symlinks=False)
        yield key, status.st_size if stat.S_ISREG(status.st_mode) else -1


def _parse(key: str, descriptor: int) -> KVHeader:
    """The header of a whole file with this key. Raises NotOurs."""
    head = os.pread(descriptor, HEAD, 0)
    end = header_end(head)
    size = os.fstat(descriptor).st_size
    if len(head) < end <= size:
        head = os.pread(descriptor, end, 0)
    header = parse_header(head)
    if header.size != size:
        raise NotOurs("it is torn")
    if header.key != key:
        raise NotOurs("it holds something else than its name says")
    return header


def _fill(descriptor: int, head: bytes, header: KVHeader, packed: list[Packed]) -> None:
    """Write a file's bytes and make them durable."""
    with open(descriptor, "wb", closefd=False) as file:
        file.write(head)
        for section, place in zip(packed, header.sections, strict=True):
            file.write(bytes(place.offset - file.tell()))
            file.write(section.data)
        file.flush()
        os.fsync(descriptor)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of a regular file. Raises NotOurs when the path is something else, OSError as the disk does."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise NotOurs("it is not a regular file")
    descriptor = os.open(path, _READ)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_exactly(descriptor: int, offset: int, size: int) -> memoryview:
    """`size` bytes from `offset` on. Raises NotOurs when there are fewer."""
    buffer = np.empty(size, dtype=np.uint8).data  # unlike a bytearray it is not filled with zeros first
    done = 0
    while done < size:
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            raise NotOurs("it is torn")
        done += count
    return buffer


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, by name; nothing when there is no folder. Raises StorageError when it cannot be read."""
    with storage_errors(folder), contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)
    return []
