"""LinUCB against the textbook, two other packages, and everything that may go wrong in a long life."""

import math
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from coba.learners import LinUCBLearner
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rag.errors import InputError
from edge_rag.policy.arm_rows import ROOM
from edge_rag.policy.linucb import Bandit, Decision, Estimates, decide

Vector = npt.NDArray[np.float64]

D = 3  # dimensions where it does not matter
ARMS = ("", "a", "b")

contexts = st.lists(st.integers(-4, 4).map(lambda n: n / 4), min_size=D, max_size=D).map(np.array)
shares = st.integers(0, 8).map(lambda n: n / 8)
discounts = st.sampled_from([1.0, 0.997, 0.8])
ridges = st.sampled_from([0.25, 1.0, 3.0])


class Seen(msgspec.Struct):
    """A reward: `passed` decisions after the one before it, and told `late` decisions after it was given."""

    arm: str
    context: Vector
    reward: float
    weight: float
    passed: int
    late: int


seen = st.builds(
    Seen,
    arm=st.sampled_from(ARMS),
    context=contexts,
    reward=shares,
    weight=st.sampled_from([0.5, 1.0, 2.0]),
    passed=st.integers(0, 5),
    late=st.integers(0, 4),
)
lives = st.lists(seen, max_size=25)


def lived(life: list[Seen], **how: float) -> Bandit:
    bandit = Bandit(D, **how)
    for event in life:
        for _ in range(event.passed):
            bandit.tick()
        clock = max(0, bandit.clock - event.late)
        bandit.update(event.arm, event.context, event.reward, event.weight, clock=clock)
    return bandit


def one(bandit: Bandit, name: str, context: Vector) -> tuple[float, float]:
    estimates = bandit.estimate([name], context[None])
    return float(estimates.means[0]), float(estimates.widths[0])


def assert_same(first: Estimates, second: Estimates) -> None:
    np.testing.assert_allclose(first.means, second.means, atol=1e-12, rtol=0)
    np.testing.assert_allclose(first.widths, second.widths, atol=1e-12, rtol=0)


def solved(squares: Vector, moment: Vector, context: Vector, ridge: float = 1.0) -> tuple[float, float]:
    """Mean and width by the textbook: an inverse."""
    inverse = np.linalg.inv(ridge * np.eye(len(moment)) + squares)
    return float(context @ inverse @ moment), math.sqrt(context @ inverse @ context)


def textbook(life: list[Seen], name: str, context: Vector, *, ridge: float, discount: float) -> tuple[float, float]:
    """Everything summed up from the start, each observation with what it counts now."""
    squares, moment, clock = np.zeros((D, D)), np.zeros(D), 0
    now = sum(event.passed for event in life)
    for event in life:
        clock += event.passed
        if event.arm == name:
            weight = event.weight * discount ** (now - max(0, clock - event.late))
            squares += weight * np.outer(event.context, event.context)
            moment += weight * event.reward * event.context
    return solved(squares, moment, context, ridge)


def noise(count: int, dimensions: int, seed: int = 0) -> Vector:
    rows = np.random.default_rng(seed).normal(size=(count, dimensions))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# --- what is learned is what the textbook says -----------------------------------------------------------------------


@given(lives, contexts, ridges, discounts)
def test_estimates_are_those_of_the_textbook_inverse(
    life: list[Seen], context: Vector, ridge: float, discount: float
) -> None:
    bandit = lived(life, ridge=ridge, discount=discount)
    for name in ARMS:
        expected = textbook(life, name, context, ridge=ridge, discount=discount)
        assert one(bandit, name, context) == pytest.approx(expected, abs=1e-9, rel=1e-9)


