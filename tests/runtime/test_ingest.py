"""Files into the library, with the real embedding model and the small model's vocabulary."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_rag.config import Ingest, Settings, parse_settings
from edge_rag.errors import InputError, NotFound, StorageError
from edge_rag.native.embedder import Embedder
from edge_rag.native.llama import Model
from edge_rag.policy.views import embedded_views
from edge_rag.records import AddReport, Document, Filter
from edge_rag.runtime import reembedding
from edge_rag.runtime.ingest import AddProgress, Ingester
from edge_rag.runtime.rag import EMBEDDER_KEY, EdgeRAG
from edge_rag.store import library, vectors
from edge_rag.store.database import Database


class Shelf:
    """A folder of files and the library they are added to."""

    def __init__(self, folder: Path, data: Path, embedder: Embedder, vocabulary: Model) -> None:
        self.folder = folder
        self.database = Database(data)
        self.embedder = embedder
        self.vocabulary = vocabulary

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def ingester(self, settings: Ingest | None = None) -> Ingester:
        return Ingester(self.database, self.embedder, self.vocabulary.count_tokens, settings or Ingest(chunk_tokens=32))

    def add(self, *paths: Path, prune: bool = False) -> AddReport:
        return self.ingester().add(paths or [self.folder], prune=prune)

    def documents(self) -> dict[str, Document]:
        with self.database.read() as connection:
            return {
                str(Path(document.path).relative_to(self.folder)): document
                for document in library.list_documents(connection)
            }

    def texts(self, name: str = "") -> list[str]:
        where = Filter(documents=(str(self.folder / name),)) if name else None
        condition, values = library.chunk_condition(where, "id")
        with self.database.read() as connection:
            rows = connection.execute(f"SELECT text FROM chunks WHERE 1 {condition} ORDER BY id", values)
            return [text for (text,) in rows]

    def check(self) -> list[str]:
        with self.database.write() as connection:
            return list(library.check(connection))


@pytest.fixture
def shelf(tmp_path: Path, embedder: Embedder, vocabulary: Model) -> Iterator[Shelf]:
    (tmp_path / "files").mkdir()
    opened = Shelf(tmp_path / "files", tmp_path / "data", embedder, vocabulary)
    yield opened
    assert opened.check() == []
    opened.database.close()


def outcomes(report: AddReport) -> dict[str, str]:
    return {Path(file.path).name: file.outcome for file in report.files}


def test_new_files_are_added_unchanged_ones_skipped_and_changed_ones_replaced(shelf: Shelf) -> None:
    shelf.write("one.md", "# Pump\n\nThe pump hums.")
    shelf.write("sub/two.txt", "The valve is red.")
    report = shelf.add()
    assert outcomes(report) == {"one.md": "added", "two.txt": "added"}
    assert report.count("added") == 2
    ids = {name: document.id for name, document in shelf.documents().items()}

    assert outcomes(shelf.add()) == {"one.md": "unchanged", "two.txt": "unchanged"}

    shelf.write("sub/two.txt", "The valve is green.")
    assert outcomes(shelf.add()) == {"one.md": "unchanged", "two.txt": "replaced"}
    assert shelf.texts("sub/two.txt") == ["The valve is green."]
    assert {name: document.id for name, document in shelf.documents().items()} == ids


def test_the_stored_vectors_are_those_of_heading_and_text(shelf: Shelf) -> None:
    shelf.write("one.md", "# Pump\n\nThe pump hums.\n\n## Care\n\nClean it every week.")
    shelf.write("two.md", "# Valve\n\nThe valve is red.\n\n## Winter\n\nClose it in November.")
    shelf.add()
    with shelf.database.read() as connection:
        rows = library.chunk_texts(connection, after=0, limit=9)
        ids, matrix = vectors.read_vectors(connection, [row[0] for row in rows])
    stored = dict(zip(ids, matrix, strict=True))
    for chunk_id, *chunk in rows:
        expected = shelf.embedder.embed(embedded_views(*chunk))[0]
        assert stored[chunk_id] @ expected > 0.98  # the int8 model rounds differently in another batch
        assert np.linalg.norm(stored[chunk_id]) == pytest.approx(1, abs=1e-5)


def test_a_replacement_is_one_transaction(shelf: Shelf) -> None:
    path = shelf.write("one.txt", "The old text.")
    shelf.add()
    path.write_text("The new text.")
    with shelf.database.read() as connection:
        assert library.counts(connection).chunks == 1  # what is read first fixes the state that is seen
        shelf.add()
        seen = [row[3] for row in library.chunk_texts(connection, after=0, limit=9)]
    assert seen == ["The old text."]
    assert shelf.texts() == ["The new text."]


def test_a_vanished_file_is_reported_and_goes_only_when_asked(shelf: Shelf) -> None:
    path = shelf.write("one.txt", "The pump hums.")
    shelf.write("two.txt", "The valve is red.")
    shelf.add()
    path.unlink()
    assert outcomes(shelf.add()) == {"one.txt": "vanished", "two.txt": "unchanged"}
    assert set(shelf.documents()) == {"one.txt", "two.txt"}
    assert outcomes(shelf.add(prune=True)) == {"one.txt": "removed", "two.txt": "unchanged"}
    assert set(shelf.documents()) == {"two.txt"}


def test_only_what_vanished_below_the_given_folders_is_pruned(shelf: Shelf) -> None:
    here, there = shelf.write("here/one.txt", "The pump hums."), shelf.write("there/two.txt", "The valve is red.")
    shelf.write("here/keep.txt", "The tank is full.")
    shelf.add()
    here.unlink()
    there.unlink()
    assert outcomes(shelf.add(shelf.folder / "here", prune=True)) == {"one.txt": "removed", "keep.txt": "unchanged"}
    assert set(shelf.documents()) == {"here/keep.txt", "there/two.txt"}


def test_a_folder_given_by_another_name_finds_what_vanished_in_it(shelf: Shelf) -> None:
    shelf.write("here/one.txt", "The pump hums.")
    shelf.write("here/two.txt", "The valve is red.")
    shelf.add()
    (shelf.folder / "here" / "one.txt").unlink()
    (shelf.folder / "other").mkdir()
    report = shelf.add(shelf.folder / "other" / ".." / "here", prune=True)
    assert "removed" in [file.outcome for file in report.files]
    assert list(shelf.documents()) == ["here/two.txt"]


@pytest.mark.parametrize("folder_stays", [True, False], ids=["empty folder", "no folder"])
def test_a_drive_that_is_not_mounted_does_not_empty_the_library(shelf: Shelf, folder_stays: bool) -> None:
    shelf.write("drive/one.txt", "The pump hums.")
    shelf.write("elsewhere.txt", "The valve is red.")
    shelf.add()
    (shelf.folder / "drive" / "one.txt").unlink()
    if not folder_stays:
        (shelf.folder / "drive").rmdir()
    report = shelf.add(shelf.folder / "drive", prune=True)
    assert "vanished" in [file.outcome for file in report.files]
    assert sorted(shelf.documents()) == ["drive/one.txt", "elsewhere.txt"]


def test_a_file_that_can_no_longer_be_read_keeps_its_old_text_and_says_so(shelf: Shelf) -> None:
    path = shelf.write("one.txt", "The pump hums.")
    shelf.add()
    path.write_text("")
    [failed] = shelf.add().failed
    assert "stays searchable" in failed.reason
    assert shelf.texts("one.txt") == ["The pump hums."]


def test_a_bad_file_is_reported_and_the_others_are_added(shelf: Shelf) -> None:
    shelf.write("a.txt", "The pump hums.")
    shelf.write("b.pdf", b"this is no PDF at all")
    shelf.write("c.txt", "")
    shelf.write("d.docx", b"PK\x03\x04 but not really")
    shelf.write("e.txt", "The valve is red.")
    os.mkfifo(shelf.folder / "f.txt")
    report = shelf.add()
    assert {name for name, outcome in outcomes(report).items() if outcome == "added"} == {"a.txt", "e.txt"}
    failed = {Path(file.path).name: file.reason for file in report.failed}
    assert {"b.pdf", "c.txt", "d.docx"} <= set(failed)
    assert all(failed.values())


def test_a_file_that_turns_bad_keeps_what_was_known_of_it(shelf: Shelf) -> None:
    shelf.write("a.pdf", b"no PDF")
    path = shelf.write("b.txt", "The pump hums.")
    shelf.add()
    path.write_bytes(b"")
    assert outcomes(shelf.add())["b.txt"] == "failed"
    assert shelf.texts("b.txt") == ["The pump hums."]


def test_another_recipe_cuts_unchanged_files_again(shelf: Shelf) -> None:
    shelf.write("one.txt", "\n\n".join(f"Sentence number {n} is about the pump and the valve." for n in range(12)))
    shelf.add()
    small = shelf.texts()
    report = shelf.ingester(Ingest(chunk_tokens=100)).add([shelf.folder])
    assert outcomes(report) == {"one.txt": "replaced"}
    assert len(shelf.texts()) < len(small)
    assert shelf.ingester(Ingest(chunk_tokens=100)).add([shelf.folder]).count("unchanged") == 1


def test_progress_is_told_for_every_file_whatever_its_outcome(shelf: Shelf) -> None:
    names = [f"{number}.txt" for number in range(5)]
    for name in names:
        shelf.write(name, f"File {name} is about pumps.")
    shelf.add(shelf.folder / "0.txt")
    shelf.write("1.txt", "")
    told: list[AddProgress] = []
    report = shelf.ingester().add([shelf.folder], progress=told.append)
    assert [progress.done for progress in told] == [1, 2, 3, 4, 5]
    assert {progress.total for progress in told} == {5}
    assert sorted(Path(progress.current).name for progress in told) == names
    assert {file.outcome for file in report.files} == {"unchanged", "failed", "added"}


def test_what_was_told_stays_when_progress_raises(shelf: Shelf) -> None:
    for name in ("1.txt", "2.txt", "3.txt"):
        shelf.write(name, f"File {name} is about pumps.")

    def interrupt(progress: AddProgress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shelf.ingester().add([shelf.folder], progress=interrupt)
    assert set(shelf.documents()) == {"1.txt", "2.txt"}
    assert outcomes(shelf.add()) == {"1.txt": "unchanged", "2.txt": "unchanged", "3.txt": "added"}


# --- odd files -------------------------------------------------------------------------------------------------------


def test_a_file_whose_name_has_newlines_is_added_found_and_pruned(shelf: Shelf) -> None:
    path = shelf.write("two\nlines\n.txt", "The pump hums.")
    shelf.add()
    assert list(shelf.documents()) == ["two\nlines\n.txt"]
    assert shelf.texts("two\nlines\n.txt") == ["The pump hums."]
    path.unlink()
    shelf.write("other.txt", "The valve is red.")
    assert shelf.add(prune=True).count("removed") == 1


def test_a_name_that_is_no_text_is_reported(shelf: Shelf) -> None:
    raw = os.fsencode(shelf.folder) + b"/caf\xe9.txt"
    with open(raw, "wb") as file:  # noqa: PTH123 — a name that a Path cannot be made of
        file.write(b"The pump hums.")
    shelf.write("good.txt", "The valve is red.")
    report = shelf.add()
    assert report.count("added") == 1
    [failed] = report.failed
    assert "UTF-8" in failed.reason
    failed.path.encode()


def test_a_line_of_a_megabyte_is_cut_into_chunks_of_the_right_size(
    tmp_path: Path, shelf: Shelf, vocabulary: Model
) -> None:
    class Constant:
        """A stand-in: thousands of chunks would take the real model a minute."""

        def embed(self, texts: list[str]) -> library.Vectors:
            return np.ones((len(texts), 8), dtype=np.float32)

    line = "".join(f"{n} the pump of unit {n} hums " for n in range(40_000))[:1_000_000]
    shelf.write("one.txt", line)
    ingester = Ingester(shelf.database, Constant(), vocabulary.count_tokens, Ingest(chunk_tokens=256))  # type: ignore[arg-type]
    report = ingester.add([shelf.folder])
    assert outcomes(report) == {"one.txt": "added"}
    texts = shelf.texts()
    assert "".join("".join(texts).split()) == "".join(line.split())
    assert max(vocabulary.count_tokens(text) for text in texts) <= 256


def test_line_ends_of_windows_make_no_difference(shelf: Shelf) -> None:
    text = "# Pump\n\nThe pump hums.\n\n## Care\n\nClean it.\nEvery week.\n"
    shelf.write("unix/one.md", text)
    shelf.write("windows/one.md", text.replace("\n", "\r\n"))
    shelf.add()
    assert shelf.texts("windows/one.md") == shelf.texts("unix/one.md")


def test_bytes_that_are_no_text_do_not_stop_a_text_file(shelf: Shelf) -> None:
    shelf.write("one.txt", b"The pump hums at 20 \xb0C and the caf\xe9 is open. \xff\xfe The valve is red. " * 3)
    assert outcomes(shelf.add()) == {"one.txt": "added"}
    assert any("pump hums" in text for text in shelf.texts())
    "".join(shelf.texts()).encode()


UNREACHABLE = """
import os, sys, tempfile
from pathlib import Path
import numpy as np
from edge_rag.config import Ingest
from edge_rag.runtime.ingest import Ingester
from edge_rag.store.database import Database

