"""Tiny models with random weights, one for each way of knowing a token's position: files of .3 to .8 MB.

They have no vocabulary of texts, only 64 token numbers. What they write means nothing; how they treat positions is
what tests ask for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

VOCABULARY, CONTEXT = 64, 2048
EMBEDDING, HEADS, KV_HEADS, HEAD, FORWARD = 64, 4, 2, 16, 96
INNER, STATE, RANK, KERNEL = 128, 16, 4, 4  # of the recurrent one

Shapes = Mapping[str, tuple[int, ...]]

WHOLE = {"token_embd.weight": (VOCABULARY, EMBEDDING), "output_norm.weight": (EMBEDDING,)}
ATTENTION = {
    "attn_norm.weight": (EMBEDDING,),
    "attn_q.weight": (HEADS * HEAD, EMBEDDING),
    "attn_k.weight": (KV_HEADS * HEAD, EMBEDDING),
    "attn_v.weight": (KV_HEADS * HEAD, EMBEDDING),
    "attn_output.weight": (EMBEDDING, HEADS * HEAD),
    "ffn_norm.weight": (EMBEDDING,),
}
BIASES = {
    "attn_q.bias": (HEADS * HEAD,),
    "attn_k.bias": (KV_HEADS * HEAD,),
    "attn_v.bias": (KV_HEADS * HEAD,),
}
NORM_BIASES = {"attn_norm.bias": (EMBEDDING,), "ffn_norm.bias": (EMBEDDING,)}
GATED = {
    "ffn_gate.weight": (FORWARD, EMBEDDING),
    "ffn_up.weight": (FORWARD, EMBEDDING),
    "ffn_down.weight": (EMBEDDING, FORWARD),
}
POST_NORMS = {"post_attention_norm.weight": (EMBEDDING,), "post_ffw_norm.weight": (EMBEDDING,)}
FUSED = {
    "attn_norm.weight": (EMBEDDING,),
    "attn_qkv.weight": (3 * EMBEDDING, EMBEDDING),
    "attn_qkv.bias": (3 * EMBEDDING,),
    "attn_output.weight": (EMBEDDING, EMBEDDING),
    "attn_output.bias": (EMBEDDING,),
    "ffn_norm.weight": (EMBEDDING,),
    "ffn_up.weight": (FORWARD, EMBEDDING),
    "ffn_up.bias": (FORWARD,),
    "ffn_down.weight": (EMBEDDING, FORWARD),
    "ffn_down.bias": (EMBEDDING,),
    **NORM_BIASES,
}
RECURRENT = {
    "attn_norm.weight": (EMBEDDING,),
    "ssm_in.weight": (2 * INNER, EMBEDDING),
    "ssm_conv1d.weight": (INNER, KERNEL),
    "ssm_conv1d.bias": (INNER,),
    "ssm_x.weight": (RANK + 2 * STATE, INNER),
    "ssm_dt.weight": (INNER, RANK),
    "ssm_dt.bias": (INNER,),
    "ssm_a": (INNER, STATE),
    "ssm_d": (INNER,),
    "ssm_out.weight": (EMBEDDING, INNER),
}
ROTARY = {
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": HEAD,
    "rope.freq_base": 10000.0,
}
LAYER_NORM = {"attention.layer_norm_epsilon": 1e-5}


class TinyModel(NamedTuple):
    """An architecture's name in llama.cpp, the shapes of its tensors (whole model, each layer) and its metadata."""

    arch: str
    block: Shapes
    whole: Shapes = WHOLE
    metadata: Mapping[str, Any] = ROTARY
    layers: int = 2


LLAMA = ATTENTION | GATED
BIASED_OUTPUT = {**WHOLE, "output_norm.bias": (EMBEDDING,)}

TINY_MODELS = {
    "llama": TinyModel("llama", LLAMA),
    "llama-factors": TinyModel("llama", LLAMA, whole={**WHOLE, "rope_freqs.weight": (HEAD // 2,)}),
    "llama-linear": TinyModel(
        "llama", LLAMA, metadata={**ROTARY, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    ),
    "llama-yarn": TinyModel(
        "llama",
        LLAMA,
        metadata={
            **ROTARY,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": CONTEXT // 4,
        },
    ),
    "qwen2": TinyModel("qwen2", LLAMA | BIASES),
    "stablelm": TinyModel(  # turns half of each head
        "stablelm",
        LLAMA | NORM_BIASES,
        whole={**BIASED_OUTPUT, "output.weight": (VOCABULARY, EMBEDDING)},
        metadata={**ROTARY, **LAYER_NORM, "rope.dimension_count": HEAD // 2, "use_parallel_residual": False},
    ),
    "gpt2": TinyModel(  # learned positions
        "gpt2",
        FUSED,
        whole={**BIASED_OUTPUT, "position_embd.weight": (CONTEXT, EMBEDDING)},
        metadata={"attention.head_count": HEADS, **LAYER_NORM},
    ),
    "mamba": TinyModel(
        "mamba",
        RECURRENT,
        metadata={
            "attention.head_count": 0,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "ssm.conv_kernel": KERNEL,
            "ssm.inner_size": INNER,
            "ssm.state_size": STATE,
            "ssm.time_step_rank": RANK,
        },
    ),
    "gemma2": TinyModel(  # every second layer sees a window only
        "gemma2",
        LLAMA | POST_NORMS,
        metadata={
            **ROTARY,
            "attention.key_length": HEAD,
            "attention.value_length": HEAD,
            "attention.sliding_window": 32,
        },
    ),
    "qwen2vl": TinyModel(  # positions of text, height and width
        "qwen2vl", LLAMA | BIASES, metadata={**ROTARY, "rope.dimension_sections": [2, 3, 3, 0]}
    ),
    "smollm3": TinyModel("smollm3", LLAMA, layers=4),  # turns no keys in its fourth layer
}


def write_tiny_model(name: str, folder: Path) -> Path:
    """Write one of TINY_MODELS as a GGUF file. Its weights are the same every time."""
    model = TINY_MODELS[name]
    path = folder / f"{name}.gguf"
    writer = gguf.GGUFWriter(path, model.arch)
    for key, value in {**_sizes(model), **model.metadata}.items():
        _put(writer, f"{model.arch}.{key}", value)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    random = np.random.default_rng(7)
    for tensor, shape in _tensors(model).items():
        writer.add_tensor(tensor, _weights(tensor, shape, random))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _sizes(model: TinyModel) -> dict[str, int]:
    return {
        "vocab_size": VOCABULARY,
        "context_length": CONTEXT,
        "embedding_length": EMBEDDING,
        "feed_forward_length": FORWARD if "ffn_up.weight" in model.block else 0,
        "block_count": model.layers,
    }


def _put(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value)


def _tensors(model: TinyModel) -> dict[str, tuple[int, ...]]:
    blocks = {f"blk.{layer}.{name}": shape for layer in range(model.layers) for name, shape in model.block.items()}
    return {**model.whole, **blocks}


def _weights(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    if name == "rope_freqs.weight":
        return np.geomspace(1, 8, *shape, dtype=np.float32)  # slow pairs are slowed down further, as Llama 3 does
    if name.endswith(("norm.weight", "ssm_d")):
        return np.ones(shape, dtype=np.float32)
    if name.endswith("ssm_a"):
        return -np.broadcast_to(np.arange(1, shape[1] + 1, dtype=np.float32), shape).copy()
    return (random.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
