"""KV in memory: passages as they were quantised, and the states of whole prompts, under ONE byte budget.

Passages stay quantised here: dequantising five of them costs a few milliseconds, and twice as many fit (docs/log.md).
States of prompts are float16 as llama.cpp gave them, so that restoring one is exact. Both compete for the same bytes by
the seconds they save. Not thread-safe: `runtime.kv_cache` holds the lock.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from msgspec import Struct

from edge_rag.native.kv_blob import Buffer
from edge_rag.native.kv_codec import Codec
from edge_rag.policy.eviction import Entry, Tier
from edge_rag.policy.prefix_tree import PrefixTree
from edge_rag.records import PassagePlan


class Held(Struct, frozen=True):
    """The KV of a passage as it is kept; `seconds` is what computing it took."""

    codec: Codec
    tokens: int
    sections: Mapping[str, Any]
    seconds: float

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return sum(memoryview(section).nbytes for section in self.sections.values())


class State(Struct, frozen=True):
    """The state of a prompt. Segment i (a passage; the last one the tail without its last token) ends at `ends[i]`.

    `buffer` holds the cells in order of position where passages can be moved, else as llama.cpp wrote them. `passages`
    tells how the prompt was put together, `seconds` what restoring it saves.
    """

    buffer: Buffer
    ends: tuple[int, ...]
    passages: tuple[PassagePlan, ...]
    seconds: float


class Found(Struct, frozen=True):
    """A state that begins as a new prompt does, up to the end of segment number `segments` - 1."""

    state: State
    segments: int


class KVMemory:
    """The RAM tier."""

    def __init__(self, budget: int) -> None:
        self.tier = Tier(budget)
        self._held: dict[str, Held] = {}
        self._states: dict[str, State] = {}
        self._tree = PrefixTree()

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def get(self, key: str) -> Held | None:
        """A passage, and one use of it."""
        if key in self._held:
            self.tier.use(key)
        return self._held.get(key)

    def put(self, key: str, held: Held, *, keep: Collection[str]) -> None:
        """Offer a passage; `keep` are keys that waiting requests need."""
        if self._admit(Entry(key, max(1, held.bytes), held.seconds), keep):
            self._held[key] = held

    def state(self, path: Sequence[str], *, whole: bool) -> Found | None:
        """The longest kept beginning of a prompt; with `whole`, only one that ends where its state ends."""
        segments, name = self._tree.longest(tuple(path))
        while name and whole and len(self._states[name].ends) != segments:
            segments, name = self._tree.longest(tuple(path[: segments - 1]))
        if not name:
            return None
        self.tier.use(name)
        return Found(self._states[name], segments)

    def put_state(self, path: Sequence[str], state: State, *, keep: Collection[str]) -> None:
        """Offer the state of a prompt whose segments have these keys."""
        name = "state " + " ".join(path)
        if self._admit(Entry(name, len(state.buffer), state.seconds), keep):
            self._states[name] = state
            self._tree.add(tuple(path), name)

    def retain(self, keys: Collection[str]) -> None:
        """Forget all states, and the passages whose key is not among `keys`: their documents are gone."""
        self.forget_states()
        for key in [key for key in self._held if key not in keys]:
            self.remove(key)

    def forget_states(self) -> None:
        """Forget the states of prompts; passages stay."""
        for name in list(self._states):
            self.remove(name)

    def remove(self, key: str) -> None:
        """Forget a passage, or a state by its name."""
        self.tier.remove(key)
        self._drop(key)

    def _admit(self, entry: Entry, keep: Collection[str]) -> bool:
        offer = self.tier.offer(entry, keep=keep)
        for victim in offer.victims:
            self._drop(victim)
        return offer.admitted

    def _drop(self, key: str) -> None:
        self._held.pop(key, None)
        if self._states.pop(key, None):
            self._tree.remove(key)

    def check(self) -> None:
        """Raise AssertionError unless what is held is what the account says, to the byte."""
        self.tier.check()
        sizes = {key: max(1, held.bytes) for key, held in self._held.items()}
        sizes |= {name: len(state.buffer) for name, state in self._states.items()}
        assert sizes.keys() == set(self.tier.keys()), "the RAM tier holds other entries than its account"
        assert sum(sizes.values()) == self.tier.used, "the RAM tier holds other bytes than its account"
        assert len(self._tree) == len(self._states), "the prefix tree has other states than there are"
