"""Kept passages become the state of a prompt: moved to their places, and their seams mended.

    prefix · passage 1 (exact) · [link] passage 2 (moved) · … · question

All that is kept goes into ONE state, each passage turned to its positions, and the prompt's sequence shares its cells.
Then, from left to right, each seam is mended: a sequence that shares all that stands before a passage decodes its first
`link` tokens again, and the prompt's sequence takes these cells in place of the stale ones. Seams of neighbouring
passages are decoded together, each seeing the passages before it with stale heads: against one by one that is as good,
as fast on two CPU cores and twice as fast on a GPU (docs/log.md). A passage to be recomputed between kept ones is
mended over its whole length.

Reading, checking, dequantising and turning run in threads, passage beside passage, while this thread computes those
that nobody has kept, and those whose file turned out to be unreadable.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Executor
from itertools import accumulate
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


class Places(Struct, frozen=True):
    """Sequences: `main` holds the prompt, `work` what is put together apart, each of `seams` mends one."""

    main: int
    work: int
    seams: range


class Decoded(Struct, frozen=True):
    """`place` of the last token's logits in its batch (if they were wanted); `seconds` is what these tokens took."""

    place: int
    seconds: float


class Decode(Protocol):
    """Decodes runs of tokens, however long, unless the request is no longer wanted: then it raises Cancelled."""

    def __call__(self, runs: Sequence[Run]) -> Decoded:
        """Append each run to its sequence."""


class Assembled(Struct, frozen=True):
    """The prompt's sequence holds its first `position` tokens; `cached` of them were not computed."""

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
        places: Places,
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
        self._places = places
        self._cache = cache
        self._geometry = geometry
        self._loaders = loaders
        self._decode = decode
        self._prefix = prefix
        self._prefix_state = prefix_state

    def splice(
        self, prompt: Prompt, keys: Sequence[str], plans: Sequence[PassagePlan], known: int
    ) -> tuple[int, list[PassagePlan]]:
        """Append the passages behind the first `known` ones, which the prompt's sequence holds, to it.

        Returns the position that is reached, behind the last passage that is not to be recomputed, and the plans as
        they were carried out.
        """
        done = list(plans)
        reach = max([known, *(place + 1 for place, plan in enumerate(plans) if plan.how != "recompute")])
        kept = [place for place in range(known, reach) if plans[place].how != "recompute"]
        if kept:
            started = time.perf_counter()
            state, targets = self._lay_out(prompt, kept)
            for place in self._fill(prompt, keys, plans, targets):
                done[place] = replace(done[place], source="new")
            self._hand_over(state)
            if all(done[place].source == "ram" for place in kept):  # nothing was waited for
                tokens = sum(done[place].tokens for place in kept)
                self.costs = self.costs.assembled(tokens, time.perf_counter() - started)
        self._mend(prompt, plans[:reach], known)
        return prompt.seams[reach], done

    def _lay_out(self, prompt: Prompt, kept: Sequence[int]) -> tuple[Blob, dict[int, Blob]]:
        """A state for the kept passages, and their places in it."""
        ranges = [np.arange(prompt.seams[place], prompt.seams[place + 1]) for place in kept]
        state = kv_blob.new(self._geometry.shape, np.concatenate(ranges))
        ends = list(accumulate(map(len, ranges), initial=0))
        return state, {place: part(state, *ends[i : i + 2]) for i, place in enumerate(kept)}

    def _hand_over(self, state: Blob) -> None:
        work = self._places.work
        self._context.restore(work, state.buffer)
        self._context.share(work, self._places.main)
        self._context.clear(work)

    def _fill(
        self, prompt: Prompt, keys: Sequence[str], plans: Sequence[PassagePlan], targets: dict[int, Blob]
    ) -> list[int]:
        """Write all kept passages; which of them had to be computed although they were thought to be kept."""
        loads = {
            place: self._loaders.submit(self._load, keys[place], target)
            for place, target in targets.items()
            if plans[place].source != "new"
        }
        for place in targets.keys() - loads.keys():
            self._compute_into(targets[place], prompt, keys, place)
        lost = [place for place, load in loads.items() if not load.result()]
        for place in lost:
            self._compute_into(targets[place], prompt, keys, place)
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
        work, start = self._places.work, len(self._prefix)
        if self._context.end(work) != start:
            self._context.restore(work, self._prefix_state)
        seconds = self._timed([Run(tokens, work, start)])
        whole = kv_blob.parse(self._context.save(work), self._geometry.shape)
        self._context.clear(work, start)
        state = kv_blob.cut(whole, self._geometry.shape, start, start + len(tokens))
        made = Computed(key, chunk_id, state, seconds)
        self.computed.append(made)
        return made

    # --- seams -------------------------------------------------------------------------------------------------------

    def _mend(self, prompt: Prompt, plans: Sequence[PassagePlan], known: int) -> None:
        """Decode again what has not seen the passages before it, from left to right."""
        wave = list[Run]()
        for place in range(known, len(plans)):
            plan, tokens, start = plans[place], prompt.passages[place], prompt.seams[place]
            if plan.how == "recompute":
                self._join(wave)
                self._join([Run(tokens, self._places.seams[0], start)])
                wave = []
            elif plan.link:
                if wave and not self._fits(wave, plan.link):
                    self._join(wave)
                    wave = []
                wave.append(Run(tokens[: plan.link], self._places.seams[len(wave)], start))
        self._join(wave)

    def _fits(self, wave: Sequence[Run], link: int) -> bool:
        tokens = sum(len(run.tokens) for run in wave) + link
        return tokens <= self._context.settings.n_batch and len(wave) < len(self._places.seams)

    def _join(self, wave: Sequence[Run]) -> None:
        """Decode the heads of some passages together, or one whole passage, each behind all that stands before it."""
        for run in wave:
            self._context.share(self._places.main, run.sequence, 0, run.position)
        if wave:
            self._timed(wave)
        for run in wave:
            self._take_over(run.sequence, run.position, run.position + len(run.tokens))

    def _take_over(self, sequence: int, start: int, end: int) -> None:
        """Let the prompt's sequence have the cells of `sequence` from `start` to below `end` instead of its own."""
        main = self._places.main
        self._context.clear(main, start, end)
        self._context.share(sequence, main, start, end)
        self._context.clear(sequence)

    def _timed(self, runs: Sequence[Run]) -> float:
        seconds = self._decode(runs).seconds
        self.costs = self.costs.decoded(sum(len(run.tokens) for run in runs), seconds)
        return seconds
