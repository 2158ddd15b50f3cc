"""What a tier of a byte budget holds: the account, admission, victims, restarts, and how well it does."""

from statistics import fmean
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edge_rag.errors import InputError
from edge_rag.policy.eviction import REFUSED, REMEMBERED_LEAST, Entry, Memory, Offer, Rank, StoredEntry, Tier
from tools.bench import traces

RANKS: tuple[Rank, ...] = get_args(Rank)

keys = st.sampled_from([f"key {number}" for number in range(8)])
entries = st.builds(Entry, keys, st.integers(1, 60), st.sampled_from([0.5, 1.0, 3.0, 0.0]))
kept = st.sets(keys, max_size=3)


def entry(key: str, size: int = 10, seconds: float = 1.0) -> Entry:
    return Entry(key, size, seconds)


def filled(*names: str, capacity: int | None = None, rank: Rank = "saved") -> Tier:
    """A tier of entries of 10 bytes, all used once in this order, and full unless a capacity is given."""
    tier = Tier(10 * len(names) if capacity is None else capacity, rank)
    for name in names:
        assert tier.offer(entry(name)) == Offer(True, ())
    return tier


def stored(tier: Tier) -> list[StoredEntry]:
    """The rows that a caller would have kept, when all entries have 10 bytes and save a second."""
    return [StoredEntry(key, 10, 1.0, *tier.stored(key)) for key in tier.keys()]  # noqa: SIM118 (in leaving order)


# --- the account -----------------------------------------------------------------------------------------------------


class AnyUse(RuleBasedStateMachine):
    """Whatever is done to a tier, the account is right, and nothing kept becomes a victim."""

    rank: Rank = "saved"

    def __init__(self) -> None:
        super().__init__()
        self.tier = Tier(100, self.rank)
        self.sizes: dict[str, int] = {}

    def leave(self, victims: tuple[str, ...], spared: set[str]) -> None:
        assert spared.isdisjoint(victims)
        for key in victims:
            del self.sizes[key]

    @rule(new=entries, keep=kept)
    def offer(self, new: Entry, keep: set[str]) -> None:
        fits = self.tier.used + new.bytes - self.sizes.get(new.key, 0) <= self.tier.capacity and new.seconds > 0
        offer = self.tier.offer(new, keep=keep)
        self.leave(offer.victims, keep | {new.key})
        if offer.admitted:
            self.sizes[new.key] = new.bytes
            assert self.tier.used <= self.tier.capacity
        if fits:
            assert offer == Offer(True, ())

    @rule(key=keys)
    def use(self, key: str) -> None:
        self.tier.use(key)

    @rule(key=keys)
    def remove(self, key: str) -> None:
        self.tier.remove(key)
        self.sizes.pop(key, None)

    @rule(capacity=st.integers(0, 150), keep=kept)
    def resize(self, capacity: int, keep: set[str]) -> None:
        self.leave(self.tier.resize(capacity, keep=keep), keep)
        assert self.tier.used <= capacity or set(self.sizes) <= keep

    @invariant()
    def account(self) -> None:
        self.tier.check()
        assert set(self.tier.keys()) == set(self.sizes)
        assert len(self.tier) == len(self.sizes)
        assert self.tier.used == sum(self.sizes.values())


class AnyUseOfLru(AnyUse):
    rank = "lru"


class AnyUseOfLfu(AnyUse):
    rank = "lfu"


for machine, examples in ((AnyUse, 60), (AnyUseOfLru, 15), (AnyUseOfLfu, 15)):
    machine.TestCase.settings = settings(max_examples=examples, stateful_step_count=40)

TestAnyUse = AnyUse.TestCase
TestAnyUseOfLru = AnyUseOfLru.TestCase
TestAnyUseOfLfu = AnyUseOfLfu.TestCase


def test_check_names_what_is_wrong() -> None:
    tier = filled("a", "b")
    tier._used += 1
    tier._order.reverse()
    with pytest.raises(AssertionError, match=r"tier: used bytes are the entries', the order is the entries'$"):
        tier.check()


