"""What is learned and in which order, when it waits, and what becomes of it when it is closed, killed or overtaken.

With a tiny model, a teacher of made-up answers and trainings of made-up results.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from edge_rag.errors import Cancelled, EngineError, InputError, StorageError
from edge_rag.learning.events import Failed
from edge_rag.native.llama import Model
from edge_rag.policy.clustering import ALONE
from edge_rag.records import LearningStatus, Lesson, Power
from edge_rag.runtime import course as courses
from edge_rag.runtime import learner as learners
from edge_rag.runtime.generations import Scope, current_scope
from edge_rag.runtime.graduation import CHANGED, UNEXAMINED
from edge_rag.runtime.learner import ELSEWHERE, MIXED, Learner
from edge_rag.store import adapters, clusters, items
from tests.native.tiny_models import write_tiny_model
from tests.runtime.coursework import BASE, School, school
from tests.runtime.serving import Toy, add_document, remove_document
from tests.store.adapter_samples import asked as questions
from tests.store.adapter_samples import unregistered, weights

LIMIT = 60.0  # seconds after which a thread is given up


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Toy(write_tiny_model("llama", tmp_path_factory.mktemp("llama")), gpu_layers=0) as model:
        yield model


@pytest.fixture
def here(toy: Model, data: Path) -> Iterator[School]:
    with school(toy, data) as made:
        yield made


@pytest.fixture
def learner(here: School) -> Iterator[Learner]:
    with here.learner() as made:
        yield made


def covered(lessons: list[Lesson], here: School) -> list[tuple[int, ...]]:
    """What the adapters of some lessons cover."""
    members = {adapter.id: adapter.members for adapter in here.adapters()}
    return [members[lesson.adapter] for lesson in lessons]


class Held:
    """Holds the thread that runs a training until its scope is cancelled, or until it is let go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self._go_on = threading.Event()

    def __call__(self) -> None:
        scope = current_scope()
        with scope.holding(self):
            self.begun.set()
            assert self._go_on.wait(LIMIT)
        if scope.cancelled:
            raise Cancelled("nobody waits for it any more")

    def cancel(self) -> None:
        self._go_on.set()


def killed(learner: Learner) -> None:
    """What the system does for a process that is killed: its lock is free, and nothing else is put in order."""
    learner._alone.release()


# --- grouping and choice ---------------------------------------------------------------------------------------------


def test_without_a_journal_there_is_nothing_to_learn(learner: Learner) -> None:
    assert not learner.next()
    assert learner.learn() == []
    assert learner.status() == LearningStatus("", 0, 0, "", clusters=0, items=0, taught=0)


def test_passages_that_are_asked_for_together_are_learned_together(here: School, learner: Learner) -> None:
    here.ask(1, 2, times=3)
    here.ask(5, 6, 7, times=3)
    assert sorted(covered(learner.learn(), here)) == [(1, 2), (5, 6, 7)]
    status = learner.status()
    assert (status.doing, status.waiting, status.clusters, status.items, status.taught) == ("", "", 2, 6, 6)
    assert status.last_failure == ""


def test_one_passage_is_learned_when_it_alone_is_asked_for_often(here: School, learner: Learner) -> None:
    here.ask(4, times=int(ALONE) - 1)
    assert learner.learn() == []
    here.ask(4, times=MIXED)
    assert covered(learner.learn(), here) == [(4,)]


def test_what_promises_most_for_its_work_comes_first(here: School, learner: Learner) -> None:
    here.ask(1, 2, 3, 4, times=6)
    here.ask(5, 6, times=4)
    here.ask(7, 8, times=3)
    assert covered(learner.learn(), here) == [(5, 6), (1, 2, 3, 4), (7, 8)]


def test_clusters_that_are_asked_for_too_seldom_are_left_out(here: School, learner: Learner) -> None:
    here.ask(1, 2, times=3)
    here.ask(5, 6, times=2)
    assert covered(learner.learn(least=2.5), here) == [(1, 2)]
    assert covered(learner.learn(), here) == [(5, 6)]


def test_the_idle_thread_leaves_out_what_the_settings_leave_out(toy: Model, data: Path) -> None:
    with school(toy, data, least_questions=3.0) as here, here.learner() as learner:
        here.ask(1, 2, times=2)
        assert not learner.next()
        here.ask(1, 2, times=MIXED)
        assert learner.next()


