"""A request from the engine's side: its events on their way to the caller, and its steps on the engine's thread."""

import queue
import time
from collections.abc import Callable, Iterator, Sequence

from msgspec import Struct

from edge_rag.errors import Cancelled, EdgeRAGError
from edge_rag.native.llama import Context, Run, Sampler
from edge_rag.policy.streaming import TextStream
from edge_rag.records import FinishReason, PassagePlan, Sampling, Usage
from edge_rag.runtime.assembly import Assembler
from edge_rag.runtime.prompting import Prompt
from edge_rag.runtime.splicing import MAIN, Assembled


class Reading(Struct, frozen=True):
    """`done` of `total` prompt tokens are read."""

    done: int
    total: int


class Text(Struct, frozen=True):
    """More text of the answer: whole characters, no stop string."""

    text: str


class Finished(Struct, frozen=True):
    """The last event. `passages` tells how each came into the prompt; empty when it was cancelled before.

    `queued` and `first_token` are seconds from `submit`.
    """

    reason: FinishReason
    usage: Usage
    passages: tuple[PassagePlan, ...]
    queued: float
    first_token: float


Step = Reading | Text | Finished


class Generation:
    """A request on its way: iterate over its events; `cancel` from any thread."""

    def __init__(self, prompt: Prompt, sampling: Sampling, stop: Callable[["Generation"], None]) -> None:
        self._stop = stop
        self.prompt = prompt
        self.sampling = sampling
        self.submitted = time.perf_counter()
        self.events: queue.SimpleQueue[Step | EdgeRAGError] = queue.SimpleQueue()
        self.cancelled = False
        self.expected: tuple[str, ...] = ()  # keys of passages that are kept until it is served

    def __iter__(self) -> Iterator[Step]:
        while True:
            event = self.events.get()
            if isinstance(event, EdgeRAGError):
                raise event
            yield event
            if isinstance(event, Finished):
                return

    def cancel(self) -> None:
        """Stop it as soon as possible; its `Finished` says 'cancelled', unless it was done before."""
        self._stop(self)


class Desk:
    """What work on the engine's thread works with: the context and the assembler, and whether it is still wanted."""

    def __init__(self, context: Context, assembler: Assembler, generation: Generation | None = None) -> None:
        self.context = context
        self.assembler = assembler
        self._generation = generation

    def decode(self, runs: Sequence[Run]) -> None:
        """Decode runs without keeping logits. Raises Cancelled when the work is no longer wanted."""
        self.check()
        self.context.decode_runs(runs)

    def read(self, tokens: Sequence[int], position: int) -> None:
        """Append tokens to the main sequence, a batch at most; logits of the last one are kept. Raises Cancelled."""
        self.check()
        self.context.decode(tokens, sequence=MAIN, position=position)

    def check(self) -> None:
        """Raise Cancelled when the request was cancelled; needed where a decode cannot be interrupted."""
        if self._generation and self._generation.cancelled:
            raise Cancelled("the request was cancelled")


class Request:
    """One request being served: the state between its steps."""

    def __init__(self, desk: Desk, generation: Generation) -> None:
        self._desk = desk
        self._context = desk.context
        self._generation = generation
        self._started = time.perf_counter()
        self._first_token = 0.0
        self._assembled = Assembled(0, 0, ())
        self._written = 0
        self._position = 0

    def finish(self) -> Finished:
        """Run the request to its end."""
        try:
            self._desk.check()
            self._read_prompt()
            reason = self._write_answer()
        except Cancelled:
            reason = "cancelled"
        submitted = self._generation.submitted
        return Finished(
            reason,
            Usage(
                prompt_tokens=len(self._generation.prompt),
                cached_tokens=self._assembled.cached,
                completion_tokens=self._written,
            ),
            passages=self._assembled.passages,
            queued=self._started - submitted,
            first_token=max(0.0, self._first_token - submitted),
        )

    def _read_prompt(self) -> None:
        prompt, assembler = self._generation.prompt, self._desk.assembler
        self._assembled = assembler.assemble(prompt, self._desk.decode)
        self._position = self._assembled.position
        self._tell()
        if assembler.opaque and self._position < prompt.seams[-1]:
            self._read_until(prompt.seams[-1])
            assembler.keep_state(prompt, self._assembled)
        self._read_until(len(prompt))
        assembler.count(prompt, self._assembled)

    def keep_state(self) -> None:
        """Keep the state of the whole prompt, when it has been answered."""
        if not self._desk.assembler.opaque:
            self._context.clear(MAIN, len(self._generation.prompt) - 1)
            self._desk.assembler.keep_state(self._generation.prompt, self._assembled)

    def _read_until(self, end: int) -> None:
        tokens, step = self._generation.prompt.tokens, self._context.settings.n_batch
        while self._position < end:
            started = time.perf_counter()
            batch = tokens[self._position : min(end, self._position + step)]
            self._read(batch)
            self._context.wait()
            self._desk.assembler.observe(len(batch), time.perf_counter() - started)
            self._tell()

    def _tell(self) -> None:
        self._generation.events.put(Reading(self._position, len(self._generation.prompt)))

    def _write_answer(self) -> FinishReason:
        stream = TextStream(self._generation.sampling.stop)
        with Sampler(self._generation.sampling) as sampler:
            try:
                reason = self._write_tokens(sampler, stream)
            finally:
                self._say(stream.finish())
        return "stop" if stream.stopped else reason

    def _write_tokens(self, sampler: Sampler, stream: TextStream) -> FinishReason:
        model, limit = self._context.model, self._generation.sampling.max_tokens
        while True:
            token = sampler.sample(self._context)
            self._first_token = self._first_token or time.perf_counter()
            if model.ends_generation(token):
                return "stop"
            self._written += 1
            self._say(stream.feed(model.piece(token)))
            if stream.stopped:
                return "stop"
            if self._written == limit:
                return "length"
            self._read([token])

    def _say(self, text: str) -> None:
        if text:
            self._generation.events.put(Text(text))

    def _read(self, tokens: Sequence[int]) -> None:
        self._desk.read(tokens, self._position)
        self._position += len(tokens)
