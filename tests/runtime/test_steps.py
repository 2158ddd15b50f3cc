"""The step loop: batches of many requests, what they share, and that nothing is left over whatever happens.

Pieces are shown with a context that computes nothing, the whole with tiny models of random weights. Callers who do
anything at any time act on the engine's thread, one thing before each batch, so that a seed tells the whole story.
"""

import contextlib
import gc
import itertools
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from itertools import accumulate, dropwhile
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_rag.errors import Busy, Cancelled, EngineError, ModelError
from edge_rag.native.llama import Context, ContextSettings, Model, Run
from edge_rag.policy.scheduling import OVERTAKEN, Job
from edge_rag.records import Sampling
from edge_rag.runtime.generations import Finished, Generation, Reading, Text
from edge_rag.runtime.prompting import Prompt
from edge_rag.runtime.requests import Desk
from edge_rag.runtime.steps import Steps, Writer
from tests.native.tiny_models import write_tiny_model
from tests.runtime.serving import (
    PREFIX,
    SAMPLING,
    Answered,
    Batches,
    Running,
    Samplers,
    Toy,
    answered,
    drained,
    ends,
    look,
    running,
    said,
    toy_passage,
    toy_prompt,
)

# --- pieces: a context that computes nothing -------------------------------------------------------------------------


class Paper:
    """In place of a context: notes batches, and raises what it is told to raise, one thing a batch (None: nothing)."""

    def __init__(self, *raises: Exception | None, n_batch: int = 64) -> None:
        self.settings = ContextSettings(n_batch=n_batch)
        self.batches: list[list[Run]] = []
        self.aborted = False
        self._raises = deque(raises)

    def decode(self, runs: Sequence[Run]) -> tuple[int, ...]:
        if self._raises and (error := self._raises.popleft()):
            raise error
        assert 0 < sum(len(run.tokens) for run in runs) <= self.settings.n_batch
        assert all(run.tokens for run in runs)
        self.batches.append(list(runs))
        return tuple(end - 1 for end in accumulate(len(run.tokens) for run in runs))

    def wait(self) -> None:
        pass

    def abort(self, on: bool) -> None:
        self.aborted = on


class Pen:
    """An answer of so many tokens. `wishes` are what it says when asked whether it is wanted, the last one for ever."""

    def __init__(self, number: int, tokens: int = 99, *, lane: str = "", wishes: Sequence[bool] = (True,)) -> None:
        self.job = Job(number, 1, lane)
        self.places: list[int] = []
        self.failed: list[Exception] = []
        self._left = tokens
        self._wishes = deque(wishes)

    @property
    def wanted(self) -> bool:
        return self._wishes.popleft() if len(self._wishes) > 1 else self._wishes[0]

    @property
    def run(self) -> Run:
        return Run((self.job.id,), 10 + self.job.id, len(self.places), logits=True)

    def take(self, place: int) -> bool:
        self.places.append(place)
        self._left -= 1
        return self._left > 0

    def fail(self, error: Exception) -> None:
        self.failed.append(error)


class Broken(Pen):
    """One whose tokens cannot be taken."""

    def take(self, place: int) -> bool:
        raise ValueError("a bug")


def steps_of(paper: Paper, *pens: Pen) -> tuple[Steps, list[Writer]]:
    """Steps of these answers, and those that have ended."""
    ended: list[Writer] = []
    steps = Steps(cast(Context, paper), ended=ended.append)
    for pen in pens:
        steps.writers[pen.job.id] = pen
    return steps, ended


def lengths(paper: Paper) -> list[list[int]]:
    return [[len(run.tokens) for run in batch] for batch in paper.batches]


runs = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 50), st.booleans()), min_size=1, max_size=5).map(
    lambda drawn: [
        Run(tuple(range(length)), sequence, start, logits) for sequence, (length, start, logits) in enumerate(drawn)
    ]
)


@given(runs, st.integers(0, 4), st.sampled_from([16, 17, 64]))
def test_runs_are_decoded_to_their_ends_in_order_however_long_they_are(asked, count, n_batch) -> None:
    paper = Paper(n_batch=n_batch)
    steps, _ = steps_of(paper, *(Pen(number) for number in range(count)))
    done = steps.decode(asked)
    pieces = [run for batch in paper.batches for run in batch if run.sequence < 10]
    for run in asked:
        own = [piece for piece in pieces if piece.sequence == run.sequence]
        assert [token for piece in own for token in piece.tokens] == list(run.tokens)
        place = run.position
        for piece in own:
            assert piece.position == place
            place += len(piece.tokens)
        assert [piece.logits for piece in own] == [False] * (len(own) - 1) + [run.logits] * bool(own)
    assert [piece.sequence for piece in pieces] == sorted(piece.sequence for piece in pieces)
    last = [sum(len(run.tokens) for run in batch if run.sequence < 10) for batch in paper.batches][-1:]
    assert done.place == (last[0] - 1 if last else -1)


def test_what_is_read_takes_one_token_of_every_answer_along() -> None:
    paper, pens = Paper(n_batch=64), [Pen(1), Pen(2)]
    steps, _ = steps_of(paper, *pens)
    steps.decode([Run(tuple(range(40)), 0, 0, logits=True)])
    assert lengths(paper) == [[16, 1, 1], [16, 1, 1], [8, 1, 1]]
    assert pens[0].places == [16, 16, 8]
    assert pens[1].places == [17, 17, 9]


def test_an_answer_that_has_come_to_its_end_leaves_and_the_others_go_on() -> None:
    paper, short, long = Paper(), Pen(1, 2), Pen(2, 4)
    steps, ended = steps_of(paper, short, long)
    for _ in range(5):
        steps.write()
    assert lengths(paper) == [[1, 1], [1, 1], [1], [1]]
    assert ended == [short, long]
    assert steps.writers == {}


