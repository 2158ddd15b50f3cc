"""Made-up traffic to try eviction policies on: which passages each question needs, and what a tier makes of it.

Popularity follows Zipf's law, as web requests do (Breslau et al., INFOCOM 1999: exponents .64 to .83); what people ask
of their own documents may be more or less even, so benchmarks use several exponents, and a change half-way.
"""

import itertools
import random
from collections.abc import Sequence

from msgspec import Struct

from edge_rag.policy.eviction import Entry, Rank, Tier

Trace = list[list[int]]


class Replay(Struct, frozen=True):
    """Shares (0..1) of what was asked for: requests, bytes and seconds served from the tier; requests written to it."""

    hits: float
    bytes: float
    seconds: float
    writes: float


def zipf(items: int, exponent: float, length: int, seed: int) -> list[int]:
    """`length` independent draws of 0..items - 1, where item i has a chance in proportion to 1 / (i + 1)^exponent."""
    weights = list(itertools.accumulate((rank + 1) ** -exponent for rank in range(items)))
    return random.Random(seed).choices(range(items), cum_weights=weights, k=length)


def questions(draws: Sequence[int], passages: int) -> Trace:
    """Draws, in order, as questions that need `passages` different ones each; a repetition within one is left out."""
    trace: Trace = []
    asked: dict[int, None] = {}
    for item in draws:
        asked[item] = None
        if len(asked) == passages:
            trace.append(list(asked))
            asked = {}
    return trace


def drifted(trace: Trace, items: int, seed: int) -> Trace:
    """The trace with another popularity from its middle on: the items there are renamed at random."""
    names = list(range(items))
    random.Random(seed).shuffle(names)
    middle = len(trace) // 2
    return trace[:middle] + [[names[item] for item in asked] for asked in trace[middle:]]


def replay(trace: Trace, sizes: Sequence[int], seconds: Sequence[float], capacity: int, rank: Rank) -> Replay:
    """Serve the questions with a tier as the runtime would: hits are used, then misses are computed and offered.

    `sizes` and `seconds` are each item's bytes and what a hit on it saves; `capacity` is in bytes.
    """
    tier = Tier(capacity, rank)
    hits: list[int] = []
    asked = list(itertools.chain.from_iterable(trace))
    writes = 0
    for items in trace:
        found = [item for item in items if str(item) in tier]
        hits += found
        for item in found:
            tier.use(str(item))
        keep = {str(item) for item in items}
        for item in (item for item in items if item not in found):
            writes += tier.offer(Entry(str(item), sizes[item], seconds[item]), keep=keep).admitted
    return Replay(
        hits=len(hits) / len(asked),
        bytes=sum(sizes[item] for item in hits) / sum(sizes[item] for item in asked),
        seconds=sum(seconds[item] for item in hits) / sum(seconds[item] for item in asked),
        writes=writes / len(asked),
    )
