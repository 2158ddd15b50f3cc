"""GET /openapi.json: all routes in OpenAPI 3.2, made from the route table, the records and the handlers' docstrings.

3.2 is the first version that has words for streams of events. What is refused by name elsewhere
(`openai_requests.NEUTRAL`) stands here with the values that are let through.
"""

import inspect
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_rag.server.bodies import answered
from edge_rag.server.errors import JSON, ErrorBody
from edge_rag.server.openai_files import PURPOSES
from edge_rag.server.openai_requests import NEUTRAL
from edge_rag.server.operations import OPERATIONS, PARTS, Operation
from edge_rag.server.service import service_of

STREAM, FORM, TEXT = "text/event-stream", "multipart/form-data", "text/plain"
WORDS = {
    200: "Done.",
    204: "Done.",
    400: "A field is wrong; `param` names it.",
    401: "The key is missing or wrong (TCP only).",
    403: "This user, or this Host, may not ask.",
    404: "What is named is not there.",
    405: "The path is there, the method is not.",
    408: "The request did not come in time.",
    413: "The request is too large.",
    500: "A fault of ours; the server's log has it.",
    503: "Too much to do, or the machine must be repaired first; `code` says which.",
}
ALWAYS = (401, 403, 405, 500, 503)
SENT = (400, 408, 413)  # when there is a body
OWN = Operation(reply=dict[str, Any])

Json = dict[str, Any]


async def openapi(request: Request) -> Response:
    """GET /openapi.json: this document."""
    return answered(await service_of(request).call(described, request.app.routes))


def described(routes: Sequence[Route]) -> Json:
    """The document of these routes. Raises KeyError for one that `operations` does not know."""
    known = {**OPERATIONS, openapi: OWN}
    operations = [(route, known[route.endpoint]) for route in routes]
    schemas = _Schemas(kind for _, operation in operations for kind in _kinds(operation))
    paths: dict[str, Json] = {}
    for route, operation in operations:
        method = next(method for method in sorted(route.methods or ()) if method != "HEAD").lower()
        paths.setdefault(_path(route), {})[method] = _operation(route, operation, schemas)
    return {
        "openapi": "3.2.0",
        "info": {"title": "edge_rag", "version": version("edge-rag"), "description": "See docs/server.md."},
        "security": [{}, {"key": []}],  # the socket needs none
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "Over TCP only."}},
        },
    }


class _Schemas:
    """Schemas of records: each by reference to its component."""

    def __init__(self, kinds: Iterable[Any]) -> None:
        self._kinds = list(dict.fromkeys(kinds))
        found, components = msgspec.json.schema_components(self._kinds, ref_template="#/components/schemas/{name}")
        self._found = dict(zip(self._kinds, found, strict=True))
        self.components: dict[str, Json] = dict(components)
        for component in self.components.values():
            for name, field in component.get("properties", {}).items():
                if name in NEUTRAL and field.keys() <= {"default"}:
                    field["enum"] = [None, *NEUTRAL[name]]

    def __getitem__(self, kind: Any) -> Json:
        schema: Json = self._found[kind]
        return schema

    def fields(self, kind: Any) -> dict[str, Json]:
        """The fields of a record, for a query; its component is not needed then."""
        fields: dict[str, Json] = self.components.pop(kind.__name__)["properties"]
        return fields

    def required(self, kind: Any) -> list[str]:
        """The fields that a record must have; of no record none."""
        return list(self.components[kind.__name__].get("required", ())) if kind else []


def _kinds(operation: Operation) -> Iterable[Any]:
    named = (operation.body, operation.query, operation.reply, *operation.statuses.values(), *operation.events.values())
    return (ErrorBody, *filter(None, named))


def _path(route: Route) -> str:
    """As OpenAPI writes it: without convertors."""
    return re.sub(r":\w+}", "}", route.path)


