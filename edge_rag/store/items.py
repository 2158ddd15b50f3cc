"""Items: questions to learn from, their passages, and what the teacher said.

Every function takes an open connection inside a transaction. `model` is the sha256 of the model that answered; an item
that another one answered counts as untaught, because answers are learned as distributions over one vocabulary. Arrays
are stored little-endian.

Logged items are split by time: of those of a cluster the newest fifth is held out. Only the order of `made_at` counts,
so that a clock that jumps changes no more than who is newest. What is decided once stays decided: an item that was
trained on is no exam any more. `UNDECIDED` items are neither trained on nor examined.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from edge_rag.records import Item, ItemKind
from edge_rag.store.database import Connection

TOP = 16  # likeliest tokens that are kept of each distribution
UNDECIDED = -1
HELD_OUT_LOGGED, HELD_OUT_STUDY, EXAM_ELSEWHERE = 5, 10, 5  # one of so many

Int32 = npt.NDArray[np.int32]
Float16 = npt.NDArray[np.float16]

# Conditions on items; their values are bound by name.
_TOUCHING = "id IN (SELECT item_id FROM item_chunks WHERE chunk_id IN (SELECT value FROM json_each(:chunks)))"
_GIVEN = "id IN (SELECT value FROM json_each(:ids))"
_SCATTERED = "id * 2654435761 % 4294967291"  # Knuth's multiplicative hashing: an order that looks drawn


class Taught(Struct, frozen=True, eq=False):
    """A teacher's answer: its text, its n tokens with the one that ends it, and what else it might have said.

    top_ids and top_logprobs have shape [n, TOP]: the likeliest tokens at each place, best first, and their
    log-probabilities in the whole distribution.
    """

    answer: str
    tokens: Int32
    top_ids: Int32
    top_logprobs: Float16


class ItemCounts(Struct, frozen=True):
    """How many items there are, and what has become of them with one model: `waiting` ones are untaught."""

    logged: int
    study: int
    held_out: int
    taught: int
    refused: int
    waiting: int


# --- new items -------------------------------------------------------------------------------------------------------


def add_logged(connection: Connection) -> int:
    """Take over questions from the journal that are no items yet; how many.

    Those that were answered from passages which are all still there. A question that was asked again with the same
    passages is one item. One that leaned on a conversation is taken as it was searched for.
    """
    known = {(_same(question), chunks) for question, chunks in _logged(connection)}
    before = len(known)
    for question_id, asked_at, question, chunks in _journal(connection):
        key = _same(question), frozenset(chunks)
        if key not in known:
            known.add(key)
            item_id = _put(connection, "logged", question, chunks, made_at=asked_at, held_out=UNDECIDED)
            connection.execute("UPDATE items SET question_id = ? WHERE id = ?", (question_id, item_id))
    return len(known) - before


def _logged(connection: Connection) -> list[tuple[str, frozenset[int]]]:
    rows = connection.execute(
        """SELECT question, json_group_array(chunk_id) FROM items JOIN item_chunks ON item_id = id
           WHERE kind = 'logged' GROUP BY id"""
    )
    return [(question, frozenset(json.loads(chunks))) for question, chunks in rows]


def _journal(connection: Connection) -> list[tuple[str, float, str, list[int]]]:
    """(id, asked at, question, chunk ids) of what may be taken over, the oldest first."""
    rows = connection.execute(
        """SELECT id, asked_at, iif(search_query = '', question, search_query),
                  (SELECT json_group_array(chunk_id)
                   FROM (SELECT chunk_id FROM question_passages WHERE question_id = q.id ORDER BY rank))
           FROM questions q
           WHERE finish_reason IN ('stop', 'length') AND id NOT IN (SELECT question_id FROM items WHERE kind = 'logged')
               AND EXISTS (SELECT 1 FROM question_passages WHERE question_id = q.id)
               AND NOT EXISTS (SELECT 1 FROM question_passages p WHERE question_id = q.id
                               AND p.chunk_id NOT IN (SELECT id FROM chunks))
           ORDER BY asked_at, id"""
    )
    return [(question_id, asked_at, question, json.loads(chunks)) for question_id, asked_at, question, chunks in rows]


def add_study(
    connection: Connection, chunk_id: int, questions: Sequence[str], *, model: str, asked: int, now: float
) -> bool:
    """Add questions that `model` wrote about a passage when it was asked for so many; whether the passage is there.

    A tenth is held out, chosen by the text alone.
    """
    if not connection.execute("SELECT count(*) FROM chunks WHERE id = ?", (chunk_id,)).get:
        return False
    connection.execute(
        """INSERT INTO studied VALUES (?, ?, ?)
           ON CONFLICT (chunk_id, model) DO UPDATE SET asked = asked + excluded.asked""",
        (chunk_id, model, asked),
    )
    for question in questions:
        _put(connection, "study", question, [chunk_id], made_at=now, held_out=_drawn(question))
    return True


def to_study(connection: Connection, chunks: Iterable[int], *, model: str, wanted: int) -> list[int]:
    """Those of the passages about which `model` was asked for fewer questions than `wanted`, by id."""
    rows = connection.execute(
        """SELECT c.id FROM chunks c LEFT JOIN studied s ON s.chunk_id = c.id AND s.model = ?
           WHERE c.id IN (SELECT value FROM json_each(?)) AND coalesce(s.asked, 0) < ? ORDER BY c.id""",
        (model, _json(chunks), wanted),
    )
    return [chunk_id for (chunk_id,) in rows]


def _put(
    connection: Connection, kind: ItemKind, question: str, chunks: Sequence[int], *, made_at: float, held_out: int
) -> int:
    connection.execute(
        "INSERT INTO items (kind, question, made_at, held_out, model, refused) VALUES (?, ?, ?, ?, '', 0)",
        (kind, question, made_at, held_out),
    )
    item_id = connection.last_insert_rowid()
    connection.executemany(
        "INSERT INTO item_chunks VALUES (?, ?, ?)",
        [(item_id, rank, chunk_id) for rank, chunk_id in enumerate(chunks)],
    )
    return item_id


# --- held out --------------------------------------------------------------------------------------------------------


def split(connection: Connection, chunks: Iterable[int]) -> None:
    """Decide which logged items of a cluster are held out, of those that are undecided: the newest, a fifth of all.

    The same question is never on both sides: what was decided for it, asked or written, holds for all of its items.
    """
    rows = _decisions(connection, chunks)
    decided = {text: held for _, _, text, held in rows if held != UNDECIDED}
    texts = list(dict.fromkeys(text for _, kind, text, _ in rows if kind == "logged"))  # by when they first came
    missing = len(texts) // HELD_OUT_LOGGED - sum(decided.get(text) == 1 for text in texts)
    waiting = [text for text in reversed(texts) if text not in decided]
    decided |= {text: int(place < missing) for place, text in enumerate(waiting)}
    connection.executemany(
        "UPDATE items SET held_out = ? WHERE id = ?",
        [(decided[text], item_id) for item_id, _, text, held in rows if held == UNDECIDED],
    )


def _decisions(connection: Connection, chunks: Iterable[int]) -> list[tuple[int, ItemKind, str, int]]:
    """(id, kind, comparable text, held out) of a cluster's items, the oldest first."""
    rows = connection.execute(
        f"SELECT id, kind, question, held_out FROM items WHERE {_TOUCHING} ORDER BY made_at, id",
        {"chunks": _json(chunks)},
    )
    return [(item_id, kind, _same(question), held_out) for item_id, kind, question, held_out in rows]


