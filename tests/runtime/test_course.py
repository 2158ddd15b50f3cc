"""A cluster on its way to an adapter: what is done in which order, what is left of it, and all that can go wrong.

With a tiny model, a teacher of made-up answers and trainings of made-up results; and once with the real small model.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_rag.config import Settings
from edge_rag.errors import ModelError
from edge_rag.learning.events import Failed
from edge_rag.learning.job import ADAPTER, PROOF, RESULT, read_examples, read_job
from edge_rag.native.llama import Model
from edge_rag.policy.prompt import LAYOUT_VERSION
from edge_rag.records import Kept, Lesson, Power
from edge_rag.runtime import teaching
from edge_rag.runtime.course import Course
from edge_rag.runtime.graduation import CHANGED
from edge_rag.runtime.learner import Learner
from edge_rag.store import adapters, items
from edge_rag.store import clusters as stored
from tests.native.tiny_models import write_tiny_model
from tests.runtime.coursework import BASE, RECIPE, School, Shape, Trainer, school
from tests.runtime.serving import Toy, add_document, add_files, remove_document, small_library

LIMIT = 200  # steps after which a course has failed to end


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Toy(write_tiny_model("llama", tmp_path_factory.mktemp("llama")), gpu_layers=0) as model:
        yield model


@pytest.fixture
def here(toy: Model, data: Path) -> Iterator[School]:
    with school(toy, data) as made:
        yield made


def course(here: School, *members: int, **changes: Any) -> Course:
    """The course of a cluster that is made now, out of what was asked."""
    with here.database.write() as connection:
        items.add_logged(connection)
        stored.put_clusters(connection, [frozenset(members)], [5.0], now=1.0)
    return Course(here.clusters()[0], msgspec.structs.replace(here.tools, **changes))


def through(made: Course) -> Lesson:
    """Go through to the end."""
    for _ in range(LIMIT):
        if lesson := made.step(1.0):
            return lesson
    raise AssertionError(made.doing)


def until(made: Course, doing: str) -> None:
    """Go on until it has done some of this."""
    for _ in range(LIMIT):
        assert made.step(1.0) is None
        if made.doing.what == doing:
            return
    raise AssertionError(made.doing)


# --- the way ---------------------------------------------------------------------------------------------------------


def test_what_was_asked_becomes_an_adapter_that_is_used(here: School) -> None:
    asked = here.ask(1, 2, times=4) + here.ask(2, 3, times=2)
    made = course(here, 1, 2, 3)
    done = list[str]()
    here.trainer.script = ["interrupted", "sliced"]
    while not (lesson := made.step(1.0)):
        done.append(made.doing.what)
    assert list(dict.fromkeys(done)) == [
        "answering questions", "preparing the training", "training", "embedding questions",
    ]  # fmt: skip
    assert sorted(here.teacher.taught) == sorted(asked)

    [adapter] = here.adapters()
    assert lesson.reason == ""
    assert (lesson.adapter, lesson.gate, lesson.passages, lesson.items) == (adapter.id, adapter.gate, 3, 6)
    assert lesson.seconds > 0
    assert (adapter.state, adapter.reason, adapter.members) == ("ready", "", (1, 2, 3))
    assert (adapter.base, adapter.layout, adapter.recipe) == (BASE, LAYOUT_VERSION, RECIPE)
    assert adapter.gate is not None
    assert (adapter.gate.seen, adapter.gate.unseen) == (Kept(5, 1.0), Kept(1, 1.0))
    with here.database.read() as connection:
        texts, vectors, f1 = adapters.questions_of(connection, adapter.id)
    assert set(texts) < set(asked)
    assert (len(texts), len(vectors), f1.tolist()) == (5, 5, [1.0] * 5)

    assert here.files() == [adapter.id]
    assert here.jobs() == []
    [cluster] = here.clusters()
    assert cluster.trained_at is not None
    assert cluster.failure == ""
    assert here.tools.coverer.status().ready == 1
    [training] = here.trainer.opened
    assert training.closed


def test_it_is_examined_without_its_passages_and_the_newest_question_was_held_out(here: School) -> None:
    for at in range(5):
        here.ask(1, 2, at=1e9 + at)
    lesson = through(course(here, 1, 2))
    newest = "What about (1, 2) in case 4?"
    assert [question for question, adapter in here.teacher.examined if adapter].count(newest) == 1
    assert here.teacher.examined.count((newest, "")) == 0
    with here.database.read() as connection:
        assert newest not in adapters.questions_of(connection, lesson.adapter).texts
        held_out = adapters.questions_of(connection, lesson.adapter, held_out=True)
    assert (held_out.texts, held_out.f1.tolist()) == ((newest,), [1.0])
    np.testing.assert_array_equal(held_out.vectors, here.embedder.embed([newest]).astype(np.float16))


def test_the_job_says_how_to_train_and_its_examples_are_made_of_the_prompts(here: School) -> None:
    here.ask(1, 2, times=3)
    made = course(here, 1, 2)
    until(made, "preparing the training")
    [folder] = here.tools.jobs.iterdir()
    job = read_job(folder)
    assert (job.model, job.sha256, job.epochs, job.cache) == (
        str(here.tools.model), BASE, 2, str(here.tools.cache),
    )  # fmt: skip
    assert read_examples(folder).order.shape[0] == 2
    assert here.trainer.opened == []


def test_questions_are_written_about_each_passage_once(toy: Model, data: Path) -> None:
    with school(toy, data, study_questions=2) as here:
        here.ask(1, 2)
        first = course(here, 1, 2)
        until(first, "answering questions")
        asked = list(here.teacher.studied)
        assert set(asked) == {1, 2}
        lesson = through(Course(first.cluster, here.tools))
        assert here.teacher.studied == asked
        assert lesson.items == 1 + 2 * 2


def test_what_has_been_reached_is_not_done_again(here: School) -> None:
    here.ask(1, 2, times=4)
    first = course(here, 1, 2)
    here.trainer.script = ["sliced"]
    until(first, "training")
    taught = list(here.teacher.taught)
    first.close()
    first.close()
    lesson = through(Course(first.cluster, here.tools))
    assert lesson.adapter
    assert here.teacher.taught == taught
    assert [training.folder.name for training in here.trainer.opened] == [here.trainer.opened[0].folder.name] * 2


def test_memory_that_is_short_makes_it_begin_a_new_trainer(here: School) -> None:
    here.ask(1, 2, times=4)
    here.trainer.script = ["evicted", "sliced"]
    assert through(course(here, 1, 2)).adapter
    assert [training.closed for training in here.trainer.opened] == [True, True]


def test_an_exam_that_is_cancelled_begins_anew(here: School) -> None:
    here.ask(1, 2, times=4)
    made = course(here, 1, 2)
    until(made, "embedding questions")

    def fall() -> None:
        raise ModelError("made to fail")

    here.teacher.before = fall
    with pytest.raises(ModelError):
        through(made)
    [adapter] = here.adapters()
    assert adapter.state == "disabled"
    assert here.tools.coverer.status().ready == 0
    here.teacher.before = lambda: None
    assert through(made).adapter == adapter.id
    assert [each.state for each in here.adapters()] == ["ready"]


def test_questions_are_embedded_anew_when_another_embedding_model_came_meanwhile(here: School) -> None:
    here.ask(1, 2, times=4)
    made = course(here, 1, 2)
    until(made, "embedding questions")
    with here.database.write() as connection:
        items.forget_vectors(connection)
    assert through(made).adapter
    assert len(here.embedder.embedded) == 8


def test_a_new_adapter_takes_the_place_of_those_that_it_covers(here: School) -> None:
    here.ask(1, 2, times=4)
    here.ask(5, 6, times=4)
    small, other = through(course(here, 1, 2)).adapter, through(course(here, 5, 6)).adapter
    foreign = msgspec.structs.replace(here.adapters()[0], id="f" * 64, base="c" * 64)
    with here.database.write() as connection:
        assert adapters.put_adapter(connection, foreign, adapters.questions_of(connection, small))
    here.ask(1, 3, times=4)
    large = through(course(here, 1, 2, 3)).adapter
    assert {adapter.id for adapter in here.adapters()} == {other, large, foreign.id}
    assert here.files() == sorted([other, large])
    assert here.tools.coverer.status().ready == 2


# --- what can go wrong -----------------------------------------------------------------------------------------------


def failed(here: School, lesson: Lesson) -> None:
    """What holds of every failure."""
    assert lesson.adapter == ""
    assert here.jobs() == []
    assert [cluster.failure for cluster in here.clusters()] == [lesson.reason]
    assert here.clusters()[0].trained_at is not None
    assert here.tools.coverer.status().ready == 0


def test_a_teacher_that_answers_nothing_is_the_end(here: School) -> None:
    here.ask(1, 2, times=4)
    here.teacher.refuses = True
    lesson = through(course(here, 1, 2))
    failed(here, lesson)
    assert lesson.reason == "there is no answered question to learn from"
    assert lesson.items == 0
    assert here.trainer.opened == []


def test_an_adapter_that_fails_its_exam_stays_to_be_looked_at_and_is_not_used(here: School) -> None:
    here.ask(1, 2, times=4)
    here.teacher.forgets = lambda question: True
    lesson = through(course(here, 1, 2))
    failed(here, lesson)
    assert lesson.gate is not None
    assert lesson.reason == lesson.gate.reason == "answered 0 of 4 seen questions well, 25% are asked for"
    [adapter] = here.adapters()
    assert (adapter.state, adapter.reason, adapter.gate) == ("failed", lesson.reason, lesson.gate)
    assert here.files() == [adapter.id]


def test_an_export_that_is_wrong_is_discarded_with_its_reason(here: School) -> None:
    here.ask(1, 2, times=4)
    here.trainer.wrong = 3.0
    lesson = through(course(here, 1, 2))
    failed(here, lesson)
    assert lesson.reason.startswith("its export is wrong: llama.cpp and torch differ by ")
    assert here.adapters() == []
    assert here.files() == []
    assert here.teacher.examined == []


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        pytest.param(ADAPTER, b"GGUF and no more", "could not be loaded", id="an adapter that cannot be loaded"),
        pytest.param(PROOF, b"no arrays", "is damaged", id="a damaged proof"),
        pytest.param(RESULT, b"{", "is damaged", id="a damaged result"),
    ],
)
def test_results_that_make_no_sense_end_it_and_leave_nothing(
    here: School, file: str, content: bytes, reason: str
) -> None:
    here.ask(1, 2, times=4)
    here.trainer.spoil = lambda folder: (folder / file).write_bytes(content) and None
    lesson = through(course(here, 1, 2))
    failed(here, lesson)
    assert reason in lesson.reason
    assert here.adapters() == []
    assert here.files() == []


def test_an_adapter_that_finds_no_room_is_not_kept(here: School) -> None:
    here.ask(1, 2, times=4)
    pager = here.served.engine.pager
    assert pager is not None
    pager.budget = 100
    lesson = through(course(here, 1, 2))
    failed(here, lesson)
    assert lesson.reason.endswith("more than adapters.memory_mb has room for")
    assert here.adapters() == []


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (Failed("the loss is no number", "lower the rate"), "the loss is no number (lower the rate)"),
        (Failed("the loss is no number"), "the loss is no number"),
    ],
)
def test_a_training_that_fails_ends_it(here: School, failure: Failed, reason: str) -> None:
    here.ask(1, 2, times=4)
    here.trainer.script = [failure]
    lesson = through(course(here, 1, 2))
    failed(here, lesson)
    assert lesson.reason == reason
    assert here.trainer.opened[0].closed


def test_a_course_that_is_given_up_is_a_failure(here: School) -> None:
    here.ask(1, 2, times=4)
    made = course(here, 1, 2)
    until(made, "preparing the training")
    failed(here, made.give_up("out of order"))


# --- what changes meanwhile ------------------------------------------------------------------------------------------


def test_a_document_that_is_removed_while_its_cluster_trains_takes_everything_with_it(here: School) -> None:
    [more] = add_document(here.database, "more.txt", 1)
    here.ask(1, more, times=4)
    made = course(here, 1, more)
    here.trainer.script = [lambda: remove_document(here.database, "more.txt")]
    lesson = through(made)
    assert (lesson.reason, lesson.adapter) == (CHANGED, "")
    assert here.trainer.opened[0].closed
    assert here.jobs() == []
    assert [(each.members, each.trained_at) for each in here.clusters()] == [((1,), None)]
    with here.database.read() as connection:
        assert items.counts(connection, model=BASE).taught == 0


@pytest.mark.parametrize("calls", [0, 1])
def test_a_document_that_is_removed_during_the_exam_leaves_no_adapter(here: School, calls: int) -> None:
    [more] = add_document(here.database, "more.txt", 1)
    here.ask(1, more, times=4)
    made = course(here, 1, more)
    until(made, "embedding questions")
    left = [lambda: None] * calls + [lambda: remove_document(here.database, "more.txt")]
    here.teacher.before = lambda: left.pop(0)() if left else None
    lesson = through(made)
    assert (lesson.reason, lesson.adapter, left) == (CHANGED, "", [])
    assert here.adapters() == []
    assert here.files() == []
    assert here.jobs() == []


def test_a_document_that_is_removed_before_the_exam_is_not_examined(here: School) -> None:
    [more] = add_document(here.database, "more.txt", 1)
    here.ask(1, more, times=4)
    made = course(here, 1, more)
    until(made, "embedding questions")
    graduate, removed = made._graduation.graduate, list[bool]()

    def late(result: Any) -> Any:
        remove_document(here.database, "more.txt")
        removed.append(True)
        return graduate(result)

    made._graduation.graduate = late  # type: ignore[method-assign]
    assert through(made).reason == CHANGED
    assert removed
    assert here.files() == []
    assert here.teacher.examined == []


def test_with_another_model_everything_is_asked_and_trained_anew(here: School) -> None:
    here.ask(1, 2, times=4)
    first = course(here, 1, 2)
    here.trainer.script = ["sliced"]
    until(first, "training")
    first.close()
    taught = list(here.teacher.taught)
    lesson = through(Course(first.cluster, msgspec.structs.replace(here.tools, base="c" * 64)))
    assert sorted(here.teacher.taught) == sorted(taught * 2)
    assert len({training.folder for training in here.trainer.opened}) == 2
    assert [(adapter.id, adapter.base) for adapter in here.adapters()] == [(lesson.adapter, "c" * 64)]
    assert here.tools.coverer.status().ready == 0  # of the model that serves there is none


# --- with the real small model ---------------------------------------------------------------------------------------


def test_the_small_model_teaches_proves_and_examines(
    tmp_path: Path, small_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teaching, "TOKENS", 20)
    texts = {
        "pump.txt": "The pump of the Marlin unit must be oiled every 12 weeks.",
        "again.txt": "The pump of the Marlin unit must be oiled every 12 weeks. ",
    }
    changes = {"learning__study_questions": 0, "learning__epochs": 1, "learning__least_questions": 1}
    with small_library(tmp_path / "data", small_settings, **changes) as rag:
        add_files(rag, tmp_path / "files", texts)
        assert len(rag.ask("What must be oiled every 12 weeks?").passages) == 2
        house = rag._house
        coverer = house.school.coverer()
        assert coverer is not None
        trainer = Trainer(house.engine(), Shape(layers=30, forward=1536, embedding=576))
        trainer.proved = 1
        tools = msgspec.structs.replace(house.school.tools(coverer), train=trainer)
        with Learner(tools, trains="", power=Power) as learner:
            [lesson] = learner.learn()
        [adapter], [cluster] = rag.adapters(), rag.clusters()
        assert len(cluster.members) == 2
        assert cluster.failure == lesson.reason
        assert lesson.gate is not None
        # It adds nothing, so it knows what the model knows anyway.
        assert lesson.gate.seen == lesson.gate.bare
        assert (adapter.state, adapter.reason) == ("ready" if lesson.adapter else "failed", lesson.reason)
        assert np.isfinite(lesson.gate.seen.f1)
        with rag._database.read() as connection:
            taught = items.items_of(connection, cluster.members, model=tools.base)
        assert ["pump" in (item.answer or "") for item in taught] == [True]
        assert not any(tools.jobs.glob("*"))
