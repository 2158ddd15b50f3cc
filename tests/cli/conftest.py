"""What tests of commands share: the command, and a library that says what it is told to."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from edge_rag.runtime.rag import EdgeRAG
from tests.cli.commands import Command, Held
from tests.server.harness import served


@pytest.fixture(scope="module")
def no_lines_in_between() -> None:
    """A server in this process tells of its requests: not into what the command prints."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capsys)


@pytest.fixture
def library(command: Command, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """The library that is served, and that is opened when the command works in process."""
    library = Held(command.data.parent)
    monkeypatch.setattr(EdgeRAG, "open", lambda *_, **__: library)
    with served(library, command.socket):
        yield library
