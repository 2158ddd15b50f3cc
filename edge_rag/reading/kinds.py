"""Which files are read, and as what. Data only, so that walking a folder loads no parser."""

from pathlib import Path

KINDS = {
    ".md": "md",
    ".markdown": "md",
    ".txt": "txt",
    ".text": "txt",
    ".log": "txt",
    # Its headings follow other rules than Markdown's; as plain text nothing is misread.
    ".rst": "txt",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
    ".docx": "office",
    ".pptx": "office",
    ".xlsx": "office",
}

EXTENSIONS = " ".join(KINDS)


def kind_of(path: Path) -> str:
    """The kind that a file's extension names; anything unknown is tried as plain text."""
    return KINDS.get(path.suffix.lower(), "txt")


def is_readable(path: Path) -> bool:
    """Whether a folder's file is taken without being named."""
    return path.suffix.lower() in KINDS


def printable(path: Path | str) -> str:
    r"""The path as text that can be shown and stored: bytes that are not UTF-8 become \xNN."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
