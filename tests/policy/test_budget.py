"""The account of memory, and the plans of memory and threads: nothing beyond the capacity, and the least given up."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec.structs import replace

from edge_rag.errors import InputError, ModelError
from edge_rag.policy.budget import (
    CELL_BLOCK,
    GPU_CONTEXT,
    LEAST_CONTEXT,
    LEAST_RAM,
    STATES,
    Budget,
    Wanted,
    cells_for,
    plan_memory,
    plan_threads,
)
from edge_rag.policy.ledger import MEGABYTE, Accounts, Claim, Ledger, split, usable

HOST, GPU = "the machine's memory", "the GPU's memory"
QWEN = Wanted(  # roughly Qwen2.5 0.5B with the default settings
    model="qwen",
    n_ctx=4096,
    slots=4,
    spare=256,
    ram=512 * MEGABYTE,
    kv=12_288,
    mask=768,
    compute=100 * MEGABYTE,
)
LEARNED = replace(QWEN, adapters=256 * MEGABYTE)
LOTS = 1 << 50


def accounts(host: int, gpu: int | None = None) -> Accounts:
    return Accounts(Ledger(HOST, host), None if gpu is None else Ledger(GPU, gpu))


def on_host(wanted: Wanted, **changes: int) -> int:
    """What a plan with these sizes takes of the machine's memory when nothing is short."""
    return accounts(LOTS).on_host(plan_memory(replace(wanted, **changes), accounts(LOTS)).claims)


def planned(wanted: Wanted, host: int, gpu: int | None = None) -> Budget:
    return plan_memory(wanted, accounts(host, gpu))


# --- the ledger ------------------------------------------------------------------------------------------------------


def test_what_fits_is_granted_and_the_rest_is_refused_in_words() -> None:
    ledger = Ledger(HOST, 10 * MEGABYTE)
    assert ledger.admit("weights", 7 * MEGABYTE).granted
    refused = ledger.admit("RAM tier", 4 * MEGABYTE)
    assert not refused.granted
    assert refused.reason == "RAM tier: 4 MB of the machine's memory are needed, 3 MB of 10 MB are free"
    assert ledger.admit("RAM tier", 3 * MEGABYTE).granted
    assert (ledger.used, ledger.free) == (10 * MEGABYTE, 0)


def test_what_is_given_back_can_be_claimed_again_and_giving_back_twice_is_nothing() -> None:
    ledger = Ledger(HOST, 10)
    ledger.admit("a", 10)
    ledger.release("a")
    ledger.release("a")
    assert ledger.free == 10
    assert ledger.admit("a", 10).granted


@pytest.mark.parametrize(("name", "count"), [("a", 1), ("b", -1)])
def test_a_second_claim_of_one_name_and_a_negative_one_are_errors(name: str, count: int) -> None:
    ledger = Ledger(HOST, 10)
    ledger.admit("a", 5)
    with pytest.raises(InputError, match="cannot be claimed") as error:
        ledger.admit(name, count)
    assert error.value.field == name
    assert ledger.account().claims == {"a": 5}


def test_an_account_is_a_value_that_later_claims_do_not_change() -> None:
    ledger = Ledger(HOST, 10)
    ledger.admit("a", 5)
    account = ledger.account()
    ledger.admit("b", 5)
    assert (account.memory, account.capacity, account.claims) == (HOST, 10, {"a": 5})


def test_check_finds_an_account_that_does_not_add_up() -> None:
    ledger = Ledger(HOST, 10)
    ledger.admit("a", 5)
    ledger.check()
    ledger.used = 4
    with pytest.raises(AssertionError, match="claims"):
        ledger.check()


def test_check_finds_a_ledger_that_granted_too_much() -> None:
    ledger = Ledger(HOST, 10)
    ledger.admit("a", 5)
    ledger.capacity = 4
    with pytest.raises(AssertionError, match="more"):
        ledger.check()


