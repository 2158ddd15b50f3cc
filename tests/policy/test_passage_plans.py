"""Exact, spliced or recomputed: what is predicted to be sooner, and what is allowed at all."""

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rag.policy.assembly import Candidate, plan_passages, predicted
from edge_rag.policy.costs import Costs
from edge_rag.records import KVSource, PassagePlan

SLOW = Costs(token=5e-3, step=2e-2, assemble=5e-5, read=1e-9)  # a CPU
FAST = Costs(token=2e-5, step=1e-2, assemble=5e-5, read=1e-9)  # a GPU that reads prompts faster than it takes KV
SOURCES: tuple[KVSource, ...] = get_args(KVSource)

sources = st.sampled_from([source for source in SOURCES if source != "new"])
tokens = st.integers(1, 400)
links = st.integers(0, 64)
costs = st.builds(
    Costs,
    token=st.floats(0, 1e-2),
    step=st.floats(0, 0.1),
    assemble=st.floats(0, 1e-2),
    read=st.floats(0, 1e-8),
)


@st.composite
def some_candidates(draw: st.DrawFn) -> list[Candidate]:
    """Some passages, of which those on the SSD must be read."""
    drawn = draw(st.lists(st.tuples(tokens, sources, st.integers(0, 10_000_000)), max_size=6))
    return [
        Candidate(chunk_id, size, source, read if source == "ssd" else 0)
        for chunk_id, (size, source, read) in enumerate(drawn, start=1)
    ]


def how(plans: tuple[PassagePlan, ...]) -> list[tuple[str, str, int]]:
    return [(plan.how, plan.source, plan.link) for plan in plans]


def seconds(candidates: list[Candidate], plans: tuple[PassagePlan, ...], costs: Costs) -> float:
    """What a plan takes when all its passages are kept: what is loaded, what is decoded, one decode more for seams."""
    total = costs.step if any(plan.link for plan in plans) else 0.0
    for candidate, plan in zip(candidates, plans, strict=True):
        if plan.how == "recompute":
            total += costs.prefill_time(plan.tokens)
        else:
            total += costs.load_time(plan.tokens, candidate.bytes) + costs.prefill_time(plan.link)
    return total


# --- always ----------------------------------------------------------------------------------------------------------


@given(some_candidates(), links, costs, st.booleans(), st.booleans())
def test_every_passage_gets_a_plan_that_makes_sense(candidates, link, costs, splicing, behind_prefix) -> None:
    plans = plan_passages(candidates, splicing=splicing, link=link, costs=costs, behind_prefix=behind_prefix)
    assert [(p.chunk_id, p.tokens) for p in plans] == [(c.chunk_id, c.tokens) for c in candidates]
    for candidate, plan in zip(candidates, plans, strict=True):
        assert plan.link == (link if plan.how == "splice" else 0)
        assert plan.link < plan.tokens
        expected = "new" if candidate.source == "none" else candidate.source
        assert plan.source == ("none" if plan.how == "recompute" else expected)


@given(some_candidates(), links, costs, st.booleans())
def test_nothing_is_spliced_when_splicing_is_off(candidates, link, costs, behind_prefix) -> None:
    plans = plan_passages(candidates, splicing=False, link=link, costs=costs, behind_prefix=behind_prefix)
    assert {plan.how for plan in plans[:1]} <= {"exact", "recompute"}
    assert {plan.how for plan in plans[1:]} <= {"recompute"}


@given(some_candidates(), links, costs, st.booleans())
def test_only_the_first_passage_behind_the_prefix_is_exact_and_it_is_never_spliced(
    candidates, link, costs, splicing
) -> None:
    behind = plan_passages(candidates, splicing=splicing, link=link, costs=costs, behind_prefix=True)
    assert all(plan.how != "splice" for plan in behind[:1])
    assert all(plan.how != "exact" for plan in behind[1:])
    later = plan_passages(candidates, splicing=splicing, link=link, costs=costs, behind_prefix=False)
    assert all(plan.how != "exact" for plan in later)


@settings(max_examples=300)
@given(some_candidates(), links, costs, st.booleans(), st.booleans())
def test_a_plan_is_never_slower_than_plain_prefill_once_its_passages_are_kept(
    candidates, link, costs, splicing, behind_prefix
) -> None:
    plans = plan_passages(candidates, splicing=splicing, link=link, costs=costs, behind_prefix=behind_prefix)
    plain = costs.prefill_time(sum(candidate.tokens for candidate in candidates))
    assert seconds(candidates, plans, costs) <= plain * (1 + 1e-9) + 1e-12


@given(some_candidates(), links, st.booleans())
def test_where_reading_is_cheap_everything_is_recomputed(candidates, link, behind_prefix) -> None:
    plans = plan_passages(candidates, splicing=True, link=link, costs=FAST, behind_prefix=behind_prefix)
    assert {plan.how for plan in plans} <= {"recompute"}


# --- examples --------------------------------------------------------------------------------------------------------


