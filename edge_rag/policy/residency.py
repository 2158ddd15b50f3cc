"""Which adapters stay in fast memory: the interface of all rules, and the controller after POLAR.

A rule is told of each request when it has been served (`after`), and says which arms are resident from then on. An arm
that is used without being resident is paged in for this one request; whether it stays is up to the rule. Time is the
number of requests. '' stands for plain retrieval, which needs no memory and is no arm here.

`Polar` is a reconstruction after POLAR and POLAR+ (arXiv 2604.16583), of which only the abstract was known: at the end
of each epoch the set is chosen anew (`resident_set`) for the requests of a window, with the newest estimates. These are
means: a set that is chosen by optimistic scores goes back and forth. POLAR has epochs of one length; those of POLAR+
begin short and double up to a longest one.

Where it differs from the plain reconstruction, because that was better in `tools.bench router` (docs/log.md):

* Scouting. What is resident is cheap to use and so gets known, what is not stays unknown: with a high price or little
  optimism the first few arms are kept for good (lock-in). So in the beginning the price of loading is not looked at and
  the most hopeful arm is used; and again for a while whenever the number of requests has doubled, twice for each arm.
  The plain POLAR+ tries each arm twice in every epoch, hopeful or not, and for ever, and the plain POLAR does nothing.
* While there is room, what was paged in stays. Without scouting that would be the lock-in.
* Epochs may get longer, but what is looked back on does not: the window is the same for all.
"""

from collections import deque
from collections.abc import Mapping

import numpy as np
from msgspec import Struct

from edge_rag.policy.demand import Means, Request, as_logged, demand
from edge_rag.policy.resident_set import choose, losses

EPOCH = 256  # requests; the default of router.epoch
FIRST = 32  # requests of the first epoch of POLAR+
PULLS = 2  # requests for each arm that are scouted with when their number has doubled
MOST = 4  # it scouts in a fourth of the requests at most


class Residency:
    """A rule; this one lets nothing in.

    `sizes` are the bytes of every arm that exists, and are looked up anew each time; `budget` is in bytes. What no
    longer exists leaves at the next request, and so does what no longer fits, the least valued first. An arm that is
    larger than the budget is never resident. `resident` may be set to what is in memory at the start.
    """

    def __init__(self, sizes: Mapping[str, int], budget: int) -> None:
        self.sizes = sizes
        self.budget = budget
        self.resident: frozenset[str] = frozenset()
        self.epochs = 0  # that have ended; most rules have none

    @property
    def order(self) -> tuple[str, ...]:
        """The resident arms, the least valued first: in this order they may leave."""
        return tuple(sorted(self.resident, key=lambda arm: (self._value(arm), arm)))

    def after(self, request: Request) -> frozenset[str]:
        """Take notice of a request that was served. Returns the arms that are resident from now on."""
        self.resident = frozenset(arm for arm in self.resident if arm in self.sizes)
        self._make_room(0)
        self._notice(request)
        return self.resident

    def forced(self, request: Request, allowance: float) -> str:
        """The arm that is to be used whatever the router says; '' when the router is to choose.

        `request` is about to be served (its `used` is not looked at). The arm costs at most `allowance` more than the
        one of the best mean less price does; '' is taken to cost nothing.
        """
        return ""

    def _notice(self, request: Request) -> None:
        """Take notice of a request; what may not stay has left."""

    def _value(self, arm: str) -> tuple[float, float]:
        """What a resident arm is worth, to be compared with others of the same rule."""
        return 0.0, 0.0

    def _used(self) -> int:
        return sum(self.sizes.get(arm, 0) for arm in self.resident)  # one may go at any moment

    def _take(self, arm: str) -> None:
        """Make an arm resident, if it exists and there is room."""
        if self._used() + self.sizes.get(arm, self.budget + 1) <= self.budget:
            self.resident |= {arm}

    def _make_room(self, size: int) -> None:
        """Let the least valued arms go until `size` more bytes fit."""
        if self._used() + size <= self.budget:
            return
        for arm in self.order:
            self.resident -= {arm}
            if self._used() + size <= self.budget:
                return


