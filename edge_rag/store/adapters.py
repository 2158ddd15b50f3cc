"""What the library knows of its adapters. Functions take an open connection inside a transaction, `register` apart.

Rows and files cannot change together, so their order is fixed. A file is copied and synced first, outside any
transaction, and moved into place inside the write transaction that puts its row; a crash before the commit leaves a
file without a row. Sweeping needs a write transaction too, so that a file without a row is never one that is about to
get it. A row is deleted first, which queues its file in the same transaction (`adapters_removed`, by a trigger), and
the file is unlinked by the next `sweep`.

What an adapter holds cannot be computed again in passing as KV can. So the row of a file that is missing or damaged
stays, as 'failed', and says why; its passages are read as text again.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from edge_rag.errors import InputError, NotFound, StorageError
from edge_rag.records import Adapter, AdapterState, GateReport, Recipe, Record
from edge_rag.store.adapter_files import AdapterFolder as AdapterFolder  # whoever uses rows has it from here
from edge_rag.store.database import Connection, Database
from edge_rag.store.fetching import storage_errors

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)

SHOWN = 12  # digits of an id that are shown

_COLUMNS = "id, cluster_id, bytes, base, layout, recipe, gate, state, reason, pinned, made_at"


class Questions(NamedTuple):
    """Questions of one kind, trained on or held out, with their embeddings [n, d] and their F1 in the exam [n].

    NaN: it was not asked there.
    """

    texts: tuple[str, ...]
    vectors: npt.NDArray[np.float16]
    f1: npt.NDArray[np.float32]


NO_QUESTIONS = Questions((), np.empty((0, 0), np.float16), np.empty(0, np.float32))


class Examined(NamedTuple):
    """The questions of an exam: their embeddings [n, d], their F1 [n], and which of them were held out [n].

    The others were trained on.
    """

    vectors: npt.NDArray[np.float32]
    f1: npt.NDArray[np.float32]
    held_out: npt.NDArray[np.bool_]


# --- one adapter -----------------------------------------------------------------------------------------------------


def register(
    database: Database, folder: AdapterFolder, file: Path, adapter: Adapter, questions: Questions
) -> Adapter | None:
    """Copy a trained file into the folder and put its row; `id` and `bytes` of `adapter` are filled in.

    None when a passage that it covers has gone meanwhile; nothing is kept then. Raises InputError when the file is not
    GGUF, StorageError when it cannot be read or copied.
    """
    with storage_errors(file):
        stream = file.open("rb")
    with stream, folder.copied(stream) as copy, database.write() as connection:
        adapter = replace(adapter, id=copy.id, bytes=copy.bytes)
        if not put_adapter(connection, adapter, questions):
            return None
        folder.place(copy)
    return adapter


def put_adapter(
    connection: Connection, adapter: Adapter, questions: Questions, held_out: Questions = NO_QUESTIONS
) -> bool:
    """Put or replace a row; whether all passages that it covers are still there. When not, nothing is put.

    `questions` are those that it was trained on. Of the `held_out` ones those are kept that its exam asked. A question
    that occurs twice keeps the lower F1, and was trained on if one of the two was. Raises InputError for a number that
    JSON cannot hold.
    """
    members = json.dumps(adapter.members)
    here = connection.execute("SELECT count(*) FROM chunks WHERE id IN (SELECT value FROM json_each(?))", (members,))
    if here.get != len(set(adapter.members)):
        return False
    _put_row(connection, adapter)
    connection.execute(
        "INSERT INTO adapter_members SELECT DISTINCT ?, value FROM json_each(?)",
        (adapter.id, members),
    )
    examined = (row for row in _as_rows(adapter.id, held_out, held_out=True) if row[3] is not None)
    connection.executemany(
        """INSERT INTO adapter_questions (adapter_id, question, vector, f1, held_out) VALUES (?, ?, ?, ?, ?)
           ON CONFLICT (adapter_id, question)
           DO UPDATE SET f1 = min(coalesce(f1, excluded.f1), coalesce(excluded.f1, f1)),
               held_out = min(held_out, excluded.held_out)""",
        [*_as_rows(adapter.id, questions, held_out=False), *examined],
    )
    return True


def _as_rows(id: str, questions: Questions, *, held_out: bool) -> Iterator[tuple[Any, ...]]:
    for text, vector, f1 in zip(questions.texts, questions.vectors, questions.f1, strict=True):
        yield id, text, vector.astype("<f2").tobytes(), None if np.isnan(f1) else float(f1), held_out


def _put_row(connection: Connection, adapter: Adapter) -> None:
    names = _COLUMNS.split(", ")
    values = {name: getattr(adapter, name) for name in names}
    values |= {"recipe": _json(adapter.recipe), "gate": adapter.gate and _json(adapter.gate)}
    updates = ", ".join(f"{name} = excluded.{name}" for name in names[1:])
    connection.execute(
        f"INSERT INTO adapters ({_COLUMNS}) VALUES ({', '.join('?' * len(names))}) "
        f"ON CONFLICT (id) DO UPDATE SET {updates}",
        tuple(values.values()),
    )
    for table in ("adapter_members", "adapter_questions"):
        connection.execute(f"DELETE FROM {table} WHERE adapter_id = ?", (adapter.id,))


def _json(record: Record) -> str:
    text = msgspec.json.encode(record)
    try:
        msgspec.json.decode(text, type=type(record))
    except msgspec.ValidationError as error:  # NaN and infinity are written as null
        raise InputError(f"a number of it is none: {error}", field=type(record).__name__.lower()) from error
    return text.decode()


def set_state(connection: Connection, id: str, state: AdapterState, reason: str = "") -> None:
    """Change what may be done with an adapter, and say why. One that is gone is passed over."""
    connection.execute("UPDATE adapters SET state = ?, reason = ? WHERE id = ?", (state, reason, id))


def set_pinned(connection: Connection, id: str, pinned: bool) -> None:
    """Whether it shall stay in fast memory as long as possible. One that is gone is passed over."""
    connection.execute("UPDATE adapters SET pinned = ? WHERE id = ?", (pinned, id))


def remove(connection: Connection, id: str) -> None:
    """Delete a row; its file is queued to be unlinked (`sweep`). One that is gone is passed over."""
    connection.execute("DELETE FROM adapters WHERE id = ?", (id,))


# --- all of them -----------------------------------------------------------------------------------------------------


def adapters(connection: Connection) -> list[Adapter]:
    """All adapters, the oldest first."""
    return _find(connection, "1", ())


def adapter(connection: Connection, beginning: str) -> Adapter:
    """The adapter whose id begins so. Raises NotFound, and InputError when there are several."""
    wanted = beginning.strip().lower()
    found = _find(connection, "substr(id, 1, length(?1)) = ?1", (wanted,)) if wanted else []
    if not found:
        raise NotFound(f"there is no adapter {beginning!r}", field="id", remedy="`edge-rag adapters` lists them")
    if len(found) > 1:
        some = ", ".join(each.id[:SHOWN] for each in found[:3])
        message = f"{len(found)} adapters begin with {beginning!r} ({some})"
        raise InputError(message, field="id", remedy="give more digits")
    return found[0]


def _find(connection: Connection, condition: str, values: tuple[object, ...]) -> list[Adapter]:
    rows = connection.execute(
        f"""SELECT {_COLUMNS},
                   (SELECT json_group_array(chunk_id) FROM adapter_members WHERE adapter_id = adapters.id) AS members
            FROM adapters WHERE {condition} ORDER BY made_at, id""",
        values,
    )
    return [_adapter(dict(zip(f"{_COLUMNS}, members".split(", "), row, strict=True))) for row in rows]


def _adapter(row: dict[str, Any]) -> Adapter:
    row["recipe"] = msgspec.json.decode(row["recipe"], type=Recipe)
    row["gate"] = row["gate"] and msgspec.json.decode(row["gate"], type=GateReport)
    row["members"] = tuple(sorted(json.loads(row["members"])))
    row["pinned"] = bool(row["pinned"])
    return Adapter(**row)


def usable(known: Iterable[Adapter], *, base: str, layout: int) -> list[Adapter]:
    """Those that may answer: ready, through their exam, and trained on this very model and layout of prompts."""
    return [
        each
        for each in known
        if each.state == "ready" and each.gate and each.gate.passed and (each.base, each.layout) == (base, layout)
    ]


def put_vectors(connection: Connection, id: str, texts: Sequence[str], vectors: npt.NDArray[Any]) -> None:
    """Replace the embeddings of an adapter's questions, `texts_of`: another embedding model is used from now on."""
    connection.executemany(
        "UPDATE adapter_questions SET vector = ? WHERE adapter_id = ? AND question = ?",
        [(vector.astype("<f2").tobytes(), id, text) for text, vector in zip(texts, vectors, strict=True)],
    )


