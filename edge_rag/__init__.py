"""Ask questions over your own documents, on your own machine.

    from edge_rag import EdgeRAG

    with EdgeRAG.open("my-library") as rag:
        rag.add("~/notes")
        print(rag.ask("When does the filter have to be changed?").text)

`Client` has the same methods, and asks a running server (`edge-rag serve`) instead.

Importing this package loads no engine; names are resolved when first used.
"""

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

from edge_rag.errors import EdgeRAGError
from edge_rag.records import Answer, Citation, Cited, Delta, Document, Filter, Passage, Progress, Sources, Turn

if TYPE_CHECKING:
    from edge_rag.client import Client
    from edge_rag.runtime.rag import EdgeRAG

# From 1.29 on onnxruntime reports to its maker, and keeps an id of the machine, as soon as it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Citation",
    "Cited",
    "Client",
    "Delta",
    "Document",
    "EdgeRAG",
    "EdgeRAGError",
    "Filter",
    "Passage",
    "Progress",
    "Sources",
    "Turn",
    "__version__",
]

_HOMES = {"EdgeRAG": "edge_rag.runtime.rag", "Client": "edge_rag.client"}

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
