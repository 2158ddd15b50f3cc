"""Kept passages become the state of a prompt: moved to their places, and their seams mended.

    prefix · passage 1 (exact) · [link] passage 2 (moved) · … · question

Everything that is kept goes into ONE state, each passage turned to its positions, and that state into the main sequence
at once. Then, from left to right, each seam is mended: a sequence that shares all that stands before a passage decodes
its first `link` tokens again, and the main sequence takes these cells in place of the stale ones. Seams of neighbouring
passages are decoded in one batch, each seeing the passages before it with stale heads: against one by one that is as
good, as fast on two CPU cores and twice as fast on a GPU (docs/log.md). A passage to be recomputed between kept ones is
mended over its whole length.

Reading, checking, dequantising and turning run in threads, passage beside passage, while this thread computes those
that nobody has kept, and those whose file turned out to be unreadable.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Protocol

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from edge_rag.native import kv_blob
from edge_rag.native.kv_blob import Blob, Buffer
from edge_rag.native.kv_passage import move_into, part
from edge_rag.native.llama import Context, Run
from edge_rag.native.llama.geometry import Geometry
from edge_rag.policy.costs import Costs
from edge_rag.records import PassagePlan
from edge_rag.runtime.kv_cache import Computed, KVCache
from edge_rag.runtime.prompting import Prompt, Tokens

MAIN, WORK, SEAMS = 0, 1, 2  # sequences: the prompt, passages computed apart, the first of those that mend seams


class Decode(Protocol):
    """Decodes runs of tokens, unless the request is no longer wanted: then it raises Cancelled."""

    def __call__(self, runs: Sequence[Run]) -> None:
        """Decode `runs` in one batch."""


class Assembled(Struct, frozen=True):
    """The main sequence holds the first `position` tokens of the prompt; `cached` of them were not computed."""

    position: int
    cached: int
    passages: tuple[PassagePlan, ...]

    def without(self, tokens: int) -> "Assembled":
        """The same, but for so many tokens that had to be computed after all."""
        return replace(self, cached=self.cached - tokens)


class Splicer:
    """Splices one prompt. `costs` is brought up to date, `computed` collects what should be kept."""

    def __init__(
        self,
        context: Context,
        cache: KVCache,
        geometry: Geometry,
        loaders: Executor,
        decode: Decode,
        costs: Costs,
        prefix: Tokens,
        prefix_state: Buffer,
    ) -> None:
        self.costs = costs
        self.computed: list[Computed] = []
        self._context = context
        self._cache = cache
        self._geometry = geometry
        self._loaders = loaders
        self._decode = decode
        self._prefix = prefix
        self._prefix_state = prefix_state

    def splice(
        self, prompt: Prompt, keys: Sequence[str], plans: Sequence[PassagePlan], base: Blob, known: int
    ) -> tuple[int, list[PassagePlan]]:
        """Fill the main sequence with `base` (prefix and `known` passages) and the passages behind it.

        Returns the position that is reached, behind the last passage that is not to be recomputed, and the plans as
        they were carried out.
        """
        done = list(plans)
        reach = max([known, *(place + 1 for place, plan in enumerate(plans) if plan.how != "recompute")])
        kept = [place for place in range(known, reach) if plans[place].how != "recompute"]
        started = time.perf_counter()
        state, places = self._lay_out(prompt, base, kept)
        for place in self._fill(prompt, keys, plans, places):
            done[place] = replace(done[place], source="new")
        self._context.clear(WORK)
        self._context.restore(MAIN, state.buffer)
        if kept and all(done[place].source == "ram" for place in kept):  # nothing was waited for
            tokens = sum(done[place].tokens for place in kept)
            self.costs = self.costs.assembled(tokens, time.perf_counter() - started)
        self._mend(prompt, plans[:reach], known)
        return prompt.seams[reach], done

    def _lay_out(self, prompt: Prompt, base: Blob, kept: Sequence[int]) -> tuple[Blob, dict[int, Blob]]:
        """The state with its base written, and the places of the kept passages in it."""
        seams = prompt.seams
        ranges = [np.arange(seams[place], seams[place + 1]) for place in kept]
        state = kv_blob.new(self._geometry.shape, np.concatenate([base.positions, *ranges]))
        own = part(state, 0, base.tokens)
        own.keys[:], own.values[:] = base.keys, base.values
        places, start = {}, base.tokens
        for place, positions in zip(kept, ranges, strict=True):
            places[place] = part(state, start, start + len(positions))
            start += len(positions)
        return state, places

    def _fill(
        self, prompt: Prompt, keys: Sequence[str], plans: Sequence[PassagePlan], places: dict[int, Blob]
    ) -> list[int]:
        """Write all kept passages; which of them had to be computed although they were thought to be kept."""
        loads = {
            place: self._loaders.submit(self._load, keys[place], target)
            for place, target in places.items()
            if plans[place].source != "new"
        }
        for place in places.keys() - loads.keys():
            self._compute_into(places[place], prompt, keys, place)
        lost = [place for place, load in loads.items() if not load.result()]
        for place in lost:
            self._compute_into(places[place], prompt, keys, place)
        return lost

    def _load(self, key: str, target: Blob) -> bool:
        """In a thread: put a kept passage in its place; False when it cannot be had."""
        held = self._cache.fetch(key)
        return held is not None and self._cache.unpack(key, held, target)

    # --- passages that nobody has kept -------------------------------------------------------------------------------

    def _compute_into(self, target: Blob, prompt: Prompt, keys: Sequence[str], place: int) -> None:
        chunk_id = prompt.chunks[place] if prompt.chunks else None
        made = self.compute(prompt.passages[place], keys[place], chunk_id)
        move_into(target, made.state, self._geometry.shape, self._geometry.rope)

    def compute(self, tokens: Tokens, key: str, chunk_id: int | None) -> Computed:
        """The KV of a passage directly behind the prefix, in the work sequence."""
        started = time.perf_counter()
        start = len(self._prefix)
        if self._context.end(WORK) != start:
            self._context.restore(WORK, self._prefix_state)
        step = self._context.settings.n_batch
        for first in range(0, len(tokens), step):
            self._timed([Run(tokens[first : first + step], WORK, start + first)])
        whole = kv_blob.parse(self._context.save(WORK), self._geometry.shape)
        self._context.clear(WORK, start)
        state = kv_blob.cut(whole, self._geometry.shape, start, start + len(tokens))
        made = Computed(key, chunk_id, state, time.perf_counter() - started)
        self.computed.append(made)
        return made

    # --- seams -------------------------------------------------------------------------------------------------------

    def _mend(self, prompt: Prompt, plans: Sequence[PassagePlan], known: int) -> None:
        """Decode again what has not seen the passages before it, from left to right."""
        seams, wave = prompt.seams, list[Run]()
        for place in range(known, len(plans)):
            plan, tokens = plans[place], prompt.passages[place]
            if plan.how == "recompute":
                self._join(wave)
                self._recompute(tokens, seams[place])
                wave = []
            elif plan.link > self._context.settings.n_batch:
                self._join(wave)
                self._recompute(tokens[: plan.link], seams[place])
                wave = []
            elif plan.link:
                if not self._fits(wave, plan.link):
                    self._join(wave)
                    wave = []
                wave.append(Run(tokens[: plan.link], SEAMS + len(wave), seams[place]))
        self._join(wave)

    def _fits(self, wave: Sequence[Run], link: int) -> bool:
        settings = self._context.settings
        tokens = sum(len(run.tokens) for run in wave) + link
        return tokens <= settings.n_batch and SEAMS + len(wave) < settings.n_seq_max

    def _join(self, wave: Sequence[Run]) -> None:
        """Decode the heads of some passages in one batch, each behind all that stands before it."""
        for run in wave:
            self._context.share(MAIN, run.sequence, 0, run.position)
        if wave:
            self._timed(wave)
        for run in wave:
            self._take_over(run.sequence, run.position, run.position + len(run.tokens))

    def _recompute(self, tokens: Tokens, start: int) -> None:
        """Decode a whole passage between kept ones, or a head that fills more than a batch."""
        self._context.share(MAIN, SEAMS, 0, start)
        step = self._context.settings.n_batch
        for first in range(0, len(tokens), step):
            self._timed([Run(tokens[first : first + step], SEAMS, start + first)])
        self._take_over(SEAMS, start, start + len(tokens))

    def _take_over(self, sequence: int, start: int, end: int) -> None:
        """Let the main sequence have the cells of `sequence` from `start` to below `end` instead of its own."""
        self._context.clear(MAIN, start, end)
        self._context.share(sequence, MAIN, start, end)
        self._context.clear(sequence)

    def _timed(self, runs: Sequence[Run]) -> None:
        started = time.perf_counter()
        self._decode(runs)
        self._context.wait()
        self.costs = self.costs.decoded(sum(len(run.tokens) for run in runs), time.perf_counter() - started)
