"""How each passage of a prompt gets its KV: exact, spliced or recomputed, whichever is predicted to be sooner.

A passage's KV is kept as it is directly behind the prefix. In the first place it is exact there; at any other place it
is moved by turning its keys, and its first `link` tokens are decoded again, so that it has seen what stands before it
(LegoLink, arXiv 2410.15332). A passage without kept KV is computed behind the prefix too, so that it is kept for the
next question, unless loading would not pay on this machine: then it is recomputed in place, like plain prefill.
"""

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from edge_rag.policy.costs import Costs
from edge_rag.records import KVCounters, KVSource, PassagePlan


class Candidate(Struct, frozen=True):
    """A passage of the prompt and where its KV is; `bytes` is what must be read when that is the SSD."""

    chunk_id: int
    tokens: int
    source: KVSource
    bytes: int = 0


def plan_passages(
    candidates: Sequence[Candidate], *, splicing: bool, link: int, costs: Costs, behind_prefix: bool = True
) -> tuple[PassagePlan, ...]:
    """Decide for each passage; `behind_prefix` says that the first one stands directly behind the prefix.

    With `splicing` off only that one can be loaded. `link` is the number of tokens decoded again at each seam.
    """
    exact = [behind_prefix and place == 0 for place in range(len(candidates))]
    plans = [
        _exact(candidate, costs) if is_exact else _spliced(candidate, link if splicing else candidate.tokens, costs)
        for candidate, is_exact in zip(candidates, exact, strict=True)
    ]
    saved = sum(
        _gain(candidate, plan.link, costs)
        for candidate, plan in zip(candidates, plans, strict=True)
        if plan.how == "splice"
    )
    if saved >= (costs.step if link else 0.0):  # seams take one more decode
        return tuple(plans)
    return tuple(
        _recomputed(candidate) if plan.how == "splice" else plan
        for candidate, plan in zip(candidates, plans, strict=True)
    )


def predicted(candidates: Sequence[Candidate], plans: Sequence[PassagePlan], costs: Costs) -> float:
    """Seconds until passages that come so are in their places."""
    seconds = 0.0
    for candidate, plan in zip(candidates, plans, strict=True):
        kept = plan.how != "recompute" and candidate.source != "none"
        seconds += costs.prefill_time(plan.link if kept else plan.tokens)
        seconds += costs.load_time(plan.tokens, candidate.bytes) if kept else 0.0
    return seconds + (costs.step if any(plan.link for plan in plans) else 0.0)


def counted(plans: Sequence[PassagePlan], costs: Costs) -> KVCounters:
    """What has become of a prompt's passages, and the seconds that their KV saved."""
    sources = [plan.source for plan in plans]
    skipped = sum(plan.skipped for plan in plans)
    loaded = sum(plan.tokens for plan in plans if plan.source not in ("none", "new"))
    return KVCounters(
        live=sources.count("live"),
        state=sources.count("state"),
        ram=sources.count("ram"),
        ssd=sources.count("ssd"),
        new=sources.count("new"),
        recomputed=sources.count("none"),
        linked_tokens=sum(plan.link for plan in plans),
        skipped_tokens=skipped,
        seconds_saved=costs.prefill_time(skipped) - costs.load_time(loaded, 0),
    )


def _exact(candidate: Candidate, costs: Costs) -> PassagePlan:
    return _kept(candidate, "exact", 0) if _gain(candidate, 0, costs) > 0 else _recomputed(candidate)


def _spliced(candidate: Candidate, link: int, costs: Costs) -> PassagePlan:
    return _kept(candidate, "splice", link) if _gain(candidate, link, costs) > 0 else _recomputed(candidate)


def _gain(candidate: Candidate, link: int, costs: Costs) -> float:
    """Seconds that loading saves; for a passage without KV: that it will save the next time."""
    prefill = costs.prefill_time(max(0, candidate.tokens - link))
    return prefill - costs.load_time(candidate.tokens, candidate.bytes)


def _kept(candidate: Candidate, how: Literal["exact", "splice"], link: int) -> PassagePlan:
    source: KVSource = "new" if candidate.source == "none" else candidate.source
    return PassagePlan(chunk_id=candidate.chunk_id, tokens=candidate.tokens, how=how, source=source, link=link)


def _recomputed(candidate: Candidate) -> PassagePlan:
    return PassagePlan(chunk_id=candidate.chunk_id, tokens=candidate.tokens)