def test_before_every_step_there_is_a_chance_to_look_around() -> None:
    paper, looked = Paper(), list[int]()
    steps = Steps(cast(Context, paper), before=lambda: looked.append(len(paper.batches)))
    steps.decode([Run(tuple(range(150)), 0, 0)])
    steps.writers[1] = Pen(1)
    steps.write()
    assert looked == [0, 1, 2, 3]
    assert lengths(paper) == [[64], [64], [22], [1]]


def test_writing_nothing_does_nothing() -> None:
    steps, _ = steps_of(paper := Paper())
    steps.write()
    assert (paper.batches, steps.count, steps.last) == ([], 0, None)


def test_a_batch_that_was_stopped_is_run_again_while_it_is_wanted() -> None:
    paper, pen = Paper(Cancelled("hint"), Cancelled("hint")), Pen(1)
    steps, _ = steps_of(paper, pen)
    paper.abort(True)
    steps.decode([Run((1, 2), 0, 0)])
    assert lengths(paper) == [[2, 1]]
    assert pen.places == [2]
    assert not paper.aborted


def test_what_is_no_longer_wanted_is_not_decoded_and_answers_stay() -> None:
    paper, pen, wishes = Paper(n_batch=16), Pen(1), iter([True, True, False])
    steps, ended = steps_of(paper, pen)
    with pytest.raises(Cancelled):
        steps.decode([Run(tuple(range(90)), 0, 0)], wanted=lambda: next(wishes))
    assert lengths(paper) == [[15, 1], [15, 1]]
    assert (list(steps.writers), ended, pen.failed) == ([1], [], [])


def test_an_answer_that_is_no_longer_wanted_leaves_before_the_next_step() -> None:
    paper, unwanted, other = Paper(), Pen(1, wishes=[False]), Pen(2)
    steps, ended = steps_of(paper, unwanted, other)
    steps.decode([Run((1, 2, 3), 0, 0)])
    assert lengths(paper) == [[3, 1]]
    assert ended == [unwanted]
    assert unwanted.places == []


@pytest.mark.parametrize("said_yes", range(5))
def test_the_last_answer_may_be_given_up_at_any_moment(said_yes: int) -> None:
    # Shows a fault: an answer given up between two looks at it left a step without anything to do.
    paper, pen = Paper(), Pen(1, wishes=[True] * said_yes + [False])
    steps, ended = steps_of(paper, pen)
    for _ in range(5):
        steps.write()
    assert ended == [pen]
    assert len(pen.places) == len(paper.batches) <= said_yes
    assert pen.failed == []


def test_an_answer_that_fails_does_not_take_the_others_along() -> None:
    paper, broken, pen = Paper(), Broken(1), Pen(2)
    steps, ended = steps_of(paper, broken, pen)
    steps.decode([Run((1, 2), 0, 0)])
    assert ended == [broken]
    assert ["a bug" in str(error) for error in broken.failed] == [True]
    steps.write()
    assert pen.places == [3, 0]


def test_answers_whose_batch_fails_are_tried_one_by_one() -> None:
    paper, pens = Paper(EngineError("no"), EngineError("no")), [Pen(1), Pen(2), Pen(3)]
    steps, ended = steps_of(paper, *pens)
    steps.write()
    assert ended == [pens[0]]
    assert [len(pen.failed) for pen in pens] == [1, 0, 0]
    assert [run[0].tokens for run in paper.batches] == [(2,), (3,)]
    steps.write()
    assert lengths(paper)[-1] == [1, 1]
    assert [pen.places for pen in pens] == [[], [0, 0], [0, 1]]


def test_answers_whose_batch_fails_are_told_once_and_leave() -> None:
    paper, pens = Paper(EngineError("no"), EngineError("no"), EngineError("no")), [Pen(1), Pen(2)]
    steps, ended = steps_of(paper, *pens)
    for _ in range(4):
        steps.write()
    assert [len(pen.failed) for pen in pens] == [1, 1]
    assert sorted(pen.job.id for pen in ended) == [1, 2]
    assert steps.writers == {}
    assert paper.batches == []


def test_a_prompt_that_cannot_be_decoded_does_not_end_the_answers() -> None:
    # Shows a fault: whatever was wrong with a prompt ended the answers of strangers.
    paper, pen = Paper(EngineError("a token that is none")), Pen(1)
    steps, ended = steps_of(paper, pen)
    with pytest.raises(EngineError, match="a token that is none"):
        steps.decode([Run((1, 2), 0, 0)])
    assert (ended, pen.failed) == ([], [])
    steps.write()
    assert pen.places == [0]


def test_answers_of_another_lane_that_fail_do_not_end_the_reading() -> None:
    paper, pen = Paper(None, EngineError("no")), Pen(1, lane="law")
    steps, ended = steps_of(paper, pen)
    steps.decode([Run(tuple(range(40)), 0, 0)])
    assert lengths(paper) == [[16], [24]], "alone, it is read in whole batches"
    assert ended == [pen]
    assert len(pen.failed) == 1


def test_lanes_take_turns_while_a_prompt_is_read() -> None:
    paper, pens = Paper(), [Pen(1, lane="law"), Pen(2)]
    steps, _ = steps_of(paper, *pens)
    steps.decode([Run(tuple(range(40)), 0, 0)])
    assert lengths(paper) == [[16, 1], [1], [16, 1], [1], [8, 1]]
    assert steps.last is not None
    assert (steps.last.reading, steps.last.writers, steps.count) == (8, (2,), 5)


