"""One cluster on its way to an adapter, a bounded piece of work at a time.

    study → teach → train → embed → register → prove → examine → use

What has been reached is read from the library and the job folder, so that a course that was interrupted, or killed with
its process, goes on where it was. A passage that is removed meanwhile ends the course: what was prepared from it is
deleted, and the cluster, which has changed, begins anew.
"""

import shutil
import time
from collections.abc import Callable

from edge_rag.errors import InputError, StorageError
from edge_rag.learning import dataset
from edge_rag.learning.dataset import Layout
from edge_rag.learning.events import Failed
from edge_rag.learning.job import JOB, Result, read_result, write_job
from edge_rag.learning.studying import requests, study_questions
from edge_rag.records import Cluster, GateReport, Lesson
from edge_rag.runtime.graduation import CHANGED, OTHERS, Graduation
from edge_rag.runtime.training import Training
from edge_rag.runtime.workshop import Doing, job_name
from edge_rag.runtime.workshop import Tools as Tools  # whoever begins a course has them from here
from edge_rag.store import clusters, items


class Course:
    """The way of one cluster. `step` does the next piece of work; one thread calls it. `told`: within long pieces."""

    def __init__(self, cluster: Cluster, tools: Tools, told: Callable[[], None] = lambda: None) -> None:
        self.cluster = cluster
        self.doing = Doing("beginning")
        self._tools = tools
        self._told = told
        self._job = tools.jobs / job_name(cluster, tools)
        self._graduation = Graduation(cluster, self._job, tools, self._tell)
        self._training: Training | None = None
        self._seconds = 0.0
        self._begun = time.perf_counter()

    def _tell(self, doing: Doing) -> None:
        self.doing = doing
        self._told()

    @property
    def prepared(self) -> bool:
        """Whether all is written that its training needs: from then on it should end before anything else begins."""
        return (self._job / JOB).exists()

    def close(self) -> None:
        """Stop what computes; it goes on in another course of the same cluster. Idempotent."""
        if self._training:
            self._training.close()
            self._training = None

    def step(self, slice_seconds: float) -> Lesson | None:
        """The next piece of work, of about `slice_seconds` at most; what has become of it all at the end.

        What goes wrong with this cluster is told in the lesson. Raises Cancelled when the caller's scope is cancelled,
        EngineError when the engine cannot go on, and StorageError as the disk.
        """
        self._begun = time.perf_counter()
        try:
            return self._next(slice_seconds) if self._is_current() else self._end(reason=CHANGED)
        finally:
            self._seconds += time.perf_counter() - self._begun

    def give_up(self, reason: str) -> Lesson:
        """End it with an error."""
        return self._end(reason=reason)

    def _next(self, slice_seconds: float) -> Lesson | None:
        if not self.prepared:
            return None if self._study() or self._teach() else self._prepare()
        try:
            result = read_result(self._job)
        except StorageError as error:
            return self._end(reason=str(error))
        return self._train(slice_seconds) if result is None else self._graduate(result)

    def _is_current(self) -> bool:
        """Whether the cluster still has the passages that it had when this began."""
        with self._tools.database.read() as connection:
            now = {each.id: each.members for each in clusters.clusters(connection)}.get(self.cluster.id)
        return now == self.cluster.members

    # --- questions and answers ---------------------------------------------------------------------------------------

    def _study(self) -> bool:
        """Have questions written about some passages; whether there were any."""
        tools, wanted = self._tools, self._tools.settings.study_questions
        with tools.database.read() as connection:
            left = items.to_study(connection, self.cluster.members, model=tools.base, wanted=wanted)
            chosen = left[: max(1, tools.engine.capacity.slots // len(requests(0)))]
            known = {
                chunk: [item.question for item in items.items_of(connection, [chunk], model=tools.base)]
                for chunk in chosen
            }
        if not chosen:
            return False
        total = len(self.cluster.members)
        self.doing = Doing("writing questions about its passages", total - len(left), total)
        found = study_questions(chosen, tools.teacher.study, wanted=wanted, known=known)
        with tools.database.write() as connection:
            for chunk, questions in found.items():
                items.add_study(connection, chunk, questions, model=tools.base, asked=wanted, now=time.time())
        return True

    def _teach(self) -> bool:
        """Have some questions answered from the passages; whether there were any.

        When those of the cluster are, some of others: what the adapter must leave as it was.
        """
        tools = self._tools
        with tools.database.read() as connection:
            asked = items.untaught(connection, self.cluster.members, model=tools.base, limit=tools.together)
            if not asked:
                others = items.items_elsewhere(
                    connection, self.cluster.members, model=tools.base, exam=False, limit=OTHERS
                )
                asked = [item for item in others if item.answer is None][: tools.together]
            counts = items.counts(connection, model=tools.base, chunks=self.cluster.members)
        if not asked:
            return False
        self.doing = Doing("answering questions", counts.taught + counts.refused, counts.logged + counts.study)
        answers = tools.teacher.teach([(item.question, item.chunks) for item in asked])
        with tools.database.write() as connection:
            for item, answer in zip(asked, answers, strict=True):
                items.teach(connection, item.id, answer, model=tools.base)
        return True

    # --- training ----------------------------------------------------------------------------------------------------

    def _prepare(self) -> Lesson | None:
        """Write the job folder."""
        tools, wanted = self._tools, self._tools.settings
        self.doing = Doing("preparing the training")
        with tools.database.write() as connection:
            items.split(connection, self.cluster.members)
        with tools.database.read() as connection:
            lessons = dataset.lessons(connection, self.cluster.members, model=tools.base)
        layout = Layout(
            prefix=tools.builder.prefix,
            passage=tools.builder.passage,
            tail=lambda question: tools.builder.tail((), question, tools.instructions),
        )
        try:
            examples = dataset.build(lessons, layout, epochs=wanted.epochs, seed=0)
        except InputError as error:
            return self._end(reason=error.message)
        write_job(self._job, tools.asked_for(), examples)
        return None

    def _train(self, slice_seconds: float) -> Lesson | None:
        if self._training is None:
            self._training = self._tools.train(self._job)
        training = self._training
        outcome = training.run(slice_seconds)
        step = training.last
        self.doing = Doing("training", step.step if step else 0, step.steps if step else 0)
        if outcome in ("finished", "evicted"):
            self.close()
        return self._end(reason=_in_words(training.failure)) if training.failure else None

    def _graduate(self, result: Result) -> Lesson | None:
        if self._graduation.embed():
            return None
        graduated = self._graduation.graduate(result)
        return self._end(adapter=graduated.adapter, report=graduated.gate, reason=graduated.reason)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _end(self, *, adapter: str = "", report: GateReport | None = None, reason: str = "") -> Lesson:
        self.close()
        with self._tools.database.write() as connection:
            clusters.note_training(connection, self.cluster, now=time.time(), failure=reason)
            counts = items.counts(connection, model=self._tools.base, chunks=self.cluster.members)
        shutil.rmtree(self._job, ignore_errors=True)  # last: a job that is still there was not ended
        return Lesson(
            cluster_id=self.cluster.id,
            passages=len(self.cluster.members),
            items=counts.taught,
            adapter=adapter,
            gate=report,
            seconds=self._seconds + time.perf_counter() - self._begun,
            reason=reason,
        )


def _in_words(failure: Failed) -> str:
    return failure.reason + (f" ({failure.remedy})" if failure.remedy else "")
