"""What an arm's answer to a question will be worth, learned from what its answers were worth: disjoint LinUCB.

Li, Chu, Langford and Schapire, "A contextual-bandit approach to personalized news article recommendation" (WWW 2010,
algorithm 1): quality = ⟨θ, x⟩ with one θ for each arm, found by ridge regression, and an arm is chosen by its mean + α
widths of its confidence interval. Here a price is taken off as well, which is known when the choice is made (seconds of
waiting). It is never learned from: θ would depend on what happens to be in fast memory.

Old observations fade, the ridge does not (Russac, Vernade and Cappé, "Weighted linear bandits for non-stationary
environments", NeurIPS 2019): A = ridge · I + Σ γ^age · w · x xᵀ. Their width needs a second matrix of squared weights;
xᵀA⁻¹x is never less than theirs, so a little more is tried here.

S = Σ γ^age · w · x xᵀ and b = Σ γ^age · w · r · x are all that is known of an arm, as of its last update. They fade
when it is updated again. Until then g = γ^(decisions since) is one number, and with S = Q Λ Qᵀ and y = Qᵀx

    mean = g · yᵀ (ridge + g Λ)⁻¹ Qᵀb        width² = yᵀ (ridge + g Λ)⁻¹ y

are exact for every g at the price of one product of matrix and vector. No inverse is ever updated or divided by γ,
which reached 1e26 and NaN in directions that nobody asked about (docs/router.md). Q is found when it is first needed
after an update, so many updates in a row cost little.

What is learned does not depend on when somebody asked for estimates, nor on the order of events of different arms: the
same events in the same order for each arm give the same bits.

Not thread-safe.
"""

import math
from collections.abc import Sequence
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from edge_rag.errors import InputError
from edge_rag.policy.arm_rows import NOBODY, ArmRows, as_place
from edge_rag.records import Record

Vector = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]

FORMAT = 1  # of a dump
MOST = 1024  # dimensions
TIE = 1e-12  # scores that differ by no more are equal: they were added up in another order


class Estimates(Struct, frozen=True, eq=False):
    """Of n arms, the quality that is expected (`means` [n], 0 to 1) and how unsure that is (`widths` [n], before α)."""

    means: Vector
    widths: Vector


class Decision(Record, frozen=True):
    """The place of the chosen arm, and of all arms the score and the probability with which it was to be chosen.

    `explored`: it is not the arm of the best mean − price.
    """

    index: int
    scores: tuple[float, ...]
    explored: bool
    probabilities: tuple[float, ...]


