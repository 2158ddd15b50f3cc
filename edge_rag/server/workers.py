"""Blocking work for an asynchronous server: threads, a limit to what may wait for them, and streams out of them.

A stream's work runs in one thread from its beginning to its end and hands over what it makes; the event loop takes all
that is there at once. So a token costs one wake-up of the loop, a slow reader does not hold up the engine, and a
generator is closed by the thread that iterates over it: closing it from another one is an error in Python.
"""

import asyncio
import contextlib
import functools
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, ParamSpec, TypeVar

import anyio

from edge_rag.closing import Closing
from edge_rag.errors import Busy, Cancelled, EdgeRAGError
from edge_rag.runtime.generations import Scope

T = TypeVar("T")
P = ParamSpec("P")

Put = Callable[[T], None]
# Hands its items to `put`, which raises Cancelled when nobody wants them any more.
Work = Callable[[Put[T]], None]


def pumped(make: Callable[[], Generator[T, None, None]]) -> Work[T]:
    """The work of iterating over the generator that `make` gives; stopped, the generator is closed."""

    def work(put: Put[T]) -> None:
        with contextlib.closing(make()) as items:
            for item in items:
                put(item)

    return work


class Workers(Closing):
    """`threads` threads for one kind of work; `waiting` more calls may wait for one, beyond that callers are Busy.

    To be used from one event loop only, `close` from anywhere.
    """

    def __init__(self, name: str, *, threads: int, waiting: int = 0) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=f"edge_rag {name}")
        self._most = threads + waiting
        self._occupied = 0
        self._stopping: Callable[[], EdgeRAGError] | None = None
        self.streams: set[Stream[Any]] = set()

    def close(self) -> None:
        """Wait for what runs. Idempotent."""
        self._executor.shutdown()

    async def call(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a blocking call. Raises Busy, and what the call raises."""
        return await asyncio.shield(self.start(functools.partial(work, *args, **kwargs)))

    def stream(self, work: Work[T]) -> "Stream[T]":
        """Begin work whose items are streamed; the caller must `aclose` the stream. Raises Busy."""
        stream = Stream(work, self)
        self.streams.add(stream)
        return stream

    def start(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        """Begin work in a thread. Raises Busy, and after `stop` its reason."""
        if self._stopping:
            raise self._stopping()
        if self._occupied >= self._most:
            raise Busy(f"{self._occupied} requests are served or wait already", remedy="try again later")
        future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        self._occupied += 1
        future.add_done_callback(self._free)
        return future

    def stop(self, reason: Callable[[], EdgeRAGError]) -> int:
        """Begin nothing more, and end all streams, with an error each; how many streams there were."""
        self._stopping = reason
        for stream in self.streams:
            stream.stop(reason())
        return len(self.streams)

    def _free(self, future: "asyncio.Future[Any]") -> None:
        self._occupied -= 1


class Stream(Generic[T]):
    """Items of work in a thread, in batches of what is there; an asynchronous iterator over lists.

    Raises what the work raises, after the items before it.
    """

    def __init__(self, work: Work[T], workers: Workers) -> None:
        self._work = work
        self._workers = workers
        self._loop = asyncio.get_running_loop()
        self._items: deque[T] = deque()
        self._ready = asyncio.Event()
        self._told = False  # the loop has been woken and has not looked yet
        self._ended = False
        self._stopped: EdgeRAGError | None = None
        self._scope = Scope()
        self._done = workers.start(self._run)

    # --- for the loop ------------------------------------------------------------------------------------------------

    async def begin(self, patience: float) -> None:
        """Wait for the first item, at most so many seconds; raises what the work raises until then."""
        with anyio.move_on_after(patience):
            await self._ready.wait()
        if self._stopped:
            raise self._stopped
        if self._ended and not self._items:
            await self._over()

    def __aiter__(self) -> "Stream[T]":
        return self

    async def __anext__(self) -> list[T]:
        while True:
            await self._ready.wait()
            if self._stopped:
                raise self._stopped
            ended = self._ended  # read first: what comes before the end is there then
            self._told = False
            if not ended:
                self._ready.clear()
            if self._items:
                return self._taken()
            if ended:
                await self._over()
                raise StopAsyncIteration

    async def _over(self) -> None:
        """Wait for the thread; raises what the work raised. Who is cancelled here must not cancel what others see."""
        await asyncio.wait([self._done])
        self._done.result()

    def _taken(self) -> list[T]:
        items = []
        while self._items:
            items.append(self._items.popleft())
        return items

    def stop(self, reason: EdgeRAGError) -> None:
        """Nobody wants the rest: what it waits for is cancelled, and whoever iterates gets the reason."""
        self._stopped = self._stopped or reason
        self._ready.set()
        self._scope.cancel()

    async def aclose(self) -> None:
        """Stop the work and wait until it has stopped. Idempotent."""
        self.stop(Cancelled("nobody waits for it any more"))
        with anyio.CancelScope(shield=True):
            await asyncio.wait([self._done])
        self._workers.streams.discard(self)
        self._done.exception()  # whoever iterated has had it; else nobody wants it

    # --- for the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with self._scope:
                self._work(self._put)
        except Cancelled:
            if not self._stopped:
                raise
        finally:
            self._ended = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: it was cut off at the server's end
                self._loop.call_soon_threadsafe(self._ready.set)

    def _put(self, item: T) -> None:
        if self._stopped:
            raise self._stopped if isinstance(self._stopped, Cancelled) else Cancelled(self._stopped.message)
        self._items.append(item)
        if not self._told:
            self._told = True
            self._loop.call_soon_threadsafe(self._ready.set)
