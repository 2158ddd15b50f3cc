"""Which adapters stay in fast memory, as a rule of `policy.residency` has it.

The rule is told of every answer when it has been given, off the critical path. What it wants to keep is told to the
pager at once, which lets the others go first; what of it is not there yet is loaded while nobody asks.
"""

import logging
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_rag.errors import EngineError, ModelError
from edge_rag.policy.demand import Request
from edge_rag.policy.linucb import Bandit
from edge_rag.policy.residency import Polar, Residency
from edge_rag.records import Route
from edge_rag.runtime.adapter_pager import Pager
from edge_rag.runtime.engine import Engine
from edge_rag.runtime.requests import Desk

PLAIN = ""

logger = logging.getLogger(__name__)


def as_request(route: Route, contexts: npt.NDArray[np.float64] | None, *, price: float, used: str = "") -> Request:
    """A decision as residency rules see it; `price` is that of a second."""
    arms = [each for each in route.weighed if each.adapter != PLAIN]
    plain = next((each for each in route.weighed if each.adapter == PLAIN), None)
    rows = [place for place, each in enumerate(route.weighed) if each.adapter != PLAIN]
    return Request(
        arms=tuple(each.adapter for each in arms),
        means=np.array([each.mean for each in arms]),
        widths=np.array([each.width for each in arms]),
        here=price * np.array([each.here for each in arms]),
        away=price * np.array([each.away for each in arms]),
        without=plain.mean - price * plain.here if plain else -np.inf,
        used=used,
        contexts=None if contexts is None else contexts[rows],
    )


class Keeper:
    """Keeps a pager to a rule. Any thread may tell it; `load_next` is for the idle thread."""

    def __init__(self, rule: Residency, pager: Pager) -> None:
        self._rule = rule
        self._pager = pager
        self._lock = threading.Lock()

    def forced(self, request: Request, allowance: float) -> str:
        """The arm that is to be tried whatever the router says; '' when there is none."""
        with self._lock:
            return self._rule.forced(request, allowance)

    def after(self, request: Request) -> None:
        """A question was answered."""
        with self._lock:
            self._rule.after(request)
            self._pager.want(self._rule.order)

    @property
    def wanted(self) -> tuple[str, ...]:
        """The adapters that are to be in fast memory, those first that may leave first."""
        with self._lock:
            return self._rule.order

    def tried(self) -> None:
        """An arm was tried while nobody asked."""
        with self._lock:
            if isinstance(self._rule, Polar):
                self._rule.tried()

    @property
    def epochs(self) -> int:
        """How often the set has been chosen anew."""
        return self._rule.epochs

    def load_next(self, engine: Engine) -> bool:
        """Load one of those that are wanted and not there; whether one was."""
        return any(self._loaded(engine, name) for name in self._pager.missing())

    def _loaded(self, engine: Engine, name: str) -> bool:
        def load(desk: Desk) -> None:
            with self._pager.held(name):
                pass

        try:
            if not self._pager.check(name).result():
                return False  # the next question about it finds out, too, and it is used no more
            engine.when_idle(load).result()
        except (EngineError, ModelError) as error:  # whoever needs it will be told
            logger.info("the adapter %s could not be loaded ahead: %s", name[:12], error)
            return False
        return True


def estimated(bandit: Bandit, requests: Sequence[Request]) -> list[npt.NDArray[np.float64]]:
    """The means of the arms of requests, as they are expected now."""
    names = [name for request in requests for name in request.arms]
    if not names:
        return [request.means for request in requests]
    seen = np.concatenate([np.asarray(request.contexts) for request in requests if request.arms])
    ends = np.cumsum([len(request.arms) for request in requests])[:-1]
    return np.split(bandit.means(names, seen), ends)
