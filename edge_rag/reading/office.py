"""Office files (docx, pptx, xlsx) by way of markitdown, which is an extra: it is large and rarely needed."""

import io
import re
import zipfile
from pathlib import Path

from edge_rag.errors import DocumentError
from edge_rag.reading.kinds import printable
from edge_rag.reading.markdown import markdown_document
from edge_rag.reading.text import clean
from edge_rag.records import ParsedDocument

_INSTALL = "pip install 'edge-rag[office]'"
# The container of the formats before 2007, and of encrypted files in the newer ones.
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_FOLDERS = {".docx": "word/", ".pptx": "ppt/", ".xlsx": "xl/"}
_COMMENT = re.compile(r"<!--.*?-->\s*", re.DOTALL)
# A small archive can unpack to more than the memory holds.
_MAX_UNPACKED = 1 << 30


def parse_office(path: Path, data: bytes) -> ParsedDocument:
    """The document that markitdown makes of an office file."""
    _check_archive(path, data)
    # markitdown numbers slides in comments.
    text = _COMMENT.sub("", clean(_convert(path, data)))
    if not text.strip():
        raise DocumentError("there is no text in it", remedy="leave it out", field=printable(path))
    return markdown_document(path, text, kind="office")


def _check_archive(path: Path, data: bytes) -> None:
    if data.startswith(_OLE):
        remedy = "open it and save it again as docx, pptx or xlsx without a password"
        raise DocumentError("encrypted, or in a format from before 2007", remedy=remedy, field=printable(path))
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _broken(path, str(error)) from error
    # Without its main folder it would be read as an archive of files.
    folder = _FOLDERS[path.suffix.lower()]
    if not any(member.filename.startswith(folder) for member in members):
        raise _broken(path, f"it has no folder {folder}")
    if sum(member.file_size for member in members) > _MAX_UNPACKED:
        raise DocumentError("it unpacks to more than 1 GB", remedy="split it into smaller files", field=printable(path))


def _convert(path: Path, data: bytes) -> str:
    try:
        import markitdown
    except ImportError as error:
        raise DocumentError("office files need an extra", remedy=_INSTALL, field=printable(path)) from error
    try:
        info = markitdown.StreamInfo(extension=path.suffix.lower(), filename=printable(path.name))
        return str(
            markitdown.MarkItDown(enable_plugins=False).convert_stream(io.BytesIO(data), stream_info=info).text_content
        )
    except markitdown.MissingDependencyException as error:
        raise DocumentError("markitdown lacks a part", remedy=_INSTALL, field=printable(path)) from error
    except markitdown.MarkItDownException as error:
        raise _broken(path, str(error).splitlines()[0]) from error


def _broken(path: Path, detail: str) -> DocumentError:
    remedy = "open it in an office program and save it again"
    return DocumentError(f"the office file is broken ({detail})", remedy=remedy, field=printable(path))
