"""What is measured, as pure functions of plain values."""

import random
import re
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

from edge_rag.policy.agreement import f1 as f1  # whoever measures has it from here
from edge_rag.policy.agreement import squad_normalised

_MARK = re.compile(r"\s*\[\d+\]")


class Span(NamedTuple):
    """The characters `start` to `end` of a document's extracted text."""

    document: str
    start: int
    end: int

    @property
    def length(self) -> int:
        """Characters."""
        return self.end - self.start

    def overlap(self, other: "Span") -> int:
        """How many characters both have."""
        if self.document != other.document:
            return 0
        return max(0, min(self.end, other.end) - max(self.start, other.start))

    def contains(self, other: "Span") -> bool:
        """Whether all of `other` lies within."""
        return self.document == other.document and self.start <= other.start and other.end <= self.end


class Interval(NamedTuple):
    """A mean with the bounds of its bootstrap interval."""

    mean: float
    low: float
    high: float


# --- retrieval -------------------------------------------------------------------------------------------------------


def merged(spans: Sequence[Span]) -> list[Span]:
    """The same characters as spans that do not overlap, in order."""
    result: list[Span] = []
    for span in sorted(spans):
        if result and result[-1].document == span.document and span.start <= result[-1].end:
            result[-1] = result[-1]._replace(end=max(result[-1].end, span.end))
        else:
            result.append(span)
    return result


def covered_share(chunks: Sequence[Span], references: Sequence[Span]) -> float:
    """The share of the references' characters that lie in the chunks; overlaps count once."""
    wanted, found = merged(references), merged(chunks)
    total = sum(span.length for span in wanted)
    return sum(want.overlap(have) for want in wanted for have in found) / total if total else 0.0


def any_contained(chunks: Sequence[Span], references: Sequence[Span]) -> float:
    """1 when some chunk contains a whole reference, else 0."""
    return float(any(chunk.contains(reference) for chunk in chunks for reference in references))


def reciprocal_rank(chunks: Sequence[Span], references: Sequence[Span]) -> float:
    """1 / the rank of the first chunk that overlaps any reference; 0 when none does."""
    for rank, chunk in enumerate(chunks, start=1):
        if any(chunk.overlap(reference) for reference in references):
            return 1.0 / rank
    return 0.0


def agreement(found: Sequence[int], truth: Sequence[int]) -> float:
    """The share of `truth` that was found."""
    return len(set(found) & set(truth)) / len(truth) if truth else 1.0


# --- answers ---------------------------------------------------------------------------------------------------------


def without_marks(answer: str) -> str:
    """The answer without its citation marks."""
    return _MARK.sub("", answer).strip()


def exact_match(said: str, answers: Sequence[str]) -> float:
    """1 when it is one of the answers after SQuAD normalisation."""
    return float(any(squad_normalised(said) == squad_normalised(answer) for answer in answers))


def contains_answer(text: str, answers: Sequence[str]) -> float:
    """1 when one of the answers stands in `text` as whole words, after SQuAD normalisation."""
    words = f" {squad_normalised(text)} "
    wanted = [squad_normalised(answer) for answer in answers]
    return float(any(f" {answer} " in words for answer in wanted if answer))


# --- numbers ---------------------------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    """The mean; 0 of nothing."""
    return fmean(values) if values else 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0..1) of the values lie, interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def bootstrap(
    values: Sequence[float],
    *,
    statistic: Callable[[Sequence[float]], float] = mean,
    rounds: int = 1000,
    seed: int = 0,
) -> Interval:
    """The statistic with its 95 % percentile bootstrap interval. The same seed gives the same interval."""
    if not values:
        return Interval(0.0, 0.0, 0.0)
    rng = random.Random(seed)
    drawn = [statistic(rng.choices(values, k=len(values))) for _ in range(rounds)]
    return Interval(statistic(values), percentile(drawn, 0.025), percentile(drawn, 0.975))
