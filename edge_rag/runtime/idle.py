"""What is done while nobody asks, one step after the other, in a thread of its own that never hurries.

A step is a function that does one thing and says whether there was anything to do. Steps run on the engine as chores,
so a request stops them at once; this thread only chooses, and only after the engine has been quiet for a while.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError

from edge_rag.closing import Closing
from edge_rag.errors import EdgeRAGError

QUIET = 2.0  # seconds between steps' chances: a person who has just read an answer may ask again

logger = logging.getLogger(__name__)

Step = Callable[[], bool]


class Idle(Closing):
    """Runs steps in order of importance whenever nobody is served. Close it behind the engine, which ends a step."""

    def __init__(self, *, quiet: float = QUIET) -> None:
        self._quiet = quiet
        self._poked = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, steps: Sequence[Step], busy: Callable[[], bool]) -> None:
        """Begin to run `steps`, the most important first, whenever `busy` is false."""
        self._thread = threading.Thread(target=self._run, args=(steps, busy), name="edge_rag idle", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop after the present step. Idempotent."""
        self._closed.set()
        self._poked.set()
        if self._thread:
            self._thread.join()

    def poke(self) -> None:
        """There may be something to do."""
        self._poked.set()

    def _run(self, steps: Sequence[Step], busy: Callable[[], bool]) -> None:
        while not self._closed.wait(self._quiet):
            if not busy() and not _first(steps):
                self._poked.wait()
                self._poked.clear()


def _first(steps: Sequence[Step]) -> bool:
    """Do the first thing that there is to do; whether there was any."""
    try:
        return any(step() for step in steps)
    except CancelledError:  # the engine is closing
        return False
    except EdgeRAGError as error:
        logger.info("idle work stopped: %s", error)
        return False
    except Exception:
        logger.exception("idle work failed; this is a fault of ours")
        return False