def _operation(route: Route, operation: Operation, schemas: _Schemas) -> Json:
    told: Json = {
        "operationId": "_".join((route.endpoint.__module__.rpartition(".")[2], route.endpoint.__name__)),
        "summary": _summary(route.endpoint),
        "parameters": [
            *map(_part, _names(route)),
            *_queries(operation, schemas),
        ],
        "responses": _responses(route, operation, schemas),
    }
    content = _request_content(operation, schemas)
    needed = operation.upload or bool(schemas.required(operation.body))
    return told | ({"requestBody": {"content": content, "required": needed}} if content else {})


def _summary(endpoint: Any) -> str:
    """The first line of a handler's docstring, without method, path, and what concerns Python."""
    line = inspect.getdoc(endpoint).splitlines()[0]  # type: ignore[union-attr]
    said = re.sub(r"^[A-Z]+ /\S*: ", "", line.partition(" Raises ")[0])
    return said[0].upper() + said[1:]


def _names(route: Route) -> list[str]:
    return re.findall(r"{(\w+)", route.path)


def _part(name: str) -> Json:
    """A named part of a path."""
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}, "example": PARTS[name]}


def _queries(operation: Operation, schemas: _Schemas) -> Iterable[Json]:
    if operation.query:
        for name, schema in schemas.fields(operation.query).items():
            yield {"name": name, "in": "query", "required": False, "schema": schema}


def _request_content(operation: Operation, schemas: _Schemas) -> Json:
    content: Json = {}
    if operation.body:
        content[JSON] = {"schema": schemas[operation.body]}
    if operation.upload:
        file = {"contentMediaType": "application/octet-stream"}
        several = {"type": "array", "items": file, "minItems": 1} if operation.body else file
        fields = {"file": several} | ({} if operation.body else {"purpose": {"enum": list(PURPOSES)}})
        content[FORM] = {"schema": {"type": "object", "properties": fields, "required": ["file"]}}
    return content


def _responses(route: Route, operation: Operation, schemas: _Schemas) -> Json:
    statuses: Json = {}
    if 204 not in operation.statuses:
        statuses["200"] = _response(200, _reply_content(operation, schemas))
    for status in _refusals(route, operation):
        statuses[str(status)] = _response(status, {JSON: {"schema": schemas[ErrorBody]}})
    for status, kind in operation.statuses.items():
        others = [statuses[str(status)]["content"][JSON]["schema"]] if str(status) in statuses else []
        content = {JSON: {"schema": {"anyOf": [schemas[kind], *others]}}} if kind else {}
        statuses[str(status)] = _response(status, content)
    return dict(sorted(statuses.items()))


def _refusals(route: Route, operation: Operation) -> list[int]:
    sends = operation.body or operation.upload
    named = (404,) if operation.names or _names(route) else ()
    asked = SENT if sends else (400,) if operation.query else ()
    return sorted({*ALWAYS, *named, *asked})


def _response(status: int, content: Json) -> Json:
    told: Json = {"description": WORDS[status]}
    if status == 503:
        told["headers"] = {
            "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds, when it is worth it."}
        }
    return told | ({"content": content} if content else {})


def _reply_content(operation: Operation, schemas: _Schemas) -> Json:
    content: Json = {}
    if operation.reply:
        content[JSON] = {"schema": schemas[operation.reply]}
    if operation.text:
        content[TEXT] = {"schema": {"type": "string"}}
    if operation.events:
        content[STREAM] = {"itemSchema": {"anyOf": list(_events(operation, schemas))}}
    return content


def _events(operation: Operation, schemas: _Schemas) -> Iterable[Json]:
    """One schema an event; a failed stream ends with an error, one without kinds otherwise with [DONE]."""
    for kind, record in operation.events.items():
        yield _event(kind, schemas[record])
    if "" in operation.events:
        yield _event("", schemas[ErrorBody])
        yield {"properties": {"data": {"const": "[DONE]"}}, "required": ["data"]}
    else:
        yield _event("error", schemas[ErrorBody])


def _event(kind: str, data: Json) -> Json:
    named = {"event": {"const": kind}} if kind else {}
    content = {"type": "string", "contentMediaType": JSON, "contentSchema": data}
    return {"type": "object", "properties": {**named, "data": content}, "required": [*named, "data"]}


ROUTES = [Route("/openapi.json", openapi, methods=["GET"])]