class _Dump(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    format: int
    dimensions: int
    ridge: float
    discount: float
    clock: int
    names: tuple[str, ...]
    learned: bytes


class Bandit:
    """What was learned of each arm, for contexts of `dimensions` numbers.

    An observation counts `discount` (γ) times as much after each decision; `clock` is how many there have been. Raises
    InputError when dimensions are not 1 to 1024, the ridge is not above 0, or the discount not above 0 and up to 1.
    """

    def __init__(self, dimensions: int, *, ridge: float = 1.0, discount: float = 1.0) -> None:
        _require(1 <= dimensions <= MOST, "dimensions", dimensions, f"from 1 to {MOST}")
        _require(0 < ridge < math.inf, "ridge", ridge, "above 0")
        _require(0 < discount <= 1, "discount", discount, "above 0 and at most 1")
        self.dimensions = dimensions
        self.ridge = ridge
        self.discount = discount
        self.clock = 0
        self._arms = ArmRows(dimensions)

    def arms(self) -> tuple[str, ...]:
        """The arms of which something was learned."""
        return self._arms.names

    def pulls(self, name: str) -> int:
        """How many updates an arm has had."""
        return int(self._arms.pulls[self._arms.find([name])[0]])

    def tick(self) -> None:
        """A decision was made."""
        self.clock += 1

    # --- what is expected ---------------------------------------------------------------------------------------------

    def estimate(self, names: Sequence[str], contexts: Vector) -> Estimates:
        """What is expected of each of these arms in its own context (`contexts` [n, dimensions]).

        Of an arm that was never updated the mean is 0 and the width |x| / √ridge. Raises InputError when the contexts
        have another shape.
        """
        self._check_shape(names, contexts)
        found = self._arms.find(names)
        self._arms.turn(found)
        rows = np.asarray(found, np.int64)
        order = np.argsort(rows)
        place = as_place(rows[order])
        turned, faded = self._arms.turned[place], self._faded(place)
        along = np.matmul(contexts[order, None, :], turned["axes"])[:, 0, :]
        shares = along / (self.ridge + faded * turned["spread"])
        means, widths = np.empty((2, len(rows)))
        means[order] = faded[:, 0] * np.einsum("nd,nd->n", shares, turned["moment"])
        widths[order] = np.sqrt(np.einsum("nd,nd->n", shares, along))
        return Estimates(means, widths)

    def means(self, names: Sequence[str], contexts: Vector) -> Vector:
        """The means alone, as `estimate` gives them: for few arms that repeat in very many contexts."""
        self._check_shape(names, contexts)
        rows = self._arms.find(names)
        distinct = sorted(set(rows))
        self._arms.turn(distinct)
        turned, faded = self._arms.turned[distinct], self._faded(distinct)
        shares = faded * turned["moment"] / (self.ridge + faded * turned["spread"])
        thetas = np.zeros((1 + len(self._arms.names), self.dimensions))
        thetas[distinct] = np.matmul(turned["axes"], shares[:, :, None])[:, :, 0]
        return np.asarray(np.einsum("nd,nd->n", contexts, thetas[rows]))

    def settle(self) -> None:
        """Do now what an estimate would have to do first for arms that were updated, so that nobody waits for it."""
        self._arms.turn(self._arms.stale)

    def _faded(self, place: slice | list[int] | Counts) -> Vector:
        """What is known of arms counts so much now, [n, 1]."""
        # A clock that went back (a journal restored from a copy) makes nothing surer than it was.
        since = np.maximum(self.clock - self._arms.clocks[place], 0)
        return np.asarray(self.discount**since)[:, None]

    def _check_shape(self, names: Sequence[str], contexts: Vector) -> None:
        if contexts.shape != (len(names), self.dimensions):
            raise InputError(f"{contexts.shape} is no shape for {len(names)} contexts", field="contexts")

    # --- what is learned ----------------------------------------------------------------------------------------------

    def update(
        self, name: str, context: Vector, reward: float, weight: float = 1.0, *, clock: int | None = None
    ) -> None:
        """An answer of this arm was worth `reward` (0 to 1); that was said after `clock` decisions (None: now).

        `context` [dimensions] is the one in which it was chosen. Raises InputError when something is out of range.
        """
        _require(0 <= reward <= 1, "reward", reward, "from 0 to 1")
        self._check(context, weight)
        arms, row = self._arms, self._arms.put(name)
        observed = (weight * self._fade(row, self.clock if clock is None else clock)) * context
        arms.squares[row] += np.multiply.outer(observed, context)
        arms.moments[row] += reward * observed
        arms.pulls[row] += 1
        arms.stale.add(row)

    def correct(self, name: str, context: Vector, change: float, *, since: int, weight: float = 1.0) -> None:
        """The update of this arm at the clock `since` should have had a reward greater by `change` (−1 to 1).

        `context` and `weight` are those of that update. Nothing happens when the arm was forgotten. Raises InputError
        when something is out of range.
        """
        _require(-1 <= change <= 1, "change", change, "from -1 to 1")
        self._check(context, weight)
        row = self._arms.find([name])[0]
        if row != NOBODY:
            self._arms.moments[row] += (weight * self._fade(row, since) * change) * context
            self._arms.stale.add(row)

    def forget(self, name: str) -> None:
        """Nothing is known of this arm any more: its file is gone, or is another one. Idempotent."""
        self._arms.remove(name)

    def _check(self, context: Vector, weight: float) -> None:
        _require(0 <= weight < math.inf, "weight", weight, "at least 0")
        if context.shape != (self.dimensions,) or not math.isfinite(context.dot(context)):
            raise InputError(f"a context is {self.dimensions} finite numbers", field="context")

    def _fade(self, row: int, clock: int) -> float:
        """Bring a row to this clock unless it is there or later; what something of `clock` still counts in that row."""
        arms = self._arms
        since = clock - int(arms.clocks[row])
        if since <= 0:
            return self.discount**-since
        arms.clocks[row] = clock
        arms.squares[row] *= self.discount**since
        arms.moments[row] *= self.discount**since
        return 1.0

    # --- what is kept -------------------------------------------------------------------------------------------------

    def dump(self) -> bytes:
        """All that was learned; two bandits that know the same give the same bytes."""
        names = tuple(sorted(self._arms.names))
        learned = self._arms.dump(names)
        return msgspec.msgpack.encode(
            _Dump(FORMAT, self.dimensions, self.ridge, self.discount, self.clock, names, learned)
        )

    @classmethod
    def load(cls, data: bytes) -> Self:
        """The bandit that was dumped, to the bit. Raises InputError when `data` is no dump, or not a whole one."""
        try:
            dump = msgspec.msgpack.decode(data, type=_Dump)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputError(f"no whole dump: {error}", field="data") from error
        _require(dump.format == FORMAT, "data", f"a dump of format {dump.format}", f"of format {FORMAT}")
        bandit = cls(dump.dimensions, ridge=dump.ridge, discount=dump.discount)
        bandit.clock = dump.clock
        bandit._arms.load(dump.names, dump.learned)
        return bandit


def decide(
    estimates: Estimates,
    prices: Vector,
    *,
    alpha: float | Vector,
    resident: Flags,
    pulls: Counts,
    allowance: float = math.inf,
    explore: float = 0.0,
    drawn: float = 1.0,
) -> Decision:
    """The arm of the best score = mean + `alpha` · width − price; of n arms ([n] each, α too if it is not one for all).

    Of equal scores: the resident arm, then the one of the fewest pulls, then the first. The arm of the best mean −
    price may always be chosen, another one only if its price is at most `allowance` above that one's.

    With `explore` > 0 the caller draws a number (`drawn`, uniform, from 0 to below 1). Below `explore` an arm is taken
    that may be chosen, each with the same probability. Raises InputError when there is no arm.
    """
    _require(len(prices) >= 1, "prices", len(prices), "at least one")
    values = estimates.means - prices
    scores = values + alpha * estimates.widths
    best = _first(values, resident, pulls)
    allowed = prices <= prices[best] + allowance
    greedy = _first(np.where(allowed, scores, -np.inf), resident, pulls)
    places = np.flatnonzero(allowed)
    index = int(places[int(drawn / explore * len(places))]) if drawn < explore else greedy
    probabilities = np.where(allowed, explore / len(places), 0.0)
    probabilities[greedy] += 1 - explore
    return Decision(index, tuple(scores.tolist()), index != best, tuple(probabilities.tolist()))


def _first(scores: Vector, resident: Flags, pulls: Counts) -> int:
    """The place of the best score, ties by rule."""
    tied = np.flatnonzero(scores >= scores.max() - TIE)
    if len(tied) == 1:
        return int(tied[0])
    return int(tied[np.lexsort((pulls[tied], ~resident[tied]))[0]])  # lexsort is stable: the first of equals


def _require(holds: bool, field: str, value: Any, wanted: str) -> None:
    if not holds:
        raise InputError(f"{value} is not {wanted}", field=field)
