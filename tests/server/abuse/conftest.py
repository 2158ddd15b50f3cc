"""A server of its own for every test, over the fake library `rag` that the test's module makes."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from edge_rag.server.service import Service
from tests.server.fakes import FakeRAG
from tests.server.harness import caller, served


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a" / "e.sock"


@pytest.fixture
def service(rag: FakeRAG, path: Path) -> Iterator[Service]:
    with served(rag, path) as service:
        yield service


@pytest.fixture
def http(service: Service, path: Path) -> Iterator[httpx.Client]:
    with caller(path) as client:
        yield client
