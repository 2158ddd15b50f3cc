"""What answers were worth: what they are compared with, who is tried beside, what is left alone, and who goes first.

With a tiny model and adapters with random weights; and once with the real small model.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from msgspec import Struct
from msgspec.structs import replace

from edge_rag.config import Settings, load_settings
from edge_rag.native.llama import Run
from edge_rag.policy.agreement import f1
from edge_rag.policy.prompt import LAYOUT_VERSION
from edge_rag.records import Answer, Plan, Reward, Sampling, Usage
from edge_rag.runtime import reviewing
from edge_rag.runtime.generations import Generation
from edge_rag.runtime.reviewing import KNOWN, Materials, Reviewer
from edge_rag.runtime.shelf import Shelf
from edge_rag.store import adapters, journal, routes
from edge_rag.store.adapters import NO_QUESTIONS, AdapterFolder
from edge_rag.store.routes import Routed, RoutedArm
from tests.native.tiny_loras import write_tiny_lora
from tests.native.tiny_models import write_tiny_model
from tests.runtime.coursework import Builder, Embedder, Shape, logged, write_blank_lora
from tests.runtime.serving import (
    Batches,
    Running,
    Toy,
    add_document,
    add_files,
    answered,
    remove_document,
    running,
    small_library,
    toy_prompt,
)
from tests.store.adapter_samples import BASE, all_adapters, unregistered, weights

SPACE = "a space"
TOKENS = 12  # of an answer
WIDE = 0.9
LIMIT = 60.0  # seconds after which a thread is given up


class Ending(Toy):
    """A toy model that ends its answers with some tokens."""

    ends: frozenset[int] = frozenset()

    def ends_generation(self, token: int) -> bool:
        return token in self.ends


class Prompts(Builder):
    """Notes which instructions it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def tail(self, turns: Sequence[Any], question: str, instructions: str = "") -> tuple[int, ...]:
        self.told.append(instructions)
        return (1,) * 600 if question == "long" else super().tail(turns, question, instructions)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ending]:
    with Ending(write_tiny_model("llama", tmp_path_factory.mktemp("llama")), gpu_layers=0) as model:
        yield model


class Court(Struct):
    """A library with adapters, and all that reviews it; `compared` are the answers that were, each with a reference."""

    served: Running
    shelf: Shelf
    builder: Prompts
    embedder: Embedder
    rewards: list[Reward] = []
    compared: list[tuple[str, str]] = []
    asked: int = 0

    def reviewer(self, **changes: Any) -> Reviewer:
        flags = {"models.llm": "model", "answering.max_tokens": TOKENS, "router.review_share": 1.0}
        flags |= {name.replace("__", "."): value for name, value in changes.items() if "__" in name}
        others = {name: value for name, value in changes.items() if "__" not in name}
        materials = Materials(
            self.served.engine,
            self.builder,  # type: ignore[arg-type]
            self.embedder,  # type: ignore[arg-type]
            self.shelf,
            load_settings(flags, environment={}),
            SPACE,
        )
        return Reviewer(materials, learn=self.learn, **others)

    def learn(self, reward: Reward) -> None:
        with self.served.database.write() as connection:
            assert routes.put_reward(connection, reward)
        self.rewards.append(reward)

    def add(self, seed: int, *members: int, file: Path | None = None) -> str:
        """Register an adapter with random weights; its id."""
        folder = AdapterFolder(self.served.folder / "adapters")
        made = adapters.register(
            self.served.database,
            folder,
            file or write_tiny_lora(self.served.folder, seed=seed),
            unregistered(*members, base=BASE, layout=LAYOUT_VERSION),
            NO_QUESTIONS,
        )
        assert made is not None
        self.shelf.refresh()
        return made.id

    def ask(self, *chunks: int, text: str = "It is so.", arms: dict[str, float] | None = None, **changes: Any) -> str:
        """Journal an answer and how it was routed: `arms` with their widths, the first one was chosen; its id."""
        number, arms = self.asked, {"": WIDE} if arms is None else arms
        self.asked += 1
        route = {"space": changes.pop("space", SPACE), "clock": number}
        answer: Answer = replace(logged(f"Question {number}?", chunks), text=text)
        answer = replace(answer, **changes)
        with self.served.database.write() as connection:
            journal.record(connection, answer, now=1e9 + number)
            routes.put(connection, routed(answer.id, arms, **route))
        return answer.id

    def says(self, question: str, *chunks: int, adapter: str = "", tokens: int = TOKENS) -> str:
        """What serving says to it with these passages in the prompt."""
        plain = toy_prompt(chunks, question=1 + crc32(question.encode()) % 30, tokens=6)
        prompt = type(plain)(plain.prefix, plain.passages, plain.tail, plain.chunks, adapter)
        return self.served.ask(prompt, Sampling(max_tokens=tokens)).text

    def pulled(self) -> int:
        assert self.served.engine.pager is not None
        return self.served.engine.pager.status().page_ins