@pytest.mark.parametrize("works", [True, False])
def test_nothing_is_tried_twice_without_new_evidence(here: School, learner: Learner, works: bool) -> None:
    here.ask(1, 2, times=3)
    here.teacher.forgets = lambda question: not works
    [lesson] = learner.learn()
    assert bool(lesson.adapter) is works
    assert learner.status().last_failure == lesson.reason
    here.ask(1, 2, times=2 * MIXED)
    assert learner.learn() == []
    here.ask(1, 2, 3, times=4 * MIXED)
    here.teacher.forgets = lambda question: False
    assert covered(learner.learn(), here) == [(1, 2, 3)]


@pytest.mark.parametrize("now", [0.0, 4e9])
def test_a_clock_that_jumps_while_it_learns_does_not_make_it_learn_again(
    here: School, learner: Learner, now: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.ask(1, 2, times=3)
    here.trainer.script = [lambda: monkeypatch.setattr(courses.time, "time", lambda: now)]
    [lesson] = learner.learn()
    assert lesson.adapter
    monkeypatch.undo()
    here.ask(1, 2, times=2 * MIXED)
    assert learner.learn() == []


def test_a_journal_from_the_future_is_learned_from(here: School, learner: Learner) -> None:
    here.ask(1, 2, times=3, at=4e9)
    assert covered(learner.learn(), here) == [(1, 2)]


def test_passages_may_be_in_two_clusters_when_they_overlap(toy: Model, data: Path) -> None:
    with school(toy, data, overlap=True, most_passages=2) as here, here.learner() as learner:
        here.ask(1, 2, times=4)
        here.ask(3, 4, times=4)
        here.ask(2, 3, times=3)
        assert sorted(covered(learner.learn(), here)) == [(1, 2), (2, 3), (3, 4)]


def test_passages_are_not_grouped_anew_while_a_training_goes_on(here: School, learner: Learner) -> None:
    here.ask(1, 2, times=3)

    def more() -> None:
        here.ask(1, 2, 3, 4, times=20 * MIXED)

    here.trainer.script = [more, "sliced"]
    first, second = learner.learn()
    assert (first.passages, second.passages) == (2, 4)
    assert [adapter.members for adapter in here.adapters()] == [(1, 2, 3, 4)]
    assert len(here.trainer.opened) == 2


def test_before_anything_is_trained_for_it_a_cluster_may_yet_change(here: School, learner: Learner) -> None:
    here.ask(1, 2, times=3)
    assert learner.next()
    here.ask(1, 2, 3, times=20 * MIXED)
    lessons = learner.learn()
    assert covered(lessons, here) == [(1, 2, 3)]


# --- when it waits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("power", "reason"),
    [
        (Power(on_battery=True), "the device runs on battery (learning.on_battery)"),
        (Power(celsius=99.0), "the device has 99 °C, more than 80 (learning.max_celsius)"),
    ],
)
def test_it_waits_for_mains_and_for_the_device_to_cool(here: School, power: Power, reason: str) -> None:
    now = [power]
    here.ask(1, 2, times=3)
    with here.learner(power=lambda: now[0]) as learner:
        assert not learner.next()
        assert learner.learn() == []
        assert learner.status().waiting == reason
        assert here.clusters() == []
        now[0] = Power(celsius=50.0)
        assert len(learner.learn()) == 1
        assert learner.status().waiting == ""


def test_what_cannot_train_does_nothing_and_says_why(here: School) -> None:
    here.ask(1, 2, times=3)
    with here.learner(trains="training needs torch") as learner:
        assert learner.status().waiting == learner.trains == "training needs torch"
        assert not learner.next()
        assert here.clusters() == []
    with here.learner() as other:  # the first has not kept it from learning
        assert other.next()


