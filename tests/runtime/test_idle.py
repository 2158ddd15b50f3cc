"""The thread that works while nobody asks: which step it takes, when it waits, what wakes it and what ends it.

Steps are made up and tell of themselves in a queue, so that no test waits for time to pass.
"""

import logging
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from edge_rag.errors import EngineError
from edge_rag.runtime.idle import QUIET, Idle

LIMIT = 30.0  # seconds after which a thread is given up


class Work:
    """A step with so many things to do. Each call is told in `calls` as (name, whether something was done)."""

    def __init__(self, name: str, calls: "queue.SimpleQueue[tuple[str, bool]]", things: int = 0) -> None:
        self.name = name
        self.calls = calls
        self.things = things
        self.fault: BaseException | None = None

    def __call__(self) -> bool:
        if self.fault:
            self.fault, fault = None, self.fault
            self.calls.put((self.name, False))
            raise fault
        done = self.things > 0
        self.things -= done
        self.calls.put((self.name, done))
        return done


class Told:
    """What steps told, in order."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[tuple[str, bool]] = queue.SimpleQueue()

    def next(self, count: int) -> list[tuple[str, bool]]:
        return [self.calls.get(timeout=LIMIT) for _ in range(count)]

    def step(self, name: str, things: int = 0) -> Work:
        return Work(name, self.calls, things)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def idle() -> Iterator[Idle]:
    with Idle(quiet=0) as made:
        yield made


def never() -> bool:
    return False


def test_the_first_step_that_has_something_to_do_does_it_and_then_all_are_asked_anew(idle: Idle, told: Told) -> None:
    first, second = told.step("audit", 1), told.step("warm", 2)
    idle.start([first, second], never)
    assert told.next(7) == [
        ("audit", True),
        ("audit", False), ("warm", True),
        ("audit", False), ("warm", True),
        ("audit", False), ("warm", False),
    ]  # fmt: skip


def test_with_nothing_to_do_it_waits_until_it_is_poked(idle: Idle, told: Told) -> None:
    step = told.step("warm")
    idle.start([step], never)
    assert told.next(1) == [("warm", False)]
    step.things = 1  # nobody looks, before the poke
    idle.poke()
    assert told.next(2) == [("warm", True), ("warm", False)]
    idle.close()
    assert told.calls.empty()


def test_a_poke_during_the_last_look_is_not_lost(idle: Idle) -> None:
    looks, again = list[bool](), threading.Event()

    def step() -> bool:
        looks.append(True)
        if len(looks) == 1:
            idle.poke()  # something has come, just behind the back of this look
        else:
            again.set()
        return False

    idle.start([step], never)
    assert again.wait(LIMIT)


@pytest.mark.parametrize(
    ("fault", "level"),
    [
        pytest.param(EngineError("the engine is closed"), logging.INFO, id="an error of the house"),
        pytest.param(ValueError("a fault of ours"), logging.ERROR, id="a fault of ours"),
    ],
)
def test_a_step_that_fails_is_logged_and_the_thread_goes_on(
    idle: Idle, told: Told, caplog: pytest.LogCaptureFixture, fault: Exception, level: int
) -> None:
    caplog.set_level(logging.INFO, logger="edge_rag.runtime.idle")
    step = told.step("warm", 1)
    step.fault = fault
    idle.start([step], never)
    assert told.next(1) == [("warm", False)]
    idle.poke()
    assert told.next(2) == [("warm", True), ("warm", False)]
    [record] = caplog.records
    assert record.levelno == level
    assert str(fault) in caplog.text


def test_a_step_that_a_closing_engine_cancels_is_nothing_to_speak_of(
    idle: Idle, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="edge_rag.runtime.idle")
    step = told.step("warm")
    step.fault = CancelledError()
    idle.start([step], never)
    assert told.next(1) == [("warm", False)]
    idle.close()
    assert caplog.records == []


def test_while_somebody_is_served_nothing_is_begun(idle: Idle, told: Told) -> None:
    answers = iter([True, True, True])
    asked: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def busy() -> bool:
        now = next(answers, False)
        asked.put(now)
        assert told.calls.empty() or not now
        return now

    idle.start([told.step("warm")], busy)
    assert told.next(1) == [("warm", False)]
    assert [asked.get(timeout=LIMIT) for _ in range(4)] == [True, True, True, False]


def test_between_two_steps_there_is_a_quiet_time(told: Told) -> None:
    waits: list[float] = []

    class Noting(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(-1 if timeout is None else timeout)
            return super().wait(0)

    idle = Idle()
    idle._closed = Noting()
    idle.start([told.step("warm", 2)], never)
    told.next(3)
    idle.close()
    assert waits[:3] == [QUIET] * 3


@pytest.mark.parametrize("things", [0, 10**9], ids=["waiting", "working"])
def test_closing_ends_the_thread_and_may_be_done_twice(told: Told, things: int) -> None:
    idle = Idle(quiet=0)
    idle.start([told.step("warm", things)], never)
    told.next(1)
    before = threading.active_count()
    idle.close()
    idle.close()
    assert threading.active_count() == before - 1


def test_closing_waits_for_the_present_step_and_begins_no_other(idle: Idle) -> None:
    begun, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    def step() -> bool:
        begun.set()
        assert go_on.wait(LIMIT)
        done.append("step")
        return True

    idle.start([step], never)
    assert begun.wait(LIMIT)
    closing = threading.Thread(target=lambda: (idle.close(), done.append("closed")))
    closing.start()
    assert idle._closed.wait(LIMIT)
    assert closing.is_alive()
    go_on.set()
    closing.join(LIMIT)
    assert done == ["step", "closed"]


def test_what_was_never_started_closes_and_what_was_closed_does_not_start(told: Told) -> None:
    idle = Idle(quiet=0)
    idle.poke()
    idle.close()
    idle.start([told.step("warm", 1)], never)
    idle.close()
    assert told.calls.empty()


def test_steps_run_in_a_thread_of_their_own(idle: Idle) -> None:
    names: queue.SimpleQueue[str] = queue.SimpleQueue()

    def step() -> bool:
        names.put(threading.current_thread().name)
        return False

    idle.start([step], never)
    assert names.get(timeout=LIMIT) == "edge_rag idle"