def routed(question_id: str, arms: dict[str, float], *, space: str, clock: int) -> Routed:
    made = [RoutedArm(name, np.ones(3), 0.5, width, 1.0, 1.0, 2.0, 1.0, True) for name, width in arms.items()]
    return Routed(question_id, clock, space, next(iter(arms)), False, tuple(made))


@pytest.fixture
def court(toy: Ending, data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Court]:
    (data / "adapters").mkdir()
    score = reviewing.score
    with running(toy, data, adapters=data / "adapters") as served:
        assert served.engine.pager is not None
        made = Court(served, Shelf(served.database, served.engine.pager, base=BASE), Prompts(), Embedder())

        def compare(said: str, reference: str, cosine: Any) -> float | None:
            made.compared.append((said, reference))
            return score(said, reference, cosine)

        monkeypatch.setattr(reviewing, "score", compare)
        yield made
    toy.ends = frozenset()


# --- reviews ---------------------------------------------------------------------------------------------------------


def test_an_answer_is_compared_with_the_one_from_all_passages_and_the_arm_that_gave_it_rewarded(court: Court) -> None:
    one = court.add(1, 5, 3)
    reference = court.says("Question 0?", 5, 3, 8)
    assert reference != court.says("Question 0?", 8)
    asked = court.ask(5, 3, 8, text=f"{reference} more [2]", arms={one: WIDE, "": WIDE})
    made = court.reviewer()
    assert made.next() is True
    [reward] = court.rewards
    assert court.compared == [(f"{reference} more [2]", reference)]
    assert (reward.question_id, reward.adapter, reward.source) == (asked, one, "review")
    assert (reward.score, reward.weight, reward.clock) == (pytest.approx(2 / 3), 0.5, 0)
    assert reward.given_at > 1.7e9
    assert court.pulled() == 0
    assert made.next() is False
    assert court.reviewer().next() is False
    court.served.settle()


def test_what_says_the_same_was_worth_1(court: Court) -> None:
    court.ask(2, 4, text=court.says("Question 0?", 2, 4))
    assert court.reviewer().next()
    assert [(reward.adapter, reward.score) for reward in court.rewards] == [("", 1.0)]


def test_the_newest_answers_come_first(court: Court) -> None:
    asked = [court.ask(1) for _ in range(3)]
    made = court.reviewer()
    while made.next():
        pass
    assert [reward.question_id for reward in court.rewards] == asked[::-1]
    later = court.ask(1)
    assert made.next()
    assert court.rewards[-1].question_id == later


def test_only_so_many_of_the_newest_are_looked_at(court: Court, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reviewing, "LOOKED_AT", 2)
    asked = [court.ask(1) for _ in range(3)]
    made = court.reviewer()
    assert [made.next() for _ in range(3)] == [True, True, False]
    assert [reward.question_id for reward in court.rewards] == asked[:0:-1]


