"""llama.cpp behind context managers, through llama-cpp-python's low-level ctypes API (never its `Llama` class).

Three floors: `library` (log capture, error mapping), `model` and `context` (one native object each, freed by `with`),
and above them `runtime.engine`, the only caller that decodes. Nothing here locks: one context belongs to one thread.

OpenMP threads that wait for each other spin, by default for long: with one busy neighbour on two cores decoding fell to
6 tokens a second, with a thousand turns of spinning it had 25, and on a quiet machine they cost nothing (docs/log.md).
libgomp reads its settings once, when it is loaded, so they are made here, before any module of this package imports
llama_cpp. Settings of the user's own stay.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from edge_rag.native.llama.context import Context, ContextSettings, Run, Sampler
from edge_rag.native.llama.lora import LoRA
from edge_rag.native.llama.model import Model

__all__ = ["Context", "ContextSettings", "LoRA", "Model", "Run", "Sampler"]
