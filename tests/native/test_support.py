"""Which models' passages can be moved, why others' cannot, and that the self-test tells them apart."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from edge_rag.native import kv_blob, rope
from edge_rag.native.kv_blob import Blob, Buffer, KVShape
from edge_rag.native.kv_passage import move_into
from edge_rag.native.llama import Context, ContextSettings, Model, Run
from edge_rag.native.llama.geometry import Geometry, geometry, read_tensor
from edge_rag.native.llama.self_test import prove
from edge_rag.native.llama.support import Support, examine
from tests.native.tiny_models import HEAD, KV_HEADS, TINY_MODELS, write_tiny_model

SETTINGS = ContextSettings(n_ctx=2048, n_batch=16, n_seq_max=4)
MOVABLE = ("llama", "llama-factors", "llama-linear", "llama-yarn", "qwen2", "stablelm")
FIXED = {
    "gpt2": "positions are not rotary",
    "mamba": "recurrent layers",
    "gemma2": "sliding-window",
    "qwen2vl": "M-RoPE",
    "smollm3": "not turned as its metadata say (layer 3)",
}
TOKENS = [3, 41, 5, 26, 53, 5, 60, 11]
ROUNDING = 2.0**-10  # of the largest number: f16 before and after


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {name: write_tiny_model(name, folder) for name in TINY_MODELS}


@contextmanager
def opened(path: Path, kind: type[Context] = Context, settings: ContextSettings = SETTINGS) -> Iterator[Context]:
    with Model(path, gpu_layers=0) as model, kind(model, settings) as context:
        yield context


def known(context: Context) -> Geometry:
    found = geometry(context.model)
    assert isinstance(found, Geometry)
    return found


def computed_at(context: Context, sequence: int, position: int) -> Blob:
    context.clear(sequence)
    context.decode([Run(TOKENS, sequence, position, logits=True)])
    return kv_blob.parse(context.save(sequence), known(context).shape)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference, as a share of the largest number."""
    one, other = one.astype(np.float32), other.astype(np.float32)
    return float(np.abs(one - other).max() / np.abs(other).max())


# --- which models ----------------------------------------------------------------------------------------------------


def test_every_tiny_model_is_one_or_the_other() -> None:
    assert {*MOVABLE, *FIXED} == set(TINY_MODELS)