# --- the whole: tiny models ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Model]]:
    """Tiny models by the name of what they are."""
    loaded: dict[str, Model] = {}

    def load(name: str) -> Model:
        if name not in loaded:
            loaded[name] = Toy(write_tiny_model(name, tmp_path_factory.mktemp(name)), gpu_layers=0)
        return loaded[name]

    yield load
    for model in loaded.values():
        model.close()


@pytest.fixture(scope="module")
def toy(models: Callable[[str], Model]) -> Model:
    return models("llama")


@pytest.fixture
def samplers(monkeypatch: pytest.MonkeyPatch) -> Samplers:
    return Samplers(monkeypatch)


def words(count: int, seed: int = 0) -> Sampling:
    """An answer of so many tokens; greedy, so that the seed is a name and no more."""
    return Sampling(max_tokens=count, seed=seed)


def bare(number: int, tokens: int) -> Prompt:
    """A prompt of which nothing is kept."""
    return Prompt((), (), toy_passage(number, tokens))


# --- cells that are shared -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(2, 12), (12, 2), (6, 6), (1, 6)])
def test_questions_about_the_same_passages_share_cells_and_are_answered_as_alone(
    served: Running, samplers: Samplers, first: int, second: int
) -> None:
    batches = Batches(served.engine)
    asked = toy_prompt((1, 2, 3), question=2)
    one, two = served.ask_together((toy_prompt((1, 2, 3)), words(first, 1)), (asked, words(second, 2)))
    assert (one.sources, one.cached) == (["new"] * 3, 0)
    there = ["live"] * 3 if first > 1 else ["state"] * 3  # an answer of one token has ended when the next one begins
    assert (two.sources, two.cached) == (there, len(PREFIX) + 60)
    if first > 1:
        assert batches.of(1)[0].position == len(PREFIX) + 60, "nothing of the passages was computed again"
    alone = served.ask(asked, words(second, 3))
    assert alone.sources == ["state"] * 3
    assert samplers.alike(2, 3)
    assert not samplers.alike(1, 3), "another question has another answer"
    assert len(two.text) == second


def test_sharing_copies_nothing(served: Running) -> None:
    restored: list[int] = []
    batches = Batches(served.engine)
    restore = batches.context.restore

    def noted(sequence: int, state: Any) -> None:
        restored.append(sequence)
        restore(sequence, state)

    batches.context.restore = noted  # type: ignore[method-assign]
    served.ask_together((toy_prompt((1, 2)), words(9)), (toy_prompt((1, 2), question=2), words(9)))
    assert 0 in restored
    assert 1 not in restored


def test_a_prompt_that_begins_as_one_that_is_answered_shares_the_beginning(served: Running, samplers: Samplers) -> None:
    prompts = [toy_prompt(order, question=place) for place, order in enumerate([(1, 2, 3), (1, 2, 4), (1,), (2, 1)])]
    together = served.ask_together(*((prompt, words(20, seed)) for seed, prompt in enumerate(prompts)))
    assert [answer.sources for answer in together] == [
        ["new", "new", "new"],
        ["live", "live", "new"],
        ["live"],
        ["ram", "ram"],
    ]
    assert together[1].cached == len(PREFIX) + 40
    for seed, prompt in enumerate(prompts):
        assert served.ask(prompt, words(20, 10 + seed)).last.reason == "length"
        assert samplers.alike(seed, 10 + seed)


def test_the_same_question_at_the_same_time_is_read_but_for_its_last_token(served: Running, samplers: Samplers) -> None:
    asked = toy_prompt((1, 2, 3))
    answers = served.ask_together(*((asked, words(12, seed)) for seed in range(4)))
    assert [answer.cached for answer in answers] == [0] + [len(asked) - 1] * 3
    assert all(samplers.alike(0, seed) for seed in range(1, 4))


def test_what_is_shared_stays_when_the_one_who_had_it_is_given_up(served: Running, samplers: Samplers) -> None:
    batches, asked = Batches(served.engine), toy_prompt((1, 2, 9), question=2, tokens=90)
    generations: list[Generation] = []

    def give_up(runs: Sequence[Run]) -> None:
        writing = [run.sequence for run in runs if len(run.tokens) == 1]
        if 0 in writing and len(runs) > 1:  # while the second one is put together
            generations[0].cancel()

    batches.before = give_up
    both = (toy_prompt((1, 2), tokens=90), words(99, 1)), (asked, words(12, 2))
    first, second = served.submit_together(*both, then=generations.extend)
    answer = answered(second)
    assert answered(first).last.reason == "cancelled"
    assert answer.sources == ["live", "live", "new"]
    batches.before = lambda runs: None
    served.settle()
    served.ask(asked, words(12, 3))
    assert samplers.alike(2, 3)


def test_a_kept_state_of_the_whole_prompt_is_better_than_a_part_that_is_shared(served: Running) -> None:
    # Shows a fault: one shared passage was taken, and the others put together again.
    asked = toy_prompt((1, 2, 3))
    served.ask(asked)
    answers = served.ask_together((toy_prompt((1, 4)), words(20)), (asked, SAMPLING))
    assert (answers[1].sources, answers[1].cached) == (["state"] * 3, len(asked) - 1)


def test_nothing_is_shared_where_sharing_is_off(toy: Model, data: Path) -> None:
    with running(toy, data, {"engine.share": False}) as started:
        asked = toy_prompt((1, 2, 3))
        answers = started.ask_together((asked, words(12)), (asked, words(12)))
        assert [answer.sources for answer in answers] == [["new"] * 3, ["ram"] * 3]


def test_prompts_without_passages_share_nothing(served: Running) -> None:
    asked = Prompt(PREFIX, (), (1, 60, 61))
    answers = served.ask_together((asked, words(9, 1)), (asked, words(9, 2)))
    assert [answer.cached for answer in answers] == [0, len(PREFIX)]