def test_long_answers_are_compared_by_the_cosine_of_their_embeddings(
    court: Court, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_rag.policy.reward.SHORT", 0)
    reference = court.says("Question 0?", 1)
    court.ask(1, text=reference)
    assert court.reviewer().next()
    assert court.embedder.embedded == [reference, reference]
    assert court.rewards[0].score == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("written", "reason", "expected"),
    [
        pytest.param(3, "length", 3, id="cut"),
        pytest.param(30, "length", 30, id="cut where it was allowed more than usual"),
        pytest.param(3, "stop", TOKENS, id="not cut"),
        pytest.param(20, "stop", 20, id="longer than is usual"),
    ],
)
def test_the_new_answer_may_be_as_long_as_the_old_one_might_have_been(
    court: Court, written: int, reason: str, expected: int
) -> None:
    court.ask(5, 8, usage=Usage(completion_tokens=written), finish_reason=reason)
    assert court.reviewer().next()
    [(_, reference)] = court.compared
    assert reference == court.says("Question 0?", 5, 8, tokens=expected)


def test_it_is_asked_with_the_users_instructions_as_it_was_searched_for_and_ends_where_answers_end(
    court: Court,
) -> None:
    full = court.says("Where is it?", 2, 4)
    end = next(place for place in range(3, TOKENS) if full[place] not in full[:place])
    assert court.says("Question 0?", 2, 4)[:end] != full[:end]
    court.ask(2, 4, plan=Plan(search_query="Where is it?"))
    assert court.reviewer(answering__instructions="Be brief.", answering__stop=(full[end],)).next()
    [(_, reference)] = court.compared
    assert reference == full[:end]
    assert court.builder.told == ["Be brief."]


def test_a_model_that_says_nothing_judges_nobody(court: Court, toy: Ending) -> None:
    one = court.add(1, 1)
    court.ask(1, arms={"": WIDE, one: WIDE})
    toy.ends = frozenset(range(toy.vocab_size))
    made = court.reviewer()
    assert made.next() is True
    assert court.compared == [("It is so.", "")]
    assert court.rewards == []
    assert made.next() is False


# --- what is left alone ----------------------------------------------------------------------------------------------


def refused(court: Court, **changes: Any) -> None:
    made = court.reviewer(**changes)
    assert made.next() is False
    assert made.next() is False
    assert (court.rewards, court.compared) == ([], [])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"finish_reason": "cancelled"}, id="cancelled"),
        pytest.param({"finish_reason": "timeout"}, id="not finished in time"),
        pytest.param({"model": "another"}, id="of another model"),
        pytest.param({"space": "another"}, id="of another space"),
    ],
)
def test_what_cannot_be_compared_is_left_alone(court: Court, changes: dict[str, Any]) -> None:
    court.ask(1, 2, **changes)
    refused(court)


def test_what_was_not_routed_is_left_alone(court: Court) -> None:
    with court.served.database.write() as connection:
        journal.record(connection, logged("Question?", [1]), now=1.0)
    refused(court)


def test_what_somebody_has_judged_is_left_alone(court: Court) -> None:
    asked = court.ask(1, 2)
    with court.served.database.write() as connection:
        journal.add_feedback(connection, asked, 0.0, "", now=1.0)
    refused(court)


def test_an_answer_with_a_passage_that_has_changed_is_left_alone(court: Court) -> None:
    [more] = add_document(court.served.database, "more.txt", 1)
    court.ask(1, more)
    add_document(court.served.database, "more.txt", 2)
    refused(court)


def test_an_answer_that_goes_with_its_document_is_not_missed(court: Court) -> None:
    court.ask(1)
    made = court.reviewer()
    remove_document(court.served.database, "notes.txt")
    assert made.next() is False


@pytest.mark.parametrize(("question", "n_ctx"), [("long", 512), ("Question?", 45)])
def test_where_not_all_passages_find_room_there_is_no_reference(court: Court, question: str, n_ctx: int) -> None:
    court.ask(1, 2, 3, question=question)
    court.served.engine.n_ctx = n_ctx
    batches, made = Batches(court.served.engine), court.reviewer()
    assert made.next() is True
    assert (court.rewards, batches.done) == ([], [])
    assert made.next() is False


