"""What another way to choose would have got, against worlds in which that is known."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.errors import InputError
from edge_rag.policy.offline import Estimate, Evaluation, Judged, Method, effective, evaluate, judge

Array = npt.NDArray[np.float64]

ALL: tuple[Method, ...] = ("ips", "snips", "dr", "direct", "matched")

# A world of three kinds of questions and three arms: how likely an answer is right, the ways that choose, [kind, arm].
QUALITY = np.array([[0.9, 0.5, 0.1], [0.2, 0.7, 0.4], [0.3, 0.3, 0.8]])
KINDS = np.array([0.5, 0.3, 0.2])
DRAWN = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.7, 0.2]])
ALIKE = np.full((3, 3), 1 / 3)
CERTAIN = np.eye(3)[[1, 2, 1]]
WANTED = np.array([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0], [0.0, 0.2, 0.8]])
OTHER = np.eye(3)[[0, 1, 2]]
WRONG = np.array([[0.1, 0.1, 0.9], [0.9, 0.2, 0.2], [0.8, 0.8, 0.1]])


def true_value(way: Array) -> float:
    return float((KINDS[:, None] * way * QUALITY).sum())


def log(count: int, seed: int, *, drawn: Array, wanted: Array, model: Array = QUALITY) -> list[Judged]:
    """A log of that world whose arms were drawn with `drawn`, and what it says of the way `wanted`."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(3, size=count, p=KINDS)
    arms = (rng.random(count)[:, None] > drawn[kinds].cumsum(axis=1)).sum(axis=1).clip(0, 2)
    rewards = (rng.random(count) < QUALITY[kinds, arms]).astype(float)
    lists = drawn.tolist(), model.tolist(), wanted.tolist()
    return [
        judge(reward, arm, lists[0][kind], lists[1][kind], lists[2][kind])
        for kind, arm, reward in zip(kinds.tolist(), arms.tolist(), rewards.tolist(), strict=True)
    ]


def by_method(evaluation: Evaluation) -> dict[Method, Estimate]:
    return {estimate.method: estimate for estimate in evaluation.estimates}


class Tries(NamedTuple):
    """What a method said in several logs of one world: values [n] and standard errors [n]."""

    values: Array
    errors: Array

    def covers(self, truth: float) -> float:
        """How often the truth is within two standard errors."""
        return float((abs(self.values - truth) <= 2 * self.errors).mean())

    def spread(self) -> float:
        """The standard error of the mean of the values."""
        return float(self.values.std(ddof=1) / math.sqrt(len(self.values)))


def tries(drawn: Array, wanted: Array, model: Array = QUALITY, clip: float = math.inf) -> dict[Method, Tries]:
    found = [
        by_method(evaluate(log(300, seed, drawn=drawn, wanted=wanted, model=model), clip=clip)) for seed in range(100)
    ]
    return {
        method: Tries(
            np.array([each[method].value for each in found], float),
            np.array([each[method].error for each in found], float),
        )
        for method in ALL
    }


# --- worlds in which the truth is known ------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [WANTED, OTHER], ids=["drawing", "certain"])
@pytest.mark.parametrize("method", ["ips", "snips", "dr"])
def test_what_was_drawn_by_chance_tells_the_value_of_another_way(method: Method, wanted: Array) -> None:
    found, truth = tries(DRAWN, wanted)[method], true_value(wanted)
    assert abs(found.values.mean() - truth) < 3.5 * found.spread()
    assert 0.88 <= found.covers(truth) <= 1.0
    assert abs(true_value(DRAWN) - truth) > 10 * found.spread()  # that of what was done is another


@pytest.mark.parametrize("method", ["ips", "snips", "dr"])
def test_standard_errors_are_as_large_as_the_values_scatter(method: Method) -> None:
    found = tries(DRAWN, WANTED)[method]
    assert found.errors.mean() == pytest.approx(found.values.std(ddof=1), rel=0.25)


def test_doubly_robust_is_right_when_the_expectations_are_wrong_and_sharper_when_they_are_right() -> None:
    truth = true_value(OTHER)
    wrong, right = tries(DRAWN, OTHER, WRONG), tries(DRAWN, OTHER, QUALITY)
    assert abs(wrong["dr"].values.mean() - truth) < 3.5 * wrong["dr"].spread()
    assert abs(wrong["direct"].values.mean() - truth) > 0.3
    assert abs(right["direct"].values.mean() - truth) < 3.5 * right["direct"].spread()
    assert right["dr"].errors.mean() < 0.8 * right["ips"].errors.mean()


