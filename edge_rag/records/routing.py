"""How an adapter was chosen for a question, what came of it, and what is kept in fast memory because of that."""

from typing import Literal

from edge_rag.records.base import Record

RewardSource = Literal["feedback", "review", "trial"]


class Weighed(Record, frozen=True):
    """An arm of a decision. `adapter` is '' for plain retrieval, where all passages are read.

    `mean` is the quality expected of its answer (0 to 1), `width` how unsure that is (in the same unit, before α).
    `here` are the seconds that somebody waits for it when the adapter is resident, `away` when it has to be loaded
    first. `score` = mean + α · width − price, where price is what those seconds cost that hold now.
    `probability` is the one with which it was to be chosen.
    """

    adapter: str
    mean: float
    width: float
    here: float
    away: float
    score: float
    probability: float
    resident: bool = True


class Route(Record, frozen=True):
    """A decision. `clock` counts the decisions before it; `explored`: not the arm of the best mean − price."""

    clock: int
    weighed: tuple[Weighed, ...]
    explored: bool = False


class Reward(Record, frozen=True):
    """What an answer was worth: `score` from 0 to 1, learned from with `weight` when `clock` others had been given.

    `feedback`: somebody said so; `review`: compared with the base model's answer from all passages; `trial`: the same
    of an answer that `adapter` gave while nobody asked.
    """

    question_id: str
    adapter: str
    clock: int
    given_at: float
    score: float
    weight: float
    source: RewardSource


class ArmStatus(Record, frozen=True):
    """An arm: how often it was chosen, its rewards and their mean (None: none yet), and whether it is resident.

    `width` is how unsure the last decision was of it.
    """

    adapter: str
    chosen: int
    rewards: int
    mean: float | None
    width: float
    resident: bool


class RouterStatus(Record, frozen=True):
    """The router and the residency controller. `hits` of `decisions` needed no loading, `explored` were trials.

    `wanted` are the adapters that are to stay in fast memory, those first that may leave first; `epochs` have ended and
    `page_ins` were made since this process began. Both are empty where no engine is loaded.
    """

    mode: str
    residency: str
    decisions: int
    hits: int
    explored: int
    arms: tuple[ArmStatus, ...] = ()
    wanted: tuple[str, ...] = ()
    epochs: int = 0
    page_ins: int = 0
