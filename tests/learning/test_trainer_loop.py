"""Training toy models within this process."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from edge_rag.errors import MachineError, ModelError
from edge_rag.learning.events import Step
from edge_rag.learning.trainer import loop as loops
from edge_rag.learning.trainer import lora, sizes
from edge_rag.learning.trainer.base import Base
from edge_rag.learning.trainer.batches import tensors
from edge_rag.learning.trainer.checkpoint import State
from edge_rag.learning.trainer.contexts import Contexts
from edge_rag.learning.trainer.loop import Outlook, answer_states
from edge_rag.learning.trainer.sizes import Room
from tests.learning import training
from tests.learning.toy_jobs import CONTEXTS, toy_examples, toy_job
from tests.learning.training import Turns, make_loop, run_loop

CPU = torch.device("cpu")
TIGHT = Room(1, 0)  # one example at a time, no context kept

pytestmark = training.MARKS


@pytest.fixture
def job(toy_models: dict[str, Path], toy_cache: Path) -> Any:
    return toy_job(toy_models["llama"], toy_cache)


def numbers(adapted: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in lora.weights(adapted).items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(value, other[name], atol=1e-4) for name, value in one.items())


def losses(events: list[Any]) -> list[float]:
    return [event.loss for event in events if isinstance(event, Step)]


def test_training_lowers_the_loss_and_reports_every_step(job: Any) -> None:
    loop, _ = make_loop(job, toy_examples(epochs=10))
    said = run_loop(loop)
    assert [event.step for event in said if isinstance(event, Step)] == list(range(1, 61))
    assert {event.epoch for event in said if isinstance(event, Step)} == set(range(1, 11))
    assert np.mean(losses(said)[-6:]) < 0.5 * np.mean(losses(said)[:6])
    assert loop.cursor.loss == loop.cursor.best


def test_only_the_adapter_is_trained(job: Any) -> None:
    loop, adapted = make_loop(job, toy_examples())
    base = {name: value.clone() for name, value in adapted.named_parameters() if ".lora_" not in name}
    before = numbers(adapted)
    run_loop(loop)
    assert equal(base, dict(adapted.named_parameters()))
    assert not any(torch.equal(value, before[name]) for name, value in numbers(adapted).items())


def test_the_same_job_gives_the_same_adapter(job: Any) -> None:
    results = []
    for _ in range(2):
        loop, adapted = make_loop(job, toy_examples())
        run_loop(loop)
        results.append(numbers(adapted))
    assert equal(*results)


@pytest.mark.parametrize(
    "room",
    [
        pytest.param(TIGHT, id="one example at a time"),
        pytest.param(Room(1 << 40, 1 << 40, recompute=True), id="layers computed again"),
        pytest.param(Room(2 << 20, 30_000), id="some examples at a time"),
    ],
)
def test_how_much_fits_into_memory_does_not_matter_to_what_is_learned(job: Any, room: Room) -> None:
    wide, adapted = make_loop(job, toy_examples(), freely=True)
    other, narrowly = make_loop(job, toy_examples(), room=room)
    expected = losses(run_loop(wide))
    assert losses(run_loop(other)) == pytest.approx(expected, rel=1e-3)
    assert close(numbers(adapted), numbers(narrowly))


def test_answers_are_predicted_from_the_base_context_and_the_adapted_rest(job: Any) -> None:
    """The slow way: the context by the base alone, then one token after another with the adapter."""
    examples = toy_examples()
    loop, adapted = make_loop(replace(job, learning_rate=0.3), examples)
    run_loop(loop)
    part = [0, 12, 13]  # three contexts of different lengths in one batch
    batch = tensors(examples, part, CPU)
    with torch.no_grad():
        states = answer_states(adapted.get_base_model(), Contexts(adapted, examples, CPU, 0), batch)
        fast = adapted.get_base_model().lm_head(states)
        slow = torch.cat([slowly(adapted, examples, one) for one in part])
    assert torch.allclose(fast, slow, atol=1e-4)


def slowly(adapted: Any, examples: Any, one: int) -> torch.Tensor:
    context, tail, answer = examples.examples[one]
    question = examples.tails[examples.tail_ends[tail] : examples.tail_ends[tail + 1]].tolist()
    words = examples.answers[examples.answer_ends[answer] : examples.answer_ends[answer + 1]].tolist()
    with adapted.disable_adapter():
        past = adapted(input_ids=torch.tensor([CONTEXTS[context]]), use_cache=True).past_key_values
    logits = []
    for token in [*question, *words[:-1]]:
        found = adapted(input_ids=torch.tensor([[token]]), past_key_values=past, use_cache=True)
        logits.append(found.logits[0, -1])
    return torch.stack(logits[len(question) - 1 :])


def test_the_context_is_the_bases_also_after_training(job: Any) -> None:
    examples = toy_examples()
    loop, adapted = make_loop(replace(job, targets="all", learning_rate=0.3), examples)
    before = Contexts(adapted, examples, CPU, 0).past([1]).layers
    run_loop(loop)
    after = Contexts(adapted, examples, CPU, 0).past([1]).layers
    assert all(torch.equal(one.keys, other.keys) for one, other in zip(before, after, strict=True))


def test_a_context_that_repeats_is_computed_once_as_long_as_there_is_room(job: Any) -> None:
    examples = toy_examples()
    _, adapted = make_loop(job, examples)
    contexts = Contexts(adapted, examples, CPU, 1 << 30)
    for _ in range(3):
        contexts.past([0, 1, 0, 2, 1])
    assert contexts.computed == sum(map(len, CONTEXTS))
    one = contexts.bytes // contexts.computed
    contexts.limit(one * (len(CONTEXTS[1]) + len(CONTEXTS[2])))
    contexts.past([2])
    assert contexts.computed == sum(map(len, CONTEXTS))
    contexts.past([0])  # the least recently used one went
    assert contexts.computed == sum(map(len, CONTEXTS)) + len(CONTEXTS[0])
    contexts.limit(0)
    assert contexts.bytes == 0


def test_a_training_that_was_stopped_goes_on_to_the_same_last_bit(job: Any) -> None:
    examples = toy_examples(epochs=3)
    whole, expected = make_loop(job, examples, room=TIGHT)
    run_loop(whole)
    saved: list[State] = []
    loop, _ = make_loop(job, examples, room=TIGHT)
    # In the middle of the third step, when some gradients of it are there already.
    assert not loop.run(Turns(2 * 4 + 2), Outlook(lambda event: None, saved.append))
    state = State(saved[-1].cursor, {name: value.detach().clone() for name, value in saved[-1].tensors.items()})
    assert state.cursor.step == 2
    again, resumed = make_loop(job, examples, room=TIGHT)
    again.restore(state)
    run_loop(again)
    assert equal(numbers(expected), numbers(resumed))
    assert again.cursor.loss == whole.cursor.loss
    assert again.cursor.tokens == whole.cursor.tokens


def test_micro_batches_stay_as_they_were_unless_there_is_less_room(job: Any) -> None:
    for now, kept in ((Room(95, 0), True), (Room(200, 0), True), (Room(50, 0), False), (Room(200, 0, True), False)):
        loop, _ = make_loop(job, toy_examples(), room=now)
        state = loop.state()
        loop.restore(State(replace(state.cursor, room=Room(100, 0)), state.tensors))
        assert loop.cursor.room == (Room(100, 0) if kept else now)


class Spoiled:
    """A loss that is no number from some call on."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, logits: torch.Tensor, *_: Any) -> torch.Tensor:
        self.left -= 1
        return logits.sum() * (1e-3 if self.left >= 0 else math.nan)


