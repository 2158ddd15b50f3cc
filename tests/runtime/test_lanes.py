"""Answers under adapters: the base model reads the passages, the adapter acts from the question on, in lanes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_rag.errors import InputError, ModelError
from edge_rag.native.llama import Model, Run, Sampler
from edge_rag.policy.costs import Costs
from edge_rag.records import Sampling
from edge_rag.runtime.prompting import Prompt
from edge_rag.runtime.requests import Desk
from tests.native.tiny_loras import write_tiny_lora
from tests.native.tiny_models import write_tiny_model
from tests.runtime.serving import Batches, Running, Toy, drained, running, toy_prompt

TOKENS = 12
SAMPLING = Sampling(max_tokens=TOKENS)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Toy(write_tiny_model("llama", tmp_path_factory.mktemp("llama")), gpu_layers=0) as model:
        yield model


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def names(adapters: Path) -> tuple[str, str]:
    """Two adapters."""
    return write_tiny_lora(adapters, seed=1).stem, write_tiny_lora(adapters, seed=2).stem


@pytest.fixture
def served(toy: Model, data: Path, adapters: Path) -> Iterator[Running]:
    with running(toy, data, adapters=adapters) as started:
        yield started


def under(adapter: str, *chunks: int, question: int = 1) -> Prompt:
    plain = toy_prompt(chunks, question=question)
    return Prompt(plain.prefix, plain.passages, plain.tail, plain.chunks, adapter)


def by_hand(served: Running, prompt: Prompt) -> str:
    """The answer as it should be: plain prefill of the passages, then the tail and the answer under the adapter."""

    def write(desk: Desk) -> str:
        assert desk.pager
        with desk.pager.held(prompt.adapter), Sampler(SAMPLING) as sampler:
            start, text = prompt.seams[-1], b""
            desk.decode([Run(prompt.tokens[:start], 0, 0)])
            late = desk.of(0, prompt.adapter)
            late.read(prompt.tail, start)
            for position in range(len(prompt), len(prompt) + TOKENS):
                token = sampler.sample(desk.context)
                text += desk.context.model.piece(token)
                late.read([token], position)
            return text.decode()

    answer: str = served.on_thread(write)
    return answer


def test_an_adapter_answers_from_the_question_on(served: Running, names: tuple[str, str]) -> None:
    one, two = names
    answers = [served.ask(under(name, 1), SAMPLING).text for name in ("", one, two)]
    assert len(set(answers)) == 3
    assert answers == [by_hand(served, under(name, 1)) for name in ("", one, two)]


def test_without_passages_it_answers_from_memory_alone(served: Running, names: tuple[str, str]) -> None:
    prompt = under(names[0])
    assert served.ask(prompt, SAMPLING).text == by_hand(served, prompt)


def test_lanes_that_are_served_at_once_do_not_disturb_each_other(served: Running, names: tuple[str, str]) -> None:
    prompts = [under(name, 1, question=7) for name in ("", *names)]
    answers = served.ask_together(*((prompt, SAMPLING) for prompt in prompts))
    assert [answer.text for answer in answers] == [by_hand(served, prompt) for prompt in prompts]


def test_no_batch_has_two_adapters(served: Running, names: tuple[str, str]) -> None:
    batches = Batches(served.engine)
    worn: list[str] = []
    wear = batches.context.wear
    batches.context.wear = lambda adapter: (worn.append(adapter.path.stem if adapter else ""), wear(adapter))[1]  # type: ignore[method-assign]
    served.ask_together(*((under(name, 1, question=7), SAMPLING) for name in names))
    lanes: dict[str, set[int]] = {name: set() for name in names}
    for name, runs in zip(worn, batches.done, strict=True):
        if name:
            lanes[name] |= {run.sequence for run in runs}
        else:
            assert all(run.position < under("", 1).seams[-1] for run in runs)
    assert all(len(sequences) == 1 for sequences in lanes.values())


def test_passages_are_shared_between_lanes_and_questions_are_not(served: Running, names: tuple[str, str]) -> None:
    one, two = names
    _, second = served.ask_together((under(one, 1, 2), SAMPLING), (under(two, 1, 2), SAMPLING))
    assert second.sources == ["live", "live"]
    assert second.cached == under(two, 1, 2).seams[-1]
    assert second.text == by_hand_of_spliced(served, under(two, 1, 2))


def by_hand_of_spliced(served: Running, prompt: Prompt) -> str:
    """What the engine answers when nobody else is served."""
    served.on_thread(lambda desk: desk.assembler.relink(desk.assembler.link))  # states of whole prompts are forgotten
    return served.ask(prompt, SAMPLING).text


def test_the_kept_state_of_one_adapters_prompt_serves_no_other_beyond_the_passages(
    served: Running, names: tuple[str, str]
) -> None:
    one, two = names
    again = [served.ask(under(name, 1), SAMPLING) for name in (one, one, two)]
    seam = under(one, 1).seams[-1]
    assert again[1].cached == len(under(one, 1)) - 1
    assert again[2].cached == seam
    assert again[2].text == by_hand(served, under(two, 1))


def test_equal_questions_under_different_adapters_are_not_answered_together(
    served: Running, names: tuple[str, str]
) -> None:
    served.ask_together(*((under(name, 1), SAMPLING) for name in (*names, names[0])))
    assert served.engine.status().joined == 1


def test_an_adapter_that_cannot_be_loaded_ends_its_request_only(served: Running, names: tuple[str, str]) -> None:
    broken, sound = served.submit_together((under("0" * 64, 1), SAMPLING), (under(names[0], 1), SAMPLING))
    with pytest.raises(ModelError, match="no such file"):
        list(broken)
    assert list(sound)
    served.settle()


def test_an_answered_or_cancelled_request_lets_its_adapter_go(served: Running, names: tuple[str, str]) -> None:
    pager = served.engine.pager
    assert pager
    served.ask(under(names[0], 1), SAMPLING)
    [cancelled] = served.submit_together((under(names[1], 1), SAMPLING), then=lambda them: them[0].cancel())
    assert drained(cancelled) or list(cancelled)
    served.settle()
    assert not pager._held


def test_writing_is_timed_with_and_without_an_adapter(served: Running, names: tuple[str, str]) -> None:
    assembler = served.engine.assembler
    assembler.costs = Costs()
    served.ask(under("", 1), SAMPLING)
    assert "write" in assembler.costs.seen
    assert assembler.costs.slowdown == 0
    served.ask(under(names[0], 1), SAMPLING)
    assert {"write", "dressed", "words"} <= set(assembler.costs.seen)
    assert assembler.costs.words == pytest.approx(TOKENS)
    assert min(assembler.costs.write, assembler.costs.dressed) > 0


def test_an_answer_that_nobody_waited_for_says_nothing_of_writing(served: Running, names: tuple[str, str]) -> None:
    served.engine.assembler.costs = Costs()
    [cancelled] = served.submit_together((under(names[1], 1), SAMPLING), then=lambda them: them[0].cancel())
    assert drained(cancelled) or list(cancelled)
    served.settle()
    assert "words" not in served.engine.assembler.costs.seen


def test_without_adapters_none_may_be_asked_for(toy: Model, data: Path, names: tuple[str, str]) -> None:
    with running(toy, data) as started, pytest.raises(InputError, match="switched off"):
        started.engine.submit(under(names[0], 1), SAMPLING)
