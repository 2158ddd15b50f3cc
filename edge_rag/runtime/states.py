"""States of whole prompts: kept when they have been answered, restored for the next one that begins in the same way."""

import logging

from msgspec import Struct

from edge_rag.errors import EngineError
from edge_rag.native import kv_blob
from edge_rag.native.llama import Context
from edge_rag.native.llama.geometry import Geometry
from edge_rag.policy.costs import Costs
from edge_rag.records import PassagePlan
from edge_rag.runtime.generations import taken
from edge_rag.runtime.kv_cache import KVCache
from edge_rag.runtime.kv_memory import Found, State
from edge_rag.runtime.prompting import Prompt
from edge_rag.runtime.splicing import Assembled

logger = logging.getLogger(__name__)


class Base(Struct, frozen=True):
    """What a prompt's sequence holds before anything is spliced: so many of its segments, up to `position`."""

    segments: int
    position: int
    passages: tuple[PassagePlan, ...] = ()
    computed: int = 0  # tokens of the prefix that nobody had kept


def ends(prompt: Prompt) -> tuple[int, ...]:
    """Where the segments of a prompt end: its passages, and its tail without the last token."""
    return (*prompt.seams[1:], len(prompt) - 1)


class States:
    """The states of one context's sequences in a cache. `geometry` None: states are opaque, restored whole or not."""

    def __init__(self, context: Context, cache: KVCache, geometry: Geometry | None) -> None:
        self._context = context
        self._cache = cache
        self._geometry = geometry

    def restored(self, found: Found, sequence: int) -> Base | None:
        """Restore a kept state as far as it serves; None when it is refused."""
        state, end = found.state, found.state.ends[found.segments - 1]
        buffer = state.buffer
        if self._geometry and found.segments < len(state.ends):  # no more cells than the prompt was given
            shape = self._geometry.shape
            buffer = kv_blob.cut(kv_blob.parse(buffer, shape), shape, 0, end).buffer
        try:
            self._context.restore(sequence, buffer)
        except EngineError as error:  # what may go wrong with something kept is a miss
            logger.warning("a kept state cannot be restored: %s", error)
            return None
        return Base(found.segments, end, taken(state.passages[: found.segments], "state"))

    def keep(self, prompt: Prompt, assembled: Assembled, sequence: int, costs: Costs) -> None:
        """Keep `sequence` as the state of this prompt, unless as much of it is kept already.

        An opaque one is that of its passages and nothing else.
        """
        cache, geometry = self._cache, self._geometry
        keys, places = cache.keys(prompt), ends(prompt)
        found = cache.state(keys, whole=geometry is None)
        if found and found.segments >= len(keys) - (geometry is None):
            return
        buffer = self._context.save(sequence)
        if geometry is None:
            seconds = costs.prefill_time(places[-2])
            cache.keep_state(keys[:-1], State(buffer, places[:-1], assembled.passages, seconds))
            return
        ordered = kv_blob.cut(kv_blob.parse(buffer, geometry.shape), geometry.shape, 0, len(prompt) - 1)
        seconds = _seconds_without(prompt, assembled, costs)
        cache.keep_state(keys, State(ordered.buffer, places, assembled.passages, seconds))


def _seconds_without(prompt: Prompt, assembled: Assembled, costs: Costs) -> float:
    """What the prompt would take from kept passages: they are likely to be kept for longer than its state."""
    linked = sum(plan.link for plan in assembled.passages)
    return costs.step + costs.prefill_time(linked + len(prompt.tail)) + costs.load_time(len(prompt), 0)
