"""The exam of an adapter, in the engine that would serve it: does it answer from memory as the teacher did from text?

The teacher's answers are the reference (the base model with all passages in its prompt). A question is asked as it
would be served: passages that the adapter covers are dropped, the others stay. Asked are

- questions that it was trained on (`seen`): these decide, because they are what it is for. It will not be used for
  those that it answered badly, nor for what is nearest to them; the others (`used`) must keep what is asked for, and
  must be a good share of all, or it is not worth its place;
- held-out ones (`unseen`): these say how far from the trained questions it may be used (`policy.reach`);
- the seen ones again, without passages and without the adapter (`bare`): what the model knows anyway;
- questions of other clusters for which it would be used by that, with all their passages, without and with the adapter
  (`drift`).

Questions that cannot be marked are left out: those that the teacher did not answer, or whose passages the adapter does
not cover. Which of the others are asked depends on nothing but their texts, so that an exam can be repeated. Logged
questions come first: they are what people ask.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from statistics import fmean

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from edge_rag.policy.agreement import f1, squad_normalised
from edge_rag.policy.reach import PASSED, Vectors, closeness, may_use, reach
from edge_rag.records import GateReport, Item, Kept

SEEN = 160  # questions at most, of each sort: what was asked is likely to be asked again, so nearly all of it
UNSEEN = 64
OTHERS = 64
BARE = 40
LEAST_USED = 0.25  # share of the seen questions that it must be used for


class Ask(Struct, frozen=True):
    """A question to be answered greedily, with the passages of `chunks` in the prompt, best first."""

    question: str
    chunks: tuple[int, ...]
    adapter: bool


Answer = Callable[[Sequence[Ask]], Iterable[str]]
"""Answers questions in their order, as soon as each is ready or all at once. In one call the adapter is either on for
all of them or off. May raise Cancelled, which ends the exam."""

Progress = Callable[[int, int], None]
"""Told how many answers there are, and how many there will be."""


class Exam(Struct, frozen=True):
    """What an adapter is examined on. `members` are the chunks that it covers.

    `trained` are all questions that it was trained on, `held_out` questions about the same passages that it was not;
    each with unit vectors of their texts, [n, d]. `others` are of other clusters. `keep` and `drift` are the bounds of
    the settings.
    """

    members: frozenset[int]
    trained: Sequence[Item]
    trained_vectors: Vectors
    held_out: Sequence[Item]
    held_out_vectors: Vectors
    others: Sequence[Item]
    others_vectors: Vectors
    keep: float
    drift: float


class Examined(Struct, frozen=True):
    """The report, and the F1 of each trained question [n] and of each held-out one [m]: NaN where it was not asked.

    The router begins with both; the reach is found by them, and then only trained ones count.
    """

    report: GateReport
    f1: npt.NDArray[np.float32]
    held_out_f1: npt.NDArray[np.float32]


def examine(exam: Exam, answer: Answer, progress: Progress | None = None) -> Examined:
    """Examine an adapter; two to five calls of `answer`. Raises what `answer` raises."""
    can_be_marked = partial(_can_be_marked, exam.members)
    seen = _chosen(exam.trained, can_be_marked, SEEN)
    unseen = _chosen(exam.held_out, can_be_marked, UNSEEN)
    others = _chosen(exam.others, lambda item: not exam.members & set(item.chunks), OTHERS)
    room = _Room(answer, progress, len(seen) + len(seen[:BARE]) + len(unseen))
    seen_f1 = room.from_memory([exam.trained[n] for n in seen], exam.members)
    bare_f1 = room.bare([exam.trained[n] for n in seen[:BARE]])
    unseen_f1 = room.from_memory([exam.held_out[n] for n in unseen], exam.members)
    marks = _placed(seen_f1, seen, len(exam.trained))
    held_out_marks = _placed(unseen_f1, unseen, len(exam.held_out))
    far = _reach(exam, marks, unseen, unseen_f1)
    taken = [exam.others[n] for n in others if may_use(exam.others_vectors[n], exam.trained_vectors, marks, reach=far)]
    changed = sum(1 - same for same in room.agreements(taken)) / max(1, len(others))
    kept, used = _kept(seen_f1), _kept([mark for mark in seen_f1 if mark >= PASSED])
    reason = "; ".join(_faults(exam, kept, used, changed, len(others)))
    report = GateReport(
        seen=kept,
        used=used,
        unseen=_kept(unseen_f1),
        bare=_kept(bare_f1),
        reach=far,
        drift=changed,
        passed=not reason,
        reason=reason,
    )
    return Examined(report, marks, held_out_marks)


class _Room:
    """Where questions are asked and answers are counted."""

    def __init__(self, answer: Answer, progress: Progress | None, total: int) -> None:
        self._answer = answer
        self._progress = progress
        self._total = total
        self._done = 0

    def from_memory(self, items: Sequence[Item], members: frozenset[int]) -> list[float]:
        """F1 of answers with the adapter and without its passages, against the teacher's."""
        asks = [Ask(item.question, tuple(c for c in item.chunks if c not in members), True) for item in items]
        return self._compared(items, asks)

    def bare(self, items: Sequence[Item]) -> list[float]:
        """F1 of answers without the adapter and without any passage, against the teacher's."""
        return self._compared(items, [Ask(item.question, (), False) for item in items])

    def agreements(self, items: Sequence[Item]) -> list[float]:
        """F1 between the answers without and with the adapter, all passages in the prompt."""
        self._total += 2 * len(items)
        off = list(self._ask([Ask(item.question, item.chunks, False) for item in items]))
        on = self._ask([Ask(item.question, item.chunks, True) for item in items])
        return [f1(said, [before]) for said, before in zip(on, off, strict=True)]

    def _compared(self, items: Sequence[Item], asks: Sequence[Ask]) -> list[float]:
        return [f1(said, [item.answer or ""]) for said, item in zip(self._ask(asks), items, strict=True)]

    def _ask(self, asks: Sequence[Ask]) -> Iterator[str]:
        for said in self._answer(asks) if asks else ():
            self._done += 1
            if self._progress:
                self._progress(self._done, self._total)
            yield said


