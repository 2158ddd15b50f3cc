"""Which adapter answers, by the registry and the files as they are: found, refused, disabled, counted."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from edge_rag.errors import ModelError, StorageError
from edge_rag.native.llama import Model
from edge_rag.policy.covering import NONE, Chosen
from edge_rag.policy.prompt import LAYOUT_VERSION
from edge_rag.records import Adapter, AdapterStatus, PassagePlan, Plan
from edge_rag.runtime.adapter_pager import Pager
from edge_rag.runtime.covering import Coverer, NoAdapters
from edge_rag.runtime.shelf import Shelf
from edge_rag.store import adapters
from edge_rag.store.adapters import AdapterFolder, Questions
from edge_rag.store.database import Database
from tests.native.tiny_models import write_tiny_model
from tests.runtime.registry import Registry, add, spoil, state, trained, unit
from tests.runtime.serving import Toy
from tests.store.adapter_samples import BASE, PASSED


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Toy(write_tiny_model("llama", tmp_path_factory.mktemp("llama")), gpu_layers=0) as model:
        yield model


@pytest.fixture
def database(registry: Registry) -> Database:
    """With nine passages."""
    return registry.database


@pytest.fixture
def folder(registry: Registry) -> AdapterFolder:
    return registry.folder


@pytest.fixture
def pager(registry: Registry) -> Pager:
    return registry.pager


def coverer(database: Database, pager: Pager, *, base: str = BASE, least: float = 0.3) -> Coverer:
    return Coverer(Shelf(database, pager, base=base), least=least)


# --- the choice ------------------------------------------------------------------------------------------------------


def test_the_adapter_that_covers_most_answers(database: Database, folder: AdapterFolder, pager: Pager) -> None:
    add(database, folder, 1, 1, 2)
    large = add(database, folder, 2, 1, 2, 3, 4)
    found = coverer(database, pager).choose(unit(0), [3, 9, 1, 2])
    assert found == Chosen(large, frozenset({1, 2, 3}))


def test_too_small_a_share_is_not_worth_it(database: Database, folder: AdapterFolder, pager: Pager) -> None:
    one = add(database, folder, 1, 1)
    assert coverer(database, pager, least=0.5).choose(unit(0), [1, 2, 3]) == NONE
    assert coverer(database, pager, least=0.3).choose(unit(0), [1, 2, 3]).adapter == one
    assert coverer(database, pager, least=0).choose(unit(0), [2, 3]) == NONE
    assert coverer(database, pager, least=0).choose(unit(0), []) == NONE


@pytest.mark.parametrize(
    ("asked", "f1", "reach", "expected"),
    [
        pytest.param(0.0, 1.0, 0.8, True, id="what it was trained on"),
        pytest.param(0.0, 0.4, 0.8, False, id="what it was trained on and failed"),
        pytest.param(0.0, np.nan, 0.8, True, id="what it was trained on and was not examined in"),
        pytest.param(30.0, 1.0, 0.8, True, id="within its reach"),
        pytest.param(30.0, 1.0, 0.9, False, id="out of its reach"),
        pytest.param(1.0, 1.0, 1.0, True, id="the same question in other digits"),
    ],
)
def test_it_answers_only_what_its_exam_allows(
    database: Database, folder: AdapterFolder, pager: Pager, asked: float, f1: float, reach: float, expected: bool
) -> None:
    one = add(database, folder, 1, 1, 2, questions=trained(0, f1=f1), gate=replace(PASSED, reach=reach))
    angle = np.radians(asked)
    vector = (np.cos(angle) * unit(0) + np.sin(angle) * unit(1)).astype(np.float32)
    assert coverer(database, pager).choose(vector, [1, 2]).adapter == (one if expected else "")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"state": "disabled"}, id="disabled"),
        pytest.param({"gate": None}, id="not examined"),
        pytest.param({"gate": replace(PASSED, passed=False)}, id="not passed"),
        pytest.param({"base": "c" * 64}, id="of a model that was replaced"),
        pytest.param({"layout": LAYOUT_VERSION + 1}, id="of another layout"),
    ],
)
def test_what_may_not_answer_is_not_chosen(
    database: Database, folder: AdapterFolder, pager: Pager, changes: dict[str, Any]
) -> None:
    add(database, folder, 1, 1, 2, **changes)
    made = coverer(database, pager)
    assert made.choose(unit(0), [1, 2]) == NONE
    assert made.status().ready == 0


def test_an_adapter_without_questions_answers_none(database: Database, folder: AdapterFolder, pager: Pager) -> None:
    nothing = Questions((), np.zeros((0, 0), np.float16), np.zeros(0, np.float32))
    add(database, folder, 1, 1, 2, questions=nothing)
    assert coverer(database, pager).choose(unit(0), [1, 2]) == NONE


# --- the registry changes --------------------------------------------------------------------------------------------


def test_what_is_registered_or_removed_counts_from_the_next_refresh_on(
    database: Database, folder: AdapterFolder, pager: Pager
) -> None:
    made = coverer(database, pager)
    one = add(database, folder, 1, 1, 2)
    assert made.choose(unit(0), [1, 2]) == NONE
    made.refresh()
    assert made.choose(unit(0), [1, 2]).adapter == one
    with database.write() as connection:
        adapters.remove(connection, one)
    made.refresh()
    assert made.choose(unit(0), [1, 2]) == NONE


def test_pinned_ones_are_told_to_the_pager(
    database: Database, folder: AdapterFolder, pager: Pager, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[frozenset[str]] = []
    monkeypatch.setattr(pager, "pin", told.append)
    one = add(database, folder, 1, 1, 2, pinned=True)
    add(database, folder, 2, 3)
    add(database, folder, 3, 4, pinned=True, state="disabled")
    coverer(database, pager)
    assert told == [frozenset({one})]


# --- files that are not what they should be --------------------------------------------------------------------------


def test_an_adapter_whose_file_was_changed_has_failed_and_the_next_best_answers(
    database: Database, folder: AdapterFolder, pager: Pager
) -> None:
    small, large = add(database, folder, 1, 1, 2), add(database, folder, 2, 1, 2, 3)
    spoil(folder, large)
    made = coverer(database, pager)
    assert made.choose(unit(0), [1, 2, 3]) == Chosen(small, frozenset({1, 2}))
    assert state(database, large) == ("failed", "its file is missing or was changed")
    assert state(database, small) == ("ready", "")
    assert made.status().ready == 1


def test_when_all_files_are_gone_the_passages_are_read(database: Database, folder: AdapterFolder, pager: Pager) -> None:
    ids = [add(database, folder, number, 1, 2, number) for number in (3, 4)]
    for id in ids:
        folder.path(id).unlink()
    made = coverer(database, pager)
    assert made.choose(unit(0), [1, 2]) == NONE
    assert {state(database, id)[0] for id in ids} == {"failed"}
    assert made.status().ready == 0


def test_a_library_that_cannot_be_written_costs_no_answer(
    database: Database, folder: AdapterFolder, pager: Pager, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    small, large = add(database, folder, 1, 1, 2), add(database, folder, 2, 1, 2, 3)
    spoil(folder, large)
    made = coverer(database, pager)

    def full() -> Any:
        raise StorageError("the disk is full")

    monkeypatch.setattr(database, "write", full)
    for _ in range(2):
        assert made.choose(unit(0), [1, 2, 3]).adapter == small
    assert "the disk is full" in caplog.text


def test_one_that_cannot_be_loaded_has_failed(database: Database, folder: AdapterFolder, pager: Pager) -> None:
    one = add(database, folder, 1, 1, 2)
    made = coverer(database, pager)
    assert made.choose(unit(0), [1, 2]).adapter == one  # its file is what its name says, and is no adapter
    with pytest.raises(ModelError):
        pager.take(one)
    made.failed(one)
    assert state(database, one) == ("failed", "it could not be loaded")
    assert made.choose(unit(0), [1, 2]) == NONE
    assert made.status().fallbacks == 1


def test_one_that_failed_for_another_reason_may_be_asked_again(
    database: Database, folder: AdapterFolder, pager: Pager
) -> None:
    one = add(database, folder, 1, 1, 2)
    made = coverer(database, pager)
    made.failed(one)
    assert state(database, one) == ("ready", "")
    assert made.choose(unit(0), [1, 2]).adapter == one
    assert made.status().fallbacks == 1


# --- counts ----------------------------------------------------------------------------------------------------------


def test_answers_and_remembered_passages_are_counted(database: Database, folder: AdapterFolder, pager: Pager) -> None:
    one = add(database, folder, 1, 1, 2)
    made = coverer(database, pager)
    passages = (PassagePlan(1, 5, how="remembered"), PassagePlan(2, 5, how="remembered"), PassagePlan(3, 5))
    made.count(Plan(passages, adapter=one), NONE)
    made.count(Plan(passages[2:]), NONE)
    assert made.status() == AdapterStatus(ready=1, pager=pager.status(), answers=1, remembered=2, fallbacks=0)


def test_where_there_are_no_adapters_nothing_is_chosen_or_counted() -> None:
    none = NoAdapters()
    none.count(Plan(adapter="a"), NONE)
    none.failed("a")
    assert none.choose(unit(0), [1, 2]) == NONE


def test_the_registry_is_not_read_for_each_question(
    database: Database, folder: AdapterFolder, pager: Pager, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = add(database, folder, 1, 1, 2)
    made = coverer(database, pager)
    found: list[Adapter] = []
    monkeypatch.setattr(adapters, "adapters", lambda connection: found)
    assert made.choose(unit(0), [1, 2]).adapter == one