@pytest.mark.parametrize("name", MOVABLE)
def test_a_model_with_plain_rotary_attention_is_movable(name: str, files: dict[str, Path]) -> None:
    with opened(files[name]) as context:
        support = examine(context)
    assert support.reason == ""
    assert support.geometry is not None
    assert support.geometry.shape == KVShape(TINY_MODELS[name].layers, KV_HEADS * HEAD, KV_HEADS * HEAD)
    assert support.geometry.rope.head_size == HEAD
    assert support.geometry.rope.pairing == ("neighbours" if name.startswith("llama") else "halves")
    assert support.geometry.rope.rotated == (HEAD // 2 if name == "stablelm" else HEAD)


@pytest.mark.parametrize("name", FIXED)
def test_another_model_is_not_and_the_reason_is_told(name: str, files: dict[str, Path]) -> None:
    with opened(files[name]) as context:
        support = examine(context)
    assert support.geometry is None
    assert FIXED[name] in support.reason


def test_a_context_of_too_few_sequences_cannot_be_examined(files: dict[str, Path]) -> None:
    with opened(files["llama"], settings=ContextSettings(n_ctx=64, n_batch=8, n_seq_max=2)) as context:
        assert examine(context) == Support(None, "the context has fewer than 3 sequences")


def test_a_short_context_is_examined_too(files: dict[str, Path]) -> None:
    with opened(files["llama"], settings=ContextSettings(n_ctx=256, n_batch=8, n_seq_max=3)) as context:
        assert examine(context).geometry is not None


def test_the_real_small_model_is_movable(small_llm: Path) -> None:
    with opened(small_llm, settings=ContextSettings(n_ctx=256, n_batch=8, n_seq_max=3)) as context:
        support = examine(context)
    assert support.geometry is not None
    assert support.geometry.shape == KVShape(30, 192, 192)
    assert support.geometry.rope == rope.Rope("neighbours", 64, 64, rope.frequencies(64, 100_000.0))


def test_scaling_is_read_from_the_file(files: dict[str, Path]) -> None:
    turned = {}
    for name in MOVABLE[:4]:
        with Model(files[name], vocab_only=False, gpu_layers=0) as model:
            found = geometry(model)
            assert isinstance(found, Geometry)
            turned[name] = found.rope.frequencies
    plain = np.array(turned["llama"])
    assert np.allclose(turned["llama-linear"], plain / 4)
    assert np.allclose(turned["llama-factors"], plain / np.geomspace(1, 8, HEAD // 2, dtype=np.float32))
    assert len(set(turned.values())) == 4


def test_a_tensor_that_is_not_there_is_none_and_so_is_one_of_another_type(
    files: dict[str, Path], small_llm: Path, tmp_path: Path
) -> None:
    assert read_tensor(files["llama"], "rope_freqs.weight") is None
    assert read_tensor(small_llm, "blk.0.attn_k.weight") is None  # quantised
    factors = read_tensor(files["llama-factors"], "rope_freqs.weight")
    assert factors is not None
    assert np.array_equal(factors, np.geomspace(1, 8, HEAD // 2, dtype=np.float32))
    (tmp_path / "text.gguf").write_text("These are minutes of a meeting.")
    assert read_tensor(tmp_path / "text.gguf", "rope_freqs.weight") is None


# --- moving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOVABLE)
@pytest.mark.parametrize(("start", "end"), [(5, 1900), (1900, 5), (700, 701)])
def test_a_moved_passage_is_what_the_model_computes_there(
    name: str, start: int, end: int, files: dict[str, Path]
) -> None:
    with opened(files[name]) as context:
        passage, expected = computed_at(context, 0, start), computed_at(context, 1, end)
        found = known(context)
    place = kv_blob.new(found.shape, range(end, end + len(TOKENS)))
    move_into(place, passage, found.shape, found.rope)
    assert distance(passage.keys[0], expected.keys[0]) > 0.05
    assert distance(place.keys[0], expected.keys[0]) <= ROUNDING
    # Deeper layers have seen the other tokens of the passage, but these only by their distance.
    assert distance(place.keys, expected.keys) < 0.01
    assert distance(place.values, expected.values) < 0.01


@pytest.mark.parametrize("name", MOVABLE)
def test_a_rebuilt_state_comes_back_bit_for_bit(name: str, files: dict[str, Path]) -> None:
    with opened(files[name]) as context:
        state = computed_at(context, 0, 3)
        rebuilt = kv_blob.cut(state, known(context).shape, 3, 3 + len(TOKENS))
        context.clear(0)
        context.restore(0, rebuilt.buffer)
        assert np.array_equal(context.save(0), state.buffer)


# --- the self-test ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOVABLE)
def test_a_wrong_rotation_is_refused(name: str, files: dict[str, Path]) -> None:
    with opened(files[name]) as context:
        right = known(context)
        turns = right.rope
        frequencies = np.array(turns.frequencies)
        wrong = {
            "another base": replace(turns, frequencies=rope.frequencies(turns.rotated, 20_000.0)),
            "the other pairing": replace(turns, pairing="halves" if turns.pairing == "neighbours" else "neighbours"),
            "slower": replace(turns, frequencies=tuple(frequencies / 2)),
            "the slowest pair alone": replace(turns, frequencies=(*frequencies[:-1], frequencies[-1] * 2)),
            "the fastest pair alone": replace(turns, frequencies=(frequencies[0] * 1.01, *frequencies[1:])),
            "the other way round": replace(turns, frequencies=tuple(-frequencies)),
            "not at all": replace(turns, frequencies=(0.0,) * len(frequencies)),
            "fewer pairs": replace(turns, rotated=turns.rotated // 2, frequencies=tuple(frequencies[::2])),
        }
        for what, turned in wrong.items():
            assert "not turned" in prove(context, replace(right, rope=turned)), what
        assert prove(context, right) == ""


@pytest.mark.parametrize("shape", [KVShape(3, 32, 32), KVShape(2, 16, 32), KVShape(2, 32, 64)])
def test_a_wrong_shape_is_refused(shape: KVShape, files: dict[str, Path]) -> None:
    with opened(files["llama"]) as context:
        assert "state" in prove(context, replace(known(context), shape=shape))


@pytest.mark.parametrize("name", [*MOVABLE, "smollm3"])
def test_the_self_test_leaves_all_sequences_empty(name: str, files: dict[str, Path]) -> None:
    with opened(files[name]) as context:
        fresh = [context.save(sequence) for sequence in range(SETTINGS.n_seq_max)]
        examine(context)
        assert [context.end(sequence) for sequence in range(SETTINGS.n_seq_max)] == [0] * SETTINGS.n_seq_max
        for sequence, empty in enumerate(fresh):
            assert np.array_equal(context.save(sequence), empty)


def test_what_was_in_the_context_does_not_change_the_verdict(files: dict[str, Path]) -> None:
    with opened(files["qwen2"]) as context:
        computed_at(context, 0, 500)
        assert prove(context, known(context)) == ""


class Moody(Context):
    """Gives out values that depend on the position."""

    def save(self, sequence: int) -> Buffer:
        state = super().save(sequence)
        cells = kv_blob.parse(state, KVShape(2, KV_HEADS * HEAD, KV_HEADS * HEAD))
        cells.values[1] *= 1 + cells.positions[:, None].astype(np.float16) / 64
        return state


class Forgetful(Context):
    """Puts back another state than it was given."""

    def restore(self, sequence: int, state: Buffer) -> None:
        other = state.copy()
        other[-1] ^= 1
        super().restore(sequence, other)


class Refusing(Context):
    """Does not accept any state."""

    def restore(self, sequence: int, state: Buffer) -> None:
        super().restore(sequence, state[:-1])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        pytest.param(Moody, "its values depend on the position (layer 1)", id="values that depend on the position"),
        pytest.param(Forgetful, "a state that was taken out and put back is not the same", id="another state"),
        pytest.param(Refusing, "not accepted", id="no state is accepted"),
    ],
)
def test_a_context_that_does_not_keep_its_word_is_refused(
    kind: type[Context], reason: str, files: dict[str, Path]
) -> None:
    with opened(files["llama"], kind) as context:
        support = examine(context)
        assert support.geometry is None
        assert reason in support.reason
        assert [context.end(sequence) for sequence in range(SETTINGS.n_seq_max)] == [0] * SETTINGS.n_seq_max
