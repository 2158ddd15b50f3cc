"""The proof of an exported adapter, in the engine: the examples of the trainer's proof are computed here once more."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from edge_rag.learning.job import Proof, pieces
from edge_rag.policy.proof import divergence, refuted
from edge_rag.runtime.engine import Engine
from edge_rag.runtime.requests import Desk

Logits = npt.NDArray[np.float32]


def prove(engine: Engine, adapter: str, proof: Proof) -> str:
    """Why the exported adapter is wrong, '' when it says what torch said.

    A chore of the engine. Raises ModelError when it cannot be loaded.
    """
    refutation: str = engine.when_idle(lambda desk: _prove(desk, adapter, proof)).result()
    return refutation


def _prove(desk: Desk, adapter: str, proof: Proof) -> str:
    assert desk.pager, "adapters are trained where they are used"
    with desk.pager.held(adapter):
        base = zip(proof.base_ids, proof.base_logits, proof.base_norms, _rows(desk, proof, ""), strict=True)
        without = [divergence(*row) for row in base]
        worn = zip(
            proof.adapter_ids, proof.adapter_logits, proof.adapter_norms, _rows(desk, proof, adapter), strict=True
        )
        return refuted(without, [divergence(*row) for row in worn])


def _rows(desk: Desk, proof: Proof, lane: str) -> Iterator[Logits]:
    """The logits of all rows of the proof; contexts are read without the adapter, the rest in the lane."""
    late = desk.of(desk.sequence, lane)
    sequences = zip(
        pieces(proof.contexts, proof.context_ends), pieces(proof.tokens, proof.token_ends), proof.starts, strict=True
    )
    for context, tokens, start in sequences:
        late.clear()
        position, written = len(context), int(start) + 1
        desk.read(context.tolist(), 0)
        place = late.read(tokens[:written].tolist(), position).place
        yield desk.context.logits(place)
        for offset in range(written, len(tokens)):
            place = late.read([int(tokens[offset])], position + offset).place
            yield desk.context.logits(place)
    late.clear()
