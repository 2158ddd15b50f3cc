"""The path of a question with the real small models: the same answers as in process, and nothing left behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from edge_rag.config import Settings
from edge_rag.policy.hindsight import Comparison
from edge_rag.records import AddReport, Answer, EngineStatus, Passage, RouterStatus
from edge_rag.runtime.rag import EdgeRAG
from edge_rag.runtime.status import Status
from edge_rag.server.service import Service
from tests.runtime.remembering import remembering
from tests.runtime.serving import small_library
from tests.server.harness import caller, parsed

QUESTIONS = ("When is the filter changed?", "How loud is the pump?", "What is the valve made of?")
TEXTS = {
    "filter.md": "# Filter\n\nThe filter is changed every six months.\n",
    "pump.md": "# Pump\n\nThe pump is as loud as a fridge.\n",
    "valve.md": "# Valve\n\nThe valve is made of brass.\n",
}


@pytest.fixture(scope="module")
def rag(small_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EdgeRAG]:
    folder = tmp_path_factory.mktemp("real")
    (folder / "notes").mkdir()
    for name, text in TEXTS.items():
        (folder / "notes" / name).write_text(text)
    with small_library(
        folder / "data",
        small_settings,
        engine__slots=2,
        engine__queue=2,
        answering__max_tokens=8,
        router__alpha=0,  # nothing is tried: what is known to be best is taken
        server__roots=(str(folder),),
    ) as rag:
        yield rag


def test_a_folder_is_added_over_the_socket(http: httpx.Client, rag: EdgeRAG) -> None:
    notes = rag.folder.parent / "notes"
    told = parsed(http.post("/documents", json={"paths": [str(notes)]}).text)
    assert [kind for kind, _ in told] == ["progress"] * 3 + ["report"]
    assert msgspec.convert(told[-1][1], AddReport).count("added") == 3
    assert [Path(each["path"]).name for each in http.get("/documents").json()] == list(TEXTS)


def test_search_finds_what_it_finds_in_process(http: httpx.Client, rag: EdgeRAG) -> None:
    found = http.post("/search", json={"query": QUESTIONS[0]})
    assert msgspec.json.decode(found.content, type=list[Passage]) == rag.search(QUESTIONS[0])


@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_are_those_of_the_library(question: str, http: httpx.Client, rag: EdgeRAG) -> None:
    here = rag.ask(question)
    whole = msgspec.json.decode(http.post("/ask", json={"question": question}).content, type=Answer)
    told = parsed(http.post("/ask", json={"question": question, "stream": True}).text)
    assert here.text == whole.text == told[-1][1]["text"]
    assert here.citations == whole.citations
    assert told[0][0] == "sources"
    assert "".join(data["text"] for kind, data in told if kind == "delta") == whole.text
    assert {here.id, whole.id, told[-1][1]["id"]} <= {entry.id for entry in rag.journal()}


def test_feedback_reaches_the_journal(http: httpx.Client, rag: EdgeRAG) -> None:
    answer = http.post("/ask", json={"question": QUESTIONS[0]}).json()
    assert http.post("/feedback", json={"answer_id": answer["id"], "score": 0.5}).status_code == 204
    assert {entry.id: entry.feedback for entry in rag.journal()}[answer["id"]] == 0.5
    unknown = http.post("/feedback", json={"answer_id": "nobody", "score": 0.5})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")


def test_an_adapter_is_routed_to_until_its_answers_are_bad(http: httpx.Client, rag: EdgeRAG, tmp_path: Path) -> None:
    def ask(**options: Any) -> Answer:
        response = http.post("/ask", json={"question": QUESTIONS[0], "max_tokens": 2, **options})
        return msgspec.json.decode(response.content, type=Answer)

    def router() -> RouterStatus:
        return msgspec.json.decode(http.get("/router").content, type=RouterStatus)

    with remembering(rag, tmp_path, QUESTIONS[0], ask().passages[0].chunk_id) as made:
        before, private = router(), ask(private=True)
        assert private.plan.adapter == made.id
        assert router().decisions == before.decisions
        gone = http.post("/feedback", json={"answer_id": private.id, "score": 0})
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")
        for _ in range(10):
            if not (answer := ask()).plan.adapter:
                break
            http.post("/feedback", json={"answer_id": answer.id, "score": 0}).raise_for_status()
        assert answer.plan.adapter == ""
        [arm] = [arm for arm in router().arms if arm.adapter == made.id]
        assert (arm.mean, arm.chosen) == (0, arm.rewards)
        assert arm.rewards > 0
        text = http.get("/metrics").text
        assert f'edge_rag_router_arm_chosen{{adapter="{made.id}"}} {arm.chosen}.0' in text
        compared = msgspec.json.decode(http.post("/router/replay", json={}).content, type=Comparison)
        assert [way.policy for way in compared.ways] == ["as it was", "without adapters", "polar", "lru"]
        assert compared.ways[0].used == arm.chosen


def test_what_cannot_fit_is_refused_with_its_field(http: httpx.Client) -> None:
    response = http.post("/ask", json={"question": QUESTIONS[0], "max_tokens": 5000, "stream": True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] in ("max_tokens", "question")


def test_a_file_is_uploaded_asked_and_removed(http: httpx.Client, rag: EdgeRAG) -> None:
    sent = {"file": ("hose.md", b"# Hose\n\nThe hose is nine metres long.\n")}
    [report] = [data for kind, data in parsed(http.post("/documents", files=sent).text) if kind == "report"]
    [file] = report["files"]
    assert file["outcome"] == "added"
    assert Path(file["path"]) == rag.folder.resolve() / "uploads" / "hose.md"
    found = http.post("/search", json={"query": "How long is the hose?", "top_k": 1}).json()
    assert found[0]["path"] == file["path"]
    http.request("DELETE", "/documents", json={"paths": [file["path"]]})
    assert not Path(file["path"]).exists()
    assert len(http.get("/documents").json()) == 3


def test_many_callers_at_once_all_get_their_answers(service: Service, path: Path, rag: EdgeRAG) -> None:
    got: list[dict[str, Any]] = []

    def ask(question: str) -> None:
        with caller(path) as own:
            for _ in range(3):
                got.append(own.post("/ask", json={"question": question}).json())

    asking = [threading.Thread(target=ask, args=(question,)) for question in QUESTIONS]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert sorted(answer["question"] for answer in got) == sorted(QUESTIONS * 3)
    assert {answer["finish_reason"] for answer in got} <= {"stop", "length"}
    assert {answer["id"] for answer in got} <= {entry.id for entry in rag.journal(9)}


def engine_of(http: httpx.Client) -> EngineStatus:
    status = msgspec.json.decode(http.get("/status").content, type=Status)
    assert status.engine
    return status.engine


def test_a_caller_who_leaves_frees_the_engine(http: httpx.Client, service: Service, path: Path, rag: EdgeRAG) -> None:
    body = {"question": QUESTIONS[0], "max_tokens": 300, "stream": True, "temperature": 5.0}
    with caller(path) as own, own.stream("POST", "/ask", json=body) as response:
        assert any(line == "event: delta" for line in response.iter_lines())
    while service.answers.streams or engine_of(http).active:
        pass
    assert (engine_of(http).waiting, engine_of(http).cells_used) == (0, 0)
    entry = rag.journal(1)[0]
    assert entry.finish_reason == "cancelled"


def test_a_caller_who_leaves_the_queue_frees_his_place(http: httpx.Client, service: Service, path: Path) -> None:
    body = {"question": QUESTIONS[0], "max_tokens": 100, "stream": True, "temperature": 5.0}
    with contextlib.ExitStack() as stack:

        def begin() -> Iterator[str]:
            own = stack.enter_context(caller(path))
            return stack.enter_context(own.stream("POST", "/ask", json=body)).iter_lines()

        served = [begin(), begin()]  # both slots are taken
        assert all(next(line for line in lines if line == "event: delta") for lines in served)
        with caller(path) as own, own.stream("POST", "/ask", json=body) as response:
            assert next(response.iter_lines()) == "event: sources"
        while len(service.answers.streams) > 2:
            http.get("/health")
        assert (engine_of(http).waiting, engine_of(http).active) == (0, 2)
    while service.answers.streams or engine_of(http).active:
        pass


def test_metrics_tell_of_the_engine(http: httpx.Client) -> None:
    text = http.get("/metrics").text
    assert "edge_rag_engine_cells " in text
    assert 'edge_rag_kv_bytes{tier="ram"}' in text
    assert 'edge_rag_answers_total{finish_reason="stop"}' in text or 'finish_reason="length"' in text


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_serves_until_it_is_told_to_stop(tmp_path: Path, small_settings: Settings) -> None:
    own = {key: value for key, value in os.environ.items() if not key.startswith("EDGE_RAG_")}
    environment = own | {
        "EDGE_RAG_CONFIG": os.devnull,
        "EDGE_RAG_MODELS__LLM": small_settings.models.llm,
        "EDGE_RAG_MODELS__FOLDER": small_settings.models.folder,
        "EDGE_RAG_SERVER__ROOTS": str(tmp_path),
        "EDGE_RAG_RETRIEVAL__MIN_SIMILARITY": "-1",
        "EDGE_RAG_ENGINE__N_CTX": "512",
        "EDGE_RAG_ANSWERING__MAX_TOKENS": "8",
    }
    (tmp_path / "filter.md").write_text(TEXTS["filter.md"])
    command = [sys.executable, "-m", "edge_rag", "--data", str(tmp_path / "data"), "serve", "--uds"]
    with subprocess.Popen(
        [*command, str(tmp_path / "s" / "e.sock")],
        env=environment,
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stderr
            for line in server.stderr:
                assert json.loads(line)["level"] == "info"
                if json.loads(line)["event"] == "ready":
                    break
            with caller(tmp_path / "s" / "e.sock") as http:
                http.post("/documents", json={"paths": [str(tmp_path / "filter.md")]}).raise_for_status()
                answer = http.post("/ask", json={"question": QUESTIONS[0]}).json()
            server.send_signal(signal.SIGTERM)
            rest = server.stderr.read()
            assert server.wait(60) == 0, rest
        finally:
            server.kill()
    assert TEXTS["filter.md"] not in rest
    assert answer["passages"][0]["title"] == "Filter"
    settings = {"models.llm": small_settings.models.llm, "models.folder": small_settings.models.folder}
    with EdgeRAG.open(tmp_path / "data", settings=settings) as rag:
        assert rag.journal(1)[0].id == answer["id"]
