"""The plain reconstruction of POLAR and POLAR+, as first simulated, to tell what was gained since."""

from collections import Counter
from collections.abc import Mapping

import numpy as np

from edge_rag.policy.demand import Means, Request
from edge_rag.policy.residency import Pace, Polar


class Plain(Polar):
    """Nothing is resident before the first epoch has ended. In each, every arm has `trials`, whatever they cost."""

    def __init__(self, sizes: Mapping[str, int], budget: int, pace: Pace, means: Means, trials: int = 0) -> None:
        super().__init__(sizes, budget, pace, means)
        self._trials = trials
        self._uses: Counter[str] = Counter()  # in this epoch

    def forced(self, request: Request, allowance: float) -> str:
        """The arm that was used least in this epoch, if trials of it are due; of equals the first."""
        used = [self._uses[arm] for arm in request.arms]
        return request.arms[int(np.argmin(used))] if min(used, default=self._trials) < self._trials else ""

    def _notice(self, request: Request) -> None:
        before = self.epochs
        super()._notice(request)
        self._uses[request.used] += 1
        if self.epochs > before:
            self._uses.clear()

    def _paged_in(self, arm: str) -> None:
        pass
