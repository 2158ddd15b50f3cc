"""`add` may die at any moment: what was told to be stored is stored, and the next `add` finishes the rest."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_rag.store import library
from edge_rag.store.database import Connection, Database
from edge_rag.store.models import ModelFolder

KILLS = 8

Contents = dict[str, tuple[str, tuple[str, ...]]]


class Adding:
    """Starts processes that add the notes."""

    def __init__(self, repository: Path, notes: Path, models: Path) -> None:
        self.repository = repository
        self.notes = notes
        self.models = models

    def start(self, data: Path) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tests.runtime.adding", str(data), str(self.notes), str(self.models)]
        return subprocess.Popen(command, cwd=self.repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self, data: Path) -> None:
        finished(self.start(data))

    def stop_after(self, data: Path, lines: int, how: signal.Signals) -> tuple[list[str], bool]:
        """Send a signal when `lines` files were told; return the told paths, and whether the signal came in time."""
        with self.start(data) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            told = [process.stdout.readline() for _ in range(lines)]
            process.send_signal(how)
            told += process.stdout.readlines()
            in_time = process.wait() != 0
        return [line.split(" ", 1)[1].rstrip("\n") for line in told if not line.startswith("failed")], in_time


def finished(process: "subprocess.Popen[str]") -> None:
    said, complaints = process.communicate()
    assert process.returncode == 0, complaints
    assert said.splitlines()[-1] == "failed 0"


def contents(data: Path) -> Contents:
    """Path → (hash, texts of the chunks in order), after proving that the library is whole."""
    with Database(data) as database, database.write() as connection:
        assert list(library.check(connection)) == []
        return {
            document.path: (document.sha256, texts(connection, document.id))
            for document in library.list_documents(connection)
        }


def texts(connection: Connection, document_id: int) -> tuple[str, ...]:
    rows = connection.execute("SELECT text FROM chunks WHERE document_id = ? ORDER BY ordinal", (document_id,))
    return tuple(text for (text,) in rows)


@pytest.fixture(scope="module")
def adding(repository: Path, notes: Path, model_folder: ModelFolder) -> Adding:
    return Adding(repository, notes, model_folder.folder)


@pytest.fixture(scope="module")
def undisturbed(adding: Adding, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    data = tmp_path_factory.mktemp("undisturbed")
    adding.finish(data)
    expected = contents(data)
    assert set(expected) == {str(path) for path in adding.notes.iterdir()}
    return expected


def test_killing_it_again_and_again_loses_nothing_that_was_told(
    adding: Adding, undisturbed: Contents, tmp_path: Path
) -> None:
    chance = random.Random(7)
    stored: Contents = {}
    killed = 0
    for _ in range(KILLS):
        # Files that are stored already are told first or in between, so the signal may come before any new one.
        told, in_time = adding.stop_after(tmp_path, min(len(stored) + chance.randrange(6), 38), signal.SIGKILL)
        killed += in_time
        before, stored = stored, contents(tmp_path)
        assert set(told) <= set(stored), "a file was told before it was safe"
        assert set(before) <= set(stored)
        assert all(stored[path] == undisturbed[path] for path in stored)
    assert killed > 0
    adding.finish(tmp_path)
    assert contents(tmp_path) == undisturbed


def test_interrupting_it_loses_nothing_that_was_told(adding: Adding, undisturbed: Contents, tmp_path: Path) -> None:
    told, _ = adding.stop_after(tmp_path, 3, signal.SIGINT)
    assert set(told) <= set(contents(tmp_path))
    adding.finish(tmp_path)
    assert contents(tmp_path) == undisturbed


def test_two_processes_may_add_the_same_folder_at_once(adding: Adding, undisturbed: Contents, tmp_path: Path) -> None:
    first, second = adding.start(tmp_path), adding.start(tmp_path)
    finished(first)
    finished(second)
    assert contents(tmp_path) == undisturbed