def test_an_entry_without_bytes_is_an_error() -> None:
    with pytest.raises(InputError, match="0 bytes"):
        entry("a", 0)


def test_keys_come_in_the_order_of_leaving() -> None:
    tier = filled("a", "b", "c")
    tier.use("a")
    assert list(tier.keys()) == ["b", "c", "a"]
    assert tier.offer(entry("d")) == REFUSED
    assert tier.offer(entry("d")) == Offer(True, ("b",))


# --- admission -------------------------------------------------------------------------------------------------------


def test_while_there_is_room_everything_comes_in_at_once() -> None:
    tier = filled("a", "b", capacity=25)
    assert (tier.used, tier.free) == (20, 5)
    assert tier.offer(entry("c", 5)) == Offer(True, ())
    assert tier.free == 0


def test_in_a_full_tier_the_second_use_lets_an_entry_in() -> None:
    tier = filled("a", "b", "c")
    assert tier.offer(entry("new")) == REFUSED
    assert "new" not in tier
    assert tier.offer(entry("new")) == Offer(True, ("a",))
    assert "new" in tier
    assert "a" not in tier


def test_a_first_offer_replaces_what_has_faded() -> None:
    tier = filled("a", "b", "c")
    for _ in range(20):
        tier.use("b")
        tier.use("c")
    assert tier.offer(entry("new")) == Offer(True, ("a",))


def test_an_entry_worth_less_than_its_victims_stays_out() -> None:
    tier = filled("a", "b")
    for _ in range(3):
        tier.use("a")
        tier.use("b")
    assert tier.offer(entry("new")) == REFUSED
    assert tier.offer(entry("new")) == REFUSED


def test_what_had_to_leave_is_remembered_with_its_uses() -> None:
    tier = filled("a", "b", "c")
    for name in "aaaabbbbcccc":
        tier.use(name)
    tier.resize(20)
    assert "a" not in tier
    assert tier.offer(entry("a")) == Offer(True, ("b",))
    assert tier.stored("a")[0] == 6


def test_worth_is_seconds_saved_per_byte() -> None:
    tier = Tier(100)
    tier.offer(entry("large", 60, 1.0))
    tier.offer(entry("small", 10, 1.0))
    tier.offer(entry("slow", 30, 5.0))
    assert list(tier.keys()) == ["large", "small", "slow"]
    assert tier.offer(entry("dear", 10, 50.0)) == Offer(True, ("large",))


def test_victims_are_as_many_as_the_bytes_need() -> None:
    tier = filled("a", "b", "c", "d")
    assert tier.offer(entry("new", 15, 9.0)) == Offer(True, ("a", "b"))
    assert tier.used == 35


def test_an_entry_must_beat_the_best_of_its_victims() -> None:
    tier = filled("a", "b", "c")
    for _ in range(5):
        tier.use("b")
    tier.use("c")
    assert tier.offer(entry("new", 15, 3.0)).victims == ()
    assert tier.offer(entry("other", 10, 3.0)) == Offer(True, ("a",))


def test_old_uses_count_less() -> None:
    tier = filled("a", "b")
    for _ in range(10):
        tier.use("a")
    for _ in range(10):
        tier.use("b")
    assert next(tier.keys()) == "a"


def test_a_use_counts_half_after_eight_requests_per_held_entry() -> None:
    tier = filled("a", "b")
    before = tier.stored("b")[1]
    for _ in range(16):
        tier.use("gone")
    tier.use("a")
    tier.remove("a")
    # "a" and "b" were used once, then "a" again when a use was worth twice as much (and a request's fading more).
    assert tier.offer(entry("c")).admitted
    assert tier.stored("c")[1] - before == pytest.approx(1 + 1 / 16 + 1 / 8)


