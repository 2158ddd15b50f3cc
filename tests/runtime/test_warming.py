"""KV computed before anybody asks, and what becomes of it: with the real small model, over a few short documents."""

import queue
import shutil
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from edge_rag.config import Settings
from edge_rag.errors import Cancelled, ConfigError, InputError, NotFound
from edge_rag.records import Answer, Filter, Passage
from edge_rag.runtime.generations import Generation, Scope
from edge_rag.runtime.rag import EdgeRAG
from edge_rag.runtime.warming import WarmProgress
from edge_rag.store import journal
from tests.runtime.serving import Opened, add_files, kv_files, small_library

TEXTS = {
    "battery.txt": "The battery of the Marlin unit lasts nine hours and is charged overnight.",
    "filter.md": "# Filter\n\nThe filter is changed after 300 litres. A grey filter is still good.",
    "hose.txt": "The hose of the Marlin unit is two metres long and must not be bent.",
    "pump.md": "# Pump\n\nThe pump of the Marlin unit must be oiled every 12 weeks.",
}
OILED = "How often must the pump be oiled?"
LASTS = "How long does the battery last?"
LIMIT = 60.0  # seconds after which a thread is given up


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, small_settings: Settings) -> Path:
    """A data folder with the documents in it, one chunk each, and no KV yet; its files are beside it."""
    folder = tmp_path_factory.mktemp("warming")
    with small_library(folder / "data", small_settings) as rag:
        add_files(rag, folder / "files", TEXTS)
    return folder


@pytest.fixture
def opened(tmp_path: Path, prepared: Path, small_settings: Settings) -> Opened:
    """Opens a data folder of the test's own, each time the same one."""
    shutil.copytree(prepared / "data", tmp_path / "data")
    return partial(small_library, tmp_path / "data", small_settings)


def names(paths: Sequence[str]) -> list[str]:
    return [Path(path).name for path in paths]


def sources(answer: Answer) -> list[str]:
    return [plan.source for plan in answer.plan.passages]


# --- what is computed ------------------------------------------------------------------------------------------------