@given(lives, contexts, discounts)
def test_fading_when_it_is_asked_for_equals_fading_after_every_decision(
    life: list[Seen], context: Vector, discount: float
) -> None:
    eager = {name: (np.zeros((D, D)), np.zeros(D)) for name in ARMS}
    for event in life:
        event.late = 0
        for _ in range(event.passed):
            eager = {name: (discount * squares, discount * moment) for name, (squares, moment) in eager.items()}
        squares, moment = eager[event.arm]
        squares += event.weight * np.outer(event.context, event.context)
        moment += event.weight * event.reward * event.context
    bandit = lived(life, discount=discount)
    for name in ARMS:
        assert one(bandit, name, context) == pytest.approx(solved(*eager[name], context), abs=1e-9)


def test_it_learns_and_chooses_as_coba_does() -> None:
    rivals, rng = 4, np.random.default_rng(5)
    actions = [tuple(int(arm == place) for place in range(rivals)) for arm in range(rivals)]
    bandit, learner, names = Bandit(6), LinUCBLearner(alpha=0.8, features=["ax"]), [str(arm) for arm in range(rivals)]
    tastes, chosen = rng.normal(size=(rivals, 6)), []
    for context in noise(400, 6, seed=6):
        estimates = bandit.estimate(names, np.tile(context, (rivals, 1)))
        decision = all_alike(estimates, alpha=0.8)
        if chosen:  # before the first reward coba knows no widths
            rows = np.array([learner._X_encoder.encode(x=tuple(context), a=action) for action in actions])
            widths = np.sqrt(np.einsum("nd,de,ne->n", rows, learner._A_inv, rows))
            np.testing.assert_allclose(estimates.means, rows @ learner._theta, atol=1e-9, rtol=0)
            np.testing.assert_allclose(estimates.widths, widths, atol=1e-9, rtol=0)
        if len(set(chosen)) == rivals:  # until then coba draws among equals
            assert learner.predict(tuple(context), actions)[0] == actions[decision.index]
        reward = float(np.clip(0.5 + 0.3 * tastes[decision.index] @ context + rng.normal() / 9, 0, 1))
        learner.learn(tuple(context), actions[decision.index], reward, 1.0)
        bandit.update(names[decision.index], context, reward)
        chosen.append(decision.index)
    assert len(set(chosen)) == rivals


@pytest.mark.parametrize("ridge", [1.0, 0.3])
def test_its_scores_are_those_of_contextualbandits(ridge: float) -> None:
    online = pytest.importorskip("contextualbandits.online", reason="it has to be compiled: no wheel")
    rivals, rng = 4, np.random.default_rng(7)
    rival = online.LinUCB(rivals, alpha=0.8, lambda_=ridge, fit_intercept=False, use_float=False, random_state=1)
    bandit, names, chosen = Bandit(6, ridge=ridge), [str(arm) for arm in range(rivals)], []
    for context in noise(400, 6, seed=8):
        estimates = bandit.estimate(names, np.tile(context, (rivals, 1)))
        decision = all_alike(estimates, alpha=0.8)
        if chosen:
            np.testing.assert_allclose(rival.decision_function(context[None])[0], decision.scores, atol=1e-9, rtol=0)
        reward = float(np.clip(0.5 + 0.3 * context[decision.index] + rng.normal() / 9, 0, 1))
        rival.partial_fit(context[None], np.array([decision.index]), np.array([reward]))
        bandit.update(names[decision.index], context, reward)
        chosen.append(decision.index)
    assert len(set(chosen)) == rivals


def all_alike(estimates: Estimates, *, alpha: float) -> Decision:
    """A decision in which nothing but the estimates counts."""
    arms = len(estimates.means)
    same = np.zeros(arms, np.int64)
    return decide(estimates, np.zeros(arms), alpha=alpha, resident=same == 0, pulls=same)


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [1.0, 0.25])
def test_everything_is_forgotten_in_the_end_but_the_ridge(ridge: float) -> None:
    bandit = Bandit(2, ridge=ridge, discount=0.9)
    for _ in range(50):
        bandit.update("a", np.array([0.6, 0.8]), 1.0)
    for clock in (10**4, 10**6, 10**12):
        bandit.clock = clock
        mean, width = one(bandit, "a", np.array([0.6, 0.8]))
        assert mean == pytest.approx(0, abs=1e-12)
        assert width == pytest.approx(1 / math.sqrt(ridge))


