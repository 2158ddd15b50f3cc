"""Everything before the question, put into the engine's context from what is kept. On the engine's thread.

Ways, the first that serves:

- the cells of a prompt that is being answered and begins in the same way (same passages, same order) are shared;
- a kept state of an earlier prompt that began in the same way is restored exactly;
- kept passages are moved and spliced behind that (`runtime.splicing`);
- what is left is for the engine to read in place, like plain prefill.

Where passages cannot be moved (`native.llama.support`), states are opaque bytes: a whole earlier prompt or the prefix
is restored as it was, or nothing.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from msgspec import Struct

from edge_rag.closing import Closing
from edge_rag.errors import EngineError
from edge_rag.native.kv_blob import Buffer
from edge_rag.native.llama import Context
from edge_rag.native.llama.geometry import Geometry
from edge_rag.native.llama.support import Support
from edge_rag.policy.assembly import counted, plan_passages
from edge_rag.policy.costs import Costs
from edge_rag.policy.scheduling import shared
from edge_rag.records import KVStatus, PassagePlan
from edge_rag.runtime.generations import taken
from edge_rag.runtime.kv_cache import Computed, KVCache
from edge_rag.runtime.passage_waits import candidates, waits
from edge_rag.runtime.prefixes import Prefixes
from edge_rag.runtime.prompting import Prompt, Tokens
from edge_rag.runtime.splicing import Assembled, Decode, Places, Splicer
from edge_rag.runtime.states import Base, States, ends

LEAST_LOADERS, MOST_LOADERS = 2, 8  # threads that put passages in their places, as many as the engine has

logger = logging.getLogger(__name__)


class Live(Struct, frozen=True):
    """A prompt that is being answered: the keys of its segments, where they end, and how its passages came."""

    keys: tuple[str, ...]
    ends: tuple[int, ...]
    passages: tuple[PassagePlan, ...]


class Assembler(Closing):
    """Assembles prompts in one context. Belongs to the engine's thread, but for what says otherwise.

    `cache` None keeps nothing but prefixes. `link` is the number of tokens decoded again at each seam; below 0,
    passages are not moved at all. The first `slots` sequences are for prompts, the others serve to put them together.
    """

    def __init__(
        self,
        context: Context,
        support: Support,
        cache: KVCache | None,
        *,
        link: int,
        slots: int = 1,
        share: bool = True,
    ) -> None:
        loaders = max(LEAST_LOADERS, min(MOST_LOADERS, context.settings.threads))
        self.support = support
        self.link = link
        self.costs = Costs()
        self._context = context
        self._cache = cache
        self._slots = slots
        self.sharing = share
        self._live: dict[int, Live] = {}
        self._computed: list[Computed] = []
        self._prefixes = Prefixes(context, support, cache)
        self._states = States(context, cache, support.geometry) if cache else None
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
        return self._prefixes.bytes

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

    def observe_answer(self, tokens: int, seconds: float, *, dressed: bool) -> None:
        """Behind its first token an answer of so many more took so long; `dressed`: under an adapter."""
        self.costs = self.costs.written(tokens, seconds, dressed=dressed)

    def clear(self, sequence: int) -> None:
        """Free a prompt's cells: it is answered, or was given up."""
        self._live.pop(sequence, None)
        self._context.clear(sequence)

    def forget_cells(self) -> None:
        """The context was made anew: nothing is in its cells."""
        self._live.clear()

    def places(self, sequence: int) -> Places:
        """The sequences in which a prompt is put together."""
        return Places(sequence, self._slots, range(self._slots + 1, self._context.settings.n_seq_max))

    def _tidy(self) -> None:
        places = self.places(0)
        for sequence in (places.work, *places.seams):
            self._context.clear(sequence)

    # --- before the question -----------------------------------------------------------------------------------------

    def assemble(self, prompt: Prompt, decode: Decode, sequence: int = 0) -> Assembled:
        """Fill `sequence` with as much of the prompt as need not be read in order, and say how far it reaches.

        When `decode` raises, the caller clears `sequence`.
        """
        if not prompt.prefix:  # nothing to stand on
            return Assembled(0, 0, _all_recomputed(prompt))
        keys = self._cache.keys(prompt) if self._cache else ()
        try:
            base = self._base(prompt, keys, sequence, decode)
            if self._cache and self.support.geometry and base.segments < len(keys):
                return self._spliced(prompt, keys[:-1], base, decode, self._cache, self.support.geometry, sequence)
        finally:
            self._tidy()
        return Assembled(
            base.position,
            base.position - base.computed,
            (*base.passages, *_all_recomputed(prompt)[len(base.passages) :]),
        )

    def _base(self, prompt: Prompt, keys: tuple[str, ...], sequence: int, decode: Decode) -> Base:
        """Fill `sequence` with the longest beginning of the prompt that is there, at least its prefix."""
        found = self._cache.state(keys, whole=self.opaque) if self._cache else None
        base = self._shared(keys, sequence, found.segments if found else 1)
        if base is None and found and self._states:
            base = self._states.restored(found, sequence)
        if base:
            return base
        prefix, was_kept = self._prefix(prompt.prefix, decode)
        self._context.restore(sequence, prefix)
        return Base(0, len(prompt.prefix), computed=0 if was_kept else len(prompt.prefix))

    def _prefix(self, tokens: Tokens, decode: Decode) -> tuple[Buffer, bool]:
        """The state of a prefix, and whether it was kept."""
        if (state := self._prefixes.get(tokens)) is not None:
            return state, True
        made = self._prefixes.compute(tokens, decode, self.places(0).work)
        self.costs = self.costs.decoded(len(tokens), made.seconds)
        self._computed += made.computed
        return made.state, False

    def _shared(self, keys: tuple[str, ...], sequence: int, least: int) -> Base | None:
        """Share the cells of a prompt that is being answered, when one begins with at least so many of the segments."""
        segments, source = max(
            ((shared(keys, live.keys), source) for source, live in self._live.items()), default=(0, sequence)
        )
        if segments < least:
            return None
        live = self._live[source]
        end = live.ends[segments - 1]
        self._context.share(source, sequence, 0, end)
        return Base(segments, end, taken(live.passages[:segments], "live"))

    def _spliced(
        self,
        prompt: Prompt,
        keys: Sequence[str],
        base: Base,
        decode: Decode,
        cache: KVCache,
        geometry: Geometry,
        sequence: int,
    ) -> Assembled:
        self.costs = self.costs.was_read(*cache.take_reads())
        plans = self._plan(prompt, keys, base.passages, cache)
        prefix, _ = self._prefix(prompt.prefix, decode)
        splicer = self._splicer(prompt.prefix, prefix, decode, cache, geometry, sequence)
        try:
            position, plans = splicer.splice(prompt, keys, plans, len(base.passages))
        finally:
            self._computed += splicer.computed
            self.costs = splicer.costs
        cached = len(prompt.prefix) - base.computed + sum(plan.skipped for plan in plans)
        return Assembled(position, cached, tuple(plans))

    def _splicer(
        self, prefix: Tokens, state: Buffer, decode: Decode, cache: KVCache, geometry: Geometry, sequence: int
    ) -> Splicer:
        return Splicer(
            self._context, self.places(sequence), cache, geometry, self._loaders, decode, self.costs, prefix, state
        )

    def _plan(
        self, prompt: Prompt, keys: Sequence[str], known: Sequence[PassagePlan], cache: KVCache
    ) -> Sequence[PassagePlan]:
        rest = plan_passages(
            candidates(prompt, keys, cache)[len(known) :],
            splicing=self.splicing,
            link=self.link,
            costs=self.costs,
            behind_prefix=not known,
        )
        return (*known, *rest)

    def waits(self, prompt: Prompt) -> Callable[[frozenset[int]], float]:
        """Predicts the seconds of putting the prompt together without the passages of some chunks. For any thread."""
        return waits(prompt, self._cache if self.splicing else None, self.costs, self.link)

    def keys(self, prompt: Prompt) -> tuple[str, ...]:
        """What the prompt's passages are called, in order; none where cells are not shared. For any thread."""
        sharing = self.sharing and not self.opaque and prompt.passages
        return self._cache.keys(prompt) if self._cache and sharing else ()

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
        try:
            state, _ = self._prefix(prefix, decode)
            splicer = self._splicer(prefix, state, decode, cache, geometry, 0)
            self._computed.append(splicer.compute(tokens, cache.key(prefix, tokens), chunk_id))
            self.costs = splicer.costs
        finally:
            self._tidy()

    # --- after it ----------------------------------------------------------------------------------------------------

    def keep_computed(self) -> None:
        """Hand what was computed to the cache."""
        for computed in self._computed:
            if self._cache:
                self._cache.keep(computed)
        self._computed.clear()

    def lend(self, prompt: Prompt, assembled: Assembled, sequence: int) -> None:
        """The prompt is read: others that begin in the same way may share its cells until `clear`."""
        if keys := self.keys(prompt):
            self._live[sequence] = Live(keys, ends(prompt), assembled.passages)

    def keep_state(self, prompt: Prompt, assembled: Assembled, sequence: int) -> None:
        """Keep `sequence` as the state of this prompt, for the next one that begins in the same way.

        Where states are opaque, call it when the passages have been read and nothing else; else after the answer.
        """
        if self._states and prompt.passages:
            self._states.keep(prompt, assembled, sequence, self.costs)

    def count(self, prompt: Prompt, assembled: Assembled) -> None:
        """Tell the cache what has become of a prompt's passages."""
        if self._cache is None:
            return
        plans, keys = assembled.passages, self._cache.keys(prompt)[:-1]
        used = [key for key, plan in zip(keys, plans, strict=True) if plan.skipped]
        self._cache.used(used, counted(plans, self.costs))


def _all_recomputed(prompt: Prompt) -> tuple[PassagePlan, ...]:
    chunks = prompt.chunks or (0,) * len(prompt.passages)
    return tuple(
        PassagePlan(chunk_id=chunk_id, tokens=len(tokens))
        for chunk_id, tokens in zip(chunks, prompt.passages, strict=True)
    )
