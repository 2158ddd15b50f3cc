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
    base, adapted = list[float](), list[float]()
    with desk.pager.held(adapter):
        for row, (plain, worn) in enumerate(zip(_rows(desk, proof, ""), _rows(desk, proof, adapter), strict=True)):
            base.append(divergence(proof.base_ids[row], proof.base_logits[row], proof.base_norms[row], plain))
            adapted.append(
                divergence(proof.adapter_ids[row], proof.adapter_logits[row], proof.adapter_norms[row], worn)
            )
    return refuted(base, adapted)


def _rows(desk: Desk, proof: Proof, lane: str) -> Iterator[Logits]:
    """The logits of all rows of the proof, computed in one lane, each lane in a sequence of its own."""
    late = desk.of(1 if lane else 0, lane)
    sequences = zip(
        pieces(proof.contexts, proof.context_ends), pieces(proof.tokens, proof.token_ends), proof.starts, strict=True
    )
    for context, tokens, start in sequences:
        late.clear()
        if len(context):
            desk.of(late.sequence).read(context.tolist(), 0)
        position = len(context)
        place = late.read(tokens[: start + 1].tolist(), position).place
        yield desk.context.logits(place)
        for offset in range(int(start) + 1, len(tokens)):
            place = late.read([int(tokens[offset])], position + offset).place
            yield desk.context.logits(place)
    late.clear()
