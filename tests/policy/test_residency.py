"""The controller after POLAR, and what holds for all rules of residency."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.policy.caching_rules import RULES, rule
from edge_rag.policy.demand import Array, Request, as_logged, demand
from edge_rag.policy.residency import EPOCH, FIRST, Pace, Polar, Residency, doubling, fixed

ARMS = "abcdef"


def request(
    means: dict[str, float], used: str = "", *, away: float = 0.2, width: float = 0.0, without: float = 0.0
) -> Request:
    """A question with these candidates; nothing is waited for when they are resident."""
    flat = np.ones(len(means))
    return Request(
        arms=tuple(means),
        means=np.array(list(means.values()), np.float64),
        widths=width * flat,
        here=0 * flat,
        away=away * flat,
        without=without,
        used=used,
    )


def only(arm: str) -> Request:
    return request({arm: 1.0}, arm)


def silent(pace: Pace) -> Pace:
    """The same without any scouting."""
    return Pace(first=pace.first, longest=pace.longest, window=pace.window, scouting=0, pulls=0)


# --- every rule ------------------------------------------------------------------------------------------------------

requests = st.builds(
    lambda means, place: request(means, (*means, "")[place % (len(means) + 1)]),
    st.dictionaries(st.sampled_from(ARMS), st.floats(0, 1), max_size=4),
    st.integers(0, 99),
)
sizes_of_all = st.fixed_dictionaries({arm: st.integers(1, 6) for arm in ARMS})


@given(st.sampled_from(sorted(RULES)), sizes_of_all, st.integers(0, 14), st.lists(requests, max_size=30))
def test_what_is_resident_exists_fits_and_is_all_in_the_order(
    name: str, sizes: dict[str, int], budget: int, asked: list[Request]
) -> None:
    kept = rule(name, sizes, budget, epoch=4)
    for number, each in enumerate(asked):
        forced = kept.forced(each, math.inf)
        assert forced in ("", *each.arms)
        if number == len(asked) // 2:
            sizes.pop(each.used, None)  # its adapter is removed
            kept.budget -= 1
        resident = kept.after(each)
        assert resident == kept.resident == set(kept.order)
        assert len(kept.order) == len(resident)
        assert resident <= sizes.keys()
        assert sum(sizes[arm] for arm in resident) <= max(0, kept.budget)


@pytest.mark.parametrize("name", sorted(RULES))
def test_nothing_is_resident_without_a_budget(name: str) -> None:
    kept = rule(name, dict.fromkeys(ARMS, 1), 0, epoch=2)
    assert not any(kept.after(only(arm)) for arm in ARMS)


@pytest.mark.parametrize("name", sorted(RULES))
def test_all_that_was_used_stays_when_all_fits(name: str) -> None:
    kept = rule(name, dict.fromkeys(ARMS, 1), len(ARMS), epoch=4)
    for arm in ARMS[:4]:
        kept.after(only(arm))
    assert kept.after(request({})) == set(ARMS[:4])


@pytest.mark.parametrize("name", sorted(RULES))
def test_an_adapter_larger_than_the_budget_is_never_resident_and_nothing_leaves_for_it(name: str) -> None:
    kept = rule(name, {"a": 1, "b": 9}, 2, epoch=4)
    for _ in range(3):
        kept.after(only("a"))
        assert kept.after(only("b")) == {"a"}


def test_what_is_in_memory_at_the_start_may_be_told_and_is_not_beyond_the_budget() -> None:
    kept = rule("lru", dict.fromkeys(ARMS, 1), 2)
    kept.resident = frozenset("abcx")
    assert kept.after(request({})) == {"b", "c"}
    assert kept.after(only("d")) == {"c", "d"}


def test_a_rule_that_says_no_more_lets_nothing_in_and_forces_nothing() -> None:
    kept = Residency(dict.fromkeys(ARMS, 1), 2)
    assert (kept.after(only("a")), kept.forced(only("a"), math.inf)) == (set(), "")
    kept.resident = frozenset("cab")
    assert kept.after(only("d")) == {"b", "c"}


# --- what requests ask for -------------------------------------------------------------------------------------------


def test_lift_is_what_a_resident_arm_adds_to_the_best_without_it() -> None:
    asked = [
        request({"a": 0.9, "b": 0.6}, without=0.5),
        request({"b": 0.4}, without=0.5),
        request({"c": 0.9, "b": 1.0}),
    ]
    found = demand(asked, as_logged(asked), exist={"a", "b", "c"}, resident={"b"})
    assert found.arms == ("b", "a", "c")
    # Loading a for the first is worth .7 at once, and b for the third .8; for the second '' is best.
    assert found.lift == pytest.approx(np.array([[0, 0, 0.2], [0.2, 0, 0], [0, 0, 0.1]]))
    assert found.page_ins == pytest.approx(np.full(3, 0.2))


def test_arms_that_are_gone_and_requests_without_arms_ask_for_nothing() -> None:
    asked = [request({"a": 0.9}), request({}, without=-math.inf), request({"x": 1.0, "a": 0.8}, without=-math.inf)]
    found = demand(asked, as_logged(asked), exist={"a"}, resident=())
    assert found.arms == ("a",)
    assert found.lift == pytest.approx(np.array([[0.2, 0, 0.2]]))


def test_nothing_is_asked_for_when_there_are_no_arms_at_all() -> None:
    asked = [request({"x": 1.0})]
    found = demand(asked, as_logged(asked), exist=(), resident=())
    assert (found.arms, found.lift.shape, found.page_ins.shape) == ((), (0, 1), (0,))


# --- epochs ----------------------------------------------------------------------------------------------------------


def polar(budget: int = 1, epoch: int = 4, **sizes: int) -> Polar:
    return Polar(sizes or dict.fromkeys(ARMS, 1), budget, silent(fixed(epoch)))


def test_within_an_epoch_a_miss_changes_nothing_once_memory_is_full() -> None:
    kept = polar()
    assert kept.after(only("a")) == {"a"}
    assert kept.after(only("b")) == {"a"}
    assert kept.after(only("b")) == {"a"}
    assert kept.epochs == 0


def test_at_the_end_of_an_epoch_the_set_is_the_best_one_for_it() -> None:
    kept = polar()
    for arm in "abbb":
        kept.after(only(arm))
    assert (kept.resident, kept.epochs) == ({"b"}, 1)


def test_an_arm_stays_when_another_gains_less_than_its_page_in_costs() -> None:
    kept = polar()
    for _ in range(2):
        kept.after(request({"a": 0.80, "b": 0.84}, "a"))
        kept.after(request({"a": 0.80, "b": 0.84}, "a"))
    assert kept.resident == {"a"}  # 4 × .04 are no .2
    kept.after(request({"a": 0.80, "b": 0.86}, "a"))
    for _ in range(3):
        kept.after(request({"a": 0.80, "b": 0.86}, "a"))
    assert kept.resident == {"b"}  # 4 × .06 are


def test_equal_arms_do_not_take_each_others_place() -> None:
    kept = polar()
    for used in "bbabaaab":
        kept.after(request({"a": 0.8, "b": 0.8}, used))
    assert kept.resident == {"b"}


def test_what_gains_nothing_stays_while_there_is_room_and_goes_before_the_others() -> None:
    kept = polar(budget=2, epoch=2)
    for arm in "ab":
        kept.after(only(arm))
    for _ in range(2):
        kept.after(request({"b": 0.9, "a": 0.1}, "b"))
    assert kept.resident == {"a", "b"}
    assert kept.order == ("a", "b")


def test_the_order_of_leaving_is_by_what_is_lost_for_each_byte() -> None:
    kept = polar(budget=4, a=1, b=3)
    for arm in "abab":
        kept.after(only(arm))
    assert kept.order == ("b", "a")


def test_an_epoch_of_questions_without_adapters_is_one_too() -> None:
    kept = polar(epoch=2)
    kept.after(request({}))
    assert kept.after(request({})) == set()
    assert kept.epochs == 1


def test_the_newest_estimates_count_at_the_end_of_an_epoch() -> None:
    told: list[int] = []

    def newest(asked: Sequence[Request]) -> list[Array]:
        told.append(len(asked))
        return [np.array([0.2, 0.9]) for _ in asked]

    kept = Polar(dict.fromkeys(ARMS, 1), 1, silent(fixed(3)), newest)
    for _ in range(3):
        kept.after(request({"a": 0.9, "b": 0.2}, "a"))
    assert (kept.resident, told) == ({"b"}, [3])


def test_epochs_of_polar_plus_double_up_to_the_longest() -> None:
    kept = Polar({}, 0, silent(doubling(4 * FIRST)))
    ends = []
    for number in range(1, 12 * FIRST):
        before = kept.epochs
        kept.after(request({}))
        if kept.epochs > before:
            ends.append(number)
    assert ends == [FIRST, 3 * FIRST, 7 * FIRST, 11 * FIRST]
    assert fixed(100).first == fixed(100).longest == 100


# --- scouting --------------------------------------------------------------------------------------------------------

UNSURE = {"a": 0.5, "b": 0.5, "c": 0.4}


def test_while_it_scouts_the_price_of_loading_is_not_looked_at() -> None:
    kept = Polar(dict.fromkeys(ARMS, 1), 1, fixed(3))
    kept.after(request(UNSURE, "b"))
    assert kept.forced(request(UNSURE, width=0.5), math.inf) == "b"  # of equals the resident one
    assert kept.forced(request(UNSURE | {"c": 0.6}, width=0.5), math.inf) == "c"


def test_what_is_scouted_costs_no_more_than_is_allowed() -> None:
    kept = Polar(dict.fromkeys(ARMS, 1), 1, fixed(3))
    hopeful = request(UNSURE | {"c": 0.6}, width=0.5)
    assert kept.forced(hopeful, 0.0) == "c"  # all cost the same yet
    kept.after(request(UNSURE, "b"))
    assert kept.forced(hopeful, 0.19) == "b"
    assert kept.forced(hopeful, 0.21) == "c"


def test_plain_retrieval_is_taken_to_cost_nothing() -> None:
    kept = Polar(dict.fromkeys(ARMS, 1), 1, fixed(3))
    better = request(UNSURE, width=0.5, without=0.6)
    assert kept.forced(better, 0.1) == ""
    assert kept.forced(better, 0.2) == "a"
    assert kept.forced(request(UNSURE, width=0.1, without=0.61), math.inf) == ""


def test_nothing_is_scouted_without_candidates_or_when_nothing_is_allowed() -> None:
    kept = Polar(dict.fromkeys(ARMS, 1), 1, fixed(3))
    assert kept.forced(request({}), math.inf) == ""
    assert kept.forced(request(UNSURE, without=-math.inf), -math.inf) == ""


def test_hope_is_how_much_doubt_counts() -> None:
    asked = Request(("a", "b"), np.array([0.6, 0.1]), np.array([0.0, 0.8]), np.zeros(2), np.ones(2), without=0.0)
    assert Polar(dict.fromkeys(ARMS, 1), 1, fixed(3)).forced(asked, math.inf) == "b"
    assert Polar(dict.fromkeys(ARMS, 1), 1, fixed(3, hope=0.5)).forced(asked, math.inf) == "a"


def scouted(kept: Residency, count: int) -> list[int]:
    """The requests, by number, with which it scouts."""
    found = []
    for number in range(count):
        if kept.forced(request(UNSURE), math.inf):
            found.append(number)
        kept.after(request({}))
    return found


def test_it_scouts_in_the_beginning_and_again_when_requests_have_doubled_but_not_too_often() -> None:
    found = scouted(Polar({"a": 1}, 1, fixed(4)), 40)
    assert found == [0, 1, 2, 3, 4, 8, 9, 16, 17, 32, 33]  # a fourth of 4, then two for the only arm


def test_a_trial_while_nobody_asks_spares_a_request() -> None:
    kept = Polar({"a": 1}, 1, fixed(4))
    kept.tried()
    assert scouted(kept, 4) == [0, 1, 2]
    late = Polar({"a": 1}, 1, fixed(4), served=4)
    late.tried()
    assert scouted(late, 3) == []


def test_who_was_served_before_is_not_scouted_with_again() -> None:
    assert scouted(Polar({"a": 1}, 1, fixed(4), served=3), 2) == [0, 1]
    assert scouted(Polar({"a": 1}, 1, fixed(4), served=20), 20) == [12, 13]


def test_without_scouting_nothing_is_forced() -> None:
    assert scouted(polar(), 20) == []
    assert scouted(Polar({"a": 1}, 1, Pace(scouting=4, pulls=0)), 40) == [0, 1, 2, 3]


def best_of(means: Array, chosen: Sequence[int], floor: Array) -> float:
    return float(np.maximum(means[:, chosen].max(axis=1), floor).sum())


def test_a_hundred_arms_and_a_window_of_256_are_chosen_from_as_in_the_plain_way() -> None:
    rng = np.random.default_rng(0)
    names = tuple(f"{arm:03d}" for arm in range(100))
    asked = [
        Request(names, rng.random(100), np.zeros(100), np.zeros(100), np.full(100, 0.1), without=0.5)
        for _ in range(EPOCH)
    ]
    kept = Polar(dict.fromkeys(names, 1), 10, silent(fixed()))
    for each in asked:
        kept.after(each)
    means = np.array([each.means for each in asked])
    floor = np.maximum(means.max(axis=1) - 0.1, 0.5)
    chosen: list[int] = []
    for _ in range(10):
        best = [best_of(means, [*chosen, arm], floor) for arm in range(100)]
        chosen.append(int(np.argmax(best)))
    kept_ones = [int(name) for name in kept.resident]
    assert len(kept_ones) == 10
    assert best_of(means, kept_ones, floor) >= best_of(means, chosen, floor)
