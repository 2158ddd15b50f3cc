"""The trainer within the tests' own process: a job is run to its end, or as far as it is let."""

import os
from pathlib import Path
from typing import Any

import pytest

from edge_rag.learning.events import Event
from edge_rag.learning.job import Examples, Job
from edge_rag.learning.trainer import device, lora
from edge_rag.learning.trainer.base import Base
from edge_rag.learning.trainer.batches import Plan
from edge_rag.learning.trainer.control import Control
from edge_rag.learning.trainer.loop import Loop, Outlook
from edge_rag.learning.trainer.program import run
from edge_rag.learning.trainer.sizes import Room

# In a process of its own nobody sees what peft and transformers of different ages think of each other.
MARKS = [
    pytest.mark.usefixtures("unhurried_torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

WIDE = Room(1 << 40, 1 << 40)


class Turns(Control):
    """A control that says stop after so many micro-batches."""

    def __init__(self, turns: int) -> None:
        super().__init__(lambda event: None)
        self.left = turns

    def go_on(self) -> bool:
        self.left -= 1
        return self.left >= 0


def train(folder: Path, *, turns: int = 1_000_000) -> list[Event]:
    """Run a job folder; what the trainer said."""
    said: list[Event] = []
    before = os.umask(0o077)  # as `__main__` does
    try:
        run(folder, Turns(turns), said.append)
    finally:
        os.umask(before)
    return said


def make_loop(job: Job, examples: Examples, *, room: Room = WIDE, freely: bool = False) -> tuple[Loop, Any]:
    """A loop that has not taken a step, and its model with the adapter."""
    place = device.prepare(job)
    base = Base(job)
    adapted = lora.attach(base.load(), job, base.facts)
    return Loop(adapted, Plan(examples, base.facts, wide=freely), job, room, place), adapted


def run_loop(loop: Loop, *, turns: int = 1_000_000) -> list[Event]:
    """Train; what was said. Checkpoints go nowhere."""
    said: list[Event] = []
    loop.run(Turns(turns), Outlook(said.append, lambda state: None))
    return said
