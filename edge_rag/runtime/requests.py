"""A request from the engine's side: its events on their way to the caller, and its steps on the engine's thread."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Protocol, Self

from msgspec import Struct

from edge_rag.errors import EdgeRAGError
from edge_rag.native.llama import Context, Run, Sampler
from edge_rag.policy.scheduling import Job
from edge_rag.policy.streaming import TextStream
from edge_rag.records import FinishReason, PassagePlan, Sampling, Usage
from edge_rag.runtime.assembly import Assembler
from edge_rag.runtime.prompting import Prompt
from edge_rag.runtime.splicing import Assembled, Decoded
from edge_rag.runtime.steps import Steps, Wanted

NONE = -1  # in place of a token


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


EngineEvent = Reading | Text | Finished


class Cancellable(Protocol):
    """A request, or a chore's future."""

    def cancel(self) -> object:
        """Stop it as soon as possible."""


class Scope:
    """What is waited for inside `with scope` can be cancelled together, from any thread.

    Whoever waits for the engine is in a call that he cannot be called back from: this is how another thread ends it.
    What is waited for after that is cancelled at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: list[Cancellable] = []
        self.cancelled = False

    def __enter__(self) -> Self:
        self._outer = _scope.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _scope.reset(self._outer)

    def cancel(self) -> None:
        """End what is inside, and what will come."""
        with self._lock:
            self.cancelled = True
            inside = list(self._inside)
        for each in inside:
            each.cancel()

    @contextlib.contextmanager
    def holding(self, work: Cancellable) -> Iterator[None]:
        """While inside, it ends with the others."""
        with self._lock:
            self._inside.append(work)
            late = self.cancelled
        if late:
            work.cancel()
        try:
            yield
        finally:
            with self._lock:
                self._inside.remove(work)


_scope: ContextVar[Scope | None] = ContextVar("scope", default=None)


def current_scope() -> Scope:
    """The scope that the caller is in; outside of any, one that nobody cancels."""
    return _scope.get() or Scope()


class Generation:
    """A request on its way: iterate over its events; `cancel` from any thread.

    `deadline` is the time (of `time.perf_counter`) at which it is given up, whatever has been written by then.
    """

    def __init__(
        self,
        prompt: Prompt,
        sampling: Sampling,
        *,
        job: Job,
        stop: Callable[["Generation"], None],
        deadline: float = float("inf"),
    ) -> None:
        self._stop = stop
        self.prompt = prompt
        self.sampling = sampling
        self.job = job
        self.deadline = deadline
        self.submitted = time.perf_counter()
        self.events: queue.SimpleQueue[EngineEvent | EdgeRAGError] = queue.SimpleQueue()
        self.cancelled = False
        self.expected: tuple[str, ...] = ()  # keys of passages that are kept until it is served
        self.ended = False  # its last event is out

    def __iter__(self) -> Iterator[EngineEvent]:
        with current_scope().holding(self):
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

    def end(self, event: Finished | EdgeRAGError) -> None:
        """Put the last event; only the first one counts. For the engine's thread."""
        if not self.ended:
            self.ended = True
            self.events.put(event)

    def never_served(self) -> None:
        """It is given up before anything of it was done."""
        waited = time.perf_counter() - self.submitted
        usage = Usage(prompt_tokens=len(self.prompt))
        self.end(Finished(self.unwanted or "cancelled", usage, (), queued=waited, first_token=0.0))

    @property
    def unwanted(self) -> FinishReason | None:
        """Why it is to be given up; None when it is not."""
        if self.cancelled:
            return "cancelled"
        return "timeout" if time.perf_counter() > self.deadline else None


class Desk:
    """What work on the engine's thread works with: the context, the assembler, and a sequence of its own."""

    def __init__(
        self,
        context: Context,
        assembler: Assembler,
        *,
        steps: Steps | None = None,
        sequence: int = 0,
        lane: str = "",
        wanted: Wanted = lambda: True,
    ) -> None:
        self.context = context
        self.assembler = assembler
        self.sequence = sequence
        self._steps = steps or Steps(context)
        self._lane = lane
        self._wanted = wanted

    def decode(self, runs: Sequence[Run]) -> Decoded:
        """Decode runs, however long. Raises Cancelled when the work is no longer wanted."""
        return self._steps.decode(runs, lane=self._lane, wanted=self._wanted)

    def read(self, tokens: Sequence[int], position: int) -> Decoded:
        """Append tokens to the desk's sequence; logits of the last one are kept. Raises as `decode`."""
        return self.decode([Run(tokens, self.sequence, position, logits=True)])

    def assemble(self, prompt: Prompt) -> Assembled:
        """Put together what is kept of a prompt in the desk's sequence. Raises as `decode`."""
        return self.assembler.assemble(prompt, self.decode, self.sequence)

    def clear(self) -> None:
        """Free the desk's sequence."""
        self.assembler.clear(self.sequence)


