"""One llama.cpp context (KV cells, compute buffers) and the sampler chain. Both belong to the engine's thread.

The live cache stays f16 with flash attention on and `kv_unified=True`: the state of a sequence can then be taken out,
cut and put back (docs/architecture.md).

Stopping: ggml asks an abort callback between graph nodes. A Python callback would be called hundreds of times a token
and fight for the GIL, so the callback is libc's `strlen` on a two-byte buffer of ours: empty string = go on, one
character = abort. Python writes that byte; no Python code runs inside a decode.
"""

import ctypes
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from edge_rag.closing import Closing
from edge_rag.errors import Cancelled, EngineError, ModelError
from edge_rag.native.kv_blob import Buffer
from edge_rag.native.llama import library
from edge_rag.native.llama.lora import LoRA
from edge_rag.native.llama.model import Model
from edge_rag.records import Sampling

_FLASH_ATTENTION_ON = 1
_strlen = lib.ggml_abort_callback(("strlen", ctypes.CDLL(None)))


class Run(Struct, frozen=True):
    """Tokens to be appended to `sequence` from `position` on; with `logits`, those of the last one are kept."""

    tokens: Sequence[int]
    sequence: int
    position: int
    logits: bool = False


class ContextSettings(Struct, frozen=True):
    """Sizes in tokens; `n_seq_max` sequences may live at once, `n_batch` or fewer."""

    n_ctx: int = 4096
    n_batch: int = 128
    n_seq_max: int = 2
    threads: int = 1


class Context(Closing):
    """A llama.cpp context over `model`. Not thread-safe, except `abort`, which any thread may call."""

    def __init__(self, model: Model, settings: ContextSettings) -> None:
        self.model = model
        self.settings = settings
        self._abort = ctypes.create_string_buffer(b"\0\0", 2)
        if settings.n_seq_max > settings.n_batch:  # llama.cpp would end the process
            raise EngineError(f"{settings.n_seq_max} sequences need batches of as many tokens, not {settings.n_batch}")
        self._init()

    def _init(self) -> None:
        library.clear_log()
        self.handle: Any = lib.llama_init_from_model(self.model.handle, _params(self.settings))
        if not self.handle:
            raise ModelError(
                f"no context of {self.settings.n_ctx} tokens could be made "
                f"({library.complaints() or 'no reason given'})",
                field=str(self.model.path),
                remedy="lower engine.n_ctx",
            )
        self._memory = lib.llama_get_memory(self.handle)
        lib.llama_set_abort_callback(self.handle, _strlen, ctypes.cast(self._abort, ctypes.c_void_p))
        self._batch = lib.llama_batch_init(self.settings.n_batch, 0, 1)
        self._worn: LoRA | None = None

    def wear(self, adapter: LoRA | None) -> None:
        """Decode with this adapter from now on, or with none. KV that is there stays as it was computed.

        Changing takes some milliseconds at the next decode. Raises EngineError.
        """
        if adapter is self._worn:
            return
        handles = (lib.llama_adapter_lora_p_ctypes * 1)(*([adapter.handle] if adapter else []))
        code = lib.llama_set_adapters_lora(self.handle, handles, 1 if adapter else 0, (ctypes.c_float * 1)(1.0))
        if code != 0:
            raise EngineError(f"an adapter could not be put on (code {code})")
        self._worn = adapter

    def renew(self) -> None:
        """Make all of it anew, with every sequence empty. Raises ModelError; the context is closed then."""
        self.close()
        self.abort(False)
        self._init()

    def close(self) -> None:
        """Free cells and buffers. Idempotent."""
        if self.handle:
            lib.llama_batch_free(self._batch)
            lib.llama_free(self.handle)
            self.handle = None

    def abort(self, on: bool) -> None:
        """Make the running and every later decode raise Cancelled (on), or allow decoding again (off)."""
        self._abort[0] = b"\1" if on else b"\0"

    def decode(self, runs: Sequence[Run]) -> tuple[int, ...]:
        """Append each run to its own sequence, all in one batch of at most `n_batch` tokens.

        Returns the place of each run's last token in the batch, for `logits` and `Sampler.sample`. A run sees only its
        own sequence, as it was before. Raises Cancelled after `abort(True)` and EngineError on any failure; in both
        cases no sequence has grown.
        """
        count = sum(len(run.tokens) for run in runs)
        if not all(run.tokens for run in runs):
            raise EngineError("a run must hold at least one token")
        if not 0 < count <= self.settings.n_batch:  # past it the native buffers are overrun
            raise EngineError(f"a batch must hold 1 to {self.settings.n_batch} tokens, not {count}")
        for run in runs:
            self._check_sequence(run.sequence)
        self._batch.n_tokens = count
        ends = tuple(end - 1 for end in accumulate(len(run.tokens) for run in runs))
        for run, end in zip(runs, ends, strict=True):
            self._fill(run, end + 1 - len(run.tokens))
            self._batch.logits[end] = run.logits
        self._decode()
        return ends

    def _fill(self, run: Run, start: int) -> None:
        batch = self._batch
        for offset, token in enumerate(run.tokens):
            place = start + offset
            batch.token[place] = token
            batch.pos[place] = run.position + offset
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = run.sequence
            batch.logits[place] = 0

    def _decode(self) -> None:
        code = lib.llama_decode(self.handle, self._batch)
        if code == 2:
            raise Cancelled("decoding was stopped")
        if code != 0:
            reason = "no free KV cells" if code == 1 else library.complaints() or f"code {code}"
            position = self._batch.pos[0]
            raise EngineError(f"llama_decode failed at position {position}: {reason}", remedy="raise engine.n_ctx")

    def _check_sequence(self, sequence: int) -> None:
        if not 0 <= sequence < self.settings.n_seq_max:  # past it llama.cpp ends the process
            raise EngineError(f"there is no sequence {sequence}, only 0 to {self.settings.n_seq_max - 1}")

    def wait(self) -> None:
        """Wait until all that was decoded is computed; needed to time it on a GPU."""
        lib.llama_synchronize(self.handle)

    def logits(self, place: int = -1) -> npt.NDArray[np.float32]:
        """Logits kept at this place of the last batch (-1: the last kept ones), a copy of shape [vocab_size]."""
        pointer = lib.llama_get_logits_ith(self.handle, place)
        return np.ctypeslib.as_array(pointer, shape=(self.model.vocab_size,)).copy()

    def clear(self, sequence: int, start: int = 0, end: int = -1) -> None:
        """Take the positions from `start` to below `end` (-1 = all) out of `sequence`.

        Cells that no sequence holds are free.
        """
        self._check_sequence(sequence)
        lib.llama_memory_seq_rm(self._memory, sequence, start, end)

    def share(self, source: int, target: int, start: int = 0, end: int = -1) -> None:
        """Let `target` hold the cells of `source` from `start` to below `end` too. Copies and computes nothing.

        The two must share no position; nothing checks that.
        """
        self._check_sequence(source)
        self._check_sequence(target)
        lib.llama_memory_seq_cp(self._memory, source, target, start, end)

    def end(self, sequence: int) -> int:
        """The position behind the last cell of `sequence`; 0 when it is empty."""
        return int(lib.llama_memory_seq_pos_max(self._memory, sequence)) + 1

    def save(self, sequence: int) -> Buffer:
        """The state of `sequence` as bytes, uint8 (layout: `native.kv_blob`)."""
        self._check_sequence(sequence)
        state = np.empty(lib.llama_state_seq_get_size(self.handle, sequence), dtype=np.uint8)
        written = lib.llama_state_seq_get_data(self.handle, _bytes_of(state), len(state), sequence)
        if written != len(state):
            raise EngineError(f"the state of sequence {sequence} has {written} bytes instead of {len(state)}")
        return state

    def restore(self, sequence: int, state: Buffer) -> None:
        """Replace `sequence` by a saved state. Raises EngineError and leaves it empty when it does not fit."""
        self._check_sequence(sequence)
        read = lib.llama_state_seq_set_data(self.handle, _bytes_of(state), len(state), sequence)
        if not read or read != len(state):  # 0 is its way of saying no, even to an empty state
            self.clear(sequence)
            raise EngineError(f"a saved state of {len(state)} bytes was not accepted (read {read})")

    @property
    def n_ctx(self) -> int:
        """Cells the context really has, in tokens."""
        return int(lib.llama_n_ctx(self.handle))


