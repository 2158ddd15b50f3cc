"""A reward on its way from whoever gives it into the journal and the bandit.

It is journalled whether or not a router is loaded here; one that is learns from it at once, any other when it is next
made from the journal. Both do the same with the same numbers, in the same order.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from msgspec.structs import replace

from edge_rag.policy.linucb import Bandit
from edge_rag.policy.reward import WEIGHTS
from edge_rag.records import Reward
from edge_rag.store import routes
from edge_rag.store.database import Connection

Exam = Iterable[tuple[npt.NDArray[np.float64], float]]  # context [d] and F1 of each question, always in the same order


class Noted(Struct, frozen=True):
    """A reward that is in the journal, with what its arm had looked like [d], and the one that it corrects, if any.

    It counts for what is learned in `space`; not at all when its arm is gone or has not begun.
    """

    reward: Reward
    context: npt.NDArray[np.float64]
    earlier: Reward | None = None
    space: str = ""
    counts: bool = True

    def teach(self, bandit: Bandit) -> None:
        """Learn from it."""
        reward, earlier = self.reward, self.earlier
        if earlier is None:
            bandit.update(reward.adapter, self.context, reward.score, reward.weight, clock=reward.clock)
        else:
            change = reward.score - earlier.score
            bandit.correct(reward.adapter, self.context, change, since=earlier.clock, weight=earlier.weight)


def begin(bandit: Bandit, adapter: str, exam: Exam, *, clock: int) -> None:
    """Let an arm begin with what its exam said, when `clock` rewards have been given. It knows nothing else."""
    bandit.forget(adapter)
    for context, f1 in exam:
        bandit.update(adapter, context, f1, clock=clock)


def feedback(connection: Connection, question_id: str, score: float, *, clock: int, now: float) -> Reward | None:
    """What somebody said of an answer as a reward of the arm that gave it; None when its question was not routed."""
    routed = routes.routed(connection, question_id)
    if routed is None:
        return None
    return Reward(question_id, routed.chosen, clock, now, score, WEIGHTS["feedback"], "feedback")


def reward_noted(connection: Connection, reward: Reward) -> Noted | None:
    """Put a reward into the journal; None when its question was not routed, or not to be answered by that arm."""
    routed = routes.routed(connection, reward.question_id)
    arm = next((each for each in routed.arms if each.adapter == reward.adapter), None) if routed else None
    if arm is None:
        return None
    earlier = routes.earlier(connection, reward.question_id, reward.adapter, reward.source)
    if earlier:
        reward = replace(reward, weight=earlier.weight)
    routes.put_reward(connection, reward)
    counts = not reward.adapter or reward.adapter in routes.arm_clocks(connection)
    return Noted(reward, arm.context, earlier, routed.space if routed else "", counts)