# --- many at once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mamba"])
def test_answers_that_are_written_together_are_those_written_alone(
    models: Callable[[str], Model], data: Path, samplers: Samplers, name: str
) -> None:
    asked = [bare(number, 10 + 9 * number) for number in range(6)]
    with running(models(name), data) as started:
        for number, prompt in enumerate(asked):
            started.ask(prompt, words(12, number))
        batches = Batches(started.engine)
        answers = started.ask_together(*((prompt, words(12, 10 + n)) for n, prompt in enumerate(asked)))
    assert [len(answer.text) for answer in answers] == [12] * 6
    assert all(samplers.alike(number, 10 + number) for number in range(6))
    assert not samplers.alike(0, 11)
    assert max(len(runs) for runs in batches.done) == 4, "as many as there are slots"


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_cancelling_what_is_over_does_no_harm(
    models: Callable[[str], Model], data: Path, samplers: Samplers, name: str
) -> None:
    # Shows a fault: the abort flag stayed on, and a recurrent model cannot begin a stopped batch anew.
    with running(models(name), data) as started:
        for seed in range(4):
            generation = started.engine.submit(toy_prompt((1, 2), question=seed), words(6, seed))
            assert answered(generation).last.reason == "length"
            started.settle()
            generation.cancel()
        assert started.ask(toy_prompt((1, 2), question=0), words(6, 9)).last.usage.completion_tokens == 6
        assert samplers.alike(0, 9)


def test_no_batch_is_stopped_for_a_request_that_is_over(served: Running) -> None:
    over = served.engine.submit(toy_prompt((1,)), words(2))
    answered(over)
    served.settle()
    batches = Batches(served.engine)
    tried: list[Sequence[Run]] = []
    batches.before = tried.append
    over.cancel()
    served.ask(toy_prompt((2,)), words(2))
    assert [tuple(runs) for runs in tried] == batches.done


def test_answers_grow_in_every_step_while_another_prompt_is_read(served: Running) -> None:
    batches, long = Batches(served.engine), bare(9, 400)
    served.ask_together((toy_prompt((1,)), words(99)), (toy_prompt((2,)), words(99)), (long, words(2)))
    reading = [runs for runs in batches.done if any(run.sequence == 2 and run.position < 400 for run in runs)]
    assert len(reading) == 25
    for runs in reading:
        assert sorted(len(run.tokens) for run in runs if run.sequence < 2) == [1, 1]
    for sequence in (0, 1):
        written = [run.position for runs in reading for run in runs if run.sequence == sequence]
        assert written == list(range(written[0], written[0] + 25))


def test_a_freed_place_is_taken_while_the_others_are_written(toy: Model, data: Path) -> None:
    with running(toy, data, {"engine.slots": 2}) as started:
        batches = Batches(started.engine)
        long, *short = started.ask_together((bare(1, 9), words(90)), *((bare(n, 9), words(8)) for n in range(2, 10)))
        assert len(long.text) == 90
        assert [len(answer.text) for answer in short] == [8] * 8
        assert len(batches.done) < 110, "one after the other takes more than 150"


def started_in_order(generations: Sequence[Generation], answers: Sequence[Answered]) -> list[int]:
    """The places of requests in the order in which they were begun."""
    begun = [generation.submitted + answer.last.queued for generation, answer in zip(generations, answers, strict=True)]
    return sorted(range(len(begun)), key=begun.__getitem__)


def test_equals_are_served_in_the_order_of_their_arrival(toy: Model, data: Path) -> None:
    with running(toy, data, {"engine.slots": 2}) as started:
        generations = started.submit_together(*((bare(1, 9), words(3)) for _ in range(9)))
        answers = [answered(generation) for generation in generations]
        assert started_in_order(generations, answers) == list(range(9))


def test_those_who_share_passages_go_first_but_not_for_ever(toy: Model, data: Path) -> None:
    with running(toy, data, {"engine.slots": 2}) as started:
        asked = [(toy_prompt((1, 2)), words(200)), (toy_prompt((3,)), words(1))]
        asked += [(toy_prompt((1, 2), question=number), words(1)) for number in range(2, 13)]
        generations = started.submit_together(*asked)
        answers = [answered(generation) for generation in generations]
        order = started_in_order(generations, answers)
        assert order == [0, *range(2, 2 + OVERTAKEN), 1, *range(2 + OVERTAKEN, 13)]
        started.settle()


def test_many_threads_get_their_own_answers(toy: Model, data: Path, samplers: Samplers) -> None:
    asked = [toy_prompt((1 + number % 3, 4), question=number) for number in range(24)]
    lasts: dict[int, Finished] = {}
    with running(toy, data) as started:
        for number in range(3):
            started.ask(asked[number])

        def ask(number: int) -> None:
            lasts[number] = answered(started.engine.submit(asked[number], words(9, 1 + number))).last

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        started.settle()
        assert {number: last.usage.completion_tokens for number, last in lasts.items()} == dict.fromkeys(range(24), 9)
        for number in range(24):
            started.ask(asked[number], words(9, 100 + number))
            assert samplers.alike(1 + number, 100 + number)


# --- the same question at the same time ------------------------------------------------------------------------------


def test_callers_who_ask_the_same_get_one_answer(served: Running, samplers: Samplers) -> None:
    asked, before = toy_prompt((1, 2)), served.engine.status()
    first, second, other = served.submit_together((asked, words(20)), (asked, words(20)), (asked, words(19)))
    one, two, three = (answered(generation) for generation in (first, second, other))
    served.settle()
    assert one.text == two.text
    assert one.text.startswith(three.text)
    after = served.engine.status()
    assert (after.joined - before.joined, after.served - before.served) == (1, 2)
    assert two.cached == len(asked)
    assert two.sources == ["live", "live"]
    assert one.cached < len(asked)


