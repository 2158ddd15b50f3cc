"""Which passage supports a sentence of the answer.

The prompt cannot ask for citations (passages carry no number in it, see `policy.prompt`), and small models cite badly
anyway. So a finished sentence is aligned with the passages that were in its prompt: by words (what share of the
sentence's content words, weighted by how few passages hold them, stands in the passage) and by meaning (cosine of the
embeddings). A number that neither the question nor the passage holds
refutes the passage. Nothing above the floor: no citation.
"""

import math
import re
from collections.abc import Sequence

from msgspec import Struct

from edge_rag.policy.words import content_words, numbers, stem

WORD_SHARE = 0.7  # of the score; the rest is cosine. Measured on the bundled questions (docs/log.md).
QUESTION_WEIGHT = 0.3  # a word of the question is weaker evidence than one that only the answer has

_LIST_NUMBER = re.compile(r"^\s*\(?\d+[.)]\s")  # counts the items of a list; no claim that a passage could refute


class Evidence(Struct, frozen=True):
    """A passage prepared for alignment."""

    stems: frozenset[str]
    numbers: frozenset[str]


def prepare(text: str) -> Evidence:
    """Read a passage once, for all sentences of an answer."""
    return Evidence(frozenset(_stems(text)), numbers(text))


def best_support(
    sentence: str, question: str, evidence: Sequence[Evidence], similarities: Sequence[float]
) -> tuple[int, float] | None:
    """The place of the passage that supports `sentence` best and its score in [0, 1]; None when there is none.

    `similarities` are cosines of the sentence (with its question) to each passage. Sentences without a word that could
    be evidence ('I cannot find it.') have no support. Ties go to the higher-ranked passage.
    """
    if not evidence or not _stems(sentence):
        return None
    weights = _weights(sentence, question, evidence)
    total = sum(weights.values())
    wanted = numbers(_LIST_NUMBER.sub("", sentence)) - numbers(question)
    scores = [
        _score(weights, total, wanted, passage, similarity)
        for passage, similarity in zip(evidence, similarities, strict=True)
    ]
    best = max(range(len(scores)), key=lambda place: (scores[place], -place))
    return best, scores[best]


def _score(
    weights: dict[str, float], total: float, wanted: frozenset[str], passage: Evidence, similarity: float
) -> float:
    if not wanted <= passage.numbers:
        return 0.0
    found = sum(weight for word, weight in weights.items() if word in passage.stems)
    return WORD_SHARE * found / total + (1 - WORD_SHARE) * max(0.0, min(1.0, similarity))


def _weights(sentence: str, question: str, evidence: Sequence[Evidence]) -> dict[str, float]:
    """Words of the sentence and, weaker, of the question, each weighted by its rarity among the passages."""
    asked = frozenset(_stems(question))
    weights = dict.fromkeys(asked, QUESTION_WEIGHT)
    weights |= {word: 1.0 for word in _stems(sentence) if word not in asked}
    return {word: weight * _rarity(word, evidence) for word, weight in weights.items()}


def _rarity(word: str, evidence: Sequence[Evidence]) -> float:
    holders = sum(word in passage.stems for passage in evidence)
    return math.log(1 + (len(evidence) + 1) / (holders + 0.5))


def _stems(text: str) -> list[str]:
    return [stem(word) for word in content_words(text)]
