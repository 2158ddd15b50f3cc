"""The registry of adapters: rows that go with their passages, files that are whole or not there, and both agreeing."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from edge_rag.errors import InputError, NotFound, StorageError
from edge_rag.records import Adapter, GateReport, Kept
from edge_rag.store import adapters
from edge_rag.store.adapters import AdapterFolder, Questions
from edge_rag.store.database import Connection, Database
from tests.store.adapter_samples import (
    BASE,
    LAYOUT,
    RECIPE,
    add_adapter,
    add_passages,
    all_adapters,
    asked,
    embed,
    questions,
    remove_document,
    unregistered,
    weights,
)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> AdapterFolder:
    return AdapterFolder(tmp_path / "adapters")


def write(database: Database, work: Callable[..., Any], *arguments: Any) -> Any:
    with database.write() as connection:
        return work(connection, *arguments)


def find(database: Database, beginning: str) -> Adapter:
    with database.read() as connection:
        return adapters.adapter(connection, beginning)


def queued(database: Database) -> list[str]:
    with database.read() as connection:
        return [id for (id,) in connection.execute("SELECT id FROM adapters_removed")]


def rows(database: Database, table: str) -> int:
    with database.read() as connection:
        count: int = connection.execute(f"SELECT count(*) FROM {table}").get
        return count


# --- rows ------------------------------------------------------------------------------------------------------------


def test_what_is_registered_is_found_again_and_its_file_is_named_by_its_hash(
    database: Database, folder: AdapterFolder
) -> None:
    one, two, three = add_passages(database, "a", "x", "y", "z")
    added = add_adapter(database, folder, 1, three, one, two, pinned=True, made_at=3.5)
    content = folder.path(added.id).read_bytes()
    assert sha256(content).hexdigest() == added.id
    assert added.bytes == len(content)
    assert find(database, added.id) == replace(added, members=(one, two, three))
    assert folder.verify(added.id) == ""


def test_an_adapter_without_an_exam_or_a_cluster_is_kept_as_such(database: Database, folder: AdapterFolder) -> None:
    (chunk,) = add_passages(database, "a", "x")
    added = add_adapter(database, folder, 1, chunk, gate=None, cluster_id=None, state="failed", reason="no proof")
    assert find(database, added.id) == added


def test_adapters_are_listed_from_the_oldest_on(database: Database, folder: AdapterFolder) -> None:
    (chunk,) = add_passages(database, "a", "x")
    added = [add_adapter(database, folder, n, chunk, made_at=made_at) for n, made_at in enumerate([3.0, 1.0, 2.0])]
    assert all_adapters(database) == [added[1], added[2], added[0]]


def test_a_file_of_its_own_only_the_owner_can_read(database: Database, folder: AdapterFolder) -> None:
    (chunk,) = add_passages(database, "a", "x")
    added = add_adapter(database, folder, 1, chunk)
    assert stat.S_IMODE(folder.path(added.id).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.folder.stat().st_mode) == 0o700


def test_questions_come_back_with_their_vectors_and_marks(database: Database, folder: AdapterFolder) -> None:
    (chunk,) = add_passages(database, "a", "x")
    texts = ("Why?", "How much?", "Ärger?")
    added = add_adapter(database, folder, 1, chunk, questions=asked(*texts, f1=[0.5, np.nan, 1.0]))
    found = questions(database, added.id)
    order = [1, 0, 2]  # by text
    assert found.texts == tuple(texts[n] for n in order)
    assert found.vectors.dtype == np.float16
    np.testing.assert_array_equal(found.vectors, embed(texts).astype(np.float16)[order])
    np.testing.assert_array_equal(found.f1, np.array([np.nan, 0.5, 1.0], np.float32))


def examined(database: Database, id: str) -> adapters.Examined:
    with database.read() as connection:
        return adapters.exam_of(connection, id)


def test_held_out_questions_are_kept_apart_from_those_that_it_was_trained_on(
    database: Database, folder: AdapterFolder
) -> None:
    (chunk,) = add_passages(database, "a", "x")
    added = add_adapter(database, folder, 1, chunk, questions=asked("Old?"))
    trained, held_out = asked("Why?", "How much?", f1=[0.5, np.nan]), asked("Never?", "Who?", f1=[np.nan, 0.25])
    assert write(database, adapters.put_adapter, added, trained, held_out)
    assert questions(database, added.id).texts == ("How much?", "Why?")
    with database.read() as connection:
        found = adapters.questions_of(connection, added.id, held_out=True)
        assert adapters.texts_of(connection, added.id) == ("How much?", "Who?", "Why?")
    assert (found.texts, found.f1.tolist()) == (("Who?",), [0.25])  # the other one was not asked
    np.testing.assert_array_equal(found.vectors, embed(["Who?"]).astype(np.float16))


def test_an_exam_is_all_that_was_asked_in_it_of_both_kinds(database: Database, folder: AdapterFolder) -> None:
    (chunk,) = add_passages(database, "a", "x")
    added = add_adapter(database, folder, 1, chunk)
    trained, held_out = asked("Why?", "How much?", "What?", f1=[0.5, np.nan, 1.0]), asked("Who?", f1=[0.25])
    assert write(database, adapters.put_adapter, added, trained, held_out)
    vectors, f1, unseen = examined(database, added.id)
    assert (vectors.dtype, f1.dtype, unseen.dtype) == (np.float32, np.float32, np.bool_)
    np.testing.assert_array_equal(vectors, embed(["What?", "Who?", "Why?"]).astype(np.float16).astype(np.float32))
    assert f1.tolist() == [1.0, 0.25, 0.5]
    assert unseen.tolist() == [False, True, False]


@pytest.mark.parametrize("known", [True, False])
def test_without_an_exam_there_is_nothing_of_it(database: Database, folder: AdapterFolder, known: bool) -> None:
    (chunk,) = add_passages(database, "a", "x")
    added = add_adapter(database, folder, 1, chunk, questions=asked("Why?"))
    vectors, f1, unseen = examined(database, added.id if known else "f" * 64)
    assert (vectors.shape, f1.shape, unseen.shape) == ((0, 0), (0,), (0,))


@pytest.mark.parametrize(
    ("trained", "held_out", "kept"), [(0.9, 0.4, 0.4), (0.4, 0.9, 0.4), (np.nan, 0.9, 0.9), (0.9, np.nan, 0.9)]
)
def test_a_question_of_both_kinds_was_trained_on_and_keeps_its_lower_mark(
    database: Database, folder: AdapterFolder, trained: float, held_out: float, kept: float
) -> None:
    (chunk,) = add_passages(database, "a", "x")
    added = add_adapter(database, folder, 1, chunk)
    both = asked("Why?", f1=[trained]), asked("Why?", f1=[held_out])
    assert write(database, adapters.put_adapter, added, *both)
    assert questions(database, added.id).f1.tolist() == [pytest.approx(kept)]
    assert examined(database, added.id).held_out.tolist() == [False]


def test_an_adapter_without_questions_has_none(database: Database, folder: AdapterFolder) -> None:
    (chunk,) = add_passages(database, "a", "x")
    added = add_adapter(database, folder, 1, chunk, questions=asked())
    found = questions(database, added.id)
    assert (found.texts, found.vectors.shape, found.f1.shape) == ((), (0, 0), (0,))


@pytest.mark.parametrize(
    ("marks", "kept"), [([0.9, 0.4], 0.4), ([0.4, 0.9], 0.4), ([np.nan, 0.9], 0.9), ([0.9, np.nan], 0.9)]
)
def test_a_question_that_occurs_twice_keeps_its_lower_mark(
    database: Database, folder: AdapterFolder, marks: list[float], kept: float
) -> None:
    (chunk,) = add_passages(database, "a", "x")
    added = add_adapter(database, folder, 1, chunk, questions=asked("Why?", "Why?", f1=marks))
    assert questions(database, added.id).f1.tolist() == [pytest.approx(kept)]


def test_an_adapter_that_is_put_again_is_replaced_as_a_whole(database: Database, folder: AdapterFolder) -> None:
    one, two = add_passages(database, "a", "x", "y")
    added = add_adapter(database, folder, 1, one, questions=asked("Old?"))
    newer = add_adapter(database, folder, 1, two, questions=asked("New?"), reason="again", gate=None)
    assert newer.id == added.id
    assert all_adapters(database) == [newer]
    assert questions(database, added.id).texts == ("New?",)
    assert queued(database) == []


def test_numbers_that_are_none_are_refused(database: Database, folder: AdapterFolder) -> None:
    (chunk,) = add_passages(database, "a", "x")
    with pytest.raises(InputError, match="recipe"):
        add_adapter(database, folder, 1, chunk, recipe=replace(RECIPE, loss=float("nan")))
    assert all_adapters(database) == []
    assert folder.sizes() == {}


def test_state_and_pin_are_changed_and_adapters_that_are_gone_are_passed_over(
    database: Database, folder: AdapterFolder
) -> None:
    (chunk,) = add_passages(database, "a", "x")
    added, other = add_adapter(database, folder, 1, chunk), add_adapter(database, folder, 2, chunk)
    write(database, adapters.set_state, added.id, "disabled", "by hand")
    write(database, adapters.set_pinned, added.id, True)
    write(database, adapters.set_state, "f" * 64, "failed")
    write(database, adapters.set_pinned, "f" * 64, True)
    write(database, adapters.remove, "f" * 64)
    assert find(database, added.id) == replace(added, state="disabled", reason="by hand", pinned=True)
    assert find(database, other.id) == other
    write(database, adapters.set_state, added.id, "ready")
    assert find(database, added.id) == replace(added, pinned=True)


# --- finding one -----------------------------------------------------------------------------------------------------


def put_ids(database: Database, folder: AdapterFolder, *ids: str) -> None:
    (chunk,) = add_passages(database, "a", "x")
    for id in ids:
        assert write(database, adapters.put_adapter, unregistered(chunk, id=id.ljust(64, "0")), asked())


def test_an_adapter_is_found_by_any_beginning_that_is_its_own(database: Database, folder: AdapterFolder) -> None:
    put_ids(database, folder, "ab1", "ab2", "c")
    for beginning in ("c", "C0", " ab1 ", "ab2".ljust(64, "0")):
        assert find(database, beginning).id.startswith(beginning.strip().lower())


def test_a_beginning_of_several_is_ambiguous(database: Database, folder: AdapterFolder) -> None:
    put_ids(database, folder, "ab1", "ab2", "c")
    with pytest.raises(InputError, match="2 adapters begin with 'ab'") as caught:
        find(database, "ab")
    assert "ab1000000000" in caught.value.message


@pytest.mark.parametrize("beginning", ["d", "", " ", "ab%", "a_1", "ab1".ljust(65, "0"), "../ab1"])
def test_a_beginning_of_none_is_not_found(database: Database, folder: AdapterFolder, beginning: str) -> None:
    put_ids(database, folder, "ab1", "ab2", "c")
    with pytest.raises(NotFound):
        find(database, beginning)


# --- which may answer ------------------------------------------------------------------------------------------------


FAILED = GateReport(
    seen=Kept(40, 0.1),
    used=Kept(2, 0.7),
    unseen=Kept(0, 0.0),
    bare=Kept(40, 0.1),
    reach=1.0,
    drift=0.0,
    passed=False,
    reason="answered 2",
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, True, id="ready"),
        pytest.param({"state": "disabled"}, False, id="disabled"),
        pytest.param({"state": "failed"}, False, id="failed"),
        pytest.param({"base": "c" * 64}, False, id="of a model that was replaced"),
        pytest.param({"layout": LAYOUT + 1}, False, id="of another layout of prompts"),
        pytest.param({"gate": None}, False, id="not examined"),
        pytest.param({"gate": FAILED}, False, id="not passed"),
    ],
)
def test_only_what_is_ready_passed_and_of_this_model_may_answer(changes: dict[str, Any], expected: bool) -> None:
    one = unregistered(1, **changes)
    assert adapters.usable([one], base=BASE, layout=LAYOUT) == ([one] if expected else [])


# --- with their passages ---------------------------------------------------------------------------------------------


def test_an_adapter_goes_with_any_of_its_passages_and_its_file_with_the_next_sweep(
    database: Database, folder: AdapterFolder
) -> None:
    (here,) = add_passages(database, "a", "x")
    (gone,) = add_passages(database, "b", "y")
    both, kept = add_adapter(database, folder, 1, here, gone), add_adapter(database, folder, 2, here)
    remove_document(database, "b")
    assert all_adapters(database) == [kept]
    assert queued(database) == [both.id]
    write(database, adapters.sweep, folder)
    assert folder.sizes() == {kept.id: kept.bytes}
    assert queued(database) == []
    assert rows(database, "adapter_members") == 1
    assert rows(database, "adapter_questions") == 2


def test_an_adapter_whose_passage_went_while_it_was_trained_is_not_kept(
    database: Database, folder: AdapterFolder, tmp_path: Path
) -> None:
    here, gone = *add_passages(database, "a", "x"), *add_passages(database, "b", "y")
    remove_document(database, "b")
    assert adapters.register(database, folder, weights(tmp_path), unregistered(here, gone), asked("Why?")) is None
    assert all_adapters(database) == []
    assert folder.sizes() == {}
    assert list((folder.folder / "tmp").iterdir()) == []


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\3\4 and more", b"gguf"])
def test_what_is_not_gguf_is_refused(database: Database, folder: AdapterFolder, tmp_path: Path, content: bytes) -> None:
    (chunk,) = add_passages(database, "a", "x")
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(InputError, match="not a GGUF file"):
        adapters.register(database, folder, file, unregistered(chunk), asked())
    assert folder.sizes() == {}


def test_a_file_that_is_not_there_cannot_be_registered(
    database: Database, folder: AdapterFolder, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match="No such file"):
        adapters.register(database, folder, tmp_path / "nothing", unregistered(), asked())


@pytest.mark.parametrize("id", ["", "a" * 63, "A" * 64, "../" + "a" * 61, "a" * 64 + "\n"])
def test_an_id_is_never_a_path(folder: AdapterFolder, id: str) -> None:
    with pytest.raises(InputError):
        folder.path(id)


def test_a_changed_or_missing_file_is_told_from_a_sound_one(database: Database, folder: AdapterFolder) -> None:
    (chunk,) = add_passages(database, "a", "x")
    added = add_adapter(database, folder, 1, chunk)
    path = folder.path(added.id)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert folder.verify(added.id).startswith("its file was changed (sha256 ")
    path.unlink()
    assert folder.verify(added.id) == "its file is missing"
    path.mkdir()
    assert folder.verify(added.id) == "its file is missing"


def test_a_full_disk_leaves_nothing(folder: AdapterFolder) -> None:
    class Full(BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"), folder.copied(Full()):
        pass
    assert list((folder.folder / "tmp").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "adapters").write_text("in the way")
    with pytest.raises(StorageError), AdapterFolder(tmp_path / "adapters").copied(BytesIO(b"GGUF")):
        pass


# --- sweeping --------------------------------------------------------------------------------------------------------


def test_files_without_a_row_are_swept_and_what_is_not_ours_is_left_alone(
    database: Database, folder: AdapterFolder
) -> None:
    (chunk,) = add_passages(database, "a", "x")
    kept, gone = add_adapter(database, folder, 1, chunk), add_adapter(database, folder, 2, chunk)
    write(database, adapters.remove, gone.id)
    folder.path("e" * 64).write_bytes(b"GGUF of a process that was killed")
    strange = [folder.folder / "readme.txt", folder.folder / "abc.gguf"]
    for path in strange:
        path.write_text("mine")
    write(database, adapters.sweep, folder)
    assert set(folder.folder.iterdir()) == {folder.path(kept.id), folder.folder / "tmp", *strange}
    assert all_adapters(database) == [kept]


def test_a_library_without_adapters_can_be_swept(database: Database, folder: AdapterFolder) -> None:
    write(database, adapters.sweep, folder)
    assert not folder.folder.exists()


def test_an_adapter_without_its_file_or_with_another_size_is_failed_with_the_reason(
    database: Database, folder: AdapterFolder
) -> None:
    (chunk,) = add_passages(database, "a", "x")
    missing, torn, sound, strange = (add_adapter(database, folder, n, chunk, made_at=float(n)) for n in range(4))
    off = add_adapter(database, folder, 4, chunk, state="failed", reason="it failed its proof", made_at=9.0)
    for each in (missing, strange, off):
        folder.path(each.id).unlink()
    os.truncate(folder.path(torn.id), 100)
    folder.path(strange.id).mkdir()
    write(database, adapters.sweep, folder)
    assert all_adapters(database) == [
        replace(missing, state="failed", reason="its file is missing"),
        replace(torn, state="failed", reason="its file was changed"),
        sound,
        replace(strange, state="failed", reason="its file was changed"),
        off,
    ]


def test_a_file_that_cannot_be_unlinked_waits_for_the_next_sweep(
    database: Database, folder: AdapterFolder, caplog: pytest.LogCaptureFixture
) -> None:
    (chunk,) = add_passages(database, "a", "x")
    added = add_adapter(database, folder, 1, chunk)
    path = folder.path(added.id)
    path.unlink()
    path.mkdir()
    write(database, adapters.remove, added.id)
    write(database, adapters.sweep, folder)
    assert "cannot be removed" in caplog.text
    assert queued(database) == [added.id]
    path.rmdir()
    write(database, adapters.sweep, folder)
    assert queued(database) == []


def test_a_sweep_leaves_a_copy_alone_that_is_about_to_get_its_row(
    database: Database, folder: AdapterFolder, tmp_path: Path
) -> None:
    (chunk,) = add_passages(database, "a", "x")
    with weights(tmp_path).open("rb") as stream, folder.copied(stream) as copy:
        (folder.folder / "tmp" / "of a killed process").write_text("half")
        write(database, adapters.sweep, folder)
        assert list((folder.folder / "tmp").iterdir()) == [copy.path]
        with database.write() as connection:
            assert adapters.put_adapter(connection, unregistered(chunk, id=copy.id, bytes=copy.bytes), asked())
            folder.place(copy)
    write(database, adapters.sweep, folder)
    assert [each.state for each in all_adapters(database)] == ["ready"]
    assert folder.verify(copy.id) == ""


def test_a_registration_that_is_rolled_back_leaves_a_file_that_the_next_sweep_takes(
    database: Database, folder: AdapterFolder, tmp_path: Path
) -> None:
    (chunk,) = add_passages(database, "a", "x")

    def fail(connection: Connection) -> None:
        assert adapters.put_adapter(connection, unregistered(chunk, id=copy.id, bytes=copy.bytes), asked())
        folder.place(copy)
        raise StorageError("the disk is full")

    with (
        pytest.raises(StorageError),
        weights(tmp_path).open("rb") as stream,
        folder.copied(stream) as copy,
        database.write() as connection,
    ):
        fail(connection)
    assert list(folder.sizes()) == [copy.id]
    write(database, adapters.sweep, folder)
    assert folder.sizes() == {}


# Registers and removes adapters for ever; prints a line when it has begun.
WRITER = """
import itertools, random, sys
from pathlib import Path
from edge_rag.store import adapters
from edge_rag.store.database import Database
from tests.store.adapter_samples import add_adapter, add_passages, all_adapters

