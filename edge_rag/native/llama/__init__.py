"""llama.cpp behind context managers, through llama-cpp-python's low-level ctypes API (never its `Llama` class).

Three floors: `library` (log capture, error mapping), `model` and `context` (one native object each, freed by `with`),
and above them `runtime.engine`, the only caller that decodes. Nothing here locks: one context belongs to one thread.

OpenMP threads that wait spin by default. With a busy neighbour on two cores that made decoding as slow as 3 tokens a
second instead of 24 (docs/log.md). libgomp reads its policy once, when it is loaded, so it is set here, before any
module of this package imports llama_cpp. A policy of the user's own stays.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from edge_rag.native.llama.context import Context, ContextSettings, Sampler
from edge_rag.native.llama.model import Model

__all__ = ["Context", "ContextSettings", "Model", "Sampler"]