def test_directions_that_nobody_asks_about_stay_as_unsure_as_at_first() -> None:
    bandit = Bandit(2, discount=0.99)
    for _ in range(20_000):
        bandit.tick()
        bandit.update("a", np.array([1.0, 0.0]), 0.75)
    assert one(bandit, "a", np.array([0.0, 1.0])) == (0.0, 1.0)
    assert one(bandit, "a", np.array([1.0, 0.0])) == pytest.approx((0.75 * 100 / 101, math.sqrt(1 / 101)))


def test_what_was_observed_early_counts_less_than_what_was_observed_late() -> None:
    bandit, context = Bandit(1, discount=0.5), np.ones(1)
    bandit.update("rises", context, 0.0)
    bandit.update("falls", context, 1.0)
    bandit.tick()
    bandit.update("rises", context, 1.0)
    bandit.update("falls", context, 0.0)
    assert one(bandit, "rises", context)[0] == pytest.approx(1 / 2.5)
    assert one(bandit, "falls", context)[0] == pytest.approx(0.5 / 2.5)


@given(lives, contexts)
def test_a_clock_that_goes_back_makes_nothing_surer_than_it_was(life: list[Seen], context: Vector) -> None:
    bandit = lived([event for event in life if not event.late], discount=0.8)
    last = dict.fromkeys(ARMS, 0)
    clock = 0
    for event in life:
        if not event.late:
            clock += event.passed
            last[event.arm] = clock
    for name in ARMS:
        bandit.clock = last[name]
        then = one(bandit, name, context)
        bandit.clock = 0
        assert one(bandit, name, context) == then


@pytest.mark.parametrize(("discount", "count"), [(1.0, 20_000), (0.9995, 100_000)])
def test_many_updates_are_as_exact_as_one_solution(discount: float, count: int) -> None:
    rows, rewards = noise(1000, 2, seed=3), np.random.default_rng(4).random(1000)
    rows[:, 1] *= 0.01  # of one direction little is seen
    bandit = Bandit(2, discount=discount)
    for number in range(count):
        bandit.tick()
        bandit.update("a", rows[number % 1000], rewards[number % 1000])
    every = np.arange(count)
    weights = discount ** (count - 1.0 - every)
    told = rows[every % 1000]
    squares, moment = told.T @ (weights[:, None] * told), told.T @ (weights * rewards[every % 1000])
    for context in np.array([[1.0, 0.0], [0.0, 1.0], [0.6, -0.8]]):
        assert one(bandit, "a", context) == pytest.approx(solved(squares, moment, context), rel=1e-10)


# --- special cases ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 50), shares)
def test_contexts_that_are_all_equal_teach_one_number(count: int, reward: float) -> None:
    context = np.array([0.5, 0.5, 0.5])
    bandit = lived([Seen("a", context, reward, 1.0, 1, 0)] * count)
    length = 0.75
    mean, width = one(bandit, "a", context)
    assert mean == pytest.approx(count * length * reward / (1 + count * length))
    assert width == pytest.approx(math.sqrt(length / (1 + count * length)))
    assert one(bandit, "a", np.array([0.5, -0.5, 0.0])) == pytest.approx((0.0, math.sqrt(0.5)), abs=1e-12)


@given(contexts, ridges)
def test_an_arm_that_nobody_has_tried_is_worth_nothing_for_sure_and_anything_perhaps(
    context: Vector, ridge: float
) -> None:
    bandit = Bandit(D, ridge=ridge)
    bandit.update("another", np.ones(D), 1.0)
    assert one(bandit, "unknown", context) == pytest.approx((0.0, float(np.linalg.norm(context)) / math.sqrt(ridge)))
    assert bandit.pulls("unknown") == 0
    assert bandit.arms() == ("another",)