def test_about_the_share_asked_for_is_reviewed_and_the_same_answers_each_time(court: Court) -> None:
    asked = [court.ask(1) for _ in range(60)]
    refused(court, router__review_share=0.0)
    made = court.reviewer(router__review_share=0.25)
    while made.next():
        pass
    found = {reward.question_id for reward in court.rewards}
    assert found == {each for each in asked if int(each, 16) % 10_000 < 2500}
    assert 5 < len(found) < 25


# --- trials ----------------------------------------------------------------------------------------------------------


def test_the_adapter_that_is_known_least_answers_too_without_its_passages_and_from_disk(court: Court) -> None:
    one, two, three = court.add(1, 5, 3), court.add(2, 3, 8), court.add(3, 8)
    arms = {"": WIDE, one: 0.3, two: 0.5, three: 0.4}
    asked = court.ask(5, 3, 8, arms=arms)
    assert court.reviewer().next()
    review, trial = court.rewards
    assert (review.source, review.adapter) == ("review", "")
    assert (trial.source, trial.adapter, trial.question_id, trial.weight) == ("trial", two, asked, 0.5)
    (_, reference), compared = court.compared
    assert compared == (court.says("Question 0?", 5, adapter=two), reference)
    assert compared[0] != court.says("Question 0?", 5)
    assert reference == court.says("Question 0?", 5, 3, 8)
    assert trial.score == f1(compared[0], [reference])
    assert court.pulled() == 1
    court.served.settle()
    assert court.served.engine.pager is not None
    assert not court.served.engine.pager._held


def test_how_unsure_arms_are_now_counts_when_it_is_known(court: Court) -> None:
    one, two = court.add(1, 1), court.add(2, 1)
    court.ask(1, arms={"": WIDE, one: WIDE, two: 0.0})
    told: list[Routed] = []

    def widths(route: Routed) -> list[float]:
        told.append(route)
        return [KNOWN + 0.01 if arm.adapter == two else KNOWN for arm in route.arms]

    assert court.reviewer(widths=widths).next()
    assert [reward.adapter for reward in court.rewards] == ["", two]
    assert [arm.adapter for arm in told[0].arms] == sorted(["", one, two])


def test_neither_arms_that_are_known_nor_the_one_that_answered_nor_one_that_may_not_answer_is_tried(
    court: Court,
) -> None:
    one, two, three = court.add(1, 1), court.add(2, 1), court.add(3, 1)
    with court.served.database.write() as connection:
        adapters.set_state(connection, three, "disabled", "by hand")
    court.shelf.refresh()
    court.ask(1, arms={one: 1.0, "": 1.0, two: KNOWN, three: 1.0})
    assert court.reviewer().next()
    assert [(reward.source, reward.adapter) for reward in court.rewards] == [("review", one)]


def test_an_adapter_that_covers_none_of_the_passages_is_not_tried(court: Court) -> None:
    one = court.add(1, 5)
    court.ask(1, 2, arms={"": WIDE, one: WIDE})
    assert court.reviewer().next()
    assert [reward.source for reward in court.rewards] == ["review"]
    assert court.pulled() == 0


def disabled(court: Court) -> list[tuple[str, str]]:
    return [(each.state, each.reason) for each in all_adapters(court.served.database)]


def test_a_file_that_was_changed_is_not_tried_and_not_used_any_more(court: Court) -> None:
    one = court.add(1, 1)
    path = court.served.folder / "adapters" / f"{one}.gguf"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    court.ask(1, arms={"": WIDE, one: WIDE})
    assert court.reviewer().next()
    assert [reward.source for reward in court.rewards] == ["review"]
    assert disabled(court) == [("failed", "its file is missing or was changed")]


