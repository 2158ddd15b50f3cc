"""What runtime tests share: loaded small models, and a folder of generated notes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_rag.config import Settings
from edge_rag.native.embedder import Embedder
from edge_rag.native.llama import Model
from edge_rag.store.database import Database
from edge_rag.store.models import ModelFolder
from tests.runtime import registry as registries
from tests.runtime.registry import Registry
from tests.runtime.serving import Running, add_document, running

PARTS = ("pump", "filter", "valve", "battery", "display", "hose", "sensor", "tank")
NOTES = 40


@pytest.fixture(scope="session")
def embedder(model_folder: ModelFolder, small_settings: Settings) -> Embedder:
    """The embedding model of the small settings."""
    spec = model_folder.spec(small_settings.models.embedder)
    return Embedder(model_folder.path(spec.name), model_folder.path(spec.tokenizer), threads=2)


@pytest.fixture(scope="session")
def vocabulary(small_llm: Path) -> Iterator[Model]:
    """The small language model without its weights: tokens and chat template."""
    with Model(small_llm, vocab_only=True) as model:
        yield model


@pytest.fixture(scope="session")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small files that differ in length and subject."""
    folder = tmp_path_factory.mktemp("notes")
    for number in range(NOTES):
        lines = [f"# Note {number}", ""]
        for line in range(3 + number % 3):
            part, other = PARTS[(number + line) % len(PARTS)], PARTS[(3 * number + line) % len(PARTS)]
            lines += [f"On day {line} the {part} of unit {number} was joined to the {other} and ran well.", ""]
        (folder / f"note {number:02}.md").write_text("\n".join(lines))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A library of one document with nine passages."""
    with Database(tmp_path) as database:
        add_document(database, "notes.txt", 9)
    return tmp_path


@pytest.fixture
def served(toy: Model, data: Path) -> Iterator[Running]:
    """An engine of the model that the module calls `toy`, over that library."""
    with running(toy, data) as started:
        yield started


@pytest.fixture
def registry(toy: Model, data: Path) -> Iterator[Registry]:
    """Adapters of the model that the module calls `toy`, in that library."""
    with registries.opened(toy, data) as made:
        yield made
