"""llama.cpp behind context managers, through llama-cpp-python's low-level ctypes API (never its `Llama` class).

Three floors: `library` (log capture, error mapping), `model` and `context` (one native object each, freed by `with`),
and above them `runtime.engine`, the only caller that decodes. Nothing here locks: one context belongs to one thread.
"""

from edge_rag.native.llama.context import Context, ContextSettings, Sampler
from edge_rag.native.llama.model import Model

__all__ = ["Context", "ContextSettings", "Model", "Sampler"]
