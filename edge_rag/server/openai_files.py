"""/v1/files: the documents. Uploading a file is adding it to the library; its purpose says nothing here."""

import re
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_rag.errors import DocumentError, InputError, NotFound
from edge_rag.records import AddReport, Document, Filter
from edge_rag.server.bodies import answered, query_number
from edge_rag.server.document_routes import removed, uploading
from edge_rag.server.forms import files_of, form, is_form
from edge_rag.server.openai_shapes import FILE_PREFIX, Shape, file_id
from edge_rag.server.service import service_of
from edge_rag.server.streaming import collected
from edge_rag.server.uploads import Upload

PURPOSES = ("assistants", "user_data")
MOST_FILES = 10_000  # in one list


class FileShape(Shape, frozen=True, kw_only=True):
    """A document. `path` is ours."""

    id: str
    object: str = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str = "user_data"
    status: str = "processed"
    path: str


class Deleted(Shape, frozen=True, kw_only=True):
    """A document that is no longer there."""

    id: str
    object: str = "file"
    deleted: bool = True


class Page(Shape, frozen=True, kw_only=True):
    """A part of a list; the next one begins behind `last_id`."""

    object: str = "list"
    data: tuple[FileShape, ...]
    first_id: str | None
    last_id: str | None
    has_more: bool = False


async def upload(request: Request) -> Response:
    """POST /v1/files: add a file. Raises InputError for a bad form and DocumentError for a file that cannot be read."""
    if not is_form(request):
        raise InputError("must be a form", field="body", remedy="as in curl -F purpose=user_data -F file=@notes.md")
    parsed = await form(request)
    try:
        file = _only_file(parsed)
        report = await _added(request, file)
    finally:
        await parsed.close()
    [done] = report.files
    if done.outcome == "failed":
        raise DocumentError(done.reason, field=file.name)
    service = service_of(request)
    found = await service.call(service.rag.documents, Filter(documents=(done.path,)))
    if not found:
        raise NotFound("has been removed by another caller meanwhile", field=file.name)
    return answered(file_shape(found[0]))


def _only_file(parsed: FormData) -> Upload:
    """The file in a form. Raises InputError for another purpose than ours, and for no file or several."""
    if parsed.get("purpose", PURPOSES[0]) not in PURPOSES:
        raise InputError(f"must be one of {', '.join(PURPOSES)}", field="purpose")
    first, *others = files_of(parsed)
    if others:
        raise InputError("one file at a time", field="file", remedy="POST /documents takes several")
    return first


async def _added(request: Request, file: Upload) -> AddReport:
    service = service_of(request)
    told = await collected(request, service.jobs.stream(uploading(service, [file])))
    report = told[-1][1]
    assert isinstance(report, AddReport)
    return report


async def files(request: Request) -> Response:
    """GET /v1/files?limit=…&after=…&order=…&purpose=…: documents, the newest first. Raises InputError and NotFound."""
    query, service = request.query_params, service_of(request)
    limit = query_number(request, "limit", default=MOST_FILES, most=MOST_FILES)
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InputError(f"must be asc or desc, not {order[:20]!r}", field="order")
    found = await service.call(service.rag.documents)
    found.sort(key=lambda document: (document.added_at, document.id), reverse=order == "desc")
    if query.get("purpose", PURPOSES[0]) not in PURPOSES:
        found = []
    first = found.index(_named(found, query["after"], "after")) + 1 if "after" in query else 0
    return answered(_page([file_shape(document) for document in found[first:]], limit))


async def file(request: Request) -> Response:
    """GET /v1/files/{id}: one of them. Raises NotFound."""
    return answered(file_shape(await _document(request)))


async def delete(request: Request) -> Response:
    """DELETE /v1/files/{id}: remove a document with all that was derived from it. Raises NotFound."""
    service, document = service_of(request), await _document(request)
    await service.call(removed, service, [Path(document.path)])
    return answered(Deleted(id=file_id(document.id)))


async def _document(request: Request) -> Document:
    service = service_of(request)
    return _named(await service.call(service.rag.documents), request.path_params["file"], "file_id")


def _named(documents: Sequence[Document], name: str, field: str) -> Document:
    """The document with this file id. Raises NotFound."""
    number = re.fullmatch(f"{FILE_PREFIX}([0-9]{{1,18}})", name)
    found = [document for document in documents if number and document.id == int(number[1])]
    if not found:
        raise NotFound(f"there is no file {name[:100]!r}", field=field, remedy="see GET /v1/files")
    return found[0]


def file_shape(document: Document) -> FileShape:
    """A document as a file."""
    return FileShape(
        id=file_id(document.id),
        bytes=document.bytes,
        created_at=int(document.added_at),
        filename=Path(document.path).name,
        path=document.path,
    )


def _page(found: Sequence[FileShape], limit: int) -> Page:
    data = tuple(found[:limit])
    return Page(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(found) > limit,
    )


ROUTES = [
    Route("/v1/files", upload, methods=["POST"]),
    Route("/v1/files", files, methods=["GET"]),
    Route("/v1/files/{file}", file, methods=["GET"]),
    Route("/v1/files/{file}", delete, methods=["DELETE"]),
]
