"""What the engine does."""

from edge_rag.records.base import Record


class Step(Record, frozen=True):
    """One batch of the engine, of one lane: so many tokens of the prompt that is being read, one of each answer."""

    lane: str
    reading: int
    writers: tuple[int, ...]


class EngineStatus(Record, frozen=True):
    """What the engine does: requests being served and waiting; `cells` are tokens that all may fill together.

    `joined` requests asked exactly what was being answered already, and were answered along with it. `silent` is for
    how many seconds it has begun no step although there is work. `restarts` counts contexts made anew after a fault of
    ours; `failure` says why it has ended for good, "" while it has not.
    """

    slots: int
    active: int
    waiting: int
    cells: int
    cells_used: int
    served: int
    steps: int
    last_step: Step | None
    silent: float = 0.0
    joined: int = 0
    restarts: int = 0
    failure: str = ""
