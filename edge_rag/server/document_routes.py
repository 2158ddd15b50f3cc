"""Routes that change or list what is in the library. What takes long is a stream: `progress` events, then `report`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_rag.errors import InputError
from edge_rag.records import AddReport, Document, Filter, Record
from edge_rag.server import bounds
from edge_rag.server.access import owner_asks
from edge_rag.server.bodies import Body, answered, body
from edge_rag.server.errors import Refused
from edge_rag.server.forms import files_of, form, is_form
from edge_rag.server.roots import absolute, readable
from edge_rag.server.service import Service, service_of
from edge_rag.server.streaming import event, streamed
from edge_rag.server.uploads import Upload
from edge_rag.server.workers import Put, Stream, Work

# An event of a long job: its kind and its data.
JobEvent = tuple[str, Any]


class Add(Body, frozen=True):
    """Add by path: files and folders that the server can read. `warm`: compute their KV too."""

    paths: bounds.SomeNames
    include: bounds.Names = ()
    exclude: bounds.Names = ()
    prune: bool = False
    warm: bool = False


class Paths(Body, frozen=True):
    """Documents, or folders of documents, by absolute path."""

    paths: bounds.SomeNames


class Warm(Body, frozen=True):
    """Documents whose KV is computed, all when there are no paths; at most `hot` passages."""

    paths: bounds.Names = ()
    hot: bounds.Hot | None = None


class Nothing(Body, frozen=True):
    """A body without fields."""


class Reembedded(Record, frozen=True):
    """The report of /reembed."""

    chunks: int


class ReembedProgress(Record, frozen=True):
    """`done` of `total` chunks are embedded."""

    done: int
    total: int


async def documents(request: Request) -> Response:
    """GET /documents?folder=…&kind=…&document=…: the documents, by path."""
    named, kinds = _repeated(request, "document"), _repeated(request, "kind")
    where = Filter(documents=named, folder=request.query_params.get("folder", ""), kinds=kinds)
    service = service_of(request)
    return answered(await service.call(service.rag.documents, where))


def _repeated(request: Request, name: str) -> tuple[str, ...]:
    """All values of a field of the query string that may be repeated. Raises InputError."""
    try:
        return msgspec.convert(request.query_params.getlist(name), bounds.Names)
    except msgspec.ValidationError as error:
        raise InputError(str(error).partition(" - at ")[0], field=name) from error


async def add(request: Request) -> Response:
    """POST /documents: add by path (JSON, own user only), or files that are sent (a form with `file` fields)."""
    if is_form(request):
        return await _add_files(request)
    wanted = await body(request, Add)
    if not owner_asks(request):
        raise Refused(
            403, "forbidden", "only the server's own user adds by path", field="paths", remedy="upload the files"
        )
    service = service_of(request)
    roots = service.settings.server.roots
    paths = await service.call(readable, wanted.paths, roots, include=wanted.include, exclude=wanted.exclude)
    return await _streamed(service, service.jobs.stream(adding(service, wanted, paths)))


async def _add_files(request: Request) -> Response:
    service = service_of(request)
    parsed = await form(request)
    try:
        stream = service.jobs.stream(uploading(service, files_of(parsed)))
    except BaseException:
        await parsed.close()
        raise
    return await _streamed(service, stream)  # the job closes the files


async def remove(request: Request) -> Response:
    """DELETE /documents: remove documents with all that was derived from them; answers with those removed."""
    wanted = await body(request, Paths)
    service = service_of(request)
    return answered(await service.call(removed, service, absolute(wanted.paths)))


async def warm(request: Request) -> Response:
    """POST /warm: compute the KV of passages before anybody asks."""
    wanted = await body(request, Warm)
    service, paths = service_of(request), absolute(wanted.paths)

    def work(put: Put[JobEvent]) -> None:
        put(("report", service.rag.warm(*paths, hot=wanted.hot, progress=_progress(put))))

    return await _streamed(service, service.jobs.stream(work))


async def reembed(request: Request) -> Response:
    """POST /reembed: compute all vectors anew."""
    await body(request, Nothing)
    service = service_of(request)

    def work(put: Put[JobEvent]) -> None:
        chunks = service.rag.reembed(lambda done, total: put(("progress", ReembedProgress(done, total))))
        put(("report", Reembedded(chunks)))

    return await _streamed(service, service.jobs.stream(work))


def adding(service: Service, wanted: Add, paths: Sequence[Path]) -> Work[JobEvent]:
    """The job of adding by path: `report`, and `warmed` behind it when that was wanted too."""

    def work(put: Put[JobEvent]) -> None:
        report = service.rag.add(
            *paths, include=wanted.include, exclude=wanted.exclude, prune=wanted.prune, progress=_progress(put)
        )
        put(("report", report))
        present = _present(report)
        if wanted.warm and present:
            put(("warmed", service.rag.warm(*present, progress=_progress(put))))

    return work


def uploading(service: Service, files: Sequence[Upload]) -> Work[JobEvent]:
    """The job of adding files that were sent."""

    def work(put: Put[JobEvent]) -> None:
        put(("report", service.uploads.add(files, _progress(put))))

    return work


def removed(service: Service, paths: Sequence[Path]) -> list[Document]:
    """Remove documents, and their files when these were sent. Raises NotFound, removing none."""
    gone = service.rag.remove(*paths)
    service.uploads.discard(gone)
    return gone


async def _streamed(service: Service, stream: Stream[JobEvent]) -> Response:
    return await streamed(stream, lambda told: event(*told), ping=service.settings.server.ping)


def _progress(put: Put[JobEvent]) -> Callable[[Any], None]:
    return lambda step: put(("progress", step))


def _present(report: AddReport) -> list[str]:
    return [file.path for file in report.files if file.outcome in ("added", "replaced", "unchanged")]


ROUTES = [
    Route("/documents", documents, methods=["GET"]),
    Route("/documents", add, methods=["POST"]),
    Route("/documents", remove, methods=["DELETE"]),
    Route("/warm", warm, methods=["POST"]),
    Route("/reembed", reembed, methods=["POST"]),
]