def test_an_entry_larger_than_the_tier_is_refused_and_moves_nobody() -> None:
    tier = filled("a", "b")
    assert tier.offer(entry("huge", 21, 1e6)) == REFUSED
    assert tier.offer(entry("huge", 21, 1e6)) == REFUSED
    assert not tier.memory().gone


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_an_entry_that_saves_nothing_is_refused(seconds: float) -> None:
    assert Tier(100).offer(entry("useless", 10, seconds)) == REFUSED


def test_the_memory_is_bounded_and_forgets_the_oldest() -> None:
    tier = filled("a")
    for number in range(REMEMBERED_LEAST + 5):
        assert tier.offer(entry(str(number)), keep=["a"]) == REFUSED
    assert list(tier.memory().gone) == [str(number) for number in range(5, REMEMBERED_LEAST + 5)]


def test_the_memory_grows_with_the_entries() -> None:
    names = [str(number) for number in range(200)]
    tier = filled(*names)
    for name in names:
        tier.use(name)
    for number in range(1000):
        assert tier.offer(entry(f"new {number}")) == REFUSED
    assert len(tier.memory().gone) == 800


def test_an_offer_renews_the_place_in_the_memory() -> None:
    tier = filled("a")
    for name in ("x", "y", "x"):
        tier.offer(entry(name), keep=["a"])
    assert list(tier.memory().gone) == ["y", "x"]


# --- keys held already -----------------------------------------------------------------------------------------------


def test_a_held_key_offered_again_counts_as_a_use() -> None:
    tier = filled("a", "b")
    assert tier.offer(entry("a")) == Offer(True, ())
    assert tier.stored("a")[0] == 2
    assert tier.used == 20


def test_a_held_key_with_another_size_is_replaced() -> None:
    tier = filled("a", "b", capacity=30)
    assert tier.offer(entry("a", 20)) == Offer(True, ())
    assert tier.used == 30
    assert tier.offer(entry("a", 5)) == Offer(True, ())
    assert tier.used == 15


def test_a_replacement_may_have_victims_but_never_itself() -> None:
    tier = filled("a", "b", "c")
    assert tier.offer(entry("a", 20, 9.0)) == Offer(True, ("b",))
    assert tier.used == 30


def test_where_a_replacement_finds_no_room_the_old_entry_stays() -> None:
    tier = filled("a", "b")
    for _ in range(9):
        tier.use("b")
    assert tier.offer(entry("a", 20)) == REFUSED
    assert tier.used == 20
    assert tier.stored("a")[0] == 2
    tier.check()


# --- look-ahead, size ------------------------------------------------------------------------------------------------


def test_what_waiting_requests_need_is_no_victim() -> None:
    tier = filled("a", "b", "c")
    assert tier.offer(entry("new", 10, 9.0), keep=["a"]) == Offer(True, ("b",))


def test_where_look_ahead_leaves_too_little_room_an_offer_changes_nothing() -> None:
    tier = filled("a", "b", "c")
    assert tier.offer(entry("new", 20, 99.0), keep=["a", "b"]) == REFUSED
    assert list(tier.keys()) == ["a", "b", "c"]


def test_using_what_is_gone_is_passed_over() -> None:
    tier = filled("a")
    tier.use("b")
    assert list(tier.keys()) == ["a"]


def test_a_smaller_tier_lets_the_least_worth_go_first() -> None:
    tier = filled("a", "b", "c")
    tier.use("a")
    assert tier.resize(15) == ("b", "c")
    assert tier.capacity == 15
    assert tier.resize(40) == ()
    assert tier.free == 30


def test_a_tier_can_be_shrunk_below_what_is_kept() -> None:
    tier = filled("a", "b", "c")
    assert tier.resize(5, keep=["a", "b"]) == ("c",)
    assert (tier.used, tier.free) == (20, 0)
    tier.check()
    assert tier.resize(5) == ("a", "b")


# --- textbook policies -----------------------------------------------------------------------------------------------


def test_lru_lets_go_what_was_not_used_for_longest() -> None:
    tier = filled("a", "b", rank="lru")
    for _ in range(5):
        tier.use("a")
    tier.use("b")
    assert tier.offer(entry("new")) == Offer(True, ("a",))


