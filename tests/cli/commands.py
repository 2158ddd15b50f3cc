"""`edge-rag` called in this process, over a server's socket or by itself; what it says should be the same."""

import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from edge_rag.closing import Closing
from edge_rag.runtime.status import Status
from tests.cli.test_cli_served import exit_code
from tests.server.fakes import FakeRAG


class Said:
    """What a command has printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Said) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"{self.code}\n{self.out}\n{self.err}"


class Command:
    """`edge-rag`, called in this process: over the server on `socket`, or on the data folder by itself."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.socket, self.data = folder / "run" / "e.sock", folder / "data"
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> Said:
        self._monkeypatch.setattr(sys, "argv", ["edge-rag", *arguments])
        self._capsys.readouterr()
        code = exit_code()
        return Said(code, *self._capsys.readouterr())

    def served(self, *arguments: str) -> Said:
        return self("--uds", str(self.socket), *arguments)

    def alone(self, *arguments: str) -> Said:
        return self("--data", str(self.data), *arguments)


def ways(command: Command) -> list[tuple[str, str]]:
    """The options of a call over the server and of one in process."""
    return [("--uds", str(command.socket)), ("--data", str(command.data))]


def both(command: Command, *arguments: str) -> Said:
    """What a command says, over the server as in process."""
    said = [command(*way, *arguments) for way in ways(command)]
    assert said[0] == said[1]
    return said[0]


class Held(FakeRAG, Closing):
    """A fake library that may be used in a `with`, on a machine that can be named."""

    def status(self) -> Status:
        return replace(super().status(), machine={"cpu": "a cpu", "cores": "2", "memory": "8 GB"})
