"""Blocking work behind an event loop: its items in order, its errors behind them, its end when nobody wants it."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Generator, Iterator
from typing import Any, TypeVar

import pytest

from edge_rag.errors import Busy, Cancelled, InputError
from edge_rag.server.workers import Put, Stream, Workers, pumped

T = TypeVar("T")


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers("test", threads=2, waiting=1) as workers:
        yield workers


async def items_of(stream: Stream[T]) -> list[T]:
    return [item async for items in stream for item in items]


async def closing(stream: Stream[T], use: Callable[[Stream[T]], Awaitable[object]]) -> object:
    try:
        return await use(stream)
    finally:
        await stream.aclose()


def test_all_items_come_in_order(workers: Workers) -> None:
    async def main() -> object:
        return await closing(workers.stream(pumped(lambda: (n for n in range(10_000)))), items_of)

    assert asyncio.run(main()) == list(range(10_000))


def test_what_is_there_comes_at_once(workers: Workers) -> None:
    done = threading.Event()

    def work(put: Put[int]) -> None:
        put(1)
        put(2)
        done.set()

    async def main() -> object:
        async def use(stream: Stream[int]) -> list[int]:
            done.wait()  # the loop does not look until then
            return await anext(stream)

        return await closing(workers.stream(work), use)

    assert asyncio.run(main()) == [1, 2]


def test_items_come_as_soon_as_they_are_made(workers: Workers) -> None:
    taken = threading.Event()

    def work(put: Put[int]) -> None:
        put(1)
        assert taken.wait(60)
        put(2)

    async def use(stream: Stream[int]) -> list[list[int]]:
        first = await anext(stream)
        taken.set()
        return [first, await anext(stream)]

    async def main() -> object:
        return await closing(workers.stream(work), use)

    assert asyncio.run(main()) == [[1], [2]]


def test_an_error_comes_behind_the_items_before_it(workers: Workers) -> None:
    def work(put: Put[int]) -> None:
        put(1)
        raise InputError("bad")

    async def main() -> list[int]:
        stream, items = workers.stream(work), list[int]()

        async def take() -> None:
            async for some in stream:
                items.extend(some)

        with pytest.raises(InputError, match="bad"):
            await take()
        await stream.aclose()
        return items

    assert asyncio.run(main()) == [1]


def test_beginning_raises_what_comes_before_the_first_item(workers: Workers) -> None:
    def work(put: Put[int]) -> None:
        raise InputError("bad")

    async def main() -> None:
        stream = workers.stream(work)
        with pytest.raises(InputError, match="bad"):
            await stream.begin(60)
        await stream.aclose()

    asyncio.run(main())


def test_beginning_takes_nothing_away(workers: Workers) -> None:
    async def main() -> object:
        async def use(stream: Stream[int]) -> list[int]:
            await stream.begin(60)
            return await items_of(stream)

        return await closing(workers.stream(pumped(lambda: (n for n in range(3)))), use)

    assert asyncio.run(main()) == [0, 1, 2]


def test_beginning_does_not_wait_for_ever(workers: Workers) -> None:
    gate = threading.Event()

    async def main() -> None:
        stream: Stream[int] = workers.stream(lambda put: put(int(gate.wait(60))))
        await stream.begin(0.01)
        gate.set()
        assert await items_of(stream) == [1]
        await stream.aclose()

    asyncio.run(main())


def test_work_without_items_is_an_empty_stream(workers: Workers) -> None:
    async def main() -> object:
        async def use(stream: Stream[int]) -> list[int]:
            await stream.begin(60)
            return await items_of(stream)

        return await closing(workers.stream(lambda put: None), use)

    assert asyncio.run(main()) == []


def test_a_closed_stream_closes_its_generator_in_its_thread(workers: Workers) -> None:
    told: list[int | None] = []
    more = threading.Event()

    def numbers() -> Generator[int, None, None]:
        try:
            yield 1
            assert more.wait(60)
            yield 2
            raise AssertionError("nobody wants a third one")
        finally:
            told.append(threading.get_ident())

    async def main() -> None:
        stream = workers.stream(pumped(numbers))
        assert await anext(stream) == [1]
        more.set()
        await stream.aclose()
        assert len(told) == 1  # it has ended
        await stream.aclose()

    asyncio.run(main())
    assert told != [threading.get_ident()]


def test_a_stopped_stream_gives_its_reason_to_whoever_iterates(workers: Workers) -> None:
    gate = threading.Event()

    def work(put: Put[int]) -> None:
        assert gate.wait(60)
        put(1)
        raise AssertionError("the work goes on")

    async def main() -> None:
        stream = workers.stream(work)
        waiting = asyncio.ensure_future(items_of(stream))
        await asyncio.sleep(0)
        assert workers.stop(lambda: Busy("the end")) == 1
        with pytest.raises(Busy, match="the end"):
            await waiting
        gate.set()
        await stream.aclose()
        assert workers.stop(lambda: Busy("the end")) == 0

    asyncio.run(main())


def test_each_stopped_stream_has_an_error_of_its_own(workers: Workers) -> None:
    gate = threading.Event()

    async def main() -> None:
        streams: list[Stream[bool]] = [workers.stream(lambda put: put(gate.wait(60))) for _ in range(2)]
        assert workers.stop(lambda: Busy("the end")) == 2
        ends = await asyncio.gather(*map(items_of, streams), return_exceptions=True)
        assert list(map(str, ends)) == ["the end"] * 2
        assert ends[0] is not ends[1]  # or the trace of one would grow with the other's
        gate.set()
        for stream in streams:
            await stream.aclose()

    asyncio.run(main())


def test_nothing_begins_after_the_stop(workers: Workers) -> None:
    async def main() -> None:
        workers.stop(lambda: Busy("the end"))
        with pytest.raises(Busy, match="the end"):
            workers.stream(lambda put: None)
        with pytest.raises(Busy, match="the end"):
            await workers.call(print)

    asyncio.run(main())


@pytest.mark.parametrize("use", [items_of, lambda stream: stream.begin(60)], ids=["iterating", "beginning"])
def test_giving_up_in_the_moment_of_the_end_leaves_the_place_taken(use: Callable[[Stream[int]], Any]) -> None:
    gate = threading.Event()

    async def main() -> None:
        with Workers("test", threads=1) as workers:
            stream: Stream[int] = workers.stream(lambda put: put(int(gate.wait(60))))
            stream._ended = True  # as its thread says just before it ends
            stream._ready.set()
            waiting = asyncio.ensure_future(use(stream))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
            with pytest.raises(Busy):
                workers.stream(lambda put: None)
            gate.set()
            await stream.aclose()

    asyncio.run(main())


def test_work_that_raises_cancelled_by_itself_is_heard(workers: Workers) -> None:
    def work(put: Put[int]) -> None:
        raise Cancelled("the engine was closed")

    async def main() -> None:
        stream = workers.stream(work)
        with pytest.raises(Cancelled, match="the engine was closed"):
            await stream.begin(60)
        await stream.aclose()

    asyncio.run(main())


def test_one_too_many_is_busy_until_a_thread_is_free(workers: Workers) -> None:
    gate = threading.Event()

    async def main() -> None:
        waiting = [asyncio.ensure_future(workers.call(gate.wait, 60)) for _ in range(3)]  # one has no thread yet
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="3 requests"):
            await workers.call(gate.wait)
        with pytest.raises(Busy, match="3 requests"):
            workers.stream(lambda put: None)
        gate.set()
        assert await asyncio.gather(*waiting) == [True] * 3
        assert await workers.call(gate.wait) is True

    asyncio.run(main())


def test_a_call_gives_its_result_or_raises_its_error(workers: Workers) -> None:
    async def main() -> None:
        assert await workers.call(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await workers.call(divmod, 7, 0)

    asyncio.run(main())


def test_a_caller_who_gives_up_leaves_the_place_taken_until_the_work_ends() -> None:
    gate = threading.Event()

    async def main() -> None:
        with Workers("test", threads=1) as workers:
            waiting = asyncio.ensure_future(workers.call(gate.wait, 60))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
            with pytest.raises(Busy):
                await workers.call(gate.wait)
            gate.set()

    asyncio.run(main())
