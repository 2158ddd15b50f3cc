"""The adapter as files: GGUF for llama.cpp, a PEFT folder for transformers and vLLM.

Both hold the same numbers: they are rounded to float16 first, in the model too, so that the proof is about what is
served. llama.cpp wants `lora_a` [rank, inputs] and `lora_b` [outputs, rank] of each tensor it knows; its files of
"llama" models have the rows of Q and K in another order (pairs of one turn next to each other, where transformers has
halves), so the rows of their B follow.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from edge_rag.errors import ModelError
from edge_rag.learning.job import ADAPTER, PEFT, Job, settle
from edge_rag.learning.trainer import lora
from edge_rag.learning.trainer.sizes import Facts
from edge_rag.store.fetching import storage_errors
from edge_rag.store.model_files import hash_file, sync

PAIRED = {"llama": True, "qwen2": False, "qwen3": False}  # architectures whose Q and K we know


def check_architecture(job: Job, facts: Facts) -> None:
    """Raise ModelError when attention is to be adapted and we do not know how llama.cpp orders it."""
    if job.targets == "all" and facts.architecture not in PAIRED:
        raise ModelError(
            "its attention cannot be adapted", field=facts.architecture, remedy="set learning.targets to ffn or down"
        )


def round_weights(adapted: Any) -> None:
    """Round the adapter in the model to what its files will hold. Raises ModelError when float16 cannot hold it."""
    with torch.no_grad():
        for name, value in lora.weights(adapted).items():
            value.copy_(value.half().float())
            if not torch.isfinite(value).all():
                raise ModelError("the adapter has numbers that float16 cannot hold", field=name)


def write_gguf(folder: Path, adapted: Any, job: Job, facts: Facts) -> tuple[str, int]:
    """Write adapter.gguf; its sha256 and bytes. Raises StorageError."""
    file = folder / ADAPTER
    beside = file.with_name(f".{ADAPTER}.{os.getpid()}")
    with storage_errors(file):
        try:
            writer = gguf.GGUFWriter(beside, facts.architecture)
            writer.add_type("adapter")
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", float(lora.alpha(job)))
            for name, values in gguf_tensors(adapted, job, facts):
                writer.add_tensor(name, values)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            settle(beside, file)
        finally:
            beside.unlink(missing_ok=True)
    return hash_file(file, None), file.stat().st_size


def gguf_tensors(adapted: Any, job: Job, facts: Facts) -> Iterator[tuple[str, npt.NDArray[np.float16]]]:
    """The adapter's matrices under llama.cpp's names, in its order of rows."""
    found = lora.weights(adapted)
    heads = {"q_proj": facts.heads, "k_proj": facts.kv_heads}
    for module, tensor in lora.TARGETS[job.targets].items():
        room = "mlp" if module in lora.FEED_FORWARD else "self_attn"
        for layer in lora.adapted_layers(job, facts):
            where = f"base_model.model.model.layers.{layer}.{room}.{module}"
            first, second = (
                found[f"{where}.lora_{side}.default.weight"].detach().half().cpu().numpy() for side in "AB"
            )
            if module in heads and PAIRED[facts.architecture]:
                second = paired(second, heads[module])
            yield f"blk.{layer}.{tensor}.weight.lora_a", first
            yield f"blk.{layer}.{tensor}.weight.lora_b", second


def paired(rows: npt.NDArray[np.float16], heads: int) -> npt.NDArray[np.float16]:
    """Rows [heads × head, …] from halves to pairs: row i of a head's first half, then row i of its second."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def write_peft(folder: Path, adapted: Any, job: Job) -> None:
    """Write the PEFT folder as a whole. Raises StorageError."""
    place = folder / PEFT
    beside = place.with_name(f".{PEFT}.{os.getpid()}")
    # Where our cache of weights is means nothing to anybody else.
    adapted.peft_config["default"].base_model_name_or_path = Path(job.model).name
    with storage_errors(place):
        adapted.save_pretrained(beside, save_embedding_layers=False)
        (beside / "README.md").unlink(missing_ok=True)  # a form that nobody has filled in
        for file in beside.iterdir():
            sync(file)
        shutil.rmtree(place, ignore_errors=True)
        beside.rename(place)
        sync(folder)
