"""A passage's KV on its way: out of a state and into sections to be kept, and from either into a prompt's state.

Work goes a few layers at a time, so that the float32 keys on their way through rotation stay in the processor's cache.
Nothing is shared between calls: passages can be placed by several threads at once, each into its own part of a state.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from edge_rag.native import rope
from edge_rag.native.kv_blob import Blob, KVShape
from edge_rag.native.kv_codec import Codec, Decoder, Sections, encode
from edge_rag.native.llama import half
from edge_rag.native.rope import Rope, Turn

BLOCK_BYTES = 512 * 1024  # of float32 keys at once


def part(state: Blob, start: int, end: int) -> Blob:
    """The cells number `start` to below `end` of a state, as views: the place of a passage in a prompt."""
    return Blob(state.buffer, state.positions[start:end], state.keys[:, start:end], state.values[:, start:end])


def pack(state: Blob, codec: Codec, by: Rope) -> Sections:
    """The sections that keep a passage: keys turned back to position 0, both quantised as `codec` says."""
    keys = state.keys.astype(np.float32)
    rope.rotate(keys, rope.turn(by, state.positions, back=True))
    return encode(codec, keys, np.ascontiguousarray(state.values))


def unpack_into(place: Blob, codec: Codec, sections: Mapping[str, memoryview], shape: KVShape, by: Rope) -> None:
    """Put a kept passage in its place, turned to its positions. Raises EngineError when the sections do not fit."""
    decoder = Decoder(
        codec, sections, layers=shape.layers, tokens=place.tokens, k_width=shape.k_width, v_width=shape.v_width
    )
    turn = rope.turn(by, place.positions)
    for layers in _blocks(shape, place.tokens):
        keys = np.empty((layers.stop - layers.start, place.tokens, shape.k_width), dtype=np.float32)
        decoder.keys(layers, keys)
        _write_keys(place, layers, keys, turn)
        decoder.values(layers, place.values[layers])


def move_into(place: Blob, state: Blob, shape: KVShape, by: Rope) -> None:
    """Put the cells of `state` in a place of as many tokens, turned from their positions to the place's."""
    turn = rope.turn(by, place.positions.astype(np.int64) - state.positions)
    for layers in _blocks(shape, place.tokens):
        _write_keys(place, layers, state.keys[layers].astype(np.float32), turn)
        place.values[layers] = state.values[layers]


def _write_keys(place: Blob, layers: slice, keys: rope.Floats, turn: Turn) -> None:
    rope.rotate(keys, turn)
    for layer, rows in zip(range(layers.start, layers.stop), keys, strict=True):
        half.to_half(rows, place.keys[layer])


def _blocks(shape: KVShape, tokens: int) -> Iterator[slice]:
    step = max(1, BLOCK_BYTES // (4 * tokens * shape.k_width))
    for start in range(0, shape.layers, step):
        yield slice(start, min(start + step, shape.layers))