def test_lfu_lets_go_what_was_used_least_and_of_those_the_oldest() -> None:
    tier = filled("a", "b", "c", rank="lfu")
    tier.use("a")
    assert tier.offer(entry("new")) == Offer(True, ("b",))
    assert list(tier.keys()) == ["c", "new", "a"]


@pytest.mark.parametrize("rank", ["lru", "lfu"])
def test_textbook_policies_remember_nothing(rank: Rank) -> None:
    tier = filled("a", rank=rank)
    tier.offer(entry("b"))
    assert not tier.memory().gone


# --- restarts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", RANKS)
@given(before=st.lists(keys, max_size=30), after=st.lists(keys, max_size=30))
def test_a_restarted_tier_goes_on_as_if_it_had_not_been(rank: Rank, before: list[str], after: list[str]) -> None:
    tier = Tier(40, rank)
    for key in before:
        tier.offer(entry(key))
    restarted = Tier(40, rank, entries=stored(tier), memory=tier.memory())
    restarted.check()
    for key in after:
        assert restarted.offer(entry(key)) == tier.offer(entry(key))
    assert list(restarted.keys()) == list(tier.keys())


def test_the_memory_survives_json() -> None:
    tier = filled("a", "b")
    tier.offer(entry("c"))
    assert msgspec.json.decode(msgspec.json.encode(tier.memory()), type=Memory) == tier.memory()


def test_rows_of_lru_give_the_order_whatever_theirs_is() -> None:
    tier = filled("a", "b", "c", rank="lru")
    tier.use("a")
    assert list(Tier(30, "lru", entries=reversed(stored(tier))).keys()) == ["b", "c", "a"]


def test_what_lru_stores_after_a_restart_ranks_above_what_it_stored_before() -> None:
    tier = filled("a", "b", "c", rank="lru")
    for name in "abcabcabc":
        tier.use(name)
    rows = {row.key: row for row in stored(tier)}
    restarted = Tier(30, "lru", entries=rows.values())
    restarted.use("a")
    rows["a"] = StoredEntry("a", 10, 1.0, *restarted.stored("a"))
    assert list(Tier(30, "lru", entries=rows.values()).keys()) == ["b", "c", "a"]


def test_without_its_memory_a_restarted_tier_still_knows_roughly_what_time_it_is() -> None:
    tier = filled("a", "b")
    for _ in range(1000):
        tier.use("a")
    tier.remove("b")
    tier.offer(entry("b"))
    restarted = Tier(20, entries=stored(tier))
    assert restarted.memory().mark == pytest.approx(tier.memory().mark)


def test_an_entry_of_which_nothing_is_known_counts_as_used_once_now() -> None:
    used = StoredEntry("used", 10, 1.0, uses=9, priority=2.0)
    tier = Tier(30, entries=[used, StoredEntry("unknown", 10, 1.0)], memory=Memory(mark=4.0))
    assert list(tier.keys()) == ["unknown", "used"]
    assert tier.stored("unknown") == (1, pytest.approx(4.0 - 3.3219, abs=1e-4))


def test_a_restored_tier_may_exceed_its_capacity_until_it_is_resized() -> None:
    tier = Tier(15, entries=stored(filled("a", "b", "c")))
    tier.check()
    assert (tier.used, tier.free) == (30, 0)
    assert tier.resize(15) == ("a", "b")


def test_a_restored_entry_is_no_longer_remembered_as_gone() -> None:
    tier = Tier(30, entries=stored(filled("a")), memory=Memory(0.0, {"a": (1, 0.0)}))
    tier.check()


def test_a_memory_that_was_handed_over_is_not_changed_any_more() -> None:
    old = Memory(0.0, {"a": (1, 0.0)})
    tier = Tier(30, memory=old)
    kept = tier.memory()
    tier.offer(entry("a"))
    assert old.gone == kept.gone == {"a": (1, 0.0)}


