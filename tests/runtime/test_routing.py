"""The router: what it chooses, what it learns from, and that the journal alone makes its state anew."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from edge_rag import config
from edge_rag.native.llama import Model
from edge_rag.policy.caching_rules import rule
from edge_rag.policy.covering import NONE, Chosen
from edge_rag.policy.features import Space
from edge_rag.records import Answer, Passage, PassagePlan, Plan, Reward, Timings, Usage
from edge_rag.runtime.replaying import rebuild
from edge_rag.runtime.rewarding import Noted, feedback, reward_noted
from edge_rag.runtime.routing import Router
from edge_rag.runtime.shelf import Shelf
from edge_rag.store import adapters, journal, routes
from edge_rag.store.database import Connection
from edge_rag.store.router_file import NAME
from edge_rag.store.routes import Routed
from tests.native.tiny_models import write_tiny_model
from tests.runtime.registry import Registry, spoil, state, trained, unit
from tests.runtime.serving import Toy
from tests.store.adapter_samples import BASE

SPACE = Space("an encoder", 4)
GREEDY = config.Router(alpha=0.0, second_price=0.05, discount=0.99)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Toy(write_tiny_model("llama", tmp_path_factory.mktemp("llama")), gpu_layers=0) as model:
        yield model


def router(registry: Registry, settings: config.Router = GREEDY, *, space: Space = SPACE, **more: Any) -> Router:
    shelf = Shelf(registry.database, registry.pager, base=BASE)
    return Router(
        shelf,
        settings,
        space=space,
        folder=registry.database.path.parent,
        rule=lambda sizes, means: rule(settings.residency, sizes, registry.pager.budget, means=means),
        **more,
    )


def examined(count: int = 20, f1: float = 1.0) -> adapters.Questions:
    """An exam in which questions in direction 0 and near it went so well."""
    vectors = np.tile(unit(0), (count, 1)) + 0.01 * np.arange(count)[:, None] * unit(1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    texts = tuple(f"Question {place}?" for place in range(count))
    return adapters.Questions(texts, vectors.astype(np.float16), np.full(count, f1, np.float32))


def reading(each: float) -> Callable[[], Callable[[frozenset[int]], float]]:
    """Of three passages that take so many seconds each."""
    return lambda: lambda without: each * (3 - len(without))


def answered(made: Router, chosen: Chosen, *, score: float | None = None, number: int = 0) -> str:
    """Journal an answer to a routed question, and what it was worth; its id."""
    passages = tuple(Passage(chunk, 1, chunk, "notes.txt", "notes", "", None, "text", 5, 0.5) for chunk in (1, 2, 3))
    answer = Answer(
        id=f"{number:016x}",
        question="Which?",
        text="That.",
        passages=passages,
        citations=(),
        usage=Usage(),
        timings=Timings(),
        finish_reason="stop",
        plan=Plan(tuple(PassagePlan(chunk, 5) for chunk in (1, 2, 3)), adapter=chosen.adapter, route=chosen.route),
        model="toy",
    )
    with made.shelf.database.write() as connection:
        assert journal.record(connection, answer, now=time.time())
        made.note(connection, answer, chosen)
    made.count(answer.plan, chosen)
    if score is not None:
        reward(made, answer.id, score)
    return answer.id


def reward(made: Router, question: str, score: float, now: float = 1.0) -> None:
    def journalled(connection: Connection, clock: int) -> Noted | None:
        given = feedback(connection, question, score, clock=clock, now=now)
        assert given is not None
        return reward_noted(connection, given)

    made.experience.learn(journalled)


def routed_of(made: Router, question: str) -> Routed:
    with made.shelf.database.read() as connection:
        found = routes.routed(connection, question)
    assert found is not None
    return found


def ask(made: Router, *, seconds: float = 0.0, asked: Any = None, scores: Sequence[float] = ()) -> Chosen:
    return made.choose(unit(0) if asked is None else asked, [1, 2, 3], scores, reading(seconds))


# --- choosing --------------------------------------------------------------------------------------------------------


def test_without_adapters_nothing_is_weighed(registry: Registry) -> None:
    made = router(registry)
    assert ask(made) == NONE
    assert made.experience.bandit.clock == 0


def test_an_adapter_that_its_exam_praises_answers_what_it_covers(registry: Registry) -> None:
    one = registry.add(1, 1, 2, questions=examined())
    chosen = ask(router(registry), seconds=1.0)
    assert (chosen.adapter, chosen.covered) == (one, frozenset({1, 2}))
    assert chosen.route is not None
    assert [each.adapter for each in chosen.route.weighed] == ["", one]
    plain, other = chosen.route.weighed
    assert (plain.here, plain.away) == (3.0, 3.0)
    assert other.here == 1.0
    assert plain.probability == 0.0
    assert other.probability == 1.0
    assert not chosen.route.explored


def test_one_that_failed_its_exam_is_not_asked_however_much_time_it_saves(registry: Registry) -> None:
    registry.add(1, 1, 2, 3, questions=examined(f1=0.1))
    assert ask(router(registry), seconds=1.0).adapter == ""
    assert ask(router(registry), seconds=20.0).adapter != ""  # sixty seconds cost more than an answer is worth


def test_what_has_to_be_loaded_is_charged_for(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    one = registry.add(1, 1, 2, 3, questions=examined())
    made = router(registry)
    assert ask(made, seconds=0.1).adapter == one
    monkeypatch.setattr(registry.pager, "page_in_time", lambda size: 60.0)
    dear = ask(made, seconds=0.1)
    assert dear.adapter == ""
    assert dear.route is not None
    assert dear.route.weighed[1].away - dear.route.weighed[1].here == 60.0
    monkeypatch.setattr(registry.pager, "resident", lambda: frozenset({one}))
    assert ask(made, seconds=0.1).adapter == one


def test_writing_slower_under_an_adapter_is_charged_for(registry: Registry) -> None:
    one = registry.add(1, 1, 2, 3, questions=examined())
    assert ask(router(registry), seconds=0.1).adapter == one
    assert ask(router(registry, slowdown=lambda: 60.0), seconds=0.1).adapter == ""


def test_something_is_tried_unless_somebody_would_wait_too_long(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = registry.add(1, 1, 2, 3, questions=examined(count=2, f1=0.5))
    known = router(registry)
    for number in range(20):
        answered(known, ask(known), score=0.9, number=number)
    eager = replace(GREEDY, alpha=5.0, trial_wait=1.0)
    chosen = ask(router(registry, eager))
    assert chosen.adapter == one
    assert chosen.route is not None
    assert chosen.route.explored
    monkeypatch.setattr(registry.pager, "page_in_time", lambda size: 2.0)
    assert ask(router(registry, eager)).adapter == ""


def test_nobody_who_waits_is_used_to_find_out_what_an_exam_does_not_allow(registry: Registry) -> None:
    one = registry.add(1, 1, 2, 3, questions=examined(count=2, f1=0.5))
    eager = replace(GREEDY, alpha=50.0)
    far = unit(5)
    assert ask(router(registry, eager)).adapter == one
    assert ask(router(registry, eager), asked=far).adapter == ""
    assert router(registry, eager).choose(unit(0), [1, 2, 3], tries=False).adapter == ""


def test_a_share_of_questions_is_drawn_with_the_probability_that_is_written_down(registry: Registry) -> None:
    one = registry.add(1, 1, 2, 3, questions=examined(f1=0.2))
    drawing = replace(GREEDY, explore=0.2)
    drawn = iter([0.19, 0.5])
    made = router(registry, drawing, drawn=lambda: next(drawn))
    first, second = ask(made), ask(made)
    assert (first.adapter, second.adapter) == (one, "")
    assert first.route is not None
    assert [each.probability for each in first.route.weighed] == pytest.approx([0.9, 0.1])


def test_an_adapter_whose_file_was_changed_is_passed_over(registry: Registry) -> None:
    one = registry.add(1, 1, 2, 3, questions=examined())
    spoil(registry.folder, one)
    assert ask(router(registry), seconds=1.0).adapter == ""
    assert state(registry.database, one)[0] == "failed"


def test_arms_that_cover_nothing_of_it_are_not_weighed(registry: Registry) -> None:
    registry.add(1, 7, 8, questions=examined())
    chosen = ask(router(registry))
    assert chosen.route is not None
    assert [each.adapter for each in chosen.route.weighed] == [""]


def test_shares_of_passages_and_of_scores_are_seen(registry: Registry) -> None:
    registry.add(1, 1, questions=examined())
    chosen = ask(router(registry), scores=[0.8, 0.1, 0.1])
    assert chosen.contexts is not None
    share, scores, closeness, within, gate = chosen.contexts[1][-5:] / np.sqrt(0.1)
    assert (share, scores) == pytest.approx((1 / 3, 0.8))
    assert (closeness, within, gate) == pytest.approx((1.0, 1.0, 1.0), abs=1e-3)


# --- learning --------------------------------------------------------------------------------------------------------


def test_the_router_leaves_an_adapter_whose_answers_are_bad_and_takes_it_up_when_they_are_good(
    registry: Registry,
) -> None:
    one = registry.add(1, 1, 2, 3, questions=examined(count=4))
    made = router(registry)
    number = 0
    while ask(made, seconds=0.5).adapter == one:
        answered(made, ask(made, seconds=0.5), score=0.0, number=number)
        number += 1
        assert number < 50
    while (chosen := ask(made, seconds=0.5)).adapter == "":
        answered(made, chosen, score=0.0, number=number)
        number += 1
        assert number < 200


def test_the_journal_alone_makes_the_state_anew_to_the_bit(registry: Registry) -> None:
    registry.add(1, 1, 2, 3, questions=examined(f1=0.7))
    made = router(registry, replace(GREEDY, alpha=0.5))
    rng = np.random.default_rng(0)
    for number in range(20):
        question = answered(made, ask(made, seconds=0.3), score=float(rng.random()), number=number)
        if number % 3 == 0:
            reward(made, question, float(rng.random()), now=2.0)  # somebody changes his mind, later
        if number == 10:
            registry.add(2, 3, 4, questions=examined(f1=0.9))
            made.refresh()
    with registry.database.read() as connection:
        again = rebuild(
            connection,
            SPACE.tag,
            dimensions=SPACE.size,
            ridge=1.0,
            discount=GREEDY.discount,
            seeds=lambda adapter: made.exam(connection, adapter),
        )
    assert again.dump() == made.experience.bandit.dump()
    made.close()
    assert router(registry, replace(GREEDY, alpha=0.5)).experience.bandit.dump() == made.experience.bandit.dump()


@pytest.mark.parametrize("harm", ["gone", "torn", "old"])
def test_a_state_that_cannot_be_used_costs_nothing_that_was_learned(registry: Registry, harm: str) -> None:
    registry.add(1, 1, 2, 3, questions=examined(f1=0.7))
    made = router(registry)
    answered(made, ask(made), score=0.3)
    made.close()
    file = registry.database.path.parent / NAME
    if harm == "gone":
        file.unlink()
    elif harm == "torn":
        file.write_bytes(file.read_bytes()[:-7])
    else:  # killed before it could be written
        question = answered(made, ask(made), score=0.9, number=1)
        reward(made, question, 0.1)
    assert router(registry).experience.bandit.dump() == made.experience.bandit.dump()


def test_rewards_that_come_while_no_router_is_loaded_are_learned_by_the_next(registry: Registry) -> None:
    registry.add(1, 1, 2, 3, questions=examined(f1=0.7))
    made, other = router(registry), router(registry)
    question = answered(made, ask(made))
    ask(other)
    made.close()
    reward(other, question, 0.0)
    with registry.database.write() as connection:
        given = feedback(connection, question, 0.5, clock=routes.clock(connection), now=2.0)
        assert given is not None
        assert reward_noted(connection, given)
    after = router(registry)
    assert after.experience.bandit.dump() != other.experience.bandit.dump()
    other.refresh()
    assert after.experience.bandit.pulls(given.adapter) == other.experience.bandit.pulls(given.adapter)
    assert after.widths(routed_of(after, question)) == other.widths(routed_of(other, question))


def test_what_was_learned_from_questions_about_a_removed_document_is_forgotten(registry: Registry) -> None:
    registry.add(1, 7, 8, questions=trained(3))
    made = router(registry)
    before = made.experience.bandit.dump()
    answered(made, ask(made), score=0.1)
    with registry.database.write() as connection:
        connection.execute("DELETE FROM questions")
    made.refresh()
    made.experience.bandit.clock = 0
    assert made.experience.bandit.dump() == before


def test_rewards_of_another_space_or_of_an_arm_that_has_not_begun_are_not_learned(registry: Registry) -> None:
    registry.add(1, 1, 2, 3, questions=examined(f1=0.7))
    made, other = router(registry), router(registry, space=Space("another encoder", 4))
    question = answered(made, ask(made))
    before = other.experience.bandit.pulls("")
    reward(other, question, 0.0)
    assert other.experience.bandit.pulls("") == before
    reward(made, question, 0.0)
    assert router(registry).experience.bandit.dump() == made.experience.bandit.dump()


def test_a_disabled_adapter_keeps_what_its_exam_said(registry: Registry) -> None:
    one = registry.add(1, 1, 2, 3, questions=examined(f1=0.7))
    made = router(registry)
    with registry.database.write() as connection:
        adapters.set_state(connection, one, "disabled")
    made.refresh()
    assert router(registry).experience.bandit.dump() == made.experience.bandit.dump()
    assert ask(made) == NONE


def test_an_arm_whose_adapter_is_deleted_is_forgotten(registry: Registry) -> None:
    one = registry.add(1, 1, 2, 3, questions=examined())
    made = router(registry)
    assert one in made.experience.bandit.arms()
    with registry.database.write() as connection:
        adapters.remove(connection, one)
    made.refresh()
    assert made.experience.bandit.arms() == ("",)


def test_an_answer_that_an_adapter_failed_to_give_says_nothing_of_it(registry: Registry) -> None:
    one = registry.add(1, 1, 2, 3, questions=examined())
    made = router(registry)
    chosen = ask(made, seconds=1.0)
    assert chosen.adapter == one
    fallen_back = replace(chosen, adapter="")  # as the answer's plan has it
    question = answered(made, fallen_back)
    with registry.database.read() as connection:
        assert routes.routed(connection, question) is not None
    failed = replace(chosen)
    answer = journal_entry(made, number=1)
    with registry.database.write() as connection:
        made.note(connection, answer, failed)
        assert routes.routed(connection, answer.id) is None


def journal_entry(made: Router, *, number: int) -> Answer:
    """An answer from passages, not routed."""
    answer = Answer(
        id=f"{number:016x}",
        question="Which?",
        text="That.",
        passages=(),
        citations=(),
        usage=Usage(),
        timings=Timings(),
        finish_reason="stop",
        plan=Plan(),
        model="toy",
    )
    with made.shelf.database.write() as connection:
        journal.record(connection, answer, now=1.0)
    return answer


def test_rewards_for_what_was_not_routed_are_passed_over(registry: Registry) -> None:
    made = router(registry)
    answer = journal_entry(made, number=1)
    with registry.database.write() as connection:
        assert feedback(connection, answer.id, 1.0, clock=0, now=1.0) is None
    made.take(Reward(answer.id, "", 0, 1.0, 1.0, 1.0, "review"))
    assert made.experience.bandit.dump() == router(registry).experience.bandit.dump()


# --- what stays in memory --------------------------------------------------------------------------------------------


def test_what_is_used_stays_and_is_told_to_the_pager(registry: Registry) -> None:
    one = registry.add(1, 1, 2, 3, questions=examined())
    made = router(registry)
    answered(made, ask(made, seconds=1.0))
    assert made.keeper.wanted == (one,)
    assert registry.pager.missing() == (one,)


def test_questions_about_nothing_learned_leave_what_stays_alone(registry: Registry) -> None:
    registry.add(1, 7, 8, questions=trained(3))
    made = router(registry)
    answered(made, ask(made))
    assert made.keeper.wanted == ()
    assert registry.pager.missing() == ()
