"""What was learned, as a library shows it and lets it be changed, and learning by hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_rag.config import Settings
from edge_rag.errors import ConfigError, InputError, NotFound
from edge_rag.policy.prompt import LAYOUT_VERSION
from edge_rag.records import Adapter, Lesson
from edge_rag.runtime import school
from edge_rag.runtime.graduation import UNEXAMINED
from edge_rag.runtime.rag import EdgeRAG
from edge_rag.store import clusters, items
from edge_rag.store.adapters import Questions, exam_of, put_adapter, register
from tests.runtime.serving import add_files, small_library
from tests.store.adapter_samples import unregistered, weights

TEXTS = {
    "battery.txt": "The battery of the Marlin unit lasts nine hours and is charged overnight.",
    "hose.txt": "The hose of the Marlin unit is two metres long and must not be bent.",
    "pump.txt": "The pump of the Marlin unit must be oiled every 12 weeks.",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, small_settings: Settings) -> Iterator[EdgeRAG]:
    """A library of three passages, whose adapters are chosen by rule: nothing has to be learned first."""
    folder = tmp_path_factory.mktemp("learned")
    with small_library(folder / "data", small_settings, router__mode="coverage") as opened:
        add_files(opened, folder / "files", TEXTS)
        yield opened


@pytest.fixture
def rag(library: EdgeRAG) -> Iterator[EdgeRAG]:
    """That library; what a test has put into its registry goes with the test."""
    yield library
    for adapter in library.adapters():
        library.delete_adapter(adapter.id)


def chunks(rag: EdgeRAG) -> list[int]:
    with rag._database.read() as connection:
        return [chunk for (chunk,) in connection.execute("SELECT id FROM chunks ORDER BY id")]


def add(rag: EdgeRAG, number: int, *members: int, **changes: Any) -> Adapter:
    """Register an adapter of this library's model, which is nothing that could be loaded."""
    house = rag._house
    vectors = house.embedder().embed(["Why?"]).astype(np.float16)
    questions = Questions(("Why?",), vectors, np.ones(1, np.float32))
    adapter = unregistered(*members, base=house.base(), layout=LAYOUT_VERSION, **changes)
    made = register(house.database, house.school.folder, weights(rag.folder, number), adapter, questions)
    assert made is not None
    return made


def test_clusters_are_shown_with_their_passages_and_questions_the_heaviest_first(rag: EdgeRAG) -> None:
    one, two, three = chunks(rag)
    with rag._database.write() as connection:
        clusters.put_clusters(connection, [frozenset({one}), frozenset({two, three})], [1.0, 2.0], now=1.0)
        items.add_study(connection, two, ["What is it?"], model=rag._house.base(), asked=4, now=1.0)
    heavy, light = rag.clusters()
    assert (heavy.members, light.members) == ((two, three), (one,))
    view = rag.cluster(heavy.id)
    assert view.cluster == heavy
    assert [passage.chunk_id for passage in view.passages] == [two, three]
    assert [item.question for item in view.items] == ["What is it?"]
    with pytest.raises(NotFound):
        rag.cluster(99)
    with pytest.raises(InputError):
        rag.cluster("x")  # type: ignore[arg-type]


def test_an_adapter_is_found_pinned_disabled_enabled_and_deleted(rag: EdgeRAG) -> None:
    made = add(rag, 1, *chunks(rag)[:2])
    file = rag._house.school.folder.path(made.id)
    assert rag.adapters() == [rag.adapter(made.id[:9])] == [made]
    assert rag.pin_adapter(made.id[:9]).pinned
    assert not rag.pin_adapter(made.id, False).pinned
    disabled = rag.disable_adapter(made.id)
    assert (disabled.state, disabled.reason) == ("disabled", "it was disabled")
    assert rag.enable_adapter(made.id) == made
    assert file.exists()
    assert rag.delete_adapter(made.id) == made
    assert rag.adapters() == []
    assert not file.exists()
    with pytest.raises(NotFound):
        rag.pin_adapter(made.id)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"state": "failed", "reason": "its file was changed"}, "has failed: its file", id="failed"),
        pytest.param({"state": "disabled", "reason": UNEXAMINED, "gate": None}, "not examined yet", id="unexamined"),
    ],
)
def test_what_did_not_pass_its_exam_cannot_be_enabled(rag: EdgeRAG, changes: dict[str, Any], message: str) -> None:
    made = add(rag, 1, *chunks(rag)[:2], **changes)
    with pytest.raises(InputError, match=message):
        rag.enable_adapter(made.id)
    assert rag.adapter(made.id) == made


