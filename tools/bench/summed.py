"""Several adapters on at once, as P-RAG has it; the product never wears more than one."""

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import llama_cpp.llama_cpp as lib

from edge_rag.closing import Closing
from edge_rag.errors import EngineError
from edge_rag.native.llama import Context, ContextSettings, LoRA, Model, Run, Sampler
from edge_rag.records import Sampling
from edge_rag.runtime.prompting import Tokens


class Summed(Closing):
    """Answers under the sum of several adapters, which act on the whole prompt: P-RAG puts them into the weights.

    `files` are all adapters by name; they are loaded before the context is made, which reserves room for them.
    """

    def __init__(self, model: Model, sizes: ContextSettings, files: Mapping[int, Path]) -> None:
        self._model = model
        self._loaded = {name: LoRA(model, file) for name, file in files.items()}
        self._context = Context(model, sizes)

    def close(self) -> None:
        """Free the context, then the adapters."""
        self._context.close()
        for adapter in self._loaded.values():
            adapter.close()

    def __contains__(self, name: int) -> bool:
        return name in self._loaded

    def answer(self, prompt: Tokens, names: Sequence[int], most: int) -> str:
        """A greedy answer of at most so many tokens, under these adapters. Raises EngineError."""
        self._wear([self._loaded[name] for name in names])
        self._context.clear(0)
        step, place = self._context.settings.n_batch, 0
        for start in range(0, len(prompt), step):
            (place,) = self._context.decode([Run(prompt[start : start + step], 0, start, logits=True)])
        with Sampler(Sampling()) as sampler:
            return self._model.text(list(self._write(partial(sampler.sample, self._context), place, len(prompt), most)))

    def _write(self, sample: Callable[[int], int], place: int, position: int, most: int) -> Iterator[int]:
        for offset in range(most):
            token = sample(place)
            if self._model.ends_generation(token):
                return
            yield token
            (place,) = self._context.decode([Run((token,), 0, position + offset, logits=True)])

    def _wear(self, adapters: Sequence[LoRA]) -> None:
        count = len(adapters)
        handles = (lib.llama_adapter_lora_p_ctypes * max(1, count))(*(adapter.handle for adapter in adapters))
        scales = (ctypes.c_float * max(1, count))(*[1.0] * count)
        if lib.llama_set_adapters_lora(self._context.handle, handles, count, scales):
            raise EngineError("adapters could not be put on")
