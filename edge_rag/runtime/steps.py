"""The step loop: a batch holds a piece of the prompt that is being read and one token of every answer being written.

    schedule (policy.scheduling) → run (one llama_decode) → settle (answers take their tokens, ended ones leave)

Whoever reads a prompt calls `decode` with all of its runs and gets control back when they are through; answers go on
meanwhile. A cancelled request ends within one step. The abort flag is a hint: a batch that was stopped by it is run
again unless what was read is no longer wanted, because a stopped batch changes nothing (but for recurrent models: there
the flag must be right, and the engine sees to it).
"""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from edge_rag.errors import Cancelled, EngineError
from edge_rag.native.llama import Context, Run
from edge_rag.policy.scheduling import Job, Reading, next_step
from edge_rag.records import Step
from edge_rag.runtime.splicing import Decoded

LANES = 32  # steps that are remembered, so that lanes take turns

logger = logging.getLogger(__name__)

Wanted = Callable[[], bool]


class Writer(Protocol):
    """An answer that is being written."""

    job: Job

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for it."""

    @property
    def run(self) -> Run:
        """Its next token."""

    def take(self, place: int) -> bool:
        """Take a token from the logits at this place of the last batch; whether the answer goes on."""

    def fail(self, error: EngineError) -> None:
        """Its batch failed."""


class Steps:
    """Runs batches in one context. Not thread-safe.

    `before` is called before every step; `ended` is told of every answer that has come to its end; `dress` makes the
    context wear what a lane is for.
    """

    def __init__(
        self,
        context: Context,
        *,
        before: Callable[[], None] = lambda: None,
        ended: Callable[[Writer], None] = lambda writer: None,
        dress: Callable[[str], None] = lambda lane: None,
    ) -> None:
        self.writers: dict[int, Writer] = {}
        self.count = 0
        self.last: Step | None = None
        self._context = context
        self._before = before
        self._ended = ended
        self._dress = dress
        self._served: deque[str] = deque(maxlen=LANES)

    def decode(self, runs: Sequence[Run], *, lane: str = "", wanted: Wanted = lambda: True) -> Decoded:
        """Append each run to its sequence, however long they are, in as many steps as it takes.

        Raises Cancelled as soon as it is not `wanted`, and EngineError; what was appended before stays.
        """
        rest, seconds, place = deque(run for run in runs if run.tokens), 0.0, -1
        while rest:
            self._tidy()
            step = self._next(Reading(sum(len(run.tokens) for run in rest), lane))
            assert step, "there is something to read"
            pieces = _take(rest, step.reading)
            places, took = self._run(step, pieces, wanted)
            if pieces:
                place, seconds = places[-1], seconds + took
        return Decoded(place, seconds)

    def alone(self, runs: Sequence[Run], *, lane: str = "", wanted: Wanted = lambda: True) -> tuple[int, ...]:
        """One batch of nothing but `runs`; the places of their last tokens. Raises Cancelled, EngineError."""
        if not wanted():  # a GPU does not look at the abort flag
            raise Cancelled("nobody waits for it any more")
        self._before()
        self._dress(lane)
        return self._context.decode(runs)

    def write(self) -> None:
        """One step of the answers; with none, nothing. Whom a failure concerns has been told."""
        self._tidy()
        if step := self._next(None):
            with contextlib.suppress(Cancelled):  # it is dropped before the next step
                self._run(step, [], self._any_wanted)

    def _tidy(self) -> None:
        self._before()
        for writer in [writer for writer in self.writers.values() if not writer.wanted]:
            self._leave(writer)

    def _next(self, reading: Reading | None) -> Step | None:
        jobs = [writer.job for writer in self.writers.values()]
        return next_step(reading, jobs, n_batch=self._context.settings.n_batch, served=self._served)

    def _run(self, step: Step, pieces: Sequence[Run], wanted: Wanted) -> tuple[tuple[int, ...], float]:
        """Run one step; the places of the pieces' last tokens, and the seconds that are due to them.

        A failure is taken for the reader's when something of his was read: then the answers go on. Otherwise answers
        are tried one by one.
        """
        writers = [self.writers[number] for number in step.writers]
        started = time.perf_counter()
        try:
            self._dress(step.lane)
            places = self._decode([*pieces, *(writer.run for writer in writers)], wanted)
        except EngineError as error:
            if pieces:
                raise
            self._run_apart(step, writers, error, wanted)
            return (), 0.0
        if pieces:
            self._context.wait()
        read = sum(len(run.tokens) for run in pieces)
        seconds = (time.perf_counter() - started) * read / (read + len(writers))
        self.last, self.count = step, self.count + 1
        self._served.append(step.lane)
        self._settle(writers, places[len(pieces) :])
        return places[: len(pieces)], seconds

    def _run_apart(self, step: Step, writers: Sequence[Writer], error: EngineError, wanted: Wanted) -> None:
        if len(writers) == 1:
            writers[0].fail(error)
            self._leave(writers[0])
            return
        for writer in writers:
            self._run(Step(step.lane, 0, (writer.job.id,)), [], wanted)

    def _decode(self, runs: Sequence[Run], wanted: Wanted) -> tuple[int, ...]:
        while True:
            if not wanted():
                raise Cancelled("nobody waits for it any more")
            try:
                return self._context.decode(runs)
            except Cancelled:
                self._context.abort(False)

    def _settle(self, writers: Sequence[Writer], places: Sequence[int]) -> None:
        """All take their tokens first: leaving takes time."""
        ended = [writer for writer, place in zip(writers, places, strict=True) if not _goes_on(writer, place)]
        for writer in ended:
            self._leave(writer)

    def _any_wanted(self) -> bool:
        return any(writer.wanted for writer in self.writers.values())

    def _leave(self, writer: Writer) -> None:
        del self.writers[writer.job.id]
        self._ended(writer)


def _goes_on(writer: Writer, place: int) -> bool:
    try:
        return writer.take(place)
    except Exception as error:  # it must not take the others along
        logger.exception("an answer failed; this is a fault of ours")
        writer.fail(EngineError(f"{type(error).__name__}: {error}"))
        return False


def _take(rest: deque[Run], tokens: int) -> list[Run]:
    """The next so many tokens of the runs, which they leave."""
    taken = []
    while tokens and rest:
        run = rest.popleft()
        head, tail = run.tokens[:tokens], run.tokens[tokens:]
        if tail:
            rest.appendleft(Run(tail, run.sequence, run.position + len(head), run.logits))
        taken.append(Run(head, run.sequence, run.position, run.logits and not tail))
        tokens -= len(head)
    return taken