@given(lives, st.lists(st.sampled_from([*ARMS, "unknown"]), max_size=6), st.randoms())
def test_many_arms_at_once_are_estimated_as_one_by_one(life: list[Seen], names: list[str], random: Any) -> None:
    bandit = lived(life, discount=0.9)
    asked = np.array([[random.uniform(-1, 1) for _ in range(D)] for _ in names]).reshape(-1, D)
    estimates = bandit.estimate(names, asked)
    assert estimates.means.shape == estimates.widths.shape == (len(names),)
    for name, context, *found in zip(names, asked, estimates.means, estimates.widths, strict=True):
        assert found == pytest.approx(one(bandit, name, context), abs=1e-12)


@given(lives, st.lists(st.sampled_from([*ARMS, "unknown"]), max_size=6), st.randoms())
def test_means_alone_are_those_of_estimates(life: list[Seen], names: list[str], random: Any) -> None:
    bandit, asked = lived(life, discount=0.9), np.ones((len(names), D)) * random.uniform(-1, 1)
    asked[:, 0] = np.arange(len(names))
    np.testing.assert_allclose(bandit.means(names, asked), bandit.estimate(names, asked).means, atol=1e-12, rtol=0)


def test_more_arms_than_there_was_room_for_keep_what_they_know() -> None:
    bandit, rows = Bandit(D), noise(5 * ROOM, D)
    for number, row in enumerate(rows):
        bandit.update(f"arm {number}", row, number / len(rows))
    assert bandit.arms() == tuple(f"arm {number}" for number in range(len(rows)))
    means = bandit.estimate(bandit.arms(), rows).means
    np.testing.assert_allclose(means, np.arange(len(rows)) / len(rows) / 2)
    assert [bandit.pulls(name) for name in bandit.arms()] == [1] * len(rows)


def test_weight_is_how_often_it_counts_but_one_pull() -> None:
    heavy, often, context = Bandit(D), Bandit(D), np.array([0.5, 0.0, 0.25])
    heavy.update("a", context, 0.5, 3.0)
    for _ in range(3):
        often.update("a", context, 0.5)
    assert one(heavy, "a", context) == pytest.approx(one(often, "a", context))
    assert (heavy.pulls("a"), often.pulls("a")) == (1, 3)


@given(lives, contexts)
def test_settling_changes_nothing_but_the_time_of_the_next_estimate(life: list[Seen], context: Vector) -> None:
    settled, asked = lived(life, discount=0.9), lived(life, discount=0.9)
    settled.settle()
    assert not settled._arms.stale
    assert settled.dump() == asked.dump()
    for name in ARMS:
        assert one(settled, name, context) == pytest.approx(one(asked, name, context), abs=1e-12)


# --- forgetting and correcting ---------------------------------------------------------------------------------------


@given(lives, st.integers(0, 24), st.sampled_from([*ARMS, "unknown"]))
def test_a_forgotten_arm_is_as_if_it_had_begun_now_and_the_others_do_not_notice(
    life: list[Seen], place: int, name: str
) -> None:
    def tell(bandit: Bandit, events: list[Seen]) -> None:
        for event in events:
            bandit.update(event.arm, event.context, event.reward, event.weight)
            bandit.tick()

    bandit, never = Bandit(D, discount=0.9), Bandit(D, discount=0.9)
    tell(bandit, life[:place])
    bandit.estimate(ARMS[:1], np.ones((1, D)))  # some eigenvectors are known then, others are not
    bandit.forget(name)
    assert name not in bandit.arms()
    assert bandit.pulls(name) == 0
    tell(bandit, life[place:])
    for number, event in enumerate(life):
        if event.arm != name or number >= place:
            never.update(event.arm, event.context, event.reward, event.weight)
        never.tick()
    assert bandit.dump() == never.dump()
    asked = np.tile([1.0, 0.5, -1.0], (len(ARMS), 1))
    assert_same(bandit.estimate(ARMS, asked), never.estimate(ARMS, asked))


