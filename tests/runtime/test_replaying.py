"""The router's state made anew from its journal, and residency rules compared on it; decisions are forged."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from edge_rag.errors import InputError
from edge_rag.policy.hindsight import Comparison, Replayed
from edge_rag.policy.linucb import Bandit
from edge_rag.records import Answer, Plan, Reward, Timings, Usage
from edge_rag.runtime.replaying import AS_IT_WAS, WITHOUT_ADAPTERS, compare, rebuild
from edge_rag.store import adapters, journal, library, routes
from edge_rag.store.adapters import AdapterFolder
from edge_rag.store.database import Connection, Database
from edge_rag.store.routes import Routed, RoutedArm
from tests.store.adapter_samples import add_adapter, add_passages, remove_document

SPACE = "1-2-encoder"
D = 6
DISCOUNT = 0.97
RIDGE = 1.5
MANY = 2000

Context = npt.NDArray[np.float64]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path) as opened:
        yield opened


@pytest.fixture
def names(database: Database, tmp_path: Path) -> list[str]:
    """Three adapters, each with a document of its own."""
    folder = AdapterFolder(tmp_path / "adapters")
    passages = [add_passages(database, f"/covered-{number}", "text") for number in range(3)]
    return [add_adapter(database, folder, number, *chunks).id for number, chunks in enumerate(passages)]


def exam(adapter: str) -> list[tuple[Context, float]]:
    """What an adapter's exam said: a few contexts and F1s that follow from its name."""
    rng = np.random.default_rng(list(adapter.encode()))
    return [(rng.normal(size=D) / 4, float(rng.random())) for _ in range(len(adapter) // 16)]


def ask(connection: Connection, name: str, *chunks: int) -> None:
    passages = tuple(library.passages(connection, chunks).values())
    answer = Answer(name, "Why?", "So.", passages, (), Usage(), Timings(), "stop", Plan(), "small")
    journal.record(connection, answer, now=1.0)


def arm(adapter: str, context: Context, **changes: Any) -> RoutedArm:
    values: dict[str, Any] = {
        "mean": 0.5,
        "width": 0.1,
        "wait": 1.0,
        "here": 1.0,
        "away": 1.0,
        "probability": 1.0,
        "resident": True,
    }
    return RoutedArm(adapter=adapter, context=context, **values | changes)


def anew(database: Database, seeds: Callable[[str], list[tuple[Context, float]]] = exam, space: str = SPACE) -> Bandit:
    with database.read() as connection:
        return rebuild(connection, space, dimensions=D, ridge=RIDGE, discount=DISCOUNT, seeds=seeds)


# --- the state -------------------------------------------------------------------------------------------------------


class Live:
    """A router as it runs: it decides, is rewarded and corrected, and journals all of that."""

    def __init__(self, database: Database, seed: int = 0) -> None:
        self.database = database
        self.bandit = Bandit(D, ridge=RIDGE, discount=DISCOUNT)
        self.rng = np.random.default_rng(seed)
        self.arms = [""]
        self.contexts: dict[tuple[str, str], Context] = {}
        self.given: dict[tuple[str, str, str], Reward] = {}  # the first of each
        self.corrections = 0
        self.decisions = 0

    def begin(self, adapter: str) -> None:
        self.bandit.forget(adapter)
        for context, f1 in exam(adapter):
            self.bandit.update(adapter, context, f1)
        with self.database.write() as connection:
            assert routes.begin_arm(connection, adapter, self.bandit.clock)
        self.arms = [*(each for each in self.arms if each != adapter), adapter]
        self.given = {key: reward for key, reward in self.given.items() if key[1] != adapter}

    def decide(self, name: str, *chunks: int) -> None:
        seen = self.rng.normal(size=(len(self.arms), D)) / 3
        self.bandit.estimate(self.arms, seen)
        arms = tuple(arm(each, context) for each, context in zip(self.arms, seen, strict=True))
        self.contexts |= {(name, each): context for each, context in zip(self.arms, seen, strict=True)}
        with self.database.write() as connection:
            ask(connection, name, *chunks)
            routes.put(connection, Routed(name, self.decisions, SPACE, str(self.rng.choice(self.arms)), False, arms))
        self.decisions += 1

    def reward(self, name: str, adapter: str, source: Any = "feedback") -> None:
        key, score, weight = (name, adapter, source), float(self.rng.random()), float(self.rng.random())
        reward = Reward(name, adapter, self.bandit.clock, 1.0, score, weight, source)
        first, context = self.given.get(key), self.contexts[name, adapter]
        if first is None:
            self.bandit.update(adapter, context, score, weight)
            self.given[key] = reward
        else:
            with self.database.read() as connection:
                earlier = routes.earlier(connection, *key)
            assert earlier
            self.corrections += 1
            self.bandit.correct(adapter, context, score - earlier.score, since=first.clock, weight=first.weight)
        with self.database.write() as connection:
            assert routes.put_reward(connection, reward)
        self.bandit.tick()

    def reward_some(self, times: int) -> None:
        """Rewards for whatever was decided, some of them again, some of them late."""
        for _ in range(times):
            places = [key for key in self.contexts if key[1] in self.arms]
            self.reward(*places[self.rng.integers(len(places))], ["feedback", "review", "trial"][self.rng.integers(3)])


@pytest.mark.parametrize("seed", range(3))
def test_the_journal_alone_makes_the_state_anew_to_the_bit(database: Database, names: list[str], seed: int) -> None:
    live = Live(database, seed)
    for number in range(24):
        if number % 5 == 1 and number // 5 < len(names):
            live.begin(names[number // 5])
        live.decide(f"q{number}")
        live.reward_some(int(live.rng.integers(5)))
    assert anew(database).dump() == live.bandit.dump()
    live.begin(names[1])  # anew
    live.reward_some(3)
    live.decide("last")
    live.reward_some(5)
    assert live.corrections > 5
    assert anew(database).dump() == live.bandit.dump()


def test_rewards_in_any_number_correct_the_first(database: Database) -> None:
    live = Live(database)
    live.decide("q")
    for number in range(5):
        live.reward("q", "")
        live.decide(f"later-{number}")
    found, context = anew(database), live.contexts["q", ""]
    with database.read() as connection:
        [first, *_, (last, _)] = routes.rewards(connection, space=SPACE)
    at_once = Bandit(D, ridge=RIDGE, discount=DISCOUNT)
    at_once.update("", context, last.score, first[0].weight, clock=first[0].clock)
    at_once.clock = found.clock
    assert found.pulls("") == 1
    assert found.estimate([""], context[None]).means == pytest.approx(at_once.estimate([""], context[None]).means)
    assert found.estimate([""], context[None]).widths == pytest.approx(at_once.estimate([""], context[None]).widths)


def test_plain_retrieval_may_begin_with_something_too(database: Database) -> None:
    context = np.full(D, 0.25)
    expected = Bandit(D, ridge=RIDGE, discount=DISCOUNT)
    expected.update("", context, 1.0, clock=0)
    found = anew(database, seeds=lambda adapter: [(context, 1.0)])
    assert found.dump() == expected.dump()


def test_an_empty_journal_makes_an_empty_state(database: Database) -> None:
    assert anew(database).dump() == Bandit(D, ridge=RIDGE, discount=DISCOUNT).dump()


def test_what_was_learned_in_another_space_is_left_out(database: Database) -> None:
    live = Live(database)
    live.decide("q")
    before = live.bandit.dump()
    with database.write() as connection:
        ask(connection, "foreign")
        contexts = np.zeros(D + 4)  # of another size, too
        routes.put(connection, Routed("foreign", 0, "2-6-encoder", "", False, (arm("", contexts),)))
        routes.put_reward(connection, Reward("foreign", "", 1, 1.0, 1.0, 1.0, "feedback"))
    found = anew(database)
    assert found.clock == 2  # other rewards make what was learned older
    found.clock = live.bandit.clock
    assert found.dump() == before
    with pytest.raises(InputError):
        anew(database, space="2-6-encoder")


def test_what_was_learned_from_a_document_is_unlearned_with_it(database: Database, names: list[str]) -> None:
    live = Live(database)
    live.begin(names[0])
    live.decide("gone", *add_passages(database, "/doc", "text"))
    live.reward("gone", "")
    live.reward("gone", names[0], "trial")
    live.decide("stays")
    live.reward("stays", "")
    remove_document(database, "/doc")
    assert live.bandit.pulls("") == 2
    expected = Bandit(D, ridge=RIDGE, discount=DISCOUNT)
    for context, f1 in exam(names[0]):
        expected.update(names[0], context, f1)
    expected.clock = live.bandit.clock
    stays = live.given["stays", "", "feedback"]
    expected.update("", live.contexts["stays", ""], stays.score, stays.weight, clock=stays.clock)
    assert anew(database).dump() == expected.dump()


def test_an_adapter_that_is_gone_is_forgotten(database: Database, names: list[str]) -> None:
    live = Live(database)
    for each in names[:2]:
        live.begin(each)
    live.decide("q")
    live.reward_some(10)
    assert set(live.bandit.arms()) >= set(names[:2])
    with database.write() as connection:
        adapters.remove(connection, names[0])
    live.bandit.forget(names[0])
    assert anew(database).dump() == live.bandit.dump()


# --- the past --------------------------------------------------------------------------------------------------------


def put(database: Database, decisions: Sequence[tuple[str, Sequence[RoutedArm]]], space: str = SPACE) -> None:
    """Journal decisions: what was chosen, and the arms; their questions are q0, q1, ..."""
    with database.write() as connection:
        for clock, (chosen, arms) in enumerate(decisions):
            ask(connection, f"q{clock}")
            assert routes.put(connection, Routed(f"q{clock}", clock, space, chosen, False, tuple(arms)))


def choice(best: str, names: Sequence[str], **changes: Any) -> list[RoutedArm]:
    """Arms of which one adapter is by far the best; loading takes two seconds, an answer from passages four."""
    context = np.zeros(D)
    plain = arm("", context, mean=0.75, wait=4.0, here=4.0, away=4.0, probability=changes.pop("plain", 1.0))
    values = {"wait": 1.0, "here": 1.0, "away": 3.0, "probability": 0.0} | changes
    return [plain, *(arm(each, context, mean=1.0 if each == best else 0.0, **values) for each in names)]


def compared(database: Database, *policies: str, room: int = 2, space: str = SPACE, **more: Any) -> Comparison:
    """With room for so many adapters (all have the same size), and a second at an eighth."""
    with database.read() as connection:
        size = max(each.bytes for each in adapters.adapters(connection))
        return compare(connection, space, policies, budget=room * size, second_price=0.125, **more)


def by_name(found: Comparison) -> dict[str, Replayed]:
    return {way.policy: way for way in found.ways}


def test_rules_are_compared_with_what_was_done_and_with_no_adapters(database: Database, names: list[str]) -> None:
    trace = [names[place] for place in (0, 1, 0, 2, 0, 1)]
    put(database, [(each if place > 2 else "", choice(each, names)) for place, each in enumerate(trace)])
    found = compared(database, "lru", "fifo")
    assert (found.decisions, found.left_out) == (6, 0)
    ways = by_name(found)
    assert list(ways) == [AS_IT_WAS, WITHOUT_ADAPTERS, "lru", "fifo"]
    assert ways[WITHOUT_ADAPTERS].utility == pytest.approx(6 * (0.75 - 4 / 8))
    assert (ways[WITHOUT_ADAPTERS].quality, ways[WITHOUT_ADAPTERS].used) == (0.75, 0)
    assert ways[AS_IT_WAS].utility == pytest.approx(3 * 0.25 + 3 * (1 - 1 / 8))
    assert (ways[AS_IT_WAS].used, ways[AS_IT_WAS].hits, ways[AS_IT_WAS].page_ins) == (3, 3, 0)
    # loaded, loaded, hit, loaded (in place of the second), hit, loaded
    assert (ways["lru"].used, ways["lru"].hits, ways["lru"].page_ins) == (6, 2, 4)
    assert ways["lru"].utility == pytest.approx(6 * (1 - 1 / 8) - 4 * 2 / 8)
    # loaded, loaded, hit, loaded (in place of the first), loaded (of the second), loaded
    assert (ways["fifo"].hits, ways["fifo"].page_ins) == (1, 5)


def test_somebody_who_waited_for_an_adapter_waited_as_it_was(database: Database, names: list[str]) -> None:
    put(database, [(names[0], choice(names[0], names, resident=False, wait=2.0))])
    was = by_name(compared(database))[AS_IT_WAS]
    assert was.utility == pytest.approx(1 - 2 / 8)  # it had begun to load: two seconds, not three
    assert (was.used, was.hits, was.page_ins) == (1, 0, 1)


def test_epochs_are_of_the_length_that_is_asked_for(database: Database, names: list[str]) -> None:
    # In a full memory the one that is asked for most comes in only when an epoch ends.
    trace = [names[0], *[names[1]] * 6]
    put(database, [(each, choice(each, names)) for each in trace])
    short, long = (by_name(compared(database, "polar", room=1, epoch=epoch))["polar"] for epoch in (3, 100))
    assert short.hits > long.hits == 0


def test_adapters_that_are_gone_are_no_candidates_and_their_answers_left_out(
    database: Database, names: list[str]
) -> None:
    put(database, [(each, choice(each, names)) for each in [names[0], names[1], names[2], names[1]]])
    with database.write() as connection:
        adapters.remove(connection, names[1])
    found = compared(database, "lru")
    assert (found.decisions, found.left_out) == (2, 2)
    assert by_name(found)["lru"].used == 2
    with database.write() as connection:
        ask(connection, "best gone")
        routes.put(connection, Routed("best gone", 9, SPACE, "", False, tuple(choice(names[1], names))))
    found = compared(database, "lru")
    assert (found.decisions, by_name(found)["lru"].used) == (3, 2)


def test_decisions_in_other_spaces_are_left_out(database: Database, names: list[str]) -> None:
    put(database, [("", choice(names[0], names))], space="another")
    assert compared(database, "lru").decisions == 0
    assert compared(database, "lru", space="another").decisions == 1


def test_rewards_judge_what_a_rule_would_have_taken(database: Database, names: list[str]) -> None:
    drawn = {"probability": 0.25, "plain": 0.25}
    chosen = [names[0], "", names[1], names[0]]
    put(database, [(each, choice(names[0], names, **drawn)) for each in chosen])
    with database.write() as connection:
        for question, score in zip(("q0", "q1", "q2", "q3"), (0.5, 0.25, 0.125, 1.0), strict=True):
            adapter = chosen[int(question[1])]
            routes.put_reward(connection, Reward(question, adapter, 4, 1.0, score, 1.0, "feedback"))
    ways = by_name(compared(database, "lru"))
    values = {name: {each.method: each.value for each in way.rewards.estimates} for name, way in ways.items()}
    assert (values["lru"]["matched"], values["lru"]["ips"]) == (0.75, 4 * (0.5 + 1.0) / 4)
    assert values[WITHOUT_ADAPTERS]["matched"] == 0.25
    assert values[AS_IT_WAS]["ips"] == pytest.approx((0.5 + 0.25 + 0.125 + 1.0) / 4)
    assert {way.rewards.note for way in ways.values()} == {""}
    assert by_name(compared(database, "lru", clip=2.0))["lru"].rewards.clipped == 2


def test_a_journal_in_which_nothing_was_drawn_says_so(database: Database, names: list[str]) -> None:
    put(database, [("", choice(names[0], names))])
    with database.write() as connection:
        routes.put_reward(connection, Reward("q0", "", 4, 1.0, 1.0, 1.0, "feedback"))
    notes = {way.policy: way.rewards.note for way in compared(database, "lru").ways}
    assert all(note.startswith("nothing was drawn by chance") for note in notes.values())


def test_an_unknown_rule_is_refused_with_those_that_are_known(database: Database, names: list[str]) -> None:
    with pytest.raises(InputError, match="no rule 'mru'") as caught:
        compared(database, "mru")
    assert caught.value.field == "rules"
    assert "polar+" in caught.value.remedy


def test_a_comparison_can_be_printed(database: Database, names: list[str]) -> None:
    put(database, [(names[0], choice(names[0], names))])
    found = compared(database, "lru", "polar")
    assert msgspec.json.decode(msgspec.json.encode(found), type=Comparison) == found
    empty = compared(database, "lru", space="nothing")
    assert (empty.decisions, empty.ways[0].rewards.note) == (0, "no answer was judged")


# --- many ------------------------------------------------------------------------------------------------------------


def test_many_decisions_are_gone_through(database: Database, names: list[str]) -> None:
    rng = np.random.default_rng(0)
    places = rng.integers(3, size=MANY)
    seen = rng.normal(size=(MANY, D)) / 3
    with database.write() as connection:
        for each in names:
            routes.begin_arm(connection, each, 0)
        for clock, place in enumerate(places.tolist()):
            chosen = names[place]
            ask(connection, f"q{clock}")
            arms = [arm(each, seen[clock], probability=0.25) for each in ["", *names]]
            routes.put(connection, Routed(f"q{clock}", clock, SPACE, chosen, False, tuple(arms)))
            routes.put_reward(connection, Reward(f"q{clock}", chosen, clock, 1.0, 0.25 * place, 1.0, "review"))
    found = anew(database)
    assert found.clock == MANY
    assert [found.pulls(each) for each in names] == [4 + int((places == place).sum()) for place in range(3)]
    comparison = compared(database, "lru")
    assert comparison.decisions == MANY == by_name(comparison)["lru"].rewards.judged
