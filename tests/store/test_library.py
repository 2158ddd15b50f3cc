"""Documents and chunks: what is derived from a document never disagrees with it."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edge_rag.records import Chunk, Filter
from edge_rag.store import library, vectors
from edge_rag.store.database import Connection, Database
from edge_rag.store.library import NewDocument, Vectors

DIMENSIONS = 64
WORDS = ("pump", "filter", "valve", "winter", "battery")


def embed(texts: Sequence[str]) -> Vectors:
    """A stand-in for an embedder: the same unit vector for the same text."""
    rows = [np.random.default_rng(list(text.encode())).normal(size=DIMENSIONS) for text in texts]
    matrix = np.array(rows, dtype=np.float32).reshape(len(texts), DIMENSIONS)
    return np.asarray(matrix / np.linalg.norm(matrix, axis=1, keepdims=True), dtype=np.float32)


def document(path: str, *texts: str, kind: str = "txt", heading: str = "Manual") -> NewDocument:
    chunks = tuple(
        Chunk(ordinal=n, text=text, heading=heading, page=None, start=0, end=len(text), tokens=len(text.split()))
        for n, text in enumerate(texts)
    )
    return NewDocument(path=path, title=heading, kind=kind, bytes=9, sha256="0" * 64, recipe="1", chunks=chunks)


def put(connection: Connection, new: NewDocument) -> int:
    return library.put_document(connection, new, embed([chunk.text for chunk in new.chunks]), now=1.0)


def add(database: Database, path: str, *texts: str, kind: str = "txt", heading: str = "Manual") -> int:
    with database.write() as connection:
        return put(connection, document(path, *texts, kind=kind, heading=heading))


def texts_of(connection: Connection, ids: Sequence[int]) -> list[str]:
    found = library.passages(connection, ids)
    return [found[chunk_id].text for chunk_id in ids]


def found_by_words(database: Database, query: str, where: Filter | None = None) -> list[str]:
    with database.read() as connection:
        return texts_of(connection, library.search_words(connection, query, limit=100, where=where))


def check(database: Database) -> list[str]:
    with database.write() as connection:
        return list(library.check(connection))


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path) as opened:
        yield opened


# --- any order of changes --------------------------------------------------------------------------------------------

PATHS = st.sampled_from(["/a", "/a/b", "/c"])
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join), max_size=5, unique=True)


class LibraryMachine(RuleBasedStateMachine):
    """A library against a dict of path → texts."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.database = Database(Path(self.folder.name))
        self.index = vectors.CoarseIndex()
        self.model: dict[str, list[str]] = {}
        self.ids: dict[str, int] = {}

    def teardown(self) -> None:
        self.database.close()
        self.folder.cleanup()

    @rule(path=PATHS, texts=TEXTS)
    def put(self, path: str, texts: list[str]) -> None:
        document_id = add(self.database, path, *texts)
        assert document_id == self.ids.setdefault(path, document_id), "a replaced document keeps its id"
        self.model[path] = texts

    @rule(path=PATHS, texts=TEXTS)
    def put_and_change_ones_mind(self, path: str, texts: list[str]) -> None:
        def change_ones_mind() -> None:
            with self.database.write() as connection:
                put(connection, document(path, *texts))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            change_ones_mind()

    @rule(path=PATHS)
    def remove(self, path: str) -> None:
        with self.database.write() as connection:
            stored = library.find_document(connection, path)
            assert (stored is not None) == (path in self.model)
            if stored:
                library.remove_document(connection, stored.id)
                del self.model[path], self.ids[path]

    @rule(word=st.sampled_from(WORDS))
    def search_words(self, word: str) -> None:
        expected = [text for texts in self.model.values() for text in texts if word in text.split()]
        assert sorted(found_by_words(self.database, word)) == sorted(expected)

    @rule(exact=st.booleans(), path=st.none() | PATHS)
    def search_vectors(self, exact: bool, path: str | None) -> None:
        where = Filter(documents=(path,)) if path else None
        chosen = self.model.items() if path is None else [(path, self.model.get(path, []))]
        expected = [text for _, texts in chosen for text in texts]
        limit = 100 if exact else 0
        with self.database.read() as connection:
            hits = vectors.search(
                connection, self.index, embed(["pump"])[0], limit=50, exact_limit=limit, rescore=50, where=where
            )
            assert sorted(texts_of(connection, [chunk_id for chunk_id, _ in hits])) == sorted(expected)

    @invariant()
    def the_library_holds_exactly_the_model(self) -> None:
        with self.database.write() as connection:
            assert list(library.check(connection)) == []
            stored = {d.path: (d.id, d.chunks, d.tokens) for d in library.list_documents(connection)}
            assert stored == {
                path: (self.ids[path], len(texts), len(" ".join(texts).split())) for path, texts in self.model.items()
            }
            rows = library.chunk_texts(connection, after=0, limit=100)
            expected = sorted(text for texts in self.model.values() for text in texts)
            assert sorted(row[3] for row in rows) == expected
            ids, matrix = vectors.read_vectors(connection, [row[0] for row in rows])
            order = {chunk_id: place for place, chunk_id in enumerate(ids)}
            for row in rows:
                assert np.array_equal(matrix[order[row[0]]], embed([row[3]])[0])
            for table in ("vectors", "codes"):
                assert connection.execute(f"SELECT count(*) FROM {table}").get == len(rows)


LibraryMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
test_any_order_of_changes_keeps_the_library_whole = LibraryMachine.TestCase


# --- documents -------------------------------------------------------------------------------------------------------


def test_a_document_comes_back_as_it_was_put(database: Database) -> None:
    document_id = add(database, "/notes/pump.md", "the pump hums", "and stops", kind="md", heading="Pump")
    with database.read() as connection:
        stored = library.find_document(connection, "/notes/pump.md")
        assert stored is not None
        assert (stored.id, stored.title, stored.kind, stored.chunks, stored.tokens) == (document_id, "Pump", "md", 2, 5)
        assert library.list_documents(connection) == [stored]
        assert library.counts(connection) == library.Counts(documents=1, chunks=2, vectors=2, tokens=5)
        assert library.find_document(connection, "/notes/pump") is None


def test_ids_of_chunks_and_documents_are_never_used_again(database: Database) -> None:
    first = add(database, "/a", "one", "two")
    with database.write() as connection:
        old = {row[0] for row in library.chunk_texts(connection, after=0, limit=9)}
        library.remove_document(connection, first)
    assert add(database, "/a", "one", "two") > first
    with database.read() as connection:
        assert min(row[0] for row in library.chunk_texts(connection, after=0, limit=9)) > max(old)


def test_vectors_that_do_not_match_the_chunks_store_nothing(database: Database) -> None:
    new = document("/a", "one", "two")
    with pytest.raises(ValueError, match="zip"), database.write() as connection:
        library.put_document(connection, new, embed(["one"]), now=1.0)
    with database.read() as connection:
        assert library.counts(connection) == library.Counts(0, 0, 0, 0)


def test_passages_that_are_gone_are_left_out(database: Database) -> None:
    document_id = add(database, "/a", "one")
    with database.write() as connection:
        ids = [row[0] for row in library.chunk_texts(connection, after=0, limit=9)]
        assert set(library.passages(connection, [*ids, 10_000])) == set(ids)
        library.remove_document(connection, document_id)
        assert library.passages(connection, ids) == {}


def test_chunk_texts_goes_on_where_it_stopped(database: Database) -> None:
    add(database, "/a", *"abcdefg")
    seen, last = "", 0
    with database.read() as connection:
        while rows := library.chunk_texts(connection, after=last, limit=3):
            seen, last = seen + "".join(row[3] for row in rows), rows[-1][0]
    assert seen == "abcdefg"


@pytest.mark.parametrize(
    "name", ["new\nline.md", "quote'\".md", "emoji \N{PERSONAL COMPUTER}.md", "%_\\.md", "x" * 5000]
)
def test_any_name_is_stored_as_it_is(database: Database, name: str) -> None:
    add(database, f"/a/{name}", "text about the pump")
    with database.read() as connection:
        assert [stored.path for stored in library.list_documents(connection, Filter(folder="/a"))] == [f"/a/{name}"]
    assert found_by_words(database, "pump", Filter(documents=(f"/a/{name}",))) == ["text about the pump"]


# --- words and filters -----------------------------------------------------------------------------------------------


def test_a_word_of_the_heading_is_found_and_counts_more_than_one_of_the_text(database: Database) -> None:
    add(database, "/text", "the filter must be cleaned often", heading="Care")
    add(database, "/heading", "it must be cleaned often enough", heading="Filter")
    assert found_by_words(database, "filter") == [
        "it must be cleaned often enough",
        "the filter must be cleaned often",
    ]


def test_words_are_found_by_their_stem_and_without_accents(database: Database) -> None:
    add(database, "/a", "Cleaning the filtered café")
    for word in ("clean", "filters", "cafe", "CAFÉ"):
        assert found_by_words(database, f'"{word}"') == ["Cleaning the filtered café"]


def test_the_words_of_a_replaced_text_are_not_found_any_more(database: Database) -> None:
    add(database, "/a", "the old pump")
    add(database, "/a", "the new valve")
    assert found_by_words(database, "pump") == []
    assert found_by_words(database, "valve") == ["the new valve"]


