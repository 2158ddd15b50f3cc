"""The OpenAPI document: complete, and true under requests that schemathesis makes from it, good ones and bad ones."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from edge_rag.records import Citation, Document, Filter, Plan, Timings, Usage
from edge_rag.server.access import Peer
from edge_rag.server.app import ROUTES, make_app
from edge_rag.server.openapi import described
from edge_rag.server.service import Service
from edge_rag.store.journal import Entry
from tests.server.fakes import FakeRAG, document

DOCUMENT = msgspec.json.decode(msgspec.json.encode(described(ROUTES)))
EXAMPLES = 4  # of random requests for each route, besides those at the bounds of each field
CONFIG = SchemathesisConfig.from_dict(
    {
        "checks": {"negative_data_rejection": {"expected-statuses": ["400", "404", "405", "413"]}},
        "phases": {"coverage": {"unexpected-methods": ["OPTIONS"]}},
    }
)
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
    allow_header_conformance,
)
# What these take no schema can say: absolute paths, files with different names, messages that end with a question.
MORE_THAN_SCHEMA = ("/documents", "/warm", "/adapters", "/adapters/{adapter}/export", "/v1/chat/completions")


class Whole(FakeRAG):
    """A library that has whatever is named, and keeps it: requests must not depend on those before."""

    def complete(self, text: str, **options: Any) -> Iterator[Any]:
        return self._events(text)

    def embed(self, texts: Sequence[str]) -> tuple[Any, int]:
        return np.ones((len(texts), 4), dtype=np.float32), 2 * len(texts)

    def documents(self, where: Filter | None = None) -> list[Document]:
        named = where.documents if where else ()
        return [document(path, number) for number, path in enumerate(named or ("/notes/filters.md",), 3)]

    def remove(self, *paths: Any) -> list[Document]:
        return [document(str(path)) for path in paths]

    def journal(self, limit: int = 20) -> list[Any]:
        return [
            Entry("abc", 1.0, "?", "!", "stop", "fake", Plan(), (Citation(1, 0, 1, 0.5),), Usage(), Timings(), (), None)
        ]


class Door:
    """The application that is served just now, as the server's own user sees it over the socket."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["peer"] = Peer(os.getuid())
        await self.app(scope, receive, send)


door = Door()
# The document as it is served, which a test below proves. pytest has to know its routes before there is a service.
schema = schemathesis.openapi.from_dict(DOCUMENT, config=CONFIG)
schema.app, schema.location = door, "http://edge-rag/openapi.json"


@pytest.fixture(scope="module", autouse=True)
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("data")
    flags = {"server__max_body_mb": 1, "server__roots": (str(folder),)}
    rag = Whole(folder, **flags)
    with Service(rag) as service:  # type: ignore[arg-type]
        service.ready = True
        door.app = make_app(service)
        yield


def what_fits_is_accepted(ctx: Any, response: Any, case: Any) -> Any:
    """To JSON Schema 1.0 is an integer; here it is none."""
    return None if b"got `float`" in response.content else positive_data_acceptance(ctx, response, case)


@schema.parametrize()
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
def test_the_server_does_what_its_document_says(case: Any) -> None:
    accepting = () if case.path in MORE_THAN_SCHEMA else (what_fits_is_accepted,)
    case.call_and_validate(checks=(*CHECKS, *accepting))


def test_the_document_is_served_and_is_openapi() -> None:
    with TestClient(door) as caller:
        served = caller.get("/openapi.json").json()
    assert served == DOCUMENT
    schema.validate()


def test_the_document_has_every_route() -> None:
    told = {(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    served = {(method, route.path.replace(":path", "")) for route in ROUTES for method in route.methods or ()}
    assert {route for route in served if route[0] != "HEAD"} == told


def test_no_component_is_missing_or_idle() -> None:
    used = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(DOCUMENT)))
    assert used == set(DOCUMENT["components"]["schemas"])


def test_what_is_refused_by_name_stands_there_with_what_is_let_through() -> None:
    chat = DOCUMENT["components"]["schemas"]["Chat"]["properties"]
    assert chat["n"]["enum"] == [None, 1]
    assert chat["tools"]["enum"] == [None, []]
    assert "enum" not in chat["user"]