class Pace(Struct, frozen=True):
    """How a `Polar` goes on, in requests. Its `first` epoch, and its `longest`: they double in between.

    It looks back on the last `window` requests. It scouts in the first `scouting` ones, and whenever their number has
    doubled since, `pulls` times for each arm; what is scouted is best by mean + `hope` × width.
    """

    first: int = EPOCH
    longest: int = EPOCH
    window: int = EPOCH
    scouting: int = EPOCH
    pulls: int = PULLS
    hope: float = 1.0


def fixed(epoch: int = EPOCH, hope: float = 1.0) -> Pace:
    """The pace of POLAR."""
    return Pace(first=epoch, longest=epoch, window=epoch, scouting=epoch, hope=hope)


def doubling(epoch: int = EPOCH, hope: float = 1.0) -> Pace:
    """The pace of POLAR+."""
    return Pace(first=min(FIRST, epoch), longest=epoch, window=epoch, scouting=epoch, hope=hope)


class Polar(Residency):
    """The controller. `means` estimates the means of requests anew, [n] of each, when an epoch ends.

    `served`: so many requests were served before, in another life of this process; scouting is not begun again.
    """

    def __init__(
        self, sizes: Mapping[str, int], budget: int, pace: Pace, means: Means = as_logged, *, served: int = 0
    ) -> None:
        super().__init__(sizes, budget)
        self._pace = pace
        self._means = means
        self._length = pace.first
        self._passed = 0  # requests of this epoch
        self._recent: deque[Request] = deque(maxlen=pace.window)
        self._values: dict[str, float] = {}
        self._served = served
        self._due = max(0, pace.scouting - served)  # requests to scout with, from now on

    def forced(self, request: Request, allowance: float) -> str:
        """While it scouts, the arm that would be chosen if all were resident, or '' when '' would be or it is too dear.

        Chosen by mean + hope × width − price: here optimism is what is wanted. Of equals it is the resident one.
        """
        if not self._due or not request.arms:
            return ""
        resident = np.array([arm in self.resident for arm in request.arms])
        prices = np.where(resident, request.here, request.away)
        nets = request.means - prices
        best = int(np.argmax(nets))
        most = allowance + (prices[best] if nets[best] >= request.without else 0.0)
        hopes = np.where(prices <= most, request.means + self._pace.hope * request.widths - request.here, -np.inf)
        hopeful = np.flatnonzero(hopes == hopes.max())
        chosen = int(hopeful[np.argmax(resident[hopeful])])
        return request.arms[chosen] if hopes[chosen] > request.without else ""

    def tried(self) -> None:
        """An arm was tried while nobody asked: one request less has to scout."""
        self._due = max(0, self._due - 1)

    def _notice(self, request: Request) -> None:
        self._recent.append(request)
        self._paged_in(request.used)
        self._scout()
        self._passed += 1
        if self._passed >= self._length:
            self._end()

    def _paged_in(self, arm: str) -> None:
        """While there is room, it stays."""
        self._take(arm)

    def _scout(self) -> None:
        """Count a request, and begin to scout again when their number has doubled."""
        self._served += 1
        self.tried()
        rounds, rest = divmod(self._served, max(1, self._pace.scouting))
        if rest == 0 and rounds.bit_count() == 1:
            self._due = min(self._pace.pulls * len(self.sizes), self._served // MOST)

    def _end(self) -> None:
        """Choose the set anew and begin the next epoch."""
        window = list(self._recent)
        asked = demand(window, self._means(window), exist=self.sizes, resident=self.resident)
        sizes = np.array([self.sizes.get(arm, self.budget + 1) for arm in asked.arms], np.float64)
        newcomers = np.array([arm not in self.resident for arm in asked.arms], bool)
        tolls = newcomers * asked.page_ins * (len(window) / self._pace.longest)
        chosen = choose(asked.lift, sizes, tolls, self.budget)
        lost = losses(chosen, asked.lift)
        self._settle({asked.arms[row]: loss / sizes[row] for row, loss in zip(chosen, lost, strict=True)})
        self.epochs += 1
        self._passed = 0
        self._length = min(2 * self._length, self._pace.longest)

    def _settle(self, values: dict[str, float]) -> None:
        """Make the arms that have a value resident; of the others those stay that still fit, the best first."""
        others = [arm for arm in reversed(self.order) if arm not in values]
        self._values = values
        self.resident = frozenset(values)
        for arm in others:
            self._take(arm)

    def _value(self, arm: str) -> tuple[float, float]:
        return self._values.get(arm, 0.0), 0.0
