"""What tests of adapters share: passages to cover, files, records and questions."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_rag.records import Adapter, Chunk, GateReport, Kept, Recipe
from edge_rag.store import library
from edge_rag.store.adapters import AdapterFolder, Questions, adapters, questions_of, register
from edge_rag.store.database import Database

BASE = "b" * 64
LAYOUT = 3
PASSED = GateReport(
    seen=Kept(40, 0.9),
    used=Kept(38, 0.95),
    unseen=Kept(12, 0.6),
    bare=Kept(40, 0.1),
    reach=0.8,
    drift=0.01,
    passed=True,
)
RECIPE = Recipe(
    targets="ffn",
    layers="all",
    rank=16,
    epochs=8,
    examples=900,
    tokens=50_000,
    seconds=60.5,
    peak_bytes=1 << 30,
    loss=0.25,
    device="cpu",
)


def add_passages(database: Database, path: str, *texts: str, heading: str = "Heading") -> list[int]:
    """Store a document with a chunk a text; returns the chunks' ids."""
    chunks = tuple(
        Chunk(ordinal=n, text=text, heading=heading, page=None, start=0, end=len(text), tokens=1)
        for n, text in enumerate(texts)
    )
    new = library.NewDocument(path=path, title=path, kind="txt", bytes=9, sha256="0", recipe="1", chunks=chunks)
    with database.write() as connection:
        number = library.put_document(connection, new, [np.ones(8, np.float32)] * len(texts), now=1.0)
        found = connection.execute("SELECT id FROM chunks WHERE document_id = ? ORDER BY ordinal", (number,))
        return [chunk_id for (chunk_id,) in found]


def remove_document(database: Database, path: str) -> None:
    with database.write() as connection:
        document = library.find_document(connection, path)
        assert document is not None
        library.remove_document(connection, document.id)


def weights(folder: Path, number: int = 1, size: int = 5000) -> Path:
    """A file that begins like GGUF; another `number`, another content."""
    file = folder / f"trained-{number}"
    file.write_bytes(b"GGUF" + np.random.default_rng(number).bytes(size))
    return file


def embed(texts: Any) -> npt.NDArray[np.float32]:
    """Unit vectors that depend on the texts."""
    raw = np.array([[len(text), sum(map(ord, text)) % 97, 1.0] for text in texts], np.float32)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


def asked(*texts: str, f1: Any = None) -> Questions:
    marks = [np.nan] * len(texts) if f1 is None else f1
    vectors = embed(texts).astype(np.float16) if texts else np.empty((0, 0), np.float16)
    return Questions(texts, vectors, np.array(marks, np.float32))


def unregistered(*members: int, **changes: Any) -> Adapter:
    values: dict[str, Any] = {
        "id": "",
        "cluster_id": 7,
        "members": members,
        "bytes": 0,
        "base": BASE,
        "layout": LAYOUT,
        "recipe": RECIPE,
        "gate": PASSED,
        "state": "ready",
        "reason": "",
        "pinned": False,
        "made_at": 5.0,
    }
    return Adapter(**values | changes)


def add_adapter(
    database: Database,
    folder: AdapterFolder,
    number: int,
    *members: int,
    questions: Questions | None = None,
    **changes: Any,
) -> Adapter:
    """Register an adapter with a file of its own."""
    file = weights(database.path.parent, number)
    found = register(database, folder, file, unregistered(*members, **changes), questions or asked("Why?", "How?"))
    assert found is not None
    return found


def all_adapters(database: Database) -> list[Adapter]:
    with database.read() as connection:
        return adapters(connection)


def questions(database: Database, id: str) -> Questions:
    with database.read() as connection:
        return questions_of(connection, id)
