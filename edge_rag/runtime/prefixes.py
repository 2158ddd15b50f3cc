"""The states of prompts' prefixes: what every prompt of a model begins with, before any passage.

A model has one prefix as long as nobody changes its template or its instructions, so they are few. They are kept with
the passages too, so that the first question after a start has one.
"""

import numpy as np
from msgspec import Struct

from edge_rag.native import kv_blob
from edge_rag.native.kv_blob import Buffer
from edge_rag.native.llama import Context, Run
from edge_rag.native.llama.support import Support
from edge_rag.runtime.kv_cache import PREFIX_CHUNK, Computed, KVCache
from edge_rag.runtime.prompting import Tokens
from edge_rag.runtime.splicing import Decode

KEPT = 4  # more than one only while templates or instructions are tried out


class Made(Struct, frozen=True):
    """A prefix's state that took `seconds`; `computed` is what of it should be kept."""

    state: Buffer
    seconds: float
    computed: tuple[Computed, ...]


class Prefixes:
    """States of the prefixes that were used last, in memory. Belongs to the engine's thread."""

    def __init__(self, context: Context, support: Support, cache: KVCache | None) -> None:
        self._context = context
        self._geometry = support.geometry
        self._cache = cache
        self._states: dict[Tokens, Buffer] = {}

    @property
    def bytes(self) -> int:
        """What they take in memory."""
        return sum(map(len, self._states.values()))

    def get(self, tokens: Tokens) -> Buffer | None:
        """The state of a prefix from memory or from the cache; None when nobody has kept it."""
        if tokens not in self._states and (state := self._fetch(tokens)) is not None:
            self._remember(tokens, state)
        return self._states.get(tokens)

    def _remember(self, tokens: Tokens, state: Buffer) -> None:
        if len(self._states) >= KEPT:
            del self._states[next(iter(self._states))]
        self._states[tokens] = state

    def _fetch(self, tokens: Tokens) -> Buffer | None:
        if self._cache is None or self._geometry is None:
            return None
        key = self._cache.key(tokens)
        fetched = self._cache.fetch(key)
        state = kv_blob.new(self._geometry.shape, np.arange(len(tokens)))
        return state.buffer if fetched and self._cache.unpack(key, fetched, state) else None

    def compute(self, tokens: Tokens, decode: Decode, work: int) -> Made:
        """Read a prefix in the sequence `work`, which is free before and after."""
        seconds = decode([Run(tokens, work, 0)]).seconds
        state = self._context.save(work)
        self._context.clear(work)
        self._remember(tokens, state)
        return Made(state, seconds, self._to_keep(tokens, state, seconds))

    def _to_keep(self, tokens: Tokens, state: Buffer, seconds: float) -> tuple[Computed, ...]:
        if self._cache is None or self._geometry is None:
            return ()
        shape = self._geometry.shape
        ordered = kv_blob.cut(kv_blob.parse(state, shape), shape, 0, len(tokens))
        return (Computed(self._cache.key(tokens), PREFIX_CHUNK, ordered, seconds),)