def test_a_late_caller_hears_what_has_been_said_before(served: Running) -> None:
    asked = toy_prompt((3, 1))
    early = served.engine.submit(asked, words(30))
    events = until_text(early)
    first = next(events).text
    late = served.engine.submit(asked, words(30))
    assert served.engine.status().active == 1
    heard = [event for event in late if isinstance(event, Text)]
    assert len(heard) == 30
    rest = "".join(event.text for event in events if isinstance(event, Text))
    assert "".join(event.text for event in heard) == first + rest
    served.settle()


def until_text(generation: Generation) -> Iterator[Any]:
    """The events from the first text on."""
    return dropwhile(lambda event: not isinstance(event, Text), iter(generation))


@pytest.mark.parametrize("gone", [0, 1])
def test_one_of_two_who_ask_the_same_may_go_and_the_other_gets_all_of_it(served: Running, gone: int) -> None:
    asked, batches = toy_prompt((2, 3)), Batches(served.engine)
    generations: list[Generation] = []
    count = itertools.count()

    def leave(runs: Sequence[Run]) -> None:
        if next(count) == 6:
            generations[gone].cancel()

    batches.before = leave
    served.submit_together((asked, words(25)), (asked, words(25)), then=generations.extend)
    left, stayed = answered(generations[gone]), answered(generations[1 - gone])
    assert left.last.reason == "cancelled"
    assert stayed.last.reason == "length"
    assert len(stayed.text) == 25
    assert stayed.text.startswith(left.text)
    assert len(left.text) < 25
    assert generations[gone].events.empty()
    served.settle()


def test_when_both_of_two_who_ask_the_same_go_the_answer_ends(served: Running) -> None:
    asked, batches = toy_prompt((2, 4)), Batches(served.engine)
    generations: list[Generation] = []
    count = itertools.count()

    def leave(runs: Sequence[Run]) -> None:
        if (number := next(count)) in (5, 7):
            generations[number == 7].cancel()

    batches.before = leave
    served.submit_together((asked, words(200)), (asked, words(200)), then=generations.extend)
    assert [answered(generation).last.reason for generation in generations] == ["cancelled"] * 2
    assert next(count) < 20
    served.settle()


def test_a_failed_answer_is_told_to_all_who_asked_for_it_each_with_an_error_of_his_own(served: Running) -> None:
    asked, batches = toy_prompt((4, 2)), Batches(served.engine)

    def fail(runs: Sequence[Run]) -> None:
        raise EngineError("out of order", remedy="mend it")

    generations = served.submit_together(
        (asked, words(9)), (asked, words(9)), then=lambda _: setattr(batches, "before", fail)
    )
    errors = []
    for generation in generations:
        with pytest.raises(EngineError, match="out of order — mend it") as caught:
            answered(generation)
        errors.append(caught.value)
    assert errors[0] is not errors[1]
    batches.before = lambda runs: None
    served.settle()


@pytest.mark.parametrize(
    ("sampling", "settings"),
    [
        pytest.param(Sampling(max_tokens=9, temperature=0.5), {}, id="by chance"),
        pytest.param(words(9), {"engine.share": False}, id="sharing is off"),
    ],
)
def test_what_may_differ_is_answered_for_each(
    toy: Model, data: Path, sampling: Sampling, settings: dict[str, Any]
) -> None:
    with running(toy, data, {"engine.slots": 2, **settings}) as started:
        started.ask_together((toy_prompt((1, 2)), sampling), (toy_prompt((1, 2)), sampling))
        status = started.engine.status()
        assert (status.joined, status.served) == (0, 2)


def test_a_caller_with_a_deadline_of_his_own_leaves_alone(served: Running) -> None:
    asked, batches = toy_prompt((1, 3)), Batches(served.engine)
    generations: list[Generation] = []
    count = itertools.count()

    def too_late(runs: Sequence[Run]) -> None:
        if next(count) == 6:
            expire(generations[0])

    batches.before = too_late
    served.submit_together((asked, words(25)), (asked, words(25)), then=generations.extend)
    assert [answered(generation).last.reason for generation in generations] == ["timeout", "length"]
    served.settle()


# --- who waits -------------------------------------------------------------------------------------------------------


def test_a_full_queue_turns_away_and_loses_nobody(toy: Model, data: Path) -> None:
    with running(toy, data, {"engine.slots": 1, "engine.queue": 2}) as started:
        begun, gate = threading.Event(), threading.Event()
        started.engine.when_idle(lambda _: (begun.set(), gate.wait()))
        begun.wait()
        waiting = [started.engine.submit(toy_prompt((number,)), SAMPLING) for number in (1, 2, 3)]
        for _ in range(2):
            with pytest.raises(Busy):
                started.engine.submit(toy_prompt((1, 2)), SAMPLING)
        assert started.engine.status().waiting == 3, "one will be served, two may wait"
        gate.set()
        assert [answered(generation).last.reason for generation in waiting] == ["length"] * 3
        started.settle()
        assert not started.cache._wanted, "who was turned away expects nothing"
        assert started.ask(toy_prompt((2, 1))).sources == ["state", "ram"]


def cancel(generation: Generation) -> None:
    generation.cancel()


def expire(generation: Generation) -> None:
    generation.deadline = 0.0


ENDINGS = [pytest.param(cancel, "cancelled", id="cancelled"), pytest.param(expire, "timeout", id="too late")]


