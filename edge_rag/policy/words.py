"""Words of a question and of a text: what BM25 is asked for and what citations are aligned on."""

import re

# Function words carry no evidence and make a BM25 query walk most of the index. Only English has a list: in other
# languages BM25's own weighting does the work, a little slower.
STOP_WORDS = frozenset(
    """a about above after again all also am an and any are as at be because been before being below between both but
    by can could did do does doing down during each few for from further had has have having he her here hers him his
    how i if in into is it its itself just may me might more most must my no nor not of off on once only or other our
    out over own please same shall she should so some such than that the their them then there these they this those
    through to too under until up us very was we were what when where which while who whom whose why will with would
    you your""".split()
)
MAX_QUERY_WORDS = 32

_WORD = re.compile(r"\w+(?:[-./]\w+)*")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def content_words(text: str) -> list[str]:
    """Lower-case words without function words, in order, repeated ones kept. Compounds stay whole (KS-4410, 0.5)."""
    return [word for word in _WORD.findall(text.lower()) if word not in STOP_WORDS]


def numbers(text: str) -> frozenset[str]:
    """Numbers as written, thousands separators dropped: '1,200' and '1200' are one number."""
    return frozenset(re.sub(r",(?=\d{3}\b)", "", number) for number in _NUMBER.findall(text))


def stem(word: str) -> str:
    """A crude English stem, so that 'filters' meets 'filter' and 'cleaned' meets 'cleaning'. Short words are kept."""
    if not word.isalpha() or word.endswith("ss"):
        return word
    for ending in ("ations", "ation", "ings", "ing", "edly", "ed", "ies", "es", "s", "ly", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)] + ("y" if ending == "ies" else "")
    return word


def fts_query(question: str) -> str:
    """An FTS5 query that matches any content word of `question`; '' when it has no word at all.

    Each word is quoted, so operators and punctuation in a question are plain text. A question of function words only
    ('who is who?') is searched as it stands.
    """
    words = content_words(question) or _WORD.findall(question.lower())
    unique = list(dict.fromkeys(words))[:MAX_QUERY_WORDS]
    return " OR ".join('"' + word.replace('"', '""') + '"' for word in unique)
