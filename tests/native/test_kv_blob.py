"""llama.cpp's sequence state as arrays: its own bytes come back, and nothing malformed gets through."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.errors import EngineError
from edge_rag.native import kv_blob
from edge_rag.native.kv_blob import KVShape
from edge_rag.native.llama import Context, ContextSettings, Model, Run

SHAPE = KVShape(layers=30, k_width=192, v_width=192)  # of SmolLM2-135M: 3 heads of 64
SMALL = KVShape(layers=3, k_width=8, v_width=16)
TOKENS = [504, 1573, 33059, 40061, 30324, 260, 13155]


@pytest.fixture(scope="module")
def context(small_llm: Path) -> Iterator[Context]:
    sizes = ContextSettings(n_ctx=256, n_batch=32, n_seq_max=3, threads=1)
    with Model(small_llm, gpu_layers=0) as model, Context(model, sizes) as made:
        yield made


@pytest.fixture
def state(context: Context) -> np.ndarray:
    """The bytes of a state of seven tokens."""
    for sequence in range(3):
        context.clear(sequence)
    context.decode([Run(TOKENS, 0, 0, logits=True)])
    return context.save(0)


def small(tokens: int = 4) -> kv_blob.Blob:
    """A state that no model made."""
    random = np.random.default_rng(5)
    made = kv_blob.new(SMALL, np.arange(tokens))
    made.keys[:], made.values[:] = random.normal(size=made.keys.shape), random.normal(size=made.values.shape)
    return made


# --- what a model wrote ----------------------------------------------------------------------------------------------


def test_a_models_state_is_parsed_and_written_again_byte_for_byte(state: np.ndarray) -> None:
    parsed = kv_blob.parse(state, SHAPE)
    assert parsed.positions.tolist() == list(range(len(TOKENS)))
    assert parsed.keys.shape == parsed.values.shape == (30, len(TOKENS), 192)
    written = kv_blob.new(SHAPE, parsed.positions)
    written.keys[:], written.values[:] = parsed.keys, parsed.values
    assert np.array_equal(written.buffer, state)


def test_keys_and_values_are_what_they_are_called(context: Context, state: np.ndarray) -> None:
    """The values of a token on the first layer know nothing of its position, the keys do."""
    parsed = kv_blob.parse(state, SHAPE)
    context.decode([Run(TOKENS, 1, 50, logits=True)])
    later = kv_blob.parse(context.save(1), SHAPE)
    assert later.positions.tolist() == list(range(50, 50 + len(TOKENS)))
    assert np.array_equal(later.values[0], parsed.values[0])
    assert np.abs(later.keys[0].astype(np.float32) - parsed.keys[0]).max() > 0.5


def test_a_rebuilt_state_is_accepted_and_goes_on_like_the_original(context: Context, state: np.ndarray) -> None:
    context.decode([Run([281], 0, len(TOKENS), logits=True)])
    direct = context.logits()
    parsed = kv_blob.parse(state, SHAPE)
    context.clear(0)
    context.restore(0, kv_blob.cut(parsed, SHAPE, 0, len(TOKENS)).buffer)
    assert context.end(0) == len(TOKENS)
    context.decode([Run([281], 0, len(TOKENS), logits=True)])
    assert np.array_equal(context.logits(), direct)


def test_a_cut_is_in_order_of_positions_whatever_the_order_of_cells(context: Context, state: np.ndarray) -> None:
    in_order = kv_blob.parse(state, SHAPE)
    context.clear(0)
    context.restore(1, kv_blob.cut(in_order, SHAPE, 4, 7).buffer)  # these cells come first
    context.restore(2, kv_blob.cut(in_order, SHAPE, 0, 4).buffer)
    context.share(1, 0)
    context.share(2, 0)
    mixed = kv_blob.parse(context.save(0), SHAPE)
    assert mixed.positions.tolist() == [4, 5, 6, 0, 1, 2, 3]
    assert np.array_equal(kv_blob.cut(mixed, SHAPE, 0, 7).buffer, state)
    middle = kv_blob.cut(mixed, SHAPE, 2, 5)
    assert middle.positions.tolist() == [2, 3, 4]
    assert np.array_equal(middle.keys, in_order.keys[:, 2:5])
    assert np.array_equal(middle.values, in_order.values[:, 2:5])


def test_the_state_of_an_empty_sequence_is_refused(context: Context) -> None:
    context.clear(2)
    with pytest.raises(EngineError, match="0 tokens"):
        kv_blob.parse(context.save(2), SHAPE)


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_arrays_are_views_of_the_buffer() -> None:
    made = small()
    parsed = kv_blob.parse(made.buffer, SMALL)
    for array in (parsed.positions, parsed.keys, parsed.values):
        assert np.shares_memory(array, made.buffer)
    made.positions[:], made.keys[1, 2, 3], made.values[2, 3, 15] = 9, 41, 42
    assert parsed.positions.tolist() == [9] * 4
    assert (parsed.keys[1, 2, 3], parsed.values[2, 3, 15]) == (41, 42)


@given(st.integers(1, 4), st.sampled_from([8, 24]), st.sampled_from([8, 16]), st.integers(1, 9))
def test_every_byte_of_keys_and_values_has_its_own_place(layers: int, k_width: int, v_width: int, tokens: int) -> None:
    shape = KVShape(layers, k_width, v_width)
    made = kv_blob.new(shape, np.arange(tokens))
    assert len(made.buffer) == kv_blob.size(shape, tokens)
    made.buffer[:] = 0
    made.keys.view(np.uint16)[...] = 0xFFFF
    made.values.view(np.uint16)[...] = 0xFFFF
    assert np.count_nonzero(made.buffer) == tokens * shape.bytes_per_token == made.keys.nbytes + made.values.nbytes
    assert made.buffer[: -2 * v_width * tokens].any()
    assert made.buffer[-2 * v_width * tokens :].all()  # the last layer's values come last


def test_a_cut_is_a_copy() -> None:
    made = small()
    part = kv_blob.cut(made, SMALL, 1, 3)
    assert not np.shares_memory(part.buffer, made.buffer)
    assert part.tokens == 2
    assert np.array_equal(kv_blob.parse(part.buffer, SMALL).keys, made.keys[:, 1:3])


# --- malformed -------------------------------------------------------------------------------------------------------

HEAD, CELLS = 16, 4 * 12
BODY = HEAD + CELLS
KEYS = BODY + 8
VALUES = KEYS + 3 * (12 + 2 * 8 * 4)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        pytest.param(0, 0, id="magic"),
        pytest.param(8, 2, id="streams"),
        pytest.param(12, 5, id="more tokens"),
        pytest.param(12, 3, id="fewer tokens"),
        pytest.param(15, 255, id="thousands of millions of tokens"),
        pytest.param(BODY, 1, id="transposed values"),
        pytest.param(BODY + 4, 4, id="another number of layers"),
        pytest.param(KEYS, 8, id="type of the first layer's keys"),
        pytest.param(KEYS + 4, 32, id="width of the first layer's keys"),
        pytest.param(KEYS + 2 * (12 + 64), 0, id="type of the last layer's keys"),
        pytest.param(VALUES, 0, id="type of the first layer's values"),
        pytest.param(VALUES + 2 * (12 + 128) + 4, 16, id="width of the last layer's values"),
    ],
)
def test_another_layout_is_refused(place: int, value: int) -> None:
    buffer = small().buffer
    assert buffer[place] != value
    buffer[place] = value
    with pytest.raises(EngineError, match="state"):
        kv_blob.parse(buffer, SMALL)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(KVShape(2, 8, 16), id="fewer layers"),
        pytest.param(KVShape(3, 16, 8), id="keys and values exchanged"),
        pytest.param(KVShape(3, 8, 8), id="narrower values"),
    ],
)
def test_the_state_of_another_model_is_refused(shape: KVShape) -> None:
    with pytest.raises(EngineError, match="state"):
        kv_blob.parse(small().buffer, shape)


@given(st.integers(0, kv_blob.size(SMALL, 4) - 1))
def test_a_state_that_ends_too_early_is_refused(length: int) -> None:
    with pytest.raises(EngineError, match="bytes"):
        kv_blob.parse(small().buffer[:length], SMALL)


def test_a_state_with_a_byte_too_many_is_refused() -> None:
    with pytest.raises(EngineError, match="bytes"):
        kv_blob.parse(np.append(small().buffer, np.uint8(0)), SMALL)


@given(st.binary(max_size=kv_blob.size(SMALL, 2) + 8))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(EngineError):
        kv_blob.parse(np.frombuffer(data, dtype=np.uint8), SMALL)


@given(st.dictionaries(st.integers(0, kv_blob.size(SMALL, 4) - 1), st.integers(0, 255), max_size=8))
def test_any_damage_is_refused_or_lies_in_the_contents(damage: dict[int, int]) -> None:
    whole = small()
    buffer = whole.buffer.copy()
    for place, value in damage.items():
        buffer[place] = value
    try:
        parsed = kv_blob.parse(buffer, SMALL)
    except EngineError:
        return
    for array, original in ((parsed.keys, whole.keys), (parsed.values, whole.values)):
        array[...] = original
    parsed.buffer[4:8] = 0  # the sequence's number
    parsed.buffer[HEAD:BODY] = whole.buffer[HEAD:BODY]
    assert np.array_equal(buffer, whole.buffer)
