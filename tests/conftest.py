"""What tests share: the real small models (fetched once into the user's model folder) and the demo corpus."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from edge_rag.config import Settings, load_settings, models_folder
from edge_rag.store.manifest import bundled_manifest
from edge_rag.store.models import ModelFolder

# The settings of whoever runs the tests must not matter.
os.environ["EDGE_RAG_CONFIG"] = os.devnull

# The same examples in every run: a red gate must be about the change, not about luck.
hypothesis_settings.register_profile(
    "gate",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # that a machine is busy is no fault of a test's
)
hypothesis_settings.load_profile("gate")

SMALL_LLM = "smollm2-135m"
EMBEDDER = "all-minilm-l6-v2"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return Path(__file__).parent.parent


@pytest.fixture(scope="session")
def model_folder() -> ModelFolder:
    """The model folder, with the two small models in it."""
    folder = ModelFolder(models_folder(load_settings(environment={})), bundled_manifest())
    for name in (SMALL_LLM, EMBEDDER):
        folder.pull(name)
    return folder


@pytest.fixture(scope="session")
def small_llm(model_folder: ModelFolder) -> Path:
    """The file of SmolLM2-135M."""
    return model_folder.path(SMALL_LLM)


@pytest.fixture(scope="session")
def small_settings(model_folder: ModelFolder) -> Settings:
    """Settings that use the small models, independent of the machine's own configuration."""
    return load_settings(
        {
            "models.llm": SMALL_LLM,
            "models.folder": str(model_folder.folder),
            "answering.max_tokens": 32,
            "kv.idle": False,
        },
        environment={},
    )


@pytest.fixture(scope="session")
def corpus(repository: Path) -> Path:
    """The demo corpus' documents."""
    return repository / "tools" / "demo_corpus" / "documents"