@pytest.mark.parametrize("gone", ["0", "7", str(ROOM - 2)])
def test_a_new_arm_that_follows_a_forgotten_one_begins_with_nothing_also_when_all_rows_are_taken(gone: str) -> None:
    bandit, context = Bandit(D), np.array([0.5, 0.0, 0.25])
    for number in range(ROOM - 1):
        bandit.update(str(number), np.ones(D), 0.5)
    bandit.forget(gone)
    bandit.update("new", context, 1.0)
    fresh = Bandit(D)
    fresh.update("new", context, 1.0)
    assert one(bandit, "new", context) == pytest.approx(one(fresh, "new", context), abs=1e-12)
    assert bandit.pulls("new") == 1


@given(lives, st.integers(0, 24), shares, discounts)
def test_a_corrected_reward_is_as_if_it_had_been_this_one_at_once(
    life: list[Seen], place: int, reward: float, discount: float
) -> None:
    bandit = lived(life, discount=discount)
    if place < len(life):
        wrong = life[place]
        since = max(0, sum(event.passed for event in life[: place + 1]) - wrong.late)
        change = reward - wrong.reward
        bandit.correct(wrong.arm, wrong.context, change, since=since, weight=wrong.weight)
        life[place] = msgspec.structs.replace(wrong, reward=reward)
    right = lived(life, discount=discount)
    asked = np.tile([1.0, 0.5, -1.0], (len(ARMS), 1))
    assert_same(bandit.estimate(ARMS, asked), right.estimate(ARMS, asked))
    assert [bandit.pulls(name) for name in ARMS] == [right.pulls(name) for name in ARMS]


def test_a_correction_counts_at_once_although_the_arm_was_just_asked_about() -> None:
    bandit, context = Bandit(1), np.ones(1)
    bandit.update("a", context, 1.0)
    assert one(bandit, "a", context)[0] == 0.5
    bandit.correct("a", context, -0.5, since=0)
    assert one(bandit, "a", context)[0] == 0.25


def test_a_correction_of_an_arm_that_is_gone_teaches_nothing() -> None:
    bandit = Bandit(D)
    before = bandit.dump()
    bandit.correct("gone", np.ones(D), 0.5, since=0)
    assert bandit.dump() == before


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [-0.01, 1.01, math.nan, math.inf, -math.inf])
def test_a_reward_that_is_none_is_refused_and_teaches_nothing(reward: float) -> None:
    bandit = Bandit(D)
    before = bandit.dump()
    with pytest.raises(InputError) as refused:
        bandit.update("a", np.ones(D), reward)
    assert refused.value.field == "reward"
    assert bandit.dump() == before


@pytest.mark.parametrize("change", [-1.01, 1.01, math.nan])
def test_a_change_that_no_two_rewards_make_is_refused(change: float) -> None:
    bandit = Bandit(D)
    bandit.update("a", np.ones(D), 0.5)
    before = bandit.dump()
    with pytest.raises(InputError) as refused:
        bandit.correct("a", np.ones(D), change, since=0)
    assert refused.value.field == "change"
    assert bandit.dump() == before


@pytest.mark.parametrize(
    ("context", "weight", "field"),
    [
        (np.ones(D), -1.0, "weight"),
        (np.ones(D), math.nan, "weight"),
        (np.ones(D), math.inf, "weight"),
        (np.ones(D + 1), 1.0, "context"),
        (np.ones((1, D)), 1.0, "context"),
        (np.full(D, math.nan), 1.0, "context"),
        (np.array([0.0, math.inf, 0.0]), 1.0, "context"),
    ],
)
def test_contexts_and_weights_that_would_spoil_an_arm_are_refused(context: Vector, weight: float, field: str) -> None:
    bandit = Bandit(D)
    bandit.update("a", np.ones(D), 0.5)
    before = bandit.dump()
    with pytest.raises(InputError) as refused:
        bandit.update("a", context, 0.5, weight)
    assert refused.value.field == field
    with pytest.raises(InputError) as refused:
        bandit.correct("a", context, 0.5, since=0, weight=weight)
    assert refused.value.field == field
    assert bandit.dump() == before


