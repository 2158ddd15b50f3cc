"""The tiny models of other tests: llama.cpp takes each of them for what it is meant to be."""

from collections.abc import Callable
from pathlib import Path

import llama_cpp.llama_cpp as lib
import numpy as np
import pytest

from edge_rag.native import kv_blob
from edge_rag.native.kv_blob import KVShape
from edge_rag.native.llama import Context, ContextSettings, Model, Run
from tests.native.tiny_models import HEAD, KV_HEADS, TINY_MODELS, VOCABULARY, write_tiny_model

TOKENS = [3, 41, 5, 26, 53, 5]
SETTINGS = ContextSettings(n_ctx=64, n_batch=8, n_seq_max=2)

MARKS: dict[str, Callable[[Model], bool]] = {
    "llama": lambda model: lib.llama_model_rope_type(model.handle) == lib.LLAMA_ROPE_TYPE_NORM,
    "llama-linear": lambda model: lib.llama_model_rope_freq_scale_train(model.handle) == 0.25,
    "llama-yarn": lambda model: lib.llama_model_rope_freq_scale_train(model.handle) == 0.25,
    "qwen2": lambda model: lib.llama_model_rope_type(model.handle) == lib.LLAMA_ROPE_TYPE_NEOX,
    "stablelm": lambda model: lib.llama_model_rope_type(model.handle) == lib.LLAMA_ROPE_TYPE_NEOX,
    "gpt2": lambda model: lib.llama_model_rope_type(model.handle) == lib.LLAMA_ROPE_TYPE_NONE,
    "mamba": lambda model: bool(lib.llama_model_is_recurrent(model.handle)),
    "gemma2": lambda model: lib.llama_model_n_swa(model.handle) == 32,
    "qwen2vl": lambda model: lib.llama_model_rope_type(model.handle) == lib.LLAMA_ROPE_TYPE_MROPE,
}


def logits(path: Path, tokens: list[int], *, position: int = 0) -> np.ndarray:
    with Model(path, gpu_layers=0) as model, Context(model, SETTINGS) as context:
        context.decode([Run(tokens, 0, position, logits=True)])
        return context.logits()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_tiny_model_loads_and_answers_differently_to_different_tokens(name: str, tmp_path: Path) -> None:
    path = write_tiny_model(name, tmp_path)
    first = logits(path, TOKENS)
    assert first.shape == (VOCABULARY,)
    assert np.isfinite(first).all()
    assert not np.allclose(first, logits(path, TOKENS[::-1]))


@pytest.mark.parametrize("name", MARKS)
def test_a_tiny_model_is_of_its_kind(name: str, tmp_path: Path) -> None:
    with Model(write_tiny_model(name, tmp_path), gpu_layers=0) as model:
        assert MARKS[name](model)


@pytest.mark.parametrize("name", ["llama-factors", "llama-linear", "llama-yarn"])
def test_a_scaled_rotation_changes_the_answer(name: str, tmp_path: Path) -> None:
    plain = logits(write_tiny_model("llama", tmp_path), TOKENS)
    assert not np.allclose(plain, logits(write_tiny_model(name, tmp_path), TOKENS))


def test_the_fourth_layer_of_smollm3_turns_no_keys(tmp_path: Path) -> None:
    kinds = KVShape(TINY_MODELS["smollm3"].layers, KV_HEADS * HEAD, KV_HEADS * HEAD)
    with Model(write_tiny_model("smollm3", tmp_path), gpu_layers=0) as model, Context(model, SETTINGS) as context:
        context.decode([Run([11], 0, 0, logits=True)])
        context.decode([Run([11], 1, 9, logits=True)])
        near, far = (kv_blob.parse(context.save(sequence), kinds).keys.astype(np.float32) for sequence in (0, 1))
    distances = np.abs(near - far).max(axis=(1, 2))
    assert (distances[:3] > 0.1).all()
    assert distances[3] < 0.01


def test_the_same_weights_are_written_every_time(tmp_path: Path) -> None:
    first = write_tiny_model("llama", tmp_path).read_bytes()
    assert write_tiny_model("llama", tmp_path).read_bytes() == first