def _drawn(question: str) -> int:
    digest = hashlib.sha256(_same(question).encode("utf-8", "replace")).digest()
    return int(int.from_bytes(digest[:8], "big") % HELD_OUT_STUDY == 0)


def _same(question: str) -> str:
    """What texts have in common that differ in case, blanks and the last mark only."""
    return " ".join(question.casefold().split()).rstrip(" ?.!")


# --- teaching --------------------------------------------------------------------------------------------------------


def untaught(connection: Connection, chunks: Iterable[int], *, model: str, limit: int) -> list[Item]:
    """Items of these passages that `model` has not been asked yet, logged ones first."""
    return _items(
        connection, f"{_TOUCHING} AND model <> :model ORDER BY kind, id LIMIT :limit", model, chunks=chunks, limit=limit
    )


def teach(connection: Connection, item_id: int, taught: Taught | None, *, model: str) -> None:
    """Write what `model` answered in place of what any other did; None: it could not. The item may have gone."""
    connection.execute(
        """UPDATE items SET model = ?, refused = ?, answer = ?, tokens = ?, top_ids = ?, top_logprobs = ?
           WHERE id = ?""",
        (model, taught is None, *(_columns(taught) if taught else (None,) * 4), item_id),
    )


def _columns(taught: Taught) -> tuple[str, bytes, bytes, bytes]:
    return (
        taught.answer,
        taught.tokens.astype("<i4").tobytes(),
        taught.top_ids.astype("<i4").tobytes(),
        taught.top_logprobs.astype("<f2").tobytes(),
    )


