"""llama.cpp through a real small model: tokens, decoding, state, stopping, sampling."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_rag.errors import Cancelled, EngineError, ModelError
from edge_rag.native.llama import Context, ContextSettings, Model, Run, Sampler, library
from edge_rag.records import Sampling

THREADS = 1  # two would spin against whatever else runs on a small machine
N_BATCH = 64
STORY = "The old lighthouse keeper climbed the stairs every evening. At the top he lit the lamp and looked at the sea"


@pytest.fixture(scope="module")
def model(small_llm: Path) -> Iterator[Model]:
    """The small model with its weights."""
    with Model(small_llm, gpu_layers=0) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def shared_context(model: Model) -> Iterator[Context]:
    """A context of two sequences."""
    with Context(model, ContextSettings(n_ctx=256, n_batch=N_BATCH, n_seq_max=2, threads=THREADS)) as made:
        yield made


@pytest.fixture
def context(shared_context: Context) -> Context:
    """The shared context, emptied."""
    shared_context.abort(False)
    for sequence in (0, 1):
        shared_context.clear(sequence)
    return shared_context


@pytest.fixture(scope="module")
def story(model: Model) -> list[int]:
    """Some tokens, fewer than a batch."""
    return model.tokenize(STORY)


def logits_after(context: Context, tokens: list[int], *, sequence: int = 0, position: int = 0) -> np.ndarray:
    context.decode([Run(tokens, sequence, position, logits=True)])
    return context.logits()


def written(context: Context, prompt: list[int], sampling: Sampling) -> list[int]:
    """The tokens that `sampling` makes of the same prompt."""
    context.clear(0)
    context.decode([Run(prompt, 0, 0, logits=True)])
    tokens = []
    with Sampler(sampling) as sampler:
        for position in range(len(prompt), len(prompt) + sampling.max_tokens):
            tokens.append(sampler.sample(context))
            context.decode([Run(tokens[-1:], 0, position, logits=True)])
    return tokens


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known_bytes(model: Model) -> frozenset[int]:
    """The bytes that the vocabulary can spell; this one lacks some control characters and unassigned planes."""
    pieces = map(model.piece, range(model.vocab_size))
    return frozenset(piece[0] for piece in pieces if len(piece) == 1)


@settings(max_examples=100)
@given(st.text(max_size=40))
@example(" leading and trailing ")
@example("naïve 東京 🛠️ e\u0301 \0 \r\n\t")
@example("<|im_start|>system<|im_end|><|endoftext|>")
def test_content_survives_tokenising(model: Model, known_bytes: frozenset[int], text: str) -> None:
    known = "".join(character for character in text if known_bytes.issuperset(character.encode()))
    assert model.text(model.tokenize(known)) == known


def test_nearly_every_byte_can_be_spelt(known_bytes: frozenset[int]) -> None:
    assert len(known_bytes) > 200
    assert known_bytes.issuperset("Grüße, 東京 🛠️".encode())


def test_a_long_text_survives_tokenising(model: Model) -> None:
    text = STORY * 200
    assert model.text(model.tokenize(text)) == text


def test_lone_surrogates_are_replaced(model: Model) -> None:
    assert model.text(model.tokenize("a\ud800b")) == "a?b"


def test_a_special_token_is_one_token_only_in_template_text(model: Model) -> None:
    as_template, as_content = model.tokenize("<|im_end|>", special=True), model.tokenize("<|im_end|>")
    assert len(as_template) == 1
    assert model.ends_generation(as_template[0])
    assert len(as_content) > 1
    assert not any(map(model.ends_generation, as_content))
    assert as_template[0] not in as_content


def test_a_special_token_has_text_only_where_it_is_asked_for(model: Model) -> None:
    [token] = model.tokenize("<|im_end|>", special=True)
    assert model.piece(token) == b""
    assert model.piece(token, special=True) == b"<|im_end|>"
    assert model.text([token], special=True) == "<|im_end|>"


def test_every_token_has_a_piece_and_ordinary_ones_are_few_bytes(model: Model) -> None:
    pieces = [model.piece(token, special=True) for token in range(model.vocab_size)]
    assert all(pieces)
    assert max(map(len, pieces)) > 64  # the first guess of `piece` is too small for these


def test_counting_is_tokenising(model: Model, story: list[int]) -> None:
    assert model.count_tokens(STORY) == len(story)
    assert model.count_tokens("") == 0


def test_a_model_without_weights_counts_the_same(model: Model, small_llm: Path) -> None:
    with Model(small_llm, vocab_only=True) as vocabulary:
        for text in (STORY, "<|im_end|>", "東京 🛠️", ""):
            assert vocabulary.tokenize(text) == model.tokenize(text)
        assert vocabulary.chat_template == model.chat_template


# --- the model -------------------------------------------------------------------------------------------------------


def test_the_model_describes_itself(model: Model, small_llm: Path) -> None:
    assert model.description.startswith("llama")
    assert model.n_ctx_train == 8192
    assert model.vocab_size == 49152
    assert 0 < model.size < small_llm.stat().st_size
    assert model.token_text("bos") == "<|im_start|>"
    assert model.token_text("eos") == "<|im_end|>"
    assert model.bos is None
    assert "im_start" in model.chat_template


def test_metadata_are_text_and_missing_ones_are_empty(model: Model) -> None:
    assert model.metadata("general.architecture") == "llama"
    assert float(model.metadata("llama.rope.freq_base")) == 100_000
    assert model.metadata("llama.no.such.key") == ""


def test_versions_name_the_binding() -> None:
    assert library.versions()["llama_cpp_python"] == "0.3.36"


def test_a_closed_model_and_context_may_be_closed_again(small_llm: Path) -> None:
    with Model(small_llm, vocab_only=True) as vocabulary:
        vocabulary.close()
    assert vocabulary.handle is None


@pytest.mark.parametrize("vocab_only", [pytest.param(True, id="vocabulary"), pytest.param(False, id="weights")])
def test_a_missing_file_is_named(tmp_path: Path, vocab_only: bool) -> None:
    with pytest.raises(ModelError, match="no such file") as caught:
        Model(tmp_path / "nowhere.gguf", vocab_only=vocab_only)
    assert caught.value.field == str(tmp_path / "nowhere.gguf")


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        Model(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"These are minutes of a meeting.\n" * 100, id="text"),
        pytest.param(b"", id="empty file"),
        pytest.param(b"GGUF", id="only the magic"),
        pytest.param(b"GGUF\x03\0\0\0" + b"\xff" * 64, id="nonsense behind the magic"),
    ],
)
def test_a_file_that_is_no_gguf_is_refused_with_its_name_and_a_cause(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "minutes.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        Model(path)
    assert caught.value.field == str(path)
    assert caught.value.remedy
    assert "no reason given" not in caught.value.message


def test_a_text_file_is_called_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "minutes.gguf"
    path.write_text("These are minutes of a meeting.\n" * 100)
    with pytest.raises(ModelError, match="not a GGUF file"):
        Model(path)


def test_a_truncated_model_is_called_incomplete(small_llm: Path, tmp_path: Path) -> None:
    path = tmp_path / "truncated.gguf"
    with small_llm.open("rb") as whole, path.open("wb") as part:
        part.write(whole.read(5_000_000))
    with pytest.raises(ModelError, match="the file is incomplete") as caught:
        Model(path)
    assert caught.value.field == str(path)


def test_a_model_may_have_any_name(small_llm: Path, tmp_path: Path) -> None:
    path = tmp_path / "modèle 東京.gguf"
    path.symlink_to(small_llm)
    with Model(path, vocab_only=True) as vocabulary:
        assert vocabulary.count_tokens("filter") > 0


def test_what_was_complained_of_before_is_not_blamed_on_the_next(tmp_path: Path) -> None:
    text = tmp_path / "text.gguf"
    text.write_text("text" * 100)
    with pytest.raises(ModelError, match="magic"):
        Model(text)
    with pytest.raises(ModelError, match="no such file"):
        Model(tmp_path / "nowhere.gguf")
    assert library.complaints() == ""


# --- decoding --------------------------------------------------------------------------------------------------------


def test_the_context_has_the_cells_it_was_asked_for(context: Context) -> None:
    assert context.n_ctx == 256


def test_logits_are_of_the_whole_vocabulary_and_a_copy(context: Context, story: list[int]) -> None:
    first = logits_after(context, story)
    kept = first.copy()
    assert first.shape == (context.model.vocab_size,)
    assert not np.array_equal(logits_after(context, story[:1], position=len(story)), kept)
    assert np.array_equal(first, kept)


def test_decoding_again_gives_the_same_logits(context: Context, story: list[int]) -> None:
    first = logits_after(context, story)
    context.clear(0)
    assert np.array_equal(logits_after(context, story), first)


def test_what_was_read_before_matters(context: Context, story: list[int]) -> None:
    alone = logits_after(context, story[-3:])
    context.clear(0)
    assert not np.allclose(logits_after(context, story)[:100], alone[:100], atol=0.1)


def test_clearing_the_end_keeps_the_beginning(context: Context, story: list[int]) -> None:
    context.decode([Run(story[:10], 0, 0, logits=True)])
    direct = logits_after(context, story[10:], position=10)
    context.clear(0, 10)
    assert np.array_equal(logits_after(context, story[10:], position=10), direct)


def test_a_hole_in_a_sequence_is_an_engine_error(context: Context, story: list[int]) -> None:
    context.decode([Run(story, 0, 0, logits=True)])
    with pytest.raises(EngineError, match="position 100"):
        context.decode([Run(story, 0, 100, logits=True)])


def test_a_full_context_is_an_engine_error_and_works_when_cleared(context: Context, story: list[int]) -> None:
    first = logits_after(context, story)

    def decode_until_full() -> None:
        for position in range(len(story), 2 * context.n_ctx, N_BATCH):
            context.decode([Run((story * 4)[:N_BATCH], 0, position, logits=True)])

    with pytest.raises(EngineError, match="no free KV cells"):
        decode_until_full()
    context.clear(0)
    assert np.array_equal(logits_after(context, story), first)


def test_a_batch_of_another_size_is_an_engine_error(context: Context) -> None:
    too_many, half = [504] * (N_BATCH + 1), N_BATCH // 2
    together = [Run(too_many[:half], 0, 0), Run(too_many[half:], 1, 0)]
    for runs in ([Run(too_many, 0, 0, logits=True)], together):
        with pytest.raises(EngineError, match=f"1 to {N_BATCH} tokens, not {N_BATCH + 1}"):
            context.decode(runs)
    with pytest.raises(EngineError, match=f"1 to {N_BATCH} tokens, not 0"):
        context.decode([])


def test_a_run_without_tokens_is_an_engine_error(context: Context) -> None:
    for runs in ([Run([], 0, 0, logits=True)], [Run([504], 0, 0), Run([], 1, 0, logits=True)]):
        with pytest.raises(EngineError, match="a run must hold at least one token"):
            context.decode(runs)


@pytest.mark.parametrize("sequence", [-1, 2])
def test_a_sequence_that_does_not_exist_is_an_engine_error(context: Context, sequence: int) -> None:
    calls = [
        lambda: context.decode([Run([504], sequence, 0, logits=True)]),
        lambda: context.decode([Run([504], 0, 0), Run([504], sequence, 0)]),
        lambda: context.clear(sequence),
        lambda: context.share(0, sequence),
        lambda: context.share(sequence, 0),
        lambda: context.save(sequence),
        lambda: context.restore(sequence, np.zeros(16, dtype=np.uint8)),
    ]
    for call in calls:
        with pytest.raises(EngineError, match=f"no sequence {sequence}"):
            call()


# --- several sequences -----------------------------------------------------------------------------------------------


def test_a_sequence_ends_behind_its_last_cell(context: Context, story: list[int]) -> None:
    assert context.end(0) == 0
    context.decode([Run(story[:5], 0, 0, logits=True)])
    assert context.end(0) == 5
    context.decode([Run(story[:5], 1, 20, logits=True)])
    assert (context.end(0), context.end(1)) == (5, 25)
    context.clear(0, 3)
    assert context.end(0) == 3


def test_runs_of_one_batch_see_only_their_own_sequence(context: Context, story: list[int]) -> None:
    context.decode([Run(story[:6], 0, 0, logits=True)])
    direct = logits_after(context, story[6:7], position=6)
    context.clear(0)
    context.decode([Run(story[8:13], 1, 0), Run(story[:6], 0, 0)])
    assert (context.end(0), context.end(1)) == (6, 5)
    together = logits_after(context, story[6:7], position=6)
    assert np.allclose(together, direct, atol=0.5)  # another batch rounds differently
    context.clear(1)
    context.decode([Run(story[8:13], 1, 0, logits=True)])
    other = logits_after(context, story[6:7], sequence=1, position=5)
    assert not np.allclose(other, direct, atol=0.5)


def test_a_shared_beginning_is_seen_and_can_go_on_by_itself(context: Context, story: list[int]) -> None:
    context.decode([Run(story[:10], 0, 0, logits=True)])
    context.share(0, 1, 0, 6)
    assert (context.end(0), context.end(1)) == (10, 6)
    on_its_own = logits_after(context, story[12:], sequence=1, position=6)
    context.clear(0)
    assert context.end(1) > 6, "cells that another sequence holds too are not freed"
    context.clear(1)
    context.decode([Run(story[:10], 0, 0, logits=True)])
    context.clear(0, 6)
    assert np.array_equal(logits_after(context, story[12:], position=6), on_its_own)


def test_cells_are_taken_out_of_the_middle_and_put_back(context: Context, story: list[int]) -> None:
    context.decode([Run(story[:10], 0, 0, logits=True)])
    whole = context.save(0)
    context.share(0, 1, 4, 7)
    context.clear(0, 4, 7)
    assert len(context.save(0)) < len(whole)
    assert context.end(0) == 10
    context.share(1, 0, 4, 7)
    context.clear(1)
    assert np.array_equal(context.save(0), whole)


# --- state -----------------------------------------------------------------------------------------------------------


def test_a_saved_sequence_goes_on_bit_for_bit_after_it_was_restored(context: Context, story: list[int]) -> None:
    context.decode([Run(story[:12], 0, 0, logits=True)])
    state = context.save(0)
    direct = logits_after(context, story[12:], position=12)
    context.clear(0)
    context.restore(0, state)
    assert np.array_equal(logits_after(context, story[12:], position=12), direct)
    context.clear(0, 12)
    assert np.array_equal(context.save(0), state)


def test_a_state_can_be_restored_into_another_sequence(context: Context, story: list[int]) -> None:
    context.decode([Run(story[:12], 0, 0, logits=True)])
    state = context.save(0)
    direct = logits_after(context, story[12:], position=12)
    context.clear(0)
    context.restore(1, state)
    assert np.array_equal(logits_after(context, story[12:], sequence=1, position=12), direct)


def test_restoring_replaces_what_was_there(context: Context, story: list[int]) -> None:
    context.decode([Run(story[:5], 0, 0, logits=True)])
    state = context.save(0)
    context.decode([Run(story[5:], 0, 5, logits=True)])
    context.restore(0, state)
    assert np.array_equal(context.save(0), state)


def with_bytes(state: bytes, place: int, value: bytes) -> bytes:
    return state[:place] + value + state[place + len(value) :]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda state: state[:-1], id="last byte missing"),
        pytest.param(lambda state: state[: len(state) // 2], id="second half missing"),
        pytest.param(lambda state: state[:9], id="only the beginning"),
        pytest.param(lambda _: b"", id="empty"),
        pytest.param(lambda state: state + b"\0", id="a byte too many"),
        pytest.param(lambda state: bytes(len(state)), id="zeros"),
        pytest.param(lambda state: with_bytes(state, 0, b"GGUF"), id="another magic"),
        pytest.param(lambda state: with_bytes(state, 8, b"\2"), id="another number of streams"),
        pytest.param(lambda state: with_bytes(state, 12, b"\xff\xff\xff\x7f"), id="more cells than there are"),
        pytest.param(lambda state: with_bytes(state, 20, b"\7"), id="a cell of several sequences"),
    ],
)
def test_a_damaged_state_is_refused_and_leaves_the_sequence_empty(context, story, damage) -> None:
    empty = context.save(0)
    first = logits_after(context, story)
    state = context.save(0).tobytes()
    with pytest.raises(EngineError, match="not accepted"):
        context.restore(0, np.frombuffer(damage(state), dtype=np.uint8))
    assert np.array_equal(context.save(0), empty)
    assert np.array_equal(logits_after(context, story), first)


# --- stopping --------------------------------------------------------------------------------------------------------


def test_a_decode_is_stopped_from_another_thread(context: Context, story: list[int]) -> None:
    first = logits_after(context, story)
    decoding = threading.Event()

    def stop() -> None:
        decoding.wait()
        context.abort(True)

    def decode_until_stopped() -> None:
        batch = (story * 4)[:N_BATCH]
        for _ in range(50):
            context.clear(0)
            decoding.set()
            context.decode([Run(batch, 0, 0, logits=True)])

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(Cancelled):
        decode_until_stopped()
    stopper.join()
    context.abort(False)
    context.clear(0)
    assert np.array_equal(logits_after(context, story), first)


def test_after_abort_every_decode_is_cancelled_until_it_is_allowed_again(context: Context, story: list[int]) -> None:
    context.abort(True)
    for _ in range(2):
        with pytest.raises(Cancelled):
            context.decode([Run(story, 0, 0, logits=True)])
        context.clear(0)
    context.abort(False)
    context.decode([Run(story, 0, 0, logits=True)])


# --- sampling --------------------------------------------------------------------------------------------------------

GREEDY = Sampling(max_tokens=12)


def test_greedy_takes_the_likeliest_token(context: Context, story: list[int]) -> None:
    likeliest = int(logits_after(context, story).argmax())
    with Sampler(GREEDY) as sampler:
        assert sampler.sample(context) == likeliest


def test_greedy_writes_the_same_each_time(context: Context, story: list[int]) -> None:
    assert written(context, story, GREEDY) == written(context, story, GREEDY)


def test_equal_seeds_draw_equal_tokens(context: Context, story: list[int]) -> None:
    warm = Sampling(max_tokens=12, temperature=1.0, seed=7)
    assert written(context, story, warm) == written(context, story, warm)


def test_different_seeds_draw_different_tokens(context: Context, story: list[int]) -> None:
    drawn = {tuple(written(context, story, Sampling(max_tokens=6, temperature=1.0, seed=seed))) for seed in range(4)}
    assert len(drawn) > 1


@pytest.mark.parametrize(
    "narrow",
    [
        pytest.param(Sampling(max_tokens=12, temperature=1.0, min_p=1.0, seed=3), id="min_p 1"),
        pytest.param(Sampling(max_tokens=12, temperature=1.0, top_p=1e-6, seed=3), id="tiny top_p"),
        pytest.param(Sampling(max_tokens=12, temperature=1e-3, seed=3), id="tiny temperature"),
    ],
)
def test_sampling_that_leaves_one_token_is_greedy(context: Context, story: list[int], narrow: Sampling) -> None:
    assert written(context, story, narrow) == written(context, story, GREEDY)


@pytest.mark.parametrize("limit", [pytest.param("top_p", id="top_p"), pytest.param("min_p", id="min_p")])
def test_draws_stay_within_the_limit(context: Context, story: list[int], limit: str) -> None:
    logits = logits_after(context, story[:2]).astype(np.float64)
    chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    falling = np.sort(chances)[::-1]
    smallest = falling[int(np.searchsorted(falling.cumsum(), 0.5))] if limit == "top_p" else 0.3 * falling[0]
    drawn = set()
    for seed in range(60):
        with Sampler(Sampling(temperature=1.5, seed=seed, **{limit: 0.5 if limit == "top_p" else 0.3})) as sampler:
            drawn.add(sampler.sample(context))
    assert len(drawn) > 1
    assert min(chances[list(drawn)]) >= smallest * 0.999
