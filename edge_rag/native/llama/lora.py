"""A LoRA adapter over a loaded model. Whichever one a context wears acts on every token of a batch.

Adapters lie where the layers that they change lie: in the GPU's memory, or in the machine's. llama.cpp reads the whole
file at once and keeps nothing of it open.
"""

from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib

from edge_rag.closing import Closing
from edge_rag.errors import ModelError
from edge_rag.native.llama import library
from edge_rag.native.llama.model import Model


class LoRA(Closing):
    """An adapter in memory, of `size` bytes. Close it before its model, and while no context wears it.

    Raises ModelError when the file is none, is damaged, or belongs to a model of another shape.
    """

    def __init__(self, model: Model, path: Path) -> None:
        library.clear_log()
        if not path.is_file():  # llama.cpp tells of it on stderr only
            raise ModelError("there is no such file", field=str(path), remedy="see `edge-rag adapters list`")
        self.path = path
        self.size = path.stat().st_size
        self.handle: Any = lib.llama_adapter_lora_init(model.handle, str(path).encode())
        if not self.handle:
            raise ModelError(
                f"the adapter could not be loaded ({library.complaints() or 'no reason given'})",
                field=str(path),
                remedy="delete it with `edge-rag adapters delete`; its passages are read as text",
            )

    def close(self) -> None:
        """Free its weights. Idempotent."""
        if self.handle:
            lib.llama_adapter_lora_free(self.handle)
            self.handle = None
