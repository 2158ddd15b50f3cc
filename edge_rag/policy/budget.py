"""What memory and cores are spent on, decided before anything is allocated (`policy.ledger` says why).

**Memory.** What does not fit beside the weights is degraded, in an order that keeps answers right, then complete, then
fast, with a reason in words:

1. a smaller RAM tier, down to none: passages come from the SSD, which takes longer; and less for adapters, a quarter
   of what is left at most: passages that one of them covers are read as text;
2. fewer answers at the same time, down to one: others wait;
3. a smaller context, down to `LEAST_CONTEXT`: fewer passages and shorter talk for each question;
4. refused.

**Threads.** The engine has all cores while it serves: it is what callers wait for, and its threads wait for each other
at every layer, so one that has lost its core stops them all: on two cores, decoding beside one busy process fell to a
tenth as libgomp comes, and to a half with the short spinning that is set here (docs/log.md). Hence nothing else may
count on a core. The embedder, which runs for some milliseconds a question and in bursts while documents are added,
leaves one core alone where there is more than one. What runs behind the callers' backs (quantising KV, writing it) has
the cores that the engine was told to leave, else one thread: with it the cores are oversubscribed by one at most.
Threads that load passages do not count, since the engine waits while they work; nor does idle work, which is done by
the engine's own threads.
"""

from bisect import bisect_left
from collections.abc import Callable

from msgspec.structs import replace

from edge_rag.errors import ModelError
from edge_rag.policy.ledger import MEGABYTE, Accounts, Claim, size_in_words, split
from edge_rag.records import Record

LEAST_CONTEXT = 512  # tokens
LEAST_RAM = 8 * MEGABYTE  # a smaller RAM tier would hold next to nothing
CELL_BLOCK = 256  # llama.cpp rounds a context up to a multiple of it
STATES = 2  # KV of a whole prompt outside the context: one being put together, one on its way to the RAM tier
ADAPTERS_SHARE = 4  # adapters may take a quarter of what is left beside the engine: the RAM tier serves every question
GPU_CONTEXT = 500 * MEGABYTE  # what CUDA and its libraries take on a GPU before anything is computed


# --- the plan --------------------------------------------------------------------------------------------------------


class Wanted(Record, frozen=True):
    """What the settings ask for with this model, and what it costs. Sizes are bytes; `ram` and `adapters` are budgets.

    `spare` cells are needed besides those that requests fill. `original` is the context length before it was extended,
    for models that may not pass it (0: none). A token takes `kv` bytes of KV, and `mask` more in the compute buffers,
    which take `compute` whatever the number of cells is. `gpu_share` of the layers are on a GPU.
    """

    model: str
    n_ctx: int
    slots: int
    spare: int
    ram: int
    kv: int
    mask: int
    compute: int
    adapters: int = 0
    original: int = 0
    gpu_share: float = 0.0


class Budget(Record, frozen=True):
    """What the engine is to be run with: `slots` requests of up to `n_ctx` tokens, which fill up to `cells` together.

    `ram` is the size of the RAM tier in bytes, `adapters` what they may take in fast memory, `claims` are what all of
    it takes, `reasons` say what is less than was asked for and why.
    """

    n_ctx: int
    slots: int
    cells: int
    ram: int
    adapters: int
    claims: tuple[Claim, ...]
    reasons: tuple[str, ...] = ()


def cells_for(n_ctx: int, slots: int, *, spare: int, original: int) -> int:
    """Cells that requests may fill together.

    Beyond their original length LongRoPE models turn keys by other factors, so the whole context stays within it.
    """
    cells = n_ctx * slots
    return max(1, original - spare) if n_ctx <= original < cells + spare else cells


def plan_memory(wanted: Wanted, accounts: Accounts) -> Budget:
    """The most of what is wanted that fits what is free, degraded in the order above. Claims nothing yet.

    More free memory never gives less of anything. Raises ModelError when not even one request of LEAST_CONTEXT tokens
    fits.
    """

    cells = cells_for(wanted.n_ctx, wanted.slots, spare=wanted.spare, original=wanted.original)
    whole = replace(wanted, n_ctx=min(wanted.n_ctx, cells))

    def fit(slots: int, n_ctx: int) -> bool:
        return accounts.fit(_claims(whole, slots, n_ctx, 0))

    least = min(whole.n_ctx, LEAST_CONTEXT)
    slots = _most(1, whole.slots, lambda slots: fit(slots, whole.n_ctx)) or 1
    n_ctx = _most(least, whole.n_ctx, lambda n_ctx: fit(slots, n_ctx))
    if n_ctx is None:
        raise _refusal(whole, least, accounts)
    left = accounts.host.free - accounts.on_host(_whole_claims(whole, 0))
    adapters = _for_adapters(whole, left, lambda count: accounts.fit(_whole_claims(whole, count)))
    left -= adapters
    return _budget(whole, slots, n_ctx, whole.ram if whole.ram <= left else _whole(left), adapters)


