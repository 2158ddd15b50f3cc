"""Adapters that travel: out of one library and into another, and what a bundle from a stranger may not do."""

import json
import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_rag.errors import InputError, NotFound, StorageError
from edge_rag.records import Adapter
from edge_rag.store import adapter_bundle, adapters
from edge_rag.store.adapter_bundle import export_bundle, import_bundle
from edge_rag.store.adapter_sheet import MOST_BYTES, SHEET, WEIGHTS, content_hash, parse_sheet
from edge_rag.store.adapters import AdapterFolder
from edge_rag.store.database import Database
from tests.store.adapter_samples import (
    BASE,
    LAYOUT,
    add_adapter,
    add_passages,
    all_adapters,
    asked,
    embed,
    questions,
    remove_document,
)


class Library:
    """A library with its adapters' folder."""

    def __init__(self, place: Path) -> None:
        self.database = Database(place)
        self.folder = AdapterFolder(place / "adapters")

    def take(self, bundle: Path, **changes: Any) -> Adapter:
        values: dict[str, Any] = {"base": BASE, "layout": LAYOUT, "embed": embed}
        return import_bundle(self.database, self.folder, bundle, **values | changes)

    def leftovers(self) -> list[Path]:
        return [*(self.folder.folder / "tmp").glob("*")]


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Library]:
    library = Library(tmp_path / "here")
    with library.database:
        yield library


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Library]:
    """Another library with the same passages and more, under other ids."""
    library = Library(tmp_path / "there")
    add_passages(library.database, "other", "something else", "cleaning", heading="Not the same heading")
    add_passages(library.database, "manual", "cleaning", "repair")
    with library.database:
        yield library


@pytest.fixture
def exported(here: Library) -> Adapter:
    chunks = add_passages(here.database, "manual", "cleaning", "repair")
    marks = asked("Why?", "How much?", f1=[0.75, np.nan])
    return add_adapter(here.database, here.folder, 1, *chunks, questions=marks)


@pytest.fixture
def bundle(here: Library, exported: Adapter, tmp_path: Path) -> Path:
    export_bundle(here.database, here.folder, exported.id[:8], tmp_path / "manual.adapter")
    return tmp_path / "manual.adapter"


def rewritten(bundle: Path, change: Callable[[dict[str, Any]], object] = lambda sheet: None, **entries: bytes) -> Path:
    """The bundle with its sheet changed, and with other entries (named without their suffix)."""
    with zipfile.ZipFile(bundle) as archive:
        sheet = json.loads(archive.read(SHEET))
        content = {WEIGHTS: archive.read(WEIGHTS)}
    change(sheet)
    content[SHEET] = json.dumps(sheet).encode()
    content |= {{"sheet": SHEET, "weights": WEIGHTS}[name]: value for name, value in entries.items()}
    with zipfile.ZipFile(bundle, "w") as archive:
        for name, value in content.items():
            archive.writestr(name, value)
    return bundle


def refused(library: Library, bundle: Path, match: str, **changes: Any) -> None:
    before = all_adapters(library.database)
    with pytest.raises(InputError, match=match) as caught:
        library.take(bundle, **changes)
    assert caught.value.field
    assert all_adapters(library.database) == before
    assert library.folder.sizes().keys() == {each.id for each in before}
    assert library.leftovers() == []


# --- there and back --------------------------------------------------------------------------------------------------


def test_an_adapter_arrives_with_all_it_is_and_covers_the_same_passages(
    here: Library, there: Library, exported: Adapter, bundle: Path
) -> None:
    taken = there.take(bundle)
    with there.database.read() as connection:
        ids = [
            chunk_id
            for (chunk_id,) in connection.execute("SELECT id FROM chunks WHERE heading = 'Heading' ORDER BY id")
        ]
    assert taken == replace(exported, cluster_id=None, members=tuple(ids))
    assert taken.members != exported.members
    assert all_adapters(there.database) == [taken]
    assert there.folder.path(taken.id).read_bytes() == here.folder.path(exported.id).read_bytes()
    found, original = questions(there.database, taken.id), questions(here.database, exported.id)
    assert found.texts == original.texts
    np.testing.assert_array_equal(found.vectors, original.vectors)
    np.testing.assert_array_equal(found.f1, original.f1)


def seen_and_unseen(library: Library, id: str) -> list[Any]:
    """Questions with their marks, those that it was trained on and held-out ones."""
    with library.database.read() as connection:
        both = [adapters.questions_of(connection, id, held_out=held_out) for held_out in (False, True)]
    return [list(zip(each.texts, each.f1.tolist(), strict=True)) for each in both]


