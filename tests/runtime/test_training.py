"""Training in slices, with programs that say what a trainer says: when it computes, stands still, and how it ends."""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from edge_rag.errors import Cancelled
from edge_rag.learning import child as children
from edge_rag.learning.child import PATIENCE
from edge_rag.learning.job import LOCK
from edge_rag.runtime import training as trainings
from edge_rag.runtime.generations import Scope
from edge_rag.runtime.training import Training, why_no_training

LIMIT = 60.0  # seconds, as long as a slice may take before a test has failed

HEAD = """
import os, sys
from edge_rag.learning.events import *
def say(event):
    os.write(1, to_line(event))
say(Started("cpu", 5))
say(Step(1, 3, 9, 0.5, 10, 1.0))
"""
# Heeds every word, and notes it in a file of the job folder.
OBEYS = """
pauses, noted = 0, open(os.path.join(sys.argv[1], "words"), "a", buffering=1)
for line in sys.stdin:
    noted.write(line)
    if line == "pause\\n":
        pauses += 1
        say(Paused(pauses, 0.01))
    elif line == "resume\\n":
        say(Resumed(1.0))
    else:
        say(Checkpoint(7))
        break
"""
WAITS = "import time\nwhile True: time.sleep(0.01)"


class World:
    """What a training asks about: each is called with how often it was asked before."""

    def __init__(self) -> None:
        self.busy: Callable[[], bool] = lambda: False
        self.short: Callable[[], bool] = lambda: False


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def training(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Training]]:
    """Makes a training whose trainer runs a script."""
    made: list[Training] = []
    monkeypatch.setattr(children, "PATIENCE", LIMIT)  # a busy machine may be slow, and a pause is to be heeded here

    def make(script: str) -> Training:
        file = tmp_path / "program.py"
        file.write_text(HEAD + script)
        made.append(
            Training(
                tmp_path, busy=lambda: world.busy(), short=lambda: world.short(), program=(sys.executable, str(file))
            )
        )
        return made[-1]

    yield make
    for each in made:
        each.close()


def words(folder: Path) -> list[str]:
    return (folder / "words").read_text().split()


def trainers(folder: Path) -> list[psutil.Process]:
    """The processes that train in a folder."""
    return [each for each in psutil.Process().children() if str(folder) in each.cmdline()]


def begun(folder: Path) -> bool:
    """Whether a trainer that heeds every word listens."""
    return (folder / "words").exists()


def after(times: int) -> Callable[[], bool]:
    """False so often, then true."""
    asked = iter([False] * times)
    return lambda: next(asked, True)


def until_begun(folder: Path) -> Callable[[], bool]:
    return lambda: begun(folder)


# --- ends ------------------------------------------------------------------------------------------------------------


def test_a_training_goes_through_and_its_steps_are_seen(training: Callable[[str], Training]) -> None:
    made = training("say(Finished('ab', 0.5, 1.0))")
    assert made.run(LIMIT) == "finished"
    assert made.last is not None
    assert (made.last.step, made.last.steps) == (3, 9)
    assert made.failure is None
    assert made.run(LIMIT) == "finished"


def test_a_training_that_fails_says_why(training: Callable[[str], Training]) -> None:
    made = training("say(Failed('the loss is no number', 'lower the rate')); sys.exit(1)")
    assert made.run(LIMIT) == "failed"
    assert made.failure is not None
    assert (made.failure.reason, made.failure.remedy) == ("the loss is no number", "lower the rate")


def test_a_trainer_that_dies_has_failed(training: Callable[[str], Training]) -> None:
    made = training("os.kill(os.getpid(), 9)")
    assert made.run(LIMIT) == "failed"
    assert made.failure is not None
    assert "signal 9" in made.failure.reason


# --- turns -----------------------------------------------------------------------------------------------------------


def test_between_slices_it_stands_still_and_then_goes_on(
    training: Callable[[str], Training], world: World, tmp_path: Path
) -> None:
    made = training(OBEYS)
    world.busy = until_begun(tmp_path)
    assert made.run(LIMIT) == "interrupted"
    world.busy = lambda: False
    assert made.run(0) == "sliced"
    assert made.run(0) == "sliced"
    made.close()
    assert words(tmp_path) == ["pause", "resume", "pause", "resume", "pause", "stop"]
    assert made.pauses == 3
    assert 0 < made.longest_pause < LIMIT


