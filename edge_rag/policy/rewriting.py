"""When a question of a conversation cannot be searched for as it stands, and what the model is asked to make of it."""

import re
from collections.abc import Sequence

from edge_rag.policy.words import content_words, stem
from edge_rag.records import Turn

_LEANING_WORDS = frozenset(
    "it its they them their he him his she her this that these those there one ones same".split()
)
_LEANING_STARTS = ("and ", "what about", "how about", "but ", "or ", "why?", "how?", "then ", "also ")
_SHORT = 3  # content words
_LONGEST = 400  # characters of a rewritten question

REQUEST = (
    "Rewrite the last question so that it can be understood without the conversation: replace words such as "
    '"it" or "that" by what they stand for. Reply with the rewritten question only.\nLast question: '
)


def leans_on_history(question: str) -> bool:
    """Whether `question` probably refers to earlier turns: a pronoun, a connecting start, or hardly any content."""
    lower = question.lower().strip()
    words = re.findall(r"\w+", lower)
    return (
        lower.startswith(_LEANING_STARTS)
        or any(word in _LEANING_WORDS for word in words)
        or len(content_words(question)) < _SHORT
    )


def accepted(rewritten: str, question: str, turns: Sequence[Turn]) -> str:
    """The search query: `rewritten` when it is usable, else the last question of the user and this one together.

    Usable: one line, not too long, made of words that the conversation holds, and still about what was asked: it keeps
    most of the question's own content words and is no earlier turn. Small models like to answer instead of rewriting.
    """
    line = rewritten.strip().splitlines()[0].strip().strip('"') if rewritten.strip() else ""
    said = {stem(word) for text in [question, *(turn.content for turn in turns)] for word in content_words(text)}
    words = [stem(word) for word in content_words(line)]
    known = sum(word in said for word in words)
    asked_for = {stem(word) for word in content_words(question)} - {stem(word) for word in _LEANING_WORDS}
    kept = len(asked_for & set(words))
    repeats = any(line in turn.content for turn in turns)
    if words and not repeats and len(line) <= _LONGEST and known >= 0.7 * len(words) and 2 * kept >= len(asked_for) - 1:
        return line
    asked = [turn.content for turn in turns if turn.role == "user"]
    return f"{asked[-1]} {question}" if asked else question
