"""Token bytes to text to sentences. How the stream was cut into pieces must never show."""

from itertools import accumulate, pairwise
from typing import AnyStr

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_rag.policy.streaming import Cut, SentenceStream, TextStream

places = st.lists(st.integers(0, 60), max_size=30)
stop_strings = st.lists(st.text("ab\n", max_size=4), max_size=4)
prose = st.text(st.sampled_from("aZ1 .!?…\"')]\n\r\t。！e.g.etc"), max_size=40)


def pieces(whole: AnyStr, at: list[int]) -> list[AnyStr]:
    """`whole`, cut at the places `at` that lie within it."""
    inside = sorted({0, len(whole), *(place for place in at if place < len(whole))})
    return [whole[start:end] for start, end in pairwise(inside)]


def through(stream: TextStream, data: list[bytes]) -> str:
    return "".join([*map(stream.feed, data), stream.finish()])


def before_first(text: str, stops: list[str]) -> str:
    """What the stream must give: the text before the earliest start of any stop."""
    return text[: min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))]


# --- characters ------------------------------------------------------------------------------------------------------


@given(st.text(), places)
def test_text_survives_any_cutting_of_its_bytes(text: str, at: list[int]) -> None:
    stream = TextStream()
    assert through(stream, pieces(text.encode(), at)) == text
    assert not stream.stopped


@given(st.binary(), places)
def test_invalid_bytes_become_replacement_characters_however_they_are_cut(data: bytes, at: list[int]) -> None:
    assert through(TextStream(), pieces(data, at)) == data.decode("utf-8", "replace")


@given(st.text())
def test_a_character_is_given_out_with_its_last_byte(text: str) -> None:
    stream = TextStream()
    given_out = [[stream.feed(bytes([byte])) for byte in character.encode()][-1] for character in text]
    assert given_out == list(text)


def test_half_a_character_at_the_end_becomes_a_replacement_character() -> None:
    stream = TextStream()
    assert stream.feed("aé".encode()[:-1]) == "a"
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


# --- stop strings ----------------------------------------------------------------------------------------------------


@given(st.text("ab\né"), stop_strings, places)
@example("ab", ["abc", "b"], [1])
@example("abc", ["abc", "b"], [1, 2])
def test_the_text_ends_where_the_first_stop_begins(text: str, stops: list[str], at: list[int]) -> None:
    stream = TextStream(stops)
    assert through(stream, pieces(text.encode(), at)) == before_first(text, stops)
    assert stream.stopped == any(stop in text for stop in stops if stop)


@given(st.text("ab\né"), stop_strings, places)
def test_nothing_is_given_out_that_may_belong_to_a_stop(text: str, stops: list[str], at: list[int]) -> None:
    stream, shown = TextStream(stops), ""
    final = before_first(text, stops)
    for piece in pieces(text.encode(), at):
        shown += stream.feed(piece)
        assert final.startswith(shown)


@given(st.text("ab"), st.text("ab", min_size=1, max_size=4), places)
def test_no_more_is_held_back_than_a_stop_could_need(text: str, stop: str, at: list[int]) -> None:
    stream, fed, shown = TextStream([stop]), "", ""
    for piece in pieces(text.encode(), at):
        shown += stream.feed(piece)
        fed += piece.decode()
        held = fed[len(shown) :]
        assert stream.stopped or held == "" or (stop.startswith(held) and held != stop)


def test_a_stop_is_known_at_its_last_character() -> None:
    stream = TextStream(["\nUser:"])
    assert [stream.feed(b"Yes.\nUs"), stream.stopped] == ["Yes.", False]
    assert [stream.feed(b"er: no"), stream.stopped] == ["", True]


def test_what_looked_like_a_stop_is_given_out_when_it_is_none() -> None:
    stream = TextStream(["\nUser:"])
    assert [stream.feed(b"Yes.\nUs"), stream.feed(b"ual")] == ["Yes.", "\nUsual"]


def test_after_a_stop_nothing_comes() -> None:
    stream = TextStream(["b"])
    assert [stream.feed(b"abc"), stream.feed(b"more"), stream.finish()] == ["a", "", ""]


# --- sentences -------------------------------------------------------------------------------------------------------


