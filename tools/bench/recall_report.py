"""Answers of `adapters` beside each other: F1, EM and contains by way, seen and unseen apart, and what is promised."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from msgspec import Struct

from tools.bench.curriculum import Asking
from tools.bench.metrics import Interval, bootstrap, contains_answer, exact_match, f1, mean
from tools.bench.report import Claim, Result, Row, at_least, at_most

GROUPS = ("seen", "unseen")
WAYS = ("rag", "base", "closed", "partial", "hybrid", "forced", "wrong", "format", "sft", "prag")
KEPT = {"seen": 0.85, "unseen": 0.55}  # of the F1 of rag
OVER_PRAG = 1.78
MAY_LOSE, DRIFT = 0.03, 0.02

ByWay = Mapping[str, Mapping[str, str]]  # texts by way and case
Measure = Callable[[str, Sequence[str]], float]


class Case(Struct, frozen=True):
    """A question with its retrieved chunks, the adapter that would take it, and one that knows none of them."""

    asking: Asking
    chunks: tuple[int, ...]
    adapter: str
    members: frozenset[int]
    wrong: str
    tempted: bool  # the wrong one would answer, by its reach, if it covered any of them

    @property
    def key(self) -> str:
        """Its name in answers.json."""
        return str(self.asking.id)

    @property
    def group(self) -> str:
        """Of GROUPS."""
        return GROUPS[0] if self.asking.seen else GROUPS[1]


def compared(found: Sequence[Case], by_way: ByWay, took: Collection[str]) -> Result:
    """Rows of each group and way, and what is promised. `took` are the cases that took an adapter in the product."""
    result = Result(notes=["95 % bootstrap intervals over questions, paired where two ways are compared; greedy."])
    for group in GROUPS:
        here = [case for case in found if case.group == group]
        result.rows += [row for way in WAYS if (row := quality_row(group, way, here, by_way))]
    result.claims = list(claims(found, by_way, took))
    return result


def quality_row(group: str, way: str, here: Sequence[Case], by_way: ByWay) -> Row | None:
    """F1, EM, contains of a way; and its F1 beside that of rag on the same questions."""
    both = [case for case in here if case.key in by_way[way]]
    if not both:
        return None
    scores = marks(both, by_way[way], f1)
    own = bootstrap(scores)
    row: Row = {"table": "answers", "questions": group, "way": way, "n": len(both)}
    row |= {"F1": own.mean, "low": own.low, "high": own.high}
    row |= {"EM": mean(marks(both, by_way[way], exact_match))}
    row |= {"contains": mean(marks(both, by_way[way], contains_answer))}
    if all(case.key in by_way["rag"] for case in both):
        share = paired(scores, marks(both, by_way["rag"], f1), ratio)
        row |= {"÷ rag": share.mean, "÷ low": share.low, "÷ high": share.high}
    return row


def marks(found: Sequence[Case], texts: Mapping[str, str], measure: Measure) -> list[float]:
    """What each answer is worth against the known ones."""
    return [measure(texts[case.key], case.asking.answers) for case in found]


def ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Of the means; 0 where the second is nothing."""
    return mean(first) / mean(second) if mean(second) else 0.0


def difference(first: Sequence[float], second: Sequence[float]) -> float:
    """Of the means."""
    return mean(first) - mean(second)


def paired(
    first: Sequence[float], second: Sequence[float], statistic: Callable[[Sequence[float], Sequence[float]], float]
) -> Interval:
    """A statistic of two lists with its interval: what is drawn is pairs."""

    def of(places: Sequence[float]) -> float:
        chosen = [int(place) for place in places]
        return statistic([first[place] for place in chosen], [second[place] for place in chosen])

    return bootstrap([float(place) for place in range(len(first))], statistic=of)


def claims(found: Sequence[Case], by_way: ByWay, took: Collection[str]) -> Iterator[Claim]:
    """What is promised, of the ways that were asked."""

    def both(one: str, other: str, group: str = "") -> tuple[list[float], list[float]]:
        here = [case for case in found if case.key in by_way[one] and case.key in by_way[other]]
        here = [case for case in here if group in ("", case.group)]
        return marks(here, by_way[one], f1), marks(here, by_way[other], f1)

    for group, least in KEPT.items():
        if (pair := both("closed", "rag", group))[0]:
            yield at_least(f"closed book ÷ in-context RAG, F1 on {group}", ratio(*pair), least)
    if (pair := both("closed", "prag"))[0]:
        yield at_least("closed book ÷ P-RAG, F1", ratio(*pair), OVER_PRAG)
    hybrid = [case for case in found if case.asking.seen and case.key in took and case.key in by_way["rag"]]
    if hybrid:
        lost = difference(marks(hybrid, by_way["rag"], f1), marks(hybrid, by_way["hybrid"], f1))
        yield at_most(f"F1 lost by the hybrid on {len(hybrid)} seen questions that took an adapter", lost, MAY_LOSE)
    forced = [case for case in found if case.key in by_way["forced"] and case.key in by_way["rag"]]
    if forced:
        within = [case for case in forced if case.tempted]
        moved = [1 - f1(by_way["forced"][case.key], [by_way["rag"][case.key]]) for case in within]
        name = f"drift (1 - F1) of {len(within)} of {len(forced)} off-cluster questions, those within reach"
        yield at_most(name, mean(moved), DRIFT)
