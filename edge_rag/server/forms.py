"""Files in a request: a multipart form, received into temporary files that are on disk when they are large."""

import contextlib
import tempfile

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from edge_rag.errors import InputError, StorageError
from edge_rag.server.bodies import limited, patience
from edge_rag.server.service import service_of
from edge_rag.server.uploads import Upload, clean_name

MOST_FILES = 1000
MOST_FIELDS = 20


async def form(request: Request) -> FormData:
    """The request's form, which the caller must `close`.

    Raises InputError, StorageError when its files find no room, and as `limited` does.
    """
    if not is_form(request):
        raise InputError("is no form", field="body", remedy="send multipart/form-data")
    service = service_of(request)
    with patience(service, service.settings.server.timeout):
        async with contextlib.aclosing(limited(request)) as coming:
            parser = MultiPartParser(request.headers, coming, max_files=MOST_FILES, max_fields=MOST_FIELDS)
            try:
                return await parser.parse()
            except MultiPartException as error:
                raise InputError(f"is not a form that can be read: {error.message}", field="body") from error
            except OSError as error:
                raise StorageError(
                    f"files cannot be received: {error.strerror}",
                    field=tempfile.gettempdir(),
                    remedy="make room there, or name another place with TMPDIR",
                ) from error
    raise AssertionError("patience raises")


def is_form(request: Request) -> bool:
    """Whether a form was sent."""
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


def files_of(parsed: FormData, field: str = "file") -> list[Upload]:
    """The files in a form's field of this name. Raises InputError when there is none, or two have one name."""
    found = [
        Upload(clean_name(value.filename or ""), value.file)
        for value in parsed.getlist(field)
        if isinstance(value, UploadFile)
    ]
    if not found:
        raise InputError("no file was sent", field=field, remedy=f"as in curl -F {field}=@notes.md")
    if len({upload.name for upload in found}) < len(found):
        raise InputError("two files have the same name", field=field, remedy="send one of them later")
    return found
