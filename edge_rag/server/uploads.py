"""Files that callers send (`forms` receives them): kept below the data folder, and added to the library.

A name that a caller gives is never a path: only its last part is used, without anything that a file system or a
terminal could take for more than a letter. The same name again replaces the document, as adding a changed file does;
when the new file cannot be read, the old one stays.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from msgspec import Struct

from edge_rag.errors import InputError, StorageError
from edge_rag.records import AddReport, Document, Filter
from edge_rag.runtime.ingest import AddProgress
from edge_rag.runtime.rag import EdgeRAG

FOLDER = "uploads"  # in the data folder
NAME_BYTES = 200
SUFFIX_BYTES = 20


class Upload(Struct, frozen=True):
    """A file that has come: the caller's name for it, cleaned, and its content."""

    name: str
    content: BinaryIO


class _Placed(Struct, frozen=True):
    """An upload at its place; `before` is what stood there, moved away, or None."""

    path: Path
    before: Path | None


def clean_name(given: str) -> str:
    """A file name from what a caller calls a file. Raises InputError when nothing is left of it."""
    last = re.split(r"[/\\]", given)[-1]
    name = unicodedata.normalize("NFC", "".join(filter(str.isprintable, last))).strip(" .")
    suffix = Path(name).suffix if len(Path(name).suffix.encode()) <= SUFFIX_BYTES else ""
    room = NAME_BYTES - len(suffix.encode())
    stem = name.removesuffix(suffix).encode()[:room].decode(errors="ignore").rstrip(" .")
    if not stem:
        raise InputError("has no name that can be used", field="file", remedy="send a file name as well")
    return stem + suffix


class Uploads:
    """The files that callers have sent to one library. Any thread may use it; one change at a time."""

    def __init__(self, rag: EdgeRAG) -> None:
        self._rag = rag
        self._folder = rag.folder.resolve() / FOLDER
        self._lock = threading.Lock()

    def add(self, uploads: Sequence[Upload], progress: Callable[[AddProgress], None] | None = None) -> AddReport:
        """Keep the files and add them; closes them. What the library did not take is not kept."""
        with contextlib.ExitStack() as stack:
            for upload in uploads:
                stack.enter_context(upload.content)
            stack.enter_context(self._lock)
            return self._rag.add(*stack.enter_context(self._kept(uploads)), progress=progress)

    def discard(self, documents: Sequence[Document]) -> None:
        """Remove the files of documents that are gone, where the files were sent."""
        with self._lock:
            for path in [Path(document.path) for document in documents]:
                if path.parent == self._folder:
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _kept(self, uploads: Sequence[Upload]) -> Iterator[list[Path]]:
        """The files at their places. Afterwards those stay that are in the library; of others, what was before."""
        placed: list[_Placed] = []
        try:
            with _mapped(self._folder):
                self._folder.mkdir(mode=0o700, exist_ok=True)
                placed.extend(self._place(upload) for upload in uploads)
            yield [each.path for each in placed]
        finally:
            taken = self._taken([each.path for each in placed])
            for each in placed:
                _settle(each, str(each.path) in taken)

    def _place(self, upload: Upload) -> _Placed:
        path = self._folder / upload.name
        coming = self._hidden()
        try:
            with os.fdopen(os.open(coming, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                shutil.copyfileobj(upload.content, file)
        except OSError:
            coming.unlink(missing_ok=True)
            raise
        before = path.rename(self._hidden()) if path.exists() else None
        return _Placed(coming.rename(path), before)

    def _hidden(self) -> Path:
        return self._folder / f".{secrets.token_hex(8)}"

    def _taken(self, paths: Sequence[Path]) -> set[str]:
        """Those of the files whose present content is in the library."""
        if not paths:
            return set()
        documents = self._rag.documents(Filter(documents=tuple(map(str, paths))))
        return {document.path for document in documents if document.sha256 == _sha256(Path(document.path))}


def _settle(placed: _Placed, taken: bool) -> None:
    if taken:
        if placed.before:
            placed.before.unlink()
    elif placed.before:
        placed.before.rename(placed.path)
    else:
        placed.path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _mapped(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"the file cannot be kept: {error.strerror}", field=str(folder), remedy="make room there"
        ) from error