@pytest.mark.parametrize("asked", [np.ones((1, D)), np.ones((2, D + 1)), np.ones(D), np.ones((2, 1))])
def test_estimates_need_a_context_for_each_arm(asked: Vector) -> None:
    for ask in (Bandit(D).estimate, Bandit(D).means):
        with pytest.raises(InputError) as refused:
            ask(["a", "b"], asked)
        assert refused.value.field == "contexts"


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 1025}, "dimensions"),
        ({"ridge": 0.0}, "ridge"),
        ({"ridge": math.inf}, "ridge"),
        ({"discount": 0.0}, "discount"),
        ({"discount": 1.01}, "discount"),
        ({"discount": math.nan}, "discount"),
    ],
)
def test_a_bandit_that_could_not_work_is_refused(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as refused:
        Bandit(**{"dimensions": D} | wrong)
    assert refused.value.field == field


# --- what is kept ----------------------------------------------------------------------------------------------------


@given(lives, ridges, discounts, lives, contexts)
def test_what_was_dumped_is_loaded_to_the_bit_and_goes_on_as_if_nothing_had_happened(
    life: list[Seen], ridge: float, discount: float, later: list[Seen], context: Vector
) -> None:
    bandit = lived(life, ridge=ridge, discount=discount)
    loaded = Bandit.load(bandit.dump())
    assert loaded.dump() == bandit.dump()
    for event in later:
        for each in (bandit, loaded):
            each.tick()
            each.update(event.arm, event.context, event.reward, event.weight)
    assert loaded.dump() == bandit.dump()
    assert sorted(loaded.arms()) == sorted(bandit.arms())
    for name in ARMS:
        assert one(loaded, name, context) == pytest.approx(one(bandit, name, context), abs=1e-12)
        assert loaded.pulls(name) == bandit.pulls(name)


@given(lives, st.randoms())
def test_the_order_of_different_arms_leaves_no_trace_nor_does_being_asked(life: list[Seen], random: Any) -> None:
    clocks = np.cumsum([event.passed for event in life]).tolist()
    order = sorted(range(len(life)), key=lambda place: (life[place].arm, place))
    arms = {name: [place for place in order if life[place].arm == name] for name in ARMS}
    live, replayed = Bandit(D, discount=0.9), Bandit(D, discount=0.9)
    for event, clock in zip(life, clocks, strict=True):
        live.clock = clock
        live.update(event.arm, event.context, event.reward)
        live.estimate(ARMS, np.ones((len(ARMS), D)))
    while left := [name for name in ARMS if arms[name]]:
        place = arms[random.choice(left)].pop(0)
        replayed.update(life[place].arm, life[place].context, life[place].reward, clock=clocks[place])
    replayed.clock = live.clock
    assert replayed.dump() == live.dump()


def sample() -> Bandit:
    bandit = Bandit(2, discount=0.9)
    for number, row in enumerate(noise(6, 2)):
        bandit.tick()
        bandit.update("ab"[number % 2], row, number / 6)
    return bandit


def refused(data: bytes) -> bool:
    with pytest.raises(InputError):
        Bandit.load(data)
    return True


def test_a_dump_that_was_cut_anywhere_is_refused() -> None:
    whole = sample().dump()
    assert all(refused(whole[:length]) for length in range(len(whole)))


@given(st.binary(min_size=1, max_size=40))
def test_a_dump_with_something_behind_it_is_refused_and_so_is_noise(more: bytes) -> None:
    assert refused(sample().dump() + more)
    assert refused(more)


def test_a_dump_with_a_name_that_is_no_text_is_refused() -> None:
    bandit = Bandit(2)
    bandit.update("adapter", np.ones(2), 0.5)
    assert refused(bandit.dump().replace(b"adapter", b"adapt\xff\xfe"))


DUMP = ("format", "dimensions", "ridge", "discount", "clock", "names", "learned")


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"dimensions": 3},
        {"dimensions": 10**6},
        {"ridge": -1.0},
        {"discount": 2.0},
        {"clock": "late"},
        {"names": ["a"]},
        {"names": ["a", "a"]},
        {"names": ["a", "b", "c"]},
        {"learned": np.full(16, math.nan).tobytes()},
        {"learned": bytes(8)},
    ],
    ids=str,
)
def test_a_dump_that_contradicts_itself_is_refused(change: dict[str, Any]) -> None:
    fields = dict(zip(DUMP, msgspec.msgpack.decode(sample().dump()), strict=True))
    assert Bandit.load(msgspec.msgpack.encode(list(fields.values()))).dump() == sample().dump()
    assert refused(msgspec.msgpack.encode(list((fields | change).values())))


