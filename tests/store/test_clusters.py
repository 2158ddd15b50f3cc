"""Clusters keep their ids while they keep their members, and what counts as asked together is what was answered."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from edge_rag.errors import NotFound
from edge_rag.policy.clustering import worth_training
from edge_rag.records import Answer, Asked, Chunk, Cluster, FinishReason, Plan, Timings, Usage
from edge_rag.store import clusters, journal, library
from edge_rag.store.database import Database

DAY = 86_400.0
HALF_LIFE = 30 * DAY


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path) as opened:
        yield opened


def add(database: Database, path: str, *tokens: int) -> list[int]:
    """Store a document with a chunk of so many tokens each; the chunks' ids."""
    texts = tuple(
        Chunk(ordinal=place, text="pump", heading="", page=None, start=0, end=4, tokens=count)
        for place, count in enumerate(tokens)
    )
    new = library.NewDocument(path=path, title="", kind="md", bytes=1, sha256="", recipe="", chunks=texts)
    with database.write() as connection:
        document_id = library.put_document(connection, new, [np.ones(8, np.float32)] * len(texts), now=0.0)
        rows = connection.execute("SELECT id FROM chunks WHERE document_id = ? ORDER BY ordinal", (document_id,))
        return [chunk_id for (chunk_id,) in rows]


def remove(database: Database, path: str) -> None:
    with database.write() as connection:
        document = library.find_document(connection, path)
        assert document is not None
        library.remove_document(connection, document.id)


def ask(database: Database, name: str, chunks: Sequence[int], now: float, reason: FinishReason = "stop") -> None:
    with database.write() as connection:
        passages = library.passages(connection, chunks)
        answer = Answer(
            id=name,
            question="Which pump?",
            text="This one.",
            passages=tuple(passages[chunk] for chunk in chunks),
            citations=(),
            usage=Usage(prompt_tokens=1, cached_tokens=0, completion_tokens=1),
            timings=Timings(retrieve=0.0, queued=0.0, first_token=0.0, total=0.0),
            finish_reason=reason,
            plan=Plan(passages=(), dropped=0, tail_tokens=1, search_query="pump"),
            model="small",
        )
        journal.record(connection, answer, now=now)


def asked(database: Database, now: float) -> list[Asked]:
    with database.read() as connection:
        return clusters.asked_together(connection, now=now, half_life=HALF_LIFE)


def put(database: Database, *groups: set[int], weight: float = 1.0, now: float = 1.0) -> None:
    with database.write() as connection:
        clusters.put_clusters(connection, [frozenset(group) for group in groups], [weight] * len(groups), now=now)


def known(database: Database) -> list[Cluster]:
    with database.read() as connection:
        return clusters.clusters(connection)


def train(database: Database, cluster: Cluster, now: float, failure: str = "") -> bool:
    with database.write() as connection:
        return clusters.note_training(connection, cluster, now=now, failure=failure)


# --- asked together --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age", "weight"),
    [
        pytest.param(0.0, 1.0, id="now"),
        pytest.param(30.0, 0.5, id="a half-life"),
        pytest.param(60.0, 0.25, id="two half-lives"),
        pytest.param(-400.0, 1.0, id="from the future, the clock was set back"),
    ],
)
def test_questions_count_less_with_age(database: Database, age: float, weight: float) -> None:
    one, two = add(database, "/a", 5, 5)
    ask(database, "q", [two, one], 1000 * DAY)
    [found] = asked(database, (1000 + age) * DAY)
    assert found.chunks == (two, one)
    assert found.weight == pytest.approx(weight)


def test_very_old_questions_are_forgotten(database: Database) -> None:
    ask(database, "q", add(database, "/a", 5), 0.0)
    assert len(asked(database, 9.99 * HALF_LIFE)) == 1
    assert asked(database, 10 * HALF_LIFE) == []


@pytest.mark.parametrize(
    ("reason", "count"), [("stop", 1), ("length", 1), ("cancelled", 0), ("error", 0), ("no_passages", 0)]
)
def test_only_finished_answers_count(database: Database, reason: FinishReason, count: int) -> None:
    ask(database, "q", add(database, "/a", 5), 0.0, reason)
    assert len(asked(database, 1.0)) == count


def test_questions_without_passages_do_not_count(database: Database) -> None:
    ask(database, "q", [], 0.0)
    assert asked(database, 1.0) == []


def test_questions_come_by_age_and_each_on_its_own(database: Database) -> None:
    chunks = add(database, "/a", 5, 5)
    for name, now in (("new", 3.0), ("old", 1.0), ("twin", 3.0)):
        ask(database, name, chunks if name == "old" else chunks[:1], now)
    assert [question.chunks for question in asked(database, 3.0)] == [tuple(chunks), (chunks[0],), (chunks[0],)]


def test_passages_that_are_gone_are_left_out(database: Database) -> None:
    (kept,) = add(database, "/a", 5)
    (replaced,) = add(database, "/b", 5)
    ask(database, "both", [replaced, kept], 0.0)
    ask(database, "one", [replaced], 0.0)
    add(database, "/b", 7)
    assert [question.chunks for question in asked(database, 1.0)] == [(kept,)]


