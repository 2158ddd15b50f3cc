"""When a question needs the conversation, and which rewriting is believed."""

import pytest

from edge_rag.policy.rewriting import accepted, leans_on_history
from edge_rag.records import Turn

HISTORY = [
    Turn(role="user", content="How do I clean the filter of the KS-4410?"),
    Turn(role="assistant", content="Rinse the filter with warm water every month."),
]
QUESTION = "And how often?"
FALLBACK = f"{HISTORY[0].content} {QUESTION}"


@pytest.mark.parametrize(
    "question",
    [
        pytest.param("How often does it need new filters installed?", id="pronoun"),
        pytest.param("Describe the pump, its valve and price range", id="possessive"),
        pytest.param("Does the pump manual say anything about that?", id="pronoun before the question mark"),
        pytest.param("Compare the pump, valve and filter. Which of these?", id="demonstrative"),
        pytest.param("Describe the pump manual and explain it.", id="pronoun before a full stop"),
        pytest.param("Does the pump manual say why it's leaking?", id="contracted pronoun"),
        pytest.param("What about the pump warranty period abroad?", id="what about"),
        pytest.param("And the pump warranty period abroad?", id="and"),
        pytest.param("  but the pump warranty period expired?", id="but, behind blanks"),
        pytest.param("Why?", id="one word"),
        pytest.param("What is the warranty?", id="hardly any content"),
        pytest.param("", id="nothing"),
    ],
)
def test_leans_on_history(question: str) -> None:
    assert leans_on_history(question)


@pytest.mark.parametrize(
    "question",
    [
        pytest.param("How often must the filter be cleaned?", id="complete"),
        pytest.param("Which pressure does the KS-4410 pump need?", id="names its thing"),
        pytest.param("Android phones: which versions are supported?", id="begins like a connecting word"),
        pytest.param("Who repairs kitchen items under warranty?", id="holds a pronoun inside a word"),
    ],
)
def test_stands_alone(question: str) -> None:
    assert not leans_on_history(question)


@pytest.mark.parametrize(
    ("rewritten", "query"),
    [
        pytest.param("How often clean the filter?", "How often clean the filter?", id="as it came"),
        pytest.param(
            '\n "How often should the KS-4410 filter be cleaned?" \nExplanation: …',
            "How often should the KS-4410 filter be cleaned?",
            id="first line without quotes",
        ),
        pytest.param(
            "How frequently cleaning filters of KS-4410?",
            "How frequently cleaning filters of KS-4410?",
            id="most words are known, in other forms",
        ),
    ],
)
def test_a_rewritten_question_is_used(rewritten: str, query: str) -> None:
    assert accepted(rewritten, QUESTION, HISTORY) == query


@pytest.mark.parametrize(
    "rewritten",
    [
        pytest.param("Most manufacturers recommend three months.", id="the model answered instead"),
        pytest.param("How often clean dishwasher baskets thoroughly?", id="most words are new"),
        pytest.param("", id="nothing"),
        pytest.param(" \n ", id="blank"),
        pytest.param('""', id="empty quotes"),
        pytest.param("What is it?", id="no content words"),
        pytest.param("clean the filter " * 30, id="too long"),
    ],
)
def test_otherwise_the_last_question_and_this_one_are_searched_together(rewritten: str) -> None:
    assert accepted(rewritten, QUESTION, HISTORY) == FALLBACK


def test_without_earlier_questions_the_question_is_searched_alone() -> None:
    assert accepted("", QUESTION, []) == QUESTION
    assert accepted("", QUESTION, HISTORY[1:]) == QUESTION
