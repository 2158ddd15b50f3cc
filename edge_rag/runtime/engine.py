"""One thread owns the llama.cpp context; callers hand it requests through a queue and read events from another.

The rule that keeps this simple: nothing native is touched outside the engine's thread, except the abort flag. In each
turn the thread takes one waiting request and reads its prompt, or runs one step of the answers that are being written
(`runtime.steps`; reading takes those along), or does a chore (`runtime.chores`) when there is nothing of both. Whatever
happens to a request, its cells and its sequence are free before the next turn.

Should the thread itself fail, those whose answers are being written are told, and the context is made anew, once; those
who wait notice nothing. After a second failure everybody is told, and nothing is taken any more.
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from edge_rag.closing import Closing
from edge_rag.errors import Busy, Cancelled, EdgeRAGError, EngineError, InputError
from edge_rag.native.llama import Context
from edge_rag.policy.scheduling import Job, admit
from edge_rag.records import EngineStatus, Sampling
from edge_rag.runtime.adapter_pager import Pager
from edge_rag.runtime.assembly import Assembler
from edge_rag.runtime.chores import Chore
from edge_rag.runtime.generations import Flight, Generation
from edge_rag.runtime.prompting import Prompt
from edge_rag.runtime.requests import Desk, Request, check_request
from edge_rag.runtime.steps import Steps, Wanted, Writer

logger = logging.getLogger(__name__)


class Capacity(Struct, frozen=True):
    """What the engine can take: `n_ctx` tokens a request, `cells` tokens and `slots` requests at once.

    `queue` more may wait.
    """

    n_ctx: int
    cells: int
    slots: int
    queue: int


class Engine(Closing):
    """Serves requests, many at once, and does chores between them. Takes over context, assembler and pager."""

    def __init__(self, context: Context, assembler: Assembler, capacity: Capacity, pager: Pager | None = None) -> None:
        self.model = context.model
        self.n_ctx = capacity.n_ctx
        self.capacity = capacity
        self.assembler = assembler
        self.pager = pager
        self._context = context
        self._steps = Steps(context, before=self._sweep, ended=self._leaves, dress=self._dress)
        self._waiting: deque[Flight] = deque()
        self._chores: deque[Chore] = deque()
        self._active: dict[int, Flight] = {}  # by sequence
        self._ready = threading.Condition()  # guards all of these and the abort flag
        self._chore: Chore | None = None
        self._numbers = itertools.count(1)
        self._served = 0
        self._joined = 0
        self._restarts = 0
        self._beat = 0.0  # when the last step was begun
        self._closed = False
        self._failure = ""
        self._thread = threading.Thread(target=self._serve_all, name="edge_rag engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cancel what runs, refuse what waits, free the context. Idempotent."""
        with self._ready:
            if self._closed:
                return
            self._closed = True
            for flight in (*self._waiting, *self._active.values()):
                flight.cancel()
            self._context.abort(True)
            self._ready.notify()
        self._thread.join()
        self.assembler.close()
        self._context.close()
        if self.pager:
            self.pager.close()

    # --- for any thread ----------------------------------------------------------------------------------------------

    def submit(self, prompt: Prompt, sampling: Sampling, *, timeout: float | None = None) -> Generation:
        """Queue a request; after `timeout` seconds it ends with what has been written.

        Raises InputError when it can never be served and Busy when too many wait already.
        """
        check_request(prompt, sampling, timeout, n_ctx=self.n_ctx)
        if prompt.adapter and not self.pager:
            raise InputError("adapters are switched off", field="adapter")
        deadline = float("inf") if timeout is None else time.perf_counter() + timeout
        cells, keys = len(prompt) + sampling.max_tokens, self.assembler.keys(prompt)
        job = Job(next(self._numbers), cells, lane=prompt.adapter, keys=keys)
        generation = Generation(prompt, sampling, job=job, stop=self.cancel, deadline=deadline)
        if not self._joins(generation):
            flight = Flight(generation)
            flight.expected = self.assembler.expect(prompt)
            try:
                self._queue(flight)
            except EdgeRAGError:
                self.assembler.release(flight.expected)
                raise
        return generation

    def _joins(self, generation: Generation) -> bool:
        """Whether somebody asks exactly the same already: then both get one answer."""
        with self._ready:
            self._check_open()
            flights = (*self._active.values(), *self._waiting) if self.assembler.sharing else ()
            joined = any(flight.join(generation) for flight in flights)
            self._joined += joined
            return joined

    def _queue(self, flight: Flight) -> None:
        with self._ready:
            self._check_open()
            there = len(self._waiting) + len(self._active)
            if there >= self.capacity.slots + self.capacity.queue:
                raise Busy(f"{there} requests are served or wait already", remedy="try again later")
            self._waiting.append(flight)
            if self._chore:
                self._context.abort(True)
            self._ready.notify()

    def read_ahead(self, prompt: Prompt) -> None:
        """A request with this prompt will come: begin to read its passages' KV from the SSD."""
        self.assembler.read_ahead(prompt)

    def waits(self, prompt: Prompt) -> Callable[[frozenset[int]], float]:
        """Predicts the seconds of putting the prompt together without the passages of some chunks."""
        return self.assembler.waits(prompt)

    def cancel(self, generation: Generation) -> None:
        """Mark a request as unwanted; it ends within a step."""
        with self._ready:
            generation.cancelled = True
            active = list(self._active.values())
            if any(flight.serves(generation) for flight in active) and all(flight.cancelled for flight in active):
                self._context.abort(True)

    def when_idle(self, work: Callable[[Desk], Any]) -> "Future[Any]":
        """Queue a chore; its result or error goes to the future. A cancelled future's chore is not begun."""
        chore = Chore(work)
        with self._ready:
            self._check_open()
            self._chores.append(chore)
            self._ready.notify()
        return chore.done

    @property
    def busy(self) -> bool:
        """Whether a request is served or waits."""
        with self._ready:
            return bool(self._waiting or self._active)

    def status(self) -> EngineStatus:
        """What it does at this moment."""
        with self._ready:
            return EngineStatus(
                slots=self.capacity.slots,
                active=len(self._active),
                waiting=len(self._waiting),
                cells=self.capacity.cells,
                cells_used=self._used(),
                served=self._served,
                joined=self._joined,
                steps=self._steps.count,
                last_step=self._steps.last,
                silent=self._silent(),
                restarts=self._restarts,
                failure=self._failure,
            )

    def _silent(self) -> float:
        working = self._active or self._waiting or self._chore
        return time.perf_counter() - self._beat if working and self._beat else 0.0

    def _check_open(self) -> None:
        if self._failure:
            raise EngineError(self._failure, remedy="open the library again")
        if self._closed:
            raise _closed()

    def _used(self) -> int:
        return sum(flight.job.cells for flight in self._active.values())

    # --- turns -------------------------------------------------------------------------------------------------------

    def _serve_all(self) -> None:
        try:
            self._serve()
        except Exception as error:  # a silent death would hang all callers
            self._fail(error, list(self._active.values()))
            self._serve_anew()
        for chore in self._chores:
            chore.done.cancel()

    def _serve(self) -> None:
        while (turn := self._next()) is not None:
            turn()

    def _serve_anew(self) -> None:
        """Go on with a new context. What was in cells is lost; what is kept in RAM and on the SSD is not."""
        try:
            self._context.renew()
            self.assembler.forget_cells()
            if self.pager:
                self.pager.drop_all()
            self._restarts += 1
            logger.warning("the engine goes on with a new context")
            self._serve()
        except Exception as error:
            with self._ready:
                self._failure = _reason(error)
            self._fail(error, [*self._active.values(), *self._waiting])

    def _fail(self, error: Exception, concerned: Sequence[Flight]) -> None:
        """Tell those whom it concerns, each with an error of his own."""
        logger.error("the engine failed; this is a fault of ours", exc_info=error)
        for writer in self._steps.writers.values():
            writer.fail(EngineError(_reason(error)))
        self._steps.writers.clear()
        for flight in concerned:
            flight.fail(EngineError(_reason(error), remedy="ask again"))
            self.assembler.release(flight.expected)
        with self._ready:
            self._active.clear()
            for flight in [waiting for waiting in self._waiting if waiting.ended]:
                self._waiting.remove(flight)

    def _next(self) -> Callable[[], None] | None:
        """What to do next; None at the end."""
        with self._ready:
            while True:
                self._sweep()
                if admitted := self._admitted():
                    self._context.abort(False)
                    return partial(self._read, *admitted)
                if self._active:
                    return self._steps.write
                if self._closed:
                    return None
                if self._chores:
                    self._chore = self._chores.popleft()
                    self._context.abort(False)
                    return partial(self._do, self._chore)
                self._ready.wait()

    def _sweep(self) -> None:
        """Tell those that nobody waits for any more, before they have been served. A step is about to begin."""
        with self._ready:
            self._beat = time.perf_counter()
            for flight in [flight for flight in self._waiting if flight.unwanted]:
                self._waiting.remove(flight)
                flight.end("cancelled")
                self.assembler.release(flight.expected)
            for flight in (*self._waiting, *self._active.values()):
                flight.dismiss()

    def _admitted(self) -> tuple[int, Flight] | None:
        """The request to be read now, and the sequence that it gets."""
        free = [sequence for sequence in range(self.capacity.slots) if sequence not in self._active]
        jobs = [flight.job for flight in self._waiting]
        active = [flight.job for flight in self._active.values()]
        job = admit(jobs, active, free_cells=self.capacity.cells - self._used()) if free else None
        if job is None:
            return None
        chosen = jobs.index(job)
        for flight in itertools.islice(self._waiting, chosen):
            flight.job = replace(flight.job, overtaken=flight.job.overtaken + 1)
        flight = self._active[free[0]] = self._waiting[chosen]
        del self._waiting[chosen]
        return free[0], flight

    def _desk(self, wanted: Wanted) -> Desk:
        return Desk(self._context, self.assembler, steps=self._steps, pager=self.pager, wanted=wanted)

    def _dress(self, lane: str) -> None:
        """Let the context wear the adapter that a lane is for."""
        self._context.wear(self.pager.loaded(lane) if self.pager and lane else None)

    # --- requests ----------------------------------------------------------------------------------------------------

    def _read(self, sequence: int, flight: Flight) -> None:
        """Read a prompt; the answer is written in later turns."""
        desk = self._desk(lambda: flight.unwanted is None).of(sequence, flight.job.lane)
        request = Request(desk, flight)
        if _goes_on(request):
            self._steps.writers[request.job.id] = request
        else:
            self._leaves(request)
        self.assembler.release(flight.expected)
        flight.expected = ()
        self._keep(self.assembler.keep_computed)

    def _leaves(self, writer: Writer) -> None:
        """A request has come to its end, in whichever way."""
        assert isinstance(writer, Request)
        writer.give_up()
        writer.undress()
        self._keep(writer.keep_state)
        self.assembler.clear(writer.desk.sequence)
        with self._ready:
            del self._active[writer.desk.sequence]
            self._served += 1

    def _keep(self, keep: Callable[[], None]) -> None:
        """Keep what the next request may use, after the caller has its answer."""
        try:
            keep()
        except Exception:
            logger.exception("KV could not be kept; this is a fault of ours")

    # --- chores ------------------------------------------------------------------------------------------------------

    def _do(self, chore: Chore) -> None:
        desk = self._desk(lambda: self._may_go_on(chore))
        through = False
        try:
            through = chore.run(desk, keep=partial(self._keep, self.assembler.keep_computed))
        finally:
            with self._ready:
                self._chore = None
                if not through:  # a request came
                    self._chores.appendleft(chore)
            for sequence in range(self.capacity.slots):
                self.assembler.clear(sequence)

    def _may_go_on(self, chore: Chore) -> bool:
        return not (self._waiting or self._closed or chore.done.cancelled())


def _goes_on(request: Request) -> bool:
    """Read a prompt; whether an answer is to be written. The thread must outlive any request."""
    try:
        return request.read()
    except Cancelled:
        return False
    except EdgeRAGError as error:
        request.fail(error)
    except Exception as error:
        logger.exception("a request failed; this is a fault of ours")
        request.fail(EngineError(f"{type(error).__name__}: {error}"))
    return False


def _reason(error: Exception) -> str:
    return f"the engine failed: {type(error).__name__}: {error}"


def _closed() -> EngineError:
    return EngineError("the engine is closed", remedy="open the library again")