class Constant:
    def embed(self, texts):
        return np.ones((len(texts), 8), dtype=np.float32)

with tempfile.TemporaryDirectory() as name:
    root = os.geteuid()
    os.chmod(name, 0o777)
    if root == 0:
        os.seteuid(65534)
    locked = Path(name, "files", "locked")
    locked.mkdir(parents=True)
    (locked / "one.txt").write_text("The pump hums.")
    (locked.parent / "two.txt").write_text("The valve is red.")
    with Database(Path(name, "data")) as database:
        ingester = Ingester(database, Constant(), len, Ingest())
        ingester.add([locked.parent])
        locked.chmod(0)
        report = ingester.add([locked.parent], prune=True)
        print(sorted((Path(file.path).name, file.outcome) for file in report.files))
        locked.chmod(0o700)
    os.seteuid(root)
"""


def test_what_cannot_be_reached_for_now_has_not_vanished() -> None:
    command = [sys.executable, "-c", UNREACHABLE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.stdout == "[('locked', 'failed'), ('two.txt', 'unchanged')]\n", done.stderr


# --- one object for all ----------------------------------------------------------------------------------------------


@pytest.fixture
def rag(tmp_path: Path, small_settings: Settings) -> Iterator[EdgeRAG]:
    with EdgeRAG.open(tmp_path / "data", settings=small_settings) as opened:
        yield opened


def test_adding_nothing_is_refused(rag: EdgeRAG) -> None:
    with pytest.raises(InputError) as caught:
        rag.add()
    assert caught.value.field == "paths"


def test_documents_are_removed_by_path_and_by_folder_or_not_at_all(rag: EdgeRAG, tmp_path: Path) -> None:
    for name in ("a/one.txt", "a/two.txt", "b/three.txt", "ab.txt"):
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"The pump hums in {name}.")
    rag.add(tmp_path / "files")
    with pytest.raises(NotFound, match="not in the library"):
        rag.remove(tmp_path / "files" / "b", tmp_path / "files" / "c")
    assert len(rag.documents()) == 4
    removed = rag.remove(tmp_path / "files" / "a", tmp_path / "files" / "a" / "one.txt")
    assert {Path(document.path).name for document in removed} == {"one.txt", "two.txt"}
    assert {Path(document.path).name for document in rag.documents()} == {"three.txt", "ab.txt"}
    rag.remove(tmp_path / "files" / "a" / ".." / "b")
    assert {Path(document.path).name for document in rag.documents()} == {"ab.txt"}
    assert rag.check() == []


def test_another_embedding_model_asks_for_reembedding_which_repairs(tmp_path: Path, small_settings: Settings) -> None:
    data, file = tmp_path / "data", tmp_path / "pump.txt"
    file.write_text("The pump hums.")
    with EdgeRAG.open(data, settings=small_settings) as rag:
        rag.add(file)
        [before] = rag.search("pump")
    with Database(data) as database, database.write() as connection:
        identity = library.get_meta(connection, EMBEDDER_KEY)
        library.set_meta(connection, EMBEDDER_KEY, "old-model 123 384")
        library.put_vectors(connection, before.chunk_id, -np.ones(384, dtype=np.float32) / np.sqrt(np.float32(384)))
    with EdgeRAG.open(data, settings=small_settings) as rag:
        for attempt in (lambda: rag.search("pump"), lambda: rag.add(file), lambda: rag.ask("What hums?")):
            with pytest.raises(StorageError, match=r"old-model.*reembed"):
                attempt()
        told: list[tuple[int, int]] = []
        assert rag.reembed(lambda done, total: told.append((done, total))) == 1
        assert told == [(1, 1)]
        assert rag.search("pump") == [before]
        assert rag.add(file).count("unchanged") == 1
        assert rag.check() == []
    with Database(data) as database, database.read() as connection:
        assert library.get_meta(connection, EMBEDDER_KEY) == identity


def test_reembedding_that_is_interrupted_changes_neither_vectors_nor_their_model(rag: EdgeRAG, tmp_path: Path) -> None:
    file = tmp_path / "pump.txt"
    file.write_text("The pump hums.")
    rag.add(file)
    [before] = rag.search("pump")

    def interrupt(done: int, total: int) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        rag.reembed(interrupt)
    assert rag.search("pump") == [before]


def test_reembedding_holds_up_nobody_and_loses_nothing_that_comes_and_goes_meanwhile(
    rag: EdgeRAG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Shows a fault: one write transaction was held for all of it, and every answer waited for that.
    monkeypatch.setattr(reembedding, "BATCH_CHUNKS", 1)
    for name in ("pump", "valve", "hose"):
        (tmp_path / f"{name}.txt").write_text(f"The {name} hums.")
    rag.add(tmp_path / "pump.txt", tmp_path / "valve.txt")
    [pump, *_] = rag.search("pump hums")
    with Database(rag.folder) as database, database.write() as connection:
        library.put_vectors(connection, pump.chunk_id, np.eye(1, 384, dtype=np.float32)[0])
    told: list[int] = []

    def meanwhile(done: int, total: int) -> None:
        told.append(done)
        if done == 1:
            assert rag.search("valve hums"), "the old vectors serve"
        elif done == 2:
            rag.add(tmp_path / "hose.txt")
            rag.remove(tmp_path / "valve.txt")

    assert rag.reembed(meanwhile) == 3
    assert told == [1, 2, 3]
    assert rag.check() == []
    assert [found.path.rpartition("/")[2] for found in rag.search("hums")] == ["pump.txt", "hose.txt"]
    with Database(rag.folder) as database, database.read() as connection:
        assert vectors.read_vectors(connection, [pump.chunk_id])[1][0, 0] != 1
        assert connection.execute("SELECT count(*) FROM new_vectors").get == 0


def test_chunks_that_come_at_the_very_end_of_reembedding_get_vectors_too(
    rag: EdgeRAG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pump.txt").write_text("The pump hums.")
    (tmp_path / "hose.txt").write_text("The hose hums.")
    rag.add(tmp_path / "pump.txt")
    read = reembedding._next

    def late(database: Database, last: int) -> Any:
        if rows := read(database, last):
            return rows
        rag.add(tmp_path / "hose.txt")
        return []

    monkeypatch.setattr(reembedding, "_next", late)
    assert rag.reembed() == 2
    assert rag.check() == []
    assert len(rag.search("hums")) == 2


def test_vectors_and_the_name_of_their_model_change_together(
    rag: EdgeRAG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageError("the disk is full")

    file = tmp_path / "pump.txt"
    file.write_text("The pump hums.")
    rag.add(file)
    [found] = rag.search("pump")
    with Database(rag.folder) as database, database.write() as connection:
        library.put_vectors(connection, found.chunk_id, np.eye(1, 384, dtype=np.float32)[0])
    monkeypatch.setattr(library, "set_meta", full)
    with pytest.raises(StorageError, match="full"):
        rag.reembed()
    with Database(rag.folder) as database, database.read() as connection:
        assert vectors.read_vectors(connection, [found.chunk_id])[1][0, 0] == 1


def test_a_closed_library_says_so(tmp_path: Path, small_settings: Settings) -> None:
    file = tmp_path / "pump.txt"
    file.write_text("The pump hums.")
    rag = EdgeRAG.open(tmp_path / "data", settings=small_settings)
    rag.add(file)
    rag.close()
    rag.close()
    uses = (
        rag.documents, rag.status, rag.check, rag.journal, rag.load, rag.reembed,
        lambda: rag.add(file), lambda: rag.remove(file), lambda: rag.search("pump"),
        lambda: rag.ask("What hums?"), lambda: rag.feedback("a", 1.0),
    )  # fmt: skip
    for use in uses:
        with pytest.raises(StorageError, match="the library is closed"):
            use()


def test_listing_and_removing_load_no_model(tmp_path: Path) -> None:
    nowhere = parse_settings({"models": {"folder": str(tmp_path / "no models")}})
    with EdgeRAG.open(tmp_path / "data", settings=nowhere) as rag:
        assert rag.documents() == []
        assert rag.journal() == []
        assert rag.status().loaded == ()
        with pytest.raises(NotFound):
            rag.remove("/nothing")
