"""Whatever happens to kept KV, the answer is that of a library that has kept nothing: never a wrong one, no error."""

import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import Struct
from msgspec.structs import replace

from edge_rag.errors import StorageError
from edge_rag.native.llama import Model
from edge_rag.policy.audit import divergence
from edge_rag.runtime import parts
from edge_rag.runtime.parts import KV_FOLDER, sweep_kv
from edge_rag.runtime.prompting import Prompt
from edge_rag.store import kv_rows
from edge_rag.store import library as documents
from edge_rag.store.database import Database
from edge_rag.store.kv_files import KVFolder
from edge_rag.store.kv_format import MAGIC, PREAMBLE, KVFields
from tests.native.tiny_models import write_tiny_model
from tests.runtime.keeping import CHUNKS, FLAGS, TOKENS
from tests.runtime.serving import (
    PREFIX,
    SAMPLING,
    Running,
    Toy,
    add_document,
    kv_files,
    remove_document,
    running,
    toy_passage,
    toy_prompt,
)

KILLS = 6
FLIPS = 40
DOCUMENT = "notes.txt"
KEPT = toy_prompt((1, 2, 3))  # what the library was asked before something happened
ASKED = toy_prompt((2, 3, 1), question=2)  # and afterwards


class Undisturbed(Struct):
    """A library that has kept what KEPT needs, and what a fresh one answers to ASKED."""

    model: Toy
    folder: Path
    text: str
    logits: np.ndarray

    def copy(self, target: Path) -> Path:
        shutil.copytree(self.folder, target, dirs_exist_ok=True)
        return target

    def is_answered(self, started: Running) -> None:
        """Prove that the answer is as it would be without anything kept, and that nothing wrong is left."""
        assert divergence(self.logits, started.look(ASKED).logits) < 1e-3
        assert started.ask(ASKED).text == self.text
        assert started.complaints() == []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    with Toy(write_tiny_model("llama", tmp_path_factory.mktemp("llama")), gpu_layers=0) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def undisturbed(model: Toy, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    fresh, folder = tmp_path_factory.mktemp("fresh"), tmp_path_factory.mktemp("kept")
    for data in (fresh, folder):
        with Database(data) as database:
            add_document(database, DOCUMENT, 9)
    with running(model, fresh) as started:
        logits, text = started.look(ASKED).logits, started.ask(ASKED).text
    with running(model, folder) as started:
        started.ask(KEPT)
        assert len(started.files()) == 4
    return Undisturbed(model, folder, text, logits)


@pytest.fixture
def data(undisturbed: Undisturbed, tmp_path: Path) -> Path:
    """A copy of the undisturbed library, to be damaged."""
    return undisturbed.copy(tmp_path / "data")


# --- damaged files ---------------------------------------------------------------------------------------------------

Damage = Callable[[bytes], bytes]


def flipped(place: float) -> Damage:
    """Flip a bit at this share of the file."""

    def damage(content: bytes) -> bytes:
        at = int(place * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 8]) + content[at + 1 :]

    return damage


def older(content: bytes) -> bytes:
    _, _, length, checksum = PREAMBLE.unpack_from(content)
    return PREAMBLE.pack(MAGIC, 0, length, checksum) + content[PREAMBLE.size :]