@pytest.fixture
def examined(here: Library, exported: Adapter, tmp_path: Path) -> Path:
    """A bundle whose adapter was examined in held-out questions too."""
    trained, held_out = asked("Why?", f1=[0.75]), asked("Who?", "When?", f1=[0.25, 1.0])
    with here.database.write() as connection:
        assert adapters.put_adapter(connection, exported, trained, held_out)
    export_bundle(here.database, here.folder, exported.id, tmp_path / "examined")
    return tmp_path / "examined"


def test_held_out_questions_travel_as_such(there: Library, examined: Path) -> None:
    taken = there.take(examined)
    assert seen_and_unseen(there, taken.id) == [[("Why?", 0.75)], [("When?", 1.0), ("Who?", 0.25)]]
    with there.database.read() as connection:
        vectors = adapters.exam_of(connection, taken.id).vectors
    np.testing.assert_array_equal(vectors, embed(["When?", "Who?", "Why?"]).astype(np.float16).astype(np.float32))


def test_a_bundle_that_knows_nothing_of_held_out_questions_is_read(there: Library, examined: Path) -> None:
    taken = there.take(rewritten(examined, lambda sheet: sheet.pop("held_out")))
    assert seen_and_unseen(there, taken.id) == [[("Why?", 0.75)], []]


def test_a_program_that_knows_nothing_of_held_out_questions_reads_the_others(examined: Path) -> None:
    with zipfile.ZipFile(examined) as archive:
        sheet = parse_sheet(archive.read(SHEET))
    assert [(each.question, each.f1) for each in sheet.questions] == [("Why?", 0.75)]


@pytest.mark.parametrize(
    "held_out",
    [
        pytest.param("Who?", id="a text"),
        pytest.param([{"question": "Who?"}], id="no mark"),
        pytest.param([{"question": "Who?", "f1": None}], id="a mark that is none"),
        pytest.param([{"question": "Who?", "f1": 1.5}], id="a mark above one"),
        pytest.param([{"question": "W" * 20_001, "f1": 1}], id="a question that is a book"),
        pytest.param([{"question": 5, "f1": 1}], id="a question that is a number"),
    ],
)
def test_held_out_questions_out_of_range_are_refused(there: Library, examined: Path, held_out: Any) -> None:
    refused(there, rewritten(examined, lambda sheet: sheet.update(held_out=held_out)), "not as it should be")


def test_questions_are_embedded_with_the_encoder_that_is_there(there: Library, bundle: Path) -> None:
    taken = there.take(bundle, embed=lambda texts: np.ones((len(texts), 5), np.float32))
    np.testing.assert_array_equal(questions(there.database, taken.id).vectors, np.ones((2, 5), np.float16))


def test_an_adapter_without_questions_travels_too(here: Library, there: Library, tmp_path: Path) -> None:
    chunks = add_passages(here.database, "manual", "cleaning", "repair")
    silent = add_adapter(here.database, here.folder, 2, *chunks, questions=asked())
    export_bundle(here.database, here.folder, silent.id, tmp_path / "silent")
    assert questions(there.database, there.take(tmp_path / "silent").id).texts == ()


def test_a_passage_that_is_there_twice_is_covered_twice(there: Library, bundle: Path) -> None:
    (copy,) = add_passages(there.database, "copy", "repair")
    taken = there.take(bundle)
    assert copy in taken.members
    assert len(taken.members) == 3