def _can_be_marked(members: frozenset[int], item: Item) -> bool:
    answered = item.answer is not None and not item.refused and squad_normalised(item.answer) != ""
    return answered and not members.isdisjoint(item.chunks)


def _chosen(items: Sequence[Item], fits: Callable[[Item], bool], most: int) -> list[int]:
    """Places of at most `most` of the items that fit: logged ones first, then by a hash of their text."""

    def order(place: int) -> tuple[bool, bytes, int]:
        item = items[place]
        return item.kind != "logged", hashlib.sha256(f"exam {item.question}".encode()).digest(), place

    return sorted((place for place, item in enumerate(items) if fits(item)), key=order)[:most]


def _placed(f1s: Sequence[float], places: Sequence[int], count: int) -> npt.NDArray[np.float32]:
    """The F1s at their places among `count` questions, [count]; NaN elsewhere."""
    marks = np.full(count, np.nan, np.float32)
    marks[list(places)] = f1s
    return marks


def _reach(exam: Exam, marks: npt.NDArray[np.float32], unseen: Sequence[int], f1s: Sequence[float]) -> float:
    """How far it reaches, by the held-out questions whose nearest trained one it did not fail."""
    found = (closeness(exam.held_out_vectors[place], exam.trained_vectors) for place in unseen)
    judged = [
        (nearest[1], f1) for nearest, f1 in zip(found, f1s, strict=True) if nearest and not marks[nearest[0]] < PASSED
    ]
    return reach([close for close, _ in judged], [f1 for _, f1 in judged], keep=exam.keep)


def _kept(f1s: Sequence[float]) -> Kept:
    return Kept(len(f1s), _mean(f1s))


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0


def _faults(exam: Exam, seen: Kept, used: Kept, drift: float, others: int) -> Iterator[str]:
    """Why it has not passed, in words; nothing when it has."""
    if not seen.questions:
        yield "nothing could be examined: no question that it was trained on has an answer of the teacher"
    elif used.questions < LEAST_USED * seen.questions:
        yield f"answered {used.questions} of {seen.questions} seen questions well, {LEAST_USED:.0%} are asked for"
    elif used.f1 < exam.keep:
        yield (
            f"kept {_down(used.f1)} of the teacher's F1 on the {used.questions} of {seen.questions} seen questions "
            f"that it answered well, {exam.keep:g} are asked for"
        )
    if drift > exam.drift:
        yield f"changed answers to {others} questions of other clusters by {_up(drift)}, {exam.drift:g} are allowed"


def _down(share: float) -> str:
    """Rounded so that what was missed narrowly does not look as if it was reached."""
    return f"{math.floor(round(share * 100, 6)) / 100:.2f}"


def _up(share: float) -> str:
    return f"{math.ceil(round(share * 100, 6)) / 100:.2f}"
