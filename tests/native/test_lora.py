"""Adapters over a tiny model: what wearing one changes, and what cannot be worn."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_rag.errors import ModelError
from edge_rag.native.llama import Context, ContextSettings, LoRA, Model, Run
from tests.native.tiny_loras import write_tiny_lora
from tests.native.tiny_models import write_tiny_model
from tests.runtime.serving import Toy

TOKENS = tuple(range(5, 25))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with Toy(write_tiny_model("llama", folder), gpu_layers=0) as model:
        yield model


@pytest.fixture
def context(model: Model) -> Iterator[Context]:
    with Context(model, ContextSettings(n_ctx=256, n_batch=64, n_seq_max=2)) as context:
        yield context


@pytest.fixture
def adapter(model: Model, folder: Path) -> Iterator[LoRA]:
    with LoRA(model, write_tiny_lora(folder)) as adapter:
        yield adapter


def logits(context: Context, *, start: int = 0) -> np.ndarray:
    """Logits behind TOKENS, of which those from `start` on are read now."""
    context.clear(0, start)
    [place] = context.decode([Run(TOKENS[start:], 0, start, logits=True)])
    return context.logits(place)


def test_what_is_worn_changes_what_is_said_until_it_is_taken_off(context: Context, adapter: LoRA) -> None:
    plain = logits(context)
    context.wear(adapter)
    assert np.abs(logits(context) - plain).max() > 0.1
    context.wear(None)
    assert np.array_equal(logits(context), plain)


def test_two_adapters_say_different_things(context: Context, adapter: LoRA, model: Model, folder: Path) -> None:
    context.wear(adapter)
    one = logits(context)
    with LoRA(model, write_tiny_lora(folder, seed=2)) as other:
        context.wear(other)
        assert np.abs(logits(context) - one).max() > 0.1
        context.wear(None)


def test_what_was_read_before_stays_as_it_was_computed(context: Context, adapter: LoRA) -> None:
    logits(context)
    before = context.save(0)
    context.wear(adapter)
    late = logits(context, start=12)
    context.clear(0, 12)
    context.wear(None)
    context.decode([Run(TOKENS[12:], 0, 12)])
    assert np.array_equal(context.save(0), before)
    context.wear(adapter)
    assert np.abs(logits(context) - late).max() > 1e-3  # worn from the first token on it is something else


def test_a_context_made_anew_wears_nothing(context: Context, adapter: LoRA) -> None:
    plain = logits(context)
    context.wear(adapter)
    context.renew()
    assert np.array_equal(logits(context), plain)
    context.wear(adapter)
    assert np.abs(logits(context) - plain).max() > 0.1
    context.wear(None)


def test_its_size_is_that_of_its_file(adapter: LoRA) -> None:
    assert adapter.size == adapter.path.stat().st_size > 0


def test_a_file_that_is_missing_torn_or_of_another_shape_is_refused_by_name(model: Model, folder: Path) -> None:
    whole = write_tiny_lora(folder, seed=3)
    torn = folder / "torn.gguf"
    torn.write_bytes(whole.read_bytes()[:-2000])
    text = folder / "text.gguf"
    text.write_text("no adapter at all")
    wide = write_tiny_lora(folder, seed=4, forward=32)
    other = write_tiny_lora(folder, seed=5, arch="qwen2")
    for path in (folder / "missing.gguf", torn, text, wide, other, model.path):
        with pytest.raises(ModelError) as refused:
            LoRA(model, path)
        assert refused.value.field == str(path)
