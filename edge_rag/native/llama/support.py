"""Whether passages of a model can be moved in its context: geometry from metadata, then proof by self-test."""

from msgspec import Struct

from edge_rag.native.llama.context import Context
from edge_rag.native.llama.geometry import Geometry, geometry
from edge_rag.native.llama.self_test import TOKENS, prove


class Support(Struct, frozen=True):
    """`geometry` of a model whose passages can be moved; else None, and `reason` says why not."""

    geometry: Geometry | None
    reason: str = ""


def examine(context: Context) -> Support:
    """Look at the model of `context` and try it. The sequences it tries are cleared."""
    if context.settings.n_seq_max < TOKENS:
        return Support(None, f"the context has fewer than {TOKENS} sequences")
    found = geometry(context.model)
    if isinstance(found, str):
        return Support(None, found)
    reason = prove(context, found)
    return Support(None, reason) if reason else Support(found)
