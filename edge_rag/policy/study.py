"""Questions that the model writes about a passage: read out of its text, cleaned, told apart; and what is an answer.

Small models number their lists or not, quote, answer their own questions, repeat themselves with other words, and ask
about "the passage". What is learned from must be asked as a person asks who has no passage before him: each question
names what it asks about.
"""

import re
from collections.abc import Iterable, Sequence

from edge_rag.policy.words import content_words, stem

LEAST_WORDS, MOST_WORDS = 4, 40
LEAST_CONTENT = 2  # content words
ALIKE = 0.75  # Jaccard of two questions' words from which on they are one question

_MARKS = re.compile('[*`"“”]')
# What stands before a question in a list: bullets, numbers, "Question 3:".
_LEAD = re.compile(
    r"^(?:[\s_#>\-–•·'‘’]+|\(?\d{1,3}[.):]|\(?[a-z][.)]\s|(?:question|q)\s*\d{0,3}\s*[:.)])+", re.IGNORECASE
)
_QUESTION = re.compile(r"[^?]*\?")
_SENTENCE_END = re.compile(r"(?<=[^\s.]{4}[.])\s+|(?<=!)\s+|:\s+(?=[A-Z])")
_ABOUT_THE_TEXT = re.compile(
    r"\b(?:the|this|that|given|provided|following|above)\s+(?:\w+\s+)?(?:passage|text|paragraph|excerpt|article|"
    r"document|section|sentence|story|author|narrator|context|information)s?\b"
    r"|\b(?:mentioned|described|listed|stated|given|provided|shown) (?:above|below|here|in it)\b",
    re.IGNORECASE,
)
_ASKING = frozenset("who whom whose what when where why which how".split())
_ASKING_FOR = frozenset("what which whose many much".split())  # the next word is what is asked for
_PRONOUNS = frozenset("he him his she her hers it its they them their theirs this these those that there".split())
_WORD = re.compile(r"\w+(?:[-./'’]\w+)*")

_NO_ANSWER = re.compile(
    r"\bi (?:(?:am|was) )?(?:cannot|can't|can not|could not|couldn't|do not|don't|unable to|not able to) \w+"
    r"|\b(?:cannot|can't|could not) be (?:found|determined|answered)\b|^(?:cannot|can't|unable)\b"
    r"|\b(?:passages?|texts?|documents?|context|article|information) (?:\w+ ){0,3}(?:do|does|did)(?: not|n't) \w+"
    r"|\b(?:is|are|was|were)(?: not|n't) (?:\w+ )?(?:mentioned|provided|specified|stated)\b"
    r"|\bno (?:\w+ )?(?:information|mention)\b|\bnot enough information\b|\bas an ai\b|\bsorry\b"
    r"|^(?:unknown|none|n/a|not (?:applicable|available))\W*$",
    re.IGNORECASE,
)
_HEAD = 200  # characters of an answer in which it would say that it is none


def parse_questions(text: str) -> list[str]:
    """The usable questions in what a model wrote, in its order; duplicates are left in."""
    found = (clean(part) for line in text.splitlines() for part in _QUESTION.findall(line))
    return [question for question in found if is_usable(question)]


def clean(text: str) -> str:
    """A question without list marks, quotes, emphasis and whatever sentence stands before it; blanks are single."""
    line = " ".join(_MARKS.sub("", text).split()).replace(" ?", "?")
    return _LEAD.sub("", _SENTENCE_END.split(_LEAD.sub("", line))[-1])


def is_usable(question: str) -> bool:
    """Whether it can be asked without the passage: long enough, about something that it names, not about a text."""
    words = _WORD.findall(question)
    return (
        LEAST_WORDS <= len(words) <= MOST_WORDS
        and len(content_words(question)) >= LEAST_CONTENT
        and not _ABOUT_THE_TEXT.search(question)
        and not _points_away(words)
    )


def _points_away(words: Sequence[str]) -> bool:
    """Whether a pronoun comes before anything is named: "What year did he die?", where the year is what is asked for.

    A word in capitals names something wherever it stands.
    """
    if any(word[:1].isupper() for word in words[1:]):
        return False
    named = asked_for = False
    for word in (word.lower() for word in words):
        if word in _PRONOUNS:
            return not named
        asks = word in _ASKING_FOR
        named = named or (not asks and not asked_for and bool(content_words(word)))
        asked_for = asks
    return False


def distinct(questions: Iterable[str], known: Iterable[str] = ()) -> list[str]:
    """Those that are not asked before in other words, neither in `known` nor among themselves; the first ones stay.

    Compared by the Jaccard index of their stems, to which the question word belongs: when and where something happened
    are two questions.
    """
    asked = [_marks(question) for question in known]
    kept = []
    for question in questions:
        marks = _marks(question)
        if not any(_jaccard(marks, other) >= ALIKE for other in asked):
            asked.append(marks)
            kept.append(question)
    return kept


def _marks(question: str) -> frozenset[str]:
    asking = next((word for word in _WORD.findall(question.lower()) if word in _ASKING), "")
    return frozenset((asking, *(stem(word) for word in content_words(question))))


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


def answerable(answer: str) -> bool:
    """Whether a teacher's answer is one: not empty, and not saying that there is none (in English)."""
    head = answer.strip().replace("’", "'")[:_HEAD]
    return any(char.isalnum() for char in head) and not _NO_ANSWER.search(head)