def test_a_request_interrupts_it_and_while_somebody_is_served_it_is_not_begun(
    training: Callable[[str], Training], world: World, tmp_path: Path
) -> None:
    made = training(OBEYS)
    world.busy = lambda: True
    assert made.run(0) == "interrupted"
    assert trainers(tmp_path) == []
    world.busy = until_begun(tmp_path)
    assert made.run(LIMIT) == "interrupted"
    assert made.run(0) == "interrupted"  # nobody has left meanwhile
    assert words(tmp_path) == ["pause"]


def test_it_waits_for_the_end_of_a_request_and_goes_on_in_the_same_slice(
    training: Callable[[str], Training], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(trainings.time, "sleep", waits.append)
    answers = iter([True, True, True])
    world.busy = lambda: next(answers, False)
    assert training("say(Finished('ab', 0.5, 1.0))").run(LIMIT) == "finished"
    assert waits == [trainings.POLL] * 3


def test_one_that_does_not_heed_a_pause_is_halted_and_closed_all_the_same(
    training: Callable[[str], Training], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "PATIENCE", PATIENCE)
    monkeypatch.setattr(trainings, "ENDING", PATIENCE)
    made = training(WAITS)
    assert made.run(0) == "sliced"
    assert made.longest_pause >= PATIENCE
    made.close()
    assert trainers(tmp_path) == []


# --- memory ----------------------------------------------------------------------------------------------------------


def test_when_memory_is_short_it_writes_a_checkpoint_and_is_gone(
    training: Callable[[str], Training], world: World, tmp_path: Path
) -> None:
    made = training(OBEYS)
    world.short = until_begun(tmp_path)
    assert made.run(LIMIT) == "evicted"
    assert words(tmp_path) == ["stop"]
    assert trainers(tmp_path) == []
    assert made.failure is None


def test_while_memory_is_short_it_is_not_begun(
    training: Callable[[str], Training], world: World, tmp_path: Path
) -> None:
    made = training("say(Finished('ab', 0.5, 1.0))")
    world.short = lambda: True
    assert made.run(0) == "interrupted"
    assert trainers(tmp_path) == []
    world.short = lambda: False
    assert made.run(LIMIT) == "finished"


# --- others ----------------------------------------------------------------------------------------------------------


def test_it_waits_for_a_trainer_that_is_still_at_work_on_the_job(
    training: Callable[[str], Training], tmp_path: Path
) -> None:
    made = training("say(Finished('ab', 0.5, 1.0))")
    with FileLock(tmp_path / LOCK):
        assert made.run(0) == "interrupted"
    assert made.run(LIMIT) == "finished"


def test_a_cancelled_scope_ends_the_slice_and_the_training_can_go_on(
    training: Callable[[str], Training], world: World, tmp_path: Path
) -> None:
    made, scope = training(OBEYS), Scope()

    def busy() -> bool:
        if begun(tmp_path):
            scope.cancel()
        return False

    world.busy = busy
    with scope, pytest.raises(Cancelled):
        made.run(LIMIT)
    world.busy = lambda: False
    assert made.run(0) == "sliced"
    assert words(tmp_path) == ["pause", "resume", "pause"]


def test_a_cancelled_scope_begins_nothing(training: Callable[[str], Training], world: World, tmp_path: Path) -> None:
    world.busy = lambda: True
    scope = Scope()
    scope.cancel()
    made = training(OBEYS)
    with scope, pytest.raises(Cancelled):
        made.run(LIMIT)
    assert trainers(tmp_path) == []


def test_closing_may_be_done_twice_and_before_anything(training: Callable[[str], Training], tmp_path: Path) -> None:
    never = training(OBEYS)
    never.close()
    made = training(OBEYS)
    made.run(0)
    before = threading.active_count()
    made.close()
    made.close()
    assert threading.active_count() < before
    assert trainers(tmp_path) == []


def test_what_training_needs_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*names: str) -> Callable[[str], Any]:
        return lambda name: object() if name in names else None

    monkeypatch.setattr(trainings.importlib.util, "find_spec", found("torch", "transformers", "peft", "gguf"))
    assert why_no_training() == ""
    monkeypatch.setattr(trainings.importlib.util, "find_spec", found("transformers", "gguf"))
    assert why_no_training() == "training needs torch, peft: pip install 'edge-rag[train]'"
