import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from edge_rag.errors import EngineError
from edge_rag.learning import child as children
from edge_rag.learning.child import NICE, Child
from edge_rag.learning.events import (
    Checkpoint,
    Event,
    Failed,
    Finished,
    Paused,
    Resumed,
    Started,
    Step,
    from_line,
    to_line,
)
from edge_rag.learning.job import LOG

PATIENT = 10.0  # seconds: on a busy machine a child of a test may be slow to answer

HEAD = """
import os, signal, sys, time
from edge_rag.learning.events import *
def say(event):
    os.write(1, to_line(event))
def steps(number):
    for step in range(number):
        say(Step(1, step + 1, number, 0.5, 10, 1.0))
say(Started("cpu", 5))
"""

FINISHES = "steps(2); say(Checkpoint(2)); say(Finished('ab', 0.5, 1.0))"
DIES = "print('something went wrong', file=sys.stderr); sys.stderr.flush(); os.kill(os.getpid(), signal.SIGKILL)"
OBEYS = """
pauses = 0
for line in sys.stdin:
    if line == "pause\\n":
        pauses += 1
        say(Paused(pauses, 0.01))
    elif line == "resume\\n":
        say(Resumed(1.0))
    else:
        say(Checkpoint(7))
        break
"""
DEAF = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nwhile True: time.sleep(0.01)"


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[[str], Child]]:
    """Starts a child that runs a script, and has it end with the test."""
    running: list[Child] = []

    def start(script: str) -> Child:
        file = tmp_path / "program.py"
        file.write_text(HEAD + script)
        running.append(Child(tmp_path, program=(sys.executable, str(file))))
        running[-1].start()
        return running[-1]

    yield start
    for child in running:
        child.close()


def first(child: Child, kind: type[Event]) -> Event:
    """Wait for an event of a kind."""
    return next(event for event in child.events() if isinstance(event, kind))


def settles(found: psutil.Process, wanted: set[str]) -> bool:
    """Wait until a process is in one of these states; the system takes a moment to halt one."""
    with contextlib.suppress(psutil.NoSuchProcess):
        while found.status() not in wanted:
            time.sleep(0.01)
    return True


def process(child: Child) -> psutil.Process:
    assert child._process is not None
    return psutil.Process(child._process.pid)


EVENTS: list[Event] = [Started("cpu", 5), *(Step(1, step, 2, 0.5, 10, 1.0) for step in (1, 2)), Checkpoint(2)]


def test_events_come_in_their_order_and_end_with_the_child(started: Callable[[str], Child]) -> None:
    child = started(FINISHES)
    assert list(child.events()) == [*EVENTS, Finished("ab", 0.5, 1.0)]
    assert child.wait()
    assert child.state == "finished"


def test_a_child_that_says_why_it_failed_has_failed(started: Callable[[str], Child]) -> None:
    child = started("say(Failed('memory is short', 'free some')); sys.exit(1)")
    assert list(child.events()) == [Started("cpu", 5), Failed("memory is short", "free some")]
    assert child.state == "failed"


def test_a_child_that_dies_without_a_word_has_failed_and_its_log_is_quoted(started: Callable[[str], Child]) -> None:
    child = started(DIES)
    *_, last = child.events()
    assert isinstance(last, Failed)
    assert last.reason == "the trainer ended by signal 9: something went wrong"
    assert child.state == "failed"


def test_a_child_that_ends_early_has_failed(started: Callable[[str], Child]) -> None:
    *_, last = started("sys.exit(3)").events()
    assert isinstance(last, Failed)
    assert last.reason == "the trainer ended with status 3"


def test_lines_that_are_no_events_are_passed_over(
    started: Callable[[str], Child], caplog: pytest.LogCaptureFixture
) -> None:
    child = started("os.write(1, b'Loading weights...\\n'); " + FINISHES)
    assert len(list(child.events())) == 5
    assert "Loading weights" in caplog.text


