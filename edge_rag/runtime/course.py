"""One cluster on its way to an adapter, a bounded piece of work at a time.

    study → teach → embed → train → register → prove → examine → use

What has been reached is read from the library and the job folder, so that a course that was interrupted, or killed with
its process, goes on where it was. A passage that is removed meanwhile ends the course: what was prepared from it is
deleted, and the cluster, which has changed, begins anew.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from edge_rag.config import Learning
from edge_rag.errors import InputError
from edge_rag.learning import dataset, gate
from edge_rag.learning.dataset import Layout
from edge_rag.learning.job import ADAPTER, JOB, Job, Result, read_proof, read_result, write_job
from edge_rag.learning.studying import study_questions
from edge_rag.native.embedder import Embedder
from edge_rag.policy.prompt import LAYOUT_VERSION
from edge_rag.records import Adapter, Cluster, GateReport, Item, Lesson, Record
from edge_rag.runtime.covering import Coverer
from edge_rag.runtime.engine import Engine
from edge_rag.runtime.prompting import PromptBuilder
from edge_rag.runtime.proving import prove
from edge_rag.runtime.teaching import Teacher
from edge_rag.runtime.training import Training
from edge_rag.store import adapters, clusters, items
from edge_rag.store.adapters import AdapterFolder, Questions
from edge_rag.store.database import Database

TOGETHER = 8  # questions that are taught, or examined, in one piece of work
OTHERS = 64  # items of other clusters that an exam chooses from
UNEXAMINED = "it was not examined yet"
CHANGED = "its passages have changed meanwhile"


class Tools(Struct, frozen=True):
    """What a course works with. `model` is the GGUF file that serves and `base` its sha256.

    `train` opens a training over a job folder; `jobs` is where those folders are, `cache` that of dequantised weights.
    """

    database: Database
    engine: Engine
    teacher: Teacher
    embedder: Embedder
    builder: PromptBuilder
    coverer: Coverer
    folder: AdapterFolder
    settings: Learning
    instructions: str
    model: Path
    base: str
    jobs: Path
    cache: Path
    memory: int
    train: Callable[[Path], Training]


class Doing(Record, frozen=True):
    """What a course is at, in words; `done` of `total` of it."""

    what: str
    done: int = 0
    total: int = 0


def job_name(cluster: Cluster, tools: Tools) -> str:
    """The name of the folder for just this training: of these passages, with this model and these settings."""
    what = (cluster.members, tools.base, tools.settings, tools.instructions)
    return f"{cluster.id}-{hashlib.sha256(msgspec.json.encode(what)).hexdigest()[:16]}"


class Course:
    """The way of one cluster. `step` does the next piece of work; one thread calls it."""

    def __init__(self, cluster: Cluster, tools: Tools) -> None:
        self.cluster = cluster
        self.doing = Doing("beginning")
        self._tools = tools
        self._job = tools.jobs / job_name(cluster, tools)
        self._training: Training | None = None
        self._seconds = 0.0

    def close(self) -> None:
        """Stop what computes; it goes on in another course of the same cluster. Idempotent."""
        if self._training:
            self._training.close()
            self._training = None

    def step(self, slice_seconds: float) -> Lesson | None:
        """The next piece of work, of about `slice_seconds` at most; what has become of it all at the end.

        What goes wrong with this cluster is told in the lesson; raises Cancelled when the engine is closing.
        """
        started = time.perf_counter()
        try:
            if not self._is_current():
                return self._end(reason=CHANGED)
            return self._next(slice_seconds)
        finally:
            self._seconds += time.perf_counter() - started

    def give_up(self, reason: str) -> Lesson:
        """End it with an error."""
        return self._end(reason=reason)

    def _next(self, slice_seconds: float) -> Lesson | None:
        if (self._job / JOB).exists():
            result = read_result(self._job)
            return self._train(slice_seconds) if result is None else self._graduate(result)
        if not (self._study() or self._teach() or self._embed()):
            return self._prepare()
        return None

    def _is_current(self) -> bool:
        """Whether the cluster still has the passages that it had when this began."""
        with self._tools.database.read() as connection:
            now = {each.id: each.members for each in clusters.clusters(connection)}.get(self.cluster.id)
        return now == self.cluster.members

    # --- questions and answers ---------------------------------------------------------------------------------------

    def _study(self) -> bool:
        """Have questions written about one passage; whether one was left."""
        tools, wanted = self._tools, self._tools.settings.study_questions
        with tools.database.read() as connection:
            left = items.to_study(connection, self.cluster.members, model=tools.base, wanted=wanted)
            if not left:
                return False
            about = items.items_of(connection, left[:1], model=tools.base)
        total = len(self.cluster.members)
        self.doing = Doing("writing questions about its passages", total - len(left), total)
        found = study_questions(left[0], tools.teacher.study, wanted=wanted, known=[item.question for item in about])
        with tools.database.write() as connection:
            items.add_study(connection, left[0], found, model=tools.base, asked=wanted, now=time.time())
        return True

    def _teach(self) -> bool:
        """Have some questions answered from the passages; whether there were any."""
        tools = self._tools
        with tools.database.read() as connection:
            asked = items.untaught(connection, self.cluster.members, model=tools.base, limit=TOGETHER)
            counts = items.counts(connection, model=tools.base, chunks=self.cluster.members)
        if not asked:
            return False
        self.doing = Doing("answering questions", counts.taught + counts.refused, counts.logged + counts.study)
        answers = tools.teacher.teach([(item.question, item.chunks) for item in asked])
        with tools.database.write() as connection:
            for item, answer in zip(asked, answers, strict=True):
                items.teach(connection, item.id, answer, model=tools.base)
        return True

    def _embed(self) -> bool:
        """Embed some questions; whether there were any."""
        with self._tools.database.read() as connection:
            found = items.items_of(connection, self.cluster.members, model=self._tools.base)
            others = self._others()
            known = items.vectors(connection, [item.id for item in (*found, *others)])
        missing = [item for item in (*found, *others) if item.id not in known][: 16 * TOGETHER]
        if not missing:
            return False
        self.doing = Doing("embedding questions", len(known), len(found) + len(others))
        vectors = self._tools.embedder.embed([item.question for item in missing])
        with self._tools.database.write() as connection:
            items.put_vectors(connection, {item.id: v for item, v in zip(missing, vectors, strict=True)})
        return True

    def _others(self) -> list[Item]:
        with self._tools.database.read() as connection:
            return items.items_elsewhere(
                connection, self.cluster.members, model=self._tools.base, exam=True, limit=OTHERS
            )

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
        job = Job(
            model=str(tools.model),
            sha256=tools.base,
            cache=str(tools.cache),
            targets=wanted.targets,
            layers=wanted.layers,
            rank=wanted.rank,
            epochs=wanted.epochs,
            learning_rate=wanted.learning_rate,
            kl=wanted.kl_share,
            memory=tools.memory,
            device=wanted.device,
        )
        write_job(self._job, job, examples)
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
        if outcome == "failed" and training.failure:
            return self._end(reason=f"{training.failure.reason} ({training.failure.remedy})")
        return None

    # --- proof and exam ----------------------------------------------------------------------------------------------

    def _graduate(self, result: Result) -> Lesson:
        """Register the adapter, prove it and examine it; it is used when it passes."""
        tools = self._tools
        self.doing = Doing("examining the adapter")
        trained, held_out, others = self._questions()
        questions = Questions(
            tuple(item.question for item in trained), self._vectors(trained), np.full(len(trained), np.nan, np.float32)
        )
        adapter = Adapter(
            id="",
            cluster_id=self.cluster.id,
            members=self.cluster.members,
            bytes=0,
            base=tools.base,
            layout=LAYOUT_VERSION,
            recipe=result.recipe,
            gate=None,
            state="disabled",
            reason=UNEXAMINED,
            pinned=False,
            made_at=time.time(),
        )
        registered = adapters.register(tools.database, tools.folder, self._job / ADAPTER, adapter, questions)
        if registered is None:
            return self._end(reason=CHANGED)
        if refutation := prove(tools.engine, registered.id, read_proof(self._job)):
            self._discard(registered)
            return self._end(reason=f"its export is wrong: {refutation}")
        exam = gate.Exam(
            members=frozenset(self.cluster.members),
            trained=trained,
            trained_vectors=questions.vectors,
            held_out=held_out,
            held_out_vectors=self._vectors(held_out),
            others=others,
            others_vectors=self._vectors(others),
            keep=tools.settings.keep,
            drift=tools.settings.drift,
        )
        examined = gate.examine(exam, self._answer(registered.id), self._tell)
        return self._admit(registered, examined, questions)

    def _questions(self) -> tuple[list[Item], list[Item], list[Item]]:
        """Questions that were trained on, held-out ones, and ones of other clusters; those that have an answer."""
        with self._tools.database.read() as connection:
            found = items.items_of(connection, self.cluster.members, model=self._tools.base)
        answered = [item for item in found if item.answer is not None]
        trained = [item for item in answered if not item.held_out]
        return trained, [item for item in answered if item.held_out], self._others()

    def _vectors(self, wanted: Sequence[Item]) -> np.ndarray:
        with self._tools.database.read() as connection:
            known = items.vectors(connection, [item.id for item in wanted])
        return np.stack([known[item.id] for item in wanted]) if wanted else np.zeros((0, 1), np.float16)

    def _answer(self, adapter: str) -> gate.Answer:
        def answer(asks: Sequence[gate.Ask]) -> Iterator[str]:
            for start in range(0, len(asks), TOGETHER):
                batch = asks[start : start + TOGETHER]
                asked = [(ask.question, ask.chunks) for ask in batch]
                yield from self._tools.teacher.answers(asked, adapter if batch[0].adapter else "")

        return answer

    def _tell(self, done: int, total: int) -> None:
        self.doing = Doing("examining the adapter", done, total)

    def _admit(self, adapter: Adapter, examined: gate.Examined, questions: Questions) -> Lesson:
        """Put what the exam has shown; an adapter that passed takes the place of those whose passages it covers."""
        report = examined.report
        final = msgspec.structs.replace(
            adapter, gate=report, state="ready" if report.passed else "failed", reason=report.reason
        )
        with self._tools.database.write() as connection:
            there = adapters.put_adapter(connection, final, questions._replace(f1=examined.f1))
            for other in adapters.adapters(connection) if there and report.passed else ():
                if other.id != final.id and set(other.members) <= set(final.members):
                    adapters.remove(connection, other.id)
            adapters.sweep(connection, self._tools.folder)
        self._tools.coverer.refresh()
        if not there:
            return self._end(reason=CHANGED)
        return self._end(adapter=final.id if report.passed else "", report=report, reason=report.reason)

    def _discard(self, adapter: Adapter) -> None:
        with self._tools.database.write() as connection:
            adapters.remove(connection, adapter.id)
            adapters.sweep(connection, self._tools.folder)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _end(self, *, adapter: str = "", report: GateReport | None = None, reason: str = "") -> Lesson:
        self.close()
        shutil.rmtree(self._job, ignore_errors=True)
        with self._tools.database.write() as connection:
            clusters.note_training(connection, self.cluster, now=time.time(), failure=reason)
            counts = items.counts(connection, model=self._tools.base, chunks=self.cluster.members)
        return Lesson(
            cluster_id=self.cluster.id,
            passages=len(self.cluster.members),
            items=counts.taught,
            adapter=adapter,
            gate=report,
            seconds=self._seconds,
            reason=reason,
        )
