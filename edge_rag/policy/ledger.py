"""Who takes how much of which memory: claims are granted before anything is allocated, or refused in words.

llama.cpp ends the process when a CUDA allocation fails, and the kernel ends it when the machine's memory is used up:
neither can be caught. One ledger for each memory keeps the account of all that is large: weights, KV cells, buffers,
the RAM tier, adapters, training. Not thread-safe; the caller has a lock anyway, because what is claimed is then made.
"""

from collections.abc import Sequence

from edge_rag.errors import InputError
from edge_rag.records import Record

MEGABYTE = 1_000_000


class Claim(Record, frozen=True):
    """Bytes that something needs of the machine's memory, and of the GPU's."""

    name: str
    host: int = 0
    gpu: int = 0


class Admission(Record, frozen=True):
    """What became of claims: granted, or nothing has changed and `reason` says why."""

    granted: bool
    reason: str = ""


GRANTED = Admission(granted=True)


class Account(Record, frozen=True):
    """A ledger as it is at this moment: of `capacity` bytes of `memory`, so many are claimed by name."""

    memory: str
    capacity: int
    claims: dict[str, int]


class Ledger:
    """Keeps the account of one memory. Nothing is ever granted beyond `capacity`."""

    def __init__(self, memory: str, capacity: int) -> None:
        self.memory = memory
        self.capacity = capacity
        self.used = 0
        self._claims: dict[str, int] = {}

    @property
    def free(self) -> int:
        """Bytes that can still be claimed."""
        return self.capacity - self.used

    def admit(self, name: str, count: int) -> Admission:
        """Claim bytes under a name that has no claim yet. Raises InputError for a name that has, or fewer than 0."""
        if name in self._claims or count < 0:
            raise InputError(f"{count} bytes cannot be claimed (it has {self._claims.get(name, 0)})", field=name)
        if count > self.free:
            return Admission(
                granted=False,
                reason=f"{name}: {size_in_words(count)} of {self.memory} are needed, {size_in_words(self.free)} of "
                f"{size_in_words(self.capacity)} are free",
            )
        self._claims[name] = count
        self.used += count
        return GRANTED

    def release(self, name: str) -> None:
        """Give a claim back. Idempotent."""
        self.used -= self._claims.pop(name, 0)

    def account(self) -> Account:
        """What is claimed now."""
        return Account(self.memory, self.capacity, dict(self._claims))

    def check(self) -> None:
        """Raise AssertionError unless what is claimed and what is free are the capacity, to the byte."""
        assert sum(self._claims.values()) == self.used, f"the claims on {self.memory} are not what is counted as used"
        assert self.used + self.free == self.capacity, f"used and free are not all of {self.memory}"
        assert self.free >= 0, f"more of {self.memory} is claimed than there is"


class Accounts:
    """The ledgers of a process. Without a GPU of its own memory, claims on the GPU's count against the machine's."""

    def __init__(self, host: Ledger, gpu: Ledger | None = None) -> None:
        self.host = host
        self.gpu = gpu

    def on_host(self, claims: Sequence[Claim]) -> int:
        """Bytes of the machine's memory that these claims take."""
        return sum(claim.host if self.gpu else claim.host + claim.gpu for claim in claims)

    def fit(self, claims: Sequence[Claim]) -> bool:
        """Whether all of these claims would be granted."""
        on_gpu = sum(claim.gpu for claim in claims)
        return self.on_host(claims) <= self.host.free and (self.gpu is None or on_gpu <= self.gpu.free)

    def admit(self, claims: Sequence[Claim]) -> Admission:
        """Grant all of these claims or none. Raises InputError as `Ledger.admit`."""
        for count, claim in enumerate(claims, start=1):
            admission = self.host.admit(claim.name, self.on_host([claim]))
            if admission.granted and self.gpu:
                admission = self.gpu.admit(claim.name, claim.gpu)
            if not admission.granted:
                self.release(claims[:count])
                return admission
        return GRANTED

    def release(self, claims: Sequence[Claim]) -> None:
        """Give claims back. Idempotent."""
        for claim in claims:
            for ledger in self._ledgers:
                ledger.release(claim.name)

    def accounts(self) -> tuple[Account, ...]:
        """What is claimed now: of the machine's memory, then of the GPU's."""
        return tuple(ledger.account() for ledger in self._ledgers)

    def check(self) -> None:
        """Raise AssertionError unless both accounts are right."""
        for ledger in self._ledgers:
            ledger.check()

    @property
    def _ledgers(self) -> tuple[Ledger, ...]:
        return (self.host, self.gpu) if self.gpu else (self.host,)


def usable(available: int, *, reserve: int, limit: int = 0, used: int = 0) -> int:
    """Bytes that may be claimed of a memory with so many available.

    `reserve` is left alone. `limit` is what the process may take in all, with the `used` bytes that it has already;
    0 = no limit.
    """
    room = available - reserve
    return max(0, min(room, limit - used) if limit else room)


def split(name: str, count: int, gpu_share: float) -> Claim:
    """A claim of which this share (0 to 1) is on the GPU."""
    on_gpu = int(count * gpu_share)
    return Claim(name, count - on_gpu, on_gpu)


def size_in_words(count: int) -> str:
    """Bytes as people say them in sentences about memory."""
    return f"{count / MEGABYTE:.0f} MB"
