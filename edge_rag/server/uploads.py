"""Files that callers send (`forms` receives them): kept below the data folder, and added to the library.

A name that a caller gives is never a path: only its last part is used, without anything that a file system or a
terminal could take for more than a letter. The same name again replaces the document, as adding a changed file does;
when the new file cannot be read, the old one stays. A name is in work for one caller at a time; the lock is held for
moments only, so that whoever removes a document does not wait until another one is read.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from msgspec import Struct

from edge_rag.errors import Busy, EdgeRAGError, InputError, StorageError
from edge_rag.records import AddReport, Document, Filter
from edge_rag.runtime.ingest import AddProgress
from edge_rag.runtime.rag import EdgeRAG

FOLDER = "uploads"  # in the data folder
NAME_BYTES = 200
SUFFIX_BYTES = 20
HIDDEN_BYTES = 8  # that name a file on its way
LEFT_BEHIND = 86_400.0  # seconds after which such a file is nobody's any more: its server was killed


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
    """The files that callers have sent to one library. Any thread may use it."""

    def __init__(self, rag: EdgeRAG) -> None:
        self._rag = rag
        self._folder = rag.folder.resolve() / FOLDER
        self._lock = threading.Lock()  # of the names in work, and of what is at names that are not
        self._working: set[str] = set()
        _sweep(self._folder)

    def add(self, uploads: Sequence[Upload], progress: Callable[[AddProgress], None] | None = None) -> AddReport:
        """Keep the files and add them; closes them. What the library did not take is not kept.

        Raises Busy while a file of the same name is being added.
        """
        with contextlib.ExitStack() as stack:
            for upload in uploads:
                stack.enter_context(upload.content)
            self._begin({upload.name for upload in uploads})
            return self._rag.add(*stack.enter_context(self._kept(uploads)), progress=progress)

    def discard(self, documents: Sequence[Document]) -> None:
        """Remove the files of documents that are gone, where the files were sent.

        A file stays that somebody sends again meanwhile: it is in the library again, or whoever adds it sees to it.
        """
        sent = [path for path in (Path(document.path) for document in documents) if path.parent == self._folder]
        with self._lock:
            idle = [path for path in sent if path.name not in self._working]
            again = self._stored(idle)
            for path in idle:
                if str(path) not in again:
                    path.unlink(missing_ok=True)

    def _begin(self, names: set[str]) -> None:
        with self._lock:
            if both := sorted(names & self._working):
                raise Busy("a file of this name is being added", field=both[0], remedy="try again later")
            self._working |= names

    @contextlib.contextmanager
    def _kept(self, uploads: Sequence[Upload]) -> Iterator[list[Path]]:
        """The files, whose names are in work, at their places.

        Afterwards those stay that are in the library; of others, what was before if that is there still.
        """
        placed: list[_Placed] = []
        try:
            with _mapped(self._folder):
                self._folder.mkdir(mode=0o700, exist_ok=True)
                placed.extend(self._place(upload) for upload in uploads)
            yield [each.path for each in placed]
        finally:
            self._settle(uploads, placed)

    def _settle(self, uploads: Sequence[Upload], placed: Sequence[_Placed]) -> None:
        hashes = {str(each.path): _sha256(each.path) for each in placed}
        with self._lock:
            self._working -= {upload.name for upload in uploads}
            try:
                stored = self._stored([each.path for each in placed])
            except EdgeRAGError:  # it is closed, or cannot be read: then all is as it was before
                stored = dict.fromkeys(hashes, "")
            for each in placed:
                _end(each, stored.get(str(each.path)), hashes[str(each.path)])

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
        return self._folder / f".{secrets.token_hex(HIDDEN_BYTES)}"

    def _stored(self, paths: Sequence[Path]) -> dict[str, str]:
        """Those of these paths that the library has, each with its document's sha256."""
        if not paths:
            return {}
        documents = self._rag.documents(Filter(documents=tuple(map(str, paths))))
        return {document.path: document.sha256 for document in documents}


def _end(placed: _Placed, stored: str | None, sha256: str) -> None:
    """Keep the file that the library has (`stored` is its sha256), or none: a removed document takes both along."""
    if stored is not None and stored != sha256 and placed.before:
        placed.before.rename(placed.path)
        return
    if placed.before:
        placed.before.unlink()
    if stored != sha256:
        placed.path.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what was on its way when a server was killed. Another living one may have younger ones there."""
    for path in folder.glob(".*"):
        with contextlib.suppress(OSError):
            age = time.time() - path.lstat().st_ctime  # since it was written or moved aside
            if re.fullmatch(rf"\.[0-9a-f]{{{2 * HIDDEN_BYTES}}}", path.name) and age > LEFT_BEHIND:
                path.unlink()


def _sha256(path: Path) -> str:
    """The hash of a file's content; of one that somebody has taken away none that a document has."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "gone"


@contextlib.contextmanager
def _mapped(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"the file cannot be kept: {error.strerror}", field=str(folder), remedy="make room there"
        ) from error
