"""What requests ask of fast memory: what each arm would do for each of them if it were resident."""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt
from msgspec import Struct

Array = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]


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
    named = {arm for names in {request.arms for request in requests} for arm in names if arm in exist}
    arms = tuple(sorted(named, key=lambda arm: (arm not in resident, arm)))
    row, column = _places(requests, arms)
    known = row >= 0
    row, column = row[known], column[known]
    mean = _joined(means)[known]
    here = _joined([request.here for request in requests])[known]
    away = _joined([request.away for request in requests])[known]
    loaded = np.full((len(arms), len(requests)), -np.inf)
    loaded[row, column] = mean - away
    floor = np.maximum(loaded.max(axis=0, initial=-np.inf), [request.without for request in requests])
    lift = np.zeros_like(loaded)
    lift[row, column] = np.maximum(mean - here - floor[column], 0)
    often = np.bincount(row, minlength=len(arms))
    return Demand(arms, lift, page_ins=np.bincount(row, away - here, minlength=len(arms)) / often)


def _places(requests: Sequence[Request], arms: Sequence[str]) -> tuple[Places, Places]:
    """Row and column of each candidate of each request; the row is -1 when the arm does not exist."""
    place = {arm: row for row, arm in enumerate(arms)}
    # The same few tuples come again and again, and looking up 256 times 100 names took longer than all the rest.
    rows = {names: np.array([place.get(arm, -1) for arm in names], np.intp) for names in {r.arms for r in requests}}
    counts = np.array([len(request.arms) for request in requests], np.intp)
    row = np.concatenate([np.zeros(0, np.intp), *(rows[request.arms] for request in requests)])
    return row, np.repeat(np.arange(len(requests)), counts)


def _joined(parts: Sequence[Array]) -> Array:
    return np.concatenate([np.zeros(0), *parts])
