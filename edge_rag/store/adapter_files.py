"""The folder of adapters: `<folder>/<id>.gguf`, named by the sha256 of the content. Whole files or none, as private as
the documents that they were made from.

A file is copied beside its place and synced, and moved into place only inside the write transaction that puts its row
(`store.adapters`). It is never changed afterwards: a changed file is another adapter, or damage.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from msgspec import Struct

from edge_rag.errors import InputError
from edge_rag.store.fetching import chunks, storage_errors
from edge_rag.store.model_files import hash_file, sync
from edge_rag.store.temporaries import locked_temporary, sweep_temporaries

ID = re.compile("[0-9a-f]{64}")
SUFFIX = ".gguf"
TEMPORARY = "tmp"
MAGIC = b"GGUF"


class Copied(Struct, frozen=True):
    """A durable copy that has not got its place yet: the sha256 of its content, its bytes, and where it is now."""

    id: str
    bytes: int
    path: Path


class AdapterFolder:
    """The adapters' files of one library. Any number of processes and threads may use a folder at once.

    Ids must be 64 hexadecimal digits in lower case, else InputError is raised.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, id: str) -> Path:
        """Where the file of this adapter is, if there is one."""
        if not ID.fullmatch(id):
            raise InputError(f"{id!r} is no adapter's id", field="id")
        return self.folder / (id + SUFFIX)

    @contextmanager
    def copied(self, stream: IO[bytes]) -> Iterator[Copied]:
        """A durable copy of the rest of `stream`, mode 0600, that goes away unless it is given its place.

        Raises InputError when it is not a GGUF file, StorageError when the disk is full or cannot be written.
        """
        with storage_errors(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked_temporary(self.folder / TEMPORARY) as (descriptor, path):
            with storage_errors(self.folder):
                copy = _copy(stream, descriptor, path)
            yield copy

    def place(self, copy: Copied) -> None:
        """Give a copy its place. To be called in the write transaction that puts its row. Raises StorageError."""
        path = self.path(copy.id)
        with storage_errors(path):
            copy.path.replace(path)
            sync(self.folder)

    def verify(self, id: str) -> str:
        """What is wrong with a file that is read and hashed now, in words; '' when nothing is.

        Raises StorageError when the disk does not give it to us: that says nothing about the file.
        """
        path = self.path(id)
        with storage_errors(path):
            if not path.is_file():
                return "its file is missing"
        found = hash_file(path, None)
        return "" if found == id else f"its file was changed (sha256 {found[:12]})"

    def remove(self, id: str) -> None:
        """Remove the file of this adapter, if there is one. Raises StorageError when it cannot be removed."""
        path = self.path(id)
        with storage_errors(path):
            path.unlink(missing_ok=True)

    def sizes(self) -> dict[str, int]:
        """Bytes of every file by id, none of them opened; -1 for what has a file's name and is none.

        Raises StorageError when the folder cannot be listed: its files are not gone.
        """
        found: dict[str, int] = {}
        with storage_errors(self.folder), suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIX) and ID.fullmatch(entry.name.removesuffix(SUFFIX)):
                    found |= _size(entry)
        return found

    def sweep_temporaries(self) -> None:
        """Remove the copies that no living process is making."""
        sweep_temporaries(self.folder / TEMPORARY)


def _size(entry: os.DirEntry[str]) -> dict[str, int]:
    with suppress(FileNotFoundError):  # it was just removed
        status = entry.stat(follow_symlinks=False)
        return {entry.name.removesuffix(SUFFIX): status.st_size if stat.S_ISREG(status.st_mode) else -1}
    return {}


def _copy(stream: IO[bytes], descriptor: int, path: Path) -> Copied:
    digest, size = hashlib.sha256(), 0
    with open(descriptor, "wb", closefd=False) as file:
        for chunk in chunks(stream):
            if not size and not chunk.startswith(MAGIC):
                break
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(descriptor)
    if not size:
        raise InputError("it is not a GGUF file", field="file")
    return Copied(digest.hexdigest(), size, path)