def _whole_claims(wanted: Wanted, adapters: int) -> tuple[Claim, ...]:
    """Of all that is wanted but the RAM tier, with so many bytes for adapters."""
    return _claims(wanted, wanted.slots, wanted.n_ctx, 0, adapters)


def _for_adapters(wanted: Wanted, left: int, fits: Callable[[int], bool]) -> int:
    """What adapters may take, in whole megabytes: also on the GPU, where what is left is not theirs alone."""
    most = min(wanted.adapters, max(0, left) // ADAPTERS_SHARE) // MEGABYTE
    return (_most(0, most, lambda megabytes: fits(megabytes * MEGABYTE)) or 0) * MEGABYTE


def _budget(wanted: Wanted, slots: int, n_ctx: int, ram: int, adapters: int) -> Budget:
    cells = cells_for(n_ctx, slots, spare=wanted.spare, original=wanted.original)
    return Budget(
        n_ctx=min(n_ctx, cells),
        slots=slots,
        cells=cells,
        ram=ram,
        adapters=adapters,
        claims=_claims(wanted, slots, n_ctx, ram, adapters),
        reasons=_reasons(wanted, slots, min(n_ctx, cells), ram, adapters),
    )


def _most(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number from `low` to `high` that fits, where all smaller ones do too; None when there is none."""
    numbers = range(low, high + 1)
    too_many = bisect_left(numbers, True, key=lambda number: not fits(number))
    return numbers[too_many - 1] if too_many else None


def _whole(left: int) -> int:
    """A RAM tier in what is left: whole megabytes, as settings have them, and not too few."""
    return left - left % MEGABYTE if left >= LEAST_RAM else 0


def _claims(wanted: Wanted, slots: int, n_ctx: int, ram: int, adapters: int = 0) -> tuple[Claim, ...]:
    cells = cells_for(n_ctx, slots, spare=wanted.spare, original=wanted.original) + wanted.spare
    cells = -(-cells // CELL_BLOCK) * CELL_BLOCK
    compute = wanted.compute + cells * wanted.mask
    on_gpu = compute + GPU_CONTEXT if wanted.gpu_share else 0  # besides the machine's: both compute, or copy
    return (
        split("KV cells", cells * wanted.kv, wanted.gpu_share),
        Claim("compute buffers", compute, on_gpu),
        Claim("prompts being put together", STATES * n_ctx * wanted.kv),
        Claim("RAM tier", ram),
        split("adapters", adapters, wanted.gpu_share),
    )


def _refusal(wanted: Wanted, least: int, accounts: Accounts) -> ModelError:
    claims = _claims(wanted, 1, least, 0)
    needed = sum(claim.host + claim.gpu for claim in claims)
    free = " and ".join(
        f"{size_in_words(account.capacity - sum(account.claims.values()))} of {account.memory}"
        for account in accounts.accounts()
    )
    return ModelError(
        f"one request of {least} tokens needs {size_in_words(needed)} beside the weights, and free are {free}",
        field=wanted.model,
        remedy="use a smaller model, close programs, or raise memory.limit_mb",
    )


def _reasons(wanted: Wanted, slots: int, n_ctx: int, ram: int, adapters: int) -> tuple[str, ...]:
    why = "there is not enough free memory for more"
    reasons = []
    if ram < wanted.ram:
        tier = f"a RAM tier of {size_in_words(ram)}" if ram else "no RAM tier"
        reasons.append(f"{tier} instead of {size_in_words(wanted.ram)} (kv.ram_mb), because {why}")
    if adapters < wanted.adapters // MEGABYTE * MEGABYTE:
        held = f"{size_in_words(adapters)} for adapters" if adapters else "no adapters"
        reasons.append(f"{held} instead of {size_in_words(wanted.adapters)} (adapters.memory_mb), because {why}")
    if slots < wanted.slots:
        reasons.append(f"{slots} at the same time instead of {wanted.slots} (engine.slots), because {why}")
    if n_ctx < wanted.n_ctx:
        reasons.append(f"a context of {n_ctx} tokens instead of {wanted.n_ctx} (engine.n_ctx), because {why}")
    return tuple(reasons)


# --- threads ---------------------------------------------------------------------------------------------------------


class Threads(Record, frozen=True):
    """How many threads each may have that computes."""

    engine: int
    embedder: int
    background: int


def plan_threads(cores: int, wanted: int = 0) -> Threads:
    """Threads on so many physical cores; `wanted` for the engine by the settings, which know better (0: all)."""
    engine = wanted or cores
    return Threads(engine=engine, embedder=max(1, engine - 1), background=max(1, cores - engine))
