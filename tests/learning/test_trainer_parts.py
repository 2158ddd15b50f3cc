"""What the trainer is made of, each part beside a slow or obvious way of doing the same."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_rag.errors import MachineError, ModelError
from edge_rag.learning.job import Job
from edge_rag.learning.trainer import batches, device, export, lora, loss, sizes
from edge_rag.learning.trainer.base import read_facts
from edge_rag.learning.trainer.batches import Plan
from edge_rag.learning.trainer.checkpoint import Cursor, State, load, save
from edge_rag.learning.trainer.loop import learning_rate
from edge_rag.learning.trainer.sizes import Facts, Room, Shape
from tests.learning.toy_jobs import CONTEXTS, toy_examples

CPU = torch.device("cpu")
SMOL = Facts("llama", 134_515_008, 30, 576, 1536, 9, 3, 64, 49_152)
JOB = Job(model="m.gguf", sha256="", cache="")
WIDE = Room(1 << 40, 1 << 40)
SMALL = Shape(1, 300, 50, 20)
GB = 1 << 30


# --- loss ------------------------------------------------------------------------------------------------------------


def textbook_kl(teacher: np.ndarray, student: np.ndarray) -> float:
    return float(sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True) if p > 0))


@given(st.integers(0, 2**32 - 1))
def test_the_distance_is_the_textbook_kl_over_the_known_tokens_and_the_rest(seed: int) -> None:
    random = np.random.default_rng(seed)
    teacher, student = random.dirichlet(np.ones(17)), random.dirichlet(np.ones(17))
    logs = [torch.tensor(np.log(values[:16]), dtype=torch.float64)[None] for values in (teacher, student)]
    assert float(loss.bucketed_kl(*logs)) == pytest.approx(textbook_kl(teacher, student), rel=1e-4, abs=1e-4)


def test_a_student_that_agrees_with_its_teacher_is_at_no_distance() -> None:
    logs = torch.log(torch.tensor([[0.5, 0.2, 0.1]]))
    assert float(loss.bucketed_kl(logs, logs)) == pytest.approx(0, abs=1e-6)


def test_probability_that_leaks_to_other_tokens_is_noticed() -> None:
    teacher = torch.log(torch.tensor([[0.6, 0.3]]))
    assert float(loss.bucketed_kl(teacher, teacher - 1.0)) > 0.3


def test_teachers_and_students_that_are_sure_give_a_finite_distance_and_gradient() -> None:
    teacher = torch.tensor([[0.0, -40.0]])
    student = torch.tensor([[0.0, -60.0]], requires_grad=True)
    distance = loss.bucketed_kl(teacher, student).sum()
    distance.backward()
    assert torch.isfinite(distance)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_mixes_the_teachers_distribution_and_its_words(share: float) -> None:
    examples = toy_examples()
    batch = batches.tensors(examples, [0, 5], CPU)
    logits = torch.randn(len(batch.targets), 64, generator=torch.Generator().manual_seed(1))
    logs = torch.log_softmax(logits, dim=-1)
    words = -logs[torch.arange(len(logits)), batch.targets].sum()
    distance = loss.bucketed_kl(batch.top_logprobs, logs.gather(1, batch.top_ids)).sum()
    assert float(loss.summed_loss(logits, batch, share)) == pytest.approx(
        float(share * distance + (1 - share) * words), rel=1e-5
    )


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_asks_for_the_answers_tokens_where_they_are_predicted() -> None:
    examples = toy_examples()
    batch = batches.tensors(examples, [2, 13], CPU)
    for row, example in enumerate((2, 13)):
        context, tail, answer = examples.examples[example]
        question = examples.tails[examples.tail_ends[tail] : examples.tail_ends[tail + 1]].tolist()
        words = examples.answers[examples.answer_ends[answer] : examples.answer_ends[answer + 1]].tolist()
        text = [*question, *words]
        columns = batch.columns[batch.rows == row].tolist()
        assert batch.inputs[row, : len(text) - 1].tolist() == text[:-1]
        assert [text[column + 1] for column in columns] == words
        assert batch.targets[batch.rows == row].tolist() == words
        assert batch.positions[row, 0] == len(CONTEXTS[context])


def test_a_row_sees_its_own_context_and_what_stands_before() -> None:
    mask = batches.tensors(toy_examples(), [0, 12], CPU).mask
    widest = max(map(len, CONTEXTS[:2]))
    assert mask.shape[-1] == widest + mask.shape[-2]
    assert mask[0, 0, :, : len(CONTEXTS[0])].all()
    assert not mask[0, 0, :, len(CONTEXTS[0]) : widest].any()
    assert mask[1, 0, :, :widest].all()
    assert (mask[0, 0, :, widest:] == torch.ones(mask.shape[-2:])[:, : mask.shape[-2]].tril().bool()).all()


@given(st.integers(2, 40), st.booleans(), st.integers(0, 5))
def test_micro_batches_hold_every_example_of_a_step_once(megabytes: int, freely: bool, seed: int) -> None:
    examples = toy_examples(seed=seed)
    plan = Plan(examples, SMOL, wide=freely)
    room = Room(megabytes << 20, 0)
    for step in range(plan.steps):
        parts = list(plan.micro_batches(step, room))
        epoch, start = divmod(step, plan.per_epoch)
        wanted = examples.order[epoch][start * plan.per_update : (start + 1) * plan.per_update].tolist()
        assert sorted(example for part in parts for example in part) == sorted(wanted)
        for part in parts:
            shape = Shape(
                len(part), int(plan.contexts[part].max()), int(plan.tokens[part].max()), int(plan.answers[part].sum())
            )
            assert len(part) == 1 or sizes.need(SMOL, shape, recompute=False) <= room.batch
    assert plan.steps == 2 * plan.per_epoch == 12


@pytest.mark.parametrize(("examples", "together"), [(1, 4), (24, 4), (40, 5), (127, 15), (128, 16), (5000, 16)])
def test_few_examples_make_small_updates_so_that_there_are_enough_of_them(examples: int, together: int) -> None:
    assert sizes.per_update(examples) == together


def test_on_a_processor_short_and_long_contexts_are_not_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = toy_examples()
    long = np.concatenate([np.arange(4), np.arange(3000) % 60]).astype(np.int32)
    examples = replace(examples, contexts=long, context_ends=np.array([0, 4, 1000, 3004]))
    monkeypatch.setattr(sizes, "LEAST", 16)
    apart = list(Plan(examples, SMOL, wide=False).micro_batches(0, WIDE))
    assert len(list(Plan(examples, SMOL, wide=True).micro_batches(0, WIDE))) == 1
    assert len(apart) > 1
    assert not any({0} < set((examples.examples[part, 0] > 0).tolist()) for part in apart)


def test_on_a_processor_micro_batches_stay_narrow_however_much_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "LEAST", 16)
    examples = toy_examples()
    tails = np.arange(12 * 60, dtype=np.int32) % 60
    plan = Plan(replace(examples, tails=tails, tail_ends=np.arange(13) * 60), SMOL, wide=False)
    parts = list(plan.micro_batches(0, WIDE))
    assert max(len(part) * int(plan.tokens[part].max()) for part in parts) <= batches.NARROW
    assert 2 < len(parts) < 16


def test_the_counts_of_a_step_are_those_of_its_examples() -> None:
    examples = toy_examples(epochs=1)
    plan = Plan(examples, SMOL, wide=True)
    tokens, answers = zip(*(plan.counts(step) for step in range(plan.steps)), strict=True)
    assert sum(answers) == 2 * len(examples.answers)
    assert sum(tokens) == 2 * (len(examples.tails) + len(examples.answers) - (len(examples.answer_ends) - 1))


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_memory_that_is_too_small_is_refused_with_numbers() -> None:
    with pytest.raises(MachineError, match=r"needs [\d,]+ MB of memory, 600 MB may be used"):
        sizes.plan(SMOL, JOB, sizes.fixed(SMOL, 10**6, converting=False), 600 * 10**6, SMALL)


def test_a_memory_setting_bounds_what_is_free() -> None:
    with pytest.raises(MachineError, match="1 MB may be used"):
        sizes.plan(SMOL, replace(JOB, memory=10**6), 0, 64 * GB, SMALL)


def test_layers_are_computed_again_only_when_memory_is_small() -> None:
    small = sizes.plan(SMOL, JOB, 0, GB // 4, SMALL)
    large = sizes.plan(SMOL, JOB, 0, 16 * GB, SMALL)
    assert small.recompute
    assert not large.recompute
    assert large.batch + large.contexts <= 16 * GB


@given(st.integers(120, 10_000))
def test_what_is_planned_fits(megabytes: int) -> None:
    free = megabytes << 20
    try:
        room = sizes.plan(SMOL, JOB, 0, free, SMALL)
    except MachineError:
        assert sizes.need(SMOL, SMALL, recompute=True) > free * sizes.SHARE
    else:
        assert room.batch + room.contexts <= free * sizes.SHARE
        assert room.batch >= sizes.need(SMOL, SMALL, recompute=room.recompute)


def test_batch_tokens_bound_a_micro_batch() -> None:
    few, many = (sizes.plan(SMOL, replace(JOB, batch_tokens=tokens), 0, 64 * GB, SMALL) for tokens in (200, 400))
    assert few.batch < many.batch < sizes.plan(SMOL, JOB, 0, 64 * GB, SMALL).batch


def test_half_a_room_is_half_of_both() -> None:
    assert Room(8, 6, True).halved() == Room(4, 3, True)


def test_dequantising_takes_the_weights_twice() -> None:
    extra = sizes.fixed(SMOL, 0, converting=True) - sizes.fixed(SMOL, 0, converting=False)
    assert extra == SMOL.parameters * 4


# --- learning rate, names, order -------------------------------------------------------------------------------------


def test_the_learning_rate_rises_to_its_peak_and_falls_to_almost_nothing() -> None:
    rates = [learning_rate(step, 200, 1.0) for step in range(200)]
    assert max(rates) == 1.0
    peak = rates.index(1.0)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[-195:] == sorted(rates[-195:], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_a_training_of_one_step_has_its_peak() -> None:
    assert learning_rate(0, 1, 0.5) == 0.5


def test_paired_rows_follow_llama_cpps_order() -> None:
    rows = np.arange(12, dtype=np.float16)[:, None]  # two heads of six
    assert export.paired(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_attention_of_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ModelError, match="attention"):
        export.check_architecture(replace(JOB, targets="all"), replace(SMOL, architecture="new"))
    export.check_architecture(replace(JOB, targets="ffn"), replace(SMOL, architecture="new"))


def test_the_last_half_of_the_layers_is_the_half_next_to_the_answer() -> None:
    assert lora.adapted_layers(replace(JOB, layers="last_half"), SMOL) == range(15, 30)
    assert lora.adapted_layers(JOB, SMOL) == range(30)


def test_facts_are_read_from_the_header(toy_models: dict[str, Path]) -> None:
    facts = read_facts(toy_models["qwen2"])
    assert (facts.architecture, facts.layers, facts.heads, facts.kv_heads, facts.head) == ("qwen2", 2, 4, 2, 16)
    assert (facts.hidden, facts.forward, facts.vocabulary) == (64, 96, 64)
    assert facts.parameters > 60_000


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ModelError, match="header"):
        read_facts(tmp_path / "x.gguf")


# --- device ----------------------------------------------------------------------------------------------------------


def test_a_device_that_computes_rightly_passes() -> None:
    device.self_test(CPU)


def test_a_device_that_computes_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "tanh", torch.sin)
    with pytest.raises(MachineError, match="wrong results"):
        device.self_test(CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(MachineError, match="no CUDA GPU"):
        device.prepare(replace(JOB, device="cuda"))


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    cursor = Cursor(step=3, losses=0.1 + 0.2, answers=7, tokens=9, seconds=1.5, room=Room(5, 6, True))
    save(tmp_path, "job", State(cursor, {"adapter.a": torch.arange(3.0)}))
    state, note = load(tmp_path, "job")
    assert note == ""
    assert state is not None
    assert state.cursor == cursor
    assert state.tensors["adapter.a"].tolist() == [0, 1, 2]
    assert [file.name for file in (tmp_path / "checkpoint").iterdir()] == ["state.safetensors"]


def test_no_checkpoint_is_nothing_to_speak_of(tmp_path: Path) -> None:
    assert load(tmp_path, "job") == (None, "")


def test_a_checkpoint_of_another_job_is_not_used_and_that_is_said(tmp_path: Path) -> None:
    save(tmp_path, "job", State(Cursor(), {"adapter.a": torch.zeros(1)}))
    assert load(tmp_path, "other") == (None, "the checkpoint was not used: it belongs to another job")


def test_a_checkpoint_of_another_format_is_not_used_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_rag.learning.trainer import checkpoint

    monkeypatch.setattr(checkpoint, "FORMAT", 0)
    save(tmp_path, "job", State(Cursor(), {"adapter.a": torch.zeros(1)}))
    monkeypatch.undo()
    assert load(tmp_path, "job") == (None, "the checkpoint was not used: it has format 0, this version writes 2")


@pytest.mark.parametrize("size", [0, 4, 60])
def test_a_torn_checkpoint_is_not_used_and_that_is_said(size: int, tmp_path: Path) -> None:
    save(tmp_path, "job", State(Cursor(), {"adapter.a": torch.zeros(100)}))
    file = tmp_path / "checkpoint" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    state, note = load(tmp_path, "job")
    assert state is None
    assert note.startswith("the checkpoint was not used: it is damaged")
