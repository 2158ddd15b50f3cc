"""The baselines of `overhead`: the shortest correct loops over the foreign libraries, with none of our layers."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import llama_cpp.llama_cpp as lib
import numpy as np
import numpy.typing as npt
import onnxruntime
from tokenizers import Tokenizer

from edge_rag.native.llama import ContextSettings, Model

Vectors = npt.NDArray[np.float32]
BATCH = 32
MAX_TOKENS = 512


class BareLoop:
    """llama.cpp's low-level API: prompt in batches, then one token at a time, greedy; no text is made."""

    def __init__(self, model: Model, settings: ContextSettings) -> None:
        params = lib.llama_context_default_params()
        params.n_ctx = settings.n_ctx
        params.n_batch = params.n_ubatch = settings.n_batch
        params.n_seq_max = settings.n_seq_max
        params.n_threads = params.n_threads_batch = settings.threads
        params.flash_attn_type = 1
        params.kv_unified = True
        params.no_perf = True
        self._n_batch = settings.n_batch
        self._context: Any = lib.llama_init_from_model(model.handle, params)
        self._sampler: Any = lib.llama_sampler_init_greedy()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        lib.llama_sampler_free(self._sampler)
        lib.llama_free(self._context)

    def tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` tokens that follow the prompt; the end of generation is ignored."""
        return self._write(prompt, count)[0]

    def decode_rate(self, prompt: Sequence[int], count: int) -> float:
        """Tokens a second after the first."""
        return (count - 1) / self._write(prompt, count)[1]

    def _write(self, prompt: Sequence[int], count: int) -> tuple[list[int], float]:
        context, sampler = self._context, self._sampler
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        for start in range(0, len(prompt), self._n_batch):
            part = prompt[start : start + self._n_batch]
            tokens = (lib.llama_token * len(part))(*part)  # named: the batch holds only a pointer to it
            if lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(part))):
                raise RuntimeError("llama_decode failed")
        written = [lib.llama_sampler_sample(sampler, context, -1)]
        started = time.perf_counter()
        buffer = (lib.llama_token * 1)()
        batch = lib.llama_batch_get_one(buffer, 1)
        while len(written) < count:
            buffer[0] = written[-1]
            lib.llama_decode(context, batch)
            written.append(lib.llama_sampler_sample(sampler, context, -1))
        return written, time.perf_counter() - started


class BareEmbedder:
    """onnxruntime and tokenizers as their examples show it: batches of 32 in the given order, padded to the longest."""

    def __init__(self, model: Path, tokenizer: Path, *, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.enable_padding()
        self._inputs = {entry.name for entry in self._session.get_inputs()}

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors of `texts`."""
        return np.concatenate([self._run(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)])

    def _run(self, texts: Sequence[str]) -> Vectors:
        encodings = self._tokenizer.encode_batch(list(texts))
        ids = np.array([encoding.ids for encoding in encodings], dtype=np.int64)
        mask = np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64)
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        hidden = self._session.run(None, {name: feed[name] for name in self._inputs})[0]
        pooled = (hidden * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        return np.asarray(pooled / np.linalg.norm(pooled, axis=1, keepdims=True), dtype=np.float32)
