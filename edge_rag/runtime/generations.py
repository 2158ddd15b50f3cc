"""Requests from the callers' side: their events, how they are cancelled, and callers who ask the same at one time.

A `Generation` is one caller's request; a `Flight` is what the engine does for it. Callers who ask exactly the same
while it is answered (same prompt, same greedy sampling) are in one flight: it is computed once, a late one hears at
once what has been said before, and it goes on for as long as one of them wants it.
"""

import contextlib
import copy
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Protocol, Self

from msgspec import Struct
from msgspec.structs import replace

from edge_rag.errors import EdgeRAGError
from edge_rag.policy.scheduling import Job
from edge_rag.records import FinishReason, KVSource, PassagePlan, Sampling, Usage
from edge_rag.runtime.prompting import Prompt


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
    """One caller's request on its way: iterate over its events; `cancel` from any thread.

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

    @property
    def unwanted(self) -> FinishReason | None:
        """Why it is to be given up; None when it is not."""
        if self.cancelled:
            return "cancelled"
        return "timeout" if time.perf_counter() > self.deadline else None


class Served(Struct, frozen=True):
    """What a flight has come to: times of `time.perf_counter`, 0 for not yet."""

    usage: Usage
    passages: tuple[PassagePlan, ...] = ()
    started: float = 0.0
    first_token: float = 0.0


class Flight:
    """What the engine does for callers who all ask the same. `expected` are keys of passages kept until it is served.

    `report` says what it has come to. Callers join in any thread, the rest is for the engine's thread.
    """

    def __init__(self, generation: Generation) -> None:
        self.prompt = generation.prompt
        self.sampling = generation.sampling
        self.job = generation.job
        self.expected: tuple[str, ...] = ()
        self.ended = False  # the last event is out
        self.report: Callable[[], Served] = lambda: Served(Usage(prompt_tokens=len(generation.prompt)))
        self._lock = threading.Lock()
        self._first = generation
        self._callers = [generation]
        self._told: list[EngineEvent] = []

    def join(self, generation: Generation) -> bool:
        """Take another caller along; whether that is possible: he must ask exactly the same, and get the same."""
        with self._lock:
            same = self.sampling == generation.sampling and self.prompt == generation.prompt
            if self.ended or self.sampling.temperature > 0 or not same or self._unwanted:
                return False
            generation.job = self.job
            for event in self._told:
                generation.events.put(event)
            self._callers.append(generation)
        return True

    def serves(self, generation: Generation) -> bool:
        """Whether this caller waits for it."""
        with self._lock:
            return generation in self._callers

    @property
    def cancelled(self) -> bool:
        """Whether every caller has cancelled it."""
        with self._lock:
            return all(generation.cancelled for generation in self._callers)

    def cancel(self) -> None:
        """Cancel it for every caller."""
        with self._lock:
            for generation in self._callers:
                generation.cancelled = True

    @property
    def unwanted(self) -> FinishReason | None:
        """Why it is to be given up; None while any caller wants it."""
        with self._lock:
            return self._unwanted

    @property
    def _unwanted(self) -> FinishReason | None:
        reasons = [generation.unwanted for generation in self._callers]
        return None if None in reasons else reasons[0]

    def tell(self, event: EngineEvent) -> None:
        """Tell all callers."""
        with self._lock:
            self._told.append(event)
            for generation in self._callers:
                generation.events.put(event)

    def dismiss(self) -> None:
        """Let those go who do not want it any more, while others do."""
        with self._lock:
            if self.ended or self._unwanted or not any(generation.unwanted for generation in self._callers):
                return
            leaving = [generation for generation in self._callers if generation.unwanted]
            self._callers = [generation for generation in self._callers if generation not in leaving]
            for generation in leaving:
                generation.events.put(self._finished(generation, generation.unwanted or "cancelled"))

    def end(self, reason: FinishReason) -> None:
        """The last event; only the first one counts."""
        given_up = reason in ("cancelled", "timeout")
        self._end(lambda generation: self._finished(generation, (given_up and generation.unwanted) or reason))

    def fail(self, error: EdgeRAGError) -> None:
        """An error as the last event, each caller's own; only the first one counts."""
        self._end(lambda generation: copy.copy(error))

    def _end(self, last: Callable[[Generation], Finished | EdgeRAGError]) -> None:
        with self._lock:
            if not self.ended:
                self.ended = True
                for generation in self._callers:
                    generation.events.put(last(generation))

    def _finished(self, generation: Generation, reason: FinishReason) -> Finished:
        served = self.report()
        usage, passages = served.usage, served.passages
        if generation is not self._first:  # nothing of its prompt had to be read for it
            usage = replace(usage, cached_tokens=usage.prompt_tokens)
            passages = taken(passages, "live")
        return Finished(
            reason,
            usage,
            passages,
            queued=max(0.0, (served.started or time.perf_counter()) - generation.submitted),
            first_token=max(0.0, served.first_token - generation.submitted),
        )


def taken(plans: Sequence[PassagePlan], source: KVSource) -> tuple[PassagePlan, ...]:
    """How passages come into a prompt that were put together for another one: nothing of them has to be computed."""
    return tuple(replace(plan, source=source, link=0) for plan in plans)
