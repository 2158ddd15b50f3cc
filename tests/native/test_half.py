"""Conversion between float16 and float32: by llama.cpp's loops and by numpy, which must agree."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge_rag.errors import EngineError
from edge_rag.native.llama import half

EVERY_HALF = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
singles = arrays.arrays(np.float32, st.integers(0, 70), elements=st.floats(width=32))


@pytest.fixture(params=["loops", "numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of converting, one after the other."""
    if request.param == "numpy":
        monkeypatch.setattr(half, "_loops", lambda: (None, None))
    return request.param


def narrowed(values: np.ndarray) -> np.ndarray:
    out = np.full(values.shape, 7, dtype=np.float16)
    half.to_half(values, out)
    return out


def widened(values: np.ndarray) -> np.ndarray:
    out = np.full(values.shape, 7, dtype=np.float32)
    half.to_single(values, out)
    return out


def test_the_loops_of_the_llama_library_are_used_here() -> None:
    assert all(half._loops())


def test_every_float16_survives_widening_and_narrowing(way: str) -> None:
    wide = widened(EVERY_HALF)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(wide, EVERY_HALF.astype(np.float32))
    np.testing.assert_array_equal(narrowed(wide), EVERY_HALF)


def test_any_number_of_values_is_converted(way: str) -> None:
    for count in range(70):
        values = np.linspace(-5, 5, count, dtype=np.float16)
        wide = widened(values)
        np.testing.assert_array_equal(wide, values.astype(np.float32))
        np.testing.assert_array_equal(narrowed(wide), values)


@given(values=singles)
def test_narrowing_rounds_as_numpy_does(values: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(narrowed(values), values.astype(np.float16))


def test_numbers_past_the_range_become_infinite(way: str) -> None:
    values = np.array([65504, 65519, 65520, -1e30, np.inf, np.nan, 2.0**-25, 2.0**-24], dtype=np.float32)
    expected = np.array([65504, 65504, np.inf, -np.inf, np.inf, np.nan, 0, 2.0**-24], dtype=np.float16)
    np.testing.assert_array_equal(narrowed(values), expected)


def test_read_only_sources_and_rows_inside_a_buffer_are_converted(way: str) -> None:
    source = np.linspace(-3, 3, 24, dtype=np.float32).reshape(4, 6)
    source.flags.writeable = False
    buffer = np.zeros(2 * 24 + 14, dtype=np.uint8)
    rows = buffer[6 : 6 + 48].view(np.float16).reshape(4, 6)
    half.to_half(source, rows)
    np.testing.assert_array_equal(rows, source.astype(np.float16))
    assert not buffer[:6].any()
    assert not buffer[54:].any()
    rows.flags.writeable = False
    np.testing.assert_array_equal(widened(rows), rows.astype(np.float32))


@pytest.mark.parametrize(
    ("values", "out"),
    [
        (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float16)),
        (np.zeros(3, np.float64), np.zeros(3, np.float16)),
        (np.zeros(3, np.float32), np.zeros(3, np.float32)),
        (np.zeros((4, 4), np.float32)[:, ::2], np.zeros((4, 2), np.float16)),
        (np.zeros((4, 2), np.float32), np.zeros((4, 4), np.float16)[:, ::2]),
        (np.zeros(3, np.float32), np.broadcast_to(np.float16(0), 3)),
        (np.zeros(1, np.float32), np.frombuffer(b"\0\0", np.float16)),
    ],
)
def test_arrays_that_would_overrun_memory_are_refused(values: np.ndarray, out: np.ndarray) -> None:
    with pytest.raises(EngineError):
        half.to_half(values, out)


def test_widening_is_checked_too() -> None:
    with pytest.raises(EngineError):
        half.to_single(np.zeros(4, np.float16), np.zeros(3, np.float32))


def test_numpy_converts_when_the_library_has_no_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half.lib, "_lib", object())
    assert half._loops.__wrapped__() == (None, None)


def test_loops_that_disagree_with_numpy_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        """Loops that write nothing."""

        @staticmethod
        def ggml_cpu_fp32_to_fp16(*_: int) -> None: ...

        @staticmethod
        def ggml_cpu_fp16_to_fp32(*_: int) -> None: ...

        @staticmethod
        def ggml_cpu_init() -> None: ...

    monkeypatch.setattr(half.lib, "_lib", Library)
    assert half._loops.__wrapped__() == (None, None)


def test_a_loop_that_fails_on_numbers_that_fill_no_vector_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, widen = half._loops()

    class Library:
        """The loops of a backend whose table was never filled."""

        ggml_cpu_fp32_to_fp16 = narrow

        @staticmethod
        def ggml_cpu_init() -> None: ...

        @staticmethod
        def ggml_cpu_fp16_to_fp32(source: int, target: int, count: int) -> None:
            widen(source, target, count // 16 * 16)

    monkeypatch.setattr(half.lib, "_lib", Library)
    assert half._loops.__wrapped__() == (None, None)
