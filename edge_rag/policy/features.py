"""What the bandit sees of a question and an arm: a few numbers, of which a row has at most length 1.

A row is: a constant, the question, and five things about the arm for this question, which are all 0 for plain
retrieval. The question is its embedding in few dimensions, since what must be seen before anything is known grows with
their square: projected on fixed random directions, orthonormal (Dasgupta and Gupta, "An elementary proof of a theorem
of Johnson and Lindenstrauss", 2003) and brought back to length 1. The directions follow from the tag alone: its sha256
is the key of a stream (SHAKE-256), so that no version of a random number generator changes them.

Each part is scaled so that its square is at most its share of a row's. The larger the share, the sooner the part is
learned: the constant first, for that is how good an arm is in general.

Rows of different spaces mean different things. The tag tells them apart: what was learned in one is worth nothing in
another. Whoever changes anything here gives VERSION its next number.
"""

import functools
import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from edge_rag.errors import InputError
from edge_rag.records import Record

Rows = npt.NDArray[np.float64]

VERSION = 1
CONSTANT, QUESTION, VIEW = 0.3, 0.2, 0.1  # shares of a row's square, VIEW for each of the five: 1 together
VIEWED = 5


class ArmView(Record, frozen=True):
    """An arm as this question finds it; all from 0 to 1, and 0 for plain retrieval.

    share: of the retrieved passages, how many it covers; scores: the same, each passage counted by its fused score;
    closeness: cosine to the nearest question that it was trained on; within: its exam allows this question; gate: the
    F1 that it kept in its exam near here.
    """

    adapter: str = ""
    share: float = 0.0
    scores: float = 0.0
    closeness: float = 0.0
    within: bool = False
    gate: float = 0.0


class Space(Struct, frozen=True):
    """What the numbers of a row mean: `encoder` identifies the embedding model (the hash of its file).

    `projected` is the number of dimensions of the question in a row.
    """

    encoder: str
    projected: int

    @property
    def tag(self) -> str:
        """The name of this space: what was learned under another name is of no use."""
        return f"{VERSION}-{self.projected}-{self.encoder}"

    @property
    def size(self) -> int:
        """Numbers in a row."""
        return 1 + self.projected + VIEWED

    def projection(self, dimensions: int) -> Rows:
        """[projected, dimensions]: orthonormal rows; orthonormal columns when there are more rows than columns."""
        return _projection(self.tag, self.projected, dimensions)


def contexts(space: Space, asked: npt.NDArray[np.float32], arms: Sequence[ArmView]) -> Rows:
    """[n, space.size]: a row for each of n arms, for the question with the embedding `asked` [d].

    What an arm shows is clipped to 0..1. Raises InputError when a number is not finite.
    """
    views = [(arm.share, arm.scores, arm.closeness, arm.within, arm.gate) for arm in arms]
    shown = np.array(views, np.float64).reshape(-1, VIEWED)
    if not (np.isfinite(asked).all() and np.isfinite(shown).all()):
        raise InputError("a question and its arms are described by finite numbers", field="contexts")
    rows = np.empty((len(arms), space.size))
    rows[:, 0] = math.sqrt(CONSTANT)
    rows[:, 1:-VIEWED] = math.sqrt(QUESTION) * _direction(space.projection(len(asked)) @ asked.astype(np.float64))
    rows[:, -VIEWED:] = math.sqrt(VIEW) * np.clip(shown, 0, 1)
    return rows


def _direction(vector: Rows) -> Rows:
    """A vector of length 1, or the zero vector."""
    return vector / (np.linalg.norm(vector) or 1.0)


@functools.lru_cache(maxsize=4)
def _projection(tag: str, projected: int, dimensions: int) -> Rows:
    """Q of the QR decomposition of normally distributed numbers: no direction is preferred."""
    longer, shorter = max(projected, dimensions), min(projected, dimensions)
    directions, upper = np.linalg.qr(_normal(tag, longer * shorter).reshape(longer, shorter))
    directions = directions * np.sign(np.diag(upper))  # which makes the decomposition unique, whoever computes it
    directions = directions if projected > dimensions else directions.T
    directions.flags.writeable = False  # all share it
    return directions


def _normal(seed: str, count: int) -> Rows:
    """Normally distributed numbers that follow from `seed` (Box and Muller, 1958)."""
    key = hashlib.sha256(seed.encode()).digest()
    bits = np.frombuffer(hashlib.shake_256(key).digest(16 * count), "<u8").reshape(2, count)
    uniform = ((bits >> 11) + 0.5) * 2.0**-53  # above 0 and below 1
    return np.asarray(np.sqrt(-2 * np.log(uniform[0])) * np.cos(2 * np.pi * uniform[1]))