def test_worn_numbers_do_not_overflow() -> None:
    tier = Tier(20, entries=[StoredEntry("a", 10, 1.0, 3, 1e6), StoredEntry("b", 10, 0.0, 3, -1e6)])
    tier.use("a")
    tier.use("b")
    assert list(tier.keys()) == ["b", "a"]


# --- how well it does ------------------------------------------------------------------------------------------------


def zipf_questions(exponent: float, *, drift: bool) -> traces.Trace:
    trace = traces.questions(traces.zipf(200, exponent, 3000, seed=1), 3)
    return traces.drifted(trace, 200, seed=2) if drift else trace


@pytest.mark.parametrize("exponent", [0.8, 1.1])
@pytest.mark.parametrize("drift", [False, True])
def test_saves_at_least_as_many_seconds_as_lru_and_lfu_with_fewer_writes(exponent: float, drift: bool) -> None:
    sizes = [4400 * (60 + 61 * item % 197) for item in range(200)]
    seconds = [size / 300_000 - 0.1 for size in sizes]
    trace = zipf_questions(exponent, drift=drift)
    saved, writes = dict[Rank, float](), dict[Rank, float]()
    for rank in RANKS:
        capacities = [int(share * sum(sizes)) for share in (0.1, 0.25, 0.5)]
        results = [traces.replay(trace, sizes, seconds, capacity, rank) for capacity in capacities]
        saved[rank] = fmean(result.seconds for result in results)
        writes[rank] = fmean(result.writes for result in results)
    assert saved["saved"] > max(saved["lru"], saved["lfu"])
    assert writes["saved"] < 0.6 * min(writes["lru"], writes["lfu"])


def test_a_scan_of_new_entries_does_not_wash_out_what_is_used() -> None:
    tier = filled(*"abcde")
    for name in "abcde" * 3:
        tier.use(name)
    for number in range(20):
        tier.offer(entry(f"once {number}"))
    assert set(tier.keys()) == set("abcde")


# --- traces ----------------------------------------------------------------------------------------------------------


def test_zipf_is_reproducible_and_follows_its_law() -> None:
    draws = traces.zipf(50, 1.0, 20_000, seed=3)
    assert draws == traces.zipf(50, 1.0, 20_000, seed=3)
    assert draws != traces.zipf(50, 1.0, 20_000, seed=4)
    assert draws.count(0) / draws.count(9) == pytest.approx(10, rel=0.15)
    assert set(draws) == set(range(50))


def test_questions_need_different_passages() -> None:
    assert traces.questions([1, 1, 2, 3, 3, 4, 5, 6], 2) == [[1, 2], [3, 4], [5, 6]]


def test_drift_renames_the_second_half_only() -> None:
    trace = [[0, 1], [2, 3], [0, 1], [2, 3]]
    later = traces.drifted(trace, 4, seed=1)
    assert later[:2] == trace[:2]
    assert later[2:] != trace[2:]
    assert sorted(item for asked in later[2:] for item in asked) == [0, 1, 2, 3]


def test_replay_counts_requests_bytes_and_seconds() -> None:
    # 0 (10 bytes) and 1 (30 bytes) are missed, then both hit; 2 does not fit beside them and is read twice in vain.
    result = traces.replay([[0, 1], [0, 1], [2], [2]], [10, 30, 90], [1.0, 2.0, 3.0], 50, "saved")
    assert result == traces.Replay(hits=2 / 6, bytes=40 / 260, seconds=3 / 12, writes=2 / 6)


def test_replay_uses_what_it_hits() -> None:
    result = traces.replay([[0], [1], [0], [2], [0]], [10] * 3, [1.0] * 3, 20, "lru")
    assert result.hits == 2 / 5


def test_replay_spares_the_other_passages_of_a_question() -> None:
    result = traces.replay([[0, 1], [0]], [10] * 2, [1.0] * 2, 10, "lru")
    assert (result.hits, result.writes) == (1 / 3, 1 / 3)
