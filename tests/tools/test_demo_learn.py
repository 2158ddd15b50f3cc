"""What `tools/demo --learn` was prepared with, and what it says."""

from pathlib import Path

import pytest

from edge_rag import Answer, EdgeRAG
from edge_rag.config import Learning, Settings, load_settings
from edge_rag.policy.clustering import cluster, weigh
from edge_rag.records import Asked, LearningStatus, Lesson, Plan, Timings, Usage
from edge_rag.store.items import HELD_OUT_LOGGED
from tools import demo_learn

CHOSEN = load_settings(demo_learn.SETTINGS, environment={})


def test_the_exam_is_as_strict_as_everywhere() -> None:
    assert (CHOSEN.learning.keep, CHOSEN.learning.drift) == (Learning().keep, Learning().drift)
    assert CHOSEN.adapters == Settings().adapters


def test_one_question_is_kept_for_the_exam_and_compared() -> None:
    assert len(demo_learn.QUESTIONS) // HELD_OUT_LOGGED == 1
    assert demo_learn.COMPARED[-1] == demo_learn.QUESTIONS[-1]
    assert {*demo_learn.COMPARED[:-1]} <= {*demo_learn.QUESTIONS[:-1]}
    assert len({*demo_learn.QUESTIONS, *demo_learn.OTHERS, demo_learn.MEANWHILE}) == len(demo_learn.QUESTIONS) + 3


def test_the_questions_make_one_cluster_that_is_learned(small_settings: Settings, corpus: Path, tmp_path: Path) -> None:
    with EdgeRAG.open(tmp_path, settings=small_settings) as rag:
        rag.add(corpus)
        found = {
            question: rag.search(question, top_k=CHOSEN.retrieval.top_k)
            for question in (*demo_learn.OTHERS, *demo_learn.QUESTIONS)
        }
    asked = [Asked(1.0, tuple(passage.chunk_id for passage in passages)) for passages in found.values()]
    tokens = {passage.chunk_id: passage.tokens for passages in found.values() for passage in passages}
    wanted = CHOSEN.learning
    groups = cluster(asked, tokens, most=wanted.most_passages, most_tokens=wanted.most_tokens)
    heavy = [
        group for group, weight in zip(groups, weigh(groups, asked), strict=True) if weight >= wanted.least_questions
    ]
    (learned,) = heavy
    *trained, exam = ({passage.chunk_id for passage in found[question]} for question in demo_learn.QUESTIONS)
    assert all(chunks == learned for chunks in trained)
    assert exam & learned


def learning(doing: str, done: int = 0, total: int = 0) -> LearningStatus:
    return LearningStatus(doing=doing, done=done, total=total, waiting="", clusters=1, items=0, taught=0)


def test_each_work_is_told_once_with_all_of_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    bars: list[tuple[str, int, int]] = []
    clock = iter([0.0, 2.0, 5.0, 15.0, 25.0, 26.0]).__next__
    diary = demo_learn.Diary(lambda *shown: bars.append(shown), clock)
    diary.tell(learning("cluster 1: writing", 0, 2))
    diary.tell(learning("cluster 1: writing", 1, 2))
    diary.tell(learning("cluster 1: training", 4, 9))
    diary.tell(learning("cluster 1: training", 9, 9))
    diary.tell(learning(""))
    diary.end()
    assert capsys.readouterr().out.splitlines() == ["  writing: 5.0 s", "  training: 21.0 s"]
    assert bars == [("writing", 0, 2), ("writing", 1, 2), ("training", 4, 9), ("training", 9, 9)]


def test_without_an_adapter_the_reason_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[object] = []
    monkeypatch.setattr(demo_learn, "run", ran.append)
    failed = Lesson(cluster_id=7, passages=3, items=9, adapter="", gate=None, seconds=1.0, reason="kept too little")
    demo_learn.tell(failed, ["edge-rag"])
    assert "kept too little" in capsys.readouterr().out
    assert ran == [["edge-rag", "clusters", "show", "7"]]


def answer(adapter: str) -> Answer:
    return Answer(
        id="a",
        question="?",
        text=" Aluminium. ",
        passages=(),
        citations=(),
        usage=Usage(prompt_tokens=90, cached_tokens=50, completion_tokens=3),
        timings=Timings(first_token=0.25, total=1.5),
        finish_reason="stop",
        plan=Plan(adapter=adapter),
        model="m",
    )


def test_a_row_says_when_the_adapter_was_not_asked() -> None:
    numbers = ["90", "40", "250 ms", "1.5 s", "Aluminium."]
    assert demo_learn.compared("from memory", answer("ab12")) == ["from memory", *numbers]
    assert demo_learn.compared("from memory", answer("")) == ["from memory: not for this one", *numbers]
    assert demo_learn.compared("passages read", answer("")) == ["passages read", *numbers]
