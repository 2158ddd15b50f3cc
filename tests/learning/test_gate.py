"""The exam of an adapter, with engines that are made up: what is asked, what is counted, what is decided and said."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from edge_rag.errors import Cancelled
from edge_rag.learning.gate import BARE, LEAST_USED, OTHERS, SEEN, UNSEEN, Ask, Exam, examine
from edge_rag.policy.reach import ENOUGH, ONLY_TRAINED
from edge_rag.records import Item, Kept

MEMBERS = frozenset({1, 2})


def item(number: int, **changes: Any) -> Item:
    values: dict[str, Any] = {
        "id": number,
        "kind": "logged",
        "question": f"Question {number}?",
        "chunks": (1, 9, 2),
        "made_at": 1.0,
        "answer": f"answer {number}",
    }
    return Item(**values | changes)


def items(number: int, start: int = 0, **changes: Any) -> list[Item]:
    return [item(n, **changes) for n in range(start, start + number)]


def vectors(number: int, degrees: float = 0.0) -> np.ndarray[tuple[int, int], np.dtype[np.float16]]:
    angle = np.radians(degrees)
    return np.tile(np.array([np.cos(angle), np.sin(angle)], np.float16), (number, 1))


def exam(trained: Sequence[Item], held_out: Sequence[Item] = (), others: Sequence[Item] = (), **changes: Any) -> Exam:
    values: dict[str, Any] = {
        "members": MEMBERS,
        "trained": trained,
        "trained_vectors": vectors(len(trained)),
        "held_out": held_out,
        "held_out_vectors": vectors(len(held_out), 60),
        "others": others,
        "others_vectors": vectors(len(others)),
        "keep": 0.85,
        "drift": 0.02,
    }
    return Exam(**values | changes)


class Engine:
    """Answers as the teacher did under the adapter, and with 'nothing known' without it; remembers what was asked."""

    def __init__(self, **wrong: str) -> None:
        self.asked: list[list[Ask]] = []
        self._wrong = {f"Question {name[1:]}?": said for name, said in wrong.items()}

    def __call__(self, asks: Sequence[Ask]) -> list[str]:
        self.asked.append(list(asks))
        return [self._answer(ask) for ask in asks]

    def _answer(self, ask: Ask) -> str:
        right = ask.question.removeprefix("Question ").removesuffix("?")
        if ask.adapter:
            return self._wrong.get(ask.question, f"answer {right}")
        return f"answer {right}" if ask.chunks else "nothing known"


OTHER = {"chunks": (7, 8)}


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_covered_passages_are_dropped_and_the_others_stay_in_their_order() -> None:
    engine = Engine()
    examine(exam([item(1, chunks=(8, 1, 7, 2))], [item(2, chunks=(2, 5))], [item(3, chunks=(7, 8))]), engine)
    assert engine.asked == [
        [Ask("Question 1?", (8, 7), True)],
        [Ask("Question 1?", (), False)],
        [Ask("Question 2?", (5,), True)],
        [Ask("Question 3?", (7, 8), False)],
        [Ask("Question 3?", (7, 8), True)],
    ]


def test_no_more_is_asked_than_the_bounds_allow_and_logged_questions_come_first() -> None:
    engine = Engine()
    study, logged = items(100, kind="study"), items(SEEN - 1, 100)
    found = examine(exam(study + logged, items(100, 400), items(100, 600, **OTHER)), engine)
    assert [len(asks) for asks in engine.asked] == [SEEN, BARE, UNSEEN, OTHERS, OTHERS]
    assert {each.question for each in logged} < {ask.question for ask in engine.asked[0]}
    assert [ask.question for ask in engine.asked[1]] == [ask.question for ask in engine.asked[0]][:BARE]
    assert (found.report.seen, found.report.unseen) == (Kept(SEEN, 1.0), Kept(UNSEEN, 1.0))


def test_the_same_questions_are_asked_whatever_their_order() -> None:
    one, other = Engine(), Engine()
    trained, held_out, others = items(200), items(100, 200), items(100, 300, **OTHER)
    examine(exam(trained, held_out, others), one)
    examine(exam(trained[::-1], held_out[::-1], others[::-1]), other)
    assert one.asked == other.asked


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"answer": None}, id="the teacher was not asked"),
        pytest.param({"answer": None, "refused": True}, id="the teacher could not answer"),
        pytest.param({"answer": ""}, id="the teacher said nothing"),
        pytest.param({"answer": " The. "}, id="the teacher said nothing that counts"),
        pytest.param({"chunks": (8, 9)}, id="nothing of it is covered"),
    ],
)
def test_a_question_that_cannot_be_marked_is_not_asked(changes: dict[str, Any]) -> None:
    engine = Engine()
    found = examine(exam([item(1), item(2, **changes)], [item(3, **changes)]), engine)
    assert {ask.question for asks in engine.asked for ask in asks} == {"Question 1?"}
    assert found.report.unseen == Kept(0, 0.0)
    assert np.isnan(found.f1).tolist() == [False, True]


def test_a_question_with_a_covered_passage_is_of_no_other_cluster() -> None:
    engine = Engine()
    examine(exam([item(1)], others=[item(2, chunks=(7, 2))]), engine)
    assert len(engine.asked) == 2


# --- what is found ---------------------------------------------------------------------------------------------------


def test_a_good_adapter_passes_and_what_the_model_knew_anyway_is_reported() -> None:
    found = examine(exam(items(4), items(ENOUGH, 10), items(3, 100, **OTHER)), Engine()).report
    assert found.passed
    assert found.reason == ""
    assert found.seen == found.used == Kept(4, 1.0)
    assert (found.unseen, found.bare) == (Kept(ENOUGH, 1.0), Kept(4, 0.0))
    assert found.drift == 0.0
    assert found.reach == pytest.approx(0.5, abs=1e-3)


def test_each_trained_question_has_its_mark_at_its_place() -> None:
    found = examine(exam([item(1), item(2, answer=None), item(3), item(4)]), Engine(q3="wrong", q4="answer"))
    np.testing.assert_allclose(found.f1, [1, np.nan, 0, 2 / 3], rtol=1e-6)


def test_each_held_out_question_has_its_mark_at_its_place() -> None:
    held_out = [item(10), item(11, answer=None), item(12), item(13)]
    found = examine(exam(items(2), held_out), Engine(q12="wrong", q13="answer"))
    np.testing.assert_allclose(found.held_out_f1, [1, np.nan, 0, 2 / 3], rtol=1e-6)
    np.testing.assert_array_equal(found.f1, [1, 1])
    assert examine(exam(items(2)), Engine()).held_out_f1.shape == (0,)


def test_it_is_judged_by_those_questions_that_it_will_be_used_for() -> None:
    found = examine(exam(items(4)), Engine(q1="wrong", q2="wrong", q3="wrong")).report
    assert (found.seen, found.used) == (Kept(4, 0.25), Kept(1, 1.0))
    assert found.used.questions == LEAST_USED * found.seen.questions
    assert found.passed


def test_an_adapter_that_is_good_for_too_few_questions_is_not_worth_its_place() -> None:
    found = examine(exam(items(5)), Engine(q1="wrong", q2="wrong", q3="wrong", q4="wrong")).report
    assert not found.passed
    assert found.used == Kept(1, 1.0)
    assert found.reason == "answered 1 of 5 seen questions well, 25% are asked for"


def test_an_adapter_that_keeps_too_little_fails_with_the_numbers() -> None:
    found = examine(exam(items(5)), Engine(q0="wrong", q1="answer", q2="answer", q3="answer")).report
    assert not found.passed
    assert found.reason == (
        "kept 0.75 of the teacher's F1 on the 4 of 5 seen questions that it answered well, 0.85 are asked for"
    )


def test_just_what_is_asked_for_is_enough() -> None:
    assert examine(exam(items(4), keep=0.75), Engine(q1="answer 1 is it", q2="answer 2 is it")).report.passed
    assert not examine(exam(items(4), keep=0.834), Engine(q1="answer 1 is it", q2="answer 2 is it")).report.passed


def test_what_is_missed_narrowly_does_not_read_as_if_it_was_reached() -> None:
    found = examine(exam(items(3), others=items(3, 10, **OTHER), drift=0.333), Engine(q11="no")).report
    assert found.reason == "changed answers to 3 questions of other clusters by 0.34, 0.333 are allowed"
    below = examine(exam(items(3), keep=0.89), Engine(q1="answer")).report
    assert below.reason.startswith("kept 0.88 of")


def test_an_adapter_that_moves_other_answers_fails_and_all_reasons_are_told() -> None:
    found = examine(exam(items(2), others=items(2, 10, **OTHER), keep=1), Engine(q1="answer", q11="answer 99")).report
    assert not found.passed
    assert found.drift == 0.25
    first, second = found.reason.split("; ")
    assert first.startswith("kept 0.83 of")
    assert second == "changed answers to 2 questions of other clusters by 0.25, 0.02 are allowed"


# --- where it would be used ------------------------------------------------------------------------------------------


def test_answers_that_it_would_never_be_asked_for_do_not_count_as_drift() -> None:
    engine = Engine(q10="no", q11="no")
    places = np.concatenate([vectors(1), vectors(1, 60)])
    found = examine(exam(items(3), others=items(2, 10, **OTHER), others_vectors=places, drift=0.5), engine).report
    assert found.reach == ONLY_TRAINED
    assert [[ask.question for ask in asks] for asks in engine.asked[-2:]] == [["Question 10?"]] * 2
    assert found.drift == 0.5  # one of two questions of other clusters
    assert found.passed


def test_within_its_reach_other_answers_count() -> None:
    held_out = items(ENOUGH, 20)
    places = np.concatenate([vectors(1, 50), vectors(1, 70)])
    found = examine(exam(items(3), held_out, items(2, 10, **OTHER), others_vectors=places), Engine(q10="no", q11="no"))
    assert found.report.reach == pytest.approx(0.5, abs=1e-3)
    assert found.report.drift == 0.5


def test_what_is_nearest_to_a_question_that_it_failed_is_not_asked() -> None:
    engine = Engine(q0="wrong", q10="no")
    trained = np.concatenate([vectors(1), vectors(4, 90)])
    changes = {"trained_vectors": trained, "others": items(1, 10, **OTHER), "others_vectors": vectors(1)}
    found = examine(exam(items(5), **changes), engine).report
    assert len(engine.asked) == 2
    assert found.drift == 0.0
    assert found.passed


def test_held_out_questions_that_are_nearest_to_a_failed_one_say_nothing_about_its_reach() -> None:
    trained = np.concatenate([vectors(1), vectors(4, 90)])
    failed, kept = items(ENOUGH, 10), items(ENOUGH, 30)
    places = np.concatenate([vectors(ENOUGH, 20), vectors(ENOUGH, 60)])
    wrong = {f"q{n}": "wrong" for n in (0, *range(10, 10 + ENOUGH))}
    changes = {"trained_vectors": trained, "held_out_vectors": places}
    found = examine(exam(items(5), failed + kept, **changes), Engine(**wrong)).report
    assert found.unseen == Kept(2 * ENOUGH, 0.5)
    assert found.reach == pytest.approx(np.cos(np.radians(30)), abs=1e-3)


def test_unseen_questions_decide_its_reach_and_not_whether_it_passes() -> None:
    held_out = items(ENOUGH, 10)
    wrong = {f"q{n}": "wrong" for n in range(10, 10 + ENOUGH)}
    found = examine(exam(items(3), held_out), Engine(**wrong)).report
    assert found.passed
    assert found.unseen == Kept(ENOUGH, 0.0)
    assert found.reach == ONLY_TRAINED


def test_unseen_questions_near_to_trained_ones_may_be_within_reach_when_far_ones_are_not() -> None:
    near, far = items(ENOUGH, 10), items(ENOUGH, 30)
    places = np.concatenate([vectors(ENOUGH, 60), vectors(ENOUGH, 80)])
    wrong = {f"q{n}": "wrong" for n in range(30, 30 + ENOUGH)}
    found = examine(exam(items(3), near + far, held_out_vectors=places), Engine(**wrong)).report
    assert found.reach == pytest.approx(0.5, abs=1e-3)
    assert found.unseen == Kept(2 * ENOUGH, 0.5)


# --- hardly anything to ask ------------------------------------------------------------------------------------------


def test_without_held_out_questions_it_reaches_only_what_it_was_trained_on() -> None:
    found = examine(exam(items(5)), Engine()).report
    assert found.passed
    assert found.unseen == Kept(0, 0.0)
    assert found.reach == ONLY_TRAINED


def test_one_question_is_an_exam() -> None:
    assert examine(exam([item(1)]), Engine()).report.passed
    failed = examine(exam([item(1)]), Engine(q1="no")).report
    assert failed.reason == "answered 0 of 1 seen questions well, 25% are asked for"


@pytest.mark.parametrize("trained", [[], [item(1, answer="")]])
def test_an_adapter_that_cannot_be_examined_does_not_pass(trained: list[Item]) -> None:
    engine = Engine()
    found = examine(exam(trained, items(ENOUGH, 10), keep=0.0), engine)
    assert not found.report.passed
    assert found.report.reason.startswith("nothing could be examined")
    assert found.report.seen == found.report.used == found.report.bare == Kept(0, 0.0)
    assert len(found.f1) == len(trained)


# --- while it runs ---------------------------------------------------------------------------------------------------


def test_every_answer_is_progress() -> None:
    told: list[tuple[int, int]] = []
    examine(exam(items(3), items(2, 10), items(2, 20, **OTHER)), Engine(), lambda *at: told.append(at))
    assert [done for done, _ in told] == list(range(1, 13))
    assert [total for _, total in told[:8]] == [8] * 8


def test_a_cancelled_exam_ends_at_once() -> None:
    said: list[str] = []

    def answer(asks: Sequence[Ask]) -> Iterator[str]:
        for ask in asks:
            if len(said) == 2:
                raise Cancelled("enough")
            said.append(ask.question)
            yield "answer"

    with pytest.raises(Cancelled):
        examine(exam(items(5)), answer)
    assert len(said) == 2


def test_an_answer_too_few_is_noticed() -> None:
    with pytest.raises(ValueError, match="argument"):
        examine(exam(items(5)), lambda asks: ["answer"] * (len(asks) - 1))