class LedgersOverTime(RuleBasedStateMachine):
    """Whatever is claimed and given back: both accounts add up, and are what a dictionary says."""

    def __init__(self) -> None:
        super().__init__()
        self.accounts = accounts(100, 60)
        self.model: dict[str, Claim] = {}

    def _room(self) -> tuple[int, int]:
        held = self.model.values()
        return 100 - sum(claim.host for claim in held), 60 - sum(claim.gpu for claim in held)

    @rule(names=st.sets(st.sampled_from("abcdef"), min_size=1, max_size=3), data=st.data())
    def claim(self, names: set[str], data: st.DataObject) -> None:
        sizes = st.tuples(st.integers(0, 40), st.integers(0, 40))
        claims = [Claim(name, *data.draw(sizes)) for name in sorted(names - self.model.keys())]
        host, gpu = self._room()
        fits = sum(claim.host for claim in claims) <= host and sum(claim.gpu for claim in claims) <= gpu
        assert self.accounts.fit(claims) == fits
        admission = self.accounts.admit(claims)
        assert admission.granted == fits
        assert bool(admission.reason) != fits
        if fits:
            self.model |= {claim.name: claim for claim in claims}

    @rule(name=st.sampled_from("abcdef"))
    def give_back(self, name: str) -> None:
        self.accounts.release([Claim(name)])
        self.model.pop(name, None)

    @invariant()
    def the_accounts_add_up(self) -> None:
        self.accounts.check()
        host, gpu = self.accounts.accounts()
        assert host.claims == {name: claim.host for name, claim in self.model.items()}
        assert gpu.claims == {name: claim.gpu for name, claim in self.model.items()}


TestLedgersOverTime = LedgersOverTime.TestCase


def test_without_a_gpu_of_its_own_memory_all_counts_against_the_machine() -> None:
    one = accounts(100)
    assert one.on_host([Claim("a", 40, 50)]) == 90
    assert one.admit([Claim("a", 40, 50)]).granted
    assert not one.fit([Claim("b", 5, 6)])
    assert [account.claims for account in one.accounts()] == [{"a": 90}]
    one.check()


def test_a_claim_that_the_gpu_has_no_room_for_takes_nothing_of_the_machine() -> None:
    two = accounts(100, 10)
    refused = two.admit([Claim("a", 10, 5), Claim("b", 10, 6)])
    assert not refused.granted
    assert GPU in refused.reason
    assert [account.claims for account in two.accounts()] == [{}, {}]


@given(
    available=st.integers(0, 1000), reserve=st.integers(0, 1000), limit=st.integers(0, 1000), used=st.integers(0, 99)
)
def test_the_reserve_is_left_alone_and_the_limit_is_kept(available: int, reserve: int, limit: int, used: int) -> None:
    room = usable(available, reserve=reserve, limit=limit, used=used)
    assert room >= 0
    assert room == 0 or (room <= available - reserve and (not limit or room + used <= limit))
    assert room in (0, available - reserve, limit - used)


def test_without_a_limit_it_does_not_matter_what_is_used_already() -> None:
    assert usable(100, reserve=10, used=500) == 90


@given(count=st.integers(0, 10**12), share=st.floats(0, 1))
def test_no_byte_of_a_split_claim_is_lost(count: int, share: float) -> None:
    claim = split("a", count, share)
    assert claim.host + claim.gpu == count
    assert min(claim.host, claim.gpu) >= 0
    assert claim.gpu == pytest.approx(count * share, abs=1)


# --- the plan --------------------------------------------------------------------------------------------------------


def test_with_enough_memory_everything_is_as_wanted_and_nothing_has_to_be_said() -> None:
    budget = planned(LEARNED, LOTS)
    assert (budget.n_ctx, budget.slots, budget.cells, budget.ram) == (4096, 4, 4 * 4096, QWEN.ram)
    assert budget.adapters == LEARNED.adapters
    assert budget.reasons == ()