@pytest.mark.parametrize("wanted", [WANTED, OTHER], ids=["drawing", "certain"])
def test_matched_decisions_tell_the_value_when_arms_were_drawn_alike(wanted: Array) -> None:
    found, truth = tries(ALIKE, wanted)["matched"], true_value(wanted)
    assert abs(found.values.mean() - truth) < 3.5 * found.spread()
    assert 0.88 <= found.covers(truth) <= 1.0


def test_matched_decisions_mislead_when_they_were_not() -> None:
    found, truth = tries(DRAWN, OTHER)["matched"], true_value(OTHER)
    assert abs(found.values.mean() - truth) > 5 * found.spread()


def test_clipping_scatters_less_and_errs() -> None:
    clipped, whole, truth = tries(DRAWN, OTHER, clip=1.5)["ips"], tries(DRAWN, OTHER)["ips"], true_value(OTHER)
    assert clipped.values.std() < 0.7 * whole.values.std()
    assert clipped.values.mean() < truth - 0.1
    found = evaluate(log(300, 0, drawn=DRAWN, wanted=OTHER), clip=1.5)
    ratios = [each.wanted / each.logged for each in log(300, 0, drawn=DRAWN, wanted=OTHER)]
    assert found.clipped == sum(ratio > 1.5 for ratio in ratios) > 0


# --- what is known for sure ------------------------------------------------------------------------------------------


def test_what_was_done_is_worth_the_mean_of_its_rewards() -> None:
    judged = log(200, 1, drawn=DRAWN, wanted=DRAWN)
    mean = np.mean([each.reward for each in judged])
    error = np.std([each.reward for each in judged], ddof=1) / math.sqrt(200)
    found = by_method(evaluate(judged))
    for method in ("ips", "snips"):
        assert found[method].value == pytest.approx(mean)
        assert found[method].error == pytest.approx(error)
        assert found[method].size == pytest.approx(200)
        assert found[method].sound


def test_of_two_certain_ways_the_matched_decisions_count_alike() -> None:
    judged = log(200, 2, drawn=CERTAIN, wanted=np.eye(3)[[1, 2, 0]])
    rewards = [each.reward for each in judged if each.wanted]
    matched = by_method(evaluate(judged))["matched"]
    assert 0 < len(rewards) < 200
    assert matched.value == pytest.approx(np.mean(rewards))
    assert matched.error == pytest.approx(np.std(rewards, ddof=1) / math.sqrt(len(rewards)))
    assert matched.size == pytest.approx(len(rewards))


def test_values_worked_out_by_hand() -> None:
    judged = [
        judge(1.0, 0, [0.5, 0.5], [0.6, 0.2], [1.0, 0.0]),  # weight 2
        judge(0.5, 1, [0.8, 0.2], [0.4, 0.9], [0.9, 0.1]),  # weight 1/2
        judge(0.0, 1, [0.5, 0.5], [0.1, 0.3], [1.0, 0.0]),  # weight 0
    ]
    found = by_method(evaluate(judged))
    assert found["ips"].value == pytest.approx((2.0 + 0.25 + 0.0) / 3)
    assert found["snips"].value == pytest.approx(2.25 / 2.5)
    assert found["direct"].value == pytest.approx((0.6 + 0.45 + 0.1) / 3)
    assert found["dr"].value == pytest.approx(((0.6 + 2 * 0.4) + (0.45 + 0.5 * (0.5 - 0.9)) + 0.1) / 3)
    assert found["matched"].value == pytest.approx((1.0 + 0.1 * 0.5) / 1.1)
    assert found["ips"].size == found["snips"].size == found["dr"].size == pytest.approx(2.5**2 / 4.25)
    assert found["matched"].size == pytest.approx(1.1**2 / 1.01)
    assert found["direct"].size == 3


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20))
def test_the_effective_size_is_at_most_the_number_of_weights(weights: list[float]) -> None:
    size = effective(np.array(weights))
    above = sum(weight > 0 for weight in weights)
    assert min(1, above) - 1e-9 <= size <= above + 1e-9


