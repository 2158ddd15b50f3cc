"""The engine with the real small model: one thread serves all, and every request comes to an end."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_rag.config import Settings, load_settings
from edge_rag.errors import EngineError, InputError
from edge_rag.native.llama import Model, library
from edge_rag.records import Sampling, Step
from edge_rag.runtime.engine import Engine
from edge_rag.runtime.generations import EngineEvent, Finished, Generation, Reading, Text
from edge_rag.runtime.parts import CPU_BATCH, GPU_BATCH, batch_size, make_engine
from edge_rag.runtime.prompting import Prompt

SIZES = load_settings({"engine.n_ctx": 512, "engine.n_batch": 16}, environment={})
LONG = Sampling(max_tokens=400)


@pytest.fixture(scope="module")
def model(small_llm: Path) -> Iterator[Model]:
    with Model(small_llm) as loaded:
        yield loaded


def started(model: Model, sizes: Settings = SIZES) -> Engine:
    """An engine that keeps prefixes and nothing else."""
    return make_engine(model, sizes, threads=1)


@pytest.fixture(scope="module")
def engine(model: Model) -> Iterator[Engine]:
    with started(model) as running:
        yield running


def prompt(model: Model, question: str, *passages: str) -> Prompt:
    return Prompt(
        tuple(model.tokenize("<|im_start|>system\nYou count.<|im_end|>\n<|im_start|>user\n", special=True)),
        tuple(tuple(model.tokenize(passage)) for passage in passages),
        tuple(model.tokenize(f"{question}<|im_end|>\n<|im_start|>assistant\n", special=True)),
    )


def counting(model: Model) -> Prompt:
    """A prompt whose answer goes on for as long as it may."""
    return Prompt((), (), tuple(model.tokenize("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16,")))


def said(steps: list[EngineEvent]) -> str:
    return "".join(step.text for step in steps if isinstance(step, Text))


def run(engine: Engine, asked: Prompt, sampling: Sampling) -> tuple[list[EngineEvent], Finished]:
    steps = list(engine.submit(asked, sampling))
    assert isinstance(steps[-1], Finished)
    return steps, steps[-1]


def until_text(generation: Generation) -> Iterator[EngineEvent]:
    """Iterate up to the first text; the rest can be iterated afterwards."""
    steps = iter(generation)
    while not isinstance(next(steps), Text):
        pass
    return steps


def test_a_request_is_read_then_written_then_finished(engine: Engine, model: Model) -> None:
    asked = prompt(model, "What is two and two?", "Two and two is four. " * 3)
    steps, last = run(engine, asked, Sampling(max_tokens=8))
    kinds = [type(step) for step in steps]
    assert kinds == sorted(kinds, key=[Reading, Text, Finished].index)
    reading = [step for step in steps if isinstance(step, Reading)]
    assert [step.total for step in reading] == [len(asked)] * len(reading)
    assert [step.done for step in reading] == sorted({step.done for step in reading})
    assert reading[-1].done == len(asked)
    assert last.usage.prompt_tokens == len(asked)
    assert 1 <= last.usage.completion_tokens <= 8
    assert 0 <= last.queued <= last.first_token


def test_a_restored_prefix_gives_the_same_answer_as_a_computed_one(model: Model) -> None:
    with started(model) as engine:
        asked = prompt(model, "Which animals are there?", "In the yard there are a cat, a dog and a goose.")
        assert engine.assembler.prefix_bytes == 0
        computed, first = run(engine, asked, Sampling(max_tokens=12))
        restored, second = run(engine, asked, Sampling(max_tokens=12))
        assert said(restored) == said(computed) != ""
        assert first.usage.cached_tokens == 0
        assert second.usage.cached_tokens == len(asked.prefix) > 0
        assert engine.assembler.prefix_bytes > 0


def test_only_a_few_prefixes_are_kept(model: Model) -> None:
    with started(model) as engine:
        sizes = []
        for number in range(7):
            run(engine, Prompt((100 + number, 200), (), (300,)), Sampling(max_tokens=1))
            sizes.append(engine.assembler.prefix_bytes)
        assert sizes[3] == 4 * sizes[0] == sizes[-1]
        _, oldest = run(engine, Prompt((100, 200), (), (300,)), Sampling(max_tokens=1))
        _, newest = run(engine, Prompt((106, 200), (), (300,)), Sampling(max_tokens=1))
        assert (oldest.usage.cached_tokens, newest.usage.cached_tokens) == (0, 2)


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_an_answer_of_the_longest_length_ends_with_length(engine: Engine, model: Model, limit: int) -> None:
    steps, last = run(engine, counting(model), Sampling(max_tokens=limit))
    assert last.reason == "length"
    assert last.usage.completion_tokens == limit
    assert model.count_tokens(said(steps)) == limit


def test_a_stop_string_ends_the_answer_and_is_not_in_it(engine: Engine, model: Model) -> None:
    whole = said(run(engine, counting(model), Sampling(max_tokens=30))[0])
    assert "19" in whole
    steps, last = run(engine, counting(model), Sampling(max_tokens=30, stop=("never", "19,")))
    assert last.reason == "stop"
    assert said(steps) == whole[: whole.index("19,")]


def test_the_beginning_of_a_stop_string_is_given_out_when_the_rest_does_not_come(engine: Engine, model: Model) -> None:
    whole = said(run(engine, counting(model), Sampling(max_tokens=9))[0])
    steps, last = run(engine, counting(model), Sampling(max_tokens=9, stop=(whole[-3:] + "never",)))
    assert last.reason == "length"
    assert said(steps) == whole


def test_a_seed_decides_what_is_drawn(engine: Engine, model: Model) -> None:
    asked = prompt(model, "Tell me a story.")
    drawn = [
        said(run(engine, asked, Sampling(max_tokens=10, temperature=1.5, top_p=0.99, min_p=0.01, seed=seed))[0])
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_cancelled_request_ends_and_the_next_is_served(engine: Engine, model: Model) -> None:
    generation = engine.submit(counting(model), LONG)
    steps = until_text(generation)
    generation.cancel()
    last = list(steps)[-1]
    assert isinstance(last, Finished)
    assert last.reason == "cancelled"
    assert last.usage.completion_tokens < 400
    assert run(engine, counting(model), Sampling(max_tokens=3))[1].reason == "length"


def test_a_request_that_is_cancelled_while_it_waits_is_not_computed(engine: Engine, model: Model) -> None:
    running = engine.submit(counting(model), LONG)
    steps = until_text(running)
    waiting = engine.submit(prompt(model, "What is two and two?"), LONG)
    waiting.cancel()
    running.cancel()
    list(steps)
    [last] = list(waiting)
    assert isinstance(last, Finished)
    assert (last.reason, last.usage.completion_tokens) == ("cancelled", 0)


def test_cancelling_what_is_over_does_not_touch_the_next(engine: Engine, model: Model) -> None:
    over = engine.submit(counting(model), Sampling(max_tokens=1))
    list(over)
    generation = engine.submit(counting(model), Sampling(max_tokens=5))
    over.cancel()
    assert isinstance(last := list(generation)[-1], Finished)
    assert last.reason == "length"


def test_a_request_that_can_never_fit_is_refused_at_once(engine: Engine) -> None:
    too_long = Prompt((), (tuple(range(1000, 1000 + engine.n_ctx)),), (300,))
    with pytest.raises(InputError, match="n_ctx"):
        engine.submit(too_long, Sampling(max_tokens=1))
    assert run(engine, Prompt((), (), (300, 301)), Sampling(max_tokens=2))[1].usage.prompt_tokens == 2


@pytest.mark.parametrize("asked", [Prompt((), (), ()), Prompt((300, 301), ((302,),), ())])
def test_a_prompt_that_ends_with_nothing_to_be_read_is_refused(engine: Engine, asked: Prompt) -> None:
    # Shows a fault: the first token was chosen from what the batch before had left.
    with pytest.raises(InputError):
        engine.submit(asked, Sampling(max_tokens=1))


@pytest.mark.parametrize("limit", [0, -1, -(10**9)])
def test_an_answer_without_a_token_is_refused(engine: Engine, limit: int) -> None:
    # Shows a fault: a negative one made room for everybody.
    with pytest.raises(InputError):
        engine.submit(Prompt((), (), (300,)), Sampling(max_tokens=limit))
    engine.when_idle(lambda desk: None).result()  # what an earlier test gave up has ended
    assert engine.status().cells_used == 0


def test_a_request_that_takes_too_long_ends_with_what_it_has(engine: Engine, model: Model) -> None:
    generation = engine.submit(counting(model), LONG, timeout=1000)
    steps = until_text(generation)
    generation.deadline = 0.0  # now it is over
    last = list(steps)[-1]
    assert isinstance(last, Finished)
    assert last.reason == "timeout"
    assert 0 < last.usage.completion_tokens < 400
    assert run(engine, counting(model), Sampling(max_tokens=3))[1].reason == "length"


def test_a_request_without_any_time_is_not_computed(engine: Engine, model: Model) -> None:
    [last] = list(engine.submit(counting(model), LONG, timeout=1e-9))
    assert isinstance(last, Finished)
    assert (last.reason, last.usage.completion_tokens, last.first_token) == ("timeout", 0, 0.0)


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan")])
def test_a_time_that_is_none_is_refused(engine: Engine, model: Model, timeout: float) -> None:
    with pytest.raises(InputError) as caught:
        engine.submit(counting(model), LONG, timeout=timeout)
    assert caught.value.field == "timeout"


@pytest.mark.parametrize("wrong", [{"seed": "x"}, {"stop": (1,)}, {"temperature": None}])
def test_nonsense_is_refused_before_it_reaches_the_engine(engine: Engine, model: Model, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        engine.submit(counting(model), Sampling(max_tokens=1, **wrong))
    assert run(engine, counting(model), Sampling(max_tokens=3))[1].reason == "length"


def test_the_engine_tells_what_it_does(engine: Engine, model: Model) -> None:
    engine.when_idle(lambda _: None).result()
    before = engine.status()
    assert (before.slots, before.active, before.waiting, before.cells_used) == (4, 0, 0, 0)
    generation = engine.submit(asked := counting(model), LONG)
    steps = until_text(generation)
    during = engine.status()
    assert (during.active, during.waiting, during.cells_used) == (1, 0, len(asked) + 400)
    assert during.cells >= during.cells_used
    generation.cancel()
    list(steps)
    last = engine.submit(counting(model), Sampling(max_tokens=3))
    list(last)
    engine.when_idle(lambda _: None).result()
    after = engine.status()
    assert (after.active, after.cells_used, after.served) == (0, 0, before.served + 2)
    assert after.steps >= before.steps + 4
    assert after.last_step == Step("", 0, (last.job.id,))


@pytest.mark.parametrize(
    ("gpu", "settings", "expected"),
    [
        pytest.param(False, {}, CPU_BATCH, id="no GPU"),
        pytest.param(True, {}, GPU_BATCH, id="a GPU"),
        pytest.param(True, {"engine.gpu_layers": 0}, CPU_BATCH, id="a GPU that is not used"),
        pytest.param(True, {"engine.n_batch": 32}, 32, id="a size of the user's own"),
    ],
)
def test_the_batch_suits_the_machine_unless_it_is_set(
    gpu: bool, settings: dict[str, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "has_gpu", lambda: gpu)
    assert batch_size(load_settings(settings, environment={})) == expected


def test_many_threads_get_their_own_answers(engine: Engine, model: Model) -> None:
    questions = [f"{number}, {number + 1}, {number + 2}, {number + 3}," for number in range(1, 7)]
    prompts = [Prompt((), (), tuple(model.tokenize(question))) for question in questions]
    alone = [said(run(engine, asked, Sampling(max_tokens=2))[0]) for asked in prompts]
    together: dict[int, str] = {}

    def ask(number: int) -> None:
        together[number] = said(run(engine, prompts[number], Sampling(max_tokens=2))[0])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number] for number in range(len(prompts))] == alone


def test_closing_cancels_what_runs_and_what_waits_and_refuses_what_comes(model: Model) -> None:
    engine = started(model)
    running = engine.submit(counting(model), LONG)
    steps = until_text(running)
    waiting = engine.submit(counting(model), LONG)
    engine.close()
    engine.close()
    for last in (list(steps)[-1], list(waiting)[-1]):
        assert isinstance(last, Finished)
        assert last.reason == "cancelled"
        assert last.usage.completion_tokens < 400
    assert running.cancelled, "where a decode cannot be aborted, the step after it must see the wish"
    with pytest.raises(EngineError, match="closed"):
        engine.submit(counting(model), LONG)
    running.cancel()
