"""Asking for study questions about a passage, of a writer that the test makes up."""

from collections.abc import Sequence

import pytest

from edge_rag.errors import Cancelled
from edge_rag.learning.studying import BEGINNINGS, ROUNDS, Request, requests, study_questions

KNOWN = "How often must the pump be oiled?"


class Writer:
    """Writes of each passage what it is told, one text a request and a round; remembers what it was asked."""

    def __init__(self, **rounds: Sequence[Sequence[str]]) -> None:
        self.rounds = {int(name[1:]): list(texts) for name, texts in rounds.items()}
        self.asked: list[tuple[list[tuple[int, Request]], int]] = []

    def __call__(self, wanted: Sequence[tuple[int, Request]], seed: int) -> list[str]:
        self.asked.append((list(wanted), seed))
        texts = []
        for chunk in dict.fromkeys(chunk for chunk, _ in wanted):
            now = [*self.rounds[chunk].pop(0)] if self.rounds[chunk] else []
            texts += now + [""] * (len(requests(seed)) - len(now))
        return texts


def numbered(*numbers: int) -> str:
    return "\n".join(f"{place}. What is part {number} made of?" for place, number in enumerate(numbers, 1))


def parts(*numbers: int) -> list[str]:
    return [f"What is part {number} made of?" for number in numbers]


def test_rounds_go_on_with_other_seeds_until_there_are_enough() -> None:
    writer = Writer(c7=[[numbered(1, 2), numbered(2, 3)], [numbered(3, 4)], [numbered(5, 6, 7)], [numbered(8)]])
    assert study_questions([7], writer, wanted=6, known={}) == {7: parts(1, 2, 3, 4, 5, 6)}
    assert writer.asked == [([(7, request) for request in requests(number)], number) for number in range(3)]


def test_passages_are_asked_about_together_and_each_ends_by_itself() -> None:
    writer = Writer(
        c7=[[numbered(1, 2)], []], c8=[[numbered(3)], [numbered(4)], [numbered(5)]], c9=[[numbered(6, 7, 8)]]
    )
    found = study_questions([7, 8, 9], writer, wanted=3, known={})
    assert found == {7: parts(1, 2), 8: parts(3, 4, 5), 9: parts(6, 7, 8)}
    assert [list(dict.fromkeys(chunk for chunk, _ in asked)) for asked, _ in writer.asked] == [[7, 8, 9], [7, 8], [8]]


def test_a_round_that_brings_nothing_new_is_the_last() -> None:
    writer = Writer(c7=[[numbered(1, 2)], [numbered(2, 1), "I have no more."], [numbered(3)]])
    assert study_questions([7], writer, wanted=6, known={}) == {7: parts(1, 2)}
    assert len(writer.asked) == 2


def test_known_questions_do_not_come_again_in_other_words() -> None:
    writer = Writer(c7=[[f"- How often must pumps be oiled?\n{numbered(1)}"]])
    assert study_questions([7], writer, wanted=6, known={7: [KNOWN]}) == {7: parts(1)}


def test_nothing_is_asked_when_nothing_is_wanted_or_no_end_comes() -> None:
    writer = Writer(c7=[])
    assert study_questions([7], writer, wanted=0, known={}) == {7: []}
    assert writer.asked == []
    endless = Writer(c7=[[numbered(number)] for number in range(100)])
    assert len(study_questions([7], endless, wanted=1000, known={})[7]) == ROUNDS == len(endless.asked)


def test_a_stopped_writer_stops_it() -> None:
    def stopped(wanted: Sequence[tuple[int, Request]], seed: int) -> list[str]:
        raise Cancelled("nobody waits for it any more")

    with pytest.raises(Cancelled):
        study_questions([7], stopped, wanted=6, known={})


def test_rounds_begin_in_all_ways_before_any_comes_again() -> None:
    begun = [request.begun for number in range(len(BEGINNINGS)) for request in requests(number)]
    assert len(set(begun)) == len(begun)
    assert requests(len(BEGINNINGS)) == requests(0)
