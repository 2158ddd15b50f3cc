"""Which entries a tier of a byte budget (RAM or SSD) holds: what is worth its bytes stays, the rest makes room.

An entry is worth the seconds that its next hits will save, per byte. Coming hits are foreseen from past ones, the old
ones counting less: each time `HALF_LIFE` requests per held entry have passed, a use counts half (the combined recency
and frequency of LRFU: Lee et al., SIGMETRICS 1999). Weighted with cost by size that is LUV (Bahn et al., "Using Full
Reference History for Efficient Document Replacement in Web Caches", USITS 1999). Time is the number of requests, so
there is no clock; counts are kept as logarithms against a mark that moves on, so that no entry has to be touched to
fade and nothing overflows. Entries that had to leave or were refused are remembered for a while with their counts,
without their bytes (after TinyLFU: Einziger et al., ACM TOS 2017). When there must be victims, an entry comes in only
if it is worth more per byte than each of them, and on its first offer its one use counts for `FIRST` only: as a rule it
is the second use that lets it in, which halves the writes to the SSD when many passages are asked for once.

Measured on Zipf traces with and without a change of popularity (as in `tools.bench.traces`), and rejected:

* Greedy-Dual-Size-Frequency (Cherkasova, HPL-98-69R1), uses × seconds / bytes + the last victim's priority: it ages
  with every eviction, too fast in a tight tier; at a tenth of all bytes it saves 4 to 7 points less. Only where many
  questions follow up on the last few was it better, by 2 points, for 1.5 to 2 times the writes.
* That with admission strictly on the second use: 2 to 6 points less.
* LUV strictly on the second use: a fifth fewer writes, but a point behind LRU when a change meets a large tier.
* At once whenever it beats its victims (`FIRST` = 1): nothing gained, up to twice the writes.
* Newcomer against the sum of its victims: nothing gained, and slower after a change.
* Sparing victims that a later, larger one makes needless: nothing gained.

Not thread-safe; the caller has a lock anyway, because files or buffers must change with the tier.
"""

import bisect
import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Literal

from msgspec import Struct, field

from edge_rag.errors import InputError

HALF_LIFE = 8.0  # requests per held entry; 4 forgets what is asked for steadily, 16 is slower after a change
FIRST = 0.8  # what a use counts that is the first we know of, against entries that would have to leave
REMEMBERED, REMEMBERED_LEAST = 4, 256  # without their bytes: so many per held entry, and at least so many

Rank = Literal["saved", "lru", "lfu"]


class Entry(Struct, frozen=True):
    """Something that could be held. `seconds` is what one hit saves. Raises InputError when `bytes` is not positive."""

    key: str
    bytes: int
    seconds: float

    def __post_init__(self) -> None:
        if self.bytes < 1:
            raise InputError(f"an entry of {self.bytes} bytes cannot be held", field="bytes")


class StoredEntry(Entry, frozen=True):
    """An entry as it was held before a restart, with what `Tier.stored` said of it; uses 0: nothing is known."""

    uses: int = 0
    priority: float = 0.0


class Memory(Struct, frozen=True):
    """What a tier knows besides its entries: the mark of time, and (uses, heat) of entries that are not held."""

    mark: float = 0.0
    gone: dict[str, tuple[int, float]] = field(default_factory=dict)


class Offer(Struct, frozen=True):
    """What became of an offer: the entry is in and the victims are out, or nothing has changed."""

    admitted: bool
    victims: tuple[str, ...] = ()


REFUSED = Offer(admitted=False)


class _Held(Struct):
    entry: Entry
    uses: int
    heat: float  # log2 of the uses, older ones counting less, on the scale of the mark
    place: tuple[float, int, str]  # in the order of leaving: priority, then who was used longer ago


