"""What server tests share: a fake library that is served, and who asks it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import structlog

from tests.server.fakes import FakeRAG
from tests.server.harness import caller, served


@pytest.fixture(autouse=True)
def no_lines_in_between() -> None:
    """A server in a thread tells of its requests whenever it likes: not into pytest's output."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeRAG:
    """A library without models; its data folder is where paths may be added from."""
    folder = tmp_path_factory.mktemp("data")
    return FakeRAG(folder, server__max_body_mb=1, server__roots=(str(folder),))


@pytest.fixture(scope="module")
def socket_path(fake: FakeRAG, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket on which the fake library is served."""
    path = tmp_path_factory.mktemp("s") / "e.sock"
    with served(fake, path):
        yield path


@pytest.fixture
def http(socket_path: Path) -> Iterator[httpx.Client]:
    """A caller of that server."""
    with caller(socket_path) as client:
        yield client
