"""The ceiling of continuous batching: llama.cpp's own loop, several answers in every batch, with none of our layers."""

import time
from collections.abc import Sequence

import llama_cpp.llama_cpp as lib

from edge_rag.native.llama import ContextSettings, Model
from tools.bench.bare import BareLoop


class BareBatch(BareLoop):
    """Greedy answers to several prompts, each in its own sequence, a token of each in every batch."""

    def __init__(self, model: Model, settings: ContextSettings) -> None:
        super().__init__(model, settings)
        self._batch = lib.llama_batch_init(settings.n_batch, 0, 1)

    def __exit__(self, *error: object) -> None:
        lib.llama_batch_free(self._batch)
        super().__exit__(*error)

    def batched_rate(self, prompts: Sequence[Sequence[int]], count: int) -> float:
        """Tokens a second of all answers together, `count` tokens each, after all prompts are read."""
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        last = [self._read(prompt, sequence) for sequence, prompt in enumerate(prompts)]
        started = time.perf_counter()
        for step in range(count):
            self._run([(token, len(prompts[i]) + step, i, True) for i, token in enumerate(last)])
            last = [lib.llama_sampler_sample(self._sampler, self._context, i) for i in range(len(prompts))]
        return len(prompts) * count / (time.perf_counter() - started)

    def _read(self, prompt: Sequence[int], sequence: int) -> int:
        for start in range(0, len(prompt), self._n_batch):
            piece = prompt[start : start + self._n_batch]
            last = len(prompt) - 1 - start
            self._run([(token, start + i, sequence, i == last) for i, token in enumerate(piece)])
        return int(lib.llama_sampler_sample(self._sampler, self._context, -1))

    def _run(self, entries: Sequence[tuple[int, int, int, bool]]) -> None:
        """Decode (token, position, sequence, logits wanted)."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if lib.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
