"""A passage kept and put back elsewhere is the passage moved there, but for what the codec loses."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from edge_rag.errors import EngineError
from edge_rag.native import kv_blob, kv_passage, rope
from edge_rag.native.kv_blob import Blob, KVShape
from edge_rag.native.kv_codec import CODECS, Codec
from edge_rag.native.kv_passage import move_into, pack, part, unpack_into
from edge_rag.native.llama import Context, ContextSettings, Model, Run
from edge_rag.native.llama.geometry import Geometry, geometry

TURNS = [
    pytest.param(rope.Rope("neighbours", 16, 16, rope.frequencies(16, 10_000.0)), id="neighbours"),
    pytest.param(rope.Rope("halves", 16, 16, rope.frequencies(16, 10_000.0)), id="halves"),
    pytest.param(rope.Rope("halves", 16, 8, rope.frequencies(8, 10_000.0)), id="half of each head"),
]
STEPS = {"f16": 0.0, "q8": 1 / 255, "q5": 1 / 31, "q4": 1 / 15}  # of the range of the numbers that share a scale
ROUNDING = 2.0**-9  # f16, of the largest number: rounded when kept and when put back
SHAPE = KVShape(layers=3, k_width=32, v_width=64)
MANY = KVShape(layers=5, k_width=1024, v_width=64)  # its keys are more than a block: two layers at a time


def state_of(shape: KVShape, positions: range, seed: int = 2) -> Blob:
    random = np.random.default_rng(seed)
    made = kv_blob.new(shape, positions)
    made.keys[:], made.values[:] = (random.normal(size=array.shape) for array in (made.keys, made.values))
    return made


def empty_at(shape: KVShape, positions: range) -> Blob:
    made = kv_blob.new(shape, positions)
    made.keys[:] = made.values[:] = np.nan
    return made


def kept(state: Blob, codec: Codec, by: rope.Rope) -> dict[str, memoryview]:
    """What is read from a file: bytes that cannot be written to."""
    return {name: memoryview(section.tobytes()) for name, section in pack(state, codec, by).items()}


def moved(state: Blob, shape: KVShape, by: rope.Rope, positions: range) -> Blob:
    place = empty_at(shape, positions)
    move_into(place, state, shape, by)
    return place


def put_back(state: Blob, codec: Codec, shape: KVShape, by: rope.Rope, positions: range) -> Blob:
    place = empty_at(shape, positions)
    unpack_into(place, codec, kept(state, codec, by), shape, by)
    return place


def error(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square, as a share of the range."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(np.sqrt(((one - other) ** 2).mean()) / np.ptp(other))


def assert_same_but_for_rounding(one: Blob, other: Blob) -> None:
    for ours, its in ((one.keys, other.keys), (one.values, other.values)):
        assert np.abs(ours.astype(np.float32) - its).max() <= ROUNDING * np.abs(its).max()


@pytest.mark.parametrize("by", TURNS)
@pytest.mark.parametrize("codec", CODECS)
def test_unpacked_elsewhere_is_moved_there_within_the_codecs_error(codec: Codec, by: rope.Rope) -> None:
    state = state_of(SHAPE, range(31, 71))
    expected = moved(state, SHAPE, by, range(400, 440))
    result = put_back(state, codec, SHAPE, by, range(400, 440))
    assert result.positions.tolist() == list(range(400, 440))
    assert error(result.keys, expected.keys) <= STEPS[codec] / 2 + ROUNDING
    assert error(result.values, expected.values) <= STEPS[codec] / 2 + ROUNDING
    assert error(state.keys, expected.keys) > 0.1  # it was turned at all


@pytest.mark.parametrize("by", TURNS)
def test_unpacked_where_it_was_is_the_passage(by: rope.Rope) -> None:
    state = state_of(SHAPE, range(31, 71))
    assert_same_but_for_rounding(put_back(state, "f16", SHAPE, by, range(31, 71)), state)


@pytest.mark.parametrize("by", TURNS)
def test_moving_by_nothing_changes_no_bit(by: rope.Rope) -> None:
    state = state_of(SHAPE, range(31, 71))
    assert np.array_equal(moved(state, SHAPE, by, range(31, 71)).buffer, state.buffer)


@pytest.mark.parametrize("by", TURNS)
def test_a_detour_leads_to_the_same_place(by: rope.Rope) -> None:
    state = state_of(SHAPE, range(31, 71))
    detour = moved(moved(state, SHAPE, by, range(1000, 1040)), SHAPE, by, range(5, 45))
    assert_same_but_for_rounding(detour, moved(state, SHAPE, by, range(5, 45)))


@pytest.mark.parametrize("codec", CODECS)
def test_blocks_of_layers_make_no_difference(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    by = rope.Rope("halves", 64, 64, rope.frequencies(64, 10_000.0))
    state = state_of(MANY, range(64))
    assert len(list(kv_passage._blocks(MANY, 64))) == 3
    unpacked, shifted = [], []
    for size in (kv_passage.BLOCK_BYTES, 1, 2**40):
        monkeypatch.setattr(kv_passage, "BLOCK_BYTES", size)
        unpacked.append(put_back(state, codec, MANY, by, range(7, 71)).buffer)
        shifted.append(moved(state, MANY, by, range(7, 71)).buffer)
    for results in (unpacked, shifted):
        assert np.array_equal(results[0], results[1])
        assert np.array_equal(results[0], results[2])


def test_a_place_in_a_prompt_is_filled_and_nothing_beside_it() -> None:
    by = rope.Rope("halves", 16, 16, rope.frequencies(16, 10_000.0))
    prompt = state_of(SHAPE, range(100), seed=9)
    before = prompt.buffer.copy()
    passage = state_of(SHAPE, range(31, 71))
    unpack_into(part(prompt, 50, 90), "f16", kept(passage, "f16", by), SHAPE, by)
    assert_same_but_for_rounding(kv_blob.cut(prompt, SHAPE, 50, 90), moved(passage, SHAPE, by, range(50, 90)))
    prompt.keys[:, 50:90] = kv_blob.parse(before, SHAPE).keys[:, 50:90]
    prompt.values[:, 50:90] = kv_blob.parse(before, SHAPE).values[:, 50:90]
    assert np.array_equal(prompt.buffer, before)


def test_several_threads_place_passages_into_one_prompt() -> None:
    by = rope.Rope("neighbours", 16, 16, rope.frequencies(16, 10_000.0))
    passages = [state_of(SHAPE, range(20, 52), seed=seed) for seed in range(8)]
    sections = [kept(passage, "q8", by) for passage in passages]
    results = []
    for workers in (1, 4):
        prompt = empty_at(SHAPE, range(8 * 32))
        with ThreadPoolExecutor(workers) as pool:
            list(
                pool.map(
                    lambda number, prompt=prompt: unpack_into(
                        part(prompt, 32 * number, 32 * number + 32), "q8", sections[number], SHAPE, by
                    ),
                    range(8),
                )
            )
        results.append(prompt.buffer)
    assert np.array_equal(*results)


@pytest.mark.parametrize("codec", CODECS)
def test_sections_that_do_not_fit_are_refused(codec: Codec) -> None:
    by = rope.Rope("halves", 16, 16, rope.frequencies(16, 10_000.0))
    sections = kept(state_of(SHAPE, range(40)), codec, by)
    for name, section in sections.items():
        for broken in (sections | {name: section[:-1]}, {key: sections[key] for key in sections if key != name}):
            with pytest.raises(EngineError, match=name):
                unpack_into(empty_at(SHAPE, range(40)), codec, broken, SHAPE, by)
    with pytest.raises(EngineError):
        unpack_into(empty_at(SHAPE, range(41)), codec, sections, SHAPE, by)


def test_packing_leaves_the_state_as_it_was() -> None:
    state = state_of(SHAPE, range(31, 71))
    before = state.buffer.copy()
    pack(state, "q4", rope.Rope("halves", 16, 16, rope.frequencies(16, 10_000.0)))
    assert np.array_equal(state.buffer, before)


def test_a_real_passage_that_was_kept_is_what_the_model_computes_at_its_new_place(small_llm: Path) -> None:
    """A passage alone sees only itself, so at every layer it is the same anywhere, but for the rotation."""
    tokens = [504, 1573, 33059, 40061, 30324, 260, 13155, 897, 2988, 30]
    sizes = ContextSettings(n_ctx=256, n_batch=32, n_seq_max=2, threads=1)
    with Model(small_llm, gpu_layers=0) as model, Context(model, sizes) as context:
        found = geometry(model)
        assert isinstance(found, Geometry)
        context.decode([Run(tokens, 0, 11, logits=True)])
        context.decode([Run(tokens, 1, 160, logits=True)])
        here, there = (kv_blob.parse(context.save(sequence), found.shape) for sequence in (0, 1))
    result = put_back(here, "q8", found.shape, found.rope, range(160, 170))
    assert error(result.keys, there.keys) <= STEPS["q8"]
    assert error(result.values, there.values) <= STEPS["q8"]
    assert error(here.keys, there.keys) > 5 * STEPS["q8"]
