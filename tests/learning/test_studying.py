"""Asking for study questions about a passage, of a writer that the test makes up."""

from collections.abc import Sequence

import pytest

from edge_rag.errors import Cancelled
from edge_rag.learning.studying import BEGINNINGS, ROUNDS, Request, requests, study_questions

KNOWN = "How often must the pump be oiled?"


class Writer:
    """Writes what it is told, one text a request; remembers what it was asked."""

    def __init__(self, *rounds: Sequence[str]) -> None:
        self.rounds = rounds
        self.asked: list[tuple[int, tuple[Request, ...], int]] = []

    def __call__(self, chunk_id: int, wanted: Sequence[Request], seed: int) -> list[str]:
        texts = self.rounds[min(len(self.asked), len(self.rounds) - 1)]
        self.asked.append((chunk_id, tuple(wanted), seed))
        return list(texts)


def numbered(*numbers: int) -> str:
    return "\n".join(f"{place}. What is part {number} made of?" for place, number in enumerate(numbers, 1))


def test_rounds_go_on_with_other_seeds_until_there_are_enough() -> None:
    writer = Writer([numbered(1, 2), numbered(2, 3)], [numbered(3, 4)], [numbered(5, 6, 7)], [numbered(8)])
    found = study_questions(7, writer, wanted=6)
    assert found == [f"What is part {number} made of?" for number in (1, 2, 3, 4, 5, 6)]
    assert writer.asked == [(7, requests(number), number) for number in range(3)]


def test_a_round_that_brings_nothing_new_is_the_last() -> None:
    writer = Writer([numbered(1, 2)], [numbered(2, 1), "I have no more."], [numbered(3)])
    assert len(study_questions(7, writer, wanted=6)) == 2
    assert len(writer.asked) == 2


def test_known_questions_do_not_come_again_in_other_words() -> None:
    writer = Writer([f"- How often must pumps be oiled?\n{numbered(1)}"])
    assert study_questions(7, writer, wanted=6, known=[KNOWN]) == ["What is part 1 made of?"]


def test_nothing_is_asked_when_nothing_is_wanted_or_no_end_comes() -> None:
    writer = Writer([])
    assert study_questions(7, writer, wanted=0) == []
    assert writer.asked == []
    endless = Writer(*([numbered(number)] for number in range(100)))
    assert len(study_questions(7, endless, wanted=1000)) == ROUNDS == len(endless.asked)


def test_a_stopped_writer_stops_it() -> None:
    def stopped(chunk_id: int, wanted: Sequence[Request], seed: int) -> list[str]:
        raise Cancelled("nobody waits for it any more")

    with pytest.raises(Cancelled):
        study_questions(7, stopped, wanted=6)


def test_rounds_begin_in_all_ways_before_any_comes_again() -> None:
    begun = [request.begun for number in range(len(BEGINNINGS)) for request in requests(number)]
    assert len(set(begun)) == len(begun)
    assert requests(len(BEGINNINGS)) == requests(0)
