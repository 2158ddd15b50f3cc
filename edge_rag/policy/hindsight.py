"""Would another residency rule have done better? Logged decisions, gone through with another set of adapters in memory.

What was expected of each arm, and its price with its adapter in fast memory and without, is known of all arms of a
decision. So every rule can be replayed on the log, and is judged by what was expected; and, as far as answers were
judged, by what they were worth (`policy.offline`). What would have been learned on its way is not known. For the same
reason nothing is tried, which would only cost.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from edge_rag.policy.demand import Request
from edge_rag.policy.offline import CLIP, Evaluation, Judged, evaluate, judge
from edge_rag.policy.residency import Residency
from edge_rag.records import Record


class Moment(Struct, frozen=True, eq=False):
    """A logged decision between 1 + n arms: '' and the adapters of `request`, in this order.

    `place` is that of the arm which was chosen, `paid` the price that it had then, and `hit` says whether its adapter
    was resident. `means` are the qualities expected, `probabilities` those with which an arm was to be chosen.
    """

    request: Request
    place: int
    paid: float
    hit: bool
    means: tuple[float, ...]
    probabilities: tuple[float, ...]


class Taken(NamedTuple):
    """What a way to choose does at a moment: it `wanted` '' and the request's arms with these probabilities [1 + n].

    `quality` is what is expected of the answer, `utility` the same less its price. `used`: an adapter answers, and
    `hit`: it was resident. `loads` adapters are brought into memory for this request or because of it.
    """

    wanted: Sequence[float]
    quality: float
    utility: float
    used: bool
    hit: bool
    loads: int


Way = Callable[[Moment], Taken]


def as_it_was(moment: Moment) -> Taken:
    """What was done. Of loads only those are known that somebody waited for."""
    quality, used = moment.means[moment.place], moment.place > 0
    hit = used and moment.hit
    return Taken(moment.probabilities, quality, quality - moment.paid, used, hit, int(used and not hit))


def without_adapters(moment: Moment) -> Taken:
    """Plain retrieval for every question."""
    return Taken(_only(0, moment), moment.means[0], moment.request.without, False, False, 0)


class Keeping:
    """Takes the arm of the best mean − price, with those adapters in memory that `rule` keeps there.

    Unless the rule names another (`Residency.forced`), as one does that has a choice of its own; trials are not made.
    Of equals it is plain retrieval, then a resident adapter, then the first.
    """

    def __init__(self, rule: Residency) -> None:
        self._rule = rule

    def __call__(self, moment: Moment) -> Taken:
        """What the rule leads to, of which it takes notice."""
        request, before = moment.request, self._rule.resident
        named = self._rule.forced(request, -math.inf)
        place = 1 + request.arms.index(named) if named else _best(request, before)
        used = request.arms[place - 1] if place else ""
        loads = self._rule.after(replace(request, used=used)) - before - {used}
        if not place:
            return Taken(_only(0, moment), moment.means[0], request.without, False, False, len(loads))
        hit, quality = used in before, moment.means[place]
        price = float((request.here if hit else request.away)[place - 1])
        return Taken(_only(place, moment), quality, quality - price, True, hit, len(loads) + (not hit))


def _best(request: Request, resident: frozenset[str]) -> int:
    """The place of the arm of the best mean − price, among '' and the request's arms."""
    best = 0, (request.without, True)
    listed = zip(request.arms, request.means.tolist(), request.here.tolist(), request.away.tolist(), strict=True)
    for place, (arm, mean, here, away) in enumerate(listed, start=1):
        value = (mean - here, True) if arm in resident else (mean - away, False)
        if value > best[1]:
            best = place, value
    return best[0]


def _only(place: int, moment: Moment) -> list[float]:
    wanted = [0.0] * len(moment.means)
    wanted[place] = 1.0
    return wanted


class Replayed(Record, frozen=True):
    """What came of a way to choose in `decisions`. `utility` is the sum of what was expected less the price of waiting.

    `quality` is the mean of what was expected of the answers. Adapters gave `used` of them, which were in memory `hits`
    times; `page_ins` were loaded. `rewards` is the quality again, from what answers were worth.
    """

    policy: str
    decisions: int
    utility: float
    quality: float
    used: int
    hits: int
    page_ins: int
    rewards: Evaluation


class Comparison(Record, frozen=True):
    """Ways to choose compared on the journal: as it was, without adapters, and one for each residency rule.

    `decisions` were gone through; of another `left_out` the adapter that answered is gone, and with it its size.
    """

    decisions: int
    left_out: int
    ways: tuple[Replayed, ...]


class Account:
    """Sums up what comes of one way to choose, moment after moment."""

    def __init__(self, policy: str, way: Way) -> None:
        self._policy = policy
        self._way = way
        self._sums = [0.0] * 6
        self._judged: list[Judged] = []

    def take(self, moment: Moment, reward: float | None) -> None:
        """Go through a moment; `reward` is what its answer was worth, if anybody knows."""
        wanted, *sums = self._way(moment)
        self._sums = list(map(operator.add, self._sums, (1, *sums)))
        if reward is not None:
            self._judged.append(judge(reward, moment.place, moment.probabilities, moment.means, wanted))

    def result(self, *, clip: float = CLIP) -> Replayed:
        """What has come of it; `clip` as in `evaluate`."""
        decisions, quality, utility, used, hits, loads = self._sums
        return Replayed(
            policy=self._policy,
            decisions=int(decisions),
            utility=utility,
            quality=quality / max(1, decisions),
            used=int(used),
            hits=int(hits),
            page_ins=int(loads),
            rewards=evaluate(self._judged, clip=clip),
        )
