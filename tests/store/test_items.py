"""Items: which questions become some, who is held out, and what the teacher said of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from edge_rag.records import Answer, FinishReason, Item, Plan, Timings, Usage
from edge_rag.store import items, journal, library
from edge_rag.store.database import Connection, Database
from edge_rag.store.items import TOP, ItemCounts, Taught
from tests.runtime.serving import add_document, remove_document

MODEL, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path) as opened:
        yield opened


@pytest.fixture
def chunks(database: Database) -> tuple[int, ...]:
    """The ids of six chunks of one document."""
    return add_document(database, "/six", 6)


@pytest.fixture
def connection(database: Database, chunks: tuple[int, ...]) -> Iterator[Connection]:
    with database.write() as opened:
        yield opened


def ask(
    connection: Connection,
    question: str,
    chunks: Sequence[int],
    *,
    at: float = 1.0,
    reason: FinishReason = "stop",
    searched: str | None = None,
) -> str:
    """Write an answer into the journal; returns its id."""
    found = library.passages(connection, chunks)
    number = journal.count(connection)
    answer = Answer(
        id=f"q{number}",
        question=question,
        text="It hums.",
        passages=tuple(found[chunk_id] for chunk_id in chunks),
        citations=(),
        usage=Usage(),
        timings=Timings(),
        finish_reason=reason,
        plan=Plan(search_query=question if searched is None else searched),
        model="small",
    )
    journal.record(connection, answer, now=at)
    return answer.id


def ask_and_split(connection: Connection, questions: Sequence[str], chunks: Sequence[int]) -> list[str]:
    """Ask in this order, one a second, take over and split; returns the texts that are held out then."""
    first = journal.count(connection)
    for place, question in enumerate(questions):
        ask(connection, question, chunks, at=100.0 + first + place)
    items.add_logged(connection)
    items.split(connection, chunks)
    return [item.question for item in of(connection, chunks) if item.held_out]


def of(connection: Connection, chunks: Sequence[int], model: str = MODEL) -> list[Item]:
    return items.items_of(connection, chunks, model=model)


def made_up(length: int = 3, seed: int = 1) -> Taught:
    random = np.random.default_rng(seed)
    return Taught(
        "It hums.",
        random.integers(0, 50_000, length).astype(np.int32),
        random.integers(0, 50_000, (length, TOP)).astype(np.int32),
        -random.random((length, TOP)).astype(np.float16),
    )


def study(connection: Connection, chunk_id: int, *questions: str, model: str = MODEL) -> bool:
    return items.add_study(connection, chunk_id, questions, model=model, asked=24, now=5.0)


# --- the journal's questions -----------------------------------------------------------------------------------------


def test_a_journal_question_becomes_one_item_with_its_passages_in_order(
    connection: Connection, chunks: tuple[int, ...]
) -> None:
    ask(connection, "What hums?", [chunks[3], chunks[0]], at=77.0)
    assert items.add_logged(connection) == 1
    assert items.add_logged(connection) == 0
    items.split(connection, chunks)
    [item] = of(connection, [chunks[0]])
    assert item == Item(item.id, "logged", "What hums?", (chunks[3], chunks[0]), 77.0)


@pytest.mark.parametrize("reason", ["cancelled", "timeout", "error", "no_passages"])
def test_questions_that_were_not_answered_are_no_items(
    connection: Connection, chunks: tuple[int, ...], reason: FinishReason
) -> None:
    ask(connection, "What hums?", chunks[:2], reason=reason)
    assert items.add_logged(connection) == 0
    ask(connection, "What hums?", chunks[:2], reason="length")
    assert items.add_logged(connection) == 1


def test_questions_without_passages_or_with_one_that_is_gone_are_no_items(
    connection: Connection, chunks: tuple[int, ...]
) -> None:
    ask(connection, "What hums?", [])
    ask(connection, "What rattles?", chunks[:2])
    connection.execute("DELETE FROM chunks WHERE id = ?", (chunks[1],))
    assert items.add_logged(connection) == 0


def test_the_same_question_with_the_same_passages_is_one_item_whenever_it_comes(
    connection: Connection, chunks: tuple[int, ...]
) -> None:
    ask(connection, "What hums?", chunks[:2])
    ask(connection, " what  HUMS", [chunks[1], chunks[0]])
    assert items.add_logged(connection) == 1
    ask(connection, "What hums?", chunks[:2])
    assert items.add_logged(connection) == 0
    ask(connection, "What hums?", chunks[:3])
    assert items.add_logged(connection) == 1


def test_a_question_of_a_conversation_is_taken_as_it_was_searched_for(
    connection: Connection, chunks: tuple[int, ...]
) -> None:
    ask(connection, "And why?", chunks[:1], searched="Why does the pump hum?")
    ask(connection, "Who oils it?", chunks[:1], searched="")
    items.add_logged(connection)
    items.split(connection, chunks)
    assert [item.question for item in of(connection, chunks)] == ["Why does the pump hum?", "Who oils it?"]


def test_items_go_with_their_passages_and_with_their_question(database: Database, chunks: tuple[int, ...]) -> None:
    other = add_document(database, "/other", 1)
    with database.write() as connection:
        ask(connection, "What hums?", [chunks[0], other[0]])
        kept = ask(connection, "What rattles?", chunks[:1])
        assert items.add_logged(connection) == 2
    remove_document(database, "/other")
    with database.write() as connection:
        assert items.counts(connection, model=MODEL).logged == 1
        connection.execute("DELETE FROM questions WHERE id = ?", (kept,))
        assert items.counts(connection, model=MODEL).logged == 0


# --- written questions -----------------------------------------------------------------------------------------------


def test_a_passage_is_studied_once_by_each_model(connection: Connection, chunks: tuple[int, ...]) -> None:
    assert items.to_study(connection, chunks, model=MODEL, wanted=24) == list(chunks)
    assert study(connection, chunks[1], "What hums?", "What rattles?")
    assert items.to_study(connection, chunks, model=MODEL, wanted=24) == [*chunks[:1], *chunks[2:]]
    assert items.to_study(connection, chunks, model=OTHER, wanted=24) == list(chunks)
    assert items.to_study(connection, chunks, model=MODEL, wanted=25) == list(chunks)
    assert study(connection, chunks[1])
    assert chunks[1] not in items.to_study(connection, chunks, model=MODEL, wanted=48)
    assert [(item.kind, item.question, item.chunks, item.made_at) for item in of(connection, chunks)] == [
        ("study", "What hums?", (chunks[1],), 5.0),
        ("study", "What rattles?", (chunks[1],), 5.0),
    ]


def test_nothing_is_added_about_a_passage_that_is_gone(connection: Connection, chunks: tuple[int, ...]) -> None:
    connection.execute("DELETE FROM chunks WHERE id = ?", (chunks[0],))
    assert not study(connection, chunks[0], "What hums?")
    assert of(connection, chunks) == []
    assert connection.execute("SELECT count(*) FROM studied").get == 0


# --- held out --------------------------------------------------------------------------------------------------------


def test_about_a_tenth_of_the_written_questions_is_held_out_by_their_text(
    connection: Connection, chunks: tuple[int, ...]
) -> None:
    texts = [f"What does part {number} do?" for number in range(500)]
    study(connection, chunks[0], *texts)
    study(connection, chunks[1], *reversed(texts))
    held = [{item.question for item in of(connection, [chunk]) if item.held_out} for chunk in chunks[:2]]
    assert held[0] == held[1]
    assert 30 < len(held[0]) < 70


def test_the_newest_fifth_of_the_logged_questions_is_held_out(connection: Connection, chunks: tuple[int, ...]) -> None:
    asked = [f"What is part {number} for?" for number in range(10)]
    assert ask_and_split(connection, asked, chunks) == asked[8:]


def test_fewer_than_five_are_all_trained_on(connection: Connection, chunks: tuple[int, ...]) -> None:
    assert ask_and_split(connection, ["What is a?", "What is b?", "What is c?", "What is d?"], chunks) == []


def test_undecided_items_are_not_handed_out(connection: Connection, chunks: tuple[int, ...]) -> None:
    ask(connection, "What hums?", chunks[:2])
    items.add_logged(connection)
    assert of(connection, chunks) == []


def test_what_was_decided_once_stays_when_more_is_asked(connection: Connection, chunks: tuple[int, ...]) -> None:
    early = [f"What is part {number} for?" for number in range(10)]
    late = [f"Who made part {number}?" for number in range(10)]
    first = ask_and_split(connection, early, chunks)
    assert ask_and_split(connection, late, chunks) == [*first, *late[8:]]


def test_a_clock_that_went_back_does_not_move_what_was_decided(connection: Connection, chunks: tuple[int, ...]) -> None:
    held = ask_and_split(connection, [f"What is part {number} for?" for number in range(10)], chunks)
    for number in range(10):
        ask(connection, f"Who made part {number}?", chunks, at=-1000.0 + number)
    items.add_logged(connection)
    items.split(connection, chunks)
    now_held = [item.question for item in of(connection, chunks) if item.held_out]
    assert now_held == [*held, "Who made part 8?", "Who made part 9?"]


def test_one_question_is_never_on_both_sides(connection: Connection, chunks: tuple[int, ...]) -> None:
    study(connection, chunks[0], "What is the pump for?")
    [written] = of(connection, chunks)
    for number in range(9):
        ask(connection, f"What is part {number} for?", chunks[:2], at=float(number))
    ask(connection, "what is part 0 for", chunks[:3], at=50.0)  # it came first, whatever passages it has now
    ask(connection, "what is the pump for", chunks[:2], at=60.0)  # was decided when it was written
    items.add_logged(connection)
    items.split(connection, chunks)
    held = {item.question: item.held_out for item in of(connection, chunks) if item.kind == "logged"}
    assert held["what is part 0 for"] is held["What is part 0 for?"] is False
    assert held["what is the pump for"] is written.held_out
    assert [question for question, out in held.items() if out] == ["What is part 7 for?", "What is part 8 for?"]


# --- the teacher -----------------------------------------------------------------------------------------------------


def test_an_answer_comes_back_to_the_bit(connection: Connection, chunks: tuple[int, ...]) -> None:
    study(connection, chunks[0], "What hums?")
    [item] = items.untaught(connection, chunks, model=MODEL, limit=9)
    said = made_up()
    items.teach(connection, item.id, said, model=MODEL)
    [back] = items.taught(connection, [item.id, 999], model=MODEL).values()
    for name in ("tokens", "top_ids", "top_logprobs"):
        kept, given = getattr(back, name), getattr(said, name)
        assert kept.dtype == given.dtype
        np.testing.assert_array_equal(kept, given)
    [seen] = of(connection, chunks)
    assert (seen.answer, seen.refused) == (back.answer, False) == ("It hums.", False)
    assert items.untaught(connection, chunks, model=MODEL, limit=9) == []


def test_a_question_that_could_not_be_answered_is_not_asked_again(
    connection: Connection, chunks: tuple[int, ...]
) -> None:
    study(connection, chunks[0], "What hums?")
    [item] = of(connection, chunks)
    items.teach(connection, item.id, made_up(), model=MODEL)
    items.teach(connection, item.id, None, model=MODEL)
    assert items.untaught(connection, chunks, model=MODEL, limit=9) == []
    assert items.taught(connection, [item.id], model=MODEL) == {}
    [seen] = of(connection, chunks)
    assert (seen.answer, seen.refused) == (None, True)
    assert items.items_elsewhere(connection, chunks[1:], model=MODEL, exam=False, limit=9) == []
    assert items.items_elsewhere(connection, chunks[1:], model=MODEL, exam=True, limit=9) == []


def test_an_answer_of_another_model_is_none(connection: Connection, chunks: tuple[int, ...]) -> None:
    study(connection, chunks[0], "What hums?", "What rattles?")
    hums, rattles = of(connection, chunks)
    items.teach(connection, hums.id, made_up(), model=OTHER)
    items.teach(connection, rattles.id, None, model=OTHER)
    assert [(item.answer, item.refused) for item in of(connection, chunks)] == [(None, False)] * 2
    assert [item.id for item in items.untaught(connection, chunks, model=MODEL, limit=9)] == [hums.id, rattles.id]
    assert items.taught(connection, [hums.id], model=MODEL) == {}
    assert items.taught(connection, [hums.id], model=OTHER).keys() == {hums.id}


def test_logged_questions_are_taught_first_and_no_more_than_asked_for(
    connection: Connection, chunks: tuple[int, ...]
) -> None:
    study(connection, chunks[0], "What hums?", "What rattles?")
    study(connection, chunks[5], "What leaks?")
    ask(connection, "Who oils the pump?", chunks[:2])
    items.add_logged(connection)
    waiting = items.untaught(connection, chunks[:2], model=MODEL, limit=2)
    assert [item.question for item in waiting] == ["Who oils the pump?", "What hums?"]
    assert len(items.untaught(connection, chunks[:2], model=MODEL, limit=9)) == 3


def test_teaching_an_item_that_has_gone_changes_nothing(connection: Connection, chunks: tuple[int, ...]) -> None:
    items.teach(connection, 12, made_up(), model=MODEL)
    assert items.counts(connection, model=MODEL) == ItemCounts(0, 0, 0, 0, 0, 0)


# --- vectors, other items, counts ------------------------------------------------------------------------------------


def test_vectors_are_kept_in_half_precision_until_they_are_forgotten(
    connection: Connection, chunks: tuple[int, ...]
) -> None:
    study(connection, chunks[0], "What hums?", "What rattles?")
    hums, rattles = (item.id for item in of(connection, chunks))
    vector = np.linspace(-1, 1, 8, dtype=np.float32)
    items.put_vectors(connection, {hums: vector, 999: vector})
    found = items.vectors(connection, [hums, rattles, 999])
    assert found.keys() == {hums}
    np.testing.assert_array_equal(found[hums], vector.astype(np.float16))
    items.forget_vectors(connection)
    assert items.vectors(connection, [hums]) == {}


def test_items_elsewhere_are_a_steady_sample_in_two_parts(connection: Connection, chunks: tuple[int, ...]) -> None:
    texts = [f"What is part {number} for?" for number in range(200)]
    study(connection, chunks[0], *texts)
    study(connection, chunks[1], *texts)

    def sample(exam: bool, limit: int = 1000) -> list[int]:
        return [item.id for item in items.items_elsewhere(connection, [chunks[1]], model=MODEL, exam=exam, limit=limit)]

    everything = {item.id for item in of(connection, [chunks[0]])}
    assert set(sample(True)) | set(sample(False)) == everything
    assert not set(sample(True)) & set(sample(False))
    assert 20 < len(sample(True)) < 60
    few = sample(False, 20)
    assert few == sample(False)[:20]
    assert few != sorted(few)


def test_counts_are_of_all_items_or_of_some_passages(connection: Connection, chunks: tuple[int, ...]) -> None:
    ask_and_split(connection, [f"What is part {number} for?" for number in range(5)], chunks[:2])
    study(connection, chunks[0], "What hums?", "What rattles?")
    study(connection, chunks[5], "What leaks?")
    hums, rattles = (item for item in of(connection, chunks) if item.question in ("What hums?", "What rattles?"))
    items.teach(connection, hums.id, made_up(), model=MODEL)
    items.teach(connection, rattles.id, None, model=MODEL)
    written = [item for item in of(connection, chunks) if item.kind == "study"]
    held = 1 + sum(item.held_out for item in written)
    assert items.counts(connection, model=MODEL) == ItemCounts(5, 3, held, 1, 1, 6)
    assert items.counts(connection, model=OTHER) == ItemCounts(5, 3, held, 0, 0, 8)
    about = items.counts(connection, model=MODEL, chunks=[chunks[5]])
    assert (about.logged, about.study, about.waiting) == (0, 1, 1)