def test_the_claims_are_cells_and_their_mask_buffers_states_and_the_ram_tier() -> None:
    cells = 4 * 4096 + 256
    assert cells % CELL_BLOCK == 0
    assert {claim.name: (claim.host, claim.gpu) for claim in planned(LEARNED, LOTS).claims} == {
        "KV cells": (cells * QWEN.kv, 0),
        "compute buffers": (QWEN.compute + cells * QWEN.mask, 0),
        "prompts being put together": (STATES * 4096 * QWEN.kv, 0),
        "RAM tier": (QWEN.ram, 0),
        "adapters": (LEARNED.adapters, 0),
    }


def test_adapters_take_a_quarter_of_what_is_left_at_most() -> None:
    engine = on_host(LEARNED, ram=0, adapters=0)
    assert planned(LEARNED, engine + 400 * MEGABYTE).adapters == 100 * MEGABYTE
    assert planned(LEARNED, engine + 400 * MEGABYTE).ram == 300 * MEGABYTE
    on_gpu = replace(LEARNED, gpu_share=1.0)
    engine = sum(claim.gpu for claim in planned(replace(on_gpu, adapters=0), LOTS, LOTS).claims)
    assert planned(on_gpu, LOTS, engine + 10 * MEGABYTE).adapters == 10 * MEGABYTE


def test_cells_are_rounded_up_as_llama_cpp_does() -> None:
    claims = {claim.name: claim.host for claim in planned(replace(QWEN, spare=257), LOTS).claims}
    assert claims["KV cells"] == (4 * 4096 + 2 * CELL_BLOCK) * QWEN.kv


FULL = on_host(QWEN)
NO_RAM = on_host(QWEN, ram=0)
ONE_SLOT = on_host(QWEN, ram=0, slots=1)
LEAST = on_host(QWEN, ram=0, slots=1, n_ctx=LEAST_CONTEXT)


