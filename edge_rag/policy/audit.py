"""Are spliced answers still the model's own? Decided from audits: the same question with full prefill, compared.

Agreement (`policy.agreement`) is the token F1 of the two greedy answers; KL is that of their first token. Single audits
scatter widely (two good answers may share few words), so that nothing is decided before `ENOUGH` of them.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

ENOUGH = 20
LADDER = (0, 4, 8, 16, 32)  # link tokens
OFF = -1

Logits = npt.NDArray[np.float32]


def divergence(full: Logits, other: Logits) -> float:
    """KL(full ‖ other) of two next-token distributions given by their logits, in nats."""
    wanted, given = (x - np.logaddexp.reduce(x) for x in (full.astype(np.float64), other.astype(np.float64)))
    return max(0.0, float((np.exp(wanted) * (wanted - given)).sum()))


def next_link(link: int, agreements: Sequence[float], *, floor: float) -> int:
    """The number of link tokens to go on with after these audits of `link`; OFF when no number helped."""
    if link == OFF or len(agreements) < ENOUGH or sum(agreements) / len(agreements) >= floor:
        return link
    return next((step for step in LADDER if step > link), OFF)