# --- decisions -------------------------------------------------------------------------------------------------------


class Choice(msgspec.Struct):
    """An arm as a decision sees it; quarters, so that ties are common and sums exact."""

    mean: float
    width: float
    price: float
    resident: bool
    pulls: int


quarters = st.integers(0, 4).map(lambda n: n / 4)
choices = st.lists(
    st.builds(Choice, quarters, quarters, quarters, st.booleans(), st.integers(0, 2)), min_size=1, max_size=6
)
allowances = st.sampled_from([0.0, 0.25, 0.5, math.inf])


def decided(choices: list[Choice], **how: float) -> Decision:
    means, widths, prices = (
        np.array([getattr(choice, name) for choice in choices]) for name in ("mean", "width", "price")
    )
    resident = np.array([choice.resident for choice in choices])
    pulls = np.array([choice.pulls for choice in choices])
    return decide(Estimates(means, widths), prices, resident=resident, pulls=pulls, **{"alpha": 0.5} | how)


def by_hand(choices: list[Choice], alpha: float, allowance: float) -> tuple[int, int, list[int]]:
    """The best by mean − price, the best by score of those that are allowed, and those."""

    def best(places: list[int], alpha: float) -> int:
        def rank(place: int) -> tuple[float, bool, int, int]:
            arm = choices[place]
            return -(arm.mean + alpha * arm.width - arm.price), not arm.resident, arm.pulls, place

        return min(places, key=rank)

    everything = list(range(len(choices)))
    safe = best(everything, 0.0)
    allowed = [place for place in everything if choices[place].price <= choices[safe].price + allowance]
    return safe, best(allowed, alpha), allowed


@given(choices, quarters, allowances)
def test_the_best_score_is_taken_by_the_rules(choices: list[Choice], alpha: float, allowance: float) -> None:
    decision = decided(choices, alpha=alpha, allowance=allowance)
    safe, greedy, _ = by_hand(choices, alpha, allowance)
    assert decision.index == greedy
    assert decision.explored == (greedy != safe)
    assert decision.scores == tuple(arm.mean + alpha * arm.width - arm.price for arm in choices)
    assert decision.probabilities == tuple(float(place == greedy) for place in range(len(choices)))


