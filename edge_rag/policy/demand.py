"""What requests ask of fast memory: what each arm would do for each of them if it were resident."""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt
from msgspec import Struct

Array = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]

GONE = -1  # in the place of an arm that does not exist


class Request(Struct, frozen=True, eq=False):
    """What was known of a question, and what was done: `used` is the arm of these that answered, or ''.

    `arms` are the candidates, all but ''; of each, as arrays [n]: `means` (the quality expected), `widths` (how unsure
    that is), `here` and `away` (its price when resident, and when it has to be loaded first). `without` is the mean of
    '' less its price; -inf when it is no choice. `contexts` is whatever the caller needs to estimate anew.
    """

    arms: tuple[str, ...]
    means: Array
    widths: Array
    here: Array
    away: Array
    without: float
    used: str = ""
    contexts: object = None


Means = Callable[[Sequence[Request]], Sequence[Array]]


class Demand(Struct, frozen=True, eq=False):
    """`lift` [arms, requests]: by how much an arm that is resident betters a request.

    `page_ins` [arms] is the mean price of loading each. Resident arms come first, then by name: so ties are broken.
    """

    arms: tuple[str, ...]
    lift: Array
    page_ins: Array


def as_logged(requests: Sequence[Request]) -> list[Array]:
    """The means that were expected when the requests came."""
    return [request.means for request in requests]


def demand(
    requests: Sequence[Request], means: Sequence[Array], *, exist: Collection[str], resident: Collection[str]
) -> Demand:
    """What the arms that exist would do for requests, of which `means` has the expected qualities [n].

    Without any resident arm a request has the best of '' and of the arms that may be loaded for it.
    """
    # Hashing some 100 names for each of 256 requests takes a time, so it is done once.
    lists: dict[tuple[str, ...], int] = {}
    which = [lists.setdefault(request.arms, len(lists)) for request in requests]
    arms = _in_order({arm for names in lists for arm in names if arm in exist}, resident)
    place = {arm: row for row, arm in enumerate(arms)}
    rows = [np.array([place.get(arm, GONE) for arm in names], np.intp) for names in lists]
    row = np.concatenate([np.zeros(0, np.intp), *(rows[number] for number in which)])
    column = np.repeat(np.arange(len(requests)), [len(rows[number]) for number in which])
    mean = _joined(means)
    near, far = mean - _joined([each.here for each in requests]), mean - _joined([each.away for each in requests])
    if GONE in row:
        row, column, near, far = (each[row != GONE] for each in (row, column, near, far))
    return _demand(arms, row, column, near, far, np.array([each.without for each in requests]))


def _in_order(arms: Collection[str], resident: Collection[str]) -> tuple[str, ...]:
    return tuple(sorted(arms, key=lambda arm: (arm not in resident, arm)))


def _demand(arms: tuple[str, ...], row: Places, column: Places, near: Array, far: Array, without: Array) -> Demand:
    """The same of candidates by arm (`row`) and request (`column`), with means less the price resident and away."""
    shape, cells = (len(arms), len(without)), row * len(without) + column
    loaded = np.full(shape, -np.inf)
    loaded.ravel()[cells] = far
    floor = np.maximum(loaded.max(axis=0, initial=-np.inf), without)
    lift = np.zeros(shape)
    lift.ravel()[cells] = np.maximum(near - floor[column], 0)
    page_ins = np.bincount(row, near - far, minlength=len(arms)) / np.bincount(row, minlength=len(arms))
    return Demand(arms, lift, page_ins)


def _joined(parts: Sequence[Array]) -> Array:
    return np.concatenate([np.zeros(0), *parts])