def test_tokens_are_of_passages_that_were_asked_for_or_are_in_a_cluster(database: Database) -> None:
    one, two, _ = add(database, "/a", 5, 6, 7)
    ask(database, "q", [one], 0.0)
    put(database, {two})
    with database.read() as connection:
        assert clusters.passage_tokens(connection) == {one: 5, two: 6}


# --- clusters --------------------------------------------------------------------------------------------------------


def test_a_cluster_comes_back_with_its_members_and_their_tokens(database: Database) -> None:
    one, two = add(database, "/a", 5, 6)
    put(database, {two, one}, weight=2.5, now=7.0)
    [found] = known(database)
    assert found == Cluster(
        id=found.id, members=(one, two), tokens=11, weight=2.5, created_at=7.0, changed_at=7.0, trained_at=None
    )
    with database.read() as connection:
        assert clusters.cluster(connection, found.id) == found


def test_an_unknown_cluster_is_not_found(database: Database) -> None:
    with database.read() as connection, pytest.raises(NotFound, match="no cluster") as caught:
        clusters.cluster(connection, 7)
    assert caught.value.field == "7"


def test_a_cluster_keeps_its_id_and_its_training_while_its_members_stay(database: Database) -> None:
    one, two, three = add(database, "/a", 5, 5, 5)
    put(database, {one, two})
    [before] = known(database)
    assert train(database, before, 2.0, "too small")
    put(database, {three}, {one, two}, weight=9.0, now=3.0)
    after = known(database)[0]
    assert (after.id, after.weight, after.changed_at) == (before.id, 9.0, 1.0)
    assert (after.trained_at, after.failure) == (2.0, "too small")


def test_a_cluster_that_grows_keeps_its_id_and_is_to_be_trained_again(database: Database) -> None:
    one, two, three = add(database, "/a", 5, 5, 5)
    put(database, {one, two})
    [before] = known(database)
    train(database, before, 2.0)
    put(database, {one, two, three}, now=3.0)
    [after] = known(database)
    assert (after.id, after.members, after.tokens) == (before.id, (one, two, three), 15)
    assert (after.created_at, after.changed_at, after.trained_at) == (1.0, 3.0, 2.0)


def test_a_clock_that_was_set_back_does_not_hide_a_change_or_a_training(database: Database) -> None:
    one, two = add(database, "/a", 5, 5)
    put(database, {one}, now=100.0)
    train(database, known(database)[0], 90.0)
    [trained] = known(database)
    assert not worth_training(trained, 1.0)
    put(database, {one, two}, now=80.0)
    [grown] = known(database)
    assert worth_training(grown, 1.0)
    train(database, grown, 70.0)
    assert not worth_training(known(database)[0], 1.0)


def test_clusters_that_no_group_holds_are_removed_with_their_members(database: Database) -> None:
    one, two, three = add(database, "/a", 5, 5, 5)
    put(database, {one, two}, {three})
    old, kept = known(database)
    put(database, {one}, {three, two})
    assert [(found.id == kept.id, found.members) for found in known(database)] == [
        (True, (two, three)),
        (False, (one,)),
    ]
    assert old.id not in {found.id for found in known(database)}
    put(database)
    assert known(database) == []
    with database.read() as connection:
        assert connection.execute("SELECT count(*) FROM cluster_members").get == 0


def test_of_overlapping_clusters_each_keeps_the_id_of_the_nearest_group(database: Database) -> None:
    one, two, three, four = add(database, "/a", 5, 5, 5, 5)
    put(database, {one, two}, {one, two, three})
    small, large = known(database)
    put(database, {one, two, four}, {one, two, three})
    assert [(found.id, found.members) for found in known(database)] == [
        (small.id, (one, two, four)),
        (large.id, (one, two, three)),
    ]


def test_chunks_that_went_meanwhile_are_left_out(database: Database) -> None:
    (one,) = add(database, "/a", 5)
    (gone,) = add(database, "/b", 5)
    remove(database, "/b")
    put(database, {gone}, {one, gone})
    assert [found.members for found in known(database)] == [(one,)]


def test_a_cluster_loses_the_passages_of_a_removed_document_and_is_to_be_trained_again(database: Database) -> None:
    (one,) = add(database, "/a", 5)
    (two,) = add(database, "/b", 5)
    put(database, {one, two})
    [before] = known(database)
    train(database, before, 2.0)
    remove(database, "/b")
    [after] = known(database)
    assert (after.id, after.members, after.trained_at) == (before.id, (one,), None)
    put(database, {one}, now=3.0)
    assert known(database)[0].id == before.id


# --- training --------------------------------------------------------------------------------------------------------


def test_training_is_noted_with_its_failure(database: Database) -> None:
    put(database, set(add(database, "/a", 5)))
    [found] = known(database)
    assert train(database, found, 5.0, "not a number")
    assert (known(database)[0].trained_at, known(database)[0].failure) == (5.0, "not a number")
    assert train(database, found, 6.0)
    assert (known(database)[0].trained_at, known(database)[0].failure) == (6.0, "")


def test_training_of_what_has_changed_or_gone_since_is_not_noted(database: Database) -> None:
    one, two = add(database, "/a", 5, 5)
    put(database, {one})
    [before] = known(database)
    put(database, {one, two}, now=2.0)
    assert not train(database, before, 9.0)
    assert known(database)[0].trained_at is None
    put(database)
    assert not train(database, before, 9.0)
