"""A server for all tests of a module, over the library with the small model that the module makes as `rag`."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from edge_rag.runtime.rag import EdgeRAG
from edge_rag.server.service import Service
from tests.server.harness import caller, served


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s") / "e.sock"


@pytest.fixture(scope="module")
def service(rag: EdgeRAG, path: Path) -> Iterator[Service]:
    with served(rag, path) as service:
        yield service


@pytest.fixture
def http(service: Service, path: Path) -> Iterator[httpx.Client]:
    with caller(path) as client:
        yield client
