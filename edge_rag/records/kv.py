"""Kept KV, and how passages come into a prompt."""

from typing import Literal

from edge_rag.records.base import Record

KVSource = Literal["none", "new", "ram", "ssd", "state", "live"]


class PassagePlan(Record, frozen=True):
    """How one passage enters the prompt.

    `exact`: its KV was made at this very place; `splice`: it was moved here and its first `link` tokens computed again;
    `recompute`: it was read in place, like plain prefill; `remembered`: not at all, an adapter covers it.

    `source`: where the KV came from: `ram`, `ssd`, `state` (the kept state of an earlier prompt), `live` (a prompt that
    was being answered), `new` (computed now and kept), `none` (recomputed).
    """

    chunk_id: int
    tokens: int
    how: Literal["exact", "splice", "recompute", "remembered"] = "recompute"
    source: KVSource = "none"
    link: int = 0

    @property
    def skipped(self) -> int:
        """Tokens that did not have to be computed for this question."""
        return 0 if self.source in ("none", "new") else self.tokens - self.link


class KVCounters(Record, frozen=True):
    """What has become of passages since the start, one count a passage of a prompt, and what that was worth."""

    live: int = 0
    state: int = 0
    ram: int = 0
    ssd: int = 0
    new: int = 0
    recomputed: int = 0
    linked_tokens: int = 0
    skipped_tokens: int = 0
    seconds_saved: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0

    def plus(self, more: "KVCounters") -> "KVCounters":
        """The sums."""
        return KVCounters(*(getattr(self, name) + getattr(more, name) for name in self.__struct_fields__))


class KVStatus(Record, frozen=True):
    """Both tiers of kept KV; sizes are bytes.

    `moving`: '' when passages of this model can be moved, else why not; `link_tokens` are computed again at each seam,
    -1 when passages are not moved.
    """

    codec: str
    moving: str
    link_tokens: int
    ram_used: int
    ram_budget: int
    ram_entries: int
    disk_used: int
    disk_budget: int
    disk_files: int
    counters: KVCounters


class WarmReport(Record, frozen=True):
    """What `warm` did: of `passages`, `computed` were computed and `present` had their KV already.

    `full`: it ended early, because the quota is used up.
    """

    passages: int
    computed: int
    present: int
    full: bool
    seconds: float
