"""What is foreseen of a question before anything is searched, and what choices know of an adapter."""

from collections.abc import Iterator

import numpy as np
import pytest

from edge_rag.native.llama import Model
from edge_rag.policy.prompt import LAYOUT_VERSION
from edge_rag.runtime.covering import NoAdapters
from edge_rag.runtime.shelf import Shelf, known_of
from edge_rag.store import adapters
from edge_rag.store.adapters import Questions
from tests.native.tiny_models import write_tiny_model
from tests.runtime.registry import Registry, spoil, state, trained, unit
from tests.runtime.serving import Toy
from tests.store.adapter_samples import BASE


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Toy(write_tiny_model("llama", tmp_path_factory.mktemp("llama")), gpu_layers=0) as model:
        yield model


def shelf(registry: Registry) -> Shelf:
    return Shelf(registry.database, registry.pager, base=BASE)


def toward(place: int, cosine: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """A question so near to the direction."""
    return np.float32(cosine) * unit(place) + np.float32(np.sqrt(1 - cosine**2)) * unit(7)


# --- foreseen --------------------------------------------------------------------------------------------------------


@pytest.fixture
def looked_at(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The adapters whose files are looked at from now on."""
    names: list[str] = []
    check = registry.pager.check
    monkeypatch.setattr(registry.pager, "check", lambda name: (names.append(name), check(name))[1])
    return names


def test_the_file_of_the_adapter_that_knows_the_nearest_question_is_read_ahead(
    registry: Registry, looked_at: list[str]
) -> None:
    one, two = registry.add(1, 1, 2), registry.add(2, 3, questions=trained(1, 2))
    shelf(registry).foresee(toward(2, 0.9))
    shelf(registry).foresee(unit(0))
    assert looked_at == [two, one]


def test_for_a_question_that_is_near_to_none_nothing_is_read(registry: Registry, looked_at: list[str]) -> None:
    shelf(registry).foresee(unit(0))
    registry.add(1, 1, 2)
    made = shelf(registry)
    for cosine in (0.0, 0.49, -0.9):
        made.foresee(toward(0, cosine))
    assert looked_at == []
    made.foresee(toward(0, 0.51))
    assert len(looked_at) == 1


def test_adapters_that_may_not_answer_are_not_foreseen(registry: Registry, looked_at: list[str]) -> None:
    one = registry.add(1, 1, 2)
    registry.add(2, 1, 2, base="c" * 64)
    registry.add(3, 1, 2, layout=LAYOUT_VERSION + 1)
    made = shelf(registry)
    with registry.database.write() as connection:
        adapters.set_state(connection, one, "disabled")
    made.refresh()
    made.foresee(unit(0))
    assert looked_at == []
    NoAdapters().foresee(unit(0))


def test_that_a_file_was_changed_is_found_by_the_choice_not_by_what_was_foreseen(registry: Registry) -> None:
    one = registry.add(1, 1, 2)
    spoil(registry.folder, one)
    made = shelf(registry)
    made.foresee(unit(0))
    assert state(registry.database, one)[0] == "ready"
    assert not made.is_sound(one)
    assert state(registry.database, one)[0] == "failed"


# --- known -----------------------------------------------------------------------------------------------------------


def test_an_offer_tells_what_the_exam_said_nearby(registry: Registry) -> None:
    vectors = np.stack([unit(place) for place in range(3)]).astype(np.float16)
    marks = np.array([0.25, 0.75, np.nan], np.float32)
    one = registry.add(1, 1, 2, questions=Questions(("A?", "B?", "C?"), vectors, marks))
    made = shelf(registry)
    offers = [made.offers(toward(place, 0.875), [2, 9])[0] for place in range(3)]
    assert {offer.adapter for offer in offers} == {one}
    assert [offer.gate for offer in offers] == [0.25, 0.75, 0.5]  # the mean of all where nobody has asked
    assert [offer.closeness for offer in offers] == pytest.approx([0.875] * 3, abs=1e-3)
    assert [offer.within for offer in offers] == [False, True, True]
    assert {(offer.members, offer.resident, offer.bytes) for offer in offers} == {
        (frozenset({1, 2}), False, made.sizes[one])
    }
    assert made.offers(unit(0), [9]) == []


def test_what_is_known_of_an_adapter_does_not_depend_on_whether_it_may_answer(registry: Registry) -> None:
    one = registry.add(1, 1, 2, questions=trained(0, 1, f1=0.5))
    made = shelf(registry)
    with registry.database.write() as connection:
        adapters.set_state(connection, one, "disabled")
        found = known_of(connection, one)
        assert known_of(connection, "f" * 64) is None
    assert found is not None
    was = made.known[one]
    np.testing.assert_array_equal(found.vectors, was.vectors)
    assert (found.members, found.bytes, found.reach, found.usual) == (was.members, was.bytes, was.reach, 0.5)
    made.refresh()
    assert made.known == {}
    assert made.sizes == {}
