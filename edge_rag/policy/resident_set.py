"""Which arms are best kept in fast memory for a number of requests, under a budget of bytes.

What a set is worth to a request is how far the best of its arms lifts it above what it would have without any of them
(`lift`, 0 or more). The worth of the set is the sum over requests, less the tolls of its arms (what it costs to make
them resident). Without tolls that is monotone and submodular, so taking again and again what gains most is at least
1 - 1/e of the best (Nemhauser, Wolsey and Fisher, 1978). With arms of several sizes, gain per byte may take a small one
where a large one is better, and gain alone the other way round; the better of both is at least (1 - 1/e)/2 of the best
(Leskovec et al., "Cost-effective outbreak detection in networks", KDD 2007). Then arms are exchanged one for one, left
out or added, as long as that gains.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

ADD = -1  # no row: is there anything to add?
SLACK = 1e-9  # worths that differ by less are equal: sums of floats depend on their order


def choose(lift: Array, sizes: Array, tolls: Array, budget: float) -> list[int]:
    """The rows of `lift` [arms, requests] to keep, in order; of equally good sets the one found first.

    `sizes` [arms] are above 0 and in the unit of `budget`; `tolls` [arms] in that of the sum over requests. A row that
    adds nothing is not chosen.
    """
    if not sizes.size:
        return []
    alike = bool(np.all(sizes == sizes[0]))
    ways = [_greedy(lift, sizes, tolls, budget, per) for per in ([sizes] if alike else [sizes, np.ones_like(sizes)])]
    improved = [_exchanged(chosen, lift, sizes, tolls, budget) for chosen in ways]
    best = max(improved, key=lambda chosen: worth(chosen, lift, tolls))
    return sorted(best)


def worth(chosen: Sequence[int], lift: Array, tolls: Array) -> float:
    """What a set of rows is worth."""
    return float(_lifted(chosen, lift).sum() - tolls[list(chosen)].sum())


def losses(chosen: Sequence[int], lift: Array) -> list[float]:
    """For each of the chosen rows, how much less the set lifts without it."""
    have = _lifted(chosen, lift).sum()
    return [float(have - _lifted([other for other in chosen if other != row], lift).sum()) for row in chosen]


def _lifted(chosen: Sequence[int], lift: Array) -> Array:
    lifted: Array = lift[list(chosen)].max(axis=0, initial=0)
    return lifted


def _gains(chosen: Sequence[int], lift: Array, sizes: Array, tolls: Array, budget: float) -> Array:
    """What each row adds to the chosen ones, less its toll; -inf for those, and for what does not fit beside them."""
    have = _lifted(chosen, lift)
    gains: Array = np.maximum(lift, have).sum(axis=1) - have.sum() - tolls
    gains[sizes > budget - sizes[list(chosen)].sum()] = -np.inf
    gains[list(chosen)] = -np.inf
    return gains


def _greedy(lift: Array, sizes: Array, tolls: Array, budget: float, per: Array) -> list[int]:
    chosen: list[int] = []
    while True:
        gains = _gains(chosen, lift, sizes, tolls, budget)
        best = int(np.argmax(gains / per))
        if gains[best] <= SLACK:
            return chosen
        chosen.append(best)


def _exchanged(chosen: list[int], lift: Array, sizes: Array, tolls: Array, budget: float) -> list[int]:
    """The set after each row gave way to the one that is best in its place, or to nothing, until none does."""
    waiting = [*chosen, ADD]
    while waiting:  # ends, because each change gains
        row = waiting.pop(0)
        others = [other for other in chosen if other != row]
        gains = _gains(others, lift, sizes, tolls, budget)
        kept = 0.0 if row == ADD else float(gains[row])
        best = int(np.argmax(gains))
        if gains[best] > max(kept, 0.0) + SLACK:
            chosen, waiting = [*others, best], [*others, ADD]
        elif kept < -SLACK:
            chosen, waiting = others, [*others, ADD]
    return chosen