@pytest.mark.parametrize(("end", "reason"), ENDINGS)
def test_who_gives_up_waiting_need_not_wait_for_the_prompt_of_another(
    toy: Model, data: Path, end: Callable[[Generation], None], reason: str
) -> None:
    # Shows a fault: those who wait were looked at when the prompt that was being read was through.
    with running(toy, data, {"engine.slots": 1}) as started:
        batches, generations, told = Batches(started.engine), list[Generation](), list[bool]()

        def give_up(runs: Sequence[Run]) -> None:
            told.append(not generations[1].events.empty())
            if len(told) == 3:
                end(generations[1])

        batches.before = give_up
        both = (bare(9, 400), words(2)), (toy_prompt((1, 2)), words(2))
        long, waits = started.submit_together(*both, then=generations.extend)
        assert answered(long).last.reason == "length"
        assert told == [False] * 3 + [True] * (len(told) - 3)
        assert len(told) > 4
        last = answered(waits).last
        assert (last.reason, last.usage.completion_tokens, last.passages) == (reason, 0, ())
        batches.before = lambda runs: None
        started.settle()
        assert not started.cache._wanted


@pytest.mark.parametrize(("end", "reason"), ENDINGS)
@pytest.mark.parametrize("batch", [1, 2, 5, 9])
def test_a_request_ends_within_a_step_whatever_is_done_with_it(
    served: Running, end: Callable[[Generation], None], reason: str, batch: int
) -> None:
    """The first batches read the prefix and passages apart, then the prompt, then the answer is written."""
    batches, generations, asked = Batches(served.engine), list[Generation](), toy_prompt((1, 2, 3), tokens=50)

    def give_up(runs: Sequence[Run]) -> None:
        if len(batches.done) == batch - 1:
            end(generations[0])

    batches.before = give_up
    [generation] = served.submit_together((asked, words(30)), then=generations.extend)
    answer = answered(generation)
    served.settle()
    assert answer.last.reason == reason
    assert len(answer.text) == answer.last.usage.completion_tokens < 30
    assert len(batches.done) <= batch
    batches.before = lambda runs: None
    assert len(served.ask(bare(8, 9), words(5)).text) == 5
    assert served.ask(asked).last.reason == "length"


def test_an_answered_request_is_forgotten(served: Running) -> None:
    generation = served.engine.submit(toy_prompt((1, 2)), SAMPLING)
    answered(generation)
    served.settle()
    known = weakref.ref(generation)
    del generation
    gc.collect()
    assert known() is None


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_prompt_that_fails_ends_alone(served: Running, samplers: Samplers) -> None:
    batches = Batches(served.engine)

    def fail(runs: Sequence[Run]) -> None:
        if any(run.sequence == 1 and run.position > 99 for run in runs):
            raise EngineError("it does not like this prompt")

    batches.before = fail
    good, bad = served.submit_together((bare(1, 9), words(40, 1)), (bare(2, 300), words(9)))
    assert len(answered(good).text) == 40
    with pytest.raises(EngineError, match="does not like"):
        answered(bad)
    batches.before = lambda runs: None
    served.settle()
    served.ask(bare(1, 9), words(40, 2))
    assert samplers.alike(1, 2)


def test_a_token_that_is_none_ends_the_request_that_has_it(served: Running) -> None:
    good, bad = served.submit_together((bare(1, 9), words(40)), (Prompt((), (), (1, 2, 5000)), words(9)))
    assert len(answered(good).text) == 40
    with pytest.raises(EngineError):
        answered(bad)
    served.settle()


def test_each_of_some_failed_requests_has_an_error_of_its_own(served: Running) -> None:
    batches = Batches(served.engine)

    def fail(runs: Sequence[Run]) -> None:
        if {len(run.tokens) for run in runs} == {1}:
            raise EngineError("out of order")

    batches.before = fail
    errors = []
    for generation in served.submit_together((bare(1, 9), words(40)), (bare(2, 9), words(40))):
        with pytest.raises(EngineError, match="out of order") as caught:
            answered(generation)
        errors.append(caught.value)
    assert errors[0] is not errors[1], "one that two threads raise would tell of both in its traceback"
    served.settle()


def test_after_a_first_fault_of_our_own_the_engine_goes_on_with_a_new_context(toy: Model, data: Path) -> None:
    with running(toy, data, {"engine.slots": 2}) as started:
        before = started.ask(bare(3, 9), words(40, 1)).text
        batches = Batches(started.engine)
        batches.before = failing_once(batches)
        active = 2
        generations = started.submit_together(*((bare(number, 9), words(40, 1)) for number in (1, 2, 3)))
        for generation in generations[:active]:
            with pytest.raises(EngineError, match="a bug"):
                answered(generation)
        assert answered(generations[active]).text == before, "who waits notices nothing"
        started.settle()
        status = started.engine.status()
        assert (status.restarts, status.failure, status.active, status.cells_used) == (1, "", 0, 0)


def failing_once(batches: Batches) -> Callable[[Sequence[Run]], None]:
    """Fails when two answers are being written, then never again."""

    def fail(runs: Sequence[Run]) -> None:
        if [len(run.tokens) for run in runs] == [1, 1]:
            batches.before = lambda runs: None
            raise ZeroDivisionError("a bug")

    return fail


