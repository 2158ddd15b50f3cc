"""Chores: work on the engine's thread for when nobody waits, like KV to be computed ahead or answers to be audited.

A request interrupts a chore at once; the chore begins anew later. Its result goes to a future, which can be cancelled
up to the end.
"""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from msgspec import Struct, field

from edge_rag.errors import Cancelled
from edge_rag.runtime.requests import Desk


class Chore(Struct, eq=False):
    """Work for when no request waits. `work` runs on the engine's thread and may be begun several times."""

    work: Callable[[Desk], Any]
    done: "Future[Any]" = field(default_factory=Future)

    def run(self, desk: Desk, keep: Callable[[], None]) -> bool:
        """Do it; whether it is through, with a result, an error, or because nobody wants it any more.

        `keep` is called before anybody is told, so that whoever waits can flush what was computed.
        """
        if self.done.cancelled():
            return True
        try:
            tell = partial(self.done.set_result, self.work(desk))
        except Cancelled:
            return False
        except Exception as error:  # goes to whoever wanted it
            tell = partial(self.done.set_exception, error)
        finally:
            keep()
        if self.done.set_running_or_notify_cancel():
            tell()
        return True
