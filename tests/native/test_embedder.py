"""The sentence encoder, with the real small model."""

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.errors import ModelError
from edge_rag.native.embedder import BATCH_TOKENS, Embedder, batches_by_length
from edge_rag.store.models import ModelFolder

MODEL = "all-minilm-l6-v2"
TEXTS = [
    "Rinse the filter with warm water once a month and let it dry before you put it back.",
    "Filter",
    "The invoice is due within thirty days.",
    "",
    "The lighthouse keeper climbed the stairs every evening, lit the lamp, and looked out over the sea. " * 8,
]


@pytest.fixture(scope="module")
def files(model_folder: ModelFolder) -> tuple[Path, Path]:
    """The encoder and its tokenizer."""
    tokenizer = model_folder.spec(MODEL).tokenizer
    return model_folder.path(MODEL), model_folder.path(tokenizer)


@pytest.fixture(scope="module")
def embedder(files: tuple[Path, Path]) -> Embedder:
    """The real encoder."""
    return Embedder(*files, threads=2)


# --- vectors ---------------------------------------------------------------------------------------------------------


def test_loading_it_leaves_no_trace_in_the_home_folder(tmp_path: Path) -> None:
    places = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"} | places
    subprocess.run([sys.executable, "-c", "import edge_rag.native.embedder"], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []


def test_vectors_are_unit_vectors_one_for_each_text(embedder: Embedder) -> None:
    vectors = embedder.embed(TEXTS)
    assert vectors.shape == (len(TEXTS), embedder.dimensions) == (len(TEXTS), 384)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)


def test_no_texts_give_no_vectors(embedder: Embedder) -> None:
    assert embedder.embed([]).shape == (0, 384)


def test_a_text_has_nearly_the_same_vector_alone_and_in_company_at_its_own_place(embedder: Embedder) -> None:
    together = embedder.embed(TEXTS)
    alone = np.concatenate([embedder.embed([text]) for text in TEXTS])
    cosines = together @ alone.T
    assert cosines.diagonal().min() > 0.99
    assert (cosines.argmax(axis=1) == np.arange(len(TEXTS))).all()


def test_vectors_do_not_depend_on_the_order_of_the_texts(embedder: Embedder) -> None:
    forwards, backwards = embedder.embed(TEXTS), embedder.embed(TEXTS[::-1])[::-1]
    assert (forwards * backwards).sum(axis=1).min() > 0.99


def test_texts_of_several_batches_come_back_in_their_places(embedder: Embedder) -> None:
    texts = [TEXTS[4], TEXTS[1]] * 30
    vectors = embedder.embed(texts)
    assert (vectors[0::2] @ vectors[0]).min() > 0.99
    assert (vectors[1::2] @ vectors[1]).min() > 0.99
    assert (vectors[0::2] @ vectors[1]).max() < 0.9


def test_a_very_long_text_is_read_up_to_its_limit(embedder: Embedder) -> None:
    long = "filter water pump valve " * 4200
    assert len(long) > 100_000
    full, shorter = embedder.embed([long]), embedder.embed([long[: len(long) // 2]])
    assert np.array_equal(full, shorter)


def test_five_hundred_words_are_within_the_limit(embedder: Embedder) -> None:
    alone, followed = embedder.embed(["filter " * 300]), embedder.embed(["filter " * 300 + "tax return " * 100])
    assert (alone @ followed.T).item() < 0.99


def test_a_paraphrase_is_nearer_than_another_subject(embedder: Embedder) -> None:
    question, paraphrase, other = embedder.embed(
        [
            "How do I clean the coffee machine?",
            "Instructions for washing the espresso maker",
            "The tax return must be filed by the end of July.",
        ]
    )
    assert question @ paraphrase > question @ other + 0.3


def test_lone_surrogates_are_read_as_something(embedder: Embedder) -> None:
    assert np.linalg.norm(embedder.embed(["caf\udce9 filter"])[0]) == pytest.approx(1, abs=1e-5)


def test_threads_may_share_an_embedder(embedder: Embedder) -> None:
    alone = embedder.embed(TEXTS[:3])
    with ThreadPoolExecutor(3) as pool:
        at_once = list(pool.map(lambda _: embedder.embed(TEXTS[:3]), range(6)))
    assert all(np.array_equal(vectors, alone) for vectors in at_once)


# --- broken files ----------------------------------------------------------------------------------------------------


def test_a_missing_model_is_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        Embedder(tmp_path / "nowhere.onnx", files[1], threads=1)
    assert caught.value.field == str(tmp_path / "nowhere.onnx")


def test_a_missing_tokenizer_is_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        Embedder(files[0], tmp_path / "nowhere.json", threads=1)
    assert caught.value.field == str(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda whole: whole[:100_000], id="truncated"),
        pytest.param(lambda _: b"no model", id="text"),
        pytest.param(lambda _: b"", id="empty"),
    ],
)
def test_a_damaged_model_is_refused(files: tuple[Path, Path], tmp_path: Path, content) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(content(files[0].read_bytes()))
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        Embedder(broken, files[1], threads=1)
    assert caught.value.field == str(broken)
    assert caught.value.remedy


def test_a_damaged_tokenizer_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"version": "1.0"')
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        Embedder(files[0], broken, threads=1)
    assert caught.value.field == str(broken)


# --- batches ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, BATCH_TOKENS + 100), max_size=60))
def test_each_text_is_in_one_batch_and_no_batch_is_too_large(lengths: list[int]) -> None:
    batches = list(batches_by_length(lengths))
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[p] for p in batch) <= BATCH_TOKENS for batch in batches)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=60))
def test_batches_hold_texts_of_similar_length_and_are_as_full_as_they_may_be(lengths: list[int]) -> None:
    batches = [[lengths[place] for place in batch] for batch in batches_by_length(lengths)]
    assert [length for batch in batches for length in batch] == sorted(lengths)
    for batch, following in itertools.pairwise(batches):
        assert (len(batch) + 1) * following[0] > BATCH_TOKENS