@pytest.mark.timeout(30)
def test_a_second_fault_of_our_own_is_told_to_everybody_and_is_the_end(toy: Model, data: Path) -> None:
    # Shows a fault: the engine's thread died of it, and all who waited waited for ever.
    with running(toy, data, {"engine.slots": 2}) as started:
        batches = Batches(started.engine)
        begun, gate = threading.Event(), threading.Event()

        def fail(runs: Sequence[Run]) -> None:
            if {len(run.tokens) for run in runs} == {1}:
                begun.set()
                gate.wait()
                raise ZeroDivisionError("a bug")

        batches.before = fail
        generations = started.submit_together(*((bare(number, 9), words(40)) for number in range(5)))
        begun.wait()
        chore = started.engine.when_idle(lambda desk: None)
        gate.set()
        for generation in generations:
            with pytest.raises(EngineError, match="a bug"):
                answered(generation)
            generation.cancel()
            assert generation.events.empty(), "nothing comes behind the last event"
        with pytest.raises((CancelledError, EngineError)):
            chore.result()
        assert "a bug" in started.engine.status().failure
        for refused in (lambda: started.engine.submit(bare(1, 9), SAMPLING), lambda: started.engine.when_idle(ends)):
            with pytest.raises(EngineError, match="a bug"):
                refused()
        assert not started.engine.busy


