"""Every error has a status and OpenAI's shape, wherever it is raised; ours say nothing of their inside."""

import json
import logging

import httpx
import pytest

from edge_rag import errors
from edge_rag.server.errors import Loading, Refused, code_of, error_body, error_response, status_of
from tests.server.fakes import FakeRAG
from tests.server.harness import parsed

CASES = [
    (errors.InputError("bad", field="top_k", remedy="less"), 400, "invalid_request_error", "input_error"),
    (errors.UsageError("bad"), 400, "invalid_request_error", "usage_error"),
    (errors.ConfigError("bad"), 400, "invalid_request_error", "config_error"),
    (errors.DocumentError("bad"), 400, "invalid_request_error", "document_error"),
    (errors.NotFound("bad"), 404, "invalid_request_error", "not_found"),
    (errors.Busy("bad"), 503, "unavailable_error", "busy"),
    (Loading(), 503, "unavailable_error", "loading"),
    (errors.ModelError("bad"), 503, "unavailable_error", "model_error"),
    (errors.ModelMissing("bad"), 503, "unavailable_error", "model_missing"),
    (errors.ModelCorrupt("bad"), 503, "unavailable_error", "model_corrupt"),
    (errors.StorageError("bad"), 503, "unavailable_error", "storage_error"),
    (errors.NetworkError("bad"), 503, "unavailable_error", "network_error"),
    (errors.EngineError("bad"), 500, "server_error", "engine_error"),
    (errors.Cancelled("bad"), 499, "invalid_request_error", "cancelled"),
    (Refused(401, "unauthorized", "bad"), 401, "authentication_error", "unauthorized"),
    (Refused(403, "forbidden", "bad"), 403, "permission_error", "forbidden"),
    (Refused(413, "too_large", "bad"), 413, "invalid_request_error", "too_large"),
]


@pytest.mark.parametrize(("error", "status", "kind", "code"), CASES, ids=[case[3] for case in CASES])
def test_each_error_has_its_status_type_and_code(error: errors.EdgeRAGError, status: int, kind: str, code: str) -> None:
    told = json.loads(error_body(error))["error"]
    assert (status_of(error), told["type"], told["code"], code_of(error)) == (status, kind, code, code)
    assert told["message"] == error.message


def test_every_class_of_errors_was_asked_about() -> None:
    def below(kind: type) -> set[type]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    ours = {kind for kind in below(errors.EdgeRAGError) if kind.__module__ == errors.__name__}
    without_status = {errors.EdgeRAGError, errors.MachineError}
    assert ours - without_status == {type(case[0]) for case in CASES} & ours


def test_an_error_names_its_field_and_its_remedy() -> None:
    assert json.loads(error_body(CASES[0][0])) == {
        "error": {
            "message": "bad",
            "type": "invalid_request_error",
            "param": "top_k",
            "code": "input_error",
            "remedy": "less",
        }
    }


def test_what_is_not_known_is_null() -> None:
    told = json.loads(error_body(errors.UsageError("bad")))["error"]
    assert told["param"] is None
    assert told["remedy"] is None


def test_who_comes_too_early_or_too_many_is_told_when_to_come_again() -> None:
    assert error_response(errors.Busy("full")).headers["retry-after"] == "2"
    assert error_response(Loading()).headers["retry-after"] == "2"
    assert "retry-after" not in error_response(errors.StorageError("full")).headers


def test_errors_of_the_library_reach_the_caller(http: httpx.Client, fake: FakeRAG) -> None:
    fake.errors["what?"] = errors.InputError("too odd", field="question", remedy="ask otherwise")
    for path, body in (("/search", {"query": "what?"}), ("/ask", {"question": "what?"})):
        response = http.post(path, json=body)
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "too odd"
        assert response.json()["error"]["remedy"] == "ask otherwise"


def test_a_stream_that_fails_at_once_fails_with_a_status(http: httpx.Client, fake: FakeRAG) -> None:
    fake.errors["full?"] = errors.Busy("the queue is full")
    response = http.post("/ask", json={"question": "full?", "stream": True})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"
    assert response.json()["error"]["code"] == "busy"


def test_a_stream_that_fails_later_ends_with_an_error_event(http: httpx.Client, fake: FakeRAG) -> None:
    fake.late["and then?"] = errors.EngineError("no more cells")
    response = http.post("/ask", json={"question": "and then?", "stream": True})
    told = parsed(response.text)
    assert response.status_code == 200
    assert [kind for kind, _ in told] == ["sources", "error"]
    assert told[-1][1]["error"]["code"] == "engine_error"
    assert told[-1][1]["error"]["message"] == "no more cells"


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_ours_is_logged_and_not_shown(
    stream: bool, http: httpx.Client, fake: FakeRAG, caplog: pytest.LogCaptureFixture
) -> None:
    fake.errors["fault?"] = KeyError("inner secret")
    response = http.post("/ask", json={"question": "fault?", "stream": stream})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "inner secret" in record.getMessage()
    assert record.exc_info


def test_a_fault_in_the_middle_of_a_stream_is_not_shown_either(
    http: httpx.Client, fake: FakeRAG, caplog: pytest.LogCaptureFixture
) -> None:
    fake.late["late fault?"] = KeyError("inner secret")
    response = http.post("/ask", json={"question": "late fault?", "stream": True})
    kind, told = parsed(response.text)[-1]
    assert (kind, told["error"]["code"]) == ("error", "engine_error")
    assert "secret" not in response.text
    assert "inner secret" in caplog.text


def test_unknown_paths_and_methods_are_errors_in_the_same_shape(http: httpx.Client) -> None:
    missing, wrong = http.get("/nothing"), http.put("/ask")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert "/nothing" in missing.json()["error"]["message"]
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


def test_nobody_is_sent_to_where_his_host_header_says(http: httpx.Client) -> None:
    response = http.post("/ask/", json={"question": "a"}, headers={"Host": "elsewhere"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
