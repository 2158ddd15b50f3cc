"""One thread owns the llama.cpp context; callers hand it requests through a queue and read events from another.

The rule that keeps this simple: nothing native is touched outside the engine's thread, except the abort flag. A request
is served in small steps (put together what is kept, read the rest of the prompt batch by batch, write token by token);
between two steps, and on the CPU inside one, a cancelled request ends at once. Whatever happens, its cells are freed
before the next.

When no request waits, the thread does chores: KV to be computed ahead, answers to be audited. A request interrupts a
chore as a cancel interrupts a request; the chore begins anew later.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from msgspec import Struct

from edge_rag.closing import Closing
from edge_rag.errors import Cancelled, EdgeRAGError, EngineError
from edge_rag.native.llama import Context
from edge_rag.records import Sampling
from edge_rag.runtime.assembly import Assembler
from edge_rag.runtime.prompting import Prompt
from edge_rag.runtime.requests import Desk, Finished, Generation, Request

logger = logging.getLogger(__name__)


class Chore(Struct, eq=False):
    """Work for when no request waits. `work` runs on the engine's thread and may be begun several times."""

    work: Callable[["Desk"], Any]
    done: "Future[Any]"


class Engine(Closing):
    """Serves requests one after the other, in order, and does chores between them. Takes over context and assembler.

    `n_ctx` is how many tokens prompt and answer may have together; the context needs `n_batch` cells more, for seams.
    """

    def __init__(self, context: Context, assembler: Assembler, *, n_ctx: int) -> None:
        self.model = context.model
        self.n_ctx = n_ctx
        self.assembler = assembler
        self._context = context
        self._requests: deque[Generation] = deque()
        self._chores: deque[Chore] = deque()
        self._ready = threading.Condition()  # guards all below and the abort flag
        self._current: Generation | Chore | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._serve_all, name="edge_rag engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cancel what runs, refuse what waits, free the context. Idempotent."""
        with self._ready:
            if self._closed:
                return
            self._closed = True
            for generation in (*self._requests, self._current):
                if isinstance(generation, Generation):
                    generation.cancelled = True
            self._context.abort(True)
            self._ready.notify()
        self._thread.join()
        self.assembler.close()
        self._context.close()

    def submit(self, prompt: Prompt, sampling: Sampling) -> Generation:
        """Queue a request. `len(prompt) + max_tokens` must fit `n_ctx` (see `policy.planner`)."""
        generation = Generation(prompt, sampling, self.cancel)
        with self._ready:
            self._check_open()
            generation.expected = self.assembler.expect(prompt)
            self._requests.append(generation)
            if isinstance(self._current, Chore):
                self._context.abort(True)
            self._ready.notify()
        return generation

    def read_ahead(self, prompt: Prompt) -> None:
        """A request with this prompt will come: begin to read its passages' KV from the SSD."""
        self.assembler.read_ahead(prompt)

    def cancel(self, generation: Generation) -> None:
        """Mark a request as unwanted and interrupt it when it is the one running."""
        with self._ready:
            generation.cancelled = True
            if self._current is generation:
                self._context.abort(True)

    def when_idle(self, work: Callable[["Desk"], Any]) -> "Future[Any]":
        """Queue a chore; its result or error goes to the future. A cancelled future's chore is not begun."""
        chore = Chore(work, Future())
        with self._ready:
            self._check_open()
            self._chores.append(chore)
            self._ready.notify()
        return chore.done

    @property
    def busy(self) -> bool:
        """Whether a request is served or waits."""
        with self._ready:
            return bool(self._requests) or isinstance(self._current, Generation)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed", remedy="open the library again")

    def _serve_all(self) -> None:
        while (work := self._next()) is not None:
            if isinstance(work, Generation):
                self._serve(work)
            else:
                self._do(work)
            self._free()
        for chore in self._chores:
            if not chore.done.cancel():  # it was begun, and interrupted
                chore.done.set_exception(EngineError("the engine is closed", remedy="open the library again"))

    def _next(self) -> Generation | Chore | None:
        """The next request, or the next chore when none waits; None at the end. Cancelled requests are served too."""
        with self._ready:
            while not (self._requests or self._chores or self._closed):
                self._ready.wait()
            if self._requests:
                self._current = self._requests.popleft()
                self._context.abort(self._current.cancelled)
            elif self._closed:
                return None
            else:
                self._current = self._chores.popleft()
                self._context.abort(False)
            return self._current

    def _free(self) -> None:
        with self._ready:
            self._current = None
        self.assembler.clear()

    def _serve(self, generation: Generation) -> None:
        request = Request(Desk(self._context, self.assembler, generation), generation)
        try:
            event: Finished | EdgeRAGError = request.finish()
        except EdgeRAGError as error:
            event = error
        except Exception as error:  # the thread must outlive any request: a silent death would hang all callers
            event = EngineError(f"{type(error).__name__}: {error}")
        generation.events.put(event)
        self.assembler.release(generation.expected)
        self._keep(request if isinstance(event, Finished) and event.reason != "cancelled" else None)

    def _keep(self, request: Request | None) -> None:
        """Keep what the next request may use, after the caller has its answer."""
        try:
            self.assembler.keep_computed()
            if request:
                request.keep_state()
        except Exception:
            logger.exception("KV could not be kept; this is a fault of ours")

    def _do(self, chore: Chore) -> None:
        if not chore.done.running() and not chore.done.set_running_or_notify_cancel():
            return
        try:
            result = chore.work(Desk(self._context, self.assembler))
        except Cancelled:  # a request came
            self._keep(None)
            with self._ready:
                self._chores.appendleft(chore)
        except Exception as error:  # goes to whoever wanted it
            self._keep(None)
            chore.done.set_exception(error)
        else:
            self._keep(None)  # first, so that whoever waits can flush what was computed
            chore.done.set_result(result)
