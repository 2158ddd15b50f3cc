"""What the parent says: lines on the standard input, read by a thread, heeded by the loop between two micro-batches.

    pause    compute nothing until resume        stop   write a checkpoint and end; so does the end of the input
    resume   go on                               exit   end at once, whatever is being done

A parent that is killed closes the input too. Should we stand still then (SIGSTOP), the system has to wake us:
PR_SET_PDEATHSIG with SIGCONT, which is harmless if only the thread that started us has ended (that is when Linux sends
it). Should we not end by ourselves within `GRACE`, we end without a checkpoint.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable

from edge_rag.learning.events import Event, Paused, Resumed

GRACE = 60.0  # seconds from the end of the input to ours
PR_SET_PDEATHSIG = 1


class Control:
    """What is asked of us. `listen` runs in a thread of its own; the rest belongs to the main thread."""

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        self._condition = threading.Condition()
        self._pausing = False
        self._pauses = 0
        self._asked_at = 0.0
        self._stopping = False

    @property
    def stopping(self) -> bool:
        """Whether to write a checkpoint and end."""
        return self._stopping

    def listen(self, lines: Iterable[bytes]) -> None:
        """Obey each line; the end of the lines means stop."""
        for line in lines:
            self._obey(line.strip())
        self._obey(b"stop")

    def _obey(self, word: bytes) -> None:
        if word == b"exit":
            os._exit(0)
        with self._condition:
            if word == b"pause":
                self._pausing, self._asked_at = True, time.perf_counter()
                self._pauses += 1
            elif word == b"resume":
                self._pausing = False
            elif word == b"stop":
                self._stopping = True
            self._condition.notify_all()

    def go_on(self) -> bool:
        """Between two micro-batches: waits as long as we are paused; False when we are to stop."""
        with self._condition:
            if self._pausing and not self._stopping:
                self._wait()
            return not self._stopping

    def _wait(self) -> None:
        since = time.perf_counter()
        self._emit(Paused(self._pauses, since - self._asked_at))
        told = self._pauses
        while self._pausing and not self._stopping:
            self._condition.wait()
            if self._pausing and self._pauses != told:  # resumed and paused again before we saw it
                told = self._pauses
                self._emit(Paused(told, 0.0))
        self._emit(Resumed(time.perf_counter() - since))


def start(control: Control) -> None:
    """Listen to the standard input, and end with the parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)
    # A group that stands still and has lost its parent gets SIGHUP: we want to write our checkpoint first.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    threading.Thread(target=_until_the_end, args=(control,), name="control", daemon=True).start()


def _until_the_end(control: Control) -> None:
    # Unbuffered: the lock of a buffered reader, held by a daemon thread, would make Python abort at its end.
    with open(0, "rb", buffering=0, closefd=False) as lines:
        control.listen(lines)
    time.sleep(GRACE)
    os._exit(1)