def test_it_ends_at_the_time_that_it_was_told_and_goes_on_later(
    here: School, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.ask(1, 2, times=3)
    assert learner.learn(until=0.0) == []
    assert here.clusters() == []
    clock = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(learners.time, "time", lambda: next(clock, 100.0))
    assert learner.learn(until=50.0) == []
    assert learner.status().doing.startswith("cluster 1: ")
    monkeypatch.undo()
    assert len(learner.learn()) == 1


def test_progress_is_told_after_each_piece_of_work_and_within_exams(here: School, learner: Learner) -> None:
    here.ask(1, 2, times=3)
    here.trainer.script = ["sliced"]
    told: list[LearningStatus] = []
    learner.learn(progress=told.append)
    assert list(dict.fromkeys(status.doing for status in told)) == [
        "cluster 1: answering questions",
        "cluster 1: preparing the training",
        "cluster 1: training",
        "cluster 1: embedding questions",
        "cluster 1: examining the adapter",
        "",
    ]
    exam = [(status.done, status.total) for status in told if "examining" in status.doing]
    assert exam[-1][0] == exam[-1][1] > 1
    assert (told[2].done, told[2].total) == (3, 9)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_what_goes_wrong_with_a_cluster_ends_its_course_and_the_next_has_its_turn(
    here: School, learner: Learner
) -> None:
    here.ask(1, 2, times=4)
    here.ask(5, 6, times=3)
    here.trainer.script = [Failed("the loss is no number")]

    def fall() -> None:
        here.teacher.before = lambda: None
        raise InputError("made to fail")

    here.teacher.before = fall
    one, other = learner.learn()
    assert (one.reason, other.reason) == ("made to fail", "the loss is no number")
    assert learner.status().last_failure == other.reason
    assert [cluster.failure for cluster in here.clusters()] == [one.reason, other.reason]


@pytest.mark.parametrize("error", [EngineError("the engine failed"), StorageError("disk full"), Cancelled("enough")])
def test_what_has_nothing_to_do_with_the_cluster_is_raised_and_it_goes_on_later(
    here: School, learner: Learner, error: Exception
) -> None:
    here.ask(1, 2, times=4)

    def fall() -> None:
        raise error

    here.teacher.before = fall
    with pytest.raises(type(error)):
        learner.learn()
    assert [cluster.trained_at for cluster in here.clusters()] == [None]
    here.teacher.before = lambda: None
    assert [bool(lesson.adapter) for lesson in learner.learn()] == [True]


def test_a_document_that_is_removed_while_its_cluster_trains_ends_it_and_the_rest_is_learned_anew(
    here: School, learner: Learner
) -> None:
    [more] = add_document(here.database, "more.txt", 1)
    here.ask(1, 2, times=3)
    here.ask(1, 2, more, times=3)
    here.trainer.script = [lambda: remove_document(here.database, "more.txt")]
    gone, left = learner.learn()
    assert (gone.reason, gone.adapter) == (CHANGED, "")
    assert covered([left], here) == [(1, 2)]
    assert here.jobs() == []
    assert here.files() == [left.adapter]


def test_a_document_that_was_all_of_a_cluster_leaves_nothing(here: School, learner: Learner) -> None:
    one, two = add_document(here.database, "more.txt", 2)
    here.ask(one, two, times=3)
    here.trainer.script = [lambda: remove_document(here.database, "more.txt")]
    [lesson] = learner.learn()
    assert lesson.reason == CHANGED
    assert here.clusters() == []
    assert here.jobs() == []
    assert here.files() == []
    assert learner.status().items == 0


# --- closed, killed, overtaken ---------------------------------------------------------------------------------------


def test_closing_ends_a_training_at_once_and_another_learner_goes_on_with_it(here: School) -> None:
    here.ask(1, 2, times=3)
    held = Held()
    here.trainer.script = [held]
    first = here.learner()
    with ThreadPoolExecutor(1) as pool:
        learning = pool.submit(first.learn)
        assert held.begun.wait(LIMIT)
        first.close()
        with pytest.raises(Cancelled):
            learning.result(LIMIT)
    first.close()
    assert first.learn() == []
    assert not first.next()
    assert here.trainer.opened[0].closed
    assert [cluster.trained_at for cluster in here.clusters()] == [None]
    taught = list(here.teacher.taught)
    with here.learner() as second:
        assert covered(second.learn(), here) == [(1, 2)]
    assert here.teacher.taught == taught
    assert here.trainer.opened[1].folder == here.trainer.opened[0].folder


def test_a_killed_training_goes_on_before_anything_else_whatever_was_asked_since(here: School) -> None:
    here.ask(1, 2, times=3)
    here.trainer.script = ["sliced"]
    first = here.learner()
    while not here.trainer.opened:
        assert first.next()
    killed(first)
    here.ask(1, 2, 3, times=5 * MIXED)
    here.ask(5, 6, times=8 * MIXED)
    with here.learner() as second:
        lessons = second.learn()
    assert covered(lessons[1:], here)[0] == (5, 6)
    assert lessons[0].passages == 2
    assert here.trainer.opened[1].folder == here.trainer.opened[0].folder


def test_what_a_killed_process_has_left_is_removed(here: School) -> None:
    here.ask(1, 2, times=3)
    with here.learner() as first:
        [lesson] = first.learn()
    [cluster] = here.clusters()
    for name in ("17-0123456789abcdef", learners.job_name(cluster, here.tools)):
        (here.tools.jobs / name).mkdir()
        (here.tools.jobs / name / "job.json").write_text("{}")
    left = unregistered(1, 2, base=BASE, gate=None, state="disabled", reason=UNEXAMINED)
    file = weights(here.folder)
    assert adapters.register(here.database, here.tools.folder, file, left, questions("Why?")) is not None
    with here.learner() as second:
        assert len(here.adapters()) == 2
        assert second.learn() == []
    assert [adapter.id for adapter in here.adapters()] == here.files() == [lesson.adapter]
    assert here.jobs() == []


def test_two_learners_on_one_library_take_turns(here: School) -> None:
    here.ask(1, 2, times=3)
    here.trainer.script = ["sliced"]
    with here.learner() as first, here.learner() as second:
        while not here.trainer.opened:
            assert first.next()
        assert second.status().waiting == ""
        assert not second.next()
        assert second.learn() == []
        assert second.status().waiting == ELSEWHERE
        assert [training.closed for training in here.trainer.opened] == [False]
        first.close()
        assert covered(second.learn(), here) == [(1, 2)]
        assert second.status().waiting == ""


def test_a_learner_that_has_nothing_to_do_lets_another_process_learn(here: School) -> None:
    with here.learner() as first, here.learner() as second:
        assert not first.next()
        here.ask(1, 2, times=3)
        assert covered(second.learn(), here) == [(1, 2)]
        assert not first.next()
        assert first.status().waiting == ""


def test_threads_take_turns_in_one_course(here: School, learner: Learner) -> None:
    here.ask(1, 2, times=3)
    here.ask(5, 6, times=2)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(learner.learn), pool.submit(learner.learn)]
        lessons = {lesson.cluster_id for each in both for lesson in each.result(LIMIT)}
    assert len(lessons) == len(here.trainer.opened) == len(here.adapters()) == 2


