"""What the bandit sees: rows of at most length 1, the same ones on every machine."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.errors import InputError
from edge_rag.policy.features import VERSION, ArmView, Space, contexts

ENCODER = "5e" * 32
SPACE = Space(ENCODER, 4)
PLAIN = ArmView()
FULL = ArmView("adapter", share=1.0, scores=1.0, closeness=1.0, within=True, gate=1.0)

shares = st.floats(0, 1)
views = st.builds(ArmView, st.just("adapter"), shares, shares, shares, st.booleans(), shares)
spaces = st.builds(Space, st.text(max_size=8), st.integers(1, 12))


def question(seed: int, dimensions: int = 24) -> npt.NDArray[np.float32]:
    vector = np.random.default_rng(seed).normal(size=dimensions)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


# --- rows ------------------------------------------------------------------------------------------------------------


@given(spaces, st.lists(views, max_size=4), st.integers(0, 1000), st.integers(1, 30))
def test_rows_have_the_size_of_their_space_and_at_most_length_one(
    space: Space, arms: list[ArmView], seed: int, dimensions: int
) -> None:
    rows = contexts(space, question(seed, dimensions), arms)
    assert rows.shape == (len(arms), space.size)
    assert rows.dtype == np.float64
    assert (np.linalg.norm(rows, axis=1) <= 1 + 1e-12).all()


def test_the_longest_row_has_length_one() -> None:
    assert np.linalg.norm(contexts(SPACE, question(1), [FULL])) == pytest.approx(1.0)


def test_a_row_is_a_constant_the_question_and_what_the_arm_shows() -> None:
    arm = ArmView("adapter", share=0.25, scores=0.5, closeness=0.75, within=True, gate=0.125)
    plain, row = contexts(SPACE, question(1), [PLAIN, arm])
    np.testing.assert_array_equal(plain[:5], row[:5])
    assert row[0] == pytest.approx(math.sqrt(0.3))
    assert np.linalg.norm(row[1:5]) == pytest.approx(math.sqrt(0.2))
    np.testing.assert_allclose(row[5:], math.sqrt(0.1) * np.array([0.25, 0.5, 0.75, 1.0, 0.125]))
    assert not plain[5:].any()


def test_the_length_of_an_embedding_does_not_matter_and_nothing_stays_nothing() -> None:
    np.testing.assert_allclose(
        contexts(SPACE, 7 * question(1), [FULL]), contexts(SPACE, question(1), [FULL]), atol=1e-7
    )
    row = contexts(SPACE, np.zeros(24, np.float32), [FULL])[0]
    assert not row[1:5].any()
    assert row[0]


def test_what_an_arm_shows_is_clipped() -> None:
    beyond = ArmView("adapter", share=1.5, scores=-0.5, closeness=1.0000001, within=True, gate=-1e-9)
    clipped = ArmView("adapter", share=1.0, scores=0.0, closeness=1.0, within=True, gate=0.0)
    np.testing.assert_array_equal(contexts(SPACE, question(1), [beyond]), contexts(SPACE, question(1), [clipped]))


@pytest.mark.parametrize("view", [{"gate": math.nan}, {"share": math.inf}])
def test_an_arm_that_shows_no_number_is_refused(view: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        contexts(SPACE, question(1), [PLAIN, ArmView("adapter", **view)])


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_an_embedding_that_is_none_is_refused(wrong: float) -> None:
    asked = question(1)
    asked[3] = wrong
    with pytest.raises(InputError):
        contexts(SPACE, asked, [PLAIN])


# --- the question in few dimensions ----------------------------------------------------------------------------------


@given(spaces, st.integers(1, 30))
def test_directions_are_orthonormal(space: Space, dimensions: int) -> None:
    projection = space.projection(dimensions)
    assert projection.shape == (space.projected, dimensions)
    few = min(projection.shape)
    product = projection @ projection.T if few == space.projected else projection.T @ projection
    np.testing.assert_allclose(product, np.eye(few), atol=1e-12)


def test_directions_are_the_same_everywhere_and_for_ever() -> None:
    """Whoever has to change these numbers gives VERSION its next one."""
    assert VERSION == 1
    expected = [
        [-0.065050994301319, -0.784297552585119, -0.616964923759368],
        [0.015632524847954, -0.618999544560876, 0.785235753134245],
    ]
    np.testing.assert_allclose(Space("an encoder", 2).projection(3), expected, atol=1e-12)


def test_directions_are_others_for_another_encoder_or_another_number_of_them() -> None:
    first = Space("an encoder", 4).projection(24)
    assert np.abs(Space("another", 4).projection(24) - first).max() > 0.1
    assert np.abs(Space("an encoder", 5).projection(24)[:4] - first).max() > 0.1


def test_directions_cannot_be_changed_by_who_reads_them() -> None:
    with pytest.raises(ValueError, match="read-only"):
        SPACE.projection(24)[0, 0] = 1.0


def test_no_direction_is_preferred() -> None:
    """Of 200 spaces: the mean of the squares in each dimension is projected / dimensions, that of the numbers is 0."""
    every = np.array([Space(str(number), 4).projection(24) for number in range(200)])
    np.testing.assert_allclose((every**2).sum(axis=1).mean(axis=0), 4 / 24, atol=0.03)
    np.testing.assert_allclose(every.mean(axis=(0, 1)), 0, atol=0.03)


def test_questions_that_are_alike_stay_nearer_than_others() -> None:
    space = Space(ENCODER, 16)
    for seed in range(50):
        asked, other = question(seed, 384), question(1000 + seed, 384)
        alike = (0.95 * asked + 0.31 * question(2000 + seed, 384)).astype(np.float32)
        here, near, far = (contexts(space, each, [PLAIN])[0] for each in (asked, alike, other))
        assert np.linalg.norm(here - near) < np.linalg.norm(here - far)


# --- the space -------------------------------------------------------------------------------------------------------


def test_the_tag_says_all_that_rows_depend_on() -> None:
    tags = {Space(encoder, projected).tag for encoder in ("a", "b") for projected in (4, 5)}
    assert len(tags) == 4
    assert SPACE.tag == f"{VERSION}-4-{ENCODER}"
    assert Space("5-a", 1).tag != Space("a", 15).tag
