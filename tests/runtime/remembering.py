"""An adapter of the real small model that adds nothing to it, but is said to know a question by heart."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edge_rag.policy.prompt import LAYOUT_VERSION
from edge_rag.records import Adapter
from edge_rag.runtime.rag import EdgeRAG
from edge_rag.store.adapters import Questions, register
from tests.runtime.coursework import Shape, write_blank_lora
from tests.store.adapter_samples import unregistered

SMOL = Shape(layers=30, forward=1536, embedding=576)
ASKED = 40  # questions in its exam
SEEDS = itertools.count()  # each adapter is another one


@contextlib.contextmanager
def remembering(rag: EdgeRAG, folder: Path, question: str, *members: int) -> Iterator[Adapter]:
    """Inside, there is an adapter that covers these chunks and passed its exam, in which it was asked nothing else."""
    house = rag._house
    texts = tuple(f"{question} ({number})" for number in range(ASKED))
    vectors = np.repeat(rag.embed([question])[0], ASKED, axis=0)
    made = register(
        house.database,
        house.school.folder,
        write_blank_lora(folder / "blank.gguf", SMOL, seed=next(SEEDS)),
        unregistered(*members, base=house.base(), layout=LAYOUT_VERSION),
        Questions(texts, vectors.astype(np.float16), np.ones(ASKED, np.float32)),
    )
    assert made is not None
    house.school.refresh()
    try:
        yield made
    finally:
        rag.delete_adapter(made.id)