def test_a_loss_that_is_no_number_keeps_the_best_epoch(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, adapted = make_loop(job, toy_examples(epochs=4), freely=True)
    assert not loop.run(Turns(6), Outlook(lambda event: None, lambda state: None))  # of the first epoch
    good = numbers(adapted)
    monkeypatch.setattr(loops, "summed_loss", Spoiled(0))
    run_loop(loop)
    assert equal(good, numbers(adapted))
    assert loop.note == "the loss was not a number in epoch 2; the best epoch before it was kept"


def test_a_loss_that_is_no_number_from_the_first_epoch_on_fails(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _ = make_loop(job, toy_examples(), freely=True)
    monkeypatch.setattr(loops, "summed_loss", Spoiled(1))
    with pytest.raises(MachineError, match="not a number in step 2"):
        run_loop(loop)


def test_a_device_that_runs_out_of_memory_gets_smaller_batches(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, expected = make_loop(job, toy_examples(), freely=True)
    run_loop(whole)
    full = sizes.need(Base(job).facts, sizes.Shape(2, 24, 6, 8), recompute=False)
    loop, adapted = make_loop(job, toy_examples(), room=Room(full * 4, 1 << 30), freely=True)
    real = loops.answer_states

    def short(model: Any, contexts: Any, batch: Any) -> torch.Tensor:
        if len(batch.contexts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, contexts, batch)

    monkeypatch.setattr(loops, "answer_states", short)
    run_loop(loop)
    assert loop.cursor.room is not None
    assert loop.cursor.room.batch < full * 4
    assert close(numbers(expected), numbers(adapted))


def test_a_device_without_memory_for_one_example_is_told(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loops, "answer_states", never)
    loop, _ = make_loop(job, toy_examples())
    with pytest.raises(MachineError, match="too little memory for one example"):
        run_loop(loop)


def test_weights_are_dequantised_once(job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = replace(job, cache=str(tmp_path))
    left = tmp_path / f".{job.sha256}.123"
    left.mkdir()
    assert not Base(job).kept
    Base(job).load()
    monkeypatch.setattr(Base, "_convert", None)
    assert Base(job).kept
    Base(job).load()
    assert sorted(file.name for file in tmp_path.iterdir()) == [job.sha256, f"{job.sha256}.lock"]


def test_another_model_file_than_the_job_was_made_for_is_refused(job: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    for file in (other, tmp_path / "gone.gguf"):
        with pytest.raises(ModelError, match="not the one"):
            Base(replace(job, model=str(file)))


def test_a_model_without_the_products_is_refused(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base(job)
    for names in ({"fc_out": "ffn_down"}, {"down_proj": "ffn_down", "fc_out": "ffn_up"}):
        monkeypatch.setitem(lora.TARGETS, "ffn", names)
        with pytest.raises(ModelError):
            lora.attach(base.load(), job, base.facts)


def test_only_the_last_half_of_the_layers_is_adapted_when_asked(job: Any) -> None:
    _, adapted = make_loop(replace(job, layers="last_half"), toy_examples())
    assert len(lora.weights(adapted)) == 6
    assert all(".layers.1." in name for name in lora.weights(adapted))
