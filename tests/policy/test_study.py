"""Reading questions out of what small models write, telling them apart, and telling answers from none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.policy.study import answerable, clean, distinct, is_usable, parse_questions

OILED = "How often must the pump be oiled?"


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(OILED, id="as it is"),
        pytest.param(f"12. {OILED}", id="number"),
        pytest.param(f"(3) {OILED}", id="number in brackets"),
        pytest.param(f"  - {OILED}", id="bullet"),
        pytest.param(f"• “{OILED}”", id="quoted"),
        pytest.param(f"**Question 4:** {OILED}", id="heading in bold"),
        pytest.param(f"1. **{OILED}**", id="bold"),
        pytest.param(f"Q: {OILED} A: Every 12 weeks.", id="with its answer"),
        pytest.param(f"b) {OILED} (Every 12 weeks)", id="letter"),
        pytest.param(f"Sure! {OILED}", id="after a sentence"),
        pytest.param(f"Here is one: {OILED}", id="after a colon"),
        pytest.param("3. How often   must the pump be oiled ?", id="blanks"),
    ],
)
def test_a_question_is_found_in_its_line(line: str) -> None:
    assert parse_questions(line) == [OILED]


def test_a_list_is_read_in_order_without_what_is_no_question() -> None:
    text = f"""Here are 3 questions about the pump:

1. {OILED}
   Answer: every 12 weeks.
2. Who oils the pump of the Marlin unit? Why does the pump hum all night?
3. The pump is oiled by
4. Why?
"""
    assert parse_questions(text) == [
        OILED,
        "Who oils the pump of the Marlin unit?",
        "Why does the pump hum all night?",
    ]


@pytest.mark.parametrize(
    "question",
    [
        pytest.param("What is the main topic of the passage?", id="passage"),
        pytest.param("According to this short text, who oiled the pump?", id="text with an adjective"),
        pytest.param("Which pumps are mentioned above and why?", id="above"),
        pytest.param("Why pump?", id="too short"),
        pytest.param("What is it that they have there?", id="without content"),
        pytest.param("What did he say about the pump?", id="nobody named"),
        pytest.param("What year did he die?", id="a year is asked for, not named"),
        pytest.param("How many pumps did they oil?", id="a number is asked for, not named"),
        pytest.param("How is it joined to the tank?", id="pronoun first"),
        pytest.param(" ".join(["How", *["pump"] * 45]) + "?", id="too long"),
        pytest.param("", id="empty"),
    ],
)
def test_what_cannot_be_asked_without_the_passage_is_dropped(question: str) -> None:
    assert not is_usable(question)


@pytest.mark.parametrize(
    "question",
    [
        pytest.param("How high above sea level is the tank?", id="above as a place"),
        pytest.param("What did Tesla say about his motor?", id="a name"),
        pytest.param("What does the pump do when it rattles?", id="named before the pronoun"),
        pytest.param("Which pump hums all night?", id="no pronoun"),
        pytest.param("What is the KS-4410 made of?", id="part number"),
    ],
)
def test_what_names_its_thing_is_kept(question: str) -> None:
    assert is_usable(question)


def test_other_words_for_one_question_are_one_question() -> None:
    asked = [
        OILED,
        "How often must pumps be oiled?",
        "Who must oil the pump?",
        "What is the tank capacity of unit 3?",
        "What is the capacity of the tank of unit 3?",
        "What is the tank capacity of unit 4?",
    ]
    assert distinct(asked) == [asked[0], asked[2], asked[3], asked[5]]
    assert distinct(asked, known=[asked[1], "Why does it hum?"]) == [asked[2], asked[3], asked[5]]


def test_when_and_where_are_two_questions() -> None:
    asked = ["When was Tesla born?", "Where was Tesla born?", "Was Tesla born?"]
    assert distinct(asked) == asked


@given(st.lists(st.text(max_size=60), max_size=6), st.text(max_size=120))
def test_any_text_gives_usable_questions_and_each_of_them_is_read_again_as_itself(lines: list[str], line: str) -> None:
    found = parse_questions("\n".join([*lines, line]))
    for question in found:
        assert question.endswith("?")
        assert is_usable(question)
        assert clean(question) == question
    kept = distinct(found)
    assert distinct(kept) == kept
    assert distinct(found, known=kept) == []


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " \n…",
        "I cannot find the answer in the passages.",
        "I'm sorry, but I can't tell.",
        "I’m sorry, I do not know.",
        "The passages do not contain the answer.",
        "The passage doesn't mention the weight of the pump.",
        "The weight is not mentioned.",
        "There is no information about it.",
        "As an AI language model, I have no opinion.",
        "Not enough information.",
        "Unknown.",
        "N/A",
    ],
)
def test_saying_that_there_is_no_answer_is_none(answer: str) -> None:
    assert not answerable(answer)


@pytest.mark.parametrize(
    "answer",
    ["Every 12 weeks.", "12", "No.", "It must not be bent.", "The unknown soldier", "Because nobody oiled the pump."],
)
def test_an_answer_is_one(answer: str) -> None:
    assert answerable(answer)


def test_doubt_at_the_end_of_a_long_answer_does_not_undo_it() -> None:
    assert answerable("The pump is oiled every 12 weeks. " * 8 + "The oil is not specified.")
