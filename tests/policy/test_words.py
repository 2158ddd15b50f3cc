"""Content words, numbers, stems and the word query. That FTS5 accepts the query is tested in tests/store."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.policy.words import MAX_QUERY_WORDS, STOP_WORDS, content_words, fts_query, numbers, stem


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("How often is the filter cleaned?", ["often", "filter", "cleaned"], id="function words go"),
        pytest.param("filter, FILTER", ["filter", "filter"], id="repeated words stay, in lower case"),
        pytest.param("the KS-4410 at 0.5 bar", ["ks-4410", "0.5", "bar"], id="compounds stay whole"),
        pytest.param("see docs/log.md.", ["see", "docs/log.md"], id="the full stop of the sentence is no part"),
        pytest.param("Größe überprüfen", ["größe", "überprüfen"], id="other alphabets"),
        pytest.param("what is it?", [], id="function words only"),
        pytest.param("", [], id="nothing"),
    ],
)
def test_content_words(text: str, words: list[str]) -> None:
    assert content_words(text) == words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("1,200 hours", {"1200"}, id="comma groups thousands"),
        pytest.param("1,234,567", {"1234567"}, id="several groups"),
        pytest.param("1,200.50 EUR", {"1200.50"}, id="thousands and decimals"),
        pytest.param("3,5 bar", {"3,5"}, id="decimal comma stays"),
        pytest.param("at 0.5 or 12.", {"0.5", "12"}, id="full stop behind a number is no part of it"),
        pytest.param("5,6,7", {"5,6,7"}, id="a list without blanks is kept as written"),
        pytest.param("model KS-4410 v2", {"4410", "2"}, id="numbers inside names"),
        pytest.param("no digits", set(), id="none"),
    ],
)
def test_numbers(text: str, expected: set[str]) -> None:
    assert numbers(text) == expected


@given(st.integers(0, 10**15))
def test_a_number_is_the_same_with_and_without_thousands_separators(n: int) -> None:
    assert numbers(f"about {n:,} of them") == numbers(f"{n}") == {str(n)}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(("filter", "filters"), id="plural"),
        pytest.param(("pipe", "pipes"), id="plural of a short word in e"),
        pytest.param(("valve", "valves"), id="plural of a longer word in e"),
        pytest.param(("battery", "batteries"), id="plural in ies"),
        pytest.param(("process", "processes", "processed", "processing"), id="word in ss"),
        pytest.param(("clean", "cleans", "cleaned", "cleaning", "cleanings"), id="verb"),
        pytest.param(("change", "changes", "changed", "changing"), id="verb in e"),
        pytest.param(("install", "installation", "installations"), id="noun of a verb"),
        pytest.param(("slow", "slowly"), id="adverb"),
        pytest.param(("marked", "markedly"), id="adverb of a participle"),
    ],
)
def test_forms_of_a_word_meet_in_one_stem(family: tuple[str, ...]) -> None:
    assert len({stem(word) for word in family}) == 1


@pytest.mark.parametrize(
    "word",
    [
        pytest.param("gas", id="too short"),
        pytest.param("bring", id="ing is not an ending here"),
        pytest.param("ks-4410s", id="a name with digits"),
        pytest.param("0.5", id="number"),
        pytest.param("glass", id="double s"),
    ],
)
def test_words_that_are_their_own_stem(word: str) -> None:
    assert stem(word) == word


@given(st.text())
def test_a_stem_of_letters_is_never_shorter_than_three_unless_the_word_is(word: str) -> None:
    assert min(len(word), 3) <= len(stem(word)) <= len(word)


def test_the_query_joins_quoted_words_by_or() -> None:
    assert fts_query("Which filter fits the KS-4410?") == '"filter" OR "fits" OR "ks-4410"'


def test_a_question_of_function_words_is_searched_as_it_stands() -> None:
    assert fts_query("Who is who?") == '"who" OR "is"'


def test_a_question_without_words_has_no_query() -> None:
    assert fts_query("?! …") == ""


@given(st.lists(st.from_regex(r"[a-z]{4,6}", fullmatch=True).filter(lambda word: word not in STOP_WORDS)))
def test_the_query_has_each_word_once_in_order_and_not_too_many(words: list[str]) -> None:
    asked = [word.strip('"') for word in fts_query(" ".join(words)).split(" OR ") if word]
    assert asked == list(dict.fromkeys(words))[:MAX_QUERY_WORDS]
