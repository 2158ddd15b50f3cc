"""Reading one file: its bytes, and the document in them. Every failure is a `DocumentError` about that file."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_rag.errors import DocumentError
from edge_rag.reading.html import parse_html
from edge_rag.reading.kinds import kind_of, printable
from edge_rag.reading.markdown import parse_markdown
from edge_rag.reading.office import parse_office
from edge_rag.reading.pdf import parse_pdf
from edge_rag.reading.text import parse_text
from edge_rag.records import ParsedDocument

_BLOCK = 1 << 20

_PARSERS = {"md": parse_markdown, "txt": parse_text, "html": parse_html, "pdf": parse_pdf, "office": parse_office}


def read_document(path: Path, *, max_bytes: int) -> ParsedDocument:
    """Read and parse a file; `DocumentError` says why it cannot be."""
    return parse(path, read_bytes(path, max_bytes))


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The file's content. Never blocks on a pipe or device, and never holds more than `max_bytes` and a block."""
    name = printable(path)
    with _errors_of(name):
        # Checked before opening, since opening a device can act on it; and again after, since names can be moved.
        _check_regular(name, path.stat())
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            _check_regular(name, status)
            _check_size(name, status.st_size, max_bytes)
            data = bytearray()
            while block := file.read(_BLOCK):
                data += block
                # The file may be growing while it is read.
                _check_size(name, len(data), max_bytes)
            return bytes(data)


def parse(path: Path, data: bytes) -> ParsedDocument:
    """The document in `data`, which was read from `path`; the extension decides the format. Opens nothing."""
    if not data.strip():
        raise DocumentError(
            "the file is empty", remedy="write something into it, or leave it out", field=printable(path)
        )
    return _PARSERS[kind_of(path)](path, data)


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DocumentError("the file has vanished", remedy="add it again when it is back", field=name) from error
    except PermissionError as error:
        remedy = "make it readable for the user who runs edge-rag (chmod u+r)"
        raise DocumentError("no permission to read it", remedy=remedy, field=name) from error
    except OSError as error:
        reason = f"it cannot be read: {error.strerror or error}"
        raise DocumentError(reason, remedy="check the disk or the connection to it", field=name) from error


def _check_regular(name: str, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
    raise DocumentError(f"not a regular file but {what}", remedy="give the path of a document", field=name)


def _check_size(name: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        reason = f"larger than is read: {_readable(size)}, the limit is {_readable(max_bytes)}"
        raise DocumentError(reason, remedy="raise the setting ingest.max_file_mb, or split the file", field=name)


def _readable(size: int) -> str:
    return f"{size / 1_000_000:.1f} MB" if size >= 1_000_000 else f"{size:,} bytes"