def test_an_empty_query_finds_nothing(database: Database) -> None:
    add(database, "/a", "the pump")
    assert found_by_words(database, "") == []


PLACES = {
    "/docs/a.md": "md",
    "/docs/sub/b.txt": "txt",
    "/docs-old/c.md": "md",
    "/docs_old/d.pdf": "pdf",
    "/docs": "txt",
}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        pytest.param(None, set(PLACES), id="none"),
        pytest.param(Filter(), set(PLACES), id="empty"),
        pytest.param(Filter(folder="/"), set(PLACES), id="root"),
        pytest.param(Filter(folder="/docs"), {"/docs/a.md", "/docs/sub/b.txt"}, id="folder with longer namesakes"),
        pytest.param(Filter(folder="/docs/"), {"/docs/a.md", "/docs/sub/b.txt"}, id="folder with slash"),
        pytest.param(Filter(folder="/docs-old"), {"/docs-old/c.md"}, id="longer namesake"),
        pytest.param(Filter(folder="/doc"), set(), id="beginning of a name"),
        pytest.param(Filter(folder="/docs%"), set(), id="wildcard"),
        pytest.param(Filter(kinds=("md",)), {"/docs/a.md", "/docs-old/c.md"}, id="kind"),
        pytest.param(Filter(kinds=("pdf", "txt")), {"/docs/sub/b.txt", "/docs_old/d.pdf", "/docs"}, id="two kinds"),
        pytest.param(Filter(documents=("/docs", "/docs/a.md")), {"/docs", "/docs/a.md"}, id="documents"),
        pytest.param(Filter(documents=("/docs", "/docs/a.md"), kinds=("md",)), {"/docs/a.md"}, id="and"),
        pytest.param(Filter(folder="/docs", kinds=("pdf",)), set(), id="nothing passes both"),
    ],
)
def test_a_filter_restricts_every_kind_of_search_alike(
    database: Database, where: Filter | None, expected: set[str]
) -> None:
    for path, kind in PLACES.items():
        add(database, path, f"pump of {path}", kind=kind)
    index, vector = vectors.CoarseIndex(), embed(["pump"])[0]
    with database.read() as connection:
        assert {stored.path for stored in library.list_documents(connection, where)} == expected
        assert library.filtered_chunks(connection, where) == len(expected)
        by_words = library.search_words(connection, "pump", limit=9, where=where)
        found = [by_words]
        for exact_limit in (0, 100):
            hits = vectors.search(connection, index, vector, limit=9, exact_limit=exact_limit, rescore=9, where=where)
            found.append([chunk_id for chunk_id, _ in hits])
        for ids in found:
            assert {passage.path for passage in library.passages(connection, ids).values()} == expected


def test_all_queries_of_a_read_see_one_state(database: Database) -> None:
    document_id = add(database, "/a", "the pump", "the valve")
    with database.read() as connection:
        ids = library.search_words(connection, "pump OR valve", limit=9)
        with database.write() as writer:
            library.remove_document(writer, document_id)
        assert set(library.passages(connection, ids)) == set(ids)
        assert library.counts(connection).documents == 1
    with database.read() as connection:
        assert library.counts(connection).documents == 0


# --- checking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        pytest.param("DELETE FROM vectors WHERE id = 2", "1 chunks without a vector", id="vector"),
        pytest.param("DELETE FROM codes WHERE id = 2", "1 vectors without a code", id="code"),
        pytest.param("UPDATE documents SET chunks = 7", "number of chunks is wrong", id="number of chunks"),
        pytest.param(
            "DROP TRIGGER vectors_go_with_chunk; DELETE FROM chunks WHERE id = 1", "vectors without a chunk", id="chunk"
        ),
        pytest.param(
            "INSERT INTO words (words, rowid, heading, text) VALUES ('delete', 1, 'Manual', 'the pump')",
            "word index",
            id="word index",
        ),
    ],
)
def test_check_tells_what_is_inconsistent(database: Database, damage: str, complaint: str) -> None:
    add(database, "/a", "the pump", "the valve")
    with database.read() as connection:
        pass
    connection.execute(damage)  # outside of any transaction, where keys to other tables can be switched off
    found = check(database)
    assert any(complaint in line for line in found), found


def test_notes_of_the_library_are_kept(database: Database) -> None:
    with database.write() as connection:
        assert library.get_meta(connection, "key") is None
        library.set_meta(connection, "key", "one")
        library.set_meta(connection, "key", "two")
        assert library.get_meta(connection, "key") == "two"