def taught(connection: Connection, item_ids: Iterable[int], *, model: str) -> dict[int, Taught]:
    """What `model` answered, by item id; items that it was not asked or could not answer are left out."""
    rows = connection.execute(
        f"""SELECT id, answer, tokens, top_ids, top_logprobs FROM items
            WHERE {_GIVEN} AND model = :model AND NOT refused""",
        {"ids": _json(item_ids), "model": model},
    )
    return {
        item_id: Taught(
            answer,
            np.frombuffer(tokens, "<i4").astype(np.int32),
            np.frombuffer(top_ids, "<i4").astype(np.int32).reshape(-1, TOP),
            np.frombuffer(top_logprobs, "<f2").astype(np.float16).reshape(-1, TOP),
        )
        for item_id, answer, tokens, top_ids, top_logprobs in rows
    }


# --- the questions' vectors ------------------------------------------------------------------------------------------


def put_vectors(connection: Connection, vectors: Mapping[int, npt.NDArray[Any]]) -> None:
    """Store the embeddings of items' questions as float16, by item id. Items may have gone."""
    connection.executemany(
        "UPDATE items SET vector = ? WHERE id = ?",
        [(vector.astype("<f2").tobytes(), item_id) for item_id, vector in vectors.items()],
    )


def vectors(connection: Connection, item_ids: Iterable[int]) -> dict[int, Float16]:
    """Embeddings of items' questions, by item id; those that have none are left out."""
    rows = connection.execute(
        f"SELECT id, vector FROM items WHERE {_GIVEN} AND vector IS NOT NULL", {"ids": _json(item_ids)}
    )
    return {item_id: np.frombuffer(vector, "<f2").astype(np.float16) for item_id, vector in rows}


def forget_vectors(connection: Connection) -> None:
    """Another embedding model is used from now on."""
    connection.execute("UPDATE items SET vector = NULL")


# --- reading ---------------------------------------------------------------------------------------------------------


def items_of(connection: Connection, chunks: Iterable[int], *, model: str) -> list[Item]:
    """Decided items with any of these passages, by id, with the answers of `model`."""
    return _items(connection, f"{_TOUCHING} AND held_out <> {UNDECIDED} ORDER BY id", model, chunks=chunks)


def items_elsewhere(connection: Connection, chunks: Iterable[int], *, model: str, exam: bool, limit: int) -> list[Item]:
    """Items with none of these passages: a sample over all of them, always the same; refused ones are left out.

    A fifth of them, chosen by id, is for exams of adapters that cover none of their passages, the rest for training
    such adapters. That has nothing to do with being held out, which is for adapters that do cover them.
    """
    return _items(
        connection,
        f"""NOT {_TOUCHING} AND NOT (model = :model AND refused) AND ({_SCATTERED} % {EXAM_ELSEWHERE} = 0) = :exam
            ORDER BY {_SCATTERED} / {EXAM_ELSEWHERE}, id LIMIT :limit""",
        model,
        chunks=chunks,
        exam=exam,
        limit=limit,
    )


def counts(connection: Connection, *, model: str, chunks: Iterable[int] | None = None) -> ItemCounts:
    """Totals over all items, or over those with any of these passages."""
    row: Any = connection.execute(
        f"""SELECT total(kind = 'logged'), total(kind = 'study'), total(held_out = 1),
                   total(model = :model AND NOT refused), total(model = :model AND refused), total(model <> :model)
            FROM items WHERE :chunks IS NULL OR {_TOUCHING}""",
        {"model": model, "chunks": None if chunks is None else _json(chunks)},
    ).get
    return ItemCounts(*map(int, row))


def _items(connection: Connection, condition: str, model: str, *, chunks: Iterable[int], **values: int) -> list[Item]:
    rows = connection.execute(
        f"""SELECT id, kind, question,
                   (SELECT json_group_array(chunk_id)
                    FROM (SELECT chunk_id FROM item_chunks WHERE item_id = items.id ORDER BY rank)),
                   made_at, held_out = 1, iif(model = :model, answer, NULL), model = :model AND refused
            FROM items WHERE {condition}""",
        {"model": model, "chunks": _json(chunks), **values},
    )
    return [
        Item(item_id, kind, question, tuple(json.loads(chunk_ids)), made_at, bool(held_out), answer, bool(refused))
        for item_id, kind, question, chunk_ids, made_at, held_out, answer, refused in rows
    ]


def _json(ids: Iterable[int]) -> str:
    return json.dumps(list(ids))
