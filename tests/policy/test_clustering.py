"""Clusters of passages: what is asked together comes together, caps hold, and nothing that is trained is torn apart."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rag.policy.clustering import Coverage, cluster, coverage, regroup, settled, weigh, worth_training
from edge_rag.records import Asked, Cluster

TOKENS = dict.fromkeys(range(1, 25), 10)

questions = st.builds(
    Asked, weight=st.floats(0.1, 20), chunks=st.lists(st.integers(1, 24), unique=True, max_size=6).map(tuple)
)
logs = st.lists(questions, max_size=25)
caps = st.integers(2, 8)
few = settings(max_examples=12)  # Louvain takes milliseconds


def asked(*chunks: int, weight: float = 1.0) -> Asked:
    return Asked(weight=weight, chunks=chunks)


def grouped(log: list[Asked], most: int = 8, most_tokens: int = 1000, **more: object) -> list[frozenset[int]]:
    return cluster(log, TOKENS, most=most, most_tokens=most_tokens, **more)  # type: ignore[arg-type]


TWO_TOPICS = [asked(1, 2, 3), asked(2, 3, 4), asked(1, 4), asked(11, 12, 13), asked(12, 13, 14), asked(11, 14)]
TOPICS = [{1, 2, 3, 4}, {11, 12, 13, 14}]


# --- clusters --------------------------------------------------------------------------------------------------------


def test_what_is_asked_together_comes_together() -> None:
    assert sorted(grouped(TWO_TOPICS), key=min) == TOPICS


def test_there_are_no_clusters_without_questions() -> None:
    assert grouped([]) == []
    assert grouped([asked()]) == []


def test_a_topic_that_is_too_large_is_divided() -> None:
    topic = [asked(*pair) for pair in itertools.combinations(range(1, 11), 2)]
    found = grouped(topic, most=4)
    assert sorted(itertools.chain.from_iterable(found)) == list(range(1, 11))
    assert max(map(len, found)) == 4


def test_what_is_asked_most_comes_first() -> None:
    found = grouped([*TWO_TOPICS, asked(11, 12, 13, 14)])
    assert found[0] == TOPICS[1]


def test_one_passage_is_a_cluster_only_when_enough_questions_ask_for_it_alone() -> None:
    assert grouped([asked(1, weight=7.9)]) == []
    assert grouped([asked(1, weight=4.0), asked(1, weight=4.0)]) == [{1}]
    assert grouped([asked(1, weight=3.0)], alone=3.0) == [{1}]


def test_a_passage_that_is_asked_alone_and_with_others_is_with_the_others() -> None:
    assert grouped([asked(1, weight=20.0), asked(1, 2)]) == [{1, 2}]


def test_a_passage_that_is_too_long_or_gone_is_in_no_cluster() -> None:
    tokens = {1: 10, 2: 10, 3: 101}
    assert cluster([asked(1, 2, 3, 4)], tokens, most=8, most_tokens=100) == [{1, 2}]


def test_with_overlap_a_passage_serves_two_kinds_of_questions() -> None:
    log = [asked(1, 2, 3, weight=2.0), asked(3, 4, 5)]
    assert grouped(log, most=3) == [{1, 2, 3}, {4, 5}]
    assert coverage(grouped(log, most=3, overlap=True), log) == Coverage(share=1.0, whole=1.0)


@few
@given(logs, caps, st.integers(2, 8), st.booleans())
def test_caps_are_hard(log: list[Asked], most: int, tens: int, overlap: bool) -> None:
    found = grouped(log, most, 10 * tens, overlap=overlap)
    assert all(1 <= len(members) <= min(most, tens) for members in found)


@few
@given(logs, caps, st.booleans())
def test_clusters_are_of_passages_that_are_asked_for_and_each_is_in_one_or_with_overlap_in_two(
    log: list[Asked], most: int, overlap: bool
) -> None:
    counts = Counter(itertools.chain.from_iterable(grouped(log, most, overlap=overlap)))
    assert counts.keys() <= {chunk for question in log for chunk in question.chunks}
    assert max(counts.values(), default=0) <= 1 + overlap


@few
@given(logs, caps)
def test_overlap_at_most_doubles_the_clusters_and_covers_no_less(log: list[Asked], most: int) -> None:
    plain, more = grouped(log, most), grouped(log, most, overlap=True)
    assert len(more) <= 2 * len(plain)
    assert coverage(more, log).share >= coverage(plain, log).share - 1e-9


@few
@given(logs, caps)
def test_a_cluster_of_several_holds_passages_of_one_question(log: list[Asked], most: int) -> None:
    for members in grouped(log, most):
        if len(members) > 1:
            assert any(len(members & set(question.chunks)) > 1 for question in log)


@few
@given(logs, caps, st.booleans(), st.data())
def test_the_order_of_questions_and_of_their_passages_does_not_matter(
    log: list[Asked], most: int, overlap: bool, data: st.DataObject
) -> None:
    turned = [
        Asked(weight=question.weight, chunks=question.chunks[::-1]) for question in data.draw(st.permutations(log))
    ]
    assert grouped(log, most, overlap=overlap) == grouped(turned, most, overlap=overlap)


@few
@given(logs, caps)
def test_a_question_asked_twice_counts_twice(log: list[Asked], most: int) -> None:
    heavy = [Asked(weight=2 * question.weight, chunks=question.chunks) for question in log]
    assert grouped(log + log, most) == grouped(heavy, most)
    assert weigh([{1, 2, 3}], log + log) == pytest.approx(weigh([{1, 2, 3}], heavy))


# --- growing ---------------------------------------------------------------------------------------------------------


@few
@given(logs, logs, caps, st.booleans(), st.booleans())
def test_old_members_stay_in_their_clusters_and_these_in_their_order(
    log: list[Asked], more: list[Asked], most: int, first: bool, then: bool
) -> None:
    old = grouped(log, most, overlap=first)
    new = grouped(log + more, most, overlap=then, old=old)
    assert all(before <= after for before, after in zip(old, new, strict=False))
    assert len(new) >= len(old)
    assert all(len(members) <= most for members in new)


@few
@given(logs, caps)
def test_the_same_questions_again_change_nothing_where_all_are_placed(log: list[Asked], most: int) -> None:
    old = grouped(log, most)
    placed = set(itertools.chain.from_iterable(old))
    again = [question for question in log if placed.issuperset(question.chunks)]
    assert grouped(again, most, old=old) == old


def test_a_new_passage_joins_the_cluster_that_it_is_asked_with() -> None:
    old = [frozenset(topic) for topic in TOPICS]
    assert grouped([*TWO_TOPICS, asked(11, 12, 15)], old=old) == [{1, 2, 3, 4}, {11, 12, 13, 14, 15}]


def test_new_passages_form_a_new_cluster_where_the_old_is_full() -> None:
    old = [frozenset(topic) for topic in TOPICS]
    assert grouped([*TWO_TOPICS, asked(11, 15, 16)], most=4, old=old) == [*TOPICS, {15, 16}]


def test_an_old_cluster_that_is_over_a_limit_stays_as_it_is() -> None:
    old = [frozenset({1, 2, 3, 4})]
    assert grouped([asked(1, 2, 3, 4, 5)], most=3, old=old) == [{1, 2, 3, 4}]


def test_members_that_nobody_asks_for_any_more_stay() -> None:
    assert grouped([], old=[frozenset({1, 2}), frozenset({3})]) == [{1, 2}, {3}]


def test_old_clusters_are_kept_even_where_they_overlap_more_than_new_ones_may() -> None:
    old = [frozenset({1, 2}), frozenset({1, 2}), frozenset({1, 2})]
    assert grouped([asked(1, 2)], old=old, overlap=True) == old


# --- how good --------------------------------------------------------------------------------------------------------


def test_coverage_is_what_one_cluster_holds_of_each_question() -> None:
    log = [asked(1, 2, weight=3.0), asked(2, 3, 4, 5), asked(9)]
    found = coverage([{1, 2}, {3, 4}], log)
    assert found.share == pytest.approx((3 * 1 + 0.5 + 0) / 5)
    assert found.whole == pytest.approx(3 / 5)


@pytest.mark.parametrize("log", [[], [asked()], [asked(1, weight=0.0)]])
def test_coverage_of_nothing_is_nothing(log: list[Asked]) -> None:
    assert coverage([{1}], log) == Coverage(share=0.0, whole=0.0)


def test_clusters_weigh_what_they_hold_of_each_question() -> None:
    log = [asked(1, 2, weight=3.0), asked(2, 3, 4, 5), asked(9)]
    assert weigh([{1, 2}, {3, 4}, {7}], log) == [3.25, 0.5, 0.0]


@pytest.mark.parametrize(
    ("weight", "changed_at", "trained_at", "worth"),
    [
        pytest.param(8.0, 1.0, None, True, id="never trained"),
        pytest.param(7.9, 1.0, None, False, id="not asked enough"),
        pytest.param(8.0, 1.0, 2.0, False, id="trained since"),
        pytest.param(8.0, 3.0, 2.0, True, id="changed since"),
        pytest.param(7.9, 3.0, 2.0, False, id="changed since and not asked enough"),
        pytest.param(8.0, 2.0, 2.0, False, id="trained at once"),
    ],
)
def test_a_cluster_is_trained_again_only_when_it_has_changed(
    weight: float, changed_at: float, trained_at: float | None, worth: bool
) -> None:
    found = Cluster(
        id=1, members=(1,), tokens=1, weight=weight, created_at=0.0, changed_at=changed_at, trained_at=trained_at
    )
    assert worth_training(found, 8.0) is worth


@pytest.mark.parametrize(
    ("trained_at", "failure", "stays"),
    [
        pytest.param(None, "", False, id="never trained"),
        pytest.param(2.0, "no memory", False, id="trained in vain"),
        pytest.param(2.0, "", True, id="trained"),
    ],
)
def test_only_what_was_trained_has_to_stay(trained_at: float | None, failure: str, stays: bool) -> None:
    found = Cluster(
        id=1,
        members=(1,),
        tokens=1,
        weight=1.0,
        created_at=0.0,
        changed_at=3.0,
        trained_at=trained_at,
        failure=failure,
    )
    assert settled([found]) == [found] * stays


# --- starting anew ---------------------------------------------------------------------------------------------------

TORN = [frozenset({1, 2, 11, 12}), frozenset({3, 4, 13, 14})]
REST = [frozenset({21, 22})]


def regrouped(log: list[Asked], old: list[frozenset[int]], gain: float) -> list[frozenset[int]] | None:
    return regroup(log, TOKENS, old, most=4, most_tokens=1000, gain=gain)


def test_a_torn_region_is_made_anew_when_that_gains_enough() -> None:
    log = [*TWO_TOPICS, asked(21, 22)]
    gained = 1 - coverage(TORN, TWO_TOPICS).share
    found = regrouped(log, TORN + REST, gained - 1e-6)
    assert found is not None
    assert found[0] == REST[0]
    assert sorted(found[1:], key=min) == TOPICS
    assert regrouped(log, TORN + REST, gained + 1e-6) is None


def test_clusters_that_share_no_question_are_left_alone() -> None:
    assert regrouped(TWO_TOPICS, [frozenset(topic) for topic in TOPICS], 0.0) is None
    assert regrouped([], TORN, 0.0) is None


def test_loose_passages_may_come_in_when_a_region_is_made_anew() -> None:
    old = [frozenset({1, 2}), frozenset({3, 4})]
    found = regrouped([asked(1, 3, 5, weight=5.0), asked(2, 4)], old, 0.1)
    assert found is not None
    assert any(members >= {1, 3, 5} for members in found)


def test_the_region_that_gains_most_is_taken() -> None:
    pairs = [frozenset({1, 2}), frozenset({3, 4}), frozenset({11, 12}), frozenset({13, 14})]
    log = [asked(1, 3), asked(2, 4), asked(1, 2), asked(11, 13), asked(12, 14)]
    found = regroup(log, TOKENS, pairs, most=2, most_tokens=1000, gain=0.0)
    assert found is not None
    assert found[:2] == pairs[:2]
    assert sorted(found[2:], key=min) == [{11, 13}, {12, 14}]


@few
@given(logs, logs, caps, st.floats(0, 0.5))
def test_starting_anew_gains_keeps_the_caps_and_loses_no_cluster_outside(
    log: list[Asked], more: list[Asked], most: int, gain: float
) -> None:
    old = grouped(log, most)
    found = regroup(log + more, TOKENS, old, most=most, most_tokens=1000, gain=gain)
    if found is not None:
        assert coverage(found, log + more).share > coverage(old, log + more).share
        assert all(len(members) <= most for members in found)
        counts = Counter(itertools.chain.from_iterable(found))
        assert max(counts.values()) == 1


def test_all_is_made_anew_when_clusters_are_so_scattered_that_no_region_helps() -> None:
    topics = [range(first, first + 6) for first in range(1, 37, 6)]
    scattered = [frozenset(topic[place] for topic in topics) for place in range(6)]
    log = [asked(*topic) for topic in topics]
    tokens = dict.fromkeys(range(1, 37), 10)
    assert regroup(log, tokens, scattered, most=6, most_tokens=1000, gain=0.8) == [frozenset(topic) for topic in topics]
