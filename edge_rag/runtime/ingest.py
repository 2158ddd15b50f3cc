"""Files → chunks → vectors → library. Each document is stored in one transaction, so `add` may be killed at any time.

Reading and chunking one file is quick; embedding is not. So files are collected until they make a good batch, embedded
together, and then stored one by one. What was stored stays; the next `add` skips it by its content hash.
"""

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from edge_rag.config import Ingest
from edge_rag.errors import DocumentError
from edge_rag.native.embedder import Embedder, Vectors
from edge_rag.policy.views import embedded_views
from edge_rag.reading.chunking import make_chunks
from edge_rag.reading.readers import parse, read_bytes
from edge_rag.reading.walk import Walk, find_files
from edge_rag.records import AddReport, Document, FileReport
from edge_rag.store import library
from edge_rag.store.database import Database

RECIPE_VERSION = 1  # of readers and chunking: raise it when the same file would give other chunks
BATCH_CHUNKS = 128


class AddProgress(Struct, frozen=True):
    """`done` of `total` files are finished; `current` is the last one."""

    done: int
    total: int
    current: str


class _Pending(Struct, frozen=True):
    new: library.NewDocument
    replaces: bool
    warnings: tuple[str, ...]


class Ingester:
    """Adds files to one library."""

    def __init__(
        self,
        database: Database,
        embedder: Embedder,
        count_tokens: Callable[[str], int],
        settings: Ingest,
    ) -> None:
        self._database = database
        self._embedder = embedder
        self._count_tokens = count_tokens
        self._settings = settings
        self._recipe = f"{RECIPE_VERSION}/{settings.chunk_tokens}"
        self._progress: Callable[[AddProgress], None] | None = None
        self._done = self._total = 0

    def add(
        self,
        paths: Sequence[Path],
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        prune: bool = False,
        progress: Callable[[AddProgress], None] | None = None,
    ) -> AddReport:
        """Bring the library up to date with `paths`. A file that cannot be read is reported and never stops the run.

        Documents whose file has vanished from the given folders are reported, and removed with `prune`, unless the
        whole folder is missing or empty: that is what a drive looks like that is not mounted.
        """
        started = time.perf_counter()
        settings = self._settings
        self._progress = progress
        walk = find_files(paths, include=(*settings.include, *include), exclude=(*settings.exclude, *exclude))
        reports = [FileReport(path=str(path), outcome="failed", reason=reason) for path, reason in walk.problems]
        reports += self._vanished(walk, paths, prune=prune)
        self._done, self._total = 0, len(walk.files)
        for report in self._update(walk.files):
            reports.append(report)
            self._done += 1
            self._tell(report.path)
        return AddReport(files=tuple(reports), seconds=time.perf_counter() - started)

    def _update(self, files: Sequence[Path]) -> Iterator[FileReport]:
        pending: list[_Pending] = []
        for path in files:
            prepared = self._prepare(path)
            if isinstance(prepared, FileReport):
                yield prepared
                continue
            if len(prepared.new.chunks) >= BATCH_CHUNKS:  # its neighbours need not wait for a large file
                yield from self._store(pending)
                pending = []
            pending.append(prepared)
            if sum(len(entry.new.chunks) for entry in pending) >= BATCH_CHUNKS:
                yield from self._store(pending)
                pending = []
        yield from self._store(pending)

    def _tell(self, current: str) -> None:
        if self._progress:
            self._progress(AddProgress(self._done, self._total, current))

    def _prepare(self, path: Path) -> _Pending | FileReport:
        known = self._known(str(path))
        try:
            return self._read(path, known)
        except DocumentError as error:
            reason = f"{error.message} — {error.remedy}" if error.remedy else error.message
        except Exception as error:  # a fault in a reader must not cost the other files
            reason = f"{type(error).__name__}: {error}"
        if known:
            reason += f"; what it held before stays searchable (`edge-rag rm {path}` removes it)"
        return FileReport(path=str(path), outcome="failed", reason=reason)

    def _read(self, path: Path, known: Document | None) -> _Pending | FileReport:
        data = read_bytes(path, self._settings.max_file_mb * 1_000_000)
        sha256 = hashlib.sha256(data).hexdigest()
        if known and (known.sha256, known.recipe) == (sha256, self._recipe):
            return FileReport(path=str(path), outcome="unchanged", chunks=known.chunks)
        document = parse(path, data)
        chunks = make_chunks(document, count_tokens=self._count_tokens, chunk_tokens=self._settings.chunk_tokens)
        new = library.NewDocument(
            path=str(path),
            title=document.title,
            kind=document.kind,
            bytes=len(data),
            sha256=sha256,
            recipe=self._recipe,
            chunks=chunks,
        )
        return _Pending(new, replaces=known is not None, warnings=document.warnings)

    def _store(self, pending: Sequence[_Pending]) -> Iterator[FileReport]:
        vectors = embed_chunks(
            self._embedder,
            [
                embedded_views(entry.new.title, chunk.heading, chunk.text, chunk.tokens)
                for entry in pending
                for chunk in entry.new.chunks
            ],
            lambda done, total: self._tell(f"{pending[-1].new.path} ({done} of {total} chunks)"),
        )
        start = 0
        for entry in pending:
            end = start + len(entry.new.chunks)
            with self._database.write() as connection:
                library.put_document(connection, entry.new, vectors[start:end], now=time.time())
            start = end
            yield FileReport(
                path=entry.new.path,
                outcome="replaced" if entry.replaces else "added",
                chunks=len(entry.new.chunks),
                warnings=entry.warnings,
            )

    def _known(self, path: str) -> Document | None:
        with self._database.read() as connection:
            return library.find_document(connection, path)

    def _vanished(self, walk: Walk, paths: Sequence[Path], *, prune: bool) -> list[FileReport]:
        """Documents of the given folders (or named themselves) whose file is gone."""
        with self._database.read() as connection:
            documents = library.list_documents(connection)
        roots = [*walk.folders, *(name for path in paths for name in possible_names(path))]
        gone = [
            document
            for document in documents
            if any(Path(document.path).is_relative_to(root) for root in roots) and _is_gone(Path(document.path))
        ]
        named = {str(name) for path in paths for name in possible_names(path)}
        alive = [root for root in roots if any(file.is_relative_to(root) for file in walk.files)]
        removed = [
            document
            for document in gone
            if prune and (document.path in named or any(Path(document.path).is_relative_to(root) for root in alive))
        ]
        with self._database.write() as connection:
            for document in removed:
                library.remove_document(connection, document.id)
        return [
            FileReport(
                path=document.path, outcome="removed" if document in removed else "vanished", chunks=document.chunks
            )
            for document in gone
        ]


def possible_names(path: Path) -> tuple[Path, Path]:
    """The names that a given path may have in the library: as written, and with links and '..' followed."""
    return path.absolute(), Path(os.path.realpath(path))


def _is_gone(path: Path) -> bool:
    """Whether there is no such file. One that cannot be reached for now is not gone."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def embed_chunks(
    embedder: Embedder, chunks: Sequence[Sequence[str]], progress: Callable[[int, int], None] | None = None
) -> list[Vectors]:
    """The embeddings of each chunk's views, shape [views, dimensions] each, a slice of common batches at a time.

    `progress` hears of large jobs only.
    """
    embedded: list[Vectors] = []
    for start in range(0, len(chunks), BATCH_CHUNKS):
        some = chunks[start : start + BATCH_CHUNKS]
        vectors = embedder.embed([view for views in some for view in views])
        ends = itertools.accumulate(len(views) for views in some)
        embedded += [vectors[end - len(views) : end] for views, end in zip(some, ends, strict=True)]
        if progress and len(chunks) > 2 * BATCH_CHUNKS:
            progress(len(embedded), len(chunks))
    return embedded
