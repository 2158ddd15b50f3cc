"""One adapter in one file, to be carried to another library that holds the same passages.

A zip archive of two entries: `adapter.gguf`, and `adapter.json`, which says what it is (`Sheet`). Passages are named by
the hash of their heading and text, so a bundle finds them under whatever ids they have elsewhere; and it refuses to be
used where one of them is missing. Questions travel as text and are embedded anew, because libraries may use different
encoders. Held-out ones stand apart from those that were trained on: a program that does not know of them must not take
them for learned. The same adapter gives the same bytes.

A bundle comes from strangers: its size and entries are bounded before anything is unpacked, nothing is unpacked under
a name of its choice, and every value is checked. What cannot be checked is its exam: whoever imports a bundle believes
whoever made it. It holds questions and learned text of its makers: it is as private as their documents.
"""

import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from edge_rag.errors import InputError, StorageError
from edge_rag.records import Adapter
from edge_rag.store import library
from edge_rag.store.adapter_files import AdapterFolder, Copied
from edge_rag.store.adapter_sheet import (
    FORMAT,
    MOST_BYTES,
    SHEET,
    WEIGHTS,
    Member,
    Question,
    Share,
    Sheet,
    content_hash,
    parse_sheet,
)
from edge_rag.store.adapters import Questions, adapter, adapters, put_adapter, questions_of, set_state
from edge_rag.store.database import Connection, Database
from edge_rag.store.fetching import storage_errors
from edge_rag.store.model_files import sync

NAMED = 5  # missing passages that are named in a message
BATCH = 512  # passages that are hashed at once

Embed = Callable[[Sequence[str]], npt.NDArray[np.float32]]


class Unseen(Struct, frozen=True):
    """A question that was held out of the training, and its F1 in the exam."""

    question: Annotated[str, Meta(max_length=20_000)]
    f1: Share


class Beside(Struct, frozen=True):
    """What `adapter.json` says beside `Sheet`; older bundles say nothing of it."""

    held_out: Annotated[tuple[Unseen, ...], Meta(max_length=100_000)] = ()


# --- out -------------------------------------------------------------------------------------------------------------


def export_bundle(database: Database, folder: AdapterFolder, beginning: str, target: Path) -> Adapter:
    """Write the adapter whose id begins so to the new file `target`, mode 0600.

    Raises NotFound, InputError (ambiguous; the target exists) and StorageError (its file is damaged; the disk).
    """
    with database.read() as connection:
        exported = adapter(connection, beginning)
        sheet, beside = _sheet(connection, exported), _beside(connection, exported)
    if fault := folder.verify(exported.id):
        raise StorageError(f"it cannot be exported: {fault}", field=str(folder.path(exported.id)))
    with storage_errors(target):
        if target.exists():
            raise InputError(f"{target} exists already", remedy="choose another name", field="path")
        content = msgspec.json.encode(msgspec.to_builtins(sheet) | msgspec.to_builtins(beside))
        _write(content, folder.path(exported.id), target)
    return exported


def _sheet(connection: Connection, exported: Adapter) -> Sheet:
    passages = library.passages(connection, exported.members)
    members = {content_hash(each.heading, each.text): f"{each.title} › {each.heading}" for each in passages.values()}
    texts, _, f1s = questions_of(connection, exported.id)
    return Sheet(
        format=FORMAT,
        sha256=exported.id,
        bytes=exported.bytes,
        base=exported.base,
        layout=exported.layout,
        recipe=exported.recipe,
        gate=exported.gate,
        made_at=exported.made_at,
        members=tuple(Member(sha256, place[:1000]) for sha256, place in sorted(members.items())),
        questions=tuple(
            Question(text, None if np.isnan(f1) else float(f1)) for text, f1 in zip(texts, f1s, strict=True)
        ),
    )


def _beside(connection: Connection, exported: Adapter) -> Beside:
    texts, _, f1s = questions_of(connection, exported.id, held_out=True)
    return Beside(tuple(Unseen(text, float(f1)) for text, f1 in zip(texts, f1s, strict=True)))


def _write(sheet: bytes, weights: Path, target: Path) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    beside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:  # entries have no time of their own: 1980
                archive.writestr(zipfile.ZipInfo(SHEET), sheet, zipfile.ZIP_DEFLATED)
                with weights.open("rb") as source, archive.open(zipfile.ZipInfo(WEIGHTS), "w") as entry:
                    shutil.copyfileobj(source, entry, 1 << 20)
            file.flush()
            os.fsync(descriptor)
        beside.replace(target)
        sync(target.parent)
    finally:
        beside.unlink(missing_ok=True)


# --- in --------------------------------------------------------------------------------------------------------------


def import_bundle(
    database: Database, folder: AdapterFolder, file: Path, *, base: str, layout: int, embed: Embed
) -> Adapter:
    """Take an adapter in from a bundle. `base` is the sha256 of the local model's file, `layout` of its prompts.

    `embed` gives unit vectors [n, d] of n texts. An adapter that is known already keeps its row, but gets its file back
    when that was damaged. One without a passed exam comes in disabled. Raises InputError when the file is no sound
    bundle, belongs to another model or layout, or covers a passage that is not here; StorageError as the disk.
    """
    sheet, beside = _read_sheet(file)
    _check_fits(sheet, base, layout)
    with database.read() as connection:
        members = _local_members(connection, sheet.members)
    questions = _questions(sheet.questions, embed), _questions(beside.held_out, embed)
    with _unpacked(file, folder, sheet) as copy, database.write() as connection:
        imported = _settle(connection, _adapter(sheet, members), *questions)
        folder.place(copy)
    return imported