place = Path(sys.argv[1])
with Database(place) as database:
    folder = adapters.AdapterFolder(place / "adapters")
    chance = random.Random(int(sys.argv[2]))
    for turn in itertools.count():
        chunks = add_passages(database, str(chance.randrange(3)), "x")
        add_adapter(database, folder, chance.randrange(6), *chunks)
        with database.write() as connection:
            adapters.sweep(connection, folder)
        if not turn:
            print("writing", flush=True)
"""


def test_rows_and_files_agree_after_a_sweep_whatever_was_killed(
    database: Database, folder: AdapterFolder, tmp_path: Path, repository: Path
) -> None:
    for seed in range(4):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(seed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=repository) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.05 * seed)
            process.kill()
        write(database, adapters.sweep, folder)
        known = all_adapters(database)
        assert folder.sizes() == {each.id: each.bytes for each in known}
        assert all(each.state == "ready" and folder.verify(each.id) == "" for each in known)
        assert list((folder.folder / "tmp").iterdir()) == []


def test_a_file_that_waits_to_be_unlinked_and_is_registered_again_belongs_to_its_new_row(
    database: Database, folder: AdapterFolder
) -> None:
    (chunk,) = add_passages(database, "a", "x")
    added = add_adapter(database, folder, 1, chunk)
    write(database, adapters.remove, added.id)
    again = add_adapter(database, folder, 1, chunk)
    write(database, adapters.sweep, folder)
    assert folder.sizes() == {again.id: again.bytes}
    assert queued(database) == []


def test_vectors_must_be_as_many_as_questions(database: Database, folder: AdapterFolder) -> None:
    (chunk,) = add_passages(database, "a", "x")
    wrong = Questions(("Why?", "How?"), embed(["Why?"]).astype(np.float16), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="shorter"):
        add_adapter(database, folder, 1, chunk, questions=wrong)
    assert all_adapters(database) == []


def test_questions_get_new_vectors_when_the_encoder_changes(database: Database, folder: AdapterFolder) -> None:
    (chunk,) = add_passages(database, "a", "x")
    added = add_adapter(database, folder, 1, chunk, questions=asked("Why?", "How?", f1=[0.5, 1.0]))
    other = add_adapter(database, folder, 2, chunk, questions=asked("Why?"))
    new = np.array([[1, 0, 0, 0], [0, 1, 0, 0]], np.float32)
    write(database, adapters.put_vectors, added.id, ("Why?", "How?"), new)
    found = questions(database, added.id)
    assert found.texts == ("How?", "Why?")
    np.testing.assert_array_equal(found.vectors, new[::-1])
    assert found.f1.tolist() == [1.0, 0.5]
    assert questions(database, other.id).vectors.shape == (1, 3)


def test_held_out_questions_get_new_vectors_too(database: Database, folder: AdapterFolder) -> None:
    (chunk,) = add_passages(database, "a", "x")
    added = add_adapter(database, folder, 1, chunk)
    assert write(database, adapters.put_adapter, added, asked("Why?", f1=[1.0]), asked("How?", f1=[0.5]))
    new = np.array([[1, 0, 0, 0], [0, 1, 0, 0]], np.float32)
    with database.read() as connection:
        texts = adapters.texts_of(connection, added.id)
    write(database, adapters.put_vectors, added.id, texts, new)
    vectors, f1, _ = examined(database, added.id)
    np.testing.assert_array_equal(vectors, new)
    assert f1.tolist() == [0.5, 1.0]


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(database: Database, folder: AdapterFolder) -> None:
    (chunk,) = add_passages(database, "a", "x")
    added = add_adapter(database, folder, 1, chunk)
    folder.folder.rename(folder.folder.with_name("elsewhere"))
    folder.folder.touch()
    with pytest.raises(StorageError):
        write(database, adapters.sweep, folder)
    assert all_adapters(database) == [added]
