"""The trainer's process as its parent sees it: started, paused within a bound, resumed, stopped, and read from.

A child that does not say within `PATIENCE` that it pauses is in the middle of a long computation, and is stopped by the
system (SIGSTOP); so pausing never takes longer, whatever it computes. It is niced, has a process group of its own (a
Ctrl-C in the terminal is not for it), and its threads sleep rather than spin while they wait for each other.

It ends when its parent does: its standard input closes, which means `stop`; and should it stand still then, the system
wakes it (the trainer asks for that itself, see `trainer.control`).

Its standard error, what libraries print, goes to trainer.log in the job folder.
"""

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal

import msgspec

from edge_rag.closing import Closing
from edge_rag.errors import EngineError
from edge_rag.learning.events import Event, Failed, Finished, Paused, from_line
from edge_rag.learning.job import LOG, private

logger = logging.getLogger(__name__)

PROGRAM = (sys.executable, "-m", "edge_rag.learning.trainer")
PATIENCE = 0.2  # seconds that a pause may take before the system does it
NICE = 19
TAIL = 4000  # bytes of the log that are searched for a last word

State = Literal["new", "running", "paused", "stopped", "finished", "failed"]

QUIET = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # Nothing is fetched, and nobody looks at its progress bars.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}


class Child(Closing):
    """A trainer over one job folder. One thread reads `events`; the others may be called from any thread.

    `close` kills it; what it has learned up to its last checkpoint is kept. `program` is the command before the folder.
    """

    def __init__(self, folder: Path, *, program: Sequence[str] = PROGRAM, threads: int = 0) -> None:
        self.folder = folder
        self.state: State = "new"
        self._command = [*program, str(folder)]
        self._threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._changing = threading.RLock()
        self._paused = threading.Event()
        self._pauses = 0
        self._held = False  # by SIGSTOP
        self._stopping = False

    def start(self) -> None:
        """Start it. Raises EngineError when the system does not let us; a child is started once."""
        if self._process is not None:
            raise EngineError("a trainer is started once")
        try:
            with private(self.folder / LOG) as log:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=_environment(self._threads),
                    process_group=0,
                )
        except OSError as error:
            raise EngineError(f"the trainer cannot be started: {error}", field=self._command[0]) from error
        self.state = "running"
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, NICE)
        self._reader = threading.Thread(target=self._read, args=(self._process,), name="trainer-events", daemon=True)
        self._reader.start()

    def events(self) -> Iterator[Event]:
        """What it says, until it ends; the last event is Finished, Failed, or a checkpoint after `stop`.

        Of a child that ended without a word it is told as Failed.
        """
        while (event := self._events.get()) is not None:
            yield event

    def pause(self) -> float:
        """Have it compute nothing until `resume`; the seconds until it did, PATIENCE at most. Nothing when it ended."""
        with self._changing:
            if self.state != "running":
                return 0.0
            started = time.perf_counter()
            self._paused.clear()
            self._pauses += 1
            self._say("pause")
            if not self._paused.wait(PATIENCE):
                self._signal(signal.SIGSTOP)
                self._held = True
            if self.state == "running":
                self.state = "paused"
            return time.perf_counter() - started

    def resume(self) -> None:
        """Let it go on after a pause."""
        with self._changing:
            if self.state == "paused":
                self.state = "running"
            self._say("resume")
            if self._held:
                self._held = False
                self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Ask it to write a checkpoint and end; `wait` for that. A paused one is resumed for it."""
        with self._changing:
            self._stopping = True
            self._say("stop")
            self.resume()

    def kill(self) -> None:
        """End it at once, also when it is paused: its memory is free when this returns. Nothing when it has ended."""
        with self._changing:
            self._stopping = True
            self._signal(signal.SIGKILL)
        self.wait()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended; whether it has after `timeout` seconds."""
        if self._reader is None:
            return True
        self._reader.join(timeout)
        return not self._reader.is_alive()

    def close(self) -> None:
        """Kill it."""
        self.kill()

    def _say(self, word: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):  # it has ended
                self._process.stdin.write(word.encode() + b"\n")
                self._process.stdin.flush()

    def _signal(self, number: signal.Signals) -> None:
        """To the whole group; a process that has ended and was waited for has a number no more."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    # --- the reading thread ---

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        last = None
        with process.stdout as lines:
            for event in _events(lines):
                last = event
                self._settle(event)
        last = self._last_word(last, process.wait())
        self._paused.set()  # nobody waits for a pause of what has ended
        with self._changing:
            self.state = _end(last)
            with contextlib.suppress(OSError):
                process.stdin.close()
        self._events.put(None)

    def _settle(self, event: Event) -> None:
        self._events.put(event)
        # A word about an earlier pause may come late, when the system had to do that one.
        if isinstance(event, Paused) and event.pauses == self._pauses:
            self._paused.set()

    def _last_word(self, last: Event | None, code: int) -> Event | None:
        """The last event; one of our own when the child should have said more."""
        if isinstance(last, Finished | Failed) or self._stopping:
            return last
        how = f"by signal {-code}" if code < 0 else f"with status {code}"
        said = _last_line(self.folder / LOG)
        failed = Failed(
            f"the trainer ended {how}" + (f": {said}" if said else ""),
            "started again it goes on from its last checkpoint; see " + LOG,
        )
        self._events.put(failed)
        return failed


def _end(last: Event | None) -> State:
    if isinstance(last, Finished):
        return "finished"
    return "failed" if isinstance(last, Failed) else "stopped"


def _environment(threads: int) -> dict[str, str]:
    """Ours, with what keeps the child quiet, and with the edge_rag that is running here."""
    home = str(Path(__file__).parents[2])
    path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {**os.environ, **QUIET, **(counts if threads else {}), "PYTHONPATH": path}


def _events(lines: IO[bytes]) -> Iterator[Event]:
    for line in lines:
        try:
            yield from_line(line)
        except msgspec.DecodeError:
            logger.warning("the trainer said something that is no event: %r", line[:200])


def _last_line(file: Path) -> str:
    """The last line of a log, '' when it has none."""
    try:
        lines = file.read_bytes()[-TAIL:].decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
