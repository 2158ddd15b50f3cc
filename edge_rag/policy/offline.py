"""What another way to choose would have got, computed from logged decisions and what their answers were worth.

That is known of the arms that were chosen, and of no others. Where arms were drawn by chance, with known probabilities,
it is enough:

* `ips`: each reward counts by how much likelier the other way would have chosen its arm (Horvitz and Thompson, 1952).
  Right on average, and far off when such arms were drawn seldom.
* `snips`: the same, divided by the sum of these weights instead of their number (Swaminathan and Joachims, 2015).
* `dr`: what was expected of the other way's choices, corrected by the rewards where that was wrong (Dudík, Langford and
  Li, 2011). Right on average when either is.
* `direct`: what was expected, alone. Only as right as that is.
* `matched`: the mean over the decisions in which both ways took the same arm (Li, Chu, Langford and Wang, WSDM 2011).
  Right on average when all arms were drawn alike; otherwise it says something of the questions on which both agree.

Where nothing was drawn by chance the first three mean nothing, and the result says so. The other way may look at
everything that was known before the answer, but not at what was drawn.
"""

import math
import operator
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from edge_rag.errors import InputError
from edge_rag.records import Record

Array = npt.NDArray[np.float64]
Method = Literal["ips", "snips", "dr", "direct", "matched"]

CLIP = 20.0
ROUNDING = 1e-9  # sums of probabilities may miss 1 by so much


class Judged(NamedTuple):
    """What a decision says of another way to choose. `reward` is that of the arm that was chosen.

    `logged` is the probability with which it was to be chosen, `wanted` the one that it has in the other way;
    `predicted` is what was expected of it, `expected` what was expected of the other way's choice. `possible` is the
    share of that choice which the log might have made too.
    """

    reward: float
    logged: float
    wanted: float
    predicted: float
    expected: float
    possible: float


class Estimate(Record, frozen=True):
    """An estimate of the mean reward, with its standard error; None where there is not enough to say.

    `size`: so many decisions of equal weight would say as much (Kish, 1965). `sound`: the log allows this method; how
    near the value is, is another question, of `error` and of `size`.
    """

    method: Method
    value: float | None
    error: float | None
    size: float
    sound: bool


class Evaluation(Record, frozen=True):
    """What another way to choose would have got, estimated by each method from `judged` decisions.

    The arms of `drawn` of them were drawn by chance; `clipped` ones would have counted more than they were let.
    `support` is the share of the other way's choices which the log might have made too. `note` says what is wrong, ''
    when nothing is.
    """

    judged: int
    drawn: int
    clipped: int
    support: float
    estimates: tuple[Estimate, ...]
    note: str


def judge(
    reward: float, place: int, probabilities: Sequence[float], means: Sequence[float], wanted: Sequence[float]
) -> Judged:
    """What a decision for the arm at `place` says of a way that would have chosen with the probabilities `wanted`.

    `probabilities` and `means` are those that were logged; all three are of the same n arms. Raises InputError when the
    arm that was chosen could not be, or they are not as many.
    """
    if not len(probabilities) == len(means) == len(wanted):
        raise InputError(f"{len(wanted)} are not of {len(means)} arms", field="wanted")
    if not probabilities[place] > 0:
        raise InputError(f"an arm with {probabilities[place]} cannot have been chosen", field="probabilities")
    expected = sum(map(operator.mul, wanted, means))
    possible = sum(share for share, logged in zip(wanted, probabilities, strict=True) if share and logged > 0)
    return Judged(reward, probabilities[place], wanted[place], means[place], expected, possible)


def evaluate(judged: Sequence[Judged], *, clip: float = CLIP) -> Evaluation:
    """The mean reward of another way to choose, estimated by each method.

    No reward counts more than `clip` times: then ips, snips and dr vary less, and ips and snips err towards what was
    drawn often. Raises InputError when `clip` is not above 0.
    """
    if not clip > 0:
        raise InputError(f"must be above 0, not {clip}", field="clip")
    rewards, logged, wanted, predicted, expected, possible = np.array(judged, np.float64).reshape(-1, 6).T
    ratios = wanted / logged
    weights = np.minimum(ratios, clip)
    size = effective(weights)
    drawn = int((logged < 1 - ROUNDING).sum())
    support = float(possible.mean()) if judged else 0.0
    sound = drawn > 0 and support >= 1 - ROUNDING
    return Evaluation(
        judged=len(judged),
        drawn=drawn,
        clipped=int((ratios > clip).sum()),
        support=support,
        estimates=(
            _mean("ips", weights * rewards, size, sound),
            _ratio("snips", weights, rewards, sound),
            _mean("dr", expected + weights * (rewards - predicted), size, sound),
            _mean("direct", expected, len(judged), True),
            _ratio("matched", wanted, rewards, True),
        ),
        note=_note(len(judged), drawn, support),
    )


def effective(weights: Array) -> float:
    """Kish's effective sample size of weights [n], (Σw)² / Σw²; 0 when all of them are."""
    largest = float(weights.max(initial=0))
    if not largest:
        return 0.0
    shares = weights / largest  # whose squares do not vanish
    return float(shares.sum() ** 2 / (shares * shares).sum())


def _mean(method: Method, values: Array, size: float, sound: bool) -> Estimate:
    if not size:
        return Estimate(method, None, None, 0.0, False)
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(method, float(values.mean()), error, size, sound)


def _ratio(method: Method, weights: Array, rewards: Array, sound: bool) -> Estimate:
    """A weighted mean. Its error is by the delta method; with equal weights it is that of a plain mean."""
    size = effective(weights)
    if not size:
        return Estimate(method, None, None, 0.0, False)
    shares = weights / weights.sum()
    value = float(shares @ rewards)
    spread = math.sqrt(float(((shares * (rewards - value)) ** 2).sum()))
    error = spread * math.sqrt(size / (size - 1)) if size > 1 + ROUNDING else None
    return Estimate(method, value, error, size, sound)


def _note(judged: int, drawn: int, support: float) -> str:
    if not judged:
        return "no answer was judged"
    if not drawn:
        return (
            "nothing was drawn by chance: only matched (where both agree) and direct (what was expected) say something"
        )
    if support < 1 - ROUNDING:
        return f"{1 - support:.1%} of its choices could never have been drawn: ips, snips and dr are not sound"
    return ""
