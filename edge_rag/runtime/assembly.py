"""Everything before the question, put into the engine's context from what is kept. On the engine's thread.

Three ways, the first that serves:

- a kept state of an earlier prompt that began in the same way (same passages, same order) is restored exactly;
- kept passages are moved and spliced behind it (`runtime.splicing`);
- what is left is for the engine to read in place, like plain prefill.

Where passages cannot be moved (`native.llama.support`), states are opaque bytes: a whole earlier prompt or the prefix
is restored as it was, or nothing.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from edge_rag.closing import Closing
from edge_rag.errors import EngineError
from edge_rag.native import kv_blob
from edge_rag.native.kv_blob import Blob, Buffer
from edge_rag.native.kv_passage import part
from edge_rag.native.llama import Context, Run
from edge_rag.native.llama.geometry import Geometry
from edge_rag.native.llama.support import Support
from edge_rag.policy.assembly import Candidate, plan_passages
from edge_rag.policy.costs import Costs
from edge_rag.records import KVCounters, KVStatus, PassagePlan
from edge_rag.runtime.kv_cache import PREFIX_CHUNK, Computed, KVCache
from edge_rag.runtime.kv_memory import Found, State
from edge_rag.runtime.prompting import Prompt, Tokens
from edge_rag.runtime.splicing import MAIN, WORK, Assembled, Decode, Splicer

LEAST_LOADERS, MOST_LOADERS = 2, 8  # threads that put passages in their places, as many as the engine has
KEPT_PREFIXES = 4  # a model has one prefix; a few more only while templates or instructions are tried out


class Assembler(Closing):
    """Assembles prompts in one context. Belongs to the engine's thread, but for what says otherwise.

    `cache` None keeps nothing but prefixes. `link` is the number of tokens decoded again at each seam; below 0,
    passages are not moved at all.
    """

    def __init__(self, context: Context, support: Support, cache: KVCache | None, *, link: int) -> None:
        loaders = max(LEAST_LOADERS, min(MOST_LOADERS, context.settings.threads))
        self.support = support
        self.link = link
        self.costs = Costs()
        self._context = context
        self._cache = cache
        self._prefixes: dict[Tokens, Buffer] = {}
        self._computed: list[Computed] = []
        self._loaders = ThreadPoolExecutor(loaders, thread_name_prefix="edge_rag kv load")

    def close(self) -> None:
        """Stop the loading threads. Idempotent."""
        self._loaders.shutdown()

    def relink(self, link: int) -> None:
        """Decode another number of tokens again at each seam from now on; states with old seams go."""
        self.link = link
        if self._cache:
            self._cache.forget_states()

    @property
    def prefix_bytes(self) -> int:
        """Memory held by kept prefix states."""
        return sum(map(len, self._prefixes.values()))

    def kv_status(self) -> KVStatus | None:
        """What the cache holds, and whether passages are moved; None without a cache."""
        return self._cache.status(moving=self.support.reason, link_tokens=self.link) if self._cache else None

    @property
    def splicing(self) -> bool:
        """Whether passages are moved."""
        return self.support.geometry is not None and self.link >= 0

    @property
    def opaque(self) -> bool:
        """Whether states can only be restored as a whole."""
        return self.support.geometry is None

    def observe(self, tokens: int, seconds: float) -> None:
        """So many prompt tokens were decoded in so long."""
        self.costs = self.costs.decoded(tokens, seconds)

    def clear(self) -> None:
        """Free all cells: after a prompt, or when one was given up."""
        for sequence in range(self._context.settings.n_seq_max):
            self._context.clear(sequence)

    # --- before the question -----------------------------------------------------------------------------------------

    def assemble(self, prompt: Prompt, decode: Decode) -> Assembled:
        """Fill the main sequence with as much of the prompt as need not be read in order, and say how far it reaches.

        When `decode` raises, the caller clears.
        """
        if not prompt.prefix:  # nothing to stand on
            return Assembled(0, 0, _all_recomputed(prompt))
        cache, geometry = self._cache, self.support.geometry
        keys = cache.keys(prompt) if cache else ()
        found = cache.state(keys, whole=geometry is None) if cache else None
        if found and (geometry is None or found.segments == len(keys)):
            self._context.restore(MAIN, found.state.buffer)
            end = found.state.ends[found.segments - 1]
            return Assembled(end, end, (*found.passages, *_all_recomputed(prompt)[found.segments :]))
        prefix, was_kept = self._prefix(prompt.prefix, decode)
        if cache and geometry:
            done = self._spliced(prompt, keys[:-1], found, prefix, decode, cache, geometry)
        else:
            self._context.restore(MAIN, prefix)
            done = Assembled(len(prompt.prefix), len(prompt.prefix), _all_recomputed(prompt))
        return done if was_kept or found else done.without(len(prompt.prefix))

    def _spliced(
        self,
        prompt: Prompt,
        keys: Sequence[str],
        found: Found | None,
        prefix: Buffer,
        decode: Decode,
        cache: KVCache,
        geometry: Geometry,
    ) -> Assembled:
        self.costs = self.costs.was_read(*cache.take_reads())
        plans = self._plan(prompt, keys, found, cache)
        base = _base(found, prefix, geometry)
        splicer = Splicer(self._context, cache, geometry, self._loaders, decode, self.costs, prompt.prefix, prefix)
        try:
            position, plans = splicer.splice(prompt, keys, plans, base, found.segments if found else 0)
        finally:
            self._computed += splicer.computed
            self.costs = splicer.costs
        cached = len(prompt.prefix) + sum(plan.skipped for plan in plans)
        return Assembled(position, cached, tuple(plans))

    def _plan(self, prompt: Prompt, keys: Sequence[str], found: Found | None, cache: KVCache) -> Sequence[PassagePlan]:
        known = found.passages if found else ()
        chunks = prompt.chunks or (0,) * len(prompt.passages)
        candidates = [
            Candidate(chunk_id, len(tokens), *cache.where(key))
            for chunk_id, tokens, key in zip(chunks, prompt.passages, keys, strict=True)
        ]
        rest = plan_passages(
            candidates[len(known) :],
            splicing=self.splicing,
            link=self.link,
            costs=self.costs,
            behind_prefix=not known,
        )
        return (*known, *rest)

    def _prefix(self, tokens: Tokens, decode: Decode) -> tuple[Buffer, bool]:
        """The state of a prefix, and whether it was kept."""
        if tokens in self._prefixes:
            return self._prefixes[tokens], True
        state = self._fetch_prefix(tokens)
        kept = state is not None
        if state is None:
            state = self._compute_prefix(tokens, decode)
        if len(self._prefixes) >= KEPT_PREFIXES:
            del self._prefixes[next(iter(self._prefixes))]
        self._prefixes[tokens] = state
        return state, kept

    def _fetch_prefix(self, tokens: Tokens) -> Buffer | None:
        geometry = self.support.geometry
        if self._cache is None or geometry is None:
            return None
        key = self._cache.key(tokens)
        fetched = self._cache.fetch(key)
        state = kv_blob.new(geometry.shape, np.arange(len(tokens)))
        return state.buffer if fetched and self._cache.unpack(key, fetched, state) else None

    def _compute_prefix(self, tokens: Tokens, decode: Decode) -> Buffer:
        started = time.perf_counter()
        step = self._context.settings.n_batch
        for first in range(0, len(tokens), step):
            decode([Run(tokens[first : first + step], WORK, first)])
        buffer = self._context.save(WORK)
        self._context.clear(WORK)
        seconds = time.perf_counter() - started
        self.costs = self.costs.decoded(len(tokens), seconds)
        if self._cache and self.support.geometry:
            whole = kv_blob.parse(buffer, self.support.geometry.shape)
            state = kv_blob.cut(whole, self.support.geometry.shape, 0, len(tokens))
            self._computed.append(Computed(self._cache.key(tokens), PREFIX_CHUNK, state, seconds))
        return buffer

    def read_ahead(self, prompt: Prompt) -> None:
        """Begin to read what is kept of a prompt's passages from the SSD into RAM. For any thread."""
        if self._cache and self.splicing:
            self._cache.read_ahead(self._cache.keys(prompt)[:-1])

    def expect(self, prompt: Prompt) -> tuple[str, ...]:
        """A request with this prompt waits: read ahead, and keep what it needs until `release` of what is returned.

        For any thread.
        """
        if self._cache is None or not self.splicing:
            return ()
        keys = self._cache.keys(prompt)[:-1]
        self._cache.expect(keys)
        return keys

    def release(self, keys: tuple[str, ...]) -> None:
        """The request has been served. For any thread."""
        if self._cache:
            self._cache.release(keys)

    def compute(self, prefix: Tokens, tokens: Tokens, chunk_id: int, decode: Decode) -> None:
        """Compute the KV of a passage ahead. Raises EngineError when passages of this model cannot be moved."""
        cache, geometry = self._cache, self.support.geometry
        if cache is None or geometry is None:
            raise EngineError(f"passages cannot be kept: {self.support.reason or 'kv.enabled is off'}")
        state, _ = self._prefix(prefix, decode)
        splicer = Splicer(self._context, cache, geometry, self._loaders, decode, self.costs, prefix, state)
        self._computed.append(splicer.compute(tokens, cache.key(prefix, tokens), chunk_id))
        self.costs = splicer.costs

    # --- after it ----------------------------------------------------------------------------------------------------

    def keep_computed(self) -> None:
        """Hand what was computed to the cache."""
        for computed in self._computed:
            if self._cache:
                self._cache.keep(computed)
        self._computed.clear()

    def keep_state(self, prompt: Prompt, assembled: Assembled) -> None:
        """Keep the main sequence as the state of this prompt, for the next one that begins in the same way.

        Where states are opaque, call it when the passages have been read and nothing else; else after the answer.
        """
        cache, geometry = self._cache, self.support.geometry
        if cache is None or not prompt.passages:
            return
        keys, ends = cache.keys(prompt), (*prompt.seams[1:], len(prompt) - 1)
        found = cache.state(keys, whole=geometry is None)
        if found and found.segments >= len(keys) - (geometry is None):
            return
        if geometry is None:
            seconds = self.costs.prefill_time(ends[-2])
            cache.keep_state(keys[:-1], State(self._context.save(MAIN), ends[:-1], assembled.passages, seconds))
            return
        seconds = self._seconds_without_state(prompt, assembled)
        whole = kv_blob.parse(self._context.save(MAIN), geometry.shape)
        ordered = kv_blob.cut(whole, geometry.shape, 0, len(prompt) - 1)
        cache.keep_state(keys, State(ordered.buffer, ends, assembled.passages, seconds))

    def _seconds_without_state(self, prompt: Prompt, assembled: Assembled) -> float:
        """What the prompt would take from kept passages: they are likely to be kept for longer than its state."""
        linked = sum(plan.link for plan in assembled.passages)
        return (
            self.costs.step + self.costs.prefill_time(linked + len(prompt.tail)) + self.costs.load_time(len(prompt), 0)
        )

    def count(self, prompt: Prompt, assembled: Assembled) -> None:
        """Tell the cache what has become of a prompt's passages."""
        if self._cache is None:
            return
        plans = assembled.passages
        sources = [plan.source for plan in plans]
        skipped = sum(plan.skipped for plan in plans)
        loaded = sum(plan.tokens for plan in plans if plan.source not in ("none", "new"))
        counted = KVCounters(
            state=sources.count("state"),
            ram=sources.count("ram"),
            ssd=sources.count("ssd"),
            new=sources.count("new"),
            recomputed=sources.count("none"),
            linked_tokens=sum(plan.link for plan in plans),
            skipped_tokens=skipped,
            seconds_saved=self.costs.prefill_time(skipped) - self.costs.load_time(loaded, 0),
        )
        keys = self._cache.keys(prompt)[:-1]
        self._cache.used([key for key, plan in zip(keys, plans, strict=True) if plan.skipped], counted)


def _base(found: Found | None, prefix: Buffer, geometry: Geometry) -> Blob:
    """What the passages to be spliced stand behind: a kept beginning of the prompt, or the prefix."""
    state = kv_blob.parse(found.state.buffer if found else prefix, geometry.shape)
    return part(state, 0, found.state.ends[found.segments - 1]) if found else state


def _all_recomputed(prompt: Prompt) -> tuple[PassagePlan, ...]:
    chunks = prompt.chunks or (0,) * len(prompt.passages)
    return tuple(
        PassagePlan(chunk_id=chunk_id, tokens=len(tokens))
        for chunk_id, tokens in zip(chunks, prompt.passages, strict=True)
    )
