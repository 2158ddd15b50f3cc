"""`policy.words.fts_query` against a real FTS5 (the tests of policy import no native package)."""

from collections.abc import Iterator

import apsw
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_rag.policy.words import fts_query

hostile = st.text(st.sampled_from("\"'*^:-+(){}<>.,;/\\ \0\nabAND_ORNEAR1٣é字")) | st.text()


@pytest.fixture(scope="module")
def words() -> Iterator[apsw.Connection]:
    """An index of words with our tokenizer."""
    connection = apsw.Connection(":memory:")
    connection.execute(
        "CREATE VIRTUAL TABLE words USING fts5 (text, tokenize = 'porter unicode61 remove_diacritics 2')"
    )
    connection.execute("INSERT INTO words (rowid, text) VALUES (1, 'Clean the KS-4410 filter at 0.5 bar. NOT or AND.')")
    yield connection
    connection.close()


def found(words: apsw.Connection, question: str) -> bool:
    query = fts_query(question)
    return bool(query) and bool(words.execute("SELECT rowid FROM words WHERE words MATCH ?", (query,)).fetchall())


@given(hostile)
@example('"')
@example("_")
@example("a AND NOT b*")
@example("text: filter")
def test_the_query_of_any_text_is_valid(words: apsw.Connection, question: str) -> None:
    found(words, question)


@given(hostile, hostile)
def test_a_word_of_the_document_is_found_whatever_stands_around_it(
    words: apsw.Connection, before: str, behind: str
) -> None:
    assert found(words, f"{before[:20]} filter {behind[:20]}")


@pytest.mark.parametrize(
    "question",
    [
        pytest.param("What about the KS-4410?", id="compound"),
        pytest.param("ks4410 or 0.5?", id="decimal number"),
        pytest.param("cleaning", id="another form of a word"),
        pytest.param("not and or", id="function words only, which are operators of FTS5"),
    ],
)
def test_found(words: apsw.Connection, question: str) -> None:
    assert found(words, question)


@pytest.mark.parametrize(
    "question",
    [
        pytest.param("pump text", id="the name of the column is no word of the document"),
        pytest.param("fil*", id="an asterisk is no wildcard"),
        pytest.param("4410-KS", id="a compound the other way round"),
    ],
)
def test_not_found(words: apsw.Connection, question: str) -> None:
    assert not found(words, question)
