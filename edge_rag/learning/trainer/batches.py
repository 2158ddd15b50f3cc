"""Which examples are computed together. Pure numbers until `tensors`.

An update sums the gradients of as many examples as `sizes.per_update` says, in the order of the job's epoch. How these
are cut into micro-batches is a matter of memory and speed only: they are sorted by length, so that little is padded,
and cut where the next one would no longer fit. A GPU is given as much as that at once. On a processor padding costs
what work costs, and wide batches are no faster, while a pause has to wait for them: there they are cut sooner.
The order is the same every time, so that a training that goes on after a kill adds the same numbers in the same order.

    contexts |  question, header, answer    padded on the right on both sides of the bar
    (base)   |  (adapter)                   the last answer token is predicted and never read
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from msgspec import Struct

from edge_rag.learning.job import Examples, Ints
from edge_rag.learning.trainer.sizes import Facts, Room, Shape, need, per_update

PADDED = 0.25  # share of a micro-batch on a processor that may be padding
NARROW = 384  # tokens, padded, of a micro-batch on a processor
CONTEXT_COST = 0.1  # of a context token beside a token that is trained on: it is only attended to


class Plan:
    """The steps of a job, in the order of its epochs. `wide`: micro-batches as large as fits, padded or not."""

    def __init__(self, data: Examples, facts: Facts, *, wide: bool) -> None:
        self.data = data
        self.facts = facts
        self._wide = wide
        columns = data.examples.T
        self.contexts = np.diff(data.context_ends)[columns[0]]
        self.answers = np.diff(data.answer_ends)[columns[2]]
        self.tokens = np.diff(data.tail_ends)[columns[1]] + self.answers - 1

    @cached_property
    def per_update(self) -> int:
        """Examples of a step; the last one of an epoch may have fewer."""
        return per_update(int(self.data.order.shape[1]))

    @cached_property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return -(-int(self.data.order.shape[1]) // self.per_update)

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.per_epoch * int(self.data.order.shape[0])

    def largest(self) -> Shape:
        """A shape that no example alone exceeds."""
        used = np.unique(self.data.order)
        return Shape(1, int(self.contexts[used].max()), int(self.tokens[used].max()), int(self.answers[used].max()))

    def epoch(self, step: int) -> int:
        """The epoch of a step; both are counted from 0."""
        return step // self.per_epoch

    def micro_batches(self, step: int, room: Room) -> Iterator[list[int]]:
        """The examples of a step, cut so that each part fits into the room. Each part has one at least."""
        part: list[int] = []
        for example in sorted(
            self._examples(step).tolist(), key=lambda one: (self.contexts[one], self.tokens[one], one)
        ):
            if part and not self._fits([*part, example], room):
                yield part
                part = []
            part.append(example)
        yield part

    def _fits(self, part: list[int], room: Room) -> bool:
        contexts, tokens = self.contexts[part], self.tokens[part]
        shape = Shape(len(part), int(contexts.max()), int(tokens.max()), int(self.answers[part].sum()))
        if need(self.facts, shape, recompute=room.recompute) > room.batch:
            return False
        padded = shape.rows * (shape.tokens + CONTEXT_COST * shape.context)
        work = float(tokens.sum() + CONTEXT_COST * contexts.sum())
        narrow = shape.rows * shape.tokens <= NARROW and work >= (1 - PADDED) * padded
        return self._wide or narrow

    def counts(self, step: int) -> tuple[int, int]:
        """Of a step: tokens that are trained on, and answer tokens among them."""
        wanted = self._examples(step)
        return int(self.tokens[wanted].sum()), int(self.answers[wanted].sum())

    def _examples(self, step: int) -> Ints:
        start = step % self.per_epoch * self.per_update
        wanted: Ints = self.data.order[self.epoch(step)][start : start + self.per_update]
        return wanted


class Batch(Struct):
    """A micro-batch on its device: B rows, T tokens behind C context tokens, n answer tokens.

    inputs and positions [B, T]; mask [B, 1, T, C + T], True where a token may look; rows and columns [n]: where the
    answer tokens are predicted; targets [n]; top_ids [n, 16]; top_logprobs [n, 16].
    """

    contexts: list[int]
    inputs: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


def tensors(data: Examples, part: Sequence[int], device: torch.device) -> Batch:
    """The micro-batch of these examples."""
    contexts, tails, answers = data.examples[list(part)].T
    past = np.diff(data.context_ends)[contexts]
    texts = [_text(data, tail, answer) for tail, answer in zip(tails, answers, strict=True)]
    width = max(map(len, texts))
    inputs = np.zeros((len(texts), width), dtype=np.int64)
    for row, text in zip(inputs, texts, strict=True):
        row[: len(text)] = text
    starts, ends = data.answer_ends[answers], data.answer_ends[answers + 1]
    places = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
    first = np.diff(data.tail_ends)[tails] - 1  # the token that predicts the first of the answer
    values: dict[str, Any] = {
        "inputs": inputs,
        "positions": past[:, None] + np.arange(width),
        "mask": _mask(past, width),
        "rows": np.repeat(np.arange(len(texts)), ends - starts),
        "columns": np.concatenate(
            [at + np.arange(end - start) for at, start, end in zip(first, starts, ends, strict=True)]
        ),
        "targets": data.answers[places].astype(np.int64),
        "top_ids": data.top_ids[places].astype(np.int64),
        "top_logprobs": data.top_logprobs[places].astype(np.float32),
    }
    return Batch(contexts.tolist(), **{name: torch.from_numpy(value).to(device) for name, value in values.items()})


def _text(data: Examples, tail: int, answer: int) -> Ints:
    """What is read behind a context: the tail, and the answer but for its last token."""
    words = data.answers[data.answer_ends[answer] : data.answer_ends[answer + 1] - 1]
    return np.concatenate([data.tails[data.tail_ends[tail] : data.tail_ends[tail + 1]], words])


def _mask(past: Any, width: int) -> Any:
    """All of a row's own context, and what stands before; padding at the end looks at itself, so no row is empty."""
    seen = np.arange(past.max()) < past[:, None]
    context = np.broadcast_to(seen[:, None, :], (len(past), width, seen.shape[1]))
    before = np.broadcast_to(np.tri(width, dtype=bool), (len(past), width, width))
    return np.concatenate([context, before], axis=2)[:, None]
