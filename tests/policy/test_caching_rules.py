"""The textbook rules, EdgeLoRA's, and the one that knows what comes."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.policy.caching_rules import FIFO, LFU, LRU, Belady, CostAware, EdgeLoRA, Static, rule
from edge_rag.policy.demand import Request
from edge_rag.policy.residency import Polar, Residency

EQUAL = dict.fromkeys("abcd", 1)
COSTS = {"a": 0.1, "b": 0.1, "c": 0.5, "d": 0.1}


def asked(used: str, **means: float) -> Request:
    """All arms are candidates; of each the mean, 0 unless it is said, and what loading costs."""
    names = tuple("abcd")
    values = np.array([means.get(name, 0.0) for name in names])
    costs = np.array([COSTS[name] for name in names])
    return Request(names, values, np.zeros(4), np.zeros(4), costs, without=0.0, used=used)


def after(kept: Residency, trace: str) -> frozenset[str]:
    """What is resident after these arms were used; '-' stands for none."""
    for arm in trace:
        kept.after(asked("" if arm == "-" else arm))
    return kept.resident


def page_ins(kept: Residency, trace: str) -> int:
    missed = 0
    for arm in trace:
        missed += arm not in kept.resident
        kept.after(asked(arm))
    return missed


def test_lru_lets_the_least_recently_used_go() -> None:
    kept = LRU(EQUAL, 2)
    assert after(kept, "aba-c") == {"a", "c"}
    assert kept.order == ("a", "c")


def test_fifo_lets_the_first_that_came_go_however_often_it_was_used() -> None:
    assert after(FIFO(EQUAL, 2), "abaac") == {"b", "c"}
    assert after(FIFO(EQUAL, 2), "abcab") == {"a", "b"}


def test_lfu_lets_the_least_often_used_go_and_remembers_uses() -> None:
    assert after(LFU(EQUAL, 2), "aabc") == {"a", "c"}
    assert after(LFU(EQUAL, 2), "aabcbd") == {"b", "d"}
    assert after(LFU(EQUAL, 2), "bbacac") == {"a", "c"}


def test_cost_aware_lru_keeps_what_is_dear_but_not_for_ever() -> None:
    assert after(CostAware(EQUAL, 2), "cab") == {"c", "b"}
    assert after(CostAware(EQUAL, 2), "c" + "abd" * 3) == {"b", "d"}


def test_cost_aware_lru_counts_what_a_byte_costs() -> None:
    sizes = {"a": 1, "b": 1, "c": 8, "d": 1}
    assert after(CostAware(sizes, 10), "cabd") == {"a", "b", "d"}


def test_several_leave_for_a_large_one() -> None:
    assert after(LRU({"a": 2, "b": 2, "c": 2, "d": 4}, 6), "abcd") == {"c", "d"}


def test_static_keeps_what_was_used_most_for_each_byte_in_the_beginning_for_good() -> None:
    kept = Static({"a": 1, "b": 1, "c": 2, "d": 1}, 2, epoch=6)
    assert after(kept, "dcb-b") == {"d"} | {"b"}
    assert after(kept, "c") == {"b", "d"}  # for its two bytes, c was used no more than d for one
    assert after(kept, "cccc") == {"b", "d"}
    assert kept.order == ("d", "b")


def test_edgelora_takes_a_resident_one_of_the_three_best_and_loads_the_best_when_there_is_none() -> None:
    kept = EdgeLoRA(EQUAL, 1)
    likes = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6}
    assert kept.forced(asked("", **likes), -math.inf) == "a"
    kept.after(asked("d"))
    assert kept.forced(asked("", **likes), -math.inf) == "a"
    kept.after(asked("c"))
    assert kept.forced(asked("", **likes), -math.inf) == "c"


def test_edgelora_takes_the_better_one_of_two_that_are_resident() -> None:
    kept = EdgeLoRA(EQUAL, 2)
    after(kept, "bc")
    assert kept.forced(asked("", a=0.9, b=0.7, c=0.8), 0) == "c"


def test_edgelora_is_optimistic_and_names_nothing_when_there_is_no_candidate() -> None:
    none = np.zeros(0)
    assert EdgeLoRA(EQUAL, 1).forced(Request((), none, none, none, none, without=0.0), 0) == ""
    unsure = Request(("a", "b"), np.array([0.5, 0.2]), np.array([0.1, 0.9]), np.zeros(2), np.zeros(2), without=0.0)
    assert EdgeLoRA(EQUAL, 1).forced(unsure, 0) == "b"
    assert EdgeLoRA(EQUAL, 1, alpha=0.1).forced(unsure, 0) == "a"


@pytest.mark.parametrize("name", ["lru", "lfu", "fifo", "cost-aware", "static", "polar"])
def test_other_rules_leave_the_choice_to_the_router(name: str) -> None:
    assert rule(name, EQUAL, 2, served=1000).forced(asked("", a=0.9), math.inf) == ""


def fewest(trace: str, budget: int) -> int:
    """The fewest page-ins there can be, by trying everything: after one any arm may leave, the new one too."""
    costs: dict[frozenset[str], int] = {frozenset(): 0}
    for arm in trace:
        now: dict[frozenset[str], int] = {}
        for held, cost in costs.items():
            missed = arm not in held
            options = (
                [held]
                if not missed
                else map(frozenset, itertools.combinations(held | {arm}, min(budget, len(held) + 1)))
            )
            for option in [*options, held]:
                now[option] = min(now.get(option, 99), cost + missed)
        costs = now
    return min(costs.values())


traces = st.text("abcd", max_size=12)


@given(traces, st.integers(1, 3))
def test_belady_has_the_fewest_page_ins_there_can_be(trace: str, budget: int) -> None:
    assert page_ins(Belady(EQUAL, budget, trace), trace) == fewest(trace, budget)


@given(traces, st.integers(1, 3), st.sampled_from([LRU, FIFO, LFU, CostAware]))
def test_no_rule_has_fewer_page_ins_than_belady(trace: str, budget: int, other: type[Residency]) -> None:
    assert page_ins(other(EQUAL, budget), trace) >= page_ins(Belady(EQUAL, budget, trace), trace)


def test_belady_does_not_let_in_what_is_used_again_later_than_the_others() -> None:
    assert after(Belady(EQUAL, 2, "abcab"), "abc") == {"a", "b"}


def test_rules_are_made_by_name_with_what_they_need() -> None:
    kept = rule("polar+", EQUAL, 2, epoch=4, hope=0.5, served=2)
    assert isinstance(kept, Polar)
    after(kept, "aabb")
    assert kept.epochs == 1
    assert isinstance(rule("static", EQUAL, 1, epoch=1), Static)
    assert after(rule("static", EQUAL, 1, epoch=1), "ab") == {"a"}
