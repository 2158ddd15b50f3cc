"""Joining a dense and a word ranking into one.

Weighted reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009): score = Σ weight / (k + rank). Ranks, not
scores, are joined because cosine and BM25 have no common scale. The weights carry the names of OpenAI's
`hybrid_search`. The paper's k = 60 was chosen for lists of a thousand; for five passages a small k, which trusts the
first ranks more, measured better (docs/log.md).
"""

import math
from collections.abc import Sequence

from edge_rag.records import Passage


def reciprocal_rank_fusion(rankings: Sequence[tuple[float, Sequence[int]]], *, k: float) -> list[tuple[int, float]]:
    """Fuse (weight, ids best first) rankings into (id, score) pairs, best first; ties by id.

    Scores are divided by the best possible one, so an id that is first in every ranking has 1.0. A ranking of weight 0
    is not read. Sums are exact (fsum), so the order of the rankings does not matter and 1.0 is never passed.
    """
    counted = [(weight, ids) for weight, ids in rankings if weight > 0]
    best = math.fsum(weight / (k + 1) for weight, _ in counted)
    shares: dict[int, list[float]] = {}
    for weight, ids in counted:
        for rank, item in enumerate(ids, start=1):
            shares.setdefault(item, []).append(weight / (k + rank))
    scores = [(item, math.fsum(parts) / best) for item, parts in shares.items()]
    return sorted(scores, key=lambda pair: (-pair[1], pair[0]))


def in_document_order(passages: Sequence[Passage], *, margin: float) -> list[Passage]:
    """Let passages of one document whose scores are close swap places so that they follow the document.

    Close means within `margin` × the best score of all. Only places held by the same document are exchanged, so a
    passage overtakes none of its document that is better by more than that. Of two documents one passage may rise and
    the other fall: those overtake each other by twice as much at most.
    """
    if not passages:
        return []
    slack = margin * max(passage.score for passage in passages)
    ordered = list(passages)
    for group in _close_groups(passages, slack):
        members = sorted((passages[place] for place in group), key=lambda passage: passage.ordinal)
        for place, passage in zip(group, members, strict=True):
            ordered[place] = passage
    return ordered


def _close_groups(passages: Sequence[Passage], slack: float) -> list[list[int]]:
    """Places of each document, cut wherever the score has fallen by more than `slack` since the group's first."""
    groups: list[list[int]] = []
    current: dict[int, list[int]] = {}
    for place, passage in enumerate(passages):
        group = current.get(passage.document_id)
        if group is None or passages[group[0]].score - passage.score > slack:
            group = current[passage.document_id] = []
            groups.append(group)
        group.append(place)
    return groups
