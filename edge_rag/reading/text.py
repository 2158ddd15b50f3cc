"""Plain text: from bytes to characters, and the document they are."""

import codecs
import re
from pathlib import Path

from charset_normalizer import from_bytes

from edge_rag.errors import DocumentError
from edge_rag.reading.kinds import printable
from edge_rag.records import ParsedDocument, Section

# A binary file has some 10 % of them; text has a stray one now and then, or escape sequences (0x1B) in a log.
_CONTROLS = bytes(code for code in range(32) if code not in b"\t\n\r\f\x1b")
_MAX_CONTROL_SHARE = 0.02
_MAX_INVALID_SHARE = 0.001
_MAX_TITLE = 200

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # Before UTF-16: its little-endian mark begins with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

# The encodings worth guessing. With all that Python knows, short texts are taken for exotic ones.
_GUESSES = [
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "koi8_r", "cp437", "cp850"),
    *("cp932", "euc_jp", "iso2022_jp", "gb18030", "big5", "euc_kr"),
]
_WESTERN = re.compile(r"[\x00-\x7f\xa0äöüßÄÖÜáàâãåæçéèêëíîïñóòôõøœúùûÀÁÂÅÆÇÈÉÊËÍÎÑÓÔÕØŒÚ¿¡«»„“”‘’‚–—…°§©®µ€£²·]*")

_LINE_ENDS = re.compile(r"\r\n?|[\v\f]")
# C0 and C1 controls, and overrides of the writing direction: they would drive the terminal that shows a passage.
_UNSEEN = (*range(32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_REMOVED = dict.fromkeys(code for code in _UNSEEN if chr(code) not in "\t\n")


def parse_text(path: Path, data: bytes) -> ParsedDocument:
    """The whole file as one section."""
    text, warnings = decode(path, data)
    return ParsedDocument(
        title=printable(path.stem), kind="txt", sections=(Section(text=text, start=0),), warnings=warnings
    )


def decode(path: Path, data: bytes, declared: str = "") -> tuple[str, tuple[str, ...]]:
    """The characters of a text file with line ends as `\\n` and no control characters, and warnings.

    `declared` is the encoding that the file itself names; it counts only when the bytes are not UTF-8.
    """
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), "")
    if not encoding:
        _check_not_binary(path, data)
    text, warnings = _with_mark(data, encoding) if encoding else _without_mark(data, declared)
    text = clean(text)
    if not text.strip():
        raise DocumentError("there is no text in it", remedy="leave it out", field=printable(path))
    return text, warnings


def clean(text: str) -> str:
    """Line ends become `\\n`, control characters go."""
    # Page and line feeds separate lines; dropping them would join words.
    return _LINE_ENDS.sub("\n", text).translate(_REMOVED)


def one_line(title: str) -> str:
    """A title or heading on one line and of bounded length: it is repeated with every chunk below it."""
    words = " ".join(title[: 4 * _MAX_TITLE].split())
    return words if len(words) <= _MAX_TITLE else words[:_MAX_TITLE].rstrip() + "…"


def _check_not_binary(path: Path, data: bytes) -> None:
    controls = len(data) - len(data.translate(None, _CONTROLS))
    if controls > len(data) * _MAX_CONTROL_SHARE:
        remedy = "leave it out; if it is text in another encoding, save it as UTF-8"
        raise DocumentError("binary data, not text", remedy=remedy, field=printable(path))


def _with_mark(data: bytes, encoding: str) -> tuple[str, tuple[str, ...]]:
    text = data.decode(encoding, "replace")
    # The mark was U+FFFD-free; what is there now is damage (or was typed, which is as rare as harmless).
    damaged = text.count("\ufffd")
    return text, (f"{damaged} damaged characters were replaced by \ufffd",) if damaged else ()


def _without_mark(data: bytes, declared: str) -> tuple[str, tuple[str, ...]]:
    try:
        return data.decode(), ()
    except UnicodeDecodeError:
        pass
    invalid = sum("\udc80" <= char <= "\udcff" for char in data.decode(errors="surrogateescape"))
    if invalid < len(data) * _MAX_INVALID_SHARE:
        return data.decode(errors="replace"), (f"{invalid} bytes that are not UTF-8 were replaced by \ufffd",)
    if declared:
        return data.decode(declared, "replace"), ()
    encoding = _guess(data)
    return data.decode(encoding, "replace"), (f"not UTF-8; read as {encoding}, which is a guess",)


def _guess(data: bytes) -> str:
    best = from_bytes(data, cp_isolation=_GUESSES).best()
    encoding = best.encoding if best else "cp1252"
    # The two agree on most Western letters, and the library then names the Eastern one.
    if encoding == "cp1250" and _WESTERN.fullmatch(data.decode("cp1252", "replace")):
        return "cp1252"
    return encoding