def ends_of(cuts: list[Cut]) -> list[int]:
    """Offsets at which sentences end."""
    offsets = accumulate(len(cut.text) for cut in cuts)
    return [offset for offset, cut in zip(offsets, cuts, strict=True) if cut.ends]


def cuts_of(fed: list[str]) -> tuple[list[Cut], bool]:
    stream = SentenceStream()
    cuts = [cut for text in fed for cut in stream.feed(text)]
    return cuts, stream.finish()


@given(prose, places)
@example("Hello.\n", [1, 6])
def test_sentences_do_not_depend_on_how_the_text_arrived(text: str, at: list[int]) -> None:
    (whole, whole_open), (parts, parts_open) = cuts_of([text]), cuts_of(pieces(text, at))
    assert "".join(cut.text for cut in parts) == text
    assert ends_of(parts) == ends_of(whole)
    assert parts_open == whole_open


@given(st.text())
def test_cuts_joined_are_the_text(text: str) -> None:
    assert "".join(cut.text for cut in cuts_of([text])[0]) == text


def split_sentences(text: str) -> list[str]:
    """The sentences of a finished text, stripped."""
    stream = SentenceStream()
    sentences, current = [], ""
    for cut in stream.feed(text):
        current += cut.text
        if cut.ends:
            sentences.append(current.strip())
            current = ""
    return [sentence for sentence in [*sentences, current.strip()] if sentence]


@given(prose)
def test_sentences_hold_all_but_the_blanks_between_them(text: str) -> None:
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence and sentence == sentence.strip() for sentence in sentences)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        pytest.param("Clean it. Then dry it.", ["Clean it.", "Then dry it."], id="two sentences"),
        pytest.param("Really?! Yes… Stop!", ["Really?!", "Yes…", "Stop!"], id="other marks"),
        pytest.param("Use parts, e.g. filters, approx. 5 of them.", 1, id="abbreviations"),
        pytest.param("Use spares (e.g. filters) etc. and so on.", 1, id="abbreviation in brackets"),
        pytest.param("Mr. T. Smith wrote it. See it.", ["Mr. T. Smith wrote it.", "See it."], id="titles, initials"),
        pytest.param("It is 0.5 bar. Not 1.5.", ["It is 0.5 bar.", "Not 1.5."], id="decimals"),
        pytest.param("It was in 2024. Then it broke.", ["It was in 2024.", "Then it broke."], id="ends with a number"),
        pytest.param("1. Open it.\n2. Close it.", ["1. Open it.", "2. Close it."], id="list numbers"),
        pytest.param('He said "stop." Then he left.', ['He said "stop."', "Then he left."], id="closing quote"),
        pytest.param("It is safe (see below.) Go on.", ["It is safe (see below.)", "Go on."], id="closing bracket"),
        pytest.param("First line\n\n- second line\n", ["First line", "- second line"], id="lines end sentences"),
        pytest.param("See docs/log.md or example.com now.", 1, id="full stops inside words"),
        pytest.param("清洗滤网。然后晾干！好吗？", ["清洗滤网。", "然后晾干！", "好吗？"], id="Chinese"),
        pytest.param("One sentence without an end", 1, id="unfinished"),
        pytest.param(" \n ", [], id="blank"),
        pytest.param("...", ["..."], id="only marks"),
    ],
)
def test_split_sentences(text: str, sentences: list[str] | int) -> None:
    assert split_sentences(text) == ([text] if sentences == 1 else sentences)


def test_a_sentence_ends_once_the_next_character_shows_it() -> None:
    stream = SentenceStream()
    assert stream.feed("It is 3.") == [Cut("It is 3.", ends=False)]
    assert stream.feed("5 bar.") == [Cut("5 bar.", ends=False)]
    assert stream.feed(" So") == [Cut("", ends=True), Cut(" So", ends=False)]


@pytest.mark.parametrize(
    ("text", "is_open"),
    [
        pytest.param("", False, id="nothing"),
        pytest.param("Done.\n \n", False, id="blanks behind a sentence"),
        pytest.param("Done. And", True, id="a begun sentence"),
        pytest.param("Done.", True, id="a sentence whose end is not sure yet"),
    ],
)
def test_finish_tells_whether_a_sentence_is_open(text: str, is_open: bool) -> None:
    assert cuts_of([text])[1] is is_open
