"""A policy in a made-up world: a router that learns, and a rule for what stays resident, request by request."""

from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from edge_rag.policy.caching_rules import Belady, rule
from edge_rag.policy.demand import Array, Means, Request
from edge_rag.policy.linucb import Bandit, Estimates, decide
from edge_rag.policy.residency import Pace, Polar, Residency
from tools.bench.router_plain import Plain
from tools.bench.router_world import World, exams, observed

PLAIN = -1  # the place of '' among what was used


class Way(Struct, frozen=True):
    """A policy: the rule of what stays resident, by name, by its `pace`, or plainly (`trials` is set); and the router.

    `priced`: it takes the price off. `seeded`: each arm was taught by so many questions of its exam. `more`: so many
    arms of mean size fit besides. `allowance`: what a forced arm may cost more than the best one.
    """

    name: str
    rule: str = ""
    pace: Pace | None = None
    trials: int | None = None
    priced: bool = True
    alpha: float = 1.0
    discount: float = 1.0
    seeded: int = 0
    more: int = 0
    allowance: float = np.inf


class Run(Struct, frozen=True, eq=False):
    """What came of it: regret and the arm used at each request, and counts.

    `gain` is the mean of quality less price; `hits` the share of requests for which nothing had to be loaded; `changes`
    are arms that were loaded at an epoch's end, and count as page-ins too.
    """

    regret: Array
    used: npt.NDArray[np.int16]
    gain: float
    hits: float
    page_ins: int
    changes: int
    forced: int


def play(world: World, way: Way) -> Run:
    """Serve all requests. Belady's rule has to know which arms come: that is found first; prices must not matter."""
    if way.rule == "belady":
        blind = _Play(world, way, Residency(world.sizes, 0)).run()
        coming = ["" if place == PLAIN else world.names[place] for place in blind.used]
        return _Play(world, way, Belady(world.sizes, world.budget, coming)).run()
    return _Play(world, way).run()


class _Play:
    def __init__(self, world: World, way: Way, kept: Residency | None = None) -> None:
        self.world = world
        self.way = way
        self.bandit = Bandit(world.shape.dimensions, discount=way.discount)
        self.rule = kept or _rule(world, way, self.means)
        self.names: dict[bytes, tuple[str, ...]] = {}
        self.pulls: Counter[str] = Counter()
        self.forced = self.changes = self.missed = 0
        if way.seeded:
            self.seed(*exams(world))

    def seed(self, contexts: Array, qualities: Array) -> None:
        """Teach each arm what its exam said, as far as it is seeded."""
        for arm, number in np.ndindex(len(self.world.names), self.way.seeded):
            self.bandit.update(self.world.names[arm], contexts[arm, number], float(qualities[arm, number]))
            self.pulls[self.world.names[arm]] += 1

    def run(self) -> Run:
        """Serve all requests."""
        served = [self.serve(number) for number in range(self.world.shape.requests)]
        gains = np.array([gain for _, gain in served])
        return Run(
            regret=self.world.best - gains,
            used=np.array([place for place, _ in served], np.int16),
            gain=float(gains.mean()),
            hits=1 - self.missed / len(served),
            page_ins=self.missed + self.changes,
            changes=self.changes,
            forced=self.forced,
        )

    def means(self, requests: Sequence[Request]) -> list[Array]:
        """What is expected of the arms of requests by now."""
        names = [name for request in requests for name in request.arms]
        contexts = np.concatenate([_repeated(request.contexts, len(request.arms)) for request in requests])
        ends = np.cumsum([len(request.arms) for request in requests])
        return np.split(self.bandit.means(names, contexts), ends[:-1])

    def serve(self, number: int) -> tuple[int, float]:
        """The place of the arm that is used, and quality less price."""
        world = self.world
        request, estimates = self.asked(number)
        prices = np.where([arm in self.rule.resident for arm in request.arms], request.here, request.away)
        if world.shape.plain is not None:
            prices = np.append(prices, world.shape.plain_price)
        chosen = self.chosen(request, estimates, prices)
        plain = chosen == len(request.arms)
        place = PLAIN if plain else int(world.offered[number][chosen])
        quality = (world.shape.plain or 0.0) if plain else float(world.qualities[number, place])
        used = "" if plain else request.arms[chosen]
        self.bandit.tick()
        self.bandit.update(used, world.contexts[number], observed(world, number, quality))
        self.pulls[used] += 1
        paid = self.settle(msgspec.structs.replace(request, used=used))
        return place, quality - float(prices[chosen]) - paid

    def asked(self, number: int) -> tuple[Request, Estimates]:
        """A request, and what is expected of its candidates, '' last where it is a choice."""
        world = self.world
        places = world.offered[number]
        arms = self.names.setdefault(places.tobytes(), tuple(world.names[place] for place in places))
        every = arms if world.shape.plain is None else (*arms, "")
        estimates = self.bandit.estimate(every, _repeated(world.contexts[number], len(every)))
        without = -np.inf if every is arms else float(estimates.means[-1]) - world.shape.plain_price
        request = Request(
            arms=arms,
            means=estimates.means[: len(arms)],
            widths=estimates.widths[: len(arms)],
            here=np.zeros(len(arms)),
            away=world.prices[places],
            without=without,
            contexts=world.contexts[number],
        )
        return request, estimates

    def chosen(self, request: Request, estimates: Estimates, prices: Array) -> int:
        """The place of the arm among the candidates. Who does not look at prices does not see what is resident."""
        if forced := self.rule.forced(request, self.way.allowance):
            self.forced += 1
            return request.arms.index(forced)
        names = (*request.arms, "")[: len(prices)]
        resident = np.array([name in self.rule.resident or not name for name in names])
        return decide(
            estimates,
            prices * self.way.priced,
            alpha=self.way.alpha,
            resident=resident & self.way.priced,
            pulls=np.array([self.pulls[name] for name in names]),
        ).index

    def settle(self, request: Request) -> float:
        """Tell the rule. Returns what is paid for arms that are loaded because of it, besides the one that was used."""
        before = self.rule.resident
        self.missed += request.used != "" and request.used not in before
        loaded = self.rule.after(request) - before - {request.used}
        self.changes += len(loaded)
        return sum(float(self.world.prices[self.world.names.index(arm)]) for arm in loaded)


def _repeated(context: object, times: int) -> Array:
    row = np.asarray(context, np.float64)
    return np.broadcast_to(row, (times, len(row)))


def _rule(world: World, way: Way, means: Means) -> Residency:
    budget = world.budget + way.more * sum(world.sizes.values()) // len(world.sizes)
    if way.pace is None:
        return rule(way.rule, world.sizes, budget, means=means)
    if way.trials is None:
        return Polar(world.sizes, budget, way.pace, means)
    return Plain(world.sizes, budget, way.pace, means, way.trials)
