"""Turning keys: against a formula pair by pair, and frequencies against a transcription of ggml's."""

import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rag.native.rope import Pairing, Rope, Yarn, frequencies, rotate, turn

PAIRINGS: tuple[Pairing, ...] = get_args(Pairing)
LAYERS, TOKENS, HEADS = 2, 3, 2
CLOSE = 1e-5  # of the largest number: float32 rounds a few times

positions = st.lists(st.integers(-100_000, 100_000), min_size=TOKENS, max_size=TOKENS)


@st.composite
def ropes(draw: st.DrawFn) -> Rope:
    """Any pairing; heads of which all or a part is turned."""
    head = draw(st.sampled_from([2, 4, 6, 16]))
    rotated = 2 * draw(st.integers(1, head // 2))
    angles = draw(st.lists(st.floats(0, 2), min_size=rotated // 2, max_size=rotated // 2))
    return Rope(draw(st.sampled_from(PAIRINGS)), head, rotated, tuple(angles))


def some_keys(rope: Rope, seed: int = 3) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(scale=5, size=(LAYERS, TOKENS, HEADS * rope.head_size)).astype(np.float32)


def turned(keys: np.ndarray, rope: Rope, places: list[int], *, back: bool = False) -> np.ndarray:
    result = keys.copy()
    rotate(result, turn(rope, places, back=back))
    return result


def naively(keys: np.ndarray, rope: Rope, places: list[int]) -> np.ndarray:
    """One pair after the other, by the 2 × 2 matrix of a rotation."""
    result = keys.astype(np.float64)
    for layer, token, head, pair in np.ndindex(LAYERS, TOKENS, HEADS, rope.rotated // 2):
        one, other = (2 * pair, 2 * pair + 1) if rope.pairing == "neighbours" else (pair, pair + rope.rotated // 2)
        one, other = one + head * rope.head_size, other + head * rope.head_size
        a, b = float(keys[layer, token, one]), float(keys[layer, token, other])
        angle = places[token] * rope.frequencies[pair]
        result[layer, token, one] = a * math.cos(angle) - b * math.sin(angle)
        result[layer, token, other] = a * math.sin(angle) + b * math.cos(angle)
    return result


def assert_close(one: np.ndarray, other: np.ndarray) -> None:
    assert np.abs(one - other).max() <= CLOSE * np.abs(other).max()


@given(ropes(), positions)
def test_every_pair_is_turned_by_position_times_frequency(rope: Rope, places: list[int]) -> None:
    keys = some_keys(rope)
    assert_close(turned(keys, rope, places), naively(keys, rope, places))


@given(ropes(), positions)
def test_what_is_not_rotated_stays_as_it_is(rope: Rope, places: list[int]) -> None:
    keys = some_keys(rope)
    heads = (LAYERS, TOKENS, HEADS, rope.head_size)
    rest = turned(keys, rope, places).reshape(heads)[..., rope.rotated :]
    assert np.array_equal(rest, keys.reshape(heads)[..., rope.rotated :])


@given(ropes(), positions)
def test_forth_and_back_is_where_it_began(rope: Rope, places: list[int]) -> None:
    keys = some_keys(rope)
    assert_close(turned(turned(keys, rope, places), rope, places, back=True), keys)


@given(ropes(), positions, positions)
def test_two_turns_are_the_turn_by_their_sum(rope: Rope, first: list[int], second: list[int]) -> None:
    keys = some_keys(rope)
    both = [one + other for one, other in zip(first, second, strict=True)]
    assert_close(turned(turned(keys, rope, first), rope, second), turned(keys, rope, both))


@given(ropes(), st.booleans())
def test_nothing_changes_at_position_0(rope: Rope, back: bool) -> None:
    keys = some_keys(rope)
    assert np.array_equal(turned(keys, rope, [0] * TOKENS, back=back), keys)


@given(ropes(), positions)
def test_no_pair_becomes_longer_or_shorter(rope: Rope, places: list[int]) -> None:
    keys = some_keys(rope)
    heads = (LAYERS, TOKENS, HEADS, rope.head_size)
    lengths = [np.linalg.norm(array.reshape(heads), axis=-1) for array in (turned(keys, rope, places), keys)]
    assert_close(*lengths)


@pytest.mark.parametrize(
    "places", [np.array([4, 5, 6], dtype=np.int32), np.array([4, 5, 6], dtype=np.int64), range(4, 7)]
)
def test_positions_may_come_as_any_whole_numbers(places) -> None:
    rope = Rope("halves", 4, 4, (1.0, 0.1))
    assert np.array_equal(turn(rope, places).cos, turn(rope, [4, 5, 6]).cos)


# --- frequencies -----------------------------------------------------------------------------------------------------


def ggml_angle(
    position: float, pair: int, rotated: int, base: float, scale: float, yarn: Yarn | None, factor: float
) -> float:
    """The angle that ggml gives to a pair: rope_yarn_ramp, rope_yarn, ggml_rope_yarn_corr_dims, line by line."""

    def corr_dim(n_rot: float, n_ctx_orig: int) -> float:
        return rotated * math.log(n_ctx_orig / (n_rot * 2 * math.pi)) / (2 * math.log(base))

    theta_extrap = position * (base ** (-2.0 / rotated)) ** pair / factor
    theta_interp = scale * theta_extrap
    theta = theta_interp
    if yarn is not None and yarn.ext_factor != 0.0:
        low = max(0.0, math.floor(corr_dim(yarn.beta_fast, yarn.n_ctx_orig)))
        high = min(rotated - 1, math.ceil(corr_dim(yarn.beta_slow, yarn.n_ctx_orig)))
        y = (pair - low) / max(0.001, high - low)
        ramp_mix = (1 - min(1, max(0, y))) * yarn.ext_factor
        theta = theta_interp * (1 - ramp_mix) + theta_extrap * ramp_mix
    return theta


yarns = st.builds(
    Yarn,
    n_ctx_orig=st.sampled_from([64, 512, 4096, 32_768]),
    beta_fast=st.sampled_from([32.0, 16.0, 1.0]),
    beta_slow=st.sampled_from([1.0, 2.0]),
    ext_factor=st.sampled_from([0.0, 0.5, 1.0]),
)


@settings(max_examples=200)
@given(
    st.sampled_from([2, 8, 64, 128]),
    st.sampled_from([10_000.0, 500_000.0, 1e6]),
    st.sampled_from([1.0, 0.5, 0.25]),
    st.none() | yarns,
    st.booleans(),
)
def test_frequencies_are_those_of_ggml(
    rotated: int, base: float, scale: float, yarn: Yarn | None, with_factors: bool
) -> None:
    factors = np.geomspace(1, 8, rotated // 2, dtype=np.float32) if with_factors else np.ones(rotated // 2, np.float32)
    ours = frequencies(rotated, base, scale=scale, yarn=yarn, factors=factors if with_factors else None)
    assert len(ours) == rotated // 2
    for position in (1, 1000):
        its = [ggml_angle(position, i, rotated, base, scale, yarn, float(factor)) for i, factor in enumerate(factors)]
        assert np.allclose(np.multiply(position, ours), its, rtol=1e-9, atol=0)


def test_plain_frequencies_fall_from_one_to_nearly_one_over_the_base() -> None:
    assert frequencies(4, 10_000.0) == (1.0, pytest.approx(0.01))


def test_yarn_leaves_fast_pairs_and_slows_down_slow_ones() -> None:
    plain = frequencies(64, 10_000.0)
    scaled = frequencies(64, 10_000.0, scale=0.25, yarn=Yarn(4096))
    ratios = np.divide(scaled, plain)
    assert ratios[0] == pytest.approx(1)
    assert ratios[-1] == pytest.approx(0.25)
    assert (np.diff(ratios) <= 1e-12).all()
    assert 0.25 < ratios[len(ratios) // 2] < 1