def test_an_adapter_that_cannot_be_loaded_is_not_used_any_more(court: Court, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one = court.add(0, 1, file=weights(tmp_path / "other"))
    court.ask(1, arms={"": WIDE, one: WIDE})
    assert court.reviewer().next() is True
    assert [reward.source for reward in court.rewards] == ["review"]
    assert disabled(court) == [("failed", "it could not be loaded")]
    assert court.shelf.known == {}


def test_an_adapter_that_finds_no_room_is_not_tried_and_stays(court: Court) -> None:
    one = court.add(1, 1)
    court.ask(1, arms={"": WIDE, one: WIDE})
    court.shelf.pager.budget = 100
    assert court.reviewer().next() is True
    assert [reward.source for reward in court.rewards] == ["review"]
    assert disabled(court) == [("ready", "")]


# --- others go first -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("during", ["review", "trial"])
def test_a_request_goes_first_and_the_review_begins_anew(court: Court, during: str) -> None:
    one = court.add(1, 3)
    court.ask(5, 3, arms={"": WIDE, one: WIDE})
    expected = [court.says("Question 0?", 5, 3), court.says("Question 0?", 5, adapter=one)]
    batches, urgent = Batches(court.served.engine), list[Generation]()

    def submit(runs: Sequence[Run]) -> None:
        written = sum(len(run.tokens) == 1 for runs in batches.done for run in runs)
        if not urgent and written > 4 and (during == "review" or court.rewards):
            urgent.append(court.served.engine.submit(toy_prompt([9], question=33), Sampling(max_tokens=3)))

    batches.before = submit
    assert court.reviewer().next()
    assert answered(urgent[0]).text
    (_, reference), (said, _) = court.compared
    assert [reference, said] == expected
    court.served.settle()


def test_closing_the_engine_ends_the_review(court: Court) -> None:
    court.ask(1)
    batches, begun, closing = Batches(court.served.engine), threading.Event(), threading.Event()
    abort = batches.context.abort

    def aborted(on: bool) -> None:
        abort(on)
        if on:
            closing.set()

    def hold(runs: Sequence[Run]) -> None:
        begun.set()
        assert closing.wait(LIMIT)

    batches.before = hold
    batches.context.abort = aborted  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(court.reviewer().next)
        assert begun.wait(LIMIT)
        court.served.engine.close()
        with pytest.raises(CancelledError):
            waiting.result(LIMIT)
    assert court.rewards == []


# --- with the real small model ---------------------------------------------------------------------------------------


def test_the_small_model_agrees_with_itself_and_judges_an_adapter(tmp_path: Path, small_settings: Settings) -> None:
    texts = {
        "hose.txt": "The hose of the Marlin unit is two metres long and must not be bent.",
        "pump.txt": "The pump of the Marlin unit must be oiled every 12 weeks.",
    }
    flags = {"answering__max_tokens": 20, "router__review_share": 1, "router__mode": "coverage"}
    with small_library(tmp_path / "data", small_settings, **flags) as rag:
        add_files(rag, tmp_path / "files", texts)
        answer = rag.ask("How often must the pump of the Marlin unit be oiled?")
        assert answer.citations
        house, pager = rag._house, rag._house.engine().pager
        assert pager is not None
        file = write_blank_lora(tmp_path / "blank.gguf", Shape(layers=30, forward=1536, embedding=576))
        members = [passage.chunk_id for passage in answer.passages]
        adapter = unregistered(*members, base=house.base(), layout=LAYOUT_VERSION)
        made = adapters.register(rag._database, house.school.folder, file, adapter, NO_QUESTIONS)
        assert made is not None
        with rag._database.write() as connection:
            routes.put(connection, routed(answer.id, {"": WIDE, made.id: WIDE}, space=SPACE, clock=0))
        shelf = Shelf(rag._database, pager, base=house.base())
        materials = Materials(house.engine(), house.builder(), house.embedder(), shelf, rag.settings, SPACE)
        rewards: list[Reward] = []
        assert Reviewer(materials, learn=rewards.append).next()
        review, trial = rewards
        assert (review.adapter, review.score) == ("", 1.0)
        assert (trial.adapter, trial.source) == (made.id, "trial")
        assert 0 <= trial.score < 1  # without the passage it cannot know