def test_a_caller_who_goes_away_ends_only_his_own_learning(here: School, learner: Learner) -> None:
    here.ask(1, 2, times=3)
    held, scope = Held(), Scope()
    here.trainer.script = [held]

    def learn() -> list[Lesson]:
        with scope:
            return learner.learn()

    with ThreadPoolExecutor(1) as pool:
        learning = pool.submit(learn)
        assert held.begun.wait(LIMIT)
        scope.cancel()
        with pytest.raises(Cancelled):
            learning.result(LIMIT)
    assert covered(learner.learn(), here) == [(1, 2)]
    assert len(here.trainer.opened) == 1


def test_status_can_be_asked_for_while_it_trains(here: School, learner: Learner) -> None:
    here.ask(1, 2, times=3)
    held = Held()
    here.trainer.script = [held]
    with ThreadPoolExecutor(1) as pool:
        learning = pool.submit(learner.learn)
        assert held.begun.wait(LIMIT)
        status = learner.status()
        held.cancel()
        assert len(learning.result(LIMIT)) == 1
    assert status.doing == "cluster 1: preparing the training"
    assert (status.clusters, status.items, status.taught) == (1, 3, 3)


def test_after_the_model_was_replaced_everything_is_learned_anew(here: School) -> None:
    here.ask(1, 2, times=3)
    here.trainer.script = ["sliced"]
    with here.learner() as first:
        while not here.trainer.opened:
            assert first.next()
    [old] = here.jobs()
    with here.learner(base="c" * 64) as second:
        [lesson] = second.learn()
    assert [training.folder.name == old for training in here.trainer.opened] == [True, False]
    assert [(adapter.id, adapter.base) for adapter in here.adapters()] == [(lesson.adapter, "c" * 64)]
    assert here.jobs() == []
    with here.database.read() as connection:
        assert items.counts(connection, model=BASE).waiting == 3
        assert clusters.clusters(connection)[0].failure == ""
    assert msgspec.json.decode(msgspec.json.encode(lesson), type=Lesson) == lesson


def test_a_learner_that_never_began_writes_nothing(here: School) -> None:
    made: Callable[[], Learner] = here.learner
    with made():
        pass
    assert not here.tools.jobs.exists()
    assert not here.tools.jobs.with_suffix(".lock").exists()
