"""What the router has learned, kept in step with the journal: from exams, and from what answers were worth.

A reward is journalled before it is learned from, so the state that is kept in a file is a convenience: when it is torn,
old or of another space, it is made anew from the journal (`runtime.replaying`), and so it is when something was written
there that did not come through here, or has gone with its document.

What was learned fades with what comes after it: the bandit's clock counts rewards, not decisions. Where nobody says
what answers are worth, what exams said stays as it is, and nothing is tried only because all has been forgotten.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_rag.closing import Closing
from edge_rag.errors import InputError, StorageError
from edge_rag.policy.demand import Request
from edge_rag.policy.features import Space
from edge_rag.policy.linucb import Bandit, Estimates
from edge_rag.runtime.keeping import estimated
from edge_rag.runtime.replaying import rebuild
from edge_rag.runtime.rewarding import Exam, Noted, begin
from edge_rag.store import router_file, routes
from edge_rag.store.database import Connection, Database
from edge_rag.store.route_totals import mark, rows

PLAIN = ""  # the arm that reads all passages
SAVED_EACH = 50  # rewards after which the state is written

logger = logging.getLogger(__name__)

Context = npt.NDArray[np.float64]
Journalled = Callable[[Connection, int], Noted | None]  # is given the number of rewards until now
Exams = Callable[[Connection, str], Exam]  # of an arm


class Experience(Closing):
    """A bandit whose contexts are of `space`, in the library in `folder`. Thread-safe.

    Lock order: turns, the database, the bandit.
    """

    def __init__(self, database: Database, folder: Path, space: Space, *, discount: float, exams: Exams) -> None:
        self.space = space
        self._database = database
        self._folder = folder
        self._discount = discount
        self._exams = exams
        self._turns = threading.RLock()  # rewards are learned in the order in which they are journalled
        self._guard = threading.Lock()  # of the bandit; nothing is waited for inside
        self._unsaved = 0  # rewards
        self._journalled = 0  # decisions and rewards in the journal, as far as we know
        self._decisions = 0
        self.bandit = self._loaded()

    def close(self) -> None:
        """Keep the state. Idempotent."""
        self._save()

    # --- what is expected --------------------------------------------------------------------------------------------

    def estimate(self, names: Sequence[str], contexts: Context) -> tuple[Estimates, list[int], int]:
        """What is expected of arms in their contexts [n, d]; their pulls, and the number of decisions until now."""
        with self._guard:
            pulls = [self.bandit.pulls(name) for name in names]
            return self.bandit.estimate(names, contexts), pulls, self._decisions

    def means(self, requests: Sequence[Request]) -> Sequence[Context]:
        """What is expected of the arms of requests now."""
        with self._guard:
            return estimated(self.bandit, requests)

    # --- what happens ------------------------------------------------------------------------------------------------

    def was_decided(self) -> None:
        """A decision was made."""
        with self._guard:
            self._decisions += 1

    def was_journalled(self) -> None:
        """A decision was put into the journal, in a transaction that writes: those wait for each other."""
        self._journalled += 1

    def learn(self, journalled: Journalled) -> None:
        """Have a reward journalled, and learn from it when it is. Raises StorageError as the disk; then nothing was."""
        with self._turns:
            with self._database.write() as connection:
                noted = journalled(connection, self.bandit.clock)
                self._journalled += noted is not None
                foreign = rows(connection) != self._journalled
            if foreign:  # another process has written to the journal
                self._renew()
            elif noted:
                with self._guard:
                    if noted.counts and noted.space == self.space.tag:
                        noted.teach(self.bandit)
                        self.bandit.settle()  # so that the next question need not
                    self.bandit.tick()
            self._unsaved += noted is not None
            if self._unsaved >= SAVED_EACH:
                self._save()

    def refresh(self, arms: Iterable[str]) -> None:
        """These adapters are there now: new arms begin with their exams, and what is gone is forgotten.

        That is also what was learned from questions about documents that were removed.
        """
        with self._turns:
            with self._database.read() as connection:
                foreign = rows(connection) != self._journalled
            if foreign:
                self._renew()
            self._begin(arms)

    def _begin(self, arms: Iterable[str]) -> None:
        with self._database.write() as connection, self._guard:
            begun = routes.arm_clocks(connection)
            for name in set(self.bandit.arms()) - set(begun) - {PLAIN}:
                self.bandit.forget(name)
            for name in sorted(set(arms) - set(begun)):
                routes.begin_arm(connection, name, self.bandit.clock)
                begin(self.bandit, name, self._exams(connection, name), clock=self.bandit.clock)
            self.bandit.settle()

    # --- the state ---------------------------------------------------------------------------------------------------

    def _loaded(self) -> Bandit:
        with self._database.read() as connection:
            self._journalled, self._decisions = rows(connection), routes.decisions(connection)
            kept = router_file.take(self._folder, self._tag(connection))
            if kept is not None:
                try:
                    return Bandit.load(kept)
                except InputError as error:
                    logger.warning("the router's state is made anew from the journal: %s", error)
            return self._rebuilt(connection)

    def _renew(self) -> None:
        """Make the state anew from the journal."""
        with self._database.read() as connection:
            self._journalled = rows(connection)
            renewed = self._rebuilt(connection)
        renewed.settle()
        with self._guard:
            self.bandit = renewed

    def _rebuilt(self, connection: Connection) -> Bandit:
        return rebuild(
            connection,
            self.space.tag,
            dimensions=self.space.size,
            ridge=1.0,
            discount=self._discount,
            seeds=lambda adapter: self._exams(connection, adapter),
        )

    def _tag(self, connection: Connection) -> str:
        """What a kept state must be of: this space and all that the journal holds."""
        return f"{self.space.tag} {self._discount} {mark(connection)}"

    def _save(self) -> None:
        """Write the state, so that the next start need not go through the journal; a full disk costs only that."""
        with self._turns, contextlib.suppress(StorageError), self._database.read() as connection:
            with self._guard:
                state = self.bandit.dump()
            router_file.put(self._folder, state, self._tag(connection))
            self._unsaved = 0
