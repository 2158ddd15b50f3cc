"""What is embedded of a chunk."""

from hypothesis import given
from hypothesis import strategies as st

from edge_rag.policy.views import WHOLE_TOKENS, embedded_views


def words(text: str) -> str:
    return "".join(text.split())


@given(st.text(), st.integers(0, 1000))
def test_views_hold_all_of_the_text_in_at_most_two_parts(text: str, tokens: int) -> None:
    views = embedded_views("T", "T", text, tokens)
    assert words("".join(views)) == words(text)
    assert len(views) <= 2


def test_a_short_chunk_is_one_view() -> None:
    assert embedded_views("T", "T", "one. two.", WHOLE_TOKENS) == ["one. two."]


def test_a_long_chunk_is_cut_at_the_sentence_end_nearest_to_the_middle() -> None:
    assert embedded_views("T", "T", "aaaa aaaa. bbbb bbbb.", WHOLE_TOKENS + 1) == ["aaaa aaaa.", "bbbb bbbb."]


def test_without_a_sentence_end_near_the_middle_it_is_cut_between_words() -> None:
    assert embedded_views("T", "T", "a. bbbb cccc dddd", WHOLE_TOKENS + 1) == ["a. bbbb", "cccc dddd"]


def test_without_any_space_it_is_cut_in_the_middle() -> None:
    assert embedded_views("T", "T", "abcdef", WHOLE_TOKENS + 1) == ["abc", "def"]


def test_the_heading_below_the_title_stands_before_each_view() -> None:
    views = embedded_views("Manual", "Manual › Pump › Care", "one one. two two.", WHOLE_TOKENS + 1)
    assert views == ["Pump › Care\none one.", "Pump › Care\ntwo two."]
