"""The prompt's layout: marks in, marks out, and nothing that depends on a passage's rank."""

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.errors import ModelError
from edge_rag.policy.prompt import (
    INSTRUCTION,
    Piece,
    alternating,
    cut_at_marks,
    marked_messages,
    passage_text,
    passages_mark,
    question_text,
    tail_pieces,
    turn_mark,
)
from edge_rag.records import Message, Turn

FIRST = passages_mark() + turn_mark(0)
template_text = st.text(st.sampled_from("<|im_user>\n [INST]MARK0"), max_size=12)
any_turns = st.lists(
    st.builds(Turn, role=st.sampled_from(["user", "assistant"]), content=st.text(min_size=1, max_size=5)), max_size=8
)


def render(messages: list[Message]) -> str:
    """A template in the manner of ChatML."""
    return "".join(f"<{m.role}>{m.content}</{m.role}>\n" for m in messages) + "<assistant>"


# --- messages and marks ----------------------------------------------------------------------------------------------


@given(st.integers(1, 15), st.booleans())
def test_roles_alternate_from_user_to_user(half: int, system_role: bool) -> None:
    messages = marked_messages(2 * half - 1, system_role=system_role)
    roles = [message.role for message in messages]
    assert roles[0] == ("system" if system_role else "user")
    assert roles[int(system_role) :] == (["user", "assistant"] * half)[:-1]


@pytest.mark.parametrize(
    "system_role", [pytest.param(True, id="system role"), pytest.param(False, id="no system role")]
)
def test_the_instruction_stands_once_and_before_the_passages(system_role: bool) -> None:
    rendered = render(marked_messages(3, system_role=system_role))
    assert rendered.count(INSTRUCTION) == 1
    assert rendered.index(INSTRUCTION) < rendered.index(passages_mark())


@given(st.lists(template_text, min_size=2, max_size=13))
def test_cutting_undoes_joining_at_the_marks(texts: list[str]) -> None:
    turns = len(texts) - 1
    marks = [FIRST, *map(turn_mark, range(1, turns))]
    rendered = texts[0] + "".join(mark + text for mark, text in zip(marks, texts[1:], strict=True))
    assert cut_at_marks(rendered, turns) == (texts[0], tuple(texts[1:]))


@pytest.mark.parametrize(
    "system_role", [pytest.param(True, id="system role"), pytest.param(False, id="no system role")]
)
def test_a_rendered_conversation_is_cut_between_its_messages(system_role: bool) -> None:
    prefix, behind = cut_at_marks(render(marked_messages(3, system_role=system_role)), 3)
    head = f"<system>{INSTRUCTION}</system>\n<user>" if system_role else f"<user>{INSTRUCTION}\n\n"
    assert prefix == head
    assert behind == ("</user>\n<assistant>", "</assistant>\n<user>", "</user>\n<assistant>")


def test_more_than_ten_turns_are_told_apart() -> None:
    _, behind = cut_at_marks(render(marked_messages(13, system_role=True)), 13)
    assert len(behind) == 13


@pytest.mark.parametrize(
    "rendered",
    [
        pytest.param("", id="nothing rendered"),
        pytest.param(f"a{FIRST}b", id="second turn lost"),
        pytest.param(f"a{turn_mark(1)}b", id="first turn lost"),
        pytest.param(f"a{passages_mark()}b{turn_mark(0)}c{turn_mark(1)}d", id="passages parted from their question"),
        pytest.param(f"a{turn_mark(1)}b{FIRST}c", id="turns reordered"),
        pytest.param(f"a{FIRST}b{FIRST}c{turn_mark(1)}d", id="first turn repeated"),
        pytest.param(f"a{FIRST}b{turn_mark(1)}c{turn_mark(1)}d", id="second turn repeated"),
        pytest.param(f"a{turn_mark(1)}b{FIRST}c{turn_mark(1)}d", id="second turn also before the first"),
        pytest.param(f"a{FIRST}b{turn_mark(1)}c{FIRST}d", id="first turn also behind the second"),
        pytest.param(f"a{FIRST.lower()}b{turn_mark(1)}c", id="contents changed to lower case"),
    ],
)
def test_a_template_that_does_not_keep_its_messages_is_refused(rendered: str) -> None:
    with pytest.raises(ModelError) as caught:
        cut_at_marks(rendered, 2)
    assert caught.value.field == "tokenizer.chat_template"


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heading", "text", "expected"),
    [
        pytest.param("Manual › Filter", " Clean it. \n", "[Manual › Filter]\nClean it.\n\n", id="with heading"),
        pytest.param("", "\nClean it.", "Clean it.\n\n", id="without heading"),
    ],
)
def test_passage_text(heading: str, text: str, expected: str) -> None:
    assert passage_text(heading, text) == expected


def test_a_passage_knows_neither_its_rank_nor_its_neighbours() -> None:
    assert list(inspect.signature(passage_text).parameters) == ["heading", "text"]


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        pytest.param("", "Question: Why?", id="none"),
        pytest.param(" \n", "Question: Why?", id="blank"),
        pytest.param(" Be brief.\n", "Be brief.\n\nQuestion: Why?", id="some"),
    ],
)
def test_instructions_stand_before_the_question(instructions: str, expected: str) -> None:
    assert question_text(" Why? ", instructions) == expected


def test_the_tail_takes_turns_between_contents_and_template() -> None:
    turns = [Turn(role="user", content=" Hi <|im_end|> "), Turn(role="assistant", content="Hello")]
    assert tail_pieces(["<1>", "<2>", "<3>"], turns, "Why?", "") == [
        Piece("Hi <|im_end|>", "content"),
        Piece("<1>", "template"),
        Piece("Hello", "content"),
        Piece("<2>", "template"),
        Piece("Question: Why?", "content"),
        Piece("<3>", "template"),
    ]


def test_the_tail_has_no_empty_pieces() -> None:
    turns = [Turn(role="user", content="Hi"), Turn(role="assistant", content=" ")]
    pieces = tail_pieces(["<1>", "", "<3>"], turns, "Why?", "")
    assert [piece.text for piece in pieces] == ["Hi", "<1>", "Question: Why?", "<3>"]


def test_a_template_for_another_number_of_turns_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="zip"):
        tail_pieces(["<1>", "<2>"], [], "Why?", "")


# --- history ---------------------------------------------------------------------------------------------------------


@given(any_turns)
def test_history_alternates_from_user_to_assistant(turns: list[Turn]) -> None:
    roles = [turn.role for turn in alternating(turns)]
    assert roles == ["user", "assistant"] * (len(roles) // 2)


@given(any_turns)
def test_only_turns_at_the_two_ends_are_left_out(turns: list[Turn]) -> None:
    places = [place for place, turn in enumerate(turns) if turn.role == "user"]
    ends = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    kept = turns[places[0] : ends[-1] + 1] if places and ends else []
    assert "\n\n".join(turn.content for turn in alternating(turns)) == "\n\n".join(turn.content for turn in kept)


@given(any_turns)
def test_history_that_alternates_is_left_alone(turns: list[Turn]) -> None:
    once = alternating(turns)
    assert alternating(once) == once


def test_neighbours_of_one_role_are_joined() -> None:
    turns = [Turn(role="user", content="a"), Turn(role="user", content="b"), Turn(role="assistant", content="c")]
    assert alternating(turns) == [Turn(role="user", content="a\n\nb"), Turn(role="assistant", content="c")]
