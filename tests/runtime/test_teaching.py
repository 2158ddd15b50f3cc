"""The teacher's answers are the ones that serving would give, with all that they might have been; requests go first.

With a tiny model and a builder of made-up prompts; and once with the real small model.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from edge_rag.config import Settings
from edge_rag.errors import Cancelled, EngineError, InputError
from edge_rag.learning.studying import Request, requests
from edge_rag.native.llama import Model, Run
from edge_rag.policy.study import answerable
from edge_rag.records import Passage, Sampling, Turn
from edge_rag.runtime import teaching
from edge_rag.runtime.generations import Generation, Scope
from edge_rag.runtime.prompting import Prompt, PromptBuilder, Tokens
from edge_rag.runtime.requests import Desk
from edge_rag.runtime.teaching import STUDY, TOKENS, Asked, Teacher
from edge_rag.store.items import TOP, Taught
from tests.native.tiny_loras import write_tiny_lora
from tests.native.tiny_models import write_tiny_model
from tests.runtime.serving import (
    PREFIX,
    Batches,
    Running,
    Toy,
    add_files,
    answered,
    running,
    small_library,
    toy_passage,
    toy_prompt,
)

GREEDY = Sampling(max_tokens=TOKENS)
DRAWN = Sampling(max_tokens=6, temperature=2.0, seed=40)
INSTRUCTIONS = "Be brief."
LONG = "1" * 600
LIMIT = 60.0  # seconds after which a thread is given up
ASKED: tuple[Asked, ...] = tuple(
    (str(number), chunks) for number, chunks in enumerate([(1, 2), (3,), (2, 1, 4), (5, 6), (), (7, 8, 9), (1, 2)], 1)
)


class Ending(Toy):
    """A toy model that ends its answers with some tokens."""

    ends: frozenset[int] = frozenset()

    def ends_generation(self, token: int) -> bool:
        return token in self.ends


class Builder:
    """Builds the prompts of tiny models: question 7 about chunk 3 is `toy_prompt([3], question=7)`."""

    prefix = PREFIX

    def __init__(self, tokens: int = 20) -> None:
        self.tokens = tokens
        self.told: list[str] = []

    def passage(self, passage: Passage) -> Tokens:
        return toy_passage(passage.chunk_id, self.tokens)

    def tail(self, turns: Sequence[Turn], question: str, instructions: str = "") -> Tokens:
        assert not turns
        self.told.append(instructions)
        return (int(question), 60, 61) if question != LONG else (1,) * len(question)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ending]:
    with Ending(write_tiny_model("llama", tmp_path_factory.mktemp("llama")), gpu_layers=0) as model:
        yield model


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture
def served(toy: Ending, data: Path, adapters: Path) -> Iterator[Running]:
    with running(toy, data, adapters=adapters) as started:
        yield started
    toy.ends = frozenset()


def teacher(served: Running, builder: Builder | None = None) -> Teacher:
    return Teacher(served.database, served.engine, builder or Builder(), instructions=INSTRUCTIONS)  # type: ignore[arg-type]


def said(served: Running, asked: Sequence[Asked], sampling: Sampling = GREEDY, adapter: str = "") -> list[str]:
    """What serving says to each."""
    return [served.ask(as_prompt(each, adapter), sampling).text for each in asked]


def as_prompt(asked: Asked, adapter: str = "") -> Prompt:
    plain = toy_prompt(asked[1], question=int(asked[0]))
    return Prompt(plain.prefix, plain.passages, plain.tail, plain.chunks, adapter)


def numbers(text: str) -> list[int]:
    """The tokens of a toy model's text."""
    return [ord(letter) - ord("0") for letter in text]


def end_some(served: Running, asked: Sequence[Asked]) -> dict[int, list[int]]:
    """Let a token end as many answers as one can, but not all; the tokens of those answers then, by their places."""
    model = served.engine.model
    assert isinstance(model, Ending)
    texts = [numbers(text) for text in said(served, asked)]
    uses = Counter(token for tokens in texts for token in set(tokens))
    end = max((token for token in uses if uses[token] < len(texts)), key=lambda token: uses[token])
    model.ends = frozenset({end})
    return {place: tokens[: tokens.index(end) + 1] for place, tokens in enumerate(texts) if end in tokens}


def same(one: Sequence[Taught | None], other: Sequence[Taught | None]) -> bool:
    return all(
        (a is b is None)
        or (a is not None and b is not None and a.answer == b.answer and np.array_equal(a.top_ids, b.top_ids))
        for a, b in zip(one, other, strict=True)
    )


# --- answers ---------------------------------------------------------------------------------------------------------