class Tier:
    """Decides what is held and keeps the account; bytes are written and deleted by the caller.

    `rank`: "saved" as above; "lru" and "lfu" are the textbook policies, which admit everything, for comparison. With
    `entries` and `memory` a tier goes on after a restart; entries may then exceed the capacity until `resize`.
    """

    def __init__(
        self,
        capacity: int,
        rank: Rank = "saved",
        *,
        entries: Iterable[StoredEntry] = (),
        memory: Memory | None = None,
    ) -> None:
        memory = memory or Memory()
        self._rank = rank
        self._capacity = capacity
        self._used = 0
        self._held: dict[str, _Held] = {}
        self._order: list[tuple[float, int, str]] = []  # sorted: at 10,000 entries a move is a memmove of 80 kB
        self._gone = dict(memory.gone)
        self._mark = memory.mark
        self._restore(list(entries))

    @property
    def capacity(self) -> int:
        """The budget in bytes."""
        return self._capacity

    @property
    def used(self) -> int:
        """Bytes of all entries; above the capacity only while kept or restored entries do not fit it."""
        return self._used

    @property
    def free(self) -> int:
        """Bytes that can be taken without a victim."""
        return max(0, self._capacity - self._used)

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)

    def keys(self) -> Iterator[str]:
        """The keys held, in the order in which they would leave."""
        return (key for _, _, key in self._order)

    def stored(self, key: str) -> tuple[int, float]:
        """(uses, priority) of an entry that is held, to be kept for `StoredEntry`. Raises KeyError."""
        held = self._held[key]
        return held.uses, held.place[0]

    def memory(self) -> Memory:
        """What has to be kept besides the entries; without it a restarted tier must learn again what was refused."""
        return Memory(self._mark, dict(self._gone))

    def use(self, key: str) -> None:
        """Count a hit. A key that is gone is passed over."""
        self._tick()
        if held := self._held.get(key):
            self._put(held.entry, held.uses + 1, self._warmed(held.heat))

    def offer(self, entry: Entry, *, keep: Collection[str] = ()) -> Offer:
        """Count a miss and decide whether the entry comes in; it is in, and the victims are out, on return.

        `keep` are keys that waiting requests will need: never victims. An entry that saves nothing or exceeds the
        capacity is refused. A key that is held already is replaced if its new size finds room; if not, the old stays.
        """
        self._tick()
        if entry.seconds <= 0 or entry.bytes > self._capacity:
            return REFUSED
        uses, heat = self._known(entry.key)
        warmed = self._warmed(heat)
        victims = self._victims(self._used + entry.bytes - self._size(entry.key), {*keep, entry.key})
        if victims is None or not self._deserves(entry, warmed if uses else warmed + math.log2(FIRST), victims):
            self._refuse(entry.key, uses + 1, warmed)
            return REFUSED
        self._evict(victims)
        self._gone.pop(entry.key, None)
        self._put(entry, uses + 1, warmed)
        return Offer(True, victims)

    def remove(self, key: str) -> None:
        """Forget an entry: its bytes are gone. Idempotent."""
        if held := self._held.pop(key, None):
            self._used -= held.entry.bytes
            del self._order[bisect.bisect_left(self._order, held.place)]

    def resize(self, capacity: int, *, keep: Collection[str] = ()) -> tuple[str, ...]:
        """Set the capacity; what no longer fits leaves, least worth first, but for kept entries."""
        self._capacity = capacity
        victims = self._victims(self._used, keep)
        if victims is None:  # all that may leave is not enough
            victims = tuple(key for key in self.keys() if key not in keep)
        self._evict(victims)
        return victims

    def check(self) -> None:
        """Raise AssertionError unless the account is right: for tests, and after a doubt."""
        facts = {
            "used bytes are the entries'": self._used == sum(held.entry.bytes for held in self._held.values()),
            "used and free make the capacity": self._used + self.free == max(self._capacity, self._used),
            "the order is the entries'": self._order == sorted(held.place for held in self._held.values()),
            "no entry is both held and gone": self._gone.keys().isdisjoint(self._held),
        }
        if wrong := [fact for fact, holds in facts.items() if not holds]:
            raise AssertionError(f"no longer true of the tier: {', '.join(wrong)}")

    # --- time ---------------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._mark += 1 / (HALF_LIFE * max(1, len(self._held)))

    def _warmed(self, heat: float) -> float:
        """Add a use now: log2(2^heat + 2^mark), without leaving the logarithms."""
        low, high = sorted((heat, self._mark))
        return high + math.log2(1 + 2 ** (low - high))

    def _priority(self, entry: Entry, uses: int, heat: float, turn: int) -> float:
        if self._rank == "saved":
            return heat + _worth(entry)
        return float(turn if self._rank == "lru" else uses)

    # --- decisions ----------------------------------------------------------------------------------------------------

    def _known(self, key: str) -> tuple[int, float]:
        """(uses, heat) of an entry so far."""
        held = self._held.get(key)
        return (held.uses, held.heat) if held else self._gone.get(key, (0, -math.inf))

    def _victims(self, wanted: int, spared: Collection[str]) -> tuple[str, ...] | None:
        """Who must leave, least worth first, so that `wanted` bytes fit; None when that cannot be."""
        victims: list[str] = []
        for _, _, key in self._order:
            if wanted <= self._capacity:
                break
            if key not in spared:
                victims.append(key)
                wanted -= self._size(key)
        return tuple(victims) if wanted <= self._capacity else None

    def _deserves(self, entry: Entry, heat: float, victims: tuple[str, ...]) -> bool:
        if self._rank != "saved" or not victims:
            return True
        return heat + _worth(entry) > self._held[victims[-1]].place[0]

    # --- account ------------------------------------------------------------------------------------------------------

    def _restore(self, entries: list[StoredEntry]) -> None:
        """Take the entries in; the mark is at least where the uses of some entry prove that it was."""
        seen = [entry for entry in entries if entry.uses]
        self._turns = itertools.count(1 + int(max((entry.priority for entry in seen), default=0)))
        proofs = [entry.priority - _worth(entry) - math.log2(entry.uses) for entry in seen if self._rank == "saved"]
        self._mark = max([self._mark, *proofs])
        for entry in sorted(entries, key=lambda entry: entry.priority):
            heat = entry.priority - _worth(entry) if entry.uses else self._mark
            self._gone.pop(entry.key, None)
            self._put(entry, max(1, entry.uses), heat)

    def _size(self, key: str) -> int:
        held = self._held.get(key)
        return held.entry.bytes if held else 0

    def _put(self, entry: Entry, uses: int, heat: float) -> None:
        self.remove(entry.key)
        turn = next(self._turns)
        place = (self._priority(entry, uses, heat, turn), turn, entry.key)
        self._held[entry.key] = _Held(entry, uses, heat, place)
        self._used += entry.bytes
        bisect.insort(self._order, place)

    def _refuse(self, key: str, uses: int, heat: float) -> None:
        if held := self._held.get(key):
            self._put(held.entry, uses, heat)
        else:
            self._remember(key, uses, heat)

    def _evict(self, victims: Iterable[str]) -> None:
        for key in victims:
            held = self._held[key]
            self.remove(key)
            self._remember(key, held.uses, held.heat)

    def _remember(self, key: str, uses: int, heat: float) -> None:
        """Only "saved" has a memory: textbook policies forget what they do not hold."""
        if self._rank == "saved":
            self._gone.pop(key, None)
            self._gone[key] = (uses, heat)
        while len(self._gone) > max(REMEMBERED_LEAST, REMEMBERED * len(self._held)):
            del self._gone[next(iter(self._gone))]


def _worth(entry: Entry) -> float:
    """log2 of the seconds that a hit saves per byte."""
    return math.log2(max(entry.seconds, 1e-9) / entry.bytes)
