"""The OpenAI-shaped routes over a library of fixed words: shapes, order, errors. OpenAI's own client reads them."""

import base64
import gc
import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from msgspec.structs import replace

from edge_rag.errors import Busy, EngineError, InputError
from edge_rag.records import Delta, Event, Filter, Turn
from edge_rag.server.openai_models import BATCH
from edge_rag.server.openai_requests import Chat
from edge_rag.server.openai_stores import MOST_HITS, MOST_QUERIES
from tests.server.openai_running import (
    ANSWER,
    EMBEDDER,
    EVENTS,
    MODEL,
    PASSAGES,
    PATIENCE,
    FixedLibrary,
    Served,
    openai_served,
)

MESSAGES: list[Any] = [{"role": "user", "content": "What?"}]
CHAT = {"model": MODEL, "messages": MESSAGES}
TEXT = {"model": MODEL, "prompt": "Once"}
USAGE = {
    "prompt_tokens": 50,
    "completion_tokens": 6,
    "total_tokens": 56,
    "prompt_tokens_details": {"cached_tokens": 40},
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> FixedLibrary:
    """The library that is served to all tests here."""
    return FixedLibrary(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def served(words: FixedLibrary, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with openai_served(words, tmp_path_factory.mktemp("s") / "e.sock") as running:
        yield running


@pytest.fixture(autouse=True)
def library(words: FixedLibrary) -> FixedLibrary:
    """The same, as if new."""
    words.begin_anew()
    return words


def told(response: httpx.Response) -> list[Any]:
    """The data of a stream's events, the last one as it came."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    return [*map(json.loads, lines[:-1]), lines[-1]]


def error_of(response: httpx.Response) -> Any:
    return response.json()["error"]


def test_a_prompt_may_stand_in_a_list(served: Served, library: FixedLibrary) -> None:
    served.openai.completions.create(model=MODEL, prompt=["Once"])
    assert library.asked[0]["text"] == "Once"


@pytest.mark.parametrize("stream", [True, False])
def test_while_it_is_answered_nothing_of_a_request_is_kept_but_what_is_asked(
    stream: bool, served: Served, library: FixedLibrary
) -> None:
    kept: list[object] = []

    def looking() -> Iterator[Event]:
        yield EVENTS[0]
        kept.extend(each for each in gc.get_objects() if isinstance(each, Chat))
        yield from EVENTS[1:]

    library.events = looking
    served.http.post("/chat/completions", json={**CHAT, "metadata": {"a": "b"}, "stream": stream})
    assert kept == []


# --- chat ------------------------------------------------------------------------------------------------------------


def test_an_answer_has_openais_fields_and_ours_at_the_top(served: Served) -> None:
    reply = served.http.post("/chat/completions", json=CHAT).json()
    assert isinstance(reply.pop("created"), int)
    first, second = reply["sources"]
    assert reply == {
        "id": "chatcmpl-abc",
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ANSWER.text, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
        "citations": [{"n": 2, "start": 0, "end": 9, "score": 0.75, "remembered": False, "passage": second}],
        "sources": [first, second],
        "reason": "stop",
    }
    assert second == {
        "n": 2,
        "file_id": "file-2",
        "chunk_id": 102,
        "path": "/library/doc 2.md",
        "title": "Doc 2",
        "heading": "Doc 2 › Part",
        "page": 7,
        "score": 0.5,
        "text": PASSAGES[1].text[:300],
    }
    assert (first["n"], first["page"]) == (1, None)


def test_openais_client_reads_an_answer_with_citations(served: Served) -> None:
    reply = served.openai.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert reply.choices[0].message.content == ANSWER.text
    assert reply.usage is not None
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 40
    assert reply.model_extra is not None
    assert reply.model_extra["citations"][0]["passage"]["path"] == "/library/doc 2.md"


def test_citations_are_there_when_there_are_none(served: Served, library: FixedLibrary) -> None:
    library.events = [replace(ANSWER, citations=(), passages=(), finish_reason="no_passages")]
    reply = served.http.post("/chat/completions", json=CHAT).json()
    assert (reply["citations"], reply["sources"]) == ([], [])


@pytest.mark.parametrize(
    ("reason", "told_as"),
    [("stop", "stop"), ("no_passages", "stop"), ("length", "length"), ("timeout", "length"), ("cancelled", "length")],
)
def test_the_end_of_an_answer_is_told_in_openais_words_and_in_ours(
    served: Served, library: FixedLibrary, reason: Any, told_as: str
) -> None:
    library.events = [*EVENTS[:-1], replace(ANSWER, finish_reason=reason)]
    whole = served.http.post("/chat/completions", json=CHAT).json()
    assert (whole["choices"][0]["finish_reason"], whole["reason"]) == (told_as, reason)
    last = told(served.http.post("/chat/completions", json={**CHAT, "stream": True}))[-2]
    assert (last["choices"][0]["finish_reason"], last["reason"]) == (told_as, reason)


def test_everything_that_was_asked_reaches_the_library(served: Served, library: FixedLibrary) -> None:
    served.openai.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "Ann."},
            *MESSAGES,
        ],
        max_completion_tokens=9,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop="END",
        extra_body={"top_k": 4, "min_p": 0.1, "where": {"folder": "/library", "kinds": ["md"]}},
    )
    assert library.asked == [
        {
            "question": "What?",
            "history": (Turn(role="user", content="Who?"), Turn(role="assistant", content="Ann.")),
            "instructions": "Be brief.",
            "where": Filter(folder="/library", kinds=("md",)),
            "top_k": 4,
            "timeout": 77,
            "max_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.9,
            "min_p": 0.1,
            "seed": 3,
            "stop": "END",
        }
    ]


def test_what_was_not_asked_is_left_to_the_settings(served: Served, library: FixedLibrary) -> None:
    served.http.post("/chat/completions", json={"messages": MESSAGES})
    assert {name for name, value in library.asked[0].items() if value is not None} == {"question", "history", "timeout"}


# --- streams of chat -------------------------------------------------------------------------------------------------


def test_a_stream_begins_with_the_sources_and_ends_with_the_citations(served: Served) -> None:
    *chunks, done = told(served.http.post("/chat/completions", json={**CHAT, "stream": True}))
    assert done == "[DONE]"
    assert [set(chunk) - {"id", "object", "created", "model", "choices"} for chunk in chunks] == [
        {"sources"},
        {"progress"},
        set(),
        set(),
        set(),
        {"citations", "reason"},
    ]
    whole = served.http.post("/chat/completions", json=CHAT).json()
    assert chunks[0]["sources"] == whole["sources"]
    assert chunks[1]["progress"] == {"done": 40, "total": 50}
    assert chunks[-1]["citations"] == whole["citations"]
    assert {chunk["id"] for chunk in chunks} == {whole["id"]}
    assert len({chunk["created"] for chunk in chunks}) == 1


def test_each_chunk_has_a_choice_with_text_to_be_added_up(served: Served) -> None:
    *chunks, _ = told(served.http.post("/chat/completions", json={**CHAT, "stream": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas) == ANSWER.text
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["stop"]


def test_a_stream_tells_the_usage_when_asked(served: Served) -> None:
    asked = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, _ = told(served.http.post("/chat/completions", json=asked))
    assert [chunk["usage"] for chunk in chunks] == [None] * 6 + [USAGE]
    assert chunks[-1]["choices"] == []


def test_openais_client_streams_an_answer(served: Served) -> None:
    with served.openai.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == ANSWER.text
    assert chunks[0].model_extra is not None
    assert chunks[0].model_extra["sources"][0]["title"] == "Doc 1"
    assert chunks[-2].model_extra is not None
    assert chunks[-2].model_extra["citations"][0]["n"] == 2
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 56


def test_openais_helper_for_streams_puts_an_answer_together(served: Served) -> None:
    with served.openai.chat.completions.stream(model=MODEL, messages=MESSAGES) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == ANSWER.text
    assert final.choices[0].finish_reason == "stop"


def test_who_stops_reading_a_stream_stops_the_answer(served: Served, library: FixedLibrary) -> None:
    gone = threading.Event()

    def endless() -> Iterator[Event]:
        yield EVENTS[0]
        gone.wait(PATIENCE)
        yield from itertools.repeat(Delta(text="and "))

    library.events = endless
    with served.openai.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True) as stream:
        next(stream)
        assert not library.ended.is_set()
    gone.set()
    assert library.ended.wait(PATIENCE)


# --- errors of chat --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "field", "named"),
    [
        ({}, "question", "messages"),
        ({}, "instructions", "messages"),
        ({}, "max_tokens", "max_tokens"),
        ({"max_completion_tokens": 9}, "max_tokens", "max_completion_tokens"),
        ({}, "where.kinds", "where.kinds"),
    ],
)
def test_what_the_library_refuses_is_named_as_the_caller_named_it(
    served: Served, library: FixedLibrary, stream: bool, asked: dict[str, Any], field: str, named: str
) -> None:
    library.refusal = InputError("is too long", field=field, remedy="shorten it")
    response = served.http.post("/chat/completions", json={**CHAT, **asked, "stream": stream})
    assert response.status_code == 400
    assert error_of(response)["param"] == named
    assert error_of(response)["remedy"] == "shorten it"


@pytest.mark.parametrize("stream", [False, True])
def test_who_comes_when_too_many_wait_is_told_to_come_again(
    served: Served, library: FixedLibrary, stream: bool
) -> None:
    library.refusal = Busy("9 requests wait already")
    response = served.http.post("/chat/completions", json={**CHAT, "stream": stream})
    assert (response.status_code, error_of(response)["code"]) == (503, "busy")
    assert int(response.headers["retry-after"]) > 0


def test_a_failure_in_the_middle_ends_a_stream_with_an_error(served: Served, library: FixedLibrary) -> None:
    library.events = [*EVENTS[:3], EngineError("llama_decode returned -3")]
    *chunks, last = told(served.http.post("/chat/completions", json={**CHAT, "stream": True}))
    assert len(chunks) == 3
    assert json.loads(last)["error"]["code"] == "engine_error"


def test_openais_client_raises_a_failure_in_the_middle(served: Served, library: FixedLibrary) -> None:
    library.events = [*EVENTS[:3], EngineError("llama_decode returned -3")]
    stream = served.openai.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="llama_decode returned -3"):
        list(stream)


def test_a_failure_of_a_whole_answer_has_a_status(served: Served, library: FixedLibrary) -> None:
    library.events = [*EVENTS[:3], EngineError("llama_decode returned -3")]
    with pytest.raises(openai.InternalServerError):
        served.openai.chat.completions.create(model=MODEL, messages=MESSAGES)


def test_openais_client_raises_what_it_knows(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4o' is not served") as missing:
        served.openai.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="not supported") as refused:
        served.openai.chat.completions.create(
            model=MODEL, messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert refused.value.param == "tools"


@pytest.mark.parametrize("route", ["/chat/completions", "/completions", "/embeddings", "/vector_stores/library/search"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"messages": NaN}', b"[" * 100_000, b'"\xff"'])
def test_what_is_no_request_is_refused(served: Served, route: str, body: bytes) -> None:
    response = served.http.post(route, content=body)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("route", ["/chat/completions", "/completions", "/embeddings"])
def test_these_routes_are_posted_to(served: Served, route: str) -> None:
    assert served.http.get(route).status_code == 405


def test_finished_answers_are_counted(served: Served) -> None:
    def count() -> float:
        finished = {"finish_reason": "stop"}
        return served.service.metrics._registry.get_sample_value("edge_rag_answers_total", finished) or 0.0

    before = count()
    for stream in (False, True):
        served.http.post("/chat/completions", json={**CHAT, "stream": stream})
        served.http.post("/completions", json={**TEXT, "stream": stream})
    assert count() == before + 4


# --- completions -----------------------------------------------------------------------------------------------------


def test_a_completion_is_the_models_words_alone(served: Served, library: FixedLibrary) -> None:
    reply = served.http.post("/completions", json={**TEXT, "max_tokens": 4, "stop": ["a", "b"]}).json()
    assert isinstance(reply.pop("created"), int)
    assert reply.pop("id").startswith("cmpl-")
    assert reply == {
        "object": "text_completion",
        "model": MODEL,
        "choices": [{"text": ANSWER.text, "index": 0, "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
        "reason": "stop",
    }
    asked = {name: value for name, value in library.asked[0].items() if value is not None}
    assert asked == {"text": "Once", "timeout": 77, "max_tokens": 4, "stop": ("a", "b")}


def test_openais_client_streams_a_completion(served: Served, library: FixedLibrary) -> None:
    library.events = EVENTS[1:]
    stream = served.openai.completions.create(
        model=MODEL, prompt="Once", stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == ANSWER.text
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices] == [None] * 4 + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].model_extra is not None
    assert chunks[0].model_extra["progress"] == {"done": 40, "total": 50}
    assert [chunk.usage and chunk.usage.total_tokens for chunk in chunks] == [None] * 5 + [56]


def test_a_streamed_completion_tells_no_usage_unless_asked(served: Served, library: FixedLibrary) -> None:
    library.events = EVENTS[1:]
    *chunks, done = told(served.http.post("/completions", json={**TEXT, "stream": True}))
    assert done == "[DONE]"
    assert not any("usage" in chunk for chunk in chunks)


def test_a_prompt_that_the_library_refuses_is_a_bad_request(served: Served, library: FixedLibrary) -> None:
    library.refusal = InputError("more than the context", field="max_tokens")
    with pytest.raises(openai.BadRequestError) as caught:
        served.openai.completions.create(model=MODEL, prompt="Once")
    assert caught.value.param == "max_tokens"


def test_completions_of_other_models_are_not_found(served: Served) -> None:
    with pytest.raises(openai.NotFoundError):
        served.openai.completions.create(model="davinci", prompt="Once")


# --- embeddings and models -------------------------------------------------------------------------------------------


def test_embeddings_come_in_the_order_of_their_texts(served: Served, library: FixedLibrary) -> None:
    texts = ["x" * (n + 1) for n in range(BATCH + 1)]
    reply = served.openai.embeddings.create(model=EMBEDDER, input=texts, encoding_format="float")
    assert [row.embedding[0] for row in reply.data] == [len(text) for text in texts]
    assert [row.index for row in reply.data] == list(range(BATCH + 1))
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (2 * len(texts),) * 2
    assert [len(asked["texts"]) for asked in library.asked] == [BATCH, 1]
    assert reply.model == EMBEDDER


def test_one_text_may_be_embedded_alone(served: Served) -> None:
    reply = served.openai.embeddings.create(model=EMBEDDER, input="abc", encoding_format="float")
    assert [row.embedding[0] for row in reply.data] == [3]


def test_embeddings_in_base64_are_the_same(served: Served) -> None:
    asked = {"input": ["ab", "abc"], "encoding_format": "base64"}
    rows = served.http.post("/embeddings", json=asked).json()["data"]
    vectors = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4").tolist() for row in rows]
    assert vectors == [
        row["embedding"] for row in served.http.post("/embeddings", json={"input": ["ab", "abc"]}).json()["data"]
    ]
    assert served.openai.embeddings.create(model=EMBEDDER, input=["ab", "abc"]).data[1].embedding == vectors[1]


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"input": []}, "input"),
        ({"input": [1, 2]}, "input[0]"),
        ({"input": [""]}, "input[0]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a" * 32_001}, "input"),
        ({"input": "a", "dimensions": 64}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_what_cannot_be_embedded_is_refused(served: Served, asked: dict[str, Any], field: str) -> None:
    response = served.http.post("/embeddings", json=asked)
    assert (response.status_code, error_of(response)["param"]) == (400, field)


def test_embeddings_of_other_models_are_not_found(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match=EMBEDDER):
        served.openai.embeddings.create(model=MODEL, input="a")


def test_the_model_that_can_be_asked_is_listed(served: Served) -> None:
    assert [model.id for model in served.openai.models.list()] == [MODEL]
    assert served.openai.models.retrieve(MODEL).object == "model"
    for unknown in (EMBEDDER, "a/b"):
        with pytest.raises(openai.NotFoundError) as caught:
            served.openai.models.retrieve(unknown)
        assert caught.value.param == "model"


# --- files -----------------------------------------------------------------------------------------------------------


def test_documents_are_files_the_newest_first(served: Served) -> None:
    files = list(served.openai.files.list())
    assert [file.id for file in files] == ["file-3", "file-2", "file-1"]
    assert (files[0].filename, files[0].bytes, files[0].created_at) == ("doc 3.md", 3000, 1_700_000_003)
    assert (files[0].status, files[0].purpose, files[0].object) == ("processed", "user_data", "file")
    assert served.openai.files.retrieve("file-3") == files[0]


def test_openais_client_turns_the_pages_of_a_list(served: Served) -> None:
    first = served.openai.files.list(limit=2, order="asc")
    assert ([file.id for file in first.data], first.has_more) == (["file-1", "file-2"], True)
    assert [file.id for file in first] == ["file-1", "file-2", "file-3"]


def test_files_of_other_purposes_are_not_there(served: Served, library: FixedLibrary) -> None:
    assert len(served.openai.files.list(purpose="user_data").data) == 3
    page = served.http.get("/files", params={"purpose": "batch"}).json()
    assert page == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


@pytest.mark.parametrize(
    ("query", "status", "field"),
    [
        ({"limit": "0"}, 400, "limit"),
        ({"limit": "10001"}, 400, "limit"),
        ({"limit": "ten"}, 400, "limit"),
        ({"order": "up"}, 400, "order"),
        ({"after": "file-9"}, 404, "after"),
    ],
)
def test_a_list_that_cannot_be_is_refused(served: Served, query: dict[str, str], status: int, field: str) -> None:
    response = served.http.get("/files", params=query)
    assert (response.status_code, error_of(response)["param"]) == (status, field)


def test_a_deleted_file_is_gone(served: Served, library: FixedLibrary) -> None:
    deleted = served.openai.files.delete("file-2")
    assert (deleted.id, deleted.deleted, deleted.object) == ("file-2", True, "file")
    assert [held.id for held in library.held] == [1, 3]
    with pytest.raises(openai.NotFoundError) as caught:
        served.openai.files.delete("file-2")
    assert caught.value.param == "file_id"


@pytest.mark.parametrize("name", ["file-9", "file-", "2", "file-2x", "file-٢", "file--2", "file-" + "9" * 40, "..%2F2"])
def test_a_name_of_no_file_is_not_found(served: Served, library: FixedLibrary, name: str) -> None:
    for method in ("GET", "DELETE"):
        assert served.http.request(method, f"/files/{name}").status_code == 404
    assert len(library.held) == 3


@pytest.mark.parametrize(
    ("fields", "files", "field"),
    [
        ({"purpose": "fine-tune"}, [("file", ("a.md", b"x"))], "purpose"),
        ({"purpose": "assistants"}, [("file", ("a.md", b"x")), ("file", ("b.md", b"x"))], "file"),
        ({"purpose": "assistants"}, [("other", ("a.md", b"x"))], "file"),
    ],
)
def test_an_upload_that_cannot_be_taken_is_refused(
    served: Served, fields: dict[str, str], files: list[Any], field: str
) -> None:
    response = served.http.post("/files", data=fields, files=files)
    assert (response.status_code, error_of(response)["param"]) == (400, field)


@pytest.mark.parametrize("headers", [{"content-type": "application/json"}, {"content-type": "multipart/form-data"}, {}])
def test_an_upload_is_a_form(served: Served, headers: dict[str, str]) -> None:
    response = served.http.post("/files", content=b'{"purpose": "assistants"}', headers=headers)
    assert (response.status_code, error_of(response)["param"]) == (400, "body")


# --- the vector store ------------------------------------------------------------------------------------------------


def test_there_is_one_vector_store(served: Served) -> None:
    [store] = served.openai.vector_stores.list()
    assert (store.id, store.name, store.status, store.usage_bytes) == ("library", "library", "completed", 6000)
    assert (store.file_counts.completed, store.file_counts.total) == (3, 3)
    assert (store.created_at, store.last_active_at) == (1_700_000_001, 1_700_000_003)
    assert served.openai.vector_stores.retrieve("library") == store


def test_an_empty_library_is_a_vector_store_too(served: Served, library: FixedLibrary) -> None:
    library.held = []
    assert served.openai.vector_stores.retrieve("library").file_counts.total == 0


def test_a_search_gives_passages(served: Served, library: FixedLibrary) -> None:
    page = served.openai.vector_stores.search("library", query="words", max_num_results=3)
    first, second = page
    assert (first.file_id, first.filename, first.score) == ("file-1", "doc 1.md", 1.0)
    assert [(content.type, content.text) for content in first.content] == [("text", PASSAGES[0].text)]
    assert first.attributes == {"path": "/library/doc 1.md", "title": "Doc 1", "heading": "Doc 1 › Part"}
    assert second.attributes == {"path": "/library/doc 2.md", "title": "Doc 2", "heading": "Doc 2 › Part", "page": 7}
    assert library.asked == [{"query": "words", "top_k": 3, "where": None}]


def test_the_page_of_a_search_is_the_only_one(served: Served) -> None:
    page = served.http.post("/vector_stores/library/search", json={"query": "words"}).json()
    del page["data"]
    assert page == {
        "object": "vector_store.search_results.page",
        "search_query": ["words"],
        "has_more": False,
        "next_page": None,
    }


def test_of_several_queries_the_best_passages_of_all_are_given_once(served: Served, library: FixedLibrary) -> None:
    page = served.openai.vector_stores.search("library", query=["words", "more"], max_num_results=2)
    assert [hit.file_id for hit in page] == ["file-1", "file-2"]
    assert [asked["query"] for asked in library.asked] == ["words", "more"]
    assert page.model_dump()["search_query"] == ["words", "more"]


def test_a_search_can_be_narrowed(served: Served, library: FixedLibrary) -> None:
    page = served.openai.vector_stores.search(
        "library",
        query="words",
        ranking_options={"ranker": "auto", "score_threshold": 0.6},
        rewrite_query=False,
        extra_body={"where": {"documents": ["/library/doc 1.md"]}},
    )
    assert [hit.file_id for hit in page] == ["file-1"]
    assert library.asked[0]["where"] == Filter(documents=("/library/doc 1.md",))


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"filters": {"type": "eq", "key": "a", "value": "b"}}, "filters"),
        ({"rewrite_query": True}, "rewrite_query"),
        (
            {"ranking_options": {"hybrid_search": {"embedding_weight": 1, "text_weight": 2}}},
            "ranking_options.hybrid_search",
        ),
        ({"ranking_options": {"score_threshold": 2}}, "ranking_options.score_threshold"),
        ({"max_num_results": MOST_HITS + 1}, "max_num_results"),
        ({"query": ""}, "query"),
        ({"query": []}, "query"),
        ({"query": ["a"] * (MOST_QUERIES + 1)}, "query"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused(served: Served, asked: dict[str, Any], field: str) -> None:
    response = served.http.post("/vector_stores/library/search", json={"query": "words", **asked})
    assert (response.status_code, error_of(response)["param"]) == (400, field)


def test_the_remedies_for_searches_name_ours(served: Served) -> None:
    for asked, word in (({"filters": {}}, "`where`"), ({"ranking_options": {"hybrid_search": {}}}, "text_weight")):
        response = served.http.post("/vector_stores/library/search", json={"query": "words", **asked})
        assert word in error_of(response)["remedy"]


def test_other_vector_stores_are_not_found(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        served.openai.vector_stores.search("vs_1", query="words")
    assert caught.value.param == "vector_store_id"
    with pytest.raises(openai.NotFoundError):
        served.openai.vector_stores.retrieve("vs_1")
