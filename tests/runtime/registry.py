"""A library of nine passages and a registry of adapters, which are files of a few bytes; questions are unit vectors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from edge_rag.native.llama import Model
from edge_rag.policy.prompt import LAYOUT_VERSION
from edge_rag.runtime.adapter_pager import Pager
from edge_rag.store.adapters import AdapterFolder, Questions
from edge_rag.store.database import Database
from tests.store.adapter_samples import add_adapter, all_adapters

SIZE = 8  # dimensions of a question
BUDGET = 1 << 20


class Registry(Struct):
    """Where adapters are registered and paged."""

    database: Database
    folder: AdapterFolder
    pager: Pager

    def add(self, number: int, *members: int, questions: Questions | None = None, **more: Any) -> str:
        """Register an adapter that answers questions in direction 0, unless it is said otherwise; its id."""
        return add(self.database, self.folder, number, *members, questions=questions, **more)


@contextmanager
def opened(toy: Model, data: Path) -> Iterator[Registry]:
    """The registry of the library in `data`."""
    folder = AdapterFolder(data / "adapters")
    with Database(data) as database, Pager(toy, folder.path, BUDGET) as pager:
        yield Registry(database, folder, pager)


def unit(place: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.eye(SIZE, dtype=np.float32)[place]


def trained(*places: int, f1: float = 1.0) -> Questions:
    """Questions in these directions, all of them answered so well."""
    vectors = np.stack([unit(place) for place in places]).astype(np.float16)
    return Questions(tuple(f"Question {place}?" for place in places), vectors, np.full(len(places), f1, np.float32))


def add(
    database: Database,
    folder: AdapterFolder,
    number: int,
    *members: int,
    questions: Questions | None = None,
    **more: Any,
) -> str:
    """Register an adapter that answers questions in direction 0, unless it is said otherwise; its id."""
    values = {"layout": LAYOUT_VERSION, **more}
    return add_adapter(database, folder, number, *members, questions=questions or trained(0), **values).id


def state(database: Database, id: str) -> tuple[str, str]:
    [found] = [each for each in all_adapters(database) if each.id == id]
    return found.state, found.reason


def spoil(folder: AdapterFolder, id: str) -> None:
    """Change a file without changing its size."""
    path = folder.path(id)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
