"""What keeps adapters in fast memory as a rule has it, with a tiny model and its adapters in a real engine."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from edge_rag.native.llama import Model
from edge_rag.policy.caching_rules import rule
from edge_rag.policy.demand import Request
from edge_rag.policy.linucb import Bandit
from edge_rag.policy.residency import Polar, Residency, fixed
from edge_rag.records import Route, Weighed
from edge_rag.runtime.adapter_pager import Pager
from edge_rag.runtime.keeping import Keeper, as_request, estimated
from edge_rag.runtime.prompting import Prompt
from tests.native.tiny_loras import write_tiny_lora
from tests.native.tiny_models import write_tiny_model
from tests.runtime.serving import Running, Toy, running, toy_prompt

ROOM = 1 << 20


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Toy(write_tiny_model("llama", tmp_path_factory.mktemp("llama")), gpu_layers=0) as model:
        yield model


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    return folder


@pytest.fixture
def names(adapters: Path) -> list[str]:
    """Three adapters, by name."""
    return sorted(write_tiny_lora(adapters, seed=seed).stem for seed in range(3))


@pytest.fixture
def served(toy: Model, data: Path, adapters: Path) -> Iterator[Running]:
    with running(toy, data, adapters=adapters) as started:
        yield started


def pager_of(served: Running) -> Pager:
    assert served.engine.pager
    return served.engine.pager


def keeper(served: Running, names: Sequence[str], made: str = "lru") -> Keeper:
    return Keeper(rule(made, dict.fromkeys(names, ROOM), 2 * ROOM), pager_of(served))


def request(used: str, *arms: str, away: float = 0.1) -> Request:
    """A question for which these arms (the one that was used) are equally good, and better than none."""
    arms = arms or (used,)
    flat = np.ones(len(arms))
    return Request(arms, 0.8 * flat, 0.1 * flat, 0.0 * flat, away * flat, without=0.0, used=used)


def use(served: Running, name: str) -> None:
    """Answer a question under an adapter."""
    plain = toy_prompt((1,))
    served.ask(Prompt(plain.prefix, plain.passages, plain.tail, plain.chunks, name))


# --- loading ahead ---------------------------------------------------------------------------------------------------


def test_what_is_wanted_is_loaded_one_at_a_time_the_last_to_leave_first(served: Running, names: list[str]) -> None:
    kept = keeper(served, names)
    assert not kept.load_next(served.engine)
    for name in names:
        kept.after(request(name))
    assert kept.wanted == (names[1], names[2])  # there is room for two
    there = []
    while kept.load_next(served.engine):
        there.append(pager_of(served).resident())
    assert there == [{names[2]}, set(names[1:])]


def test_what_is_there_is_not_loaded_again(served: Running, names: list[str]) -> None:
    kept = keeper(served, names)
    use(served, names[0])
    kept.after(request(names[0]))
    assert kept.wanted == (names[0],)
    assert not kept.load_next(served.engine)
    assert pager_of(served).status().page_ins == 1


def test_what_was_loaded_ahead_makes_nobody_wait_and_may_leave_again(served: Running, names: list[str]) -> None:
    kept = keeper(served, names)
    kept.after(request(names[0]))
    assert kept.load_next(served.engine)
    use(served, names[0])
    assert pager_of(served).status().page_ins == 1
    assert not pager_of(served)._held


def spoil(adapters: Path, name: str) -> None:
    path = adapters / f"{name}.gguf"
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def vanish(adapters: Path, name: str) -> None:
    (adapters / f"{name}.gguf").unlink()


@pytest.mark.parametrize("harm", [spoil, vanish])
def test_a_file_that_is_not_what_its_name_says_is_not_loaded_and_stops_no_other(
    harm: Callable[[Path, str], None], served: Running, adapters: Path, names: list[str]
) -> None:
    kept = keeper(served, names)
    for name in names[:2]:
        kept.after(request(name))
    harm(adapters, names[1])  # the one that comes first
    assert kept.load_next(served.engine)
    assert pager_of(served).resident() == {names[0]}
    assert not kept.load_next(served.engine)
    assert pager_of(served).loads(names[1])  # nobody has tried


def test_what_llama_cpp_refuses_is_tried_once(served: Running, adapters: Path) -> None:
    """It is what its name says, but belongs to a model of another shape."""
    foreign = write_tiny_lora(adapters, seed=7, forward=32).stem
    kept = keeper(served, [foreign])
    kept.after(request(foreign))
    assert not kept.load_next(served.engine)
    assert not pager_of(served).loads(foreign)
    assert pager_of(served).missing() == ()
    assert not kept.load_next(served.engine)


def test_when_the_engine_is_closed_nothing_is_loaded(toy: Model, data: Path, adapters: Path, names: list[str]) -> None:
    with running(toy, data, adapters=adapters) as started:
        kept = keeper(started, names)
        kept.after(request(names[0]))
        assert pager_of(started).check(names[0]).result()  # so that it gets as far as the engine
        kept.after(request(names[1]))
    assert not kept.load_next(started.engine)


# --- the rule --------------------------------------------------------------------------------------------------------


class Trying(Residency):
    """Wants whatever was used, and has one arm tried if that costs nothing."""

    def __init__(self, trial: str) -> None:
        super().__init__({}, 0)
        self.trial = trial
        self.seen: list[Request] = []

    def forced(self, request: Request, allowance: float) -> str:
        return self.trial if allowance >= 1 else ""

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(request.used for request in self.seen)

    def after(self, request: Request) -> frozenset[str]:
        self.seen.append(request)
        return frozenset(self.order)


def test_the_rule_is_told_of_every_answer_and_the_pager_of_what_it_wants(served: Running, names: list[str]) -> None:
    made = Trying(names[0])
    kept = Keeper(made, pager_of(served))
    first, second = request(names[1]), request(names[2])
    kept.after(first)
    kept.after(second)
    assert made.seen == [first, second]
    assert kept.wanted == (names[1], names[2])
    assert pager_of(served).missing() == (names[2], names[1])


def test_the_rule_names_what_is_to_be_tried(served: Running, names: list[str]) -> None:
    kept = Keeper(Trying(names[0]), pager_of(served))
    assert kept.forced(request(names[1]), 1.0) == names[0]
    assert kept.forced(request(names[1]), 0.5) == ""


def test_after_trials_while_nobody_asked_fewer_questions_serve_to_find_out(served: Running, names: list[str]) -> None:
    kept = Keeper(Polar(dict.fromkeys(names, ROOM), ROOM, fixed(2)), pager_of(served))
    asked = request("", *names[:2])
    assert kept.forced(asked, 1.0) in names[:2]
    kept.tried()
    assert kept.forced(asked, 1.0) in names[:2]
    kept.tried()
    assert kept.forced(asked, 1.0) == ""
    plain = keeper(served, names)
    plain.tried()  # which the other rules do not count
    assert plain.forced(asked, 1.0) == ""


def test_the_ends_of_epochs_are_counted(served: Running, names: list[str]) -> None:
    kept = Keeper(Polar(dict.fromkeys(names, ROOM), ROOM, fixed(2)), pager_of(served))
    for _ in range(5):
        kept.after(request(names[0]))
    assert kept.epochs == 2
    assert keeper(served, names).epochs == 0


# --- what rules are told ---------------------------------------------------------------------------------------------


def weighed(adapter: str, mean: float, here: float, away: float) -> Weighed:
    return Weighed(adapter, mean, width=0.25, here=here, away=away, score=0.0, probability=1.0, resident=False)


def test_seconds_become_prices_and_plain_retrieval_the_choice_of_none() -> None:
    route = Route(7, (weighed("", 0.5, 2.0, 2.0), weighed("one", 0.75, 0.5, 1.5), weighed("two", 0.25, 1.0, 1.0)))
    contexts = np.arange(6.0).reshape(3, 2)
    found = as_request(route, contexts, price=0.1, used="one")
    assert (found.arms, found.used) == (("one", "two"), "one")
    np.testing.assert_allclose(found.means, [0.75, 0.25])
    np.testing.assert_allclose(found.widths, [0.25, 0.25])
    np.testing.assert_allclose(found.here, [0.05, 0.1])
    np.testing.assert_allclose(found.away, [0.15, 0.1])
    assert found.without == pytest.approx(0.5 - 0.2)
    np.testing.assert_array_equal(np.asarray(found.contexts), contexts[1:])


def test_where_plain_retrieval_was_no_choice_anything_is_better() -> None:
    found = as_request(Route(0, (weighed("one", 0.75, 0.5, 1.5),)), None, price=0.1)
    assert found.without == -np.inf
    assert (found.contexts, found.used) == (None, "")


def test_means_are_those_that_are_expected_by_now() -> None:
    bandit = Bandit(2)
    route = Route(0, (weighed("", 0.5, 0.0, 0.0), weighed("one", 0.75, 0.0, 0.0)))
    asked = as_request(route, np.eye(2), price=0.0)
    bare = as_request(Route(0, (weighed("", 0.5, 0.0, 0.0),)), np.eye(2)[:1], price=0.0)
    assert [means.tolist() for means in estimated(bandit, [asked, bare])] == [[0.0], []]
    bandit.update("one", np.eye(2)[1], 1.0)
    assert [means.tolist() for means in estimated(bandit, [asked, bare])] == [[0.5], []]
