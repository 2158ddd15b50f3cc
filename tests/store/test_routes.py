"""The journal of routing: what is in it comes back to the bit, counts while it should, and goes with documents."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import asdict, replace

from edge_rag.errors import InputError
from edge_rag.records import Answer, FinishReason, Plan, Reward, RewardSource, Timings, Usage
from edge_rag.store import adapters, journal, library, routes
from edge_rag.store.adapters import AdapterFolder
from edge_rag.store.database import Connection, Database
from edge_rag.store.route_totals import ArmTotals, RouteTotals, mark, totals
from edge_rag.store.routes import Routed, RoutedArm
from tests.store.adapter_samples import add_adapter, add_passages, remove_document

SPACE = "1-16-encoder"
PLAIN, ONE, OTHER = "", "a" * 64, "b" * 64
TABLES = ("routes", "route_arms", "rewards", "arms")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> AdapterFolder:
    return AdapterFolder(tmp_path / "adapters")


def ask(database: Database, name: str, *chunks: int, reason: FinishReason = "stop") -> None:
    """Journal a question that was answered from these chunks."""
    with database.write() as connection:
        passages = library.passages(connection, chunks)
        answer = Answer(
            name, "Why?", "So.", tuple(passages.values()), (), Usage(), Timings(), reason, Plan(), "small"
        )  # fmt: skip
        journal.record(connection, answer, now=1.0)


def arm(adapter: str, **changes: Any) -> RoutedArm:
    rng = np.random.default_rng(len(adapter) + sum(map(ord, adapter[:1])))
    values: dict[str, Any] = {
        "adapter": adapter,
        "context": rng.normal(size=22) / 7,
        "mean": 0.1 + 0.2,  # no short decimal
        "width": 1 / 3,
        "wait": 0.25,
        "here": 0.25,
        "away": 1.75,
        "probability": 0.9,
        "resident": True,
    }
    return RoutedArm(**values | changes)


def decision(name: str, clock: int = 0, chosen: str = PLAIN, **changes: Any) -> Routed:
    values: dict[str, Any] = {"space": SPACE, "explored": False, "arms": (arm(PLAIN), arm(ONE), arm(OTHER))}
    return Routed(question_id=name, clock=clock, chosen=chosen, **values | changes)


def put(database: Database, *decisions: Routed) -> list[bool]:
    with database.write() as connection:
        return [routes.put(connection, each) for each in decisions]


def route(database: Database, name: str, clock: int = 0, chosen: str = PLAIN, **changes: Any) -> None:
    """Journal a question and how it was routed."""
    ask(database, name)
    assert put(database, decision(name, clock, chosen, **changes)) == [True]


def plainly(found: Routed | None) -> dict[str, Any]:
    """All values, so that they can be compared."""
    assert found is not None
    arms = [asdict(each) | {"context": (each.context.dtype, each.context.tolist())} for each in found.arms]
    return asdict(found) | {"arms": arms}


def routed(database: Database, name: str) -> Routed | None:
    with database.read() as connection:
        return routes.routed(connection, name)


def history(database: Database, space: str = SPACE) -> list[str]:
    with database.read() as connection:
        return [each.question_id for each in routes.history(connection, space=space)]


def reward(name: str, adapter: str = PLAIN, score: float = 1.0, **changes: Any) -> Reward:
    values: dict[str, Any] = {"clock": 5, "given_at": 9.5, "weight": 1.0, "source": "feedback"}
    return Reward(question_id=name, adapter=adapter, score=score, **values | changes)


def give(database: Database, *given: Reward) -> list[bool]:
    with database.write() as connection:
        return [routes.put_reward(connection, each) for each in given]


def given(database: Database, space: str = SPACE) -> list[Reward]:
    with database.read() as connection:
        return [each for each, _ in routes.rewards(connection, space=space)]


def earlier(database: Database, name: str, adapter: str, source: RewardSource = "feedback") -> Reward | None:
    with database.read() as connection:
        return routes.earlier(connection, name, adapter, source)


def worth(database: Database, space: str = SPACE) -> dict[str, float]:
    with database.read() as connection:
        return routes.worth(connection, space=space)


def begin(database: Database, adapter: str, clock: int) -> bool:
    with database.write() as connection:
        return routes.begin_arm(connection, adapter, clock)


def adapter(database: Database, folder: AdapterFolder, number: int) -> str:
    chunks = add_passages(database, f"/covered-{number}", "text")
    return add_adapter(database, folder, number, *chunks).id


def count(connection: Connection, table: str) -> int:
    number: int = connection.execute(f"SELECT count(*) FROM {table}").get
    return number


def counts(database: Database) -> dict[str, int]:
    with database.read() as connection:
        return {table: count(connection, table) for table in TABLES}


# --- decisions -------------------------------------------------------------------------------------------------------


def test_a_decision_comes_back_to_the_bit_with_its_arms_by_name(database: Database) -> None:
    away = arm(ONE, resident=False, wait=1.5, probability=0.0, width=0.0)
    was = decision("q", 7, ONE, explored=True, arms=(arm(PLAIN), away, arm(OTHER)))
    ask(database, "q")
    assert put(database, replace(was, arms=(was.arms[2], was.arms[0], was.arms[1]))) == [True]
    assert plainly(routed(database, "q")) == plainly(was)


def test_contexts_that_come_back_are_the_readers_own(database: Database) -> None:
    route(database, "q")
    found = routed(database, "q")
    assert found
    found.arms[0].context[0] = 3.0
    assert plainly(routed(database, "q")) == plainly(decision("q"))


def test_what_was_not_routed_is_not_found(database: Database) -> None:
    ask(database, "q")
    assert routed(database, "q") is None
    assert routed(database, "unknown") is None


def test_a_question_that_is_gone_is_not_routed(database: Database) -> None:
    assert put(database, decision("gone")) == [False]
    assert counts(database) == dict.fromkeys(TABLES, 0)


def test_history_is_by_clock_and_leaves_out_other_spaces(database: Database) -> None:
    for name, clock in [("c", 5), ("a", 9), ("d", 0), ("b", 5)]:
        route(database, name, clock)
    route(database, "foreign", 6, space="2-16-encoder")
    assert history(database) == ["d", "b", "c", "a"]
    assert history(database, "2-16-encoder") == ["foreign"]
    assert history(database, "3") == []


def test_history_has_every_decision_whole(database: Database) -> None:
    names = [f"q{clock}" for clock in range(20)]
    for clock, name in enumerate(names):
        route(database, name, clock, arms=tuple(arm(each) for each in [PLAIN, ONE, OTHER][: 1 + clock % 3]))
    with database.read() as connection:
        found = list(routes.history(connection, space=SPACE))
    assert [len(each.arms) for each in found] == [1 + clock % 3 for clock in range(20)]
    assert [plainly(each) for each in found] == [plainly(routed(database, name)) for name in names]


def test_history_is_not_sorted_as_a_whole(database: Database) -> None:
    with database.read() as connection:
        statements: list[str] = []
        connection.set_profile(lambda statement, nanoseconds: statements.append(statement))
        assert list(routes.history(connection, space=SPACE)) == []
        connection.set_profile(None)
        [statement] = statements
        plan = connection.execute(f"EXPLAIN QUERY PLAN {statement}", (SPACE,)).fetchall()
    steps = [str(row[-1]) for row in plan]
    assert any("routes_by_clock" in step for step in steps)
    assert "USE TEMP B-TREE FOR ORDER BY" not in steps


def test_decisions_are_numbered_and_rewards_are_the_clock(database: Database, folder: AdapterFolder) -> None:
    def counted() -> tuple[int, int]:
        with database.read() as connection:
            return routes.decisions(connection), routes.clock(connection)

    assert counted() == (0, 0)
    route(database, "q", 3)
    assert counted() == (4, 0)
    route(database, "r", 8, space="another")
    assert counted() == (9, 0)
    give(database, reward("q", clock=12))
    assert counted() == (9, 13)
    begin(database, adapter(database, folder, 1), 20)
    assert counted() == (9, 20)


# --- arms ------------------------------------------------------------------------------------------------------------


def test_arms_are_listed_as_they_began(database: Database, folder: AdapterFolder) -> None:
    one, two, three = (adapter(database, folder, number) for number in (1, 2, 3))
    assert [begin(database, each, clock) for each, clock in [(three, 2), (one, 1), (two, 4)]] == [True] * 3
    with database.read() as connection:
        assert list(routes.arm_clocks(connection).items()) == [(three, 2), (one, 1), (two, 4)]
    begin(database, two, 5)
    begin(database, three, 6)
    with database.read() as connection:
        assert list(routes.arm_clocks(connection).items()) == [(one, 1), (two, 5), (three, 6)]


def test_an_adapter_that_is_gone_begins_nothing(database: Database) -> None:
    assert not begin(database, ONE, 3)
    assert counts(database)["arms"] == 0


def test_an_arm_ends_with_its_adapter(database: Database, folder: AdapterFolder) -> None:
    one = adapter(database, folder, 1)
    begin(database, one, 3)
    with database.write() as connection:
        adapters.remove(connection, one)
        assert routes.arm_clocks(connection) == {}


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_rewards_come_back_in_the_order_in_which_they_were_given_with_their_contexts(database: Database) -> None:
    route(database, "q", arms=(arm(PLAIN, context=np.array([1.0, 0.1])), arm(ONE)))
    route(database, "r", arms=(arm(PLAIN, context=np.array([2.0, 1e-300])), arm(ONE)))
    was = [reward("r", score=0.1 + 0.2), reward("q", source="review", weight=0.5), reward("r", score=0.0)]
    assert give(database, *was) == [True] * 3
    with database.read() as connection:
        found = routes.rewards(connection, space=SPACE)
    assert [each for each, _ in found] == was
    assert [context.tolist() for _, context in found] == [[2.0, 1e-300], [1.0, 0.1], [2.0, 1e-300]]


def test_rewards_of_another_space_are_left_out(database: Database) -> None:
    route(database, "q")
    route(database, "foreign", space="another")
    give(database, reward("q"), reward("foreign"))
    assert given(database) == [reward("q")]
    assert given(database, "another") == [reward("foreign")]


def test_a_reward_without_its_decision_or_its_arm_is_not_kept(database: Database) -> None:
    ask(database, "unrouted")
    route(database, "q", arms=(arm(PLAIN),))
    assert give(database, reward("unrouted"), reward("gone"), reward("q", ONE), reward("q")) == [False] * 3 + [True]
    assert counts(database)["rewards"] == 1


@pytest.mark.parametrize("score", [-0.01, 1.01, float("nan"), float("inf")])
def test_a_score_out_of_bounds_is_refused(database: Database, score: float) -> None:
    route(database, "q")
    with pytest.raises(InputError, match="from 0 to 1") as caught:
        give(database, reward("q", score=score))
    assert caught.value.field == "score"
    assert given(database) == []


@pytest.mark.parametrize("weight", [-0.01, float("nan"), float("inf")])
def test_a_weight_out_of_bounds_is_refused(database: Database, weight: float) -> None:
    route(database, "q")
    with pytest.raises(InputError, match="at least 0") as caught:
        give(database, reward("q", weight=weight))
    assert caught.value.field == "weight"


def test_rewards_of_an_adapter_count_from_its_beginning(database: Database, folder: AdapterFolder) -> None:
    one, two = adapter(database, folder, 1), adapter(database, folder, 2)
    route(database, "q", arms=(arm(PLAIN), arm(one), arm(two)))
    begin(database, one, 0)
    first = [reward("q", one, 0.1), reward("q", two, 0.2), reward("q", PLAIN, 0.3)]
    give(database, *first)
    assert given(database) == [first[0], first[2]]  # the other one has not begun
    begin(database, one, 5)  # with the same clock as those rewards
    begin(database, two, 5)
    assert given(database) == [first[2]]
    later = [reward("q", two, 0.4), reward("q", one, 0.5)]
    give(database, *later)
    assert given(database) == [first[2], *later]


def test_rewards_of_an_adapter_that_was_removed_count_no_more(database: Database, folder: AdapterFolder) -> None:
    one = adapter(database, folder, 1)
    route(database, "q", chosen=one, arms=(arm(PLAIN), arm(one)))
    begin(database, one, 0)
    give(database, reward("q", one))
    with database.write() as connection:
        adapters.remove(connection, one)
    assert given(database) == []
    assert earlier(database, "q", one) is None
    assert worth(database) == {"q": 1.0}


def test_ids_of_rewards_that_are_gone_are_not_given_again(database: Database, folder: AdapterFolder) -> None:
    one = adapter(database, folder, 1)
    chunks = add_passages(database, "/doc", "text")
    ask(database, "gone", *chunks)
    put(database, decision("gone", arms=(arm(PLAIN), arm(one))))
    route(database, "q", arms=(arm(PLAIN), arm(one)))
    give(database, reward("gone", one))
    begin(database, one, 5)
    remove_document(database, "/doc")
    give(database, reward("q", one))
    assert given(database) == [reward("q", one)]


def test_what_a_source_said_before_has_its_first_clock_and_weight_and_its_last_score(database: Database) -> None:
    route(database, "q")
    route(database, "r")
    assert earlier(database, "q", PLAIN) is None
    give(database, reward("q", score=0.2, clock=3, weight=0.5, given_at=1.0))
    assert earlier(database, "q", PLAIN) == reward("q", score=0.2, clock=3, weight=0.5, given_at=1.0)
    give(database, reward("r"), reward("q", source="review"), reward("q", ONE))
    give(database, reward("q", score=0.9, clock=7, weight=1.0, given_at=2.0))
    give(database, reward("q", score=0.4, clock=9, weight=2.0, given_at=3.0))
    assert earlier(database, "q", PLAIN) == reward("q", score=0.4, clock=3, weight=0.5, given_at=3.0)


def test_what_was_said_before_an_arm_began_anew_was_not_said(database: Database, folder: AdapterFolder) -> None:
    one = adapter(database, folder, 1)
    route(database, "q", arms=(arm(PLAIN), arm(one)))
    begin(database, one, 0)
    give(database, reward("q", one, 0.5))
    begin(database, one, 6)
    assert earlier(database, "q", one) is None
    give(database, reward("q", one, 0.75, clock=8))
    assert earlier(database, "q", one) == reward("q", one, 0.75, clock=8)


def test_an_answer_is_worth_the_weighted_mean_of_what_each_source_said_last(database: Database) -> None:
    for name, chosen in [("q", ONE), ("r", PLAIN), ("s", PLAIN), ("silent", PLAIN)]:
        route(database, name, chosen=chosen)
    give(database, reward("q", ONE, 0.0), reward("q", ONE, 0.5, source="review", weight=0.5), reward("q", ONE, 1.0))
    give(database, reward("q", PLAIN, 0.0), reward("q", OTHER, 0.0, source="trial"))
    give(database, reward("r", PLAIN, 0.25), reward("s", PLAIN, 0.5, weight=0.0))
    assert worth(database) == {"q": pytest.approx((1.0 + 0.5 * 0.5) / 1.5), "r": 0.25}
    assert worth(database, "another") == {}


def test_the_newest_finished_answers_without_review_come_first(database: Database) -> None:
    reasons: list[FinishReason] = ["stop", "length", "cancelled", "error", "stop", "stop"]
    for clock, reason in enumerate(reasons):
        ask(database, f"q{clock}", reason=reason)
        put(database, decision(f"q{clock}", clock))
    ask(database, "unrouted")
    give(database, reward("q4", source="review"), reward("q5"), reward("q1", ONE, source="trial"))
    with database.read() as connection:
        assert routes.without_reward(connection, limit=9) == ["q5", "q1", "q0"]
        assert routes.without_reward(connection, limit=1) == ["q5"]


# --- privacy ---------------------------------------------------------------------------------------------------------


def test_what_was_routed_and_rewarded_goes_with_the_document(database: Database, folder: AdapterFolder) -> None:
    one = adapter(database, folder, 1)
    begin(database, one, 0)
    for name, path in [("gone", "/doc"), ("stays", "/other")]:
        ask(database, name, *add_passages(database, path, "text"))
        put(database, decision(name, arms=(arm(PLAIN), arm(one))))
        give(database, reward(name), reward(name, one, source="trial"))
    assert counts(database) == {"routes": 2, "route_arms": 4, "rewards": 4, "arms": 1}
    remove_document(database, "/doc")
    assert counts(database) == {"routes": 1, "route_arms": 2, "rewards": 2, "arms": 1}
    assert history(database) == ["stays"]
    assert {each.question_id for each in given(database)} == {"stays"}
    assert put(database, decision("gone")) == give(database, reward("gone")) == [False]


def test_an_adapter_goes_with_its_document_and_so_does_its_arm(database: Database, folder: AdapterFolder) -> None:
    one = adapter(database, folder, 1)
    route(database, "q", arms=(arm(PLAIN), arm(one)))
    begin(database, one, 0)
    give(database, reward("q", one), reward("q"))
    remove_document(database, "/covered-1")
    assert counts(database) == {"routes": 1, "route_arms": 2, "rewards": 2, "arms": 0}
    assert given(database) == [reward("q")]


def test_nothing_refers_to_what_is_gone(database: Database, folder: AdapterFolder) -> None:
    one = adapter(database, folder, 1)
    begin(database, one, 0)
    for name, clock in zip("qr", itertools.count(), strict=False):
        ask(database, name, *add_passages(database, f"/{name}", "text"))
        put(database, decision(name, clock, arms=(arm(PLAIN), arm(one))))
        give(database, reward(name))
    remove_document(database, "/q")
    with database.read() as connection:
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


# --- sums ------------------------------------------------------------------------------------------------------------


def summed(database: Database) -> RouteTotals:
    with database.read() as connection:
        return totals(connection)


def test_an_empty_journal_sums_to_nothing(database: Database) -> None:
    assert summed(database) == RouteTotals(0, 0, 0, {})


def test_decisions_hits_and_trials_are_counted_and_arms_of_adapters_that_are_there(
    database: Database, folder: AdapterFolder
) -> None:
    one, two = adapter(database, folder, 1), adapter(database, folder, 2)
    everything = (arm(PLAIN), arm(one, resident=False), arm(two), arm(OTHER))  # the last one is gone
    route(database, "q", 0, PLAIN, arms=everything)
    route(database, "r", 1, one, arms=everything, explored=True)
    route(database, "s", 2, OTHER, arms=(*everything[:2], replace(everything[3], width=0.9)))
    found = summed(database)
    assert (found.decisions, found.hits, found.explored) == (3, 2, 1)
    assert {name: arm.chosen for name, arm in found.arms.items()} == {PLAIN: 1, one: 1, two: 0}


def test_the_width_of_an_arm_is_that_of_its_last_decision(database: Database, folder: AdapterFolder) -> None:
    one = adapter(database, folder, 1)
    for clock, width in ((7, 0.25), (3, 0.5), (9, None)):
        arms = (arm(PLAIN),) if width is None else (arm(PLAIN), arm(one, width=width))
        route(database, f"q{clock}", clock, arms=arms)
    assert summed(database).arms[one].width == 0.25


def test_of_rewards_that_were_given_again_the_last_one_is_summed(database: Database, folder: AdapterFolder) -> None:
    one, two = adapter(database, folder, 1), adapter(database, folder, 2)
    for name in ("q", "r"):
        route(database, name, chosen=one, arms=(arm(PLAIN), arm(one), arm(two)))
    begin(database, one, 0)
    give(database, reward("q", one, 0.0), reward("r", one, 0.25, weight=0.5, source="review"), reward("q", one, 1.0))
    give(database, reward("q", two, 0.5))  # which has not begun
    arms = summed(database).arms
    assert arms[one] == ArmTotals(2, 2, (1.0 + 0.5 * 0.25) / 1.5, 1 / 3)
    assert arms[two] == ArmTotals(0, 0, None, 1 / 3)
    begin(database, one, 5)
    assert summed(database).arms[one].rewards == 0


def test_whatever_happens_to_the_journal_leaves_its_mark(database: Database, folder: AdapterFolder) -> None:
    seen = []

    def look() -> None:
        with database.read() as connection:
            seen.append(mark(connection))

    look()
    one = adapter(database, folder, 1)
    begin(database, one, 0)
    look()
    route(database, "q", chosen=one, arms=(arm(PLAIN), arm(one)))
    look()
    for _ in range(2):
        give(database, reward("q", one))
        look()
    begin(database, one, 1)
    look()
    with database.write() as connection:
        connection.execute("DELETE FROM rewards WHERE id = 1")
    look()
    with database.write() as connection:
        adapters.remove(connection, one)
    look()
    assert len(set(seen)) == len(seen)
    look()
    assert seen[-1] == seen[-2]
