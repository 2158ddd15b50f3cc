"""Other rules for what stays in fast memory: those that POLAR is compared with, by the same interface.

All of them let an arm in when it was used, without asking whether that is worth it. An arm that is larger than the
budget is never let in, and nothing leaves for it.

* LRU: the least recently used leaves. LFU: the least often used, of all time. FIFO: the first that came.
* `CostAware`: LRU that knows of prices and sizes: Greedy-Dual-Size (Cao and Irani, USITS 1997).
* `EdgeLoRA`: LRU, and of the arms that the router finds best one is used that is resident already (Shen et al.,
  "EdgeLoRA", arXiv 2507.01438).
* `Static`: what was used most in the beginning, per byte, stays for good.
* `Belady`: who is used again last leaves (Belady, IBM Systems Journal 5(2), 1966). It must know what comes, so it only
  says what any rule could have reached on the same trace.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from msgspec import Struct

from edge_rag.policy.demand import Means, Request, as_logged
from edge_rag.policy.residency import EPOCH, Pace, Polar, Residency, doubling, fixed

FOUND = 3  # EdgeLoRA takes a resident one of so many best arms


class _OnDemand(Residency, ABC):
    """What is used comes in, and those leave for it that are worth least."""

    def __init__(self, sizes: Mapping[str, int], budget: int) -> None:
        super().__init__(sizes, budget)
        self._turn = 0
        self._worths: dict[str, tuple[float, float]] = {}

    def _notice(self, request: Request) -> None:
        self._turn += 1
        arm, size = request.used, self.sizes.get(request.used, self.budget + 1)
        if size > self.budget:
            return
        came = arm not in self.resident
        if came:
            self._make_room(size)
            self.resident |= {arm}
        self._worths[arm] = self._worth(request, came)

    def _value(self, arm: str) -> tuple[float, float]:
        return self._worths.get(arm, (0.0, 0.0))

    @abstractmethod
    def _worth(self, request: Request, came: bool) -> tuple[float, float]:
        """What the arm that was used is worth now; it `came` in just now or was resident."""


class LRU(_OnDemand):
    """The least recently used leaves."""

    def _worth(self, request: Request, came: bool) -> tuple[float, float]:
        return self._turn, 0.0


class FIFO(_OnDemand):
    """The first that came leaves."""

    def _worth(self, request: Request, came: bool) -> tuple[float, float]:
        return (self._turn, 0.0) if came else self._value(request.used)


class LFU(_OnDemand):
    """The least often used leaves; uses are not forgotten. Of equals it is the least recently used."""

    def __init__(self, sizes: Mapping[str, int], budget: int) -> None:
        super().__init__(sizes, budget)
        self._uses: Counter[str] = Counter()

    def _worth(self, request: Request, came: bool) -> tuple[float, float]:
        self._uses[request.used] += 1
        return self._uses[request.used], self._turn


class CostAware(_OnDemand):
    """An arm is worth its page-in per byte, above what the last one that left was worth (Greedy-Dual-Size)."""

    def __init__(self, sizes: Mapping[str, int], budget: int) -> None:
        super().__init__(sizes, budget)
        self._left = 0.0

    def _make_room(self, size: int) -> None:
        before = self.resident
        super()._make_room(size)
        self._left = max([self._left, *(self._value(arm)[0] for arm in before - self.resident)])

    def _worth(self, request: Request, came: bool) -> tuple[float, float]:
        place = request.arms.index(request.used)
        page_in = float(request.away[place] - request.here[place])
        return self._left + page_in / self.sizes[request.used], self._turn


class EdgeLoRA(LRU):
    """LRU; and the arm that is used is the best resident one of the `found` best, or the best when none is.

    Best is by mean + `alpha` × width: the original has a trained router, which need not find out anything. Prices are
    not looked at.
    """

    def __init__(self, sizes: Mapping[str, int], budget: int, *, alpha: float = 1.0, found: int = FOUND) -> None:
        super().__init__(sizes, budget)
        self._alpha = alpha
        self._found = found

    def forced(self, request: Request, allowance: float) -> str:
        """The rule's choice, whatever it costs; '' when there is no candidate."""
        best_first = np.argsort(-(request.means + self._alpha * request.widths), kind="stable")
        best = [request.arms[place] for place in best_first[: self._found]]
        return next((arm for arm in best if arm in self.resident), best[0] if best else "")


