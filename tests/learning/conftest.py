"""What tests of learning share: toy models as files, and a job that was trained within this process.

Tests of the trainer need the `train` extra and are not collected without it.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.native.tiny_models import write_tiny_model

collect_ignore_glob = [] if find_spec("torch") and find_spec("peft") else ["test_trainer_[elp]*.py"]


@pytest.fixture(scope="session")
def toy_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of the architectures that adapters are made for."""
    folder = tmp_path_factory.mktemp("toy-models")
    return {name: write_tiny_model(name, folder) for name in ("llama", "qwen2")}


@pytest.fixture(scope="session")
def toy_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where their dequantised weights are kept."""
    return tmp_path_factory.mktemp("toy-cache")


@pytest.fixture(scope="session")
def unhurried_torch() -> Iterator[None]:
    """The trainer sets torch up for a process of its own: what it sets is put back after the tests."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
