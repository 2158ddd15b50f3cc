"""How far an adapter reaches: for which questions it may stand in for its passages.

An adapter is good at what it was trained on and at what lies near it, and the cosine to the nearest trained question
predicts that. So its exam finds the least closeness at which held-out questions were still answered as the teacher
answers them, and at answer time nothing farther away takes the adapter. A trained question that it answered badly in
its exam keeps it from whatever is nearest to that question.
"""

from collections.abc import Sequence
from statistics import fmean

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float16] | npt.NDArray[np.float32]

ENOUGH = 10  # held-out questions; a mean of fewer says nothing
PASSED = 0.5  # F1 of one question, from which on it counts as answered
ONLY_TRAINED = 1.0  # the reach of an adapter that may be used for the questions it was trained on and for no others
# Storage in half precision and the batch that an encoder works in move the last digits. Measured with MiniLM (int8):
# the same question is at .9999 or above, one with two words exchanged at .990.
SAME = 0.999


def closeness(vector: Vectors, vectors: Vectors) -> tuple[int, float] | None:
    """Row and cosine of the nearest of `vectors` [n, d] to `vector` [d], all of unit length; None when n is 0.

    From SAME on the cosine counts as 1. Of equally near rows it is the first.
    """
    if not len(vectors):
        return None
    cosines = np.asarray(vectors, np.float32) @ np.asarray(vector, np.float32)
    nearest = int(cosines.argmax())
    cosine = float(cosines[nearest])
    return nearest, 1.0 if cosine >= SAME else cosine


def reach(closenesses: Sequence[float], f1s: Sequence[float], *, keep: float, enough: int = ENOUGH) -> float:
    """The least closeness such that the held-out questions at least so close have a mean F1 of `keep` or more.

    `closenesses` and `f1s` are of the same questions. Fewer than `enough` of them prove nothing. ONLY_TRAINED when
    there is no such closeness.
    """
    nearest_first = sorted(zip(closenesses, f1s, strict=True), reverse=True)
    least = ONLY_TRAINED
    for number, (close, _) in enumerate(nearest_first, start=1):
        ends_tie = number == len(nearest_first) or nearest_first[number][0] < close
        if ends_tie and number >= enough and fmean(f1 for _, f1 in nearest_first[:number]) >= keep:
            least = close
    return least


def may_use(vector: Vectors, vectors: Vectors, f1s: Sequence[float] | npt.NDArray[np.float32], *, reach: float) -> bool:
    """Whether an adapter may be used for the question with the embedding `vector` [d].

    `vectors` [n, d] are of the questions that it was trained on; `f1s` [n] is how each did in the exam, NaN when it was
    not asked.
    """
    found = closeness(vector, vectors)
    if found is None:
        return False
    nearest, close = found
    return close >= reach and not f1s[nearest] < PASSED
