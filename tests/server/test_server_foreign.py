"""Programs of others at a real socket: curl, and httpx-sse as a parser of event streams. The library is a fake."""

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import httpx_sse
import msgspec
import pytest

from edge_rag.errors import EngineError
from edge_rag.records import Answer, Event
from tests.server.fakes import FakeRAG, answer, events
from tests.server.harness import caller, served

# Some take these for ends of lines; none may end an event. The answer repeats the question.
QUESTION = "how\u2028long\u0085is\x0bthis\r\n\r\ndata: 1?"
KINDS = ["sources", "progress", "delta", "citation", "delta", "answer"]
HALF_WAY = "what fails half way?"
HELD = "what is held?"


@pytest.fixture(scope="module")
def rag(tmp_path_factory: pytest.TempPathFactory) -> FakeRAG:
    rag = FakeRAG(tmp_path_factory.mktemp("data"), server__ping=1)
    rag.late[HALF_WAY] = EngineError("is broken")
    return rag


@pytest.fixture(scope="module")
def path(rag: FakeRAG, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("s") / "e.sock"
    with served(rag, path):
        yield path


@pytest.fixture
def http(path: Path) -> Iterator[httpx.Client]:
    with caller(path) as client:
        yield client


def asking(question: str) -> dict[str, Any]:
    return {"question": question, "stream": True}


def chatting(question: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "stream": True}


# --- curl ------------------------------------------------------------------------------------------------------------


class Curl:
    """curl at the server's socket."""

    def __init__(self, path: Path) -> None:
        self._command = ["curl", "-sS", "--max-time", "60", "--fail-with-body", "--unix-socket", str(path)]

    def command(self, route: str, body: Any = None, *options: str) -> list[str]:
        sent = () if body is None else ("--data-binary", json.dumps(body))
        return [*self._command, f"http://localhost{route}", *sent, *options]

    def __call__(self, route: str, body: Any = None, *options: str, code: int = 0) -> bytes:
        done = subprocess.run(self.command(route, body, *options), capture_output=True)
        assert done.returncode == code, done.stderr
        return done.stdout


@pytest.fixture
def curl(path: Path) -> Curl:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed, and the test is about it")
    return Curl(path)


def test_curl_gets_an_answer(curl: Curl) -> None:
    assert msgspec.json.decode(curl("/ask", {"question": QUESTION}), type=Answer) == answer(QUESTION)


def test_curl_gets_a_stream(curl: Curl) -> None:
    lines = curl("/ask", asking(QUESTION), "-N").split(b"\n")
    assert [line for line in lines if line.startswith(b"event: ")] == [f"event: {kind}".encode() for kind in KINDS]
    told = [line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: ")]
    assert [msgspec.json.decode(data, type=Event) for data in told] == events(QUESTION)


def test_curl_sees_events_and_pings_while_the_answer_is_being_written(curl: Curl, rag: FakeRAG) -> None:
    gate = rag.gates[HELD] = threading.Event()
    command = curl.command("/ask", asking(HELD), "-N")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout
            assert next(running.stdout) == "event: sources\n"
            assert any(line.startswith(": ping") for line in running.stdout)
            gate.set()
            assert "event: answer\n" in list(running.stdout)
        finally:
            gate.set()
    assert running.returncode == 0


def test_curl_fails_with_the_reason_when_it_is_refused(curl: Curl) -> None:
    refusal = json.loads(curl("/ask", {"question": ""}, code=22))
    assert (refusal["error"]["param"], refusal["error"]["code"]) == ("question", "input_error")


def test_curl_uploads_a_file_with_a_name_full_of_traps(curl: Curl, rag: FakeRAG, tmp_path: Path) -> None:
    file = tmp_path / "notes.md"
    file.write_text("# Notes")
    curl("/documents", None, "-F", f'file=@"{file}";filename="../../höse; x.md"')
    name, *_ = [call[1] for call in rag.calls if call[0] == "add"]
    assert Path(name) == rag.folder.resolve() / "uploads" / "höse; x.md"


def test_curl_asks_twice_over_one_connection(curl: Curl) -> None:
    ask = curl.command("/ask", {"question": QUESTION}, "-o", "/dev/null", "-w", "%{http_code} %{num_connects}\n")
    told = subprocess.run([*ask, "--next", *ask[1:]], capture_output=True, text=True)
    assert told.stdout == "200 1\n200 0\n"


# --- httpx-sse -------------------------------------------------------------------------------------------------------


def parsed(http: httpx.Client, route: str, body: Any) -> list[httpx_sse.ServerSentEvent]:
    """The events of a stream, by a parser that we did not write."""
    with httpx_sse.connect_sse(http, "POST", route, json=body) as source:
        return list(source.iter_sse())


def test_a_parser_of_others_reads_an_answers_events(http: httpx.Client) -> None:
    told = parsed(http, "/ask", asking(QUESTION))
    assert [event.event for event in told] == KINDS
    assert [msgspec.json.decode(event.data, type=Event) for event in told] == events(QUESTION)


def test_a_parser_of_others_reads_a_chats_chunks(http: httpx.Client) -> None:
    told = parsed(http, "/v1/chat/completions", chatting(QUESTION))
    assert {event.event for event in told} == {"message"}
    assert told[-1].data == "[DONE]"
    chunks = [event.json() for event in told[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    text = "".join(choice["delta"]["content"] for chunk in chunks for choice in chunk["choices"])
    assert text == answer(QUESTION).text
    assert chunks[0]["sources"][0]["path"] == "/notes/filters.md"


def test_a_parser_of_others_reads_a_jobs_events(http: httpx.Client) -> None:
    told = parsed(http, "/reembed", {})
    assert [(event.event, event.json()) for event in told] == [
        ("progress", {"done": 4, "total": 8}),
        ("report", {"chunks": 8}),
    ]


def test_a_parser_of_others_reads_a_failure_half_way(http: httpx.Client) -> None:
    told = parsed(http, "/ask", asking(HALF_WAY))
    assert [event.event for event in told] == ["sources", "error"]
    assert told[-1].json()["error"]["code"] == "engine_error"
    *_, last = parsed(http, "/v1/chat/completions", chatting(HALF_WAY))
    assert last.json()["error"]["code"] == "engine_error"
