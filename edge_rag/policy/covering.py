"""Which adapter answers a question: one at most, the one that covers most of what was retrieved.

LoRA-RAG's policy: merging adapters only loses, so passages that the chosen one does not cover stay in the prompt. An
adapter counts only when its exams say that it may be asked this question (`policy.reach`), and when it covers at least
a set share of the passages: below that, it would cost decoding speed and save little reading.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from edge_rag.records import Record, Route


class Offer(Record, frozen=True):
    """An adapter that may be asked: the chunks that it covers, its size, and whether it is in fast memory.

    `closeness` is the cosine to the nearest question that it was trained on, `gate` its F1 in the exam there (the mean
    of all when that one was not asked); `within` says whether its exam allows the question.
    """

    adapter: str
    members: frozenset[int]
    resident: bool = False
    bytes: int = 0
    closeness: float = 1.0
    gate: float = 1.0
    within: bool = True


class Chosen(Struct, frozen=True):
    """The adapter that answers ('' for none), and the retrieved chunks that it covers.

    `route` is how the router came to it, `contexts` [arms, d] what it saw of each of its arms.
    """

    adapter: str = ""
    covered: frozenset[int] = frozenset()
    route: Route | None = None
    contexts: npt.NDArray[np.float64] | None = None


NONE = Chosen()


def choose(chunks: Sequence[int], offers: Sequence[Offer], *, least: float) -> Chosen:
    """The adapter that covers most of the retrieved `chunks`, if that is at least the share `least` of them, and one.

    Of equals one that is in fast memory, then the one with fewer members (it knows them better), then by name.
    """
    best = max(offers, key=lambda offer: _rank(chunks, offer), default=None)
    if best is None:
        return NONE
    covered = best.members & frozenset(chunks)
    return Chosen(best.adapter, covered) if len(covered) >= max(1, least * len(chunks)) else NONE


def _rank(chunks: Sequence[int], offer: Offer) -> tuple[int, bool, int, str]:
    return len(offer.members & frozenset(chunks)), offer.resident, -len(offer.members), offer.adapter
