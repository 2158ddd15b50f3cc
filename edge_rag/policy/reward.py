"""What an answer was worth, from 0 to 1: how far it says what the base model says with all passages in its prompt.

Short answers are compared by words, as exams do (`policy.agreement`). Two long ones may say the same with few words in
common, so those are compared by meaning, by the cosine of their embeddings. That tells subjects apart and does not see
a wrong number. A refusal agrees with a refusal and with nothing else: who answers where the passages hold no answer has
invented it.
"""

import re
from collections import deque
from collections.abc import Callable, Mapping
from types import MappingProxyType

from edge_rag.policy.agreement import f1, squad_normalised
from edge_rag.policy.study import answerable
from edge_rag.records import RewardSource

SHORT = 32  # words of a reference, up to which words are compared
# The cosine of long answers that is worth nothing. Measured with MiniLM (int8) on the 194 paragraphs of the demo manual
# with more than 33 words: two of them have .19 in the median, .43 and .54 at the 95th and 99th percentile; one and its
# first half .86, one and itself with all numbers wrong .99.
UNRELATED = 0.5
MINUTE = 60.0  # seconds

# What somebody said counts in full; what is found by comparing is a small model's guess.
WEIGHTS: Mapping[RewardSource, float] = MappingProxyType({"feedback": 1.0, "review": 0.5, "trial": 0.5})

_MARK = re.compile(r" ?\[\d{1,3}\]")

Cosine = Callable[[str, str], float]


def score(said: str, reference: str, cosine: Cosine) -> float | None:
    """How far an answer says what the reference says, 0..1; None when the reference says nothing at all.

    `cosine` is that of two texts' embeddings, -1..1; it is asked for long references only. Marks of citations count
    nowhere.
    """
    said, reference = (_MARK.sub("", text) for text in (said, reference))
    if not squad_normalised(reference):
        return None
    if not answerable(reference):
        return float(squad_normalised(said) != "" and not answerable(said))
    if not answerable(said):
        return 0.0
    if len(reference.split()) <= SHORT:
        return f1(said, [reference])
    return min(1.0, max(0.0, (cosine(said, reference) - UNRELATED) / (1 - UNRELATED)))


class Allowance:
    """A bound on floods: of what comes, at most `most` in any minute are taken. Not thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: deque[float] = deque()

    def take(self, now: float) -> bool:
        """Whether one more may be taken at `now`, in seconds of any clock; then it is.

        What seems to have been taken later than now was before a clock was set back, and is forgotten.
        """
        self._taken = deque(at for at in self._taken if now - MINUTE < at <= now)
        if len(self._taken) >= self._most:
            return False
        self._taken.append(now)
        return True
