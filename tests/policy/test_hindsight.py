"""Logged decisions gone through with other adapters in memory: counted by hand, and against what any rule can reach."""

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.errors import InputError
from edge_rag.policy.caching_rules import LRU, RULES, Belady, EdgeLoRA, rule
from edge_rag.policy.demand import Request
from edge_rag.policy.hindsight import Account, Keeping, Moment, Replayed, Way, as_it_was, without_adapters
from edge_rag.policy.residency import Residency

NAMES = ("a", "b", "c")
SIZES = dict.fromkeys(NAMES, 10)
PAGE_IN = 0.25


def moment(
    means: dict[str, float],
    *,
    used: str = "",
    plain: float = 0.5,
    price: float = 0.25,
    page_in: float = PAGE_IN,
    paid: float = 0.125,
    hit: bool = False,
    probabilities: Sequence[float] | None = None,
) -> Moment:
    """A decision between plain retrieval, which costs `price`, and adapters with these means, which cost loading."""
    count = len(means)
    request = Request(
        arms=tuple(means),
        means=np.array(list(means.values())),
        widths=np.full(count, 0.1),
        here=np.zeros(count),
        away=np.full(count, page_in),
        without=plain - price,
        used=used,
    )
    even = [1 / (1 + count)] * (1 + count)
    place = 1 + list(means).index(used) if used else 0
    return Moment(request, place, paid, hit, (plain, *means.values()), tuple(probabilities or even))


def only(name: str, page_in: float = PAGE_IN) -> Moment:
    """A decision for which one adapter is by far the best."""
    return moment({each: 1.0 if each == name else 0.0 for each in NAMES}, page_in=page_in)


def gone_through(way: Way, moments: Iterable[Moment]) -> Replayed:
    account = Account("way", way)
    for each in moments:
        account.take(each, None)
    return account.result()


class Scripted(Residency):
    """Says beforehand what is resident after each request, and is told what was used."""

    def __init__(self, *sets: str) -> None:
        super().__init__(SIZES, 1000)
        self._sets = [frozenset(each) for each in sets]
        self.told: list[str] = []

    def _notice(self, request: Request) -> None:
        self.told.append(request.used)
        self.resident = self._sets[len(self.told) - 1]


# --- what a way takes ------------------------------------------------------------------------------------------------


def test_without_adapters_every_answer_is_a_plain_one() -> None:
    taken = without_adapters(moment({"a": 1.0}, used="a", plain=0.75, price=0.5))
    assert taken == ([1.0, 0.0], 0.75, 0.25, False, False, 0)


@pytest.mark.parametrize(("hit", "loads"), [(True, 0), (False, 1)])
def test_as_it_was_an_adapter_cost_what_it_cost_then(hit: bool, loads: int) -> None:
    was = moment({"a": 0.5, "b": 0.75}, used="b", paid=0.125, hit=hit, probabilities=[0.5, 0.25, 0.25])
    assert as_it_was(was) == ((0.5, 0.25, 0.25), 0.75, 0.625, True, hit, loads)


def test_as_it_was_plain_retrieval_used_no_adapter() -> None:
    was = moment({"a": 1.0}, plain=0.75, paid=0.25, hit=True, probabilities=[0.5, 0.5])
    assert as_it_was(was) == ((0.5, 0.5), 0.75, 0.5, False, False, 0)


def test_the_best_mean_less_price_is_taken_with_what_is_resident() -> None:
    way = Keeping(Scripted("b", "b", "b", ""))
    means = {"a": 0.9, "b": 0.8}
    assert way(moment(means)) == (
        [0.0, 1.0, 0.0],
        0.9,
        0.9 - PAGE_IN,
        True,
        False,
        2,
    )  # nothing is there: the better one
    assert way(moment(means)) == ([0.0, 0.0, 1.0], 0.8, 0.8, True, True, 0)
    assert way(moment(means, plain=1.0, price=0.125)) == ([1.0, 0.0, 0.0], 1.0, 0.875, False, False, 0)
    assert way(moment(means, page_in=0.0)) == ([0.0, 1.0, 0.0], 0.9, 0.9, True, False, 1)


def test_of_equals_plain_retrieval_is_taken_then_a_resident_adapter_then_the_first() -> None:
    rule = Scripted("b", "b", "b")
    way = Keeping(rule)
    way(moment({"a": 0.5, "b": 0.5}, plain=0.0, page_in=0.0))
    way(moment({"a": 0.5, "b": 0.5}, plain=0.0, page_in=0.0))
    way(moment({"a": 0.5, "b": 0.5}, plain=0.5, price=0.0, page_in=0.0))
    assert rule.told == ["a", "b", ""]


def test_a_decision_without_adapters_is_gone_through() -> None:
    assert Keeping(Scripted("", ""))(moment({})) == ([1.0], 0.5, 0.25, False, False, 0)


def test_everything_that_comes_into_memory_is_a_page_in_and_nothing_counts_twice() -> None:
    way = Keeping(Scripted("bc", "bca", "a", "ab", "ab"))
    loads = [way(only(name)).loads for name in "aaabb"]
    assert loads == [
        3,  # a for the answer, b and c because the rule wants them
        1,  # a for the answer; it stays
        0,  # b and c go
        1,  # b for the answer; it stays
        0,
    ]


