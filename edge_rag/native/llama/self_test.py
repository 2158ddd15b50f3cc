"""Proof, at every load, that this model's passages can be moved: what we compute is compared with what the model does.

A token that is decoded alone attends only to itself, so at every layer its hidden state is the same at any position:
its keys differ by the rotation alone and its values not at all. A few such tokens at position 0 and far away therefore
test rotation, pairing and frequencies on all layers at once; layers without rotation, other attention and wrong
metadata show up. Then a short sequence is saved, rebuilt by us, restored and saved again: the bytes must be the same.

It costs three decodes of a few tokens.
"""

import numpy as np

from edge_rag.errors import EngineError
from edge_rag.native import kv_blob, rope
from edge_rag.native.kv_blob import Blob
from edge_rag.native.llama.context import Context, Run
from edge_rag.native.llama.geometry import Geometry

TOKENS = 3
FAR = (7, 311, 1023)  # positions whose angles differ on fast and slow pairs alike
TOLERANCE = 0.02  # of the largest |key| of a layer: f16 rounding gives .001, a wrong frequency more than .5


def prove(context: Context, geometry: Geometry) -> str:
    """Why passages of this model cannot be moved, '' when they can. Leaves all sequences empty."""
    tokens = [context.model.vocab_size * (i + 1) // (TOKENS + 2) for i in range(TOKENS)]
    try:
        return _rotation(context, geometry, tokens) or _round_trip(context, geometry, tokens)
    except EngineError as error:
        return error.message
    finally:
        for sequence in range(TOKENS):
            context.clear(sequence)


def _rotation(context: Context, geometry: Geometry, tokens: list[int]) -> str:
    near = _alone(context, geometry, tokens, [0] * TOKENS)
    far = _alone(context, geometry, tokens, [min(place, context.n_ctx - 1) for place in FAR])
    for before, after in zip(near, far, strict=True):
        moved = before.keys.astype(np.float32)
        rope.rotate(moved, rope.turn(geometry.rope, after.positions))
        layer = _first_wrong(moved, after.keys.astype(np.float32))
        if layer is not None:
            return f"its keys are not turned as its metadata say (layer {layer})"
        layer = _first_wrong(before.values.astype(np.float32), after.values.astype(np.float32))
        if layer is not None:
            return f"its values depend on the position (layer {layer})"
    return ""


def _first_wrong(ours: rope.Floats, its: rope.Floats) -> int | None:
    off = np.abs(ours - its).max(axis=(1, 2))
    wrong = np.flatnonzero(~(off <= TOLERANCE * np.abs(its).max(axis=(1, 2)) + 1e-6))
    return int(wrong[0]) if len(wrong) else None


def _alone(context: Context, geometry: Geometry, tokens: list[int], positions: list[int]) -> list[Blob]:
    """The state of each token when it is decoded alone, at its position."""
    for sequence in range(TOKENS):
        context.clear(sequence)
    context.decode([Run([token], sequence, positions[sequence]) for sequence, token in enumerate(tokens)])
    return [kv_blob.parse(context.save(sequence), geometry.shape) for sequence in range(TOKENS)]


def _round_trip(context: Context, geometry: Geometry, tokens: list[int]) -> str:
    for sequence in range(TOKENS):
        context.clear(sequence)
    context.decode([Run(tokens, 0, 0)])
    saved = context.save(0)
    state = kv_blob.parse(saved, geometry.shape)
    rebuilt = kv_blob.cut(state, geometry.shape, 0, len(tokens))
    context.clear(0)
    context.restore(0, rebuilt.buffer)
    if not np.array_equal(context.save(0), saved):
        return "a state that was taken out and put back is not the same"
    return ""
