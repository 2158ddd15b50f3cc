"""What callers send to hurt: very much, very deep, numbers that are none, names and ids that are paths."""

import socket
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from msgspec import inspect

from edge_rag.server import bodies, document_routes, native_routes, openai_requests, openai_stores
from edge_rag.server.service import Service
from tests.server.abusing import CLOSE, connected, posted, problems
from tests.server.fakes import FakeRAG
from tests.server.harness import caller, raw, received

MEGABYTE = 1_000_000
FORM = b"multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.md"\r\n\r\n'


@pytest.fixture
def rag(tmp_path: Path) -> FakeRAG:
    (tmp_path / "data").mkdir()
    return FakeRAG(tmp_path / "data", server__max_body_mb=2)


def closing(request: bytes) -> bytes:
    """A request after which the connection is closed."""
    return request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)


# --- very much -------------------------------------------------------------------------------------------------------


def sent_in_chunks(connection: socket.socket, piece: bytes, pieces: int) -> int:
    """How many pieces were sent before the server had enough."""
    chunk = b"%x\r\n%b\r\n" % (len(piece), piece)
    for number in range(pieces):
        try:
            connection.sendall(chunk)
        except OSError:
            return number
    return pieces


@pytest.mark.parametrize(
    ("route", "kind", "start"),
    [
        (b"/ask", b"application/json", b" "),
        (b"/v1/chat/completions", b"application/json", b" "),
        (b"/documents", FORM, PART),
        (b"/v1/files", FORM, PART),
    ],
)
def test_a_hundred_megabytes_cost_little_wherever_they_are_sent(
    route: bytes, kind: bytes, start: bytes, service: Service, path: Path, rag: FakeRAG
) -> None:
    head = b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % (route, kind)
    piece = b" " * MEGABYTE
    tracemalloc.start()
    try:
        with connected(path, head + b"%x\r\n%b\r\n" % (len(start), start)) as connection:
            assert sent_in_chunks(connection, piece, 100) < 10
            assert received(connection).startswith(b"HTTP/1.1 413")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 12 * MEGABYTE
    assert not rag.calls
    assert service.coming == 0


def test_too_many_large_bodies_at_once_are_told_to_come_again(
    http: httpx.Client, service: Service, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "AT_ONCE", 1)
    large = posted(b"/documents", PART + b"a" * 1_900_000, FORM)
    with connected(path, large[:1_500_000]):
        while service.coming < 1_400_000:
            http.get("/health")
        assert raw(path, closing(large)).startswith(b"HTTP/1.1 503")
        assert http.post("/ask", json={"question": "a small one?"}).status_code == 200
    while service.coming:
        http.get("/health")
    assert http.post("/documents", files={"file": ("a.md", b"a" * 1_900_000)}).status_code == 200


def test_json_has_a_closer_limit_than_files(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "JSON_MB", 1)
    body = b'{"question": "a"}'
    assert http.post("/ask", content=body.ljust(MEGABYTE)).status_code == 200
    assert http.post("/ask", content=body.ljust(MEGABYTE + 1)).status_code == 413
    assert http.post("/documents", files={"file": ("a.md", b"a" * MEGABYTE)}).status_code == 200


def test_uploads_that_break_off_leave_no_open_file(http: httpx.Client, service: Service, path: Path) -> None:
    def open_files() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    torn = posted(b"/documents", PART + b"a" * 1_900_000, FORM)[:1_800_000]  # a part of this size is on disk
    assert http.get("/health").status_code == 200
    before = open_files()
    for _ in range(10):
        with connected(path, torn):
            pass
    while service.coming or open_files() > before:
        http.get("/health")
    assert http.post("/ask", json={"question": "a"}).status_code == 200


# --- very deep -------------------------------------------------------------------------------------------------------

CHAT = b'{"messages": [{"role": "user", "content": "a"}], "%b": '


@pytest.mark.parametrize("field", [b"metadata", b"tools", b"logit_bias", b"response_format", b"nobody_knows_it"])
@pytest.mark.parametrize("deep", [b"[", b'{"a":', b'[{"a":'])
def test_json_that_is_very_deep_is_refused(field: bytes, deep: bytes, socket_path: Path, fake: FakeRAG) -> None:
    before = list(fake.calls)
    with caller(socket_path) as http:
        response = http.post("/v1/chat/completions", content=CHAT % field + deep * 100_000)
    assert response.status_code == 400
    assert response.json()["error"]["param"] in ("body", "nobody_knows_it")
    assert fake.calls == before


# --- numbers ---------------------------------------------------------------------------------------------------------

ASKED: dict[str, tuple[Any, dict[str, Any]]] = {
    "/ask": (native_routes.Ask, {"question": "a"}),
    "/search": (native_routes.Search, {"query": "a"}),
    "/feedback": (native_routes.Feedback, {"answer_id": "a", "score": 1}),
    "/warm": (document_routes.Warm, {}),
    "/v1/chat/completions": (openai_requests.Chat, {"messages": [{"role": "user", "content": "a"}]}),
    "/v1/completions": (openai_requests.Complete, {"prompt": "a"}),
    "/v1/vector_stores/library/search": (openai_stores.StoreSearch, {"query": "a"}),
}
NO_NUMBERS = ("NaN", "-NaN", "Infinity", "-Infinity", "nan", "0x10", "1_0", "+1", ".5", "1e", "--1")
BAD_NUMBERS = ("-1", "-0.5", "-1e308", "1e12", "1000000000000", "1" * 400, "1e400", '"1"', '"NaN"', "true", "[1]", "{}")