def _read_sheet(file: Path) -> tuple[Sheet, Beside]:
    with _damage(file):
        if not file.is_file():  # opening a pipe would wait
            raise InputError(f"there is no file {file}", field="path")
        if file.stat().st_size > sum(MOST_BYTES.values()):
            raise InputError("it is too large for a bundle", field="path")
        with zipfile.ZipFile(file) as archive:
            _check_entries(archive)
            with archive.open(SHEET) as entry:
                content = entry.read(MOST_BYTES[SHEET] + 1)  # bounded: what an archive says of its sizes may be wrong
    return parse_sheet(content), _parse_beside(content)


def _parse_beside(content: bytes) -> Beside:
    try:
        return msgspec.json.decode(content, type=Beside)
    except msgspec.DecodeError as error:
        raise InputError(f"its {SHEET} is not as it should be: {error}", field="path") from error


def _check_entries(archive: zipfile.ZipFile) -> None:
    entries = archive.infolist()
    if sorted(entry.filename for entry in entries) != [WEIGHTS, SHEET]:
        raise InputError(f"it must hold {WEIGHTS} and {SHEET} and nothing else", field="path")
    for entry in entries:
        if entry.file_size > MOST_BYTES[entry.filename]:
            raise InputError(f"its {entry.filename} is too large ({entry.file_size} bytes)", field="path")


def _check_fits(sheet: Sheet, base: str, layout: int) -> None:
    if sheet.base != base:
        raise InputError(
            f"it belongs to another model (sha256 {sheet.base[:12]}; this one's is {base[:12]})",
            remedy="use the model that it was trained on",
            field="path",
        )
    if sheet.layout != layout:
        raise InputError(f"it was trained on prompts of layout {sheet.layout}, these are {layout}", field="path")


def _local_members(connection: Connection, members: Sequence[Member]) -> tuple[int, ...]:
    """The ids of all chunks with these contents. Raises InputError when one of them is nowhere."""
    wanted = {member.sha256: member.place for member in members}
    found: dict[str, list[int]] = {}
    for chunk_id, sha256 in _hashed_chunks(connection):
        if sha256 in wanted:
            found.setdefault(sha256, []).append(chunk_id)
    if missing := {sha256: place for sha256, place in wanted.items() if sha256 not in found}:
        raise InputError(
            f"it covers {len(wanted)} passages, and {len(missing)} of them are not in this library: {_named(missing)}",
            remedy="add the documents that it was made from, in the same versions",
            field="path",
        )
    return tuple(sorted(chunk_id for ids in found.values() for chunk_id in ids))


def _hashed_chunks(connection: Connection) -> Iterator[tuple[int, str]]:
    after = 0
    while batch := library.chunk_texts(connection, after=after, limit=BATCH):
        for chunk_id, _, heading, text, _ in batch:
            yield chunk_id, content_hash(heading, text)
        after = batch[-1][0]


def _named(missing: Mapping[str, str]) -> str:
    # What a stranger wrote goes to a terminal: no control characters.
    names = [
        "".join(filter(str.isprintable, place))[:100] or sha256[:12] for sha256, place in list(missing.items())[:NAMED]
    ]
    more = len(missing) - len(names)
    return "; ".join(names) + (f"; and {more} more" if more else "")


def _questions(asked: Sequence[Question | Unseen], embed: Embed) -> Questions:
    texts = tuple(each.question for each in asked)
    vectors = embed(texts) if texts else np.empty((0, 0), np.float32)
    f1 = [np.nan if each.f1 is None else each.f1 for each in asked]
    return Questions(texts, vectors.astype(np.float16), np.array(f1, np.float32))


@contextmanager
def _unpacked(file: Path, folder: AdapterFolder, sheet: Sheet) -> Iterator[Copied]:
    """The bundle's weights, copied and compared with what the sheet says of them. Raises InputError."""
    with ExitStack() as stack:
        with _damage(file):
            entry = stack.enter_context(stack.enter_context(zipfile.ZipFile(file)).open(WEIGHTS))
            copy = stack.enter_context(folder.copied(entry))
        if (copy.id, copy.bytes) != (sheet.sha256, sheet.bytes):
            raise InputError(f"its {WEIGHTS} is not the one that {SHEET} describes", field="path")
        yield copy


@contextmanager
def _damage(file: Path) -> Iterator[None]:
    """Map what a damaged, encrypted or unreadable archive raises to InputError."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise InputError(f"{file} is not a sound bundle: {error}", field="path") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}", field="path") from error


def _adapter(sheet: Sheet, members: tuple[int, ...]) -> Adapter:
    passed = sheet.gate is not None and sheet.gate.passed
    return Adapter(
        id=sheet.sha256,
        cluster_id=None,
        members=members,
        bytes=sheet.bytes,
        base=sheet.base,
        layout=sheet.layout,
        recipe=sheet.recipe,
        gate=sheet.gate,
        state="ready" if passed else "disabled",
        reason="" if passed else "it has not passed an exam",
        pinned=False,
        made_at=sheet.made_at,
    )


def _settle(connection: Connection, new: Adapter, questions: Questions, held_out: Questions) -> Adapter:
    """Put the row of an adapter that is not known yet; of one that is, heal what only its file had broken."""
    known = {each.id: each for each in adapters(connection)}.get(new.id)
    if known is None:
        if not put_adapter(connection, new, questions, held_out):
            raise InputError("a passage that it covers was removed just now", field="path")
    elif known.state == "failed" and known.gate and known.gate.passed:
        set_state(connection, new.id, "ready")
    return adapter(connection, new.id)
