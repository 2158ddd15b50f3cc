"""The numbers, as Prometheus' own parser reads them."""

import httpx
import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from edge_rag import errors
from edge_rag.records import Usage
from edge_rag.server.metrics import Metrics
from tests.server.fakes import FakeRAG, answer


def numbers(text: str) -> dict[tuple[str, ...], float]:
    """Samples by name and label values."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_answers_are_counted_once_in_whichever_way_they_are_asked(tmp_path_factory: pytest.TempPathFactory) -> None:
    metrics = Metrics(FakeRAG(tmp_path_factory.mktemp("data")).status)
    for finish in ("stop", "stop", "length"):
        metrics.answered(answer("a", finish))
    told = numbers(metrics.text().decode())
    assert told["edge_rag_answers_total", "stop"] == 2
    assert told["edge_rag_answers_total", "length"] == 1
    assert told["edge_rag_first_token_seconds_sum",] == pytest.approx(0.9)
    assert told["edge_rag_answer_seconds_count",] == 3
    assert told["edge_rag_queue_seconds_sum",] == pytest.approx(0.06)
    assert told["edge_rag_tokens_total", "prompt"] == 60
    assert told["edge_rag_tokens_total", "cached"] == 36
    assert told["edge_rag_tokens_total", "completion"] == 12


def test_the_librarys_status_is_told(http: httpx.Client) -> None:
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    told = numbers(response.text)
    assert told["edge_rag_memory_bytes",] == 9
    assert told["edge_rag_engine_active",] == 1
    assert told["edge_rag_engine_cells",] == 512
    assert told["edge_rag_engine_cells_used",] == 100
    assert told["edge_rag_engine_steps_total",] == 40
    assert told["edge_rag_kv_passages_total", "live"] == 2
    assert told["edge_rag_kv_passages_total", "ssd"] == 3
    assert told["edge_rag_kv_bytes", "ram"] == 10
    assert told["edge_rag_kv_bytes", "disk"] == 20
    assert told["edge_rag_kv_saved_seconds_total",] == 1.5
    assert all(name.startswith("edge_rag_") for name, *_ in told)


def test_requests_are_counted_by_route_and_status(http: httpx.Client, fake: FakeRAG) -> None:
    def counted(*labels: str) -> float:
        return numbers(http.get("/metrics").text).get(("edge_rag_requests_total", *labels), 0)

    fake.errors["uncounted?"] = errors.Busy("full")
    before = [counted("/ask", "200"), counted("/ask", "503"), counted("none", "404"), counted("/documents", "200")]
    answers = numbers(http.get("/metrics").text).get(("edge_rag_answers_total", "stop"), 0)
    http.post("/ask", json={"question": "a"})
    http.post("/ask", json={"question": "a", "stream": True})
    http.post("/ask", json={"question": "uncounted?"})
    http.get("/no/such/place")
    http.get("/documents")
    after = [counted("/ask", "200"), counted("/ask", "503"), counted("none", "404"), counted("/documents", "200")]
    assert [now - then for now, then in zip(after, before, strict=True)] == [2, 1, 1, 1]
    assert numbers(http.get("/metrics").text)["edge_rag_answers_total", "stop"] == answers + 2


def test_a_refused_question_is_no_answer_of_the_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    metrics = Metrics(FakeRAG(tmp_path_factory.mktemp("data")).status)
    metrics.answered(replace(answer("a", "no_passages"), usage=Usage()))
    told = numbers(metrics.text().decode())
    assert told["edge_rag_answers_total", "no_passages"] == 1
    assert told["edge_rag_first_token_seconds_count",] == 0