def test_the_same_adapter_gives_the_same_bundle_and_only_the_owner_can_read_it(
    here: Library, exported: Adapter, bundle: Path, tmp_path: Path
) -> None:
    export_bundle(here.database, here.folder, exported.id, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == bundle.read_bytes()
    assert stat.S_IMODE(bundle.stat().st_mode) == 0o600


def test_a_bundle_holds_no_text_of_the_passages(bundle: Path) -> None:
    with zipfile.ZipFile(bundle) as archive:
        sheet = archive.read(SHEET).decode()
    assert content_hash("Heading", "cleaning") in sheet
    assert "cleaning" not in sheet


def test_heading_and_text_are_kept_apart_in_a_passages_name() -> None:
    assert content_hash("ab", "c") != content_hash("a", "bc")


# --- out -------------------------------------------------------------------------------------------------------------


def test_an_existing_file_is_not_overwritten(here: Library, exported: Adapter, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        export_bundle(here.database, here.folder, exported.id, tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "mine"


def test_an_adapter_that_is_not_there_cannot_be_exported(here: Library, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        export_bundle(here.database, here.folder, "abc", tmp_path / "bundle")


def test_a_damaged_adapter_is_not_exported(here: Library, exported: Adapter, tmp_path: Path) -> None:
    os.truncate(here.folder.path(exported.id), 100)
    with pytest.raises(StorageError, match="its file was changed"):
        export_bundle(here.database, here.folder, exported.id, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_an_export_that_fails_leaves_nothing(
    here: Library, exported: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(adapter_bundle.shutil, "copyfileobj", full)
    with pytest.raises(StorageError, match="No space left"):
        export_bundle(here.database, here.folder, exported.id, tmp_path / "out" / "bundle")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(StorageError, match="No such file"):
        export_bundle(here.database, here.folder, exported.id, tmp_path / "nowhere" / "bundle")


# --- again -----------------------------------------------------------------------------------------------------------


def test_importing_again_changes_nothing(there: Library, bundle: Path) -> None:
    taken = there.take(bundle)
    with there.database.write() as connection:
        adapters.set_state(connection, taken.id, "disabled", "by hand")
        adapters.set_pinned(connection, taken.id, True)
    assert there.take(bundle) == replace(taken, state="disabled", reason="by hand", pinned=True)
    assert len(all_adapters(there.database)) == 1


def test_importing_again_heals_a_damaged_file(there: Library, bundle: Path) -> None:
    taken = there.take(bundle)
    there.folder.path(taken.id).unlink()
    with there.database.write() as connection:
        adapters.sweep(connection, there.folder)
    assert [each.state for each in all_adapters(there.database)] == ["failed"]
    assert there.take(bundle) == taken
    assert there.folder.verify(taken.id) == ""


def test_what_failed_its_exam_here_stays_failed(here: Library, exported: Adapter, bundle: Path) -> None:
    assert exported.gate is not None
    failed = replace(exported, state="failed", reason="kept .1", gate=replace(exported.gate, passed=False))
    with here.database.write() as connection:
        adapters.put_adapter(connection, failed, asked("Why?"))
    assert here.take(bundle) == failed


@pytest.mark.parametrize("examined", [True, False])
def test_an_adapter_that_has_passed_no_exam_comes_in_disabled(there: Library, bundle: Path, examined: bool) -> None:
    def change(sheet: dict[str, Any]) -> None:
        sheet["gate"] = sheet["gate"] | {"passed": False} if examined else None

    taken = there.take(rewritten(bundle, change))
    assert (taken.state, taken.reason) == ("disabled", "it has not passed an exam")


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_a_bundle_of_another_model_is_refused(there: Library, bundle: Path) -> None:
    refused(there, bundle, "another model", base="c" * 64)


def test_a_bundle_of_another_layout_is_refused(there: Library, bundle: Path) -> None:
    refused(there, bundle, f"layout {LAYOUT}, these are {LAYOUT + 1}", layout=LAYOUT + 1)


def test_a_bundle_whose_passages_are_not_all_there_is_refused_and_says_which(there: Library, bundle: Path) -> None:
    add_passages(there.database, "manual", "cleaning", "repair in another edition")
    refused(there, bundle, "covers 2 passages, and 1 of them are not in this library: manual › Heading")


def test_of_many_missing_passages_a_few_are_named(here: Library, there: Library, tmp_path: Path) -> None:
    chunks = [
        chunk for n in range(9) for chunk in add_passages(here.database, f"d{n}", f"text {n}", heading="\x1b[31mred\n")
    ]
    added = add_adapter(here.database, here.folder, 3, *chunks)
    export_bundle(here.database, here.folder, added.id, tmp_path / "many")
    with pytest.raises(InputError, match=r"9 of them are not in this library: .*; and 4 more ") as caught:
        there.take(tmp_path / "many")
    assert caught.value.message.isprintable()


def test_a_passage_that_goes_while_a_bundle_comes_in_is_noticed(there: Library, bundle: Path) -> None:
    def slow(texts: Any) -> Any:
        remove_document(there.database, "manual")
        return embed(texts)

    refused(there, bundle, "removed just now", embed=slow)


# --- what a stranger may try -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "readme.txt", WEIGHTS])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_other_entries_are_refused(there: Library, bundle: Path, tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(bundle, "a") as archive:
        archive.writestr(name, b"evil")
    refused(there, bundle, "and nothing else")
    assert not list(tmp_path.rglob("*evil*"))


def test_an_entry_that_is_missing_is_refused(there: Library, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "half", "w") as archive:
        archive.writestr(SHEET, b"{}")
    refused(there, tmp_path / "half", "and nothing else")


def test_other_weights_are_refused(there: Library, bundle: Path) -> None:
    refused(there, rewritten(bundle, weights=b"GGUF of somebody else"), "is not the one that adapter.json describes")


def test_weights_that_are_not_gguf_are_refused(there: Library, bundle: Path) -> None:
    refused(there, rewritten(bundle, weights=b"#!/bin/sh"), "not a GGUF file")


@pytest.mark.parametrize("entry", [SHEET, WEIGHTS])
def test_an_entry_that_is_too_large_is_refused_before_it_is_unpacked(
    there: Library, bundle: Path, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MOST_BYTES, entry, 10)
    refused(there, bundle, "too large")


def test_a_sheet_that_is_larger_than_it_says_is_not_read_to_its_end(
    there: Library, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(bundle) as archive:
        sheet, gguf = archive.read(SHEET), archive.read(WEIGHTS)
    with zipfile.ZipFile(bundle, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(SHEET, sheet + b" " * 1_000_000)
        archive.writestr(WEIGHTS, gguf)
    content = bundle.read_bytes()
    size = (len(sheet) + 1_000_000).to_bytes(4, "little")
    assert content.count(size) == 2
    bundle.write_bytes(content.replace(size, (len(sheet)).to_bytes(4, "little")))
    refused(there, bundle, "not a sound bundle")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param(["sha256"], "../evil", id="an id that is a path"),
        pytest.param(["sha256"], "a" * 64 + "\n", id="an id with a line break"),
        pytest.param(["bytes"], 0, id="no bytes"),
        pytest.param(["bytes"], 1 << 62, id="too many bytes"),
        pytest.param(["layout"], -1, id="a layout below zero"),
        pytest.param(["made_at"], 1e300, id="made at the end of time"),
        pytest.param(["members"], [], id="no members"),
        pytest.param(["members", 0, "sha256"], "x", id="a member without a hash"),
        pytest.param(["members", 0, "place"], "x" * 1001, id="a place that fills the screen"),
        pytest.param(["questions", 0, "f1"], 1.5, id="a mark above one"),
        pytest.param(["questions", 0, "question"], 5, id="a question that is a number"),
        pytest.param(["questions"], "Why?", id="questions that are a text"),
        pytest.param(["gate", "reach"], -7, id="a reach beyond everything"),
        pytest.param(["gate", "drift"], -0.1, id="a drift below zero"),
        pytest.param(["gate", "seen", "f1"], 40, id="an exam in percent"),
        pytest.param(["gate", "unseen", "questions"], -1, id="fewer than no questions"),
        pytest.param(["gate", "passed"], "yes", id="passed in words"),
        pytest.param(["recipe", "rank"], None, id="no rank"),
        pytest.param(["format"], 2, id="a newer format"),
        pytest.param(["format"], "1", id="a format in words"),
    ],
)
def test_values_out_of_range_are_refused(there: Library, bundle: Path, path: list[Any], value: object) -> None:
    def change(sheet: dict[str, Any]) -> None:
        place: Any = sheet
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    refused(there, rewritten(bundle, change), r"not as it should be|out of range|has format \d")


@pytest.mark.parametrize("sheet", [b"", b"null", b"[]", b"\xff", b'{"format": 1}', b"[" * 100_000])
def test_a_sheet_that_is_none_is_refused(there: Library, bundle: Path, sheet: bytes) -> None:
    refused(there, rewritten(bundle, sheet=sheet), "not as it should be")


def test_what_is_no_file_or_no_archive_is_refused(there: Library, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("just text")
    refused(there, tmp_path / "nothing", "there is no file")
    refused(there, tmp_path / "pipe", "there is no file")
    refused(there, tmp_path, "there is no file")
    refused(there, tmp_path / "text", "not a sound bundle")


def test_a_file_too_large_for_a_bundle_is_not_opened(there: Library, tmp_path: Path) -> None:
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", sum(MOST_BYTES.values()) + 1)
    refused(there, tmp_path / "huge", "too large")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_bundle_that_was_changed_anywhere_is_refused_or_means_the_same(
    there: Library, bundle: Path, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(bundle.read_bytes())
    before, after = content.index(b"GGUF"), content.index(b"PK\x01\x02")  # weights between: most changes would hit them
    place = data.draw(st.integers(0, before) | st.integers(after, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    (tmp_path / "changed").write_bytes(content[: data.draw(st.sampled_from([None, place]))])
    try:
        taken = there.take(tmp_path / "changed")
    except InputError:
        pass
    else:
        assert there.folder.verify(taken.id) == ""
    assert there.leftovers() == []