@settings(max_examples=40)
@given(choices, allowances, st.sampled_from([0.1, 0.25, 0.5, 1 / 3]))
def test_the_probabilities_are_those_of_the_draws(choices: list[Choice], allowance: float, explore: float) -> None:
    safe, greedy, allowed = by_hand(choices, 0.5, allowance)
    draws = 100
    drawn = [
        decided(choices, allowance=allowance, explore=explore, drawn=(number + 0.5) / draws) for number in range(draws)
    ]
    said = drawn[0].probabilities
    assert all(decision.probabilities == said for decision in drawn)
    assert math.fsum(said) == pytest.approx(1.0, abs=1e-12)
    counts = np.bincount([decision.index for decision in drawn], minlength=len(choices))
    np.testing.assert_allclose(counts / draws, said, atol=2 / draws)
    assert {place for place, chance in enumerate(said) if chance} == set(allowed)
    assert all(decision.explored == (decision.index != safe) for decision in drawn)
    assert drawn[-1].index == greedy


@given(st.integers(1, 50), st.floats(1e-9, 0.5))
def test_the_last_draw_that_explores_takes_the_last_arm(arms: int, explore: float) -> None:
    alike = [Choice(0.5, 0.5, 0.0, True, 0)] * arms
    assert decided(alike, explore=explore, drawn=math.nextafter(explore, 0)).index == arms - 1
    assert decided(alike, explore=explore, drawn=0.0).index == 0
    assert decided(alike, explore=explore, drawn=explore).index == 0


def test_equal_scores_go_to_the_resident_arm_then_to_the_fewest_pulls_then_to_the_first() -> None:
    away, known, new = (Choice(0.5, 0.0, 0.0, *rest) for rest in ((False, 0), (True, 7), (True, 3)))
    assert decided([away, known]).index == 1
    assert decided([away, known, new]).index == 2
    assert decided([away, known, new, new]).index == 2


def test_scores_that_differ_only_by_rounding_are_equal() -> None:
    first, second = Choice(0.3, 0.0, 0.0, True, 1), Choice(0.1 + 0.2, 0.0, 0.0, True, 9)
    assert second.mean > first.mean
    assert decided([first, second]).index == 0


def test_an_arm_that_costs_more_than_is_allowed_is_neither_chosen_nor_drawn() -> None:
    cheap, dear = Choice(0.5, 0.0, 0.0, True, 9), Choice(0.5, 4.0, 0.75, False, 0)
    assert decided([cheap, dear], allowance=0.75).index == 1
    barred = decided([cheap, dear], allowance=0.5, explore=0.5, drawn=0.49)
    assert barred.index == 0
    assert barred.probabilities == (1.0, 0.0)
    assert barred.scores[1] > barred.scores[0]


def test_the_best_arm_is_no_exploration_however_much_it_costs() -> None:
    decision = decided([Choice(0.25, 0.0, 0.0, True, 0), Choice(1.0, 0.0, 0.5, False, 0)], allowance=0.0)
    assert (decision.index, decision.explored) == (1, False)


def test_an_endless_price_is_never_paid() -> None:
    endless = Choice(1.0, 1.0, math.inf, True, 0)
    assert decided([endless, Choice(0.0, 0.0, 1.0, False, 9)]).index == 1
    assert decided([endless]).index == 0


def test_without_an_arm_there_is_no_decision() -> None:
    with pytest.raises(InputError):
        decided([])


# --- lock-in ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "escapes"), [(0.1, False), (0.5, True)])
def test_a_small_alpha_never_tries_what_has_a_price_and_a_larger_one_finds_that_it_is_better(
    alpha: float, escapes: bool
) -> None:
    """α · |x| / √ridge below price + gap: what is not in fast memory is never chosen, however good it is."""
    bandit, names, tries = Bandit(1), ["here", "away"], 0
    for _ in range(300):
        decision = decide(
            bandit.estimate(names, np.ones((2, 1))),
            np.array([0.0, 0.1]),
            alpha=alpha,
            resident=np.array([True, False]),
            pulls=np.array([bandit.pulls(name) for name in names]),
        )
        bandit.update(names[decision.index], np.ones(1), (0.2, 0.8)[decision.index])
        bandit.tick()
        tries += decision.index
    assert tries > 280 if escapes else tries == 0
