"""What the parent says to the trainer, and what it does then. No torch here."""

import threading
from collections.abc import Iterator
from queue import SimpleQueue

import pytest

from edge_rag.learning.events import Event, Paused, Resumed
from edge_rag.learning.trainer import control as controls
from edge_rag.learning.trainer.control import Control


class Lines:
    """An input that is written to by the test; None ends it."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[bytes | None] = SimpleQueue()

    def __iter__(self) -> Iterator[bytes]:
        while (line := self.queue.get()) is not None:
            yield line


def control_of(*lines: bytes) -> tuple[Control, list[Event]]:
    """A control that has read these lines, and not the end of its input."""
    said: list[Event] = []
    control = Control(said.append)
    for line in lines:
        control._obey(line)
    return control, said


def test_without_orders_it_goes_on() -> None:
    control, said = control_of()
    assert control.go_on()
    assert said == []


def test_stop_ends_it() -> None:
    control, _ = control_of(b"stop")
    assert control.stopping
    assert not control.go_on()


def test_the_end_of_the_input_means_stop() -> None:
    control, _ = control_of()
    control.listen([b"resume\n"])
    assert not control.go_on()


def test_a_pause_that_was_taken_back_before_it_was_seen_is_none() -> None:
    control, said = control_of(b"pause", b"resume")
    assert control.go_on()
    assert said == []


def test_stop_ends_a_pause_before_it_begins() -> None:
    control, said = control_of(b"pause", b"stop")
    assert not control.go_on()
    assert said == []


@pytest.mark.parametrize(("order", "goes_on"), [(b"resume\n", True), (b"stop\n", False)])
def test_a_pause_waits_for_the_next_order(order: bytes, goes_on: bool) -> None:
    lines, said = Lines(), SimpleQueue[Event]()
    control = Control(said.put)
    listener = threading.Thread(target=control.listen, args=(lines,))
    control._obey(b"pause")
    listener.start()
    waiting = threading.Thread(target=lambda: results.append(control.go_on()))
    results: list[bool] = []
    waiting.start()
    paused = said.get()
    assert isinstance(paused, Paused)
    assert paused.pauses == 1
    assert paused.seconds >= 0
    lines.queue.put(order)
    waiting.join()
    assert isinstance(said.get(), Resumed)
    assert results == [goes_on]
    lines.queue.put(None)
    listener.join()


def test_unknown_words_are_passed_over() -> None:
    control, said = control_of(b"", b"hello")
    assert control.go_on()
    assert said == []


def test_exit_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(controls.os, "_exit", ended.append)
    control_of(b"exit")
    assert ended == [0]
