"""Tiny adapters with random weights for the tiny models: each changes what is said, and it means nothing."""

import hashlib
from pathlib import Path

import gguf
import numpy as np

from tests.native.tiny_models import EMBEDDING, FORWARD

RANK = 2


def write_tiny_lora(folder: Path, *, seed: int = 1, arch: str = "llama", forward: int = FORWARD) -> Path:
    """Write an adapter of the down projections as `<sha256>.gguf`; another seed, another adapter."""
    path = folder / f"{seed}.tmp"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0 * RANK)
    random = np.random.default_rng(seed)
    for layer in range(2):
        name = f"blk.{layer}.ffn_down.weight"
        writer.add_tensor(f"{name}.lora_a", random.normal(size=(RANK, forward)).astype(np.float16))
        writer.add_tensor(f"{name}.lora_b", random.normal(size=(EMBEDDING, RANK)).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.rename(folder / f"{hashlib.sha256(path.read_bytes()).hexdigest()}.gguf")
