"""What goes into the context: decided before any work is done, as a value that can be printed."""

from collections.abc import Sequence

from msgspec.structs import replace

from edge_rag.errors import InputError
from edge_rag.policy.covering import NONE, Chosen
from edge_rag.policy.prompt import LAYOUT_VERSION
from edge_rag.policy.words import content_words, stem
from edge_rag.records import Passage, PassagePlan, Plan

ENOUGH_WORDS = 0.5


def anything_found(query: str, passages: Sequence[Passage], *, min_similarity: float) -> bool:
    """Whether any passage is near enough to be read to the model; if not, asking it would invite an invention.

    Near by meaning (cosine of at least `min_similarity`), or by words: an error code or a part number means little to
    the embedding model, so a passage that holds half of the query's content words counts too.
    """
    asked = len({stem(word) for word in content_words(query)})
    return any(
        (passage.similarity is not None and passage.similarity >= min_similarity)
        or (asked > 0 and passage.matched_words >= ENOUGH_WORDS * asked)
        for passage in passages
    )


def make_plan(
    passages: Sequence[tuple[int, int]],
    *,
    prefix_tokens: int,
    tail_tokens: int,
    max_tokens: int,
    n_ctx: int,
    search_query: str = "",
    chosen: Chosen = NONE,
) -> Plan:
    """Fit (chunk id, tokens) passages, best first, between prefix and tail, leaving `max_tokens` for the answer.

    Those that the chosen adapter covers take no room.

    Passages that do not fit are dropped from the last; none is skipped in the middle, because a worse passage must
    not take the place of a better one. Raises InputError when the question alone does not fit.
    """
    room = n_ctx - prefix_tokens - tail_tokens - max_tokens
    if room < 0:
        raise InputError(
            f"the question needs {prefix_tokens + tail_tokens} tokens and its answer up to {max_tokens}, "
            f"but the context holds {n_ctx}",
            field="question",
            remedy="shorten the question, the instructions or max_tokens, or raise engine.n_ctx",
        )
    kept: list[PassagePlan] = []
    for chunk_id, tokens in passages:
        if chunk_id in chosen.covered:
            kept.append(PassagePlan(chunk_id=chunk_id, tokens=tokens, how="remembered"))
            continue
        if tokens > room:
            break
        room -= tokens
        kept.append(PassagePlan(chunk_id=chunk_id, tokens=tokens))
    return Plan(
        passages=tuple(kept),
        dropped=len(passages) - len(kept),
        prefix_tokens=prefix_tokens,
        tail_tokens=tail_tokens,
        search_query=search_query,
        layout=LAYOUT_VERSION,
        adapter=chosen.adapter if any(plan.how == "remembered" for plan in kept) else "",
        route=chosen.route,
    )


def as_served(plan: Plan, served: Sequence[PassagePlan]) -> Plan:
    """The plan with what became of the passages that stood in the prompt; nothing changes when none is told of."""
    told = iter(served or plan.read)
    return replace(plan, passages=tuple(each if each.how == "remembered" else next(told) for each in plan.passages))


def newest_turns(sizes: Sequence[int], *, budget: int) -> int:
    """How many of the newest turns fit `budget` tokens, in pairs of question and answer so that roles alternate."""
    kept, used = 0, 0
    for pair in range(len(sizes) // 2):
        end = len(sizes) - 2 * pair
        used += sizes[end - 1] + sizes[end - 2]
        if used > budget:
            break
        kept += 2
    return kept
