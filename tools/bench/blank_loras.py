"""Adapters that change nothing and cost what trained ones do: for measuring time and bytes without training."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from msgspec import Struct

from edge_rag.native.llama import Model
from edge_rag.records import Targets

# Tensors of a layer by llama.cpp's names, as (inputs, outputs) in the names of `Shapes`.
FORWARD = {
    "ffn_gate": ("hidden", "forward"),
    "ffn_up": ("hidden", "forward"),
    "ffn_down": ("forward", "hidden"),
}
ATTENTION = {
    "attn_q": ("hidden", "queries"),
    "attn_k": ("hidden", "keys"),
    "attn_v": ("hidden", "keys"),
    "attn_output": ("queries", "hidden"),
}
TENSORS: Mapping[Targets, Mapping[str, tuple[str, str]]] = {
    "down": {"ffn_down": FORWARD["ffn_down"]},
    "ffn": FORWARD,
    "all": FORWARD | ATTENTION,
}


class Blank(Struct, frozen=True):
    """What is adapted."""

    targets: Targets
    rank: int
    layers: str = "all"

    @property
    def name(self) -> str:
        """As variants are named."""
        return f"{self.targets}-{self.layers}-{self.rank}"


class Shapes(Struct, frozen=True):
    """Widths of a model's layers."""

    architecture: str
    layers: int
    hidden: int
    forward: int
    queries: int
    keys: int


def shapes_of(model: Model) -> Shapes:
    """The widths of a loaded model."""
    architecture = model.metadata("general.architecture")

    def number(name: str, default: int = 0) -> int:
        return int(model.metadata(f"{architecture}.{name}") or default)

    hidden, heads = number("embedding_length"), number("attention.head_count")
    head = number("attention.key_length", hidden // heads)
    return Shapes(
        architecture=architecture,
        layers=number("block_count"),
        hidden=hidden,
        forward=number("feed_forward_length"),
        queries=heads * head,
        keys=number("attention.head_count_kv", heads) * head,
    )


def weight_bytes(shapes: Shapes, blank: Blank) -> int:
    """Bytes of an adapter's numbers in float16; its file has some thousand more."""
    sides: list[int] = [getattr(shapes, side) for pair in TENSORS[blank.targets].values() for side in pair]
    return 2 * blank.rank * sum(sides) * len(_layers(shapes, blank))


def _layers(shapes: Shapes, blank: Blank) -> range:
    return range(shapes.layers // 2 if blank.layers == "last_half" else 0, shapes.layers)


def write_blank(folder: Path, shapes: Shapes, blank: Blank) -> Path:
    """Write such an adapter; its second matrices are zero."""
    path = folder / f"{blank.name}.gguf"
    writer = gguf.GGUFWriter(path, shapes.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0 * blank.rank)
    drawn = np.random.default_rng(0)
    for layer in _layers(shapes, blank):
        for tensor, (inputs, outputs) in TENSORS[blank.targets].items():
            name = f"blk.{layer}.{tensor}.weight"
            first = drawn.normal(size=(blank.rank, getattr(shapes, inputs)))
            writer.add_tensor(f"{name}.lora_a", first.astype(np.float16))
            writer.add_tensor(f"{name}.lora_b", np.zeros((getattr(shapes, outputs), blank.rank), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