def test_a_context_that_cannot_be_made_anew_is_the_end(toy: Model, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(context: Context) -> None:
        context.close()
        raise ModelError("no context could be made")

    monkeypatch.setattr(Context, "renew", no_memory)
    with running(toy, data, {"engine.slots": 2}) as started:
        batches = Batches(started.engine)
        batches.before = failing_once(batches)
        for generation in started.submit_together(*((bare(number, 9), words(40)) for number in range(3))):
            with pytest.raises(EngineError, match=r"a bug|no context"):
                answered(generation)
        with pytest.raises(EngineError, match="no context"):
            started.engine.submit(bare(1, 9), SAMPLING)
        assert started.engine.status().restarts == 0


def test_an_engine_that_works_says_how_long_its_step_takes(toy: Model, data: Path) -> None:
    with running(toy, data) as started:
        batches = Batches(started.engine)
        begun, gate = threading.Event(), threading.Event()

        def wait(runs: Sequence[Run]) -> None:
            begun.set()
            gate.wait()

        batches.before = wait
        generation = started.engine.submit(bare(1, 9), words(2))
        begun.wait()
        first, second = (started.engine.status().silent for _ in range(2))
        gate.set()
        answered(generation)
        started.settle()
        assert 0 < first < second
        assert started.engine.status().silent == 0


# --- anything at any time --------------------------------------------------------------------------------------------

SMALL = {"engine.slots": 3, "engine.queue": 4}


class Callers:
    """Callers who do anything at any time: before a batch one of them does something, on the engine's thread."""

    def __init__(self, served: Running, samplers: Samplers, seed: int, *, hints: bool = True) -> None:
        self.chance = random.Random(seed)
        self.left = 0  # things that are still to be done
        self.generations: list[Generation] = []
        self.chores: list[Future[Any]] = []
        self.turned_away = 0
        self.broken = 0  # requests that were made to fail, at most
        self.faults: list[str] = []
        self.reasons: set[str] = set()
        self.sources: set[str] = set()
        self._served = served
        self._engine = served.engine
        self._samplers = samplers
        self._batches = Batches(served.engine)
        self._batches.before = self._between
        self._unwanted: set[int] = set()  # by the last batch
        self._last: Sequence[Run] = ()
        self._fetch, served.cache.fetch = served.cache.fetch, self._fetched  # type: ignore[method-assign]
        self._unreadable = 0
        self._apart = 0  # batches that are the parts of one that failed
        hint = [self._hint] if hints else []
        self._acts = [*[self.ask] * 8, *[self._cancel] * 2, self._expire, self._chore, self._chore, *hint]
        self._acts += [self._fail, self._lose, self._stumble, *[self._wait] * 8]

    # What they do. All of it is for any thread, so also for the engine's own.

    def ask(self) -> None:
        chunks = self.chance.sample(range(1, 5), self.chance.randint(0, 4))
        prompt = toy_prompt(chunks, question=self.chance.randint(1, 3), tokens=self.chance.choice((20, 20, 90)))
        try:
            self.generations.append(self._engine.submit(prompt, words(self.chance.randint(1, 14)), timeout=9e9))
        except Busy:
            self.turned_away += 1
        except EngineError:
            if not self._engine._closed:
                raise

    def _cancel(self) -> None:
        if self.generations:
            self.chance.choice(self.generations[-6:]).cancel()

    def _expire(self) -> None:
        if self.generations:
            expire(self.chance.choice(self.generations[-6:]))

    def _chore(self) -> None:
        prompt, chunk = toy_prompt(self.chance.sample(range(1, 5), 2)), self.chance.randint(1, 6)
        work: list[Callable[[Desk], Any]] = [
            lambda desk: look(desk, prompt),
            lambda desk: desk.assembler.compute(PREFIX, toy_passage(chunk), chunk, desk.decode),
            lambda desk: 1 // 0,
        ]
        try:
            self.chores.append(self._engine.when_idle(self.chance.choice(work)))
        except EngineError:
            if not self._engine._closed:
                raise

    def _hint(self) -> None:
        self._batches.context.abort(True)

    def _fail(self) -> None:
        self.broken += 1 + len(self._engine._active)
        self._apart = len(self._last)
        raise EngineError("made to fail")

    def _lose(self) -> None:
        self.broken += 1
        self._unreadable = 1

    def _stumble(self) -> None:
        self.broken += 1
        self._samplers.stumbling = 1

    def _fetched(self, key: str) -> Any:
        if self._unreadable:
            self._unreadable = 0
            raise RuntimeError("made to fail")
        return self._fetch(key)

    def _wait(self) -> None:
        pass

    # What must be true before every batch.

    def _between(self, runs: Sequence[Run]) -> None:
        if runs is not self._last:  # not one that was stopped and is run again
            self._look(runs)
            self._apart = max(0, self._apart - 1)
        self._last = runs
        try:
            if self.left:
                self.left -= 1
                self.chance.choice(self._acts)()
        finally:
            self._unwanted = {generation.job.id for generation in self.generations if generation.unwanted}

    def _look(self, runs: Sequence[Run]) -> None:
        active = self._engine._active
        decoded = {run.sequence for run in runs}
        late = {n for n, generation in active.items() if generation.job.id in self._unwanted}
        writers = {writer.desk.sequence for writer in self._engine._steps.writers.values()}  # type: ignore[attr-defined]
        if late & decoded and not self._apart:
            self.faults.append(f"sequences {late} are decoded although nobody wants them")
        if writers - decoded and not self._apart:
            self.faults.append(f"the answers of {writers - decoded} do not get on")
        for number, generation in active.items():
            if self._batches.context.end(number) > generation.job.cells:
                self.faults.append(f"sequence {number} takes more than {generation.job.cells} cells")
        if sum(generation.job.cells for generation in active.values()) > self._engine.capacity.cells:
            self.faults.append("more has been admitted than fits")

    # What must be true when nobody wants anything any more.

    def go_on(self, acts: int) -> None:
        """Let so many things be done, and wait until nothing is to be done."""
        self.left = acts
        while self.left:
            self._served.on_thread(lambda _: self.ask())
        self._served.on_thread(self._at_rest)
        self.check()

    def _at_rest(self, desk: Desk) -> None:
        status = self._engine.status()
        assert set(ends(desk)) == {0}, "cells are left"
        assert (status.active, status.waiting, status.cells_used) == (0, 0, 0)
        assert self._engine._steps.writers == self._engine.assembler._live == {}
        assert self._engine.assembler._computed == []

    def check(self) -> None:
        """Nothing is left of what has been served, and everybody was told once how it ended."""
        cache = self._served.cache
        assert self.faults == []
        for read in list(cache._reads.values()):
            read.result()
        cache.check()
        assert (cache._wanted, cache._reads, cache._leaving) == ({}, {}, {})
        assert self._samplers.open == 0
        assert all(chore.done() for chore in self.chores)
        for generation in self.generations:
            self._check_events(generation)
        self.generations.clear()
        self.chores.clear()

    def _check_events(self, generation: Generation) -> None:
        *before, last = drained(generation)
        kinds = [type(event) for event in before]
        assert kinds == sorted(kinds, key=[Reading, Text].index), "an event after the last one, or out of order"
        if isinstance(last, Finished):
            self._check_answer(generation, said(before), last)
        else:
            assert isinstance(last, EngineError)
            assert "made to fail" in str(last)
            self.broken -= 1
            self.reasons.add("error")
            assert self.broken >= 0, "more have failed than were made to"

    def _check_answer(self, generation: Generation, text: str, last: Finished) -> None:
        may = {"length": True, "cancelled": generation.cancelled, "timeout": generation.deadline == 0.0}
        assert may[last.reason]
        assert len(text) == last.usage.completion_tokens
        assert (len(text) == generation.sampling.max_tokens) >= (last.reason == "length")
        self.reasons.add(last.reason)
        self.sources |= {plan.source for plan in last.passages}


OPAQUE = {"none", "state"}


@pytest.mark.parametrize(
    ("name", "flags", "sources"),
    [
        pytest.param("llama", {}, {"new", "ram", "live", "state"}, id="as usual"),
        pytest.param("llama", {"kv.ram_mb": 0}, {"new", "ssd", "live"}, id="nothing in RAM"),
        pytest.param("llama", {"kv.link_tokens": -1, "engine.share": False}, {"new", "none", "state"}, id="unshared"),
        pytest.param("gpt2", {}, OPAQUE, id="learned positions"),
        pytest.param("mamba", {}, OPAQUE, id="recurrent"),
    ],
)
def test_nothing_is_left_over_whatever_callers_do(
    models: Callable[[str], Model],
    data: Path,
    samplers: Samplers,
    name: str,
    flags: dict[str, Any],
    sources: set[str],
) -> None:
    with running(models(name), data, SMALL | flags) as started:
        engine = started.engine
        engine.capacity = replace(engine.capacity, cells=engine.n_ctx + 90)  # of slots and cells, either may be short
        callers = Callers(started, samplers, seed=1, hints=name != "mamba")
        for _ in range(4):
            callers.go_on(acts=120)
        assert callers.reasons == {"length", "cancelled", "timeout", "error"}
        assert callers.turned_away > 0
        assert callers.sources >= sources
        if name == "llama":
            started.on_thread(fill_all_cells)


def fill_all_cells(desk: Desk) -> None:
    """Prove that every cell is free, by taking them all."""
    cells = desk.context.n_ctx
    desk.read([1] * cells, 0)
    with pytest.raises(EngineError, match="no free KV cells"):
        desk.read([1], cells)
    desk.clear()


@pytest.mark.parametrize("seed", range(6))
def test_closing_at_any_time_ends_everything_once(toy: Model, data: Path, samplers: Samplers, seed: int) -> None:
    with running(toy, data, SMALL) as started:
        callers, closing = Callers(started, samplers, seed), threading.Event()
        after, done = random.Random(seed).randint(1, 60), list[int]()

        def until_closed(desk: Desk) -> None:
            """Batches go on when nobody asks."""
            while True:
                done.append(1)
                if len(done) > after:
                    closing.set()
                with contextlib.suppress(EngineError):  # it is made to fail too
                    desk.read([1, 2, 3], 0)
                desk.clear()

        callers.left = 10_000
        callers.chores.append(started.engine.when_idle(until_closed))
        closing.wait()
        started.engine.close()
        started.engine.close()
        callers.check()
        with pytest.raises(EngineError, match="closed"):
            started.engine.submit(toy_prompt((1,)), SAMPLING)