def texts_of(connection: Connection, id: str) -> tuple[str, ...]:
    """All questions of an adapter whose embeddings are kept, trained on or held out, in order of their texts."""
    return tuple(text for text, _, _, _ in _read_rows(connection, id, "1"))


def questions_of(connection: Connection, id: str, *, held_out: bool = False) -> Questions:
    """The questions that an adapter was trained on, by their text; nothing of an unknown one.

    With `held_out` those that it was not trained on but examined in.
    """
    rows = _read_rows(connection, id, "held_out" if held_out else "NOT held_out")
    return Questions(
        tuple(text for text, _, _, _ in rows),
        _stacked([vector for _, vector, _, _ in rows]),
        np.array([np.nan if f1 is None else f1 for _, _, f1, _ in rows], dtype=np.float32),
    )


def exam_of(connection: Connection, id: str) -> Examined:
    """All that an adapter was examined in, trained on or held out, by its text; nothing of an unknown one."""
    rows = _read_rows(connection, id, "f1 IS NOT NULL")
    return Examined(
        _stacked([vector for _, vector, _, _ in rows]).astype(np.float32),
        np.array([f1 for _, _, f1, _ in rows], dtype=np.float32),
        np.array([held_out for _, _, _, held_out in rows], dtype=np.bool_),
    )


