"""Rotary position embedding (RoFormer, arXiv 2104.09864) over cached keys: taken off, and put on at another position.

llama.cpp caches keys after rotation. A key's rotation is linear in its position for every kind of scaling that
llama.cpp knows (none, linear, YaRN, frequency factors): pair i of each head is turned by `position × frequencies[i]`.
So a key is moved by turning it back to position 0 and forward to its new position. Magnitudes (YaRN's mscale) are never
touched: they are in the cached key already.

Keys are float32 of shape [layers, tokens, width], width = heads × head size. Only the first `rotated` values of a head
are turned; which two of them form a pair depends on the model: neighbours (llama.cpp's NORM) or halves (NEOX).
"""

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
from msgspec import Struct

Floats = npt.NDArray[np.float32]
Pairing = Literal["neighbours", "halves"]


class Rope(Struct, frozen=True):
    """How a model turns its keys: `frequencies` are radians a position, one a pair, `rotated` / 2 of them."""

    pairing: Pairing
    head_size: int
    rotated: int
    frequencies: tuple[float, ...]


class Yarn(Struct, frozen=True):
    """Parameters of YaRN scaling (arXiv 2309.00071), named as in llama.cpp. `n_ctx_orig` is in tokens."""

    n_ctx_orig: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    ext_factor: float = 1.0


class Turn(Struct, frozen=True):
    """cos and sin of the angles of some positions, each float32 of shape [tokens, 1, rotated / 2]."""

    rope: Rope
    cos: Floats
    sin: Floats


def frequencies(
    rotated: int,
    base: float,
    *,
    scale: float = 1.0,
    yarn: Yarn | None = None,
    factors: npt.NDArray[np.float32] | None = None,
) -> tuple[float, ...]:
    """Radians a position for each pair.

    `scale` is 1 / the scaling factor (linear and YaRN), `factors` divide each pair's frequency (Llama 3, LongRoPE).
    """
    plain = base ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    if factors is not None:
        plain = plain / factors.astype(np.float64)
    if yarn is None:
        return tuple((plain * scale).tolist())
    kept = _ramp(rotated, base, yarn) * yarn.ext_factor
    return tuple((plain * (scale * (1 - kept) + kept)).tolist())


def _ramp(rotated: int, base: float, yarn: Yarn) -> npt.NDArray[np.float64]:
    """How much of each pair's frequency YaRN leaves as it is: 1 for the fastest pairs, 0 for the slowest."""

    def pair_of(turns: float) -> float:
        return rotated * math.log(yarn.n_ctx_orig / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(0.0, math.floor(pair_of(yarn.beta_fast)))
    high = min(rotated - 1.0, math.ceil(pair_of(yarn.beta_slow)))
    pairs = np.arange(rotated // 2, dtype=np.float64)
    return np.asarray(1 - np.clip((pairs - low) / max(0.001, high - low), 0, 1))


def turn(rope: Rope, positions: npt.ArrayLike, *, back: bool = False) -> Turn:
    """The turn from position 0 to each of `positions`; with `back`, from there to 0."""
    angles = np.outer(np.asarray(positions, dtype=np.float64), rope.frequencies)[:, None, :]
    sign = -1 if back else 1
    return Turn(rope, np.cos(angles).astype(np.float32), (sign * np.sin(angles)).astype(np.float32))


def rotate(keys: Floats, by: Turn) -> None:
    """Turn `keys`, C-contiguous [layers, tokens, width], in place; `by` has one angle set a token."""
    rope = by.rope
    heads = keys.reshape(*keys.shape[:2], -1, rope.head_size)
    if rope.pairing == "neighbours":
        pairs = heads.view(np.complex64)[..., : rope.rotated // 2]
        np.multiply(pairs, by.cos + 1j * by.sin, out=pairs)
        return
    first, second = heads[..., : rope.rotated // 2], heads[..., rope.rotated // 2 : rope.rotated]
    turned = first * by.sin
    first *= by.cos
    first -= second * by.sin
    second *= by.cos
    second += turned