def numbers(kind: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The places of all numbers in a body, its parts included."""
    for field in kind.fields:
        for each in getattr(field.type, "types", (field.type,)):
            if isinstance(each, (inspect.IntType, inspect.FloatType)):
                yield (*before, field.encode_name)
            elif isinstance(each, inspect.StructType):
                yield from numbers(each, (*before, field.encode_name))


FIELDS = [(route, place) for route, (kind, _) in ASKED.items() for place in numbers(inspect.type_info(kind))]


def with_number(route: str, place: tuple[str, ...], number: str) -> bytes:
    """A request's body that is right but for this number."""
    value: Any = msgspec.Raw(number.encode())
    for name in reversed(place):
        value = {name: value}
    return msgspec.json.encode({**ASKED[route][1], **value})


def test_there_are_numbers_to_be_asked_about() -> None:
    names = {place[-1] for _, place in FIELDS}
    assert names >= {"max_tokens", "temperature", "top_p", "min_p", "seed", "top_k", "timeout", "score", "hot"}
    assert names >= {"max_completion_tokens", "max_num_results", "score_threshold"}


@pytest.mark.parametrize(("route", "place"), FIELDS, ids=[f"{route} {place[-1]}" for route, place in FIELDS])
def test_every_number_has_its_bounds(route: str, place: tuple[str, ...], socket_path: Path, fake: FakeRAG) -> None:
    before = list(fake.calls)
    with caller(socket_path) as http:
        for number in NO_NUMBERS + BAD_NUMBERS:
            response = http.post(route, content=with_number(route, place, number))
            assert response.status_code == 400, number
            assert response.json()["error"]["param"] in (".".join(place), "body"), number
    assert fake.calls == before


@pytest.mark.parametrize("route", ["/ask", "/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("field", ["n_predict", "max_tokens", "n_ctx", "n_keep"])
def test_a_billion_tokens_are_not_to_be_had(route: str, field: str, socket_path: Path, fake: FakeRAG) -> None:
    before = list(fake.calls)
    with caller(socket_path) as http:
        response = http.post(route, json={**ASKED[route][1], field: 10**9})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    assert fake.calls == before


# --- names and ids that are paths ------------------------------------------------------------------------------------

NAMES = {
    b'filename="../../outside.md"': "outside.md",
    b'filename="..%2f..%2foutside.md"': "%2f..%2foutside.md",
    b'filename="%2e%2e/outside.md"': "outside.md",
    b'filename="/etc/outside.md"': "outside.md",
    b'filename="C:\\\\windows\\\\outside.md"': "outside.md",
    b'filename="a.md\0/../outside.md"': "outside.md",
    b'filename="out\0side.md"': "outside.md",
    b'filename="out\x1b[2Jside.md"': "out[2Jside.md",
    b'filename="~/outside.md"': "outside.md",
    b"filename*=UTF-8''..%2F..%2Foutside.md": None,  # what it would be decoded to is nowhere used
    b"filename*=UTF-8''out%00side.md": None,
}


@pytest.mark.parametrize("given", NAMES)
def test_a_file_is_kept_among_the_uploads_whatever_its_name(
    given: bytes, socket_path: Path, fake: FakeRAG, caplog: pytest.LogCaptureFixture
) -> None:
    before, name = len(fake.calls), NAMES[given]
    form = b'--x\r\nContent-Disposition: form-data; name="file"; %b\r\n\r\ngood\r\n--x--\r\n' % given
    said = raw(socket_path, closing(posted(b"/documents", form, FORM)))
    added = [call[1] for call in fake.calls[before:] if call[0] == "add"]
    assert said.startswith(b"HTTP/1.1 200" if name else b"HTTP/1.1 400")
    assert added == ([str(fake.folder.resolve() / "uploads" / name)] if name else [])
    assert not list(fake.folder.parent.rglob("*outside.md"))  # the fake library took nothing
    assert not problems(caplog)


@pytest.mark.parametrize(
    "target",
    [
        b"/v1/files/..%2f..%2fetc%2fpasswd",
        b"/v1/files/%2e%2e",
        b"/v1/files/file-3%00",
        b"/v1/files/file-%D9%A3",
        b"/v1/files/file-3%0a",
        b"/v1/files//etc/passwd",
        b"/v1/files/file-99999999999999999999",
        b"/v1/models/../../etc/passwd",
        b"/v1/models/%00",
        b"/v1/vector_stores/%2e%2e",
        b"/documents/../../etc/passwd",
        b"//etc/passwd",
        b"/%2e%2e/%2e%2e/etc/passwd",
    ],
)
@pytest.mark.parametrize("method", [b"GET", b"DELETE"])
def test_an_id_that_is_a_path_leads_nowhere(
    method: bytes, target: bytes, socket_path: Path, fake: FakeRAG, caplog: pytest.LogCaptureFixture
) -> None:
    before = len(fake.calls)
    said = raw(socket_path, b"%b %b HTTP/1.1\r\nHost: a\r\n" % (method, target) + CLOSE)
    assert said.startswith((b"HTTP/1.1 404", b"HTTP/1.1 405"))
    assert b"root:" not in said
    assert {call[0] for call in fake.calls[before:]} <= {"documents"}
    assert not problems(caplog)
