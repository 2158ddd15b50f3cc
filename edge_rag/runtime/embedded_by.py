"""Which embedding model made a library's vectors: those of another one mean nothing to it."""

from edge_rag.errors import StorageError
from edge_rag.native.embedder import Embedder
from edge_rag.records import ModelSpec
from edge_rag.store import library
from edge_rag.store.database import Database

EMBEDDER_KEY = "embedder"


def identity(spec: ModelSpec, embedder: Embedder) -> str:
    """What a library's vectors are marked with."""
    return f"{spec.name} {spec.sha256} {embedder.dimensions}"


def claim(database: Database, wanted: str) -> None:
    """Record the embedding model in a new library. Raises StorageError when an old one has another."""
    with database.write() as connection:
        if library.get_meta(connection, EMBEDDER_KEY) is None:
            library.set_meta(connection, EMBEDDER_KEY, wanted)
    check(database, wanted)


def check(database: Database, wanted: str) -> None:
    """Raise StorageError when another model made the vectors."""
    with database.read() as connection:
        stored = library.get_meta(connection, EMBEDDER_KEY)
    if stored is not None and stored != wanted:
        raise StorageError(
            f"the vectors were made by {stored.split()[0]}, not by {wanted.split()[0]}",
            field="models.embedder",
            remedy="run `edge-rag reembed`, or set the embedder back",
        )