def test_a_child_that_heeds_a_pause_is_not_halted_by_the_system(
    started: Callable[[str], Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "PATIENCE", PATIENT)
    child = started(OBEYS)
    assert child.pause() < PATIENT
    assert child.state == "paused"
    assert process(child).status() != psutil.STATUS_STOPPED
    child.resume()
    assert child.state == "running"
    assert first(child, Resumed) == Resumed(1.0)


def test_a_deaf_child_is_halted_by_the_system_until_it_may_go_on(started: Callable[[str], Child]) -> None:
    child = started(DEAF)
    first(child, Started)
    assert child.pause() >= children.PATIENCE
    assert settles(process(child), {psutil.STATUS_STOPPED})
    assert child.state == "paused"
    child.resume()
    assert settles(process(child), {psutil.STATUS_RUNNING, psutil.STATUS_SLEEPING})


def test_a_late_word_about_an_earlier_pause_is_not_taken_for_this_one(started: Callable[[str], Child]) -> None:
    late = "for line in sys.stdin:\n    say(Paused(1, 0.3)) if line != 'stop\\n' else sys.exit(0)"
    child = started("sys.stdin.readline(); sys.stdin.readline();" + "say(Resumed(1.0))\n" + late)
    child.pause()  # not acknowledged: the system does it
    child.resume()
    first(child, Resumed)
    child.pause()
    assert settles(process(child), {psutil.STATUS_STOPPED})


def test_pausing_twice_is_pausing_once(started: Callable[[str], Child], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "PATIENCE", PATIENT)
    child = started(OBEYS)
    child.pause()
    assert child.pause() == 0.0
    child.stop()
    assert sum(isinstance(event, Paused) for event in child.events()) == 1


def test_a_stopped_child_has_a_checkpoint_and_has_not_failed(started: Callable[[str], Child]) -> None:
    child = started(OBEYS)
    child.stop()
    assert list(child.events())[-1] == Checkpoint(7)
    assert child.state == "stopped"


def test_a_halted_child_can_be_stopped(started: Callable[[str], Child]) -> None:
    child = started("while sys.stdin.readline() != 'stop\\n': pass\nsay(Checkpoint(7))")
    first(child, Started)
    child.pause()
    child.stop()
    assert Checkpoint(7) in list(child.events())
    assert child.state == "stopped"


def test_a_halted_child_can_be_killed(started: Callable[[str], Child]) -> None:
    child = started(DEAF)
    first(child, Started)
    child.pause()
    child.kill()
    assert child.state == "stopped"
    assert list(child.events()) == []


def test_orders_to_a_child_that_has_ended_do_nothing(started: Callable[[str], Child]) -> None:
    child = started(FINISHES)
    assert child.wait()
    assert child.pause() == 0.0
    child.resume()
    child.stop()
    child.kill()
    assert child.state == "finished"


def test_waiting_for_a_child_has_a_bound(started: Callable[[str], Child]) -> None:
    child = started(DEAF)
    assert not child.wait(0.01)


def test_a_child_is_nice_has_its_own_group_and_does_not_spin(started: Callable[[str], Child]) -> None:
    child = started("say(Failed(f'{os.getpgrp() == os.getpid()} {os.environ[\"OMP_WAIT_POLICY\"]}', ''))\n" + OBEYS)
    told = first(child, Failed)
    assert isinstance(told, Failed)
    assert told.reason == "True PASSIVE"
    assert process(child).nice() == NICE


def test_the_number_of_threads_is_handed_down(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(HEAD + "say(Failed(os.environ['OMP_NUM_THREADS']))")
    with Child(tmp_path, program=(sys.executable, str(file)), threads=3) as child:
        child.start()
        assert Failed("3") in list(child.events())


def test_a_child_is_started_once(started: Callable[[str], Child]) -> None:
    child = started(FINISHES)
    with pytest.raises(EngineError, match="once"):
        child.start()


def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be started"):
        Child(tmp_path, program=("/nowhere/python",)).start()


def test_a_child_that_was_never_started_can_be_closed(tmp_path: Path) -> None:
    child = Child(tmp_path)
    assert child.pause() == 0.0
    child.close()
    assert child.wait()
    assert child.state == "new"


def test_the_log_belongs_to_its_owner_alone(started: Callable[[str], Child], tmp_path: Path) -> None:
    assert started(FINISHES).wait()
    assert (tmp_path / LOG).stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's death")
def test_a_halted_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        HEAD + "from edge_rag.learning.trainer.control import Control, start\n"
        "control = Control(say); start(control); say(Checkpoint(1))\n"
        "while not control.stopping: time.sleep(0.01)\n"
    )
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import sys, pathlib\nfrom edge_rag.learning.child import Child\n"
        "from edge_rag.learning.events import Checkpoint\n"
        f"child = Child(pathlib.Path({str(tmp_path)!r}), program=(sys.executable, {str(program)!r}))\n"
        "child.start()\nnext(e for e in child.events() if isinstance(e, Checkpoint))\n"
        "child.pause()\nprint(child._process.pid, flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, str(parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as ran:
        assert ran.stdout is not None
        orphan = psutil.Process(int(ran.stdout.readline()))
        assert settles(orphan, {psutil.STATUS_STOPPED})
        ran.send_signal(signal.SIGKILL)
        ran.wait()
    assert settles(orphan, {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD})


def test_every_event_survives_its_line() -> None:
    events: list[Event] = [*EVENTS, Paused(2, 0.1), Resumed(3.0), Finished("ab", 0.1, 2.0, "a note"), Failed("a", "b")]
    assert [from_line(to_line(event)) for event in events] == events
    assert to_line(Checkpoint(3)) == b'{"event":"checkpoint","step":3}\n'


def test_the_environment_leads_to_this_edge_rag(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert children._environment(0)["PYTHONPATH"] == os.pathsep.join([str(repository), "/elsewhere"])