def _read_rows(connection: Connection, id: str, condition: str) -> Sequence[Any]:
    """(text, vector, F1 or None, held out) of an adapter's questions, in order of their texts."""
    return connection.execute(
        f"""SELECT question, vector, f1, held_out FROM adapter_questions
            WHERE adapter_id = ? AND {condition} ORDER BY question""",
        (id,),
    ).fetchall()


def _stacked(vectors: Sequence[bytes]) -> npt.NDArray[np.float16]:
    """Stored vectors as an array [n, d]; [0, 0] of none."""
    values = np.frombuffer(b"".join(vectors), dtype="<f2")
    return values.astype(np.float16).reshape(len(vectors), len(values) // max(1, len(vectors)))


# --- rows and files --------------------------------------------------------------------------------------------------


def sweep(connection: Connection, folder: AdapterFolder) -> None:
    """Make rows and files agree, in a write transaction, and one after that which removed rows.

    Files without a row are unlinked, queued or not; one that cannot be is logged and tried again next time. A row whose
    file is missing or has another size becomes 'failed'. Bodies are not read (`AdapterFolder.verify`). Raises
    StorageError when the folder cannot be listed.
    """
    folder.sweep_temporaries()
    sizes = folder.sizes()  # after the transaction has begun: every row it sees had its file by then
    known = {each.id: each for each in adapters(connection)}
    left = [id for id in sorted(sizes.keys() - known.keys()) if not _unlinked(folder, id)]
    done = "DELETE FROM adapters_removed WHERE id NOT IN (SELECT value FROM json_each(?))"
    connection.execute(done, (json.dumps(left),))
    for each in known.values():
        if each.state != "failed" and sizes.get(each.id) != each.bytes:
            reason = "its file was changed" if each.id in sizes else "its file is missing"
            logger.warning("the adapter %s is not used any more: %s", each.id[:SHOWN], reason)
            set_state(connection, each.id, "failed", reason)


def _unlinked(folder: AdapterFolder, id: str) -> bool:
    try:
        folder.remove(id)
    except StorageError as error:
        logger.warning("the file of the adapter %s cannot be removed: %s", id[:SHOWN], error)
        return False
    return True
