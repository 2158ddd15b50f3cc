"""Where the KV of a prompt's passages is, and how long somebody would wait for it, as the machine has been measured."""

from collections.abc import Callable, Sequence

from edge_rag.policy.assembly import Candidate, plan_passages, predicted
from edge_rag.policy.costs import Costs
from edge_rag.runtime.kv_cache import KVCache
from edge_rag.runtime.prompting import Prompt


def candidates(prompt: Prompt, keys: Sequence[str], cache: KVCache) -> list[Candidate]:
    """The prompt's passages, whose keys are the first of these, and where their KV is."""
    chunks = prompt.chunks or (0,) * len(prompt.passages)
    return [
        Candidate(chunk_id, len(tokens), *cache.where(key))
        for chunk_id, tokens, key in zip(chunks, prompt.passages, keys, strict=True)
    ]


def waits(prompt: Prompt, cache: KVCache | None, costs: Costs, link: int) -> Callable[[frozenset[int]], float]:
    """Predicts the seconds of putting the prompt together without the passages of some chunks.

    They come from `cache`, with so many `link` tokens decoded again; without one they are all read.
    """
    if cache is None:
        sizes = dict(zip(prompt.chunks, map(len, prompt.passages), strict=True))
        return lambda without: costs.prefill_time(sum(size for chunk, size in sizes.items() if chunk not in without))
    found = candidates(prompt, cache.keys(prompt)[:-1], cache)

    def wait(without: frozenset[int]) -> float:
        read = [each for each in found if each.chunk_id not in without]
        return predicted(read, plan_passages(read, splicing=True, link=link, costs=costs), costs)

    return wait
