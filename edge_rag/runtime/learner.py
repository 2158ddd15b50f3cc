"""What the idle machine learns, and in which order: clusters from the journal, and one course after the other.

The cluster comes first that promises most for its time: the weight of the questions that it would answer, by the
seconds that its course is expected to take: as many as it has passages. A cluster is not tried twice without new
evidence: not until its passages have changed. Once its training is prepared it is gone on with before anything else,
also by the next process, and passages are not grouped anew meanwhile: what was trained would be lost.

Nothing is learned on battery, nor while the device is hot, unless the settings say so, nor in two processes at once.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable

from filelock import FileLock, Timeout

from edge_rag.closing import Closing
from edge_rag.errors import Cancelled, EdgeRAGError, EngineError, StorageError
from edge_rag.native import device
from edge_rag.policy.clustering import cluster, regroup, settled, weigh, worth_training
from edge_rag.policy.waiting import why_wait
from edge_rag.records import Cluster, LearningStatus, Lesson, Power
from edge_rag.runtime.course import Course
from edge_rag.runtime.generations import Scope, current_scope
from edge_rag.runtime.graduation import UNEXAMINED
from edge_rag.runtime.workshop import Tools, job_name
from edge_rag.store import adapters, clusters, items
from edge_rag.store.fetching import storage_errors

DAY = 86_400.0
SLICE = 10.0  # seconds of training before other idle work has its turn
GAIN = 0.05  # of coverage in a region that pays for training its clusters anew
ELSEWHERE = "another process learns from this library"
WAIT = 5.0  # seconds between two looks whether there is still a reason to wait
MIXED = 16  # newly logged questions after which passages are grouped again, or a tenth of all

logger = logging.getLogger(__name__)


class Learner(Closing):
    """Learns from one library with one model. `next` is for the idle thread, `learn` for whoever wants to wait.

    Any thread may call `status`. `trains` says whether adapters can be trained here, '' or why not.
    """

    def __init__(self, tools: Tools, *, trains: str, power: Callable[[], Power] = device.power) -> None:
        self._tools = tools
        self.trains = trains
        self._power = power
        self._lock = threading.Lock()  # one course at a time
        # Of the library: held while there is something to do. Threads take turns in it.
        self._alone = FileLock(tools.jobs.with_suffix(".lock"), timeout=0, mode=0o600, thread_local=False)
        self._scope = Scope()
        self._course: Course | None = None
        self._grouped = -1  # logged items when passages were grouped last
        self._lessons: list[Lesson] = []
        self._waiting = trains
        self._progress: Callable[[LearningStatus], None] | None = None
        self._closed = False
        self._ended = threading.Event()

    def close(self) -> None:
        """Stop the present piece of work. Idempotent; what has been reached is kept."""
        self._closed = True
        self._ended.set()
        self._scope.cancel()
        with self._lock:
            self._drop_course()
            self._alone.release()

    # --- one process at a time ---------------------------------------------------------------------------------------

    def _may_begin(self) -> bool:
        """Whether no other process learns here; then none does until there is nothing left to do, or `close`."""
        if self._alone.is_locked:
            return True
        with storage_errors(self._tools.jobs.parent):
            try:
                self._alone.acquire()
            except Timeout:
                return False
        self._tidy()
        return True

    def _tidy(self) -> None:
        """Take over what a process before has left: its course goes on, the rest of its work is removed.

        That is adapters that were never examined, and folders of other trainings.
        """
        tools = self._tools
        with tools.database.write() as connection:
            for adapter in adapters.adapters(connection):
                if adapter.reason == UNEXAMINED:
                    adapters.remove(connection, adapter.id)
            adapters.sweep(connection, tools.folder)
            known = [each for each in clusters.clusters(connection) if worth_training(each, 0)]
        names = {job_name(each, tools) for each in known}
        for folder in tools.jobs.glob("*"):
            if folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)
        courses = (Course(each, tools, self._told) for each in known)
        self._course = next((course for course in courses if course.prepared), None)

    # --- pieces of work ----------------------------------------------------------------------------------------------

    def next(self) -> bool:
        """Do one piece of work; whether there was any."""
        return self._advance(self._tools.settings.least_questions) is not None

    def learn(
        self,
        *,
        least: float = 0.0,
        until: float | None = None,
        progress: Callable[[LearningStatus], None] | None = None,
    ) -> list[Lesson]:
        """Go on until nothing is left to learn, or the time `until` (of `time.time`); what has become of each cluster.

        With `until`, a reason to wait (heat, battery, another process that learns) is waited for.
        `least` is the weight of questions from which on a cluster is worth it. Raises Cancelled when the caller's scope
        is cancelled or this is closed meanwhile, EngineError when the engine cannot go on, StorageError as the disk.
        """
        before, self._progress = len(self._lessons), progress
        try:
            while not self._closed and (until is None or time.time() < until):
                if self._advance(least) is None and not self._wait(until):
                    break
                self._told()
        finally:
            self._progress = None
        return self._lessons[before:]

    def _told(self) -> None:
        if self._progress:
            self._progress(self.status())

    def _wait(self, until: float | None) -> bool:
        """Wait a while when there is a reason to, and an hour at which it will end; whether there was."""
        if self.trains or not self._waiting or until is None:
            return False
        self._ended.wait(max(0.0, min(WAIT, until - time.time())))
        if current_scope().cancelled:
            raise Cancelled("nobody waits for it any more")
        return True

    def _advance(self, least: float) -> Course | None:
        """One piece of work; None when there is nothing to do, or reason to wait."""
        with self._lock:
            self._scope = scope = Scope()
            if self._closed:  # after the scope is made: whoever closes cancels this one, or is seen here
                return None
            self._waiting = self._why_wait()
            if self._waiting:
                return None
            course = self._course = self._present() or self._chosen(least)
            if course is None:
                self._alone.release()
                return None
            with current_scope().holding(scope), scope:
                self._step(course)
            return course

    def _why_wait(self) -> str:
        wanted = self._tools.settings
        reason = self.trains or why_wait(self._power(), max_celsius=wanted.max_celsius, on_battery=wanted.on_battery)
        return reason or ("" if self._may_begin() else ELSEWHERE)

    def _present(self) -> Course | None:
        """The course that is gone on with; none when passages were grouped anew before its training was prepared."""
        if not (self._course and self._course.prepared) and self._group():
            self._drop_course()
        return self._course

    def _step(self, course: Course) -> None:
        try:
            lesson = course.step(SLICE)
        except (Cancelled, EngineError, StorageError):  # it has nothing to do with this cluster
            raise
        except EdgeRAGError as error:
            lesson = course.give_up(str(error))
        if lesson:
            self._learned(lesson)

    def _learned(self, lesson: Lesson) -> None:
        self._lessons.append(lesson)
        self._drop_course()
        logger.info(
            "cluster %d: %s", lesson.cluster_id, f"adapter {lesson.adapter[:12]}" if lesson.adapter else lesson.reason
        )

    def _drop_course(self) -> None:
        if self._course:
            self._course.close()
            self._course = None

    # --- clusters ----------------------------------------------------------------------------------------------------

    def _group(self) -> bool:
        """Take over what was asked, and group passages when enough is new; whether any cluster has changed."""
        tools, wanted = self._tools, self._tools.settings
        with tools.database.write() as connection:
            items.add_logged(connection)
            logged = items.counts(connection, model=tools.base).logged
        if self._grouped >= 0 and logged - self._grouped < max(MIXED, self._grouped // 10):
            return False
        self._grouped = logged
        with tools.database.read() as connection:
            old = clusters.clusters(connection)
            asked = clusters.asked_together(connection, now=time.time(), half_life=wanted.half_life_days * DAY)
            tokens = clusters.passage_tokens(connection)
        groups = cluster(
            asked,
            tokens,
            old=[frozenset(each.members) for each in settled(old)],
            most=wanted.most_passages,
            most_tokens=wanted.most_tokens,
            overlap=wanted.overlap,
        )
        if not wanted.overlap:
            caps = {"most": wanted.most_passages, "most_tokens": wanted.most_tokens}
            groups = regroup(asked, tokens, groups, gain=GAIN, **caps) or groups
        with tools.database.write() as connection:
            clusters.put_clusters(connection, groups, weigh(groups, asked), now=time.time())
            new = clusters.clusters(connection)
        return [each.members for each in new] != [each.members for each in old]

    def _chosen(self, least: float) -> Course | None:
        with self._tools.database.read() as connection:
            known = clusters.clusters(connection)
        worth = [each for each in known if worth_training(each, least)]
        return Course(max(worth, key=_promise), self._tools, self._told) if worth else None

    # --- telling -----------------------------------------------------------------------------------------------------

    def status(self) -> LearningStatus:
        """What it is at, and how much there is of everything."""
        with self._tools.database.read() as connection:
            counts = items.counts(connection, model=self._tools.base)
            count = len(clusters.clusters(connection))
        course, failures = self._course, [lesson.reason for lesson in self._lessons if lesson.reason]
        return LearningStatus(
            doing=f"cluster {course.cluster.id}: {course.doing.what}" if course else "",
            done=course.doing.done if course else 0,
            total=course.doing.total if course else 0,
            waiting=self._waiting,
            clusters=count,
            items=counts.logged + counts.study,
            taught=counts.taught,
            last_failure=failures[-1] if failures else "",
        )


def _promise(cluster: Cluster) -> tuple[float, int]:
    """Questions by the work that they take: a course takes as long as there are passages. Of equals the first."""
    return cluster.weight / len(cluster.members), -cluster.id