def test_all_is_computed_once_and_found_present_by_the_next_call_and_the_next_start(opened: Opened) -> None:
    with opened() as rag:
        told: list[WarmProgress] = []
        first = rag.warm(progress=told.append)
        assert (first.passages, first.computed, first.present, first.full) == (4, 4, 0, False)
        assert first.seconds > 0
        assert [(step.done, step.total) for step in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert sorted(names([step.current for step in told])) == sorted(TEXTS)
        files = kv_files(rag.folder)
        assert len(files) == len(TEXTS) + 1  # and the prefix
        status = rag.status()
        assert (status.kv_files, status.kv_bytes) == (5, sum(file.stat().st_size for file in files))
        told.clear()
        second = rag.warm(progress=told.append)
        assert (second.passages, second.computed, second.present, second.full) == (4, 0, 4, False)
        assert len(told) == 4  # those that were there are told too
        assert rag.check_kv() == []
    with opened() as rag:
        third = rag.warm()
        assert (third.computed, third.present) == (0, 4)
        assert kv_files(rag.folder) == files


def test_paths_restrict_what_is_computed(opened: Opened, prepared: Path) -> None:
    with opened() as rag:
        told: list[WarmProgress] = []
        report = rag.warm(prepared / "files" / "pump.md", prepared / "files" / "hose.txt", progress=told.append)
        assert (report.passages, report.computed) == (2, 2)
        assert sorted(names([step.current for step in told])) == ["hose.txt", "pump.md"]
        below = rag.warm(prepared / "files")
        assert (below.passages, below.computed, below.present) == (4, 2, 2)


def test_what_cannot_be_warmed_is_refused_before_anything_is_computed(opened: Opened, prepared: Path) -> None:
    with opened() as rag:
        with pytest.raises(NotFound) as caught:
            rag.warm(prepared / "files" / "pump.md", prepared / "files" / "gone.md")
        assert caught.value.field == str(prepared / "files" / "gone.md")
        for wrong in (0, -1, 1.5, True):
            with pytest.raises(InputError):
                rag.warm(hot=wrong)  # type: ignore[arg-type]
        assert kv_files(rag.folder) == []


def test_the_most_often_used_come_first_and_nothing_is_computed_when_kv_is_off(opened: Opened) -> None:
    with opened(kv__enabled=False, retrieval__top_k=1) as rag:
        often, once = (rag.ask(question, max_tokens=1) for question in (LASTS, OILED))
        with rag._database.write() as connection:
            journal.record(connection, replace(often, id="the same again"), now=1.0)
        assert [entry.question for entry in rag.journal()] == [once.question, often.question, often.question]
        with pytest.raises(ConfigError) as caught:
            rag.warm()
        assert caught.value.field == "kv.enabled"
        assert rag.check_kv() == []
        assert rag.status().kv is None
        assert kv_files(rag.folder) == []
    with opened() as rag:
        told: list[WarmProgress] = []
        assert rag.warm(hot=1, progress=told.append).passages == 1
        assert rag.warm(hot=2, progress=told.append).present == 1
        assert names([step.current for step in told]) == ["battery.txt", "battery.txt", "pump.md"]
        assert rag.warm(hot=100).passages == 4


def test_a_quota_without_room_ends_it_early(opened: Opened, tmp_path: Path) -> None:
    """The prefix and each passage take more than the whole quota, so that it does not matter which are worth more."""
    extra = tmp_path / "extra"
    extra.mkdir()
    for number in range(4):
        (extra / f"{number}.txt").write_text(f"Unit {number} has a pump of {number} kilowatts and a hose. " * 6)
    with opened(kv__disk_mb=1, kv__codec="f16") as rag:
        rag.add(extra)
        told: list[WarmProgress] = []
        report = rag.warm(extra, progress=told.append)
        assert report.full
        assert report.passages == 4
        assert (
            2 <= report.computed == len(told) <= 4
        )  # more are begun while the third refusal (the prefix was one) comes
        assert kv_files(rag.folder) == []
        assert rag._house.warmer().next() is False
        assert rag.check_kv() == []


# --- nobody waits for it any more -------------------------------------------------------------------------------------


def test_warming_ends_at_once_when_nobody_waits_for_it_though_the_engine_is_busy(opened: Opened) -> None:
    # Shows a fault: it waited for an idle engine, and its thread with it.
    with opened() as rag:
        rag.load()
        engine, scope, ended = rag._house.engine(), Scope(), list[BaseException]()
        begun, gate = threading.Event(), threading.Event()
        engine.when_idle(lambda desk: (begun.set(), gate.wait(LIMIT)))
        assert begun.wait(LIMIT)

        def warm() -> None:
            with scope:
                try:
                    rag.warm()
                except Cancelled as error:
                    ended.append(error)

        warming = threading.Thread(target=warm)
        warming.start()
        scope.cancel()
        warming.join(LIMIT)
        assert len(ended) == 1
        gate.set()
        assert rag.warm().computed > 0, "nothing is left over of it"


# --- questions meanwhile ---------------------------------------------------------------------------------------------


def test_a_question_asked_meanwhile_interrupts_a_passage_is_answered_and_all_is_computed(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened() as rag:
        rag.load()
        engine, submitted = rag._house.engine(), threading.Event()
        compute, submit = engine.assembler.compute, engine.submit
        begun, answers = list[int](), list[Answer]()

        asking = threading.Thread(target=lambda: answers.append(rag.ask(OILED)))

        def noting_submit(*arguments: Any, **options: Any) -> Generation:
            try:
                return submit(*arguments, **options)
            finally:
                submitted.set()

        def interrupted_compute(*arguments: Any) -> None:
            """The question comes when the second passage has been begun."""
            begun.append(arguments[2])
            if len(begun) == 2:
                asking.start()
                assert submitted.wait(LIMIT)
            compute(*arguments)

        monkeypatch.setattr(engine, "submit", noting_submit)
        monkeypatch.setattr(engine.assembler, "compute", interrupted_compute)
        report = rag.warm()
        asking.join(LIMIT)
        [answer] = answers
        assert answer.text
        assert answer.finish_reason == "length"
        assert report.computed + report.present == report.passages == 4
        assert not report.full
        assert begun[1] == begun[2]  # begun anew
        assert len(kv_files(rag.folder)) == 5
        assert rag.check_kv() == []


def test_a_question_between_two_passages_does_not_wait_for_the_rest(opened: Opened) -> None:
    with opened() as rag:
        answers: list[tuple[int, Answer]] = []

        def progress(step: WarmProgress) -> None:
            if step.done == 1:
                answers.append((step.done, rag.ask(OILED)))

        report = rag.warm(progress=progress)
        [(done, answer)] = answers
        assert done < report.passages == 4
        assert answer.text
        assert report.computed + report.present == 4
        assert report.computed <= 3  # what the question needed was kept


# --- what it is good for ---------------------------------------------------------------------------------------------


def test_answers_come_from_what_was_computed_ahead_also_after_a_start(opened: Opened) -> None:
    with opened() as rag:
        rag.warm()
        answer = rag.ask(OILED)
        assert sources(answer) == ["ram", "ram"]
        skipped = sum(plan.skipped for plan in answer.plan.passages)
        assert answer.usage.cached_tokens == answer.plan.prefix_tokens + skipped
        counted = status_counters(rag)
        assert (counted["ram"], counted["new"], counted["recomputed"], counted["ssd"]) == (2, 0, 0, 0)
        assert counted["skipped_tokens"] == skipped > 0
        assert counted["linked_tokens"] == sum(plan.link for plan in answer.plan.passages) == 4
        assert counted["seconds_saved"] > 0
        assert counted["bytes_written"] == sum(file.stat().st_size for file in kv_files(rag.folder))
    with opened() as rag:
        again = rag.ask(OILED)
        assert again.text == answer.text
        assert set(sources(again)) <= {"ssd", "ram"}  # read ahead or not
        counted = status_counters(rag)
        assert counted["ssd"] + counted["ram"] == 2
        assert counted["new"] == counted["recomputed"] == counted["bytes_written"] == 0
        assert counted["bytes_read"] >= sum(passage_sizes(rag, again.passages)) > 0


def test_what_nobody_has_read_ahead_comes_from_the_ssd(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened() as rag:
        rag.warm()
    with opened() as rag:
        rag.load()
        monkeypatch.setattr(rag._house.cache(), "read_ahead", lambda keys: None)
        assert sources(rag.ask(OILED)) == ["ssd", "ssd"]
        assert sources(rag.ask(OILED + " Please tell.")) == ["state", "state"]
        assert status_counters(rag)["ssd"] == status_counters(rag)["state"] == 2


def test_the_second_question_about_the_same_passages_computes_none_of_them(opened: Opened) -> None:
    with opened(retrieval__top_k=4) as rag:
        first = rag.ask(OILED)
        assert set(sources(first)) == {"new"}
        assert status_counters(rag)["skipped_tokens"] == 0
        second = rag.ask(LASTS)
        assert {passage.chunk_id for passage in second.passages} == {passage.chunk_id for passage in first.passages}
        assert set(sources(second)) <= {"ram", "state"}
        counted = status_counters(rag)
        assert (counted["new"], counted["recomputed"]) == (4, 0)
        assert counted["ram"] + counted["state"] == 4
        assert counted["skipped_tokens"] == sum(plan.skipped for plan in second.plan.passages) > 0
        assert rag.check_kv() == []


def status_counters(rag: EdgeRAG) -> dict[str, Any]:
    kv = rag.status().kv
    assert kv is not None
    rag._house.cache().flush()
    return {name: getattr(kv.counters, name) for name in kv.counters.__struct_fields__}


def passage_sizes(rag: EdgeRAG, passages: Sequence[Passage]) -> list[int]:
    builder, cache = rag._house.builder(), rag._house.cache()
    keys = [cache.key(builder.prefix, builder.passage(passage)) for passage in passages]
    files = {file.name.partition(".")[0]: file.stat().st_size for file in kv_files(rag.folder)}
    return [files[key] for key in keys]


# --- documents that go -----------------------------------------------------------------------------------------------


def test_kv_goes_with_a_document_that_is_removed_or_replaced(opened: Opened, prepared: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.md"
    own.write_text("# Tank\n\nThe tank of the Marlin unit holds 40 litres.")
    with opened() as rag:
        rag.add(own)
        assert rag.warm().computed == 5
        files = set(kv_files(rag.folder))
        assert len(files) == 6

        rag.remove(prepared / "files" / "pump.md")
        left = set(kv_files(rag.folder))
        assert len(left) == 5
        assert left < files

        own.write_text("# Tank\n\nThe tank of the Marlin unit holds 50 litres now.")
        assert rag.add(own).count("replaced") == 1
        assert len(kv_files(rag.folder)) == 4
        assert set(kv_files(rag.folder)) < left
        report = rag.warm()
        assert (report.passages, report.computed, report.present) == (4, 1, 3)
        assert len(kv_files(rag.folder)) == 5
        assert rag.check_kv() == []

        assert rag.add(own).count("unchanged") == 1
        assert rag.warm().present == 4


# --- while idle ------------------------------------------------------------------------------------------------------


def test_one_passage_at_a_time_is_computed_until_there_is_none(opened: Opened) -> None:
    with opened() as rag:
        warmer = rag._house.warmer()
        done = []
        while warmer.next():
            rag._house.cache().flush()
            done.append(len(kv_files(rag.folder)))
        assert done == [2, 3, 4, 5]
        assert warmer.next() is False
        assert rag.warm().present == 4


def test_with_idle_on_all_is_computed_while_nobody_asks_and_an_answer_makes_it_look_again(
    opened: Opened, tmp_path: Path
) -> None:
    with opened(kv__idle=True, kv__audit_share=0, retrieval__top_k=1) as rag:
        rag._house.idle._quiet = 0
        assembler = rag._house.engine().assembler
        compute, computed = assembler.compute, queue.SimpleQueue[int]()

        def noting_compute(*arguments: Any) -> None:
            compute(*arguments)
            computed.put(arguments[2])

        assembler.compute = noting_compute  # type: ignore[method-assign]
        assert computed.empty()
        rag.load()
        assert sorted(computed.get(timeout=LIMIT) for _ in TEXTS) == [1, 2, 3, 4]
        late = tmp_path / "late.txt"
        late.write_text("The tank of the Marlin unit holds 40 litres.")
        rag.add(late)
        assert sources(rag.ask(OILED, where=Filter(kinds=("md",)), max_tokens=1)) == ["ram"]
        assert computed.get(timeout=LIMIT) == 5
        rag._house.idle.close()
        assert computed.empty()
        assert rag.warm().present == 5