def test_answers_written_together_are_those_that_serving_gives(served: Running) -> None:
    builder = Builder()
    assert teacher(served, builder).answers(ASKED) == said(served, ASKED)
    assert builder.told == [INSTRUCTIONS] * len(ASKED)
    assert teacher(served).answer(*ASKED[2]) == said(served, ASKED)[2]
    served.settle()


def test_as_many_are_written_at_once_as_there_are_sequences_and_cells(served: Running) -> None:
    batches = Batches(served.engine)
    teacher(served).answers(ASKED)
    assert max(len(runs) for runs in batches.done) == served.engine.capacity.slots < len(ASKED)
    batches.done.clear()
    served.engine.capacity = type(served.engine.capacity)(n_ctx=512, cells=250, slots=4, queue=64)
    teacher(served).answers(ASKED)
    assert max(len(runs) for runs in batches.done) == 2


def test_an_answer_under_an_adapter_is_what_serving_says_under_it(served: Running, adapters: Path) -> None:
    name = write_tiny_lora(adapters).stem
    plain, worn = teacher(served).answers(ASKED), teacher(served).answers(ASKED, name)
    assert worn == said(served, ASKED, adapter=name)
    assert worn != plain
    assert served.engine.pager is not None
    assert not served.engine.pager._held


def test_without_a_pager_there_are_no_adapters(toy: Model, data: Path) -> None:
    with running(toy, data) as plain, pytest.raises(InputError, match="switched off"):
        teacher(plain).answer("1", (1,), "a" * 64)


# --- teaching --------------------------------------------------------------------------------------------------------


def test_what_is_taught_is_the_answer_with_the_token_that_ends_it(served: Running) -> None:
    ended = end_some(served, ASKED)
    expected = {place: tokens for place, tokens in ended.items() if answerable(served.engine.model.text(tokens[:-1]))}
    assert len(ended) > len(expected) >= 2  # of the others nothing is left but signs
    builder = Builder()
    found = teacher(served, builder).teach(ASKED)
    assert builder.told == [INSTRUCTIONS] * len(ASKED)
    assert {place for place, each in enumerate(found) if each} == expected.keys()
    for place, tokens in expected.items():
        taught = found[place]
        assert taught is not None
        assert taught.tokens.tolist() == tokens
        assert numbers(taught.answer) == tokens[:-1]


def test_the_distribution_of_each_token_is_that_of_the_whole_vocabulary(served: Running) -> None:
    place, tokens = max(end_some(served, ASKED).items(), key=lambda pair: len(pair[1]))
    [taught] = teacher(served).teach([ASKED[place]])
    assert taught is not None
    prompt = as_prompt(ASKED[place])

    def read(desk: Desk) -> list[np.ndarray]:
        start = desk.assemble(prompt).position
        found = [desk.context.logits(desk.read(prompt.tokens[start:], start).place)]
        for number, token in enumerate(tokens[:-1]):
            found.append(desk.context.logits(desk.read([token], len(prompt) + number).place))
        return found

    for number, logits in enumerate(served.on_thread(read)):
        logprobs = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
        order = np.argsort(-logprobs, kind="stable")[:TOP]
        assert taught.top_ids[number, 0] == taught.tokens[number] == order[0]
        np.testing.assert_allclose(taught.top_logprobs[number], logprobs[order], atol=0.02)
        np.testing.assert_allclose(logprobs[taught.top_ids[number]], logprobs[order], atol=0.02)
    assert (taught.tokens.dtype, taught.top_ids.dtype, taught.top_logprobs.dtype) == ("int32", "int32", "float16")
    assert taught.top_ids.shape == taught.top_logprobs.shape == (len(tokens), TOP)


def test_answers_that_do_not_end_are_not_taught(served: Running) -> None:
    assert teacher(served).teach(ASKED) == [None] * len(ASKED)