def test_kept_passages_are_loaded_the_first_exactly_the_others_moved() -> None:
    candidates = [Candidate(7, 200, "ram"), Candidate(8, 200, "ssd", 2_000_000), Candidate(9, 200, "none")]
    plans = plan_passages(candidates, splicing=True, link=4, costs=SLOW)
    assert how(plans) == [("exact", "ram", 0), ("splice", "ssd", 4), ("splice", "new", 4)]


def test_behind_a_restored_beginning_the_first_is_moved_too() -> None:
    plans = plan_passages([Candidate(7, 200, "ram")], splicing=True, link=4, costs=SLOW, behind_prefix=False)
    assert how(plans) == [("splice", "ram", 4)]


def test_a_passage_not_longer_than_its_link_is_recomputed() -> None:
    candidates = [Candidate(1, 200, "ram"), Candidate(2, 16, "ram"), Candidate(3, 200, "ram")]
    plans = plan_passages(candidates, splicing=True, link=16, costs=SLOW)
    assert how(plans) == [("exact", "ram", 0), ("recompute", "none", 0), ("splice", "ram", 16)]


def test_a_slow_disk_makes_its_passage_recomputed_and_leaves_the_one_in_ram() -> None:
    slow_disk = Costs(token=5e-3, step=2e-2, assemble=5e-5, read=1e-6)
    candidates = [Candidate(1, 100, "ssd", 2_000_000), Candidate(2, 100, "ram")]
    plans = plan_passages(candidates, splicing=True, link=4, costs=slow_disk)
    assert how(plans) == [("recompute", "none", 0), ("splice", "ram", 4)]


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        pytest.param(2, "recompute", id="the seam's decode costs more than is saved"),
        pytest.param(0, "splice", id="without links there is no seam to decode"),
    ],
)
def test_seams_must_earn_the_decode_that_mends_them(link: int, expected: str) -> None:
    dear = Costs(token=1e-3, step=0.5, assemble=1e-5, read=0.0)
    plans = plan_passages([Candidate(1, 50, "ram"), Candidate(2, 50, "ram")], splicing=True, link=link, costs=dear)
    assert [plan.how for plan in plans] == ["exact", expected]


def test_several_passages_earn_together_the_decode_that_mends_their_seams() -> None:
    dear = Costs(token=1e-3, step=0.1, assemble=0.0, read=0.0)
    plans = [
        [plan.how for plan in plan_passages([Candidate(i, 64, "ram") for i in range(count)],
                                            splicing=True, link=4, costs=dear)]
        for count in (2, 3)
    ]  # fmt: skip
    assert plans == [["exact", "recompute"], ["exact", "splice", "splice"]]


def test_loading_that_saves_nothing_is_not_done() -> None:
    even = Costs(token=1e-3, step=0.0, assemble=1e-3, read=0.0)
    assert how(plan_passages([Candidate(1, 50, "ram")], splicing=True, link=0, costs=even)) == [
        ("recompute", "none", 0)
    ]


def test_no_passages_need_no_plan() -> None:
    assert plan_passages([], splicing=True, link=4, costs=SLOW) == ()


# --- what is predicted -----------------------------------------------------------------------------------------------


@given(some_candidates(), links, costs, st.booleans())
def test_what_is_kept_is_predicted_as_loaded_and_what_is_not_as_read(candidates, link, costs, splicing) -> None:
    plans = plan_passages(candidates, splicing=splicing, link=link, costs=costs)
    new = sum(candidate.tokens for candidate in candidates if candidate.source == "none")
    kept = [candidate for candidate in candidates if candidate.source != "none"]
    of_kept = tuple(plan for candidate, plan in zip(candidates, plans, strict=True) if candidate.source != "none")
    seam = costs.step if any(plan.link for plan in plans) and not any(plan.link for plan in of_kept) else 0.0
    expected = costs.prefill_time(new) + seconds(kept, of_kept, costs) + seam
    assert predicted(candidates, plans, costs) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_passage_that_is_computed_now_takes_as_long_as_reading_it() -> None:
    new, kept = [[Candidate(7, 200, source)] for source in ("none", "ram")]
    plans = [plan_passages(each, splicing=True, link=4, costs=SLOW) for each in (new, kept)]
    assert [plan.source for (plan,) in plans] == ["new", "ram"]
    assert predicted(new, plans[0], SLOW) == pytest.approx(200 * SLOW.token)
    assert predicted(kept, plans[1], SLOW) == pytest.approx(200 * SLOW.assemble)


def test_seams_are_one_decode_and_bytes_on_the_ssd_are_read() -> None:
    candidates = [Candidate(7, 200, "ram"), Candidate(8, 200, "ssd", 2_000_000), Candidate(9, 100, "ram")]
    plans = plan_passages(candidates, splicing=True, link=4, costs=SLOW)
    loaded = 500 * SLOW.assemble + 2_000_000 * SLOW.read
    assert predicted(candidates, plans, SLOW) == pytest.approx(loaded + 8 * SLOW.token + SLOW.step)


def test_nothing_takes_no_time() -> None:
    assert predicted([], (), SLOW) == 0
