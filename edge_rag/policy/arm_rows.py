"""What is known of many arms, a row for each, so that an operation on all of them is one call of numpy (`linucb`).

Rows are 1, 2, … in the order in which arms came. Row NOBODY is of no arm: what is known of one that never came.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from edge_rag.errors import InputError

Rows = npt.NDArray[np.void]

NOBODY = 0
ROOM = 16  # rows at first, doubled when they are full


class ArmRows:
    """Of each arm `pulls` counts its updates, and `clocks` are the decisions before the last one, as of which are

    `squares` [dimensions, dimensions] and `moments` [dimensions]: S and b of ridge regression;
    `turned`, which follows from them: "axes" are the eigenvectors of S in columns (Q), "spread" its eigenvalues,
    "moment" is Qᵀb. It is out of date in the rows that are `stale`; whoever changes S or b adds the row there.
    """

    def __init__(self, dimensions: int) -> None:
        self.stale: set[int] = set()
        self._rows: dict[str, int] = {}
        self._hold(np.zeros(ROOM, _learned(dimensions)), np.zeros(ROOM, _turned(dimensions)))
        self.turned["axes"][NOBODY] = np.eye(dimensions)

    def _hold(self, learned: Rows, turned: Rows) -> None:
        self._learned, self.turned = learned, turned
        self.clocks: npt.NDArray[np.int64] = learned["clock"]
        self.pulls: npt.NDArray[np.int64] = learned["pulls"]
        self.moments: npt.NDArray[np.float64] = learned["moment"]
        self.squares: npt.NDArray[np.float64] = learned["squares"]

    @property
    def names(self) -> tuple[str, ...]:
        """The arms in the order of their rows."""
        return tuple(self._rows)

    def find(self, names: Sequence[str]) -> list[int]:
        """The rows of these arms; NOBODY for those that are not there."""
        return [self._rows.get(name, NOBODY) for name in names]

    def put(self, name: str) -> int:
        """The row of an arm; a new one, of zeros, when it has none yet."""
        if (row := self._rows.get(name)) is None:
            row = self._rows[name] = 1 + len(self._rows)
            if row == len(self._learned):
                self._hold(_doubled(self._learned), _doubled(self.turned))
        return row

    def remove(self, name: str) -> None:
        """Take an arm out; the rows behind it move up. Idempotent."""
        if (gone := self._rows.pop(name, None)) is None:
            return
        for rows in (self._learned, self.turned):
            rows[gone:-1] = rows[gone + 1 :].copy()
            rows[-1:] = np.zeros(1, rows.dtype)
        self._rows = {name: row for row, name in enumerate(self._rows, start=1)}
        self.stale = {row - (row > gone) for row in self.stale if row != gone}

    def turn(self, rows: Iterable[int]) -> None:
        """Bring `turned` up to date in those of these rows that are stale."""
        if not (stale := sorted(self.stale.intersection(rows))):
            return
        spread, axes = np.linalg.eigh(self.squares[stale])
        self.turned["axes"][stale] = axes
        self.turned["spread"][stale] = np.maximum(spread, 0)  # below 0 only by rounding
        self.turned["moment"][stale] = np.matmul(self.moments[stale, None, :], axes)[:, 0, :]
        self.stale.difference_update(stale)

    def dump(self, names: Sequence[str]) -> bytes:
        """What was learned of these arms; what follows from that is left out."""
        return self._learned[self.find(names)].tobytes()

    def load(self, names: Sequence[str], data: bytes) -> None:
        """Put arms in as they were dumped. Raises InputError when that is not what `data` is."""
        dtype = self._learned.dtype
        if len(data) != len(names) * dtype.itemsize or len(set(names)) != len(names):
            raise InputError(f"{len(data)} bytes are not {len(names)} arms", field="data")
        rows = [self.put(name) for name in names]
        self._learned[rows] = np.frombuffer(data, dtype)
        if not (np.isfinite(self.squares).all() and np.isfinite(self.moments).all()):
            raise InputError("there are numbers in it that are none", field="data")
        self.stale.update(rows)


def as_place(rows: npt.NDArray[np.int64]) -> slice | npt.NDArray[np.int64]:
    """Rows in rising order as a slice when none is left out: no copy of a matrix for each of 1,000 arms."""
    first = int(rows[0]) if len(rows) else NOBODY
    alike = np.array_equal(rows, np.arange(first, first + len(rows)))
    return slice(first, first + len(rows)) if alike else rows


def _learned(dimensions: int) -> np.dtype[np.void]:
    """Little-endian, because it goes into files."""
    square = (dimensions, dimensions)
    return np.dtype([("clock", "<i8"), ("pulls", "<i8"), ("moment", "<f8", dimensions), ("squares", "<f8", square)])


def _turned(dimensions: int) -> np.dtype[np.void]:
    square = (dimensions, dimensions)
    return np.dtype([("spread", "f8", dimensions), ("moment", "f8", dimensions), ("axes", "f8", square)])


def _doubled(rows: Rows) -> Rows:
    return np.concatenate([rows, np.zeros_like(rows)])