def test_an_answer_that_is_none_is_not_taught(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = end_some(served, ASKED)
    refusal = "The passages do not contain the answer."
    monkeypatch.setattr(served.engine.model, "text", lambda tokens: refusal if list(tokens) else "")
    assert len(expected) >= 2
    assert teacher(served).teach(ASKED) == [None] * len(ASKED)


def test_passages_that_are_gone_or_do_not_fit_are_left_out_and_nothing_is_asked_without_any(served: Running) -> None:
    asked: list[Asked] = [("1", (1, 99)), ("2", (99,)), (LONG, (1,)), (LONG, ()), ("3", ())]
    answers = teacher(served).answers(asked)
    assert answers == [*said(served, [("1", (1,))]), "", "", "", *said(served, [("3", ())])]
    assert teacher(served).teach(asked[1:4]) == [None] * 3
    large = teacher(served, Builder(tokens=200))
    assert large.answer("1", (1, 2, 3)) == large.answer("1", (1, 2)) != large.answer("1", (1,))
    huge = teacher(served, Builder(tokens=500))
    assert huge.answers([("1", (1,))]) == [""]


# --- writing ---------------------------------------------------------------------------------------------------------


def test_texts_are_drawn_with_a_seed_each_and_without_the_instructions(served: Running) -> None:
    builder = Builder()
    asked = [("1", (1, 2))] * 3
    texts = teacher(served, builder).write(asked, DRAWN)
    seeds = [Sampling(max_tokens=6, temperature=2.0, seed=seed) for seed in (40, 41, 42)]
    assert texts == [served.ask(toy_prompt([1, 2]), sampling).text for sampling in seeds]
    assert len(set(texts)) == 3
    assert builder.told == [""] * 3


def test_each_round_of_study_questions_has_seeds_of_its_own(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    made = teacher(served)
    told: list[tuple[list[Asked], Sampling, list[str]]] = []
    monkeypatch.setattr(made, "write", lambda *told_now: told.append(told_now) or ["?"])
    wanted = [(3, Request("Ask.", "1. Who")), (3, Request("Ask.", "1. Why"))]
    assert made.study(wanted, 0) == made.study(wanted, 2) == ["?"]
    assert [(asked, begun) for asked, _, begun in told] == [([("Ask.", (3,))] * 2, ["1. Who", "1. Why"])] * 2
    assert [sampling.seed for _, sampling, _ in told] == [0, 4]
    assert {(sampling.temperature, sampling.max_tokens) for _, sampling, _ in told} == {
        (STUDY.temperature, STUDY.max_tokens)
    }


# --- others go first -------------------------------------------------------------------------------------------------


def test_a_request_goes_first_and_finished_answers_are_not_written_again(served: Running) -> None:
    asked = ASKED[3:]
    expected = end_some(served, asked)
    assert 1 <= len(expected) < len(asked) == served.engine.capacity.slots
    alone = teacher(served).teach(asked)
    batches, urgent, unfinished = Batches(served.engine), list[Generation](), len(asked) - len(expected)

    def submit(runs: Sequence[Run]) -> None:
        if not urgent and [len(run.tokens) for run in runs] == [1] * unfinished and len(batches.done) > len(asked):
            urgent.append(served.engine.submit(toy_prompt([9], question=33), Sampling(max_tokens=3)))
            batches.done.clear()

    batches.before = submit
    assert same(teacher(served).teach(asked), alone)
    assert answered(urgent[0]).text
    sequences = {run.sequence for runs in batches.done for run in runs}
    assert sequences & set(range(served.engine.capacity.slots)) == set(range(unfinished))
    assert len(batches.of(0)) > TOKENS  # the rest is written anew, after the request
    served.settle()


def test_a_cancelled_caller_waits_no_longer_and_leaves_no_cells(served: Running) -> None:
    batches, scope = Batches(served.engine), Scope()
    batches.before = lambda runs: scope.cancel()
    with scope, pytest.raises(Cancelled):
        teacher(served).answers(ASKED)
    served.settle()


def test_closing_the_engine_ends_the_wait(served: Running) -> None:
    batches, begun, closing = Batches(served.engine), threading.Event(), threading.Event()
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
        waiting = pool.submit(teacher(served).answers, ASKED)
        assert begun.wait(LIMIT)
        served.engine.close()
        with pytest.raises(EngineError, match="closed"):
            waiting.result(LIMIT)


# --- with the real small model ---------------------------------------------------------------------------------------


def test_the_small_model_teaches_what_it_answers(
    tmp_path: Path, small_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {
        "hose.txt": "The hose of the Marlin unit is two metres long and must not be bent.",
        "pump.txt": "The pump of the Marlin unit must be oiled every 12 weeks.",
    }
    question = "How often must the pump of the Marlin unit be oiled?"
    monkeypatch.setattr(teaching, "STUDY", replace(STUDY, max_tokens=24))
    with small_library(tmp_path / "data", small_settings, answering__max_tokens=TOKENS) as rag:
        add_files(rag, tmp_path / "files", texts)
        answer = rag.ask(question)
        engine = rag._house.engine()
        made = Teacher(rag._database, engine, PromptBuilder(engine.model))
        chunks = [passage.chunk_id for passage in answer.passages]
        [taught] = made.teach([(question, chunks)])
        assert taught is not None
        assert made.answer(question, chunks) == taught.answer == answer.text.split(" [")[0]
        assert "12 weeks" in taught.answer
        assert engine.model.ends_generation(int(taught.tokens[-1]))
        texts = made.study([(chunks[0], request) for request in requests(0)[:2]], 0)
        assert [text.split()[:2] for text in texts] == [["1.", "What"], ["1.", "Who"]]
        assert all(text.count("?") >= 1 for text in texts)
