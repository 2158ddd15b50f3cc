"""The journal: rows come back as they were written, and go with the documents they were answered from."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_rag.errors import InputError, NotFound
from edge_rag.records import Answer, Chunk, Citation, FinishReason, Passage, PassagePlan, Plan, Timings, Usage
from edge_rag.store import journal, library
from edge_rag.store.database import Database
from edge_rag.store.library import NewDocument


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path) as opened:
        yield opened


def add(database: Database, path: str) -> Passage:
    """A document of one chunk, as the passage that is found in it."""
    chunk = Chunk(ordinal=0, text="the pump", heading="", page=None, start=0, end=8, tokens=2)
    new = NewDocument(path=path, title=path, kind="md", bytes=1, sha256="", recipe="", chunks=(chunk,))
    with database.write() as connection:
        document_id = library.put_document(connection, new, np.ones((1, 8), dtype=np.float32), now=0.0)
        chunk_id: int = connection.execute("SELECT id FROM chunks WHERE document_id = ?", (document_id,)).get
        return library.passages(connection, [chunk_id])[chunk_id]


def remove(database: Database, document_id: int) -> None:
    with database.write() as connection:
        library.remove_document(connection, document_id)


def answered(answer_id: str, *passages: Passage, reason: FinishReason = "stop") -> Answer:
    return Answer(
        id=answer_id,
        question='What does the "pump" do?\n',
        text="It hums. [1]",
        passages=passages,
        citations=(Citation(n=1, start=0, end=8, score=0.75),),
        usage=Usage(prompt_tokens=100, cached_tokens=40, completion_tokens=5),
        timings=Timings(retrieve=0.1, queued=0.0, first_token=0.25, total=1.5),
        finish_reason=reason,
        plan=Plan(passages=(PassagePlan(chunk_id=1, tokens=9),), dropped=2, tail_tokens=7, search_query="pump"),
        model="small",
    )


def record(database: Database, answer: Answer, now: float = 1.0) -> None:
    with database.write() as connection:
        journal.record(connection, answer, now=now)


def newest(database: Database, limit: int = 10) -> list[journal.Entry]:
    with database.read() as connection:
        return journal.newest(connection, limit=limit)


def give(database: Database, answer_id: str, score: float, comment: str = "") -> None:
    with database.write() as connection:
        journal.add_feedback(connection, answer_id, score, comment, now=2.0)


@pytest.mark.parametrize("reason", ["stop", "length", "cancelled"])
def test_an_answer_comes_back_as_it_was_recorded(database: Database, reason: FinishReason) -> None:
    answer = answered("a1", add(database, "/one"), add(database, "/two"), reason=reason)
    record(database, answer, now=123.5)
    [entry] = newest(database)
    assert (entry.id, entry.asked_at, entry.question) == (answer.id, 123.5, answer.question)
    assert (entry.answer, entry.finish_reason, entry.model) == (answer.text, reason, "small")
    assert (entry.plan, entry.citations, entry.usage) == (answer.plan, answer.citations, answer.usage)
    assert entry.timings == answer.timings
    assert entry.passages == tuple((passage.chunk_id, passage.score) for passage in answer.passages)
    assert entry.feedback is None


def test_an_answer_without_passages_is_recorded(database: Database) -> None:
    record(database, answered("a1", reason="no_passages"))
    [entry] = newest(database)
    assert entry.passages == ()
    assert entry.finish_reason == "no_passages"


def test_the_newest_come_first_and_no_more_than_asked_for(database: Database) -> None:
    for number in range(5):
        record(database, answered(f"a{number}"), now=float(number))
    assert [entry.id for entry in newest(database, 3)] == ["a4", "a3", "a2"]
    with database.read() as connection:
        assert journal.count(connection) == 5


def test_the_last_feedback_counts(database: Database) -> None:
    record(database, answered("a1"))
    record(database, answered("a2"))
    give(database, "a1", 0.0, "wrong")
    give(database, "a1", 1.0, "right after all")
    assert {entry.id: entry.feedback for entry in newest(database)} == {"a1": 1.0, "a2": None}


@pytest.mark.parametrize("score", [0.0, 1.0, 0, 1, 0.5])
def test_feedback_from_0_to_1_is_taken(database: Database, score: float) -> None:
    record(database, answered("a1"))
    give(database, "a1", score)
    assert newest(database)[0].feedback == score


@pytest.mark.parametrize("score", [-0.01, 1.01, float("nan"), float("inf")])
def test_feedback_out_of_bounds_names_its_field(database: Database, score: float) -> None:
    record(database, answered("a1"))
    with pytest.raises(InputError, match="from 0 to 1") as caught:
        give(database, "a1", score)
    assert caught.value.field == "score"
    assert newest(database)[0].feedback is None


def test_feedback_for_an_unknown_answer_is_not_found(database: Database) -> None:
    with pytest.raises(NotFound, match="no answer with this id"):
        give(database, "a1", 1.0)


def test_questions_go_with_any_document_they_were_answered_from(database: Database) -> None:
    one, two = add(database, "/one"), add(database, "/two")
    record(database, answered("both", one, two))
    record(database, answered("two", two))
    record(database, answered("none"))
    give(database, "both", 1.0)
    remove(database, one.document_id)
    assert {entry.id for entry in newest(database)} == {"two", "none"}
    with database.write() as connection:
        assert connection.execute("SELECT count(*) FROM feedback").get == 0
        assert connection.execute("SELECT count(*) FROM question_passages").get == 1
        assert list(library.check(connection)) == []


def test_questions_stay_when_a_document_is_replaced(database: Database) -> None:
    record(database, answered("a1", add(database, "/one")))
    give(database, "a1", 1.0)
    add(database, "/one")
    [entry] = newest(database)
    assert (entry.id, entry.feedback) == ("a1", 1.0)


def test_an_answer_from_a_document_that_went_while_it_was_written_is_not_kept(database: Database) -> None:
    one, two = add(database, "/one"), add(database, "/two")
    remove(database, one.document_id)
    record(database, answered("a1", one, two))
    assert newest(database) == []