class Static(Residency):
    """What was used most, per byte, in the first `epoch` requests stays for good; until then, what finds room."""

    def __init__(self, sizes: Mapping[str, int], budget: int, epoch: int = EPOCH) -> None:
        super().__init__(sizes, budget)
        self._left = epoch
        self._uses: Counter[str] = Counter()

    def _notice(self, request: Request) -> None:
        if not self._left:
            return
        self._left -= 1
        self._uses[request.used] += 1
        if not self._left:
            self.resident = frozenset()
        wanted = [request.used] if self._left else sorted(self._uses, key=self._value, reverse=True)
        for arm in wanted:
            self._take(arm)

    def _value(self, arm: str) -> tuple[float, float]:
        return self._uses[arm] / self.sizes.get(arm, math.inf), 0.0


class Belady(Residency):
    """Those stay that are used again soonest; `coming` are the arms that all requests will use, in order.

    With equal sizes nothing has fewer page-ins.
    """

    def __init__(self, sizes: Mapping[str, int], budget: int, coming: Sequence[str]) -> None:
        super().__init__(sizes, budget)
        self._turn = -1
        self._turns: defaultdict[str, list[int]] = defaultdict(list)
        for turn, arm in enumerate(coming):
            self._turns[arm].append(turn)

    def _notice(self, request: Request) -> None:
        self._turn += 1
        soonest = sorted(self.resident | {request.used}, key=lambda arm: (self._value(arm), arm), reverse=True)
        self.resident = frozenset()
        for arm in soonest:
            self._take(arm)

    def _value(self, arm: str) -> tuple[float, float]:
        turns = self._turns[arm]
        place = bisect_right(turns, self._turn)
        return (-turns[place], 0.0) if place < len(turns) else (-math.inf, 0.0)


class Terms(Struct, frozen=True):
    """What rules may need besides sizes and budget. See `Polar`."""

    epoch: int
    hope: float
    means: Means
    served: int


RULES: dict[str, Callable[[Mapping[str, int], int, Terms], Residency]] = {
    "polar": lambda sizes, budget, terms: _polar(sizes, budget, fixed, terms),
    "polar+": lambda sizes, budget, terms: _polar(sizes, budget, doubling, terms),
    "lru": lambda sizes, budget, _: LRU(sizes, budget),
    "lfu": lambda sizes, budget, _: LFU(sizes, budget),
    "fifo": lambda sizes, budget, _: FIFO(sizes, budget),
    "cost-aware": lambda sizes, budget, _: CostAware(sizes, budget),
    "edgelora": lambda sizes, budget, _: EdgeLoRA(sizes, budget),
    "static": lambda sizes, budget, terms: Static(sizes, budget, terms.epoch),
}


def rule(
    name: str,
    sizes: Mapping[str, int],
    budget: int,
    *,
    epoch: int = EPOCH,
    hope: float = 1.0,
    means: Means = as_logged,
    served: int = 0,
) -> Residency:
    """The rule of RULES with this name, which must be one of them. It takes what it needs of the other arguments.

    `hope` says what is scouted (`Pace`); `served` is the number of requests before, in another life of this process.
    """
    return RULES[name](sizes, budget, Terms(epoch, hope, means, served))


def _polar(sizes: Mapping[str, int], budget: int, pace: Callable[[int, float], Pace], terms: Terms) -> Polar:
    return Polar(sizes, budget, pace(terms.epoch, terms.hope), terms.means, served=terms.served)
