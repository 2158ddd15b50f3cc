"""The journal: every question with its passages, plan, answer and timings; feedback by question id.

It is the training data and the reward of what learns later, so rows are written once and never edited. Passages are
kept by id, not by text. Rows go when a document they were answered from goes (a trigger, see `migrations`).
"""

import msgspec
from msgspec import Struct

from edge_rag.errors import InputError, NotFound
from edge_rag.records import Answer, Citation, Plan, Timings, Usage
from edge_rag.store.database import Connection


class Entry(Struct, frozen=True):
    """A journal row. `passages` are (chunk id, score), best first; `feedback` the last score given, or None."""

    id: str
    asked_at: float
    question: str
    answer: str
    finish_reason: str
    model: str
    plan: Plan
    citations: tuple[Citation, ...]
    usage: Usage
    timings: Timings
    passages: tuple[tuple[int, float], ...]
    feedback: float | None


def record(connection: Connection, answer: Answer, *, now: float) -> bool:
    """Write a finished (or cancelled) answer, unless a document it was answered from has been removed meanwhile.

    Whether it was written.
    """
    if _removed(connection, {passage.document_id for passage in answer.passages}):
        return False
    connection.execute(
        "INSERT INTO questions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            answer.id,
            now,
            answer.question,
            answer.plan.search_query,
            answer.text,
            answer.finish_reason,
            answer.model,
            *(_json(part) for part in (answer.plan, answer.citations, answer.usage, answer.timings)),
        ),
    )
    connection.executemany(
        "INSERT INTO question_passages VALUES (?, ?, ?, ?, ?, ?)",
        [
            (answer.id, rank, passage.chunk_id, passage.document_id, passage.score, passage.similarity)
            for rank, passage in enumerate(answer.passages)
        ],
    )
    return True


def add_feedback(connection: Connection, question_id: str, score: float, comment: str, *, now: float) -> None:
    """Write feedback: score from 0 (bad) to 1 (good). Raises InputError or NotFound."""
    if not 0 <= score <= 1:
        raise InputError(f"must be from 0 to 1, not {score}", field="score", remedy="0 is bad, 1 is good")
    if not connection.execute("SELECT count(*) FROM questions WHERE id = ?", (question_id,)).get:
        raise NotFound("there is no answer with this id", field=question_id, remedy="see `edge-rag journal`")
    connection.execute(
        "INSERT INTO feedback (question_id, given_at, score, comment) VALUES (?, ?, ?, ?)",
        (question_id, now, score, comment),
    )


def newest(connection: Connection, *, limit: int) -> list[Entry]:
    """The last questions, newest first."""
    rows = connection.execute(
        """SELECT id, asked_at, question, answer, finish_reason, model, plan, citations, usage, timings,
                  (SELECT json_group_array(json_array(chunk_id, score))
                   FROM (SELECT chunk_id, score FROM question_passages WHERE question_id = q.id ORDER BY rank)),
                  (SELECT score FROM feedback WHERE question_id = q.id ORDER BY feedback.id DESC LIMIT 1)
           FROM questions q ORDER BY asked_at DESC, id LIMIT ?""",
        (limit,),
    )
    return [_entry(row) for row in rows]


def count(connection: Connection) -> int:
    """How many questions the journal holds."""
    number: int = connection.execute("SELECT count(*) FROM questions").get
    return number


def _removed(connection: Connection, documents: set[int]) -> bool:
    found = connection.execute(
        "SELECT count(*) FROM documents WHERE id IN (SELECT value FROM json_each(?))", (_json(sorted(documents)),)
    ).get
    return bool(found < len(documents))


def _entry(row: tuple[object, ...]) -> Entry:
    parsed = [msgspec.json.decode(str(part)) for part in row[6:11]]
    values = [*row[:6], *parsed, row[11]]
    return msgspec.convert(dict(zip(Entry.__struct_fields__, values, strict=True)), Entry)


def _json(part: object) -> str:
    return msgspec.json.encode(part).decode()
