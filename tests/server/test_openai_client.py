"""OpenAI's own Python client against the whole: a socket, the server, the small models."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai.types.chat import ChatCompletion

from edge_rag.config import Settings
from edge_rag.runtime.answering import NOTHING_FOUND
from edge_rag.runtime.rag import EdgeRAG
from tests.conftest import EMBEDDER, SMALL_LLM
from tests.runtime.serving import small_library
from tests.server.openai_running import Served, openai_served

TEXTS = {
    "pump.md": "# Pump\n\nThe pump of the greenhouse was made in Tartu in 1987. It lifts forty litres a minute.\n",
    "roof.md": "# Roof\n\nThe roof of the barn is covered with slate. It was mended by Anna Kask after the storm.\n",
}
QUESTION = "Where was the pump of the greenhouse made?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def rag(small_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EdgeRAG]:
    changes = {"engine__n_ctx": 768, "answering__max_tokens": 12, "retrieval__min_similarity": 0.3}
    with small_library(tmp_path_factory.mktemp("data"), small_settings, **changes) as library:
        yield library


@pytest.fixture(scope="module")
def served(rag: EdgeRAG, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with openai_served(rag, tmp_path_factory.mktemp("s") / "e.sock") as running:
        for name, text in TEXTS.items():
            running.openai.files.create(file=(name, text.encode()), purpose="user_data")
        yield running


def ask(served: Served, **options: Any) -> ChatCompletion:
    reply = served.openai.chat.completions.create(model=SMALL_LLM, messages=MESSAGES, **options)
    assert isinstance(reply, ChatCompletion)
    return reply


def extra(reply: Any, name: str) -> Any:
    return reply.model_extra[name]


def test_an_uploaded_file_is_in_the_library(served: Served, rag: EdgeRAG) -> None:
    files = {file.filename: file for file in served.openai.files.list()}
    assert set(files) == set(TEXTS)
    assert files["pump.md"].bytes == len(TEXTS["pump.md"].encode())
    again = served.openai.files.create(file=("pump.md", TEXTS["pump.md"].encode()), purpose="assistants")
    assert again.id == files["pump.md"].id
    assert len(rag.documents()) == len(TEXTS)


def test_a_question_is_answered_from_the_files(served: Served) -> None:
    reply = ask(served)
    assert reply.choices[0].message.content
    sources = extra(reply, "sources")
    assert sources[0]["n"] == 1
    assert {source["file_id"] for source in sources} <= {file.id for file in served.openai.files.list()}
    assert any("Tartu" in source["text"] for source in sources)
    for citation in extra(reply, "citations"):
        assert citation["passage"] == sources[citation["n"] - 1]
    assert reply.usage is not None
    assert 0 < reply.usage.completion_tokens <= 12


def test_the_second_time_most_of_the_prompt_comes_from_the_cache(served: Served) -> None:
    ask(served)
    usage = ask(served).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) > usage.prompt_tokens / 2


def test_a_stream_says_the_same(served: Served) -> None:
    whole = ask(served)
    stream = served.openai.chat.completions.create(
        model=SMALL_LLM, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == (
        whole.choices[0].message.content
    )
    assert extra(chunks[0], "sources") == extra(whole, "sources")
    assert extra(chunks[-2], "citations") == extra(whole, "citations")
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_id_of_an_answer_takes_feedback(served: Served, rag: EdgeRAG) -> None:
    rag.feedback(ask(served).id.removeprefix("chatcmpl-"), 1.0)


def test_when_nothing_is_found_the_model_is_not_asked(served: Served) -> None:
    reply = ask(served, extra_body={"where": {"folder": "/nowhere"}})
    assert reply.choices[0].message.content == NOTHING_FOUND
    assert (extra(reply, "citations"), extra(reply, "sources"), extra(reply, "reason")) == ([], [], "no_passages")


def test_a_question_that_cannot_fit_is_a_bad_request(served: Served) -> None:
    for text, options in (("word " * 3000, {}), (" ", {}), (QUESTION, {"max_completion_tokens": 10_000})):
        messages: list[Any] = [{"role": "user", "content": text}]
        with pytest.raises(openai.BadRequestError) as caught:
            served.openai.chat.completions.create(model=SMALL_LLM, messages=messages, **options)
        assert caught.value.param == "messages"


def test_a_text_is_completed(served: Served) -> None:
    reply = served.openai.completions.create(model=SMALL_LLM, prompt="The capital of France is", max_tokens=8)
    assert "Paris" in reply.choices[0].text
    assert reply.choices[0].finish_reason == "length"
    stream = served.openai.completions.create(
        model=SMALL_LLM, prompt="The capital of France is", max_tokens=8, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == reply.choices[0].text


def test_embeddings_are_those_of_the_library(served: Served, rag: EdgeRAG) -> None:
    texts = ["a pump", "the roof of a barn"]
    reply = served.openai.embeddings.create(model=EMBEDDER, input=texts)
    vectors = np.array([row.embedding for row in reply.data], dtype=np.float32)
    np.testing.assert_array_equal(vectors, rag._house.embedder().embed(texts))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert reply.usage.prompt_tokens == 11  # with the encoder's own [CLS] and [SEP]


def test_a_search_finds_the_file(served: Served) -> None:
    first = next(iter(served.openai.vector_stores.search("library", query="slate roof")))
    assert first.filename == "roof.md"
    assert "Anna Kask" in first.content[0].text


def test_a_file_that_cannot_be_read_is_a_bad_request_and_leaves_nothing(served: Served, rag: EdgeRAG) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.openai.files.create(file=("broken.pdf", b"%PDF-1.7 and no more"), purpose="user_data")
    assert caught.value.param == "broken.pdf"
    assert sorted(Path(document.path).name for document in rag.documents()) == sorted(TEXTS)
    assert sorted(path.name for path in (rag.folder / "uploads").iterdir()) == sorted(TEXTS)


def test_a_deleted_file_is_found_no_more(served: Served, rag: EdgeRAG) -> None:
    file = served.openai.files.create(
        file=("well.md", b"# Well\n\nThe well is nine metres deep."), purpose="assistants"
    )
    assert served.openai.files.delete(file.id).deleted
    assert not (rag.folder / "uploads" / "well.md").exists()
    hits = served.openai.vector_stores.search("library", query="How deep is the well?")
    assert "well.md" not in {hit.filename for hit in hits}