def test_a_rule_may_load_when_no_adapter_answers() -> None:
    assert Keeping(Scripted("ab"))(moment({"a": 0.0}, plain=1.0)).loads == 2


def test_a_rule_with_a_choice_of_its_own_makes_it_and_no_trial_is_made() -> None:
    resident = {"a": 0.5, "b": 0.6}
    edgelora = Keeping(EdgeLoRA(SIZES, 10))
    assert edgelora(moment(resident, plain=0.9)).wanted == [0.0, 0.0, 1.0]  # it knows of no plain retrieval
    assert edgelora(moment({"a": 0.5, "b": 0.4})).wanted == [0.0, 0.0, 1.0]  # nor loads what is a little better
    polar = Keeping(rule("polar+", SIZES, 30))
    assert polar(moment(resident, plain=0.9, page_in=0.0)).wanted == [1.0, 0.0, 0.0]


# --- sums ------------------------------------------------------------------------------------------------------------


def test_lru_is_counted_by_hand() -> None:
    found = gone_through(Keeping(LRU(SIZES, 20)), [only(name) for name in "abacab"])
    # a and b are loaded, a hits, c takes the place of b, a hits, b takes that of c
    assert (found.decisions, found.used, found.hits, found.page_ins) == (6, 6, 2, 4)
    assert found.utility == pytest.approx(6 - 4 * PAGE_IN)
    assert found.quality == 1.0


def test_what_answers_were_worth_is_estimated_beside() -> None:
    account = Account("lru", Keeping(LRU(SIZES, 20)))
    account.take(moment({"a": 1.0, "b": 0.0}, used="a", probabilities=[0.25, 0.5, 0.25]), 0.75)
    account.take(moment({"a": 1.0, "b": 0.0}, used="b", probabilities=[0.25, 0.5, 0.25]), 0.25)
    account.take(moment({"a": 1.0, "b": 0.0}, used="b", probabilities=[0.25, 0.5, 0.25]), None)
    found = account.result(clip=1.5)
    assert (found.policy, found.decisions, found.rewards.judged, found.rewards.clipped) == ("lru", 3, 2, 1)
    values = {each.method: each.value for each in found.rewards.estimates}
    assert values == {
        "ips": pytest.approx(1.5 * 0.75 / 2),
        "snips": 0.75,
        "dr": pytest.approx((1.0 + 1.5 * (0.75 - 1.0) + 1.0) / 2),
        "direct": 1.0,
        "matched": 0.75,
    }
    assert account.result().rewards.clipped == 0


def test_what_was_done_is_worth_its_rewards_however_it_was_drawn() -> None:
    account = Account("as it was", as_it_was)
    for used, reward in [("a", 1.0), ("b", 0.5), ("", 0.0)]:
        account.take(moment({"a": 1.0, "b": 0.0}, used=used, probabilities=[0.25, 0.625, 0.125]), reward)
    assert [each.value for each in account.result().rewards.estimates[:2]] == [pytest.approx(0.5)] * 2


def test_nothing_comes_of_nothing() -> None:
    found = gone_through(without_adapters, [])
    assert (found.decisions, found.utility, found.quality, found.page_ins) == (0, 0.0, 0.0, 0)


def test_an_arm_that_was_chosen_against_all_odds_is_an_error() -> None:
    account = Account("way", without_adapters)
    with pytest.raises(InputError):
        account.take(moment({"a": 1.0}, used="a", probabilities=[1.0, 0.0]), 1.0)


numbers = st.floats(0, 1)
moments = st.lists(
    st.builds(
        moment,
        st.dictionaries(st.sampled_from(NAMES), numbers, max_size=3),
        plain=numbers,
        price=numbers,
        page_in=numbers,
    ),
    max_size=30,
)
free = st.lists(st.sampled_from(NAMES).map(lambda name: only(name, page_in=0.0)), max_size=40)
budgets = st.sampled_from([0, 10, 20, 30])


@given(moments, budgets, st.sampled_from(sorted(RULES.keys() - {"edgelora"})))
def test_no_rule_is_worse_than_none_nor_better_than_having_all_in_memory(
    log: list[Moment], budget: int, name: str
) -> None:
    found = gone_through(Keeping(rule(name, SIZES, budget, epoch=5)), log)
    least = gone_through(without_adapters, log)
    most = sum(max(each.request.without, *(each.request.means - each.request.here), -1.0) for each in log)
    assert least.utility - 1e-9 <= found.utility <= most + 1e-9
    assert found.hits + found.page_ins >= found.used >= found.hits
    assert budget or found.page_ins == found.used


@given(free, budgets)
def test_lru_never_loads_less_than_the_rule_that_knows_what_comes(log: list[Moment], budget: int) -> None:
    coming = [each.request.arms[int(each.request.means.argmax())] for each in log]
    lru, belady = Keeping(LRU(SIZES, budget)), Keeping(Belady(SIZES, budget, coming))
    assert gone_through(lru, log).page_ins >= gone_through(belady, log).page_ins
    assert gone_through(Keeping(LRU(SIZES, 30)), log).page_ins == len(set(coming))