class Sampler(Closing):
    """A llama.cpp sampler chain for one answer: min_p, top_p, temperature, seeded draw; or greedy."""

    def __init__(self, sampling: Sampling) -> None:
        self._chain: Any = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for link in _links(sampling):
            lib.llama_sampler_chain_add(self._chain, link)

    def close(self) -> None:
        """Free the chain. Idempotent."""
        if self._chain:
            lib.llama_sampler_free(self._chain)
            self._chain = None

    def sample(self, context: Context, place: int = -1) -> int:
        """Choose the next token from the logits kept at this place of the last batch (-1: the last kept ones)."""
        return int(lib.llama_sampler_sample(self._chain, context.handle, place))


def _params(settings: ContextSettings) -> Any:
    params = lib.llama_context_default_params()
    params.n_ctx = settings.n_ctx
    params.n_batch = settings.n_batch
    params.n_ubatch = settings.n_batch
    params.n_seq_max = settings.n_seq_max
    params.n_threads = settings.threads
    params.n_threads_batch = settings.threads
    params.flash_attn_type = _FLASH_ATTENTION_ON
    params.kv_unified = True
    params.no_perf = True
    return params


def _links(sampling: Sampling) -> list[Any]:
    if sampling.temperature <= 0:
        return [lib.llama_sampler_init_greedy()]
    links = [lib.llama_sampler_init_min_p(sampling.min_p, 1)] if sampling.min_p > 0 else []
    if sampling.top_p < 1:
        links.append(lib.llama_sampler_init_top_p(sampling.top_p, 1))
    return [
        *links,
        lib.llama_sampler_init_temp(sampling.temperature),
        lib.llama_sampler_init_dist(sampling.seed),
    ]


def _bytes_of(buffer: Buffer) -> Any:
    return buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