def test_changes_count_from_the_next_question_on(rag: EdgeRAG, tmp_path: Path) -> None:
    coverer = rag._house.school.coverer()
    assert coverer is not None
    file = tmp_path / "more.txt"
    file.write_text("The tank of the Marlin unit holds forty litres.")
    rag.add(file)
    asked, members = rag._house.embedder().embed(["Why?"])[0], chunks(rag)
    made = add(rag, 1, *members)
    rag.pin_adapter(made.id)
    assert coverer.choose(asked, members).adapter == made.id
    rag.disable_adapter(made.id)
    assert coverer.choose(asked, members).adapter == ""
    rag.enable_adapter(made.id)
    assert coverer.choose(asked, members).adapter == made.id
    rag.remove(str(file))
    assert rag.adapters() == []
    assert coverer.choose(asked, members).adapter == ""


def test_questions_of_both_kinds_are_embedded_anew(rag: EdgeRAG) -> None:
    made = add(rag, 1, chunks(rag)[0])
    stale = np.ones((1, 2), np.float16)
    trained, held_out = (Questions((text,), stale, np.ones(1, np.float32)) for text in ("Why?", "Who?"))
    with rag._database.write() as connection:
        assert put_adapter(connection, made, trained, held_out)
    rag.reembed()
    with rag._database.read() as connection:
        vectors = exam_of(connection, made.id).vectors
    expected = rag._house.embedder().embed(["Who?", "Why?"])
    np.testing.assert_allclose(vectors, expected, atol=1e-3)


def test_an_adapter_travels_in_a_file(rag: EdgeRAG, tmp_path: Path) -> None:
    made = add(rag, 1, *chunks(rag))
    target = tmp_path / "one.adapter"
    assert rag.export_adapter(made.id[:8], target) == made
    rag.delete_adapter(made.id)
    imported = rag.import_adapter(target)
    assert (imported.id, imported.members, imported.gate) == (made.id, made.members, made.gate)
    assert rag.adapters() == [imported]


def test_learning_by_hand_goes_through_all_that_is_worth_it(rag: EdgeRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(school, "why_no_training", lambda: "")
    learner = rag._house.school.learner()
    assert learner is not None
    assert rag.learn() == []
    told: list[tuple[float, float | None]] = []

    def learn(*, least: float, until: float | None, progress: Any) -> list[Lesson]:
        told.append((least, until))
        return []

    monkeypatch.setattr(learner, "learn", learn)
    rag.learn(least=2, until=7)
    assert told == [(2.0, 7.0)]
    with pytest.raises(InputError):
        rag.learn(until="tomorrow")  # type: ignore[arg-type]


def test_a_piece_of_idle_work_is_told_in_words(rag: EdgeRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    done = iter([("warmed", False), ("learned", True)])
    steps = [(name, lambda worked=worked: worked) for name, worked in done]
    monkeypatch.setattr(rag._house, "idle_steps", lambda: steps)
    assert rag.idle_once() == "learned"
    monkeypatch.setattr(rag._house, "idle_steps", lambda: steps[:1])
    assert rag.idle_once() == ""


def test_where_nothing_can_be_learned_it_is_said_why(
    tmp_path: Path, small_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(school, "why_no_training", lambda: "training needs torch")
    with small_library(tmp_path / "one", small_settings) as rag, pytest.raises(ConfigError, match="needs torch"):
        rag.learn()
    with (
        small_library(tmp_path / "two", small_settings, router__mode="off") as rag,
        pytest.raises(ConfigError, match="no adapters are used"),
    ):
        rag.learn()
