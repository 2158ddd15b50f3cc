"""What a model's cache looks like, from its metadata: shape of keys and values, and how keys are turned.

A model whose passages cannot be moved gets a reason instead, in words for `status` and `doctor`. Metadata is believed
only until `self_test` has compared it with what the model really does.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from edge_rag.native import rope
from edge_rag.native.kv_blob import KVShape
from edge_rag.native.llama.model import Model
from edge_rag.native.rope import Rope, Yarn

_PAIRINGS: dict[int, rope.Pairing] = {
    lib.LLAMA_ROPE_TYPE_NORM: "neighbours",
    lib.LLAMA_ROPE_TYPE_NEOX: "halves",
}
_F32 = 0  # GGML_TYPE_F32
_LLAMA3_FACTORS = "rope_freqs.weight"


class Geometry(Struct, frozen=True):
    """Shape of the cache and rotation of its keys."""

    shape: KVShape
    rope: Rope


def geometry(model: Model) -> Geometry | str:
    """The geometry of `model`, or the reason why its passages cannot be moved."""
    reason = _obstacle(model)
    if reason:
        return reason
    arch = model.metadata("general.architecture")
    heads, heads_kv = (int(count(model.handle)) for count in (lib.llama_model_n_head, lib.llama_model_n_head_kv))
    usual = int(lib.llama_model_n_embd(model.handle)) // heads
    k_head = int(model.metadata(f"{arch}.attention.key_length") or usual)
    v_head = int(model.metadata(f"{arch}.attention.value_length") or usual)
    layers = int(lib.llama_model_n_layer(model.handle))
    rotated = int(model.metadata(f"{arch}.rope.dimension_count") or k_head)
    return Geometry(
        shape=KVShape(layers, heads_kv * k_head, heads_kv * v_head),
        rope=Rope(
            pairing=_PAIRINGS[lib.llama_model_rope_type(model.handle)],
            head_size=k_head,
            rotated=rotated,
            frequencies=_frequencies(model, arch, rotated),
        ),
    )


def _obstacle(model: Model) -> str:
    handle = model.handle
    if lib.llama_model_has_encoder(handle):
        return "it has an encoder"
    if lib.llama_model_is_recurrent(handle) or lib.llama_model_is_hybrid(handle):
        return "it has recurrent layers, whose state cannot be cut into passages"
    if lib.llama_model_n_swa(handle) > 0:
        return "it uses sliding-window attention"
    kind = lib.llama_model_rope_type(handle)
    if kind == lib.LLAMA_ROPE_TYPE_NONE:
        return "its positions are not rotary"
    arch = model.metadata("general.architecture")
    if model.metadata(f"{arch}.rope.scaling.type") == "longrope":
        return "it uses LongRoPE, whose factors depend on the context's length"
    if kind not in _PAIRINGS:
        return "it uses multi-dimensional rotary positions (M-RoPE)"
    return ""


def _frequencies(model: Model, arch: str, rotated: int) -> tuple[float, ...]:
    base = float(model.metadata(f"{arch}.rope.freq_base") or 10000.0)
    kind = model.metadata(f"{arch}.rope.scaling.type")
    scale = float(lib.llama_model_rope_freq_scale_train(model.handle)) if kind != "none" else 1.0
    yarn = None
    if kind == "yarn":
        yarn = Yarn(
            n_ctx_orig=model.n_ctx_original or model.n_ctx_train,
            beta_fast=float(model.metadata(f"{arch}.rope.scaling.yarn_beta_fast") or 32.0),
            beta_slow=float(model.metadata(f"{arch}.rope.scaling.yarn_beta_slow") or 1.0),
            ext_factor=float(model.metadata(f"{arch}.rope.scaling.yarn_ext_factor") or 1.0),
        )
    factors = read_tensor(model.path, _LLAMA3_FACTORS)
    return rope.frequencies(rotated, base, scale=scale, yarn=yarn, factors=factors)


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@functools.cache
def _gguf() -> Any:
    """ggml's own GGUF reader; libllama has loaded it."""
    base = lib._lib
    base.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParams]
    base.gguf_init_from_file.restype = ctypes.c_void_p
    base.gguf_free.argtypes = [ctypes.c_void_p]
    base.gguf_free.restype = None
    base.gguf_find_tensor.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    base.gguf_find_tensor.restype = ctypes.c_int64
    base.gguf_get_data_offset.argtypes = [ctypes.c_void_p]
    base.gguf_get_data_offset.restype = ctypes.c_size_t
    for name, kind in (("offset", ctypes.c_size_t), ("size", ctypes.c_size_t), ("type", ctypes.c_int)):
        function = getattr(base, f"gguf_get_tensor_{name}")
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int64], kind
    return base


def read_tensor(path: Path, name: str) -> npt.NDArray[np.float32] | None:
    """A small f32 tensor of a GGUF file, flat; None when the file has none of this name and type."""
    gguf = _gguf()
    context = gguf.gguf_init_from_file(str(path).encode(), _InitParams(True, None))
    if not context:
        return None
    try:
        index = gguf.gguf_find_tensor(context, name.encode())
        if index < 0 or gguf.gguf_get_tensor_type(context, index) != _F32:
            return None
        start = gguf.gguf_get_data_offset(context) + gguf.gguf_get_tensor_offset(context, index)
        count = gguf.gguf_get_tensor_size(context, index) // 4
    finally:
        gguf.gguf_free(context)
    return np.fromfile(path, dtype="<f4", count=count, offset=start)
