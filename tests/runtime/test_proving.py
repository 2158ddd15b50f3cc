"""The proof of an export, with a tiny adapter that changes much: what the trainer would say is computed by hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from edge_rag.errors import ModelError
from edge_rag.learning.job import Proof
from edge_rag.native.llama import Model
from edge_rag.runtime import proving
from edge_rag.runtime.proving import prove
from edge_rag.runtime.requests import Desk
from tests.learning.toy_jobs import flat
from tests.native.tiny_loras import write_tiny_lora
from tests.native.tiny_models import write_tiny_model
from tests.runtime.serving import PREFIX, Running, Toy, running

CONTEXTS = [list(PREFIX), [*PREFIX, *range(5, 20)]]
TOKENS = [[3, 60, 61, 8, 9], [4, 60, 61]]
STARTS = [2, 2]  # the last token of each question
TOP = 8
EXACT = 1e-6  # nats between logits that were computed in the same way


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


def logits(served: Running, adapter: str) -> Any:
    """The logits of each row, [rows, vocabulary]: contexts without the adapter, everything behind them with it."""

    def compute(desk: Desk) -> Any:
        assert desk.pager
        rows = []
        with desk.pager.held(adapter):
            for context, tokens, start in zip(CONTEXTS, TOKENS, STARTS, strict=True):
                for end in range(start + 1, len(tokens) + 1):
                    desk.read(context, 0)
                    place = desk.of(desk.sequence, adapter).read(tokens[:end], len(context)).place
                    rows.append(desk.context.logits(place))
                    desk.clear()
        return np.stack(rows)

    return served.on_thread(compute)


def likeliest(rows: Any) -> tuple[Any, Any, Any]:
    ids = np.argsort(-rows)[:, :TOP].astype(np.int32)
    return (
        ids,
        np.take_along_axis(rows, ids, 1),
        np.logaddexp.reduce(rows.astype(np.float64), axis=1).astype(np.float32),
    )


def proof(served: Running, adapter: str) -> Proof:
    return Proof(
        *flat(CONTEXTS),
        *flat(TOKENS),
        np.array(STARTS, np.int32),
        np.array([0, 3, 4], np.int64),
        *likeliest(logits(served, "")),
        *likeliest(logits(served, adapter)),
    )


def test_an_adapter_that_says_what_it_said_in_training_is_proved(served: Running, names: tuple[str, str]) -> None:
    for name in names:
        assert prove(served.engine, name, proof(served, name)) == ""
    served.settle()


def test_contexts_are_read_without_the_adapter(
    served: Running, names: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[float]] = []
    monkeypatch.setattr(proving, "refuted", lambda *both: told.extend(both) or "")
    prove(served.engine, names[0], proof(served, names[0]))
    without, worn = told
    assert len(without) == len(worn) == 4
    assert max(*without, *worn) < EXACT


def test_another_adapter_is_refuted(served: Running, names: tuple[str, str]) -> None:
    one, two = names
    assert prove(served.engine, two, proof(served, one)).startswith("llama.cpp and torch differ by ")


def test_an_adapter_that_does_nothing_is_refuted(served: Running, names: tuple[str, str]) -> None:
    made = proof(served, names[0])
    idle = replace(made, adapter_ids=made.base_ids, adapter_logits=made.base_logits, adapter_norms=made.base_norms)
    assert prove(served.engine, names[0], idle) != ""


def test_one_that_cannot_be_loaded_is_an_error_and_nothing_is_left(served: Running, names: tuple[str, str]) -> None:
    made = proof(served, names[0])
    with pytest.raises(ModelError):
        prove(served.engine, "0" * 64, made)
    served.settle()
    assert served.engine.pager is not None
    assert not served.engine.pager._held