class Request:
    """One request being served: read first, then written token by token (a `steps.Writer`)."""

    def __init__(self, desk: Desk, generation: Generation) -> None:
        self.generation = generation
        self.job = generation.job
        self.desk = desk
        self._context = desk.context
        self._stream = TextStream(generation.sampling.stop)
        self._sampler = Sampler(generation.sampling)
        self._started = time.perf_counter()
        self._first_token = 0.0
        self._assembled = Assembled(0, 0, ())
        self._position = 0
        self._written = 0
        self._token = NONE
        self.answered = False

    # --- reading -----------------------------------------------------------------------------------------------------

    def read(self) -> bool:
        """Read the prompt and take the first token; whether the answer goes on. Raises Cancelled, EngineError."""
        prompt, assembler = self.generation.prompt, self.desk.assembler
        self._assembled = self.desk.assemble(prompt)
        self._position = self._assembled.position
        self._tell()
        if assembler.opaque and self._position < prompt.seams[-1]:
            self._read_until(prompt.seams[-1])
            assembler.keep_state(prompt, self._assembled, self.desk.sequence)
        place = self._read_until(len(prompt))
        assembler.count(prompt, self._assembled)
        assembler.lend(prompt, self._assembled, self.desk.sequence)
        return self.take(place)

    def _read_until(self, end: int) -> int:
        tokens, step, place = self.generation.prompt.tokens, self._context.settings.n_batch, -1
        while self._position < end:
            piece = tokens[self._position : min(end, self._position + step)]
            decoded = self.desk.read(piece, self._position)
            self.desk.assembler.observe(len(piece), decoded.seconds)
            self._position, place = self._position + len(piece), decoded.place
            self._tell()
        return place

    def _tell(self) -> None:
        self.generation.events.put(Reading(self._position, len(self.generation.prompt)))

    # --- writing -----------------------------------------------------------------------------------------------------

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for it."""
        return self.generation.unwanted is None

    @property
    def run(self) -> Run:
        """Its next token."""
        return Run((self._token,), self.desk.sequence, self._position, logits=True)

    def take(self, place: int) -> bool:
        """Take a token from the logits at this place of the last batch; whether the answer goes on."""
        if self._token >= 0:  # it has just been decoded
            self._position += 1
        self._token = self._sampler.sample(self._context, place)
        self._first_token = self._first_token or time.perf_counter()
        if self._context.model.ends_generation(self._token):
            return self._end("stop")
        self._written += 1
        self._say(self._stream.feed(self._context.model.piece(self._token)))
        if self._stream.stopped:
            return self._end("stop")
        return self._written < self.generation.sampling.max_tokens or self._end("length")

    def _say(self, text: str) -> None:
        if text:
            self.generation.events.put(Text(text))

    # --- the end -----------------------------------------------------------------------------------------------------

    def _end(self, reason: FinishReason) -> bool:
        self._say(self._stream.finish())
        self.answered = reason in ("stop", "length")
        self._close(self._finished("stop" if self._stream.stopped else reason))
        return False

    def give_up(self) -> None:
        """Nobody waits for it any more. When it has ended already, nothing happens."""
        if not self.generation.ended:
            self._end(self.generation.unwanted or "cancelled")

    def fail(self, error: EdgeRAGError) -> None:
        """Serving it has failed. When it has ended already, nothing happens."""
        self._close(error)

    def _close(self, event: Finished | EdgeRAGError) -> None:
        self._sampler.close()
        self.generation.end(event)

    def _finished(self, reason: FinishReason) -> Finished:
        submitted = self.generation.submitted
        return Finished(
            reason,
            Usage(
                prompt_tokens=len(self.generation.prompt),
                cached_tokens=self._assembled.cached,
                completion_tokens=self._written,
            ),
            passages=self._assembled.passages,
            queued=self._started - submitted,
            first_token=max(0.0, self._first_token - submitted),
        )

    def keep_state(self) -> None:
        """Keep the state of the whole prompt, when it has been answered."""
        if self.answered and not self.desk.assembler.opaque:
            self._context.clear(self.desk.sequence, len(self.generation.prompt) - 1)
            self.desk.assembler.keep_state(self.generation.prompt, self._assembled, self.desk.sequence)
