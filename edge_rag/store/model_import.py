"""Bringing a model of one's own: what file it may be, what it is called, which known model it turns out to be."""

import re
from collections.abc import Sequence
from pathlib import Path

from edge_rag.errors import InputError, ModelError
from edge_rag.records import ModelKind, ModelSpec
from edge_rag.store.fetching import Progress, copy
from edge_rag.store.manifest import NAME, SUFFIXES, faults


def import_name(path: Path, name: str | None) -> str:
    """The name of an imported model: `name`, or made of the file name. Raises InputError for a bad one."""
    wanted = re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).strip("-._") if name is None else name
    if not NAME.fullmatch(wanted):
        message = f"{wanted!r} cannot name a model: lower-case letters, digits, dots, dashes and underscores can"
        raise InputError(message, remedy="give it a name", field="name")
    return wanted


def check_importable(path: Path, kind: ModelKind) -> int:
    """The size of a file that can be a model of `kind`."""
    if kind not in SUFFIXES:
        raise InputError(f"must be one of {', '.join(SUFFIXES)}", field="kind")
    if not path.is_file():
        raise InputError(f"there is no file {path}", field="path")
    try:
        with path.open("rb") as file:
            head = file.read(4)
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}", field="path") from error
    if not size or (kind == "llm" and head != b"GGUF"):
        raise InputError(f"{path} is not a {'GGUF' if kind == 'llm' else kind} file", field="path")
    return size


def copy_in(path: Path, partial: Path, size: int, progress: Progress | None) -> str:
    """Copies the user's file and returns its sha256."""
    try:
        digest = copy(path, partial, size, progress)
    except ModelError as error:  # it changed under our hands
        raise InputError(error.message, field="path") from error
    if partial.stat().st_size != size:
        raise InputError(f"{path} shrank while it was copied", field="path")
    return digest


def new_spec(name: str, kind: ModelKind, size: int, sha256: str, licence: str, origin: Path) -> ModelSpec:
    """The manifest entry of an imported file."""
    return ModelSpec(
        name=name,
        kind=kind,
        file=name + SUFFIXES[kind],
        size=size,
        sha256=sha256,
        licence=_clean(licence).strip() or "unknown",
        notes=f"imported from {_clean(origin.name)}",
    )


def _clean(text: str) -> str:
    """Without the lone surrogates that stand for undecodable bytes in file names and arguments."""
    return text.encode("utf-8", "replace").decode("utf-8")


def settle(new: ModelSpec, known: Sequence[ModelSpec], *, named: bool) -> ModelSpec:
    """The model that an imported file becomes: one that is known by its hash, else `new`."""
    for spec in known:
        if spec.sha256 == new.sha256 and (spec.name == new.name or not named):
            return spec
    for spec in known:
        if spec.name == new.name or spec.file.casefold() == new.file.casefold():
            raise InputError(f"another file is the model {spec.name!r}", remedy="give another name", field="name")
    for field, message in faults(new):
        raise InputError(message, field=field)
    return new
