"""One cluster being trained, in slices: the trainer computes only while nobody is served, and stands still otherwise.

The child learns of a request within `POLL` and then has `learning.child.PATIENCE` to stop: that bounds how long a
request computes beside it. Between slices it stands still, so that the rest of the idle work has its turn. When memory
runs short it writes a checkpoint and ends; it goes on from there.

A child outlives a parent that was killed for as long as it takes to write its checkpoint. The next one waits for that.
"""

import importlib.util
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from edge_rag.closing import Closing
from edge_rag.errors import Cancelled
from edge_rag.learning.child import PROGRAM, Child
from edge_rag.learning.events import Event, Failed, Step
from edge_rag.learning.job import LOCK
from edge_rag.runtime.generations import Scope, current_scope

NEEDED = ("torch", "transformers", "peft", "gguf")  # the `train` extra
POLL = 0.02  # seconds between looks for a request
ENDING = 60.0  # seconds that a checkpoint may take before the child is killed

Outcome = Literal["interrupted", "sliced", "finished", "failed", "evicted"]


def why_no_training() -> str:
    """Why no adapter can be trained here, in words; '' when one can."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"training needs {', '.join(missing)}: pip install 'edge-rag[train]'" if missing else ""


class Training(Closing):
    """A trainer over a job folder. One thread calls `run` until it says 'finished' or 'failed'.

    `busy` says whether somebody is served, `short` whether memory is needed; `freed` is told at the end.
    `close` stops it; what it has learned up to its last checkpoint is kept.
    """

    def __init__(
        self,
        folder: Path,
        *,
        busy: Callable[[], bool],
        short: Callable[[], bool],
        freed: Callable[[], None] = lambda: None,
        threads: int = 0,
        program: tuple[str, ...] = PROGRAM,
    ) -> None:
        self.folder = folder
        self.last: Step | None = None
        self.failure: Failed | None = None
        self.pauses = 0
        self.longest_pause = 0.0  # seconds that it took to stand still, at most
        self._freed = freed
        self._busy = busy
        self._short = short
        self._child = Child(folder, program=program, threads=threads)
        self._listener: threading.Thread | None = None

    def close(self) -> None:
        """Let it write a checkpoint and end. Idempotent."""
        self._end()
        self._child.close()
        if self._listener:
            self._listener.join()
        self._freed()

    def _end(self) -> None:
        if self._child.state in ("running", "paused"):
            self._child.stop()
            if not self._child.wait(ENDING):
                self._child.kill()

    def run(self, seconds: float) -> Outcome:
        """Train for so long, or until somebody is served; nothing is begun while somebody is, or memory is short.

        Raises EngineError when it cannot be started, and Cancelled when the caller's scope is cancelled.
        """
        until, scope = time.perf_counter() + seconds, current_scope()
        while self._hindered():
            if self._over(until, scope):
                return "interrupted"
            time.sleep(POLL)
        self._go()
        while self._child.state == "running":
            if self._short():
                self._end()
                return "evicted"
            if self._busy():
                self._pause()
                return "interrupted"
            if self._over(until, scope):
                self._pause()
                return "sliced"
            self._child.wait(POLL)
        return self._ended()

    def _hindered(self) -> bool:
        """Whether it must not compute now, or not begin."""
        return self._busy() or (self._listener is None and (self._short() or self._taken()))

    def _taken(self) -> bool:
        """Whether another trainer is at work on the job."""
        try:
            with FileLock(self.folder / LOCK, timeout=0, mode=0o600):
                return False
        except Timeout:
            return True

    def _over(self, until: float, scope: Scope) -> bool:
        """Whether its time is over."""
        if scope.cancelled:
            self._pause()
            raise Cancelled("nobody waits for it any more")
        return time.perf_counter() >= until

    def _go(self) -> None:
        if self._child.state == "paused":
            self._child.resume()
        elif self._listener is None:
            self._child.start()
            self._listener = threading.Thread(target=self._listen, name="edge_rag training", daemon=True)
            self._listener.start()

    def _pause(self) -> None:
        self.pauses += 1
        self.longest_pause = max(self.longest_pause, self._child.pause())

    def _ended(self) -> Outcome:
        assert self._listener
        self._child.wait()
        self._listener.join()
        return "failed" if self.failure else "finished"

    def _listen(self) -> None:
        for event in self._child.events():
            self._note(event)

    def _note(self, event: Event) -> None:
        if isinstance(event, Step):
            self.last = event
        elif isinstance(event, Failed):
            self.failure = event
