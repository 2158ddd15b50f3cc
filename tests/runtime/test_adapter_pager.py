"""The pager with a tiny model: what is resident, what is held, and what cannot be loaded."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_rag.errors import EngineError, ModelError
from edge_rag.native.llama import Model
from edge_rag.runtime.adapter_pager import Pager
from tests.native.tiny_loras import write_tiny_lora
from tests.native.tiny_models import write_tiny_model
from tests.runtime.serving import Toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with Toy(write_tiny_model("llama", folder), gpu_layers=0) as model:
        yield model


@pytest.fixture(scope="module")
def names(folder: Path) -> list[str]:
    """Four adapters of the same size."""
    return [write_tiny_lora(folder, seed=seed).stem for seed in range(4)]


def size(folder: Path, name: str) -> int:
    return (folder / f"{name}.gguf").stat().st_size


@pytest.fixture
def pager(model: Model, folder: Path, names: list[str]) -> Iterator[Pager]:
    """There is room for two."""
    with Pager(model, lambda name: folder / f"{name}.gguf", 2 * size(folder, names[0])) as pager:
        yield pager


def use(pager: Pager, *names: str) -> None:
    for name in names:
        with pager.held(name):
            assert pager.loaded(name).path.stem == name


def test_the_least_recently_used_one_makes_room(pager: Pager, names: list[str]) -> None:
    one, two, three, _ = names
    use(pager, one, two, one, three)
    assert pager.resident() == {one, three}
    assert pager.status().page_ins == 3
    assert pager.status().used == pager.budget


def test_what_is_held_stays_and_what_finds_no_room_is_refused(pager: Pager, names: list[str]) -> None:
    one, two, three, _ = names
    with pager.held(one):
        with pager.held(two), pytest.raises(EngineError, match=r"adapters\.memory_mb"):
            pager.take(three)
        use(pager, three)
        assert pager.resident() == {one, three}


def test_an_adapter_is_held_until_all_have_dropped_it(pager: Pager, names: list[str]) -> None:
    one, two, three, _ = names
    pager.take(one)
    pager.take(one)
    pager.drop(one)
    use(pager, two, three)
    assert one in pager.resident()
    pager.drop(one)
    use(pager, two, three)
    assert one not in pager.resident()


def test_pinned_ones_go_last(pager: Pager, names: list[str]) -> None:
    one, two, three, four = names
    pager.pin(frozenset({one}))
    use(pager, one, two, three, four)
    assert pager.resident() == {one, four}


def test_when_all_work_has_ended_nothing_is_held(pager: Pager, names: list[str]) -> None:
    one, two, three, _ = names
    pager.take(one)
    pager.drop_all()
    use(pager, two, three)
    assert one not in pager.resident()


def test_no_name_holds_nothing(pager: Pager) -> None:
    with pager.held(""):
        assert pager.status().page_ins == 0


def test_loading_is_timed_for_the_next_time(pager: Pager, names: list[str]) -> None:
    assert pager.page_in_time(1000) == 0
    use(pager, names[0])
    assert pager.page_in_time(2000) == pytest.approx(2 * pager.page_in_time(1000))
    assert pager.page_in_time(pager.status().used) == pytest.approx(pager.status().page_in_seconds)


def test_a_file_is_what_its_name_says_or_not(pager: Pager, model: Model, folder: Path, names: list[str]) -> None:
    assert pager.check(names[0]).result()
    assert not pager.check("0" * 64).result()
    changed = write_tiny_lora(folder, seed=9)
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    assert not pager.check(changed.stem).result()
    content[-1] ^= 1
    changed.write_bytes(content)
    assert pager.check(changed.stem).result()


def test_what_cannot_be_loaded_is_known_from_then_on(pager: Pager, folder: Path) -> None:
    (folder / "text.gguf").write_text("no adapter")
    assert pager.loads("text")
    with pytest.raises(ModelError):
        pager.take("text")
    assert not pager.loads("text")
    assert pager.resident() == frozenset()


def test_a_closed_pager_looks_at_no_file(model: Model, folder: Path, names: list[str]) -> None:
    with Pager(model, lambda name: folder / f"{name}.gguf", 1 << 20) as closed:
        use(closed, names[0])
    assert closed.resident() == frozenset()
    with pytest.raises(EngineError, match="closed"):
        closed.check(names[0])


# --- what is wanted --------------------------------------------------------------------------------------------------


def test_what_nobody_wants_leaves_before_what_is_wanted(pager: Pager, names: list[str]) -> None:
    one, two, three, four = names
    pager.want([one])
    use(pager, one, two, three, four)
    assert pager.resident() == {one, four}
    pager.want([four])
    use(pager, two)
    assert pager.resident() == {four, two}


def test_wanted_ones_leave_in_their_order_whichever_was_used_last(pager: Pager, names: list[str]) -> None:
    one, two, three, _ = names
    for order, left in (((one, two), two), ((two, one), one)):
        pager.want(order)
        use(pager, one, two)
        use(pager, *order[::-1])
        use(pager, three)
        assert pager.resident() == {left, three}


def test_pinned_ones_stay_longer_than_wanted_ones(pager: Pager, names: list[str]) -> None:
    one, two, three, _ = names
    pager.pin(frozenset({one}))
    pager.want([two])
    use(pager, one, two, three)
    assert pager.resident() == {one, three}


def test_what_is_held_stays_although_nobody_wants_it(pager: Pager, names: list[str]) -> None:
    one, two, three, _ = names
    pager.want([two])
    with pager.held(one):
        use(pager, two, three)
        assert pager.resident() == {one, three}


def test_wanted_ones_that_are_not_there_are_missed_the_last_to_leave_first(pager: Pager, names: list[str]) -> None:
    one, two, three, _ = names
    assert pager.missing() == ()
    pager.want([one, two])
    assert pager.missing() == (two, one)
    use(pager, two, three)
    assert pager.missing() == (one,)  # the other one makes room
    use(pager, one)
    assert pager.missing() == ()
    pager.want([])
    assert pager.missing() == ()


def test_what_would_push_out_pinned_or_wanted_ones_is_not_missed(pager: Pager, folder: Path, names: list[str]) -> None:
    one, two, three, _ = names
    pager.pin(frozenset({one}))
    use(pager, one, two)
    pager.want([three, two])
    assert pager.missing() == ()  # and so those two take no turns
    pager.pin(frozenset())
    assert pager.missing() == (three,)
    larger = folder / "larger.gguf"
    larger.write_bytes(bytes(2 * size(folder, one)))
    pager.want(["larger", three, two])
    assert pager.missing() == (three,)


def test_what_could_not_be_loaded_is_not_missed(pager: Pager, folder: Path, names: list[str]) -> None:
    (folder / "text.gguf").write_text("no adapter")
    pager.want([names[0], "text"])
    assert pager.missing() == ("text", names[0])
    with pytest.raises(ModelError):
        pager.take("text")
    assert pager.missing() == (names[0],)