events = st.lists(
    st.tuples(st.floats(0, 1), st.floats(0.05, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), max_size=20
)


@given(events, st.floats(0.1, 100))
def test_weighted_means_stay_within_the_rewards(found: list[tuple[float, ...]], clip: float) -> None:
    judged = [Judged(*each, possible=1.0) for each in found]
    estimates = by_method(evaluate(judged, clip=clip))
    for method in ("snips", "matched"):
        value = estimates[method].value
        if value is not None:
            assert min(each.reward for each in judged) - 1e-9 <= value <= max(each.reward for each in judged) + 1e-9
    for estimate in estimates.values():
        assert estimate.error is None or 0 <= estimate.error < math.inf


# --- honesty ---------------------------------------------------------------------------------------------------------


def test_without_chance_only_matched_and_direct_are_sound_and_the_note_says_so() -> None:
    found = evaluate(log(200, 3, drawn=CERTAIN, wanted=OTHER))
    assert found.drawn == 0
    assert {method: each.sound for method, each in by_method(found).items()} == {
        "ips": False,
        "snips": False,
        "dr": False,
        "direct": True,
        "matched": False,  # these ways never agree
    }
    assert found.note.startswith("nothing was drawn by chance")
    agreeing = evaluate(log(200, 3, drawn=CERTAIN, wanted=WANTED))
    assert [each.method for each in agreeing.estimates if each.sound] == ["direct", "matched"]


def test_choices_that_could_not_be_drawn_make_weighing_unsound() -> None:
    drawn = np.array([[0.5, 0.5, 0.0]] * 3)
    found = evaluate(log(500, 4, drawn=drawn, wanted=WANTED))
    assert found.drawn == 500
    assert found.support == pytest.approx(1 - (0.5 * 0.1 + 0.2 * 0.8), abs=0.03)
    assert found.note == f"{1 - found.support:.1%} of its choices could never have been drawn: " + (
        "ips, snips and dr are not sound"
    )
    assert [each.method for each in found.estimates if each.sound] == ["direct", "matched"]


def test_a_log_that_allows_everything_has_no_note() -> None:
    found = evaluate(log(100, 5, drawn=DRAWN, wanted=WANTED))
    assert (found.judged, found.drawn, found.support, found.note) == (100, 100, pytest.approx(1.0), "")
    assert all(each.sound for each in found.estimates)


def test_nothing_is_said_of_nothing() -> None:
    found = evaluate([])
    assert (found.judged, found.drawn, found.clipped, found.support) == (0, 0, 0, 0.0)
    assert found.note == "no answer was judged"
    assert found.estimates == tuple(Estimate(method, None, None, 0.0, False) for method in ALL)


def test_one_decision_has_a_value_and_no_error() -> None:
    found = evaluate([judge(0.75, 0, [0.5, 0.5], [0.5, 0.5], [1.0, 0.0])])
    assert {method: each.error for method, each in by_method(found).items()} == dict.fromkeys(ALL)
    assert by_method(found)["matched"].value == by_method(found)["snips"].value == 0.75


def test_ways_that_never_agree_leave_only_what_was_expected() -> None:
    found = by_method(evaluate([judge(0.75, 0, [0.5, 0.5], [0.2, 0.4], [0.0, 1.0])] * 3))
    assert {method: each.value for method, each in found.items()} == {
        **dict.fromkeys(ALL),
        "direct": pytest.approx(0.4),
    }


@pytest.mark.parametrize("probability", [0.0, -0.5, float("nan")])
def test_an_arm_that_could_not_be_chosen_was_not_chosen(probability: float) -> None:
    with pytest.raises(InputError, match="cannot have been chosen") as caught:
        judge(1.0, 1, [1.0, probability], [0.5, 0.5], [1.0, 0.0])
    assert caught.value.field == "probabilities"


@pytest.mark.parametrize("lengths", [(2, 2, 1), (2, 3, 2), (3, 2, 2)])
def test_numbers_of_other_arms_are_refused(lengths: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="arms"):
        judge(1.0, 1, *([0.5] * length for length in lengths))


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_a_clip_that_lets_nothing_count_is_refused(clip: float) -> None:
    with pytest.raises(InputError, match="above 0") as caught:
        evaluate([], clip=clip)
    assert caught.value.field == "clip"
