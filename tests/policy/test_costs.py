"""Running estimates of what things cost: what is measured, how fast it counts, what is predicted from it."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.policy.costs import LARGE, OUTLIER, WEIGHT, Costs

Observe = Callable[[Costs, int, float], Costs]


def written(costs: Costs, tokens: int, seconds: float) -> Costs:
    return costs.written(tokens, seconds, dressed=False)


def dressed(costs: Costs, tokens: int, seconds: float) -> Costs:
    return costs.written(tokens, seconds, dressed=True)


KINDS: dict[str, Observe] = {
    "decoded": Costs.decoded,
    "assembled": Costs.assembled,
    "was_read": Costs.was_read,
    "written": written,
    "dressed": dressed,
}
CHANGES = {
    "decoded": {"token", "step"},
    "assembled": {"assemble"},
    "was_read": {"read"},
    "written": {"write", "words"},
    "dressed": {"dressed", "words"},
}
sizes = st.integers(0, 100_000)
seconds = st.floats(0, 100)
kinds = st.sampled_from(sorted(KINDS))
FIELDS = ("token", "step", "assemble", "read", "write", "dressed", "words")


def test_guesses_lean_towards_loading() -> None:
    costs = Costs()
    assert costs.seen == ()
    assert costs.load_time(100, 5_000_000) < costs.prefill_time(100)


@pytest.mark.parametrize(
    ("kind", "field", "cost"),
    [("decoded", "token", 0.5), ("assembled", "assemble", 1e-5), ("was_read", "read", 2e-9)],
)
def test_the_first_observation_replaces_the_guess_and_later_ones_count_a_fifth(
    kind: str, field: str, cost: float
) -> None:
    first = KINDS[kind](Costs(), 100, 100 * cost)
    assert getattr(first, field) == pytest.approx(cost)
    assert first.seen == (field,)
    second = KINDS[kind](first, 100, 200 * cost)
    assert getattr(second, field) == pytest.approx((1 - WEIGHT) * cost + WEIGHT * 2 * cost)
    assert second.seen == (field,)


@pytest.mark.parametrize(("kind", "field"), [("assembled", "assemble"), ("was_read", "read")])
def test_a_stalled_load_counts_as_a_few_times_the_estimate_only(kind: str, field: str) -> None:
    before = Costs()
    assert getattr(KINDS[kind](before, 100, 1e6), field) == pytest.approx(OUTLIER * getattr(before, field))


def test_a_small_decode_tells_what_a_decode_takes_beyond_its_tokens() -> None:
    costs = Costs().decoded(100, 1.0)
    costs = costs.decoded(LARGE - 1, 1.0)
    assert costs.token == 0.01
    assert costs.step == pytest.approx(1.0 - (LARGE - 1) * 0.01)
    assert costs.seen == ("token", "step")


def test_a_large_decode_tells_what_a_token_takes() -> None:
    costs = Costs().decoded(100, 1.0).decoded(LARGE, 2.0 * LARGE)
    assert costs.token == pytest.approx((1 - WEIGHT) * 0.01 + WEIGHT * 2.0)
    assert costs.seen == ("token",)


def test_what_a_decode_takes_as_such_is_not_counted_among_its_tokens() -> None:
    costs = Costs(token=0.01, step=1.0, seen=("token", "step"))
    assert costs.decoded(100, 3.0).token == pytest.approx((1 - WEIGHT) * 0.01 + WEIGHT * 0.02)
    guessed = Costs(token=0.01, step=1.0, seen=("token",))
    assert guessed.decoded(100, 3.0).token == pytest.approx((1 - WEIGHT) * 0.01 + WEIGHT * 0.03)


def test_tokens_are_never_for_nothing() -> None:
    costs = Costs(token=0.01, step=1.0, seen=("token", "step"))
    assert costs.decoded(100, 0.5).token == pytest.approx((1 - WEIGHT) * 0.01 + WEIGHT * 0.0005)


@given(st.floats(1e-5, 0.1), st.floats(0, 4))
def test_large_and_small_decodes_together_find_both_costs(token: float, share: float) -> None:
    """Unless nearly all of a large decode is the decode as such."""
    costs, step = Costs(), share * 500 * token
    for _ in range(200):
        costs = costs.decoded(500, step + 500 * token).decoded(4, step + 4 * token)
    assert costs.token == pytest.approx(token, rel=0.02)
    assert costs.step == pytest.approx(step, rel=0.02, abs=token)


def test_before_any_large_decode_a_small_one_is_believed() -> None:
    assert Costs().decoded(4, 0.4).token == pytest.approx(0.1)


def test_a_decode_faster_than_its_tokens_takes_no_time_of_its_own() -> None:
    assert Costs().decoded(100, 1.0).decoded(4, 0.001).step == 0.0


def test_predictions_are_sums() -> None:
    costs = Costs(token=2.0, assemble=0.5, read=0.25)
    assert costs.prefill_time(3) == 6.0
    assert costs.load_time(4, 8) == 4.0


@given(st.lists(st.tuples(kinds, sizes, seconds)))
def test_costs_are_never_negative_and_the_measured_ones_are_named_once(observed: list[tuple[str, int, float]]) -> None:
    costs = Costs()
    for kind, size, took in observed:
        before, costs = costs, KINDS[kind](costs, size, took)
        changed = [name for name in FIELDS if getattr(before, name) != getattr(costs, name)]
        assert set(changed) <= CHANGES[kind]
        assert kind != "decoded" or len(changed) <= 1
        assert set(changed) <= set(costs.seen)
    assert all(getattr(costs, name) >= 0 for name in FIELDS)
    assert len(set(costs.seen)) == len(costs.seen)
    unseen = set(FIELDS) - set(costs.seen)
    assert all(getattr(costs, name) == getattr(Costs(), name) for name in unseen)


@given(st.lists(st.floats(1e-6, 1), min_size=1))
def test_an_estimate_lies_between_the_lowest_and_the_highest_observation(took: list[float]) -> None:
    costs = Costs()
    for one in took:
        costs = costs.decoded(1000, 1000 * one)
    assert min(took) * 0.999 <= costs.token <= max(took) * 1.001


def test_an_estimate_follows_a_machine_that_became_slower() -> None:
    costs = Costs().decoded(1000, 1.0)
    for _ in range(20):
        costs = costs.decoded(1000, 3.0)
    assert costs.token == pytest.approx(0.003, rel=0.02)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_until_both_ways_to_write_were_seen_an_adapter_slows_nothing_down() -> None:
    assert Costs(write=0.1, dressed=0.5).slowdown == 0
    assert written(Costs(), 10, 1.0).slowdown == 0
    assert dressed(Costs(), 10, 5.0).slowdown == 0


def test_an_adapter_is_slower_by_the_words_of_a_usual_answer() -> None:
    costs = dressed(written(Costs(), 9, 0.9), 9, 1.8)
    assert (costs.write, costs.dressed, costs.words) == pytest.approx((0.1, 0.2, 10.0))
    assert costs.slowdown == pytest.approx(0.1 * 10)
    longer = written(costs, 59, 5.9)
    assert longer.words == pytest.approx((1 - WEIGHT) * 10 + WEIGHT * 60)
    assert longer.slowdown == pytest.approx(0.1 * longer.words)


def test_an_adapter_that_was_measured_as_quicker_saves_nothing() -> None:
    assert dressed(written(Costs(), 9, 1.8), 9, 0.9).slowdown == 0


def test_an_answer_of_one_token_says_nothing_of_writing() -> None:
    assert written(Costs(), 0, 1.0) == Costs()
    assert dressed(Costs(), -1, 0.0) == Costs()
