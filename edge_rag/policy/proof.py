"""Whether an exported adapter says in llama.cpp what it said in torch, within the error of the quantised base.

The two never agree to the last digit: torch computes with the dequantised weights in float32, llama.cpp quantises
activations too. How far they are apart without the adapter is measured beside it, so that only what the adapter adds
counts. A wrong scale, a missing tensor or a permuted row moves distributions by far more.
"""

from collections.abc import Sequence
from statistics import fmean

import numpy as np
import numpy.typing as npt

TIMES = 4.0  # the error with the adapter may be so many times that without
SLACK = 0.01  # nats, and so much more: unquantised bases hardly differ at all

Floats = npt.NDArray[np.float32]


def divergence(ids: npt.NDArray[np.int32], logits: Floats, norm: float, other: Floats) -> float:
    """KL in nats of one distribution to another, over the likeliest tokens of the first and one bucket for all others.

    ids and logits [n] are the first one's likeliest tokens, `norm` the logarithm of the sum of all its exponentials;
    `other` has the logits of the whole vocabulary.
    """
    wide = other.astype(np.float64)
    q_log = wide[ids] - (np.log(np.exp(wide - wide.max()).sum()) + wide.max())
    p_log = logits.astype(np.float64) - norm
    p, q = np.exp(p_log), np.exp(q_log)
    rest_p, rest_q = max(1e-12, 1 - p.sum()), max(1e-12, 1 - q.sum())
    return float((p * (p_log - q_log)).sum() + rest_p * np.log(rest_p / rest_q))


def refuted(base: Sequence[float], adapter: Sequence[float]) -> str:
    """Why the export is wrong, '' when it is right. Both are divergences, without and with the adapter."""
    without, within = fmean(base), fmean(adapter)
    if within <= TIMES * without + SLACK:
        return ""
    return f"llama.cpp and torch differ by {within:.3f} nats with the adapter, and by {without:.3f} without it"