@pytest.mark.parametrize(
    ("free", "slots", "n_ctx", "ram", "words"),
    [
        pytest.param(FULL, 4, 4096, 512, [], id="just enough"),
        pytest.param(FULL - 1, 4, 4096, 511, ["RAM tier of 511 MB instead of 512 MB"], id="a byte too few"),
        pytest.param(NO_RAM + LEAST_RAM, 4, 4096, 8, ["RAM tier of 8 MB"], id="the smallest RAM tier"),
        pytest.param(NO_RAM + LEAST_RAM - 1, 4, 4096, 0, ["no RAM tier instead of 512 MB"], id="no RAM tier"),
        pytest.param(NO_RAM, 4, 4096, 0, ["no RAM tier"], id="all but the RAM tier"),
        pytest.param(NO_RAM - 1, 3, 4096, 0, ["no RAM tier", "3 at the same time instead of 4"], id="a slot less"),
        pytest.param(ONE_SLOT, 1, 4096, 0, ["no RAM tier", "1 at the same time"], id="one slot"),
        pytest.param(
            ONE_SLOT - 1, 1, 3840, 0, ["no RAM tier", "1 at the same", "3840 tokens instead of 4096"], id="less context"
        ),
        pytest.param(LEAST, 1, LEAST_CONTEXT, 0, ["no RAM tier", "1 at", "512 tokens instead of 4096"], id="the least"),
    ],
)
def test_what_does_not_fit_is_given_up_in_order(free: int, slots: int, n_ctx: int, ram: int, words: list[str]) -> None:
    budget = planned(QWEN, free)
    # A block of cells more or less decides, not the single token.
    assert (budget.slots, budget.n_ctx // CELL_BLOCK * CELL_BLOCK) == (slots, n_ctx)
    assert budget.ram == ram * MEGABYTE
    assert len(budget.reasons) == len(words)
    for reason, word in zip(budget.reasons, words, strict=True):
        assert word in reason.replace(str(budget.n_ctx), str(n_ctx))


def test_below_the_least_context_it_is_refused_with_a_remedy() -> None:
    with pytest.raises(
        ModelError, match=r"512 tokens needs .* MB beside the weights, and free are .* of the machine"
    ) as error:
        planned(QWEN, LEAST - 1)
    assert error.value.field == "qwen"
    assert "smaller model" in error.value.remedy


def test_what_is_claimed_already_is_not_free() -> None:
    some = accounts(FULL + 100)
    some.admit([Claim("weights", 100)])
    assert plan_memory(QWEN, some).reasons == ()
    some.admit([Claim("another byte", 1)])
    assert plan_memory(QWEN, some).ram == 511 * MEGABYTE


def test_a_model_of_a_context_shorter_than_the_least_is_not_refused_for_that() -> None:
    assert planned(replace(QWEN, n_ctx=128), LOTS).n_ctx == 128


def test_on_a_discrete_gpu_its_share_of_the_cells_is_there_and_the_ram_tier_is_not() -> None:
    wanted = replace(QWEN, gpu_share=1.0)
    claims = {claim.name: (claim.host, claim.gpu) for claim in planned(wanted, LOTS, LOTS).claims}
    cells = 4 * 4096 + 256
    assert claims["KV cells"] == (0, cells * QWEN.kv)
    assert claims["RAM tier"] == (QWEN.ram, 0)
    compute = QWEN.compute + cells * QWEN.mask
    assert claims["compute buffers"] == (compute, compute + GPU_CONTEXT)
    half = {claim.name: (claim.host, claim.gpu) for claim in planned(replace(QWEN, gpu_share=0.5), LOTS, LOTS).claims}
    assert half["KV cells"] == (cells * QWEN.kv // 2, cells * QWEN.kv // 2)


def test_a_small_gpu_costs_slots_and_leaves_the_ram_tier_alone() -> None:
    wanted = replace(QWEN, gpu_share=1.0)
    on_gpu = sum(claim.gpu for claim in planned(wanted, LOTS, LOTS).claims)
    budget = planned(wanted, LOTS, on_gpu - 1)
    assert (budget.slots, budget.ram) == (3, QWEN.ram)
    assert [reason.split()[0] for reason in budget.reasons] == ["3"]


def test_a_gpu_that_is_too_small_is_named_in_the_refusal() -> None:
    with pytest.raises(ModelError, match=r"\d+ MB of the machine's memory and 100 MB of the GPU's memory"):
        planned(replace(QWEN, gpu_share=1.0), LOTS, 100 * MEGABYTE)


def test_a_budget_is_a_value_that_can_be_printed() -> None:
    budget = planned(QWEN, NO_RAM - 1)
    assert msgspec.json.decode(msgspec.json.encode(budget), type=Budget) == budget


wishes = st.builds(
    Wanted,
    model=st.just("any"),
    n_ctx=st.integers(64, 9000),
    slots=st.integers(1, 8),
    spare=st.integers(16, 1000),
    ram=st.integers(0, 600).map(lambda count: count * MEGABYTE),
    kv=st.integers(0, 200_000),
    mask=st.integers(0, 3000),
    compute=st.integers(0, 300 * MEGABYTE),
    adapters=st.integers(0, 300).map(lambda count: count * MEGABYTE),
    original=st.sampled_from([0, 300, 4096, 8192]),
    gpu_share=st.sampled_from([0.0, 0.3, 1.0]),
)
rooms = st.integers(0, 4000).map(lambda count: count * MEGABYTE)


def tried(wanted: Wanted, host: int, gpu: int | None) -> Budget | None:
    try:
        return planned(wanted, host, gpu)
    except ModelError:
        return None


@given(wanted=wishes, host=rooms, gpu=st.none() | rooms)
def test_a_plan_is_always_granted_and_never_more_than_was_wanted(wanted: Wanted, host: int, gpu: int | None) -> None:
    budget = tried(wanted, host, gpu)
    if budget is None:
        return
    both = accounts(host, gpu)
    assert both.admit(budget.claims).granted
    both.check()
    assert 1 <= budget.slots <= wanted.slots
    assert budget.n_ctx <= min(wanted.n_ctx, budget.cells)
    assert budget.ram <= wanted.ram
    assert budget.adapters <= wanted.adapters
    assert budget.cells <= budget.slots * wanted.n_ctx
    whole = cells_for(wanted.n_ctx, wanted.slots, spare=wanted.spare, original=wanted.original)
    less = budget.ram < wanted.ram or budget.adapters < wanted.adapters
    less = less or budget.slots < wanted.slots or budget.n_ctx < min(wanted.n_ctx, whole)
    assert bool(budget.reasons) == less


@given(wanted=wishes, host=rooms, gpu=st.none() | rooms, more=rooms)
def test_more_memory_never_gives_less_of_anything(wanted: Wanted, host: int, gpu: int | None, more: int) -> None:
    small = tried(wanted, host, gpu)
    large = tried(wanted, host + more, gpu)
    if small is None:
        return
    assert large is not None
    for name in ("slots", "n_ctx", "cells", "ram", "adapters"):
        assert getattr(large, name) >= getattr(small, name)


@given(wanted=wishes, host=rooms)
def test_nothing_is_given_up_before_what_comes_earlier_in_the_order_is_gone(wanted: Wanted, host: int) -> None:
    budget = tried(wanted, host, None)
    if budget and (budget.slots < wanted.slots or budget.n_ctx < min(wanted.n_ctx, budget.cells)):
        lost_context = any("context" in reason for reason in budget.reasons)
        assert budget.ram == budget.adapters == 0
        assert budget.slots == 1 or not lost_context


@given(wanted=wishes, host=rooms)
def test_a_refusal_means_that_the_least_does_not_fit(wanted: Wanted, host: int) -> None:
    if tried(wanted, host, None) is None:
        least = replace(wanted, slots=1, n_ctx=min(wanted.n_ctx, LEAST_CONTEXT), ram=0)
        assert on_host(least) > host


# --- cells -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_ctx", "slots", "original", "cells"),
    [
        pytest.param(1000, 4, 0, 4000, id="no limit"),
        pytest.param(1000, 4, 8192, 4000, id="far below the original length"),
        pytest.param(4096, 4, 4096, 4096 - 256, id="within the original length"),
        pytest.param(8192, 2, 4096, 16384, id="meant to be beyond it"),
        pytest.param(200, 4, 250, 1, id="an original length that not even the spare cells fit"),
    ],
)
def test_cells_keep_within_the_length_that_keys_are_turned_for(
    n_ctx: int, slots: int, original: int, cells: int
) -> None:
    assert cells_for(n_ctx, slots, spare=256, original=original) == cells


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "wanted", "threads"),
    [
        pytest.param(1, 0, (1, 1, 1), id="one core"),
        pytest.param(2, 0, (2, 1, 1), id="two cores"),
        pytest.param(8, 0, (8, 7, 1), id="eight cores"),
        pytest.param(8, 5, (5, 4, 3), id="cores left by the settings go to the background"),
        pytest.param(2, 4, (4, 3, 1), id="settings that know better"),
    ],
)
def test_the_engine_has_the_cores_and_the_others_what_it_leaves(
    cores: int, wanted: int, threads: tuple[int, int, int]
) -> None:
    planned: Any = plan_threads(cores, wanted)
    assert (planned.engine, planned.embedder, planned.background) == threads


@given(cores=st.integers(1, 512))
def test_what_runs_beside_the_engine_is_one_thread_too_many_at_most(cores: int) -> None:
    threads = plan_threads(cores)
    assert threads.engine == cores
    assert threads.background == 1
    assert 1 <= threads.embedder <= max(1, cores - 1)