DAMAGES: dict[str, Damage] = {
    "flipped magic": flipped(0),
    "flipped header": flipped(0.05),
    "flipped keys": flipped(0.4),
    "flipped values": flipped(0.9),
    "flipped end": flipped(1),
    "empty": lambda _: b"",
    "cut in the preamble": lambda content: content[:10],
    "cut in the header": lambda content: content[:300],
    "cut in the middle": lambda content: content[: len(content) // 2],
    "cut at the end": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "zeros": lambda content: bytes(len(content)),
    "older format": older,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_misses_and_go(undisturbed: Undisturbed, data: Path, name: str) -> None:
    damaged = {file: DAMAGES[name](file.read_bytes()) for file in kv_files(data)}
    for file, content in damaged.items():
        file.write_bytes(content)
    with running(undisturbed.model, data) as started:
        undisturbed.is_answered(started)
        assert started.files() == list(damaged), "what was lost is computed and kept again"
    assert all(file.read_bytes() != content for file, content in damaged.items())


def test_no_single_bit_can_make_an_answer_wrong(undisturbed: Undisturbed, tmp_path: Path) -> None:
    chance = random.Random(7)
    for number in range(FLIPS):
        folder = undisturbed.copy(tmp_path / str(number))
        file = chance.choice(kv_files(folder))
        file.write_bytes(flipped(chance.random())(file.read_bytes()))
        with running(undisturbed.model, folder) as started:
            undisturbed.is_answered(started)


@pytest.mark.parametrize("when", ["closed", "open"])
def test_files_that_changed_places_are_misses(undisturbed: Undisturbed, data: Path, when: str) -> None:
    files = kv_files(data)
    contents = [file.read_bytes() for file in files]
    if when == "closed":
        exchange(files)
    with running(undisturbed.model, data, {"kv.ram_mb": 0}) as started:
        if when == "open":  # nobody looks at sizes then
            exchange(files)
        undisturbed.is_answered(started)
    assert [file.stat().st_size for file in files] == [len(content) for content in contents]


def exchange(files: Sequence[Path]) -> None:
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents[1:] + contents[:1], strict=True):
        file.write_bytes(content)


def test_a_file_of_another_model_is_a_miss_under_the_name_of_ours(undisturbed: Undisturbed, data: Path) -> None:
    ours = kv_files(data)
    with running(undisturbed.model, data, model_name="another") as other:
        other.ask(KEPT)
        assert other.complaints() == []
    theirs = [file for file in kv_files(data) if file not in ours]
    assert len(theirs) == len(ours) == 4
    for mine, their in zip(ours, theirs, strict=True):
        shutil.copy(their, mine)
    with running(undisturbed.model, data) as started:
        undisturbed.is_answered(started)


def test_two_models_share_a_folder_without_a_hit_between_them(undisturbed: Undisturbed, data: Path) -> None:
    with running(undisturbed.model, data, model_name="another") as other:
        assert other.ask(ASKED).sources == ["new"] * 3
    with running(undisturbed.model, data) as started:
        assert started.engine.assembler.kv_status() is not None
        assert set(started.ask(ASKED).sources) <= {"ssd", "ram"}
        assert len(started.files()) == 8


def rewritten(data: Path, file: Path, **changes: Any) -> None:
    """Replace a file by a valid one whose sections are of a passage one token shorter, or of another generation."""
    with Database(data) as database, database.write() as connection:
        row = kv_rows.find(connection, file.stem)
        assert row is not None
        folder = KVFolder(data / KV_FOLDER, library=kv_rows.library_id(connection), generation=row.generation)
        stored = folder.read(file.stem)
        assert stored is not None
        names = KVFields.__struct_fields__
        fields = replace(KVFields(**{name: getattr(stored.header, name) for name in names}), **changes)
        shorter = {name: bytes(section)[: -len(section) // 20] for name, section in stored.sections.items()}
        size = folder.write(fields, shorter)
        kv_rows.put_row(connection, kv_rows.new_row(fields, generation=row.generation, bytes=size))


@pytest.mark.parametrize("which", ["prefix", "passages"])
def test_a_valid_file_of_another_shape_is_a_miss(undisturbed: Undisturbed, data: Path, which: str) -> None:
    with Database(data) as database, database.read() as connection:
        rows = [row for row in kv_rows.rows(connection) if (row.chunk_id == 0) == (which == "prefix")]
    for row in rows:
        rewritten(data, data / KV_FOLDER / row.key[:2] / f"{row.key}.kv")
    with running(undisturbed.model, data) as started:
        undisturbed.is_answered(started)


def test_a_file_of_an_unknown_codec_is_a_miss(undisturbed: Undisturbed, data: Path) -> None:
    for file in kv_files(data):
        rewritten(data, file, codec="q1")
    with running(undisturbed.model, data) as started:
        undisturbed.is_answered(started)


def test_files_of_an_older_generation_go_at_the_start(undisturbed: Undisturbed, data: Path) -> None:
    with Database(data) as database, database.write() as connection:
        for row in kv_rows.rows(connection):
            kv_rows.put_row(connection, replace(row, generation="older"))
    with running(undisturbed.model, data) as started:
        assert started.files() == []
        undisturbed.is_answered(started)


@pytest.mark.parametrize("lost", ["files", "rows"])
def test_files_without_rows_and_rows_without_files_do_no_harm(undisturbed: Undisturbed, data: Path, lost: str) -> None:
    if lost == "files":
        shutil.rmtree(data / KV_FOLDER)
    else:
        with Database(data) as database, database.write() as connection:
            connection.execute("DELETE FROM kv_files")
            connection.execute("DELETE FROM kv_removed")
    with running(undisturbed.model, data) as started:
        assert len(started.files()) == (0 if lost == "files" else 4)
        undisturbed.is_answered(started)


def test_files_that_vanish_while_they_are_known_are_misses(undisturbed: Undisturbed, data: Path) -> None:
    with running(undisturbed.model, data) as started:
        shutil.rmtree(data / KV_FOLDER)
        undisturbed.is_answered(started)
        assert len(started.files()) == 4


# --- no room ---------------------------------------------------------------------------------------------------------


class FullFolder(KVFolder):
    """A full disk."""

    def write(self, fields: KVFields, sections: Mapping[str, Any]) -> int:
        raise StorageError("the disk is full")


def test_a_full_disk_costs_no_answer(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Database(tmp_path) as database:
        add_document(database, DOCUMENT, 9)
    monkeypatch.setattr(parts, "KVFolder", FullFolder)
    with running(undisturbed.model, tmp_path) as started:
        undisturbed.is_answered(started)
        assert started.files() == []
        assert set(started.ask(KEPT).sources) == {"ram"}
    assert {record.message for record in caplog.records} == {"KV could not be kept: the disk is full"}


def test_a_quota_that_has_shrunk_is_kept_and_costs_no_answer(model: Toy, tmp_path: Path) -> None:
    chunks, asked = range(1, CHUNKS + 1), toy_prompt((1, 9, 18), tokens=TOKENS)
    with Database(tmp_path) as database:
        add_document(database, DOCUMENT, CHUNKS)
    flags = FLAGS | {"kv.ram_mb": 0}
    with running(model, tmp_path, flags | {"kv.disk_mb": 8}) as started:
        for chunk in chunks:
            started.look(toy_prompt((chunk,), tokens=TOKENS))
        started.settle()
        text = started.ask(asked).text
        assert size(tmp_path) > 1.1e6
    with running(model, tmp_path, flags) as started:
        assert 0.5e6 < size(tmp_path) <= 1e6
        assert started.complaints() == []
        assert started.ask(asked).text == text
        assert size(tmp_path) <= 1e6


def size(data: Path) -> int:
    return sum(file.stat().st_size for file in kv_files(data))


def test_without_a_quota_nothing_is_read_and_nothing_written(undisturbed: Undisturbed, data: Path) -> None:
    before = {file: file.read_bytes() for file in kv_files(data)}
    with running(undisturbed.model, data, {"kv.disk_mb": 0}) as started:
        assert started.ask(ASKED).sources == ["new"] * 3
        assert started.ask(ASKED).text == undisturbed.text
    assert {file: file.read_bytes() for file in kv_files(data)} == before


# --- documents that go meanwhile -------------------------------------------------------------------------------------


def removed(started: Running) -> None:
    remove_document(started.database, DOCUMENT)
    after_removal(started)


def replaced(started: Running) -> None:
    add_document(started.database, DOCUMENT, 9)
    after_removal(started)


def after_removal(started: Running) -> None:
    sweep_kv(started.database, started.folder)
    started.cache.take_stock()


Going = Callable[[Running], None]


def once(started: Running, place: str, what: Going, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen when this method of the cache is called for the first time."""
    original = getattr(started.cache, place)
    happened: list[int] = []

    def hooked(*arguments: Any, **options: Any) -> Any:
        if not happened:
            happened.append(1)
            what(started)
        return original(*arguments, **options)

    monkeypatch.setattr(started.cache, place, hooked)


@pytest.mark.parametrize("what", [removed, replaced])
@pytest.mark.parametrize("place", ["state", "keep", "used"])
def test_a_document_that_goes_takes_its_kv_along_whatever_it_is_used_for(
    undisturbed: Undisturbed, data: Path, place: str, what: Going, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(undisturbed.model, data) as started:
        once(started, place, what, monkeypatch)
        assert started.ask(toy_prompt((2, 3, 1, 5), question=2)).last.reason == "length"
        assert [len(file.read_bytes()) for file in started.files()] == [prefix_size(started)]
        undisturbed.is_answered(started)
    with running(undisturbed.model, data) as started:
        assert len(started.files()) == 1, "the prefix belongs to no document"
        undisturbed.is_answered(started)


def prefix_size(started: Running) -> int:
    with started.database.read() as connection:
        row = kv_rows.find(connection, started.cache.key(PREFIX))
    assert row is not None
    return row.bytes


def test_a_document_that_goes_between_file_and_row_takes_the_file_along(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[int] = []

    class GoingFolder(KVFolder):
        def write(self, fields: KVFields, sections: Mapping[str, Any]) -> int:
            size = super().write(fields, sections)
            if fields.chunk_id == 1 and not gone:
                gone.append(fields.chunk_id)
                with Database(tmp_path) as other:
                    remove_document(other, DOCUMENT)
            return size

    with Database(tmp_path) as database:
        add_document(database, DOCUMENT, 3)
    monkeypatch.setattr(parts, "KVFolder", GoingFolder)
    with running(undisturbed.model, tmp_path) as started:
        list(started.engine.submit(KEPT, SAMPLING))
        started.on_thread(lambda _: None)
        started.cache.flush()
        after_removal(started)
        started.settle()
        assert len(started.files()) == 1
        undisturbed.is_answered(started)


# --- the process that goes -------------------------------------------------------------------------------------------


def killed_while_keeping(repository: Path, model: Path, data: Path, seed: int, answers: int) -> None:
    command = [sys.executable, "-m", "tests.runtime.keeping", str(model), str(data), str(seed)]
    with subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(answers):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL


def answers(started: Running, prompts: Sequence[Prompt]) -> list[np.ndarray]:
    return [started.look(prompt).logits for prompt in prompts]


def test_killing_it_again_and_again_leaves_whole_kv_and_right_answers(
    model: Model, repository: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    chance = random.Random(7)
    prompts = [toy_prompt(chance.sample(range(1, CHUNKS + 1), 3), tokens=TOKENS) for _ in range(8)]
    fresh = tmp_path_factory.mktemp("fresh")
    for data in (fresh, tmp_path):
        with Database(data) as database:
            add_document(database, DOCUMENT, CHUNKS)
    with running(model, fresh, FLAGS) as started:
        expected = answers(started, prompts)
    loaded = 0
    for seed in range(KILLS):
        killed_while_keeping(repository, model.path, tmp_path, seed, chance.randrange(40))
        with running(model, tmp_path, FLAGS) as started:
            assert started.complaints() == []
            assert size(tmp_path) <= 1e6
            keys = [started.cache.key(PREFIX, toy_passage(chunk, TOKENS)) for chunk in range(1, CHUNKS + 1)]
            for key in keys:
                on_disk = started.cache.where(key)[0] == "ssd"
                assert (started.cache.fetch(key) is not None) == on_disk, "what is there is whole"
                loaded += on_disk
            for logits, right in zip(answers(started, prompts), expected, strict=True):
                assert divergence(right, logits) < 1e-3
            started.settle()
            with started.database.write() as connection:
                assert list(documents.check(connection)) == []
                assert documents.counts(connection).chunks == CHUNKS
    assert loaded > 0
