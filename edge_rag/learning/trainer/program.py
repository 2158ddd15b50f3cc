"""`python -m edge_rag.learning.trainer FOLDER`: what happens before torch is there, which takes seconds to load.

One trainer at a time works on a job; one that is done already is only told as finished. Whatever goes wrong is an event
`failed`. Libraries that print do so on standard error.
"""

import contextlib
import os
import traceback
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from edge_rag.errors import EdgeRAGError, StorageError
from edge_rag.learning.events import Event, Failed, Finished, to_line
from edge_rag.learning.job import LOCK, Result, read_job, read_result
from edge_rag.learning.trainer import control
from edge_rag.learning.trainer.control import Control

EXTRA = "pip install 'edge-rag[train]'"
SHORT = ("out of memory", "allocate memory")  # torch raises RuntimeError on the processor
LESS = "free some, set learning.targets to down, or take a smaller model"


def main(folder: Path) -> int:
    """Do the job in a folder; the exit status: 0 when it is done or was stopped, 1 when it failed."""
    os.umask(0o077)  # what is trained from is private, and so is all that comes of it
    emit = _outlet()
    orders = Control(emit)
    control.start(orders)
    try:
        run(folder, orders, emit)
    except Exception as error:
        traceback.print_exc()
        emit(failed(error))
        return 1
    return 0


def run(folder: Path, orders: Control, emit: Callable[[Event], None]) -> None:
    """Do a job, or go on with it. Raises EdgeRAGError; StorageError too when another trainer is at it."""
    read_job(folder)
    try:
        with FileLock(folder / LOCK, timeout=0, mode=0o600):
            result = read_result(folder) or _work(folder, orders, emit)
    except Timeout:
        raise StorageError(
            "another trainer is at work on this job", field=str(folder), remedy="wait for it, or end it"
        ) from None
    if result:
        emit(Finished(result.sha256, result.recipe.loss, result.recipe.seconds, result.note))


def _work(folder: Path, orders: Control, emit: Callable[[Event], None]) -> Result | None:
    from edge_rag.learning.trainer.work import work

    return work(folder, orders, emit)


def _outlet() -> Callable[[Event], None]:
    """Where events go: what was standard output. Whoever prints to that from now on prints to standard error."""
    own = os.dup(1)
    os.dup2(2, 1)

    def emit(event: Event) -> None:
        with contextlib.suppress(BrokenPipeError):  # the parent is gone: its end of our input tells us to stop
            os.write(own, to_line(event))

    return emit


def failed(error: Exception) -> Failed:
    """An error as the event that tells it."""
    if isinstance(error, EdgeRAGError):
        return Failed(f"{error.field}: {error.message}" if error.field else error.message, error.remedy)
    if isinstance(error, ImportError):
        return Failed(f"training needs libraries that are not installed ({error})", EXTRA)
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in SHORT):
        return Failed(f"memory is short: {error}", LESS)
    return Failed(f"{type(error).__name__}: {error}", "see trainer.log in the job folder; this is our fault")
