"""The contexts' keys and values by the base, computed once and kept as long as there is room.

Of more than there is room for the least recently used go.

A context is what serving keeps as KV: prefix and passages, read by the base without the adapter. So they need no
gradient, are the same in every epoch, and of a bare prefix that many examples share there is one.

On the processor each is computed alone: then its numbers do not depend on what else was missing, and a training that
goes on after a kill is equal to the last bit. On a GPU several are computed at a time.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from edge_rag.learning.job import Examples

TOGETHER = 8192  # context tokens, padded, that are computed at a time on a GPU at most


class FixedLayer(DynamicLayer):  # type: ignore[misc]
    """The past of one layer that is looked at and never added to: a layer can be computed again with it."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Past and new keys and values, one behind the other."""
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class Contexts:
    """KV of a job's contexts. `adapted` is the PeftModel, `limit` the bytes that may be kept.

    `together`: tokens that may be computed at a time; one context always is.
    """

    def __init__(
        self, adapted: Any, data: Examples, device: torch.device, limit: int, *, together: int = TOGETHER
    ) -> None:
        self._adapted = adapted
        self._model = adapted.get_base_model()
        self._data = data
        self._device = device
        self._limit = limit
        self._together = 0 if device.type == "cpu" else min(together, TOGETHER)
        self._kept: OrderedDict[int, torch.Tensor] = OrderedDict()  # [layers, 2, kv heads, tokens, head]
        self.bytes = 0
        self.computed = 0

    def past(self, wanted: Sequence[int]) -> Cache:
        """The pasts of these contexts, one a row, padded on the right with zeros."""
        found = self._fetch(wanted)
        length = max(found[one].shape[3] for one in wanted)
        layers, two, heads, _, head = found[wanted[0]].shape
        whole = torch.zeros((layers, two, len(wanted), heads, length, head), device=self._device)
        for row, one in enumerate(wanted):
            whole[:, :, row, :, : found[one].shape[3]] = found[one]
        self._shrink()
        return Cache(layers=[FixedLayer(*layer) for layer in whole])

    def limit(self, limit: int) -> None:
        """Keep fewer bytes from now on."""
        self._limit = limit
        self._shrink()

    def _fetch(self, wanted: Sequence[int]) -> dict[int, torch.Tensor]:
        missing = [one for one in dict.fromkeys(wanted) if one not in self._kept]
        for group in self._groups(missing):
            for one, kv in zip(group, self._compute(group), strict=True):
                self._kept[one] = kv
                self.bytes += kv.nbytes
        for one in wanted:
            self._kept.move_to_end(one)
        return {one: self._kept[one] for one in wanted}

    def _shrink(self) -> None:
        while self._kept and self.bytes > self._limit:
            _, kv = self._kept.popitem(last=False)
            self.bytes -= kv.nbytes

    def _tokens(self, one: int) -> torch.Tensor:
        start, end = self._data.context_ends[one], self._data.context_ends[one + 1]
        return torch.from_numpy(self._data.contexts[start:end].astype("int64"))

    def _groups(self, missing: list[int]) -> Iterator[list[int]]:
        """By length, so that little is padded; each alone on the processor."""
        group: list[int] = []
        for one in sorted(missing, key=lambda one: len(self._tokens(one))):
            if group and (len(group) + 1) * len(self._tokens(one)) > self._together:
                yield group
                group = []
            group.append(one)
        if group:
            yield group

    def _compute(self, group: list[int]) -> list[torch.Tensor]:
        """Padding on the right needs no mask: nothing looks ahead, and what the padding makes of itself is cut off."""
        texts = [self._tokens(one) for one in group]
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(self._device)
        self.computed += sum(map(len, texts))
        with torch.no_grad(), self._adapted.disable_adapter():
            layers = self._model.model(input_ids=padded, use_cache=True).past_key_values.layers
            return [
                torch.stack([torch.stack([layer.keys[row], layer.values[row]]) for layer in layers])[
                    ..., : len(text), :
                ].clone()
                for row, text in enumerate(texts)
            ]
