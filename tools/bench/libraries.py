"""Temporary libraries filled the way a user fills one, and their parts for measuring."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct

from edge_rag import EdgeRAG
from edge_rag.config import Settings, models_folder
from edge_rag.native.device import physical_cores
from edge_rag.native.embedder import Embedder
from edge_rag.store.database import Database
from edge_rag.store.manifest import bundled_manifest
from edge_rag.store.models import ModelFolder
from tools.bench.data import Dataset
from tools.bench.metrics import Span


class Places(Struct, frozen=True):
    """Where each chunk of a library stands, by its id."""

    spans: dict[int, Span]

    def of(self, ids: list[int]) -> list[Span]:
        """The spans of these chunks, in order."""
        return [self.spans[chunk_id] for chunk_id in ids]


def fill(folder: Path, dataset: Dataset, settings: Settings) -> None:
    """Add the dataset's files to a new library in `folder`."""
    with EdgeRAG.open(folder, settings=settings) as rag:
        report = rag.add(*dataset.files)
    if report.failed:
        raise SystemExit(f"{dataset.name}: {report.failed[0].path}: {report.failed[0].reason}")


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Database]:
    """The database of a library."""
    with Database(folder) as database:
        yield database


def places(database: Database) -> Places:
    """Where all chunks stand."""
    with database.read() as connection:
        rows: list[Any] = connection.execute(
            """SELECT c.id, d.path, c.start, c."end" FROM chunks c JOIN documents d ON d.id = c.document_id"""
        ).fetchall()
    return Places({chunk_id: Span(path, start, end) for chunk_id, path, start, end in rows})


def model_folder(settings: Settings) -> ModelFolder:
    """The models of this machine."""
    return ModelFolder(models_folder(settings), bundled_manifest())


def threads(settings: Settings) -> int:
    """Threads as the product uses them."""
    return settings.engine.threads or physical_cores()


def embedder(settings: Settings) -> Embedder:
    """The embedder as the product makes it."""
    models = model_folder(settings)
    spec = models.spec(settings.models.embedder)
    return Embedder(models.path(spec.name), models.path(spec.tokenizer), threads=threads(settings))
