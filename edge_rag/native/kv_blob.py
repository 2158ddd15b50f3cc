"""llama.cpp's sequence state as numpy arrays: read in place, written in place, in one buffer.

Layout of `llama_state_seq_get_data` for one attention cache with flash attention and `kv_unified` (llama.cpp as
vendored by the pinned llama-cpp-python; little-endian, unpadded):

    u32 magic, i32 sequence, u32 streams (1), u32 cells
    per cell: i32 position, u32 number of sequences (1), i32 sequence
    u32 values transposed (0), u32 layers
    per layer: i32 type (1 = f16), u64 bytes a row, rows      keys of all layers, after rotation
    per layer: i32 type (1 = f16), u64 bytes a row, rows      values of all layers

Rows of all layers lie at equal distances, so keys and values are one strided array each, [layers, tokens, width], over
the very bytes that llama.cpp reads or wrote. Cells come in cell order; `parse` says at which position each one is.
"""

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from edge_rag.errors import EngineError

Buffer = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.float16]
Positions = npt.NDArray[np.int32]

MAGIC = 0xAF143CD8
LAYOUT = "seq1-f16-flash-unified"  # part of every key: states of another layout cannot be read
_F16 = 1
_HEAD = 16  # bytes before the cells
_CELL = 12
_LAYER = 12  # bytes before the rows of a layer


class KVShape(Struct, frozen=True):
    """Sizes of a model's cache: `k_width` and `v_width` are values a token in each of `layers` layers."""

    layers: int
    k_width: int
    v_width: int

    @property
    def bytes_per_token(self) -> int:
        """Bytes of f16 keys and values that a token takes."""
        return 2 * self.layers * (self.k_width + self.v_width)


class Blob(Struct, frozen=True):
    """A state: `buffer` is what llama.cpp reads; the rest are views into it.

    `positions` int32 [tokens], `keys` float16 [layers, tokens, k_width], `values` float16 [layers, tokens, v_width].
    """

    buffer: Buffer
    positions: Positions
    keys: Halves
    values: Halves

    @property
    def tokens(self) -> int:
        """Number of cells."""
        return len(self.positions)


def size(shape: KVShape, tokens: int) -> int:
    """Bytes of a state of so many tokens."""
    return _HEAD + _CELL * tokens + 8 + 2 * shape.layers * _LAYER + tokens * shape.bytes_per_token


def new(shape: KVShape, positions: npt.ArrayLike) -> Blob:
    """A state whose keys and values are still to be written, for cells at `positions`."""
    places = np.asarray(positions, dtype=np.int32)
    tokens = len(places)
    buffer = np.empty(size(shape, tokens), dtype=np.uint8)
    buffer[:_HEAD].view("<u4")[:] = (MAGIC, 0, 1, tokens)
    cells = _cells(buffer, tokens)
    cells[:] = (0, 1, 0)
    cells[:, 0] = places
    _body(buffer, tokens)[:] = (0, shape.layers)
    for heads, width in zip(_layer_heads(buffer, shape, tokens), (shape.k_width, shape.v_width), strict=True):
        heads[:] = np.frombuffer(_layer_head(width), dtype=np.uint8)
    return Blob(buffer, cells[:, 0], *_rows(buffer, shape, tokens))


def parse(buffer: Buffer, shape: KVShape) -> Blob:
    """The state in `buffer`, without copying. Raises EngineError when it has another layout or other sizes."""
    if len(buffer) < _HEAD:
        raise EngineError(f"a sequence state has only {len(buffer)} bytes")
    magic, _, streams, tokens = buffer[:_HEAD].view("<u4").tolist()
    if (magic, streams) != (MAGIC, 1):
        raise EngineError(f"a sequence state begins with {magic:#x} and {streams} streams, not {MAGIC:#x} and 1")
    if len(buffer) != size(shape, tokens):
        raise EngineError(f"a state of {tokens} tokens has {len(buffer)} bytes instead of {size(shape, tokens)}")
    if _body(buffer, tokens).tolist() != [0, shape.layers]:
        raise EngineError("a sequence state has transposed values or another number of layers")
    for heads, width in zip(_layer_heads(buffer, shape, tokens), (shape.k_width, shape.v_width), strict=True):
        if not (heads == np.frombuffer(_layer_head(width), dtype=np.uint8)).all():
            raise EngineError("a sequence state has layers of another type or width")
    return Blob(buffer, _cells(buffer, tokens)[:, 0], *_rows(buffer, shape, tokens))


def cut(state: Blob, shape: KVShape, start: int, end: int) -> Blob:
    """A new state of the cells at positions from `start` to below `end`, in order of positions."""
    chosen = np.argsort(state.positions, kind="stable")
    chosen = chosen[(state.positions[chosen] >= start) & (state.positions[chosen] < end)]
    part = new(shape, state.positions[chosen])
    part.keys[:] = state.keys[:, chosen]
    part.values[:] = state.values[:, chosen]
    return part


def _cells(buffer: Buffer, tokens: int) -> npt.NDArray[np.int32]:
    return buffer[_HEAD : _HEAD + _CELL * tokens].view("<i4").reshape(tokens, 3)


def _body(buffer: Buffer, tokens: int) -> npt.NDArray[np.uint32]:
    start = _HEAD + _CELL * tokens
    return buffer[start : start + 8].view("<u4")


def _layer_head(width: int) -> bytes:
    return _F16.to_bytes(4, "little") + (2 * width).to_bytes(8, "little")


def _layer_heads(buffer: Buffer, shape: KVShape, tokens: int) -> tuple[Buffer, Buffer]:
    """The 12 bytes before each layer's rows, [layers, 12], of keys and of values."""
    return (
        _strided(buffer, shape, tokens, shape.k_width, _keys_at(tokens))[:, :_LAYER],
        _strided(buffer, shape, tokens, shape.v_width, _values_at(shape, tokens))[:, :_LAYER],
    )


def _rows(buffer: Buffer, shape: KVShape, tokens: int) -> tuple[Halves, Halves]:
    keys = _strided(buffer, shape, tokens, shape.k_width, _keys_at(tokens))[:, _LAYER:].view("<f2")
    values = _strided(buffer, shape, tokens, shape.v_width, _values_at(shape, tokens))[:, _LAYER:].view("<f2")
    return (
        keys.reshape(shape.layers, tokens, shape.k_width),
        values.reshape(shape.layers, tokens, shape.v_width),
    )


def _strided(buffer: Buffer, shape: KVShape, tokens: int, width: int, start: int) -> Buffer:
    """Heads and rows of all layers, uint8 [layers, 12 + bytes of a layer's rows]."""
    layer = _LAYER + 2 * width * tokens
    return buffer[start : start + shape.layers * layer].reshape(shape.layers, layer)


def _keys_at(tokens: int) -> int:
    return _HEAD + _CELL * tokens + 8


def _values_at(shape: KVShape, tokens: int) -> int:
    return _keys_at(tokens) + shape.layers * (_LAYER + 2 * shape.k_width * tokens)
