"""How much two answers say the same: token F1, on any tokens and on words as the SQuAD evaluation counts them.

F1 is the harmonic mean of precision and recall of tokens as multisets: the order does not count. The normalisation of
words is that of the SQuAD evaluation script (Rajpurkar et al., EMNLP 2016).
"""

import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def agreement(one: Sequence[Hashable], other: Sequence[Hashable]) -> float:
    """The harmonic mean of precision and recall of the tokens of two answers, 0..1; 1 when both are empty."""
    if not one or not other:
        return float(len(one) == len(other))
    common = sum((Counter(one) & Counter(other)).values())
    return 2 * common / (len(one) + len(other))


def squad_normalised(text: str) -> str:
    """As the SQuAD evaluation does it: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f1(said: str, answers: Sequence[str]) -> float:
    """The best agreement of the words of `said` with those of an answer, after SQuAD normalisation; 0 of no answers."""
    words = squad_normalised(said).split()
    return max((agreement(words, squad_normalised(answer).split()) for answer in answers), default=0.0)
