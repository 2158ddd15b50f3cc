"""The journal of routing gone through again: to make the router's state anew, and to ask what would have been better.

Neither needs an engine or a model. Functions take an open connection inside a transaction.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from edge_rag.errors import InputError
from edge_rag.policy.caching_rules import RULES, rule
from edge_rag.policy.demand import Request
from edge_rag.policy.hindsight import Account, Comparison, Keeping, Moment, as_it_was, without_adapters
from edge_rag.policy.linucb import Bandit
from edge_rag.policy.offline import CLIP
from edge_rag.policy.residency import EPOCH, Residency
from edge_rag.records import Reward
from edge_rag.runtime.rewarding import Exam, Noted, begin
from edge_rag.store import adapters, routes
from edge_rag.store.database import Connection

AS_IT_WAS = "as it was"
WITHOUT_ADAPTERS = "without adapters"


# --- the state -------------------------------------------------------------------------------------------------------


def rebuild(
    connection: Connection,
    space_tag: str,
    *,
    dimensions: int,
    ridge: float,
    discount: float,
    seeds: Callable[[str], Exam],
) -> Bandit:
    """The state that was learned from what the journal holds, to the bit: from exams and rewards.

    `seeds` gives an arm's exam; that of plain retrieval ('') is learned from before the first decision, that of an
    adapter when it began. Rewards for decisions in other spaces are left out, since their contexts mean something else.
    Raises InputError when a context has not `dimensions` numbers.
    """
    bandit = Bandit(dimensions, ridge=ridge, discount=discount)
    begin(bandit, "", seeds(""), clock=0)
    for adapter, clock in routes.arm_clocks(connection).items():
        begin(bandit, adapter, seeds(adapter), clock=clock)
    standing: dict[tuple[str, str, str], Reward] = {}
    for reward, context in routes.rewards(connection, space=space_tag):
        key = reward.question_id, reward.adapter, reward.source
        earlier = standing.get(key)
        Noted(reward, context, earlier).teach(bandit)
        standing[key] = routes.corrected(earlier, reward) if earlier else reward
    bandit.clock = routes.clock(connection)
    return bandit


# --- the past --------------------------------------------------------------------------------------------------------


def compare(
    connection: Connection,
    space_tag: str,
    policies: Sequence[str],
    *,
    budget: int,
    second_price: float,
    epoch: int = EPOCH,
    clip: float = CLIP,
) -> Comparison:
    """Would one of these residency rules have done better? Those of `policy.caching_rules`, with `budget` bytes.

    Adapters that are gone are no candidates. `second_price` is the price of a second of waiting in quality, `epoch` the
    length of an epoch in decisions, `clip` as in `policy.offline`. Raises InputError when there is no such rule.
    """
    sizes = {adapter.id: adapter.bytes for adapter in adapters.adapters(connection)}
    accounts = [Account(AS_IT_WAS, as_it_was), Account(WITHOUT_ADAPTERS, without_adapters)]
    accounts += [Account(name, Keeping(_rule(name, sizes, budget, epoch))) for name in policies]
    worth = routes.worth(connection, space=space_tag)
    decisions = left_out = 0
    for routed in routes.history(connection, space=space_tag):
        moment = as_moment(routed, sizes, second_price=second_price)
        if moment is None:
            left_out += 1
            continue
        decisions += 1
        for account in accounts:
            account.take(moment, worth.get(routed.question_id))
    return Comparison(decisions, left_out, tuple(account.result(clip=clip) for account in accounts))


def _rule(name: str, sizes: Mapping[str, int], budget: int, epoch: int) -> Residency:
    if name not in RULES:
        raise InputError(f"there is no rule {name!r}", field="rules", remedy="known are " + ", ".join(RULES))
    return rule(name, sizes, budget, epoch=epoch)


def as_moment(routed: routes.Routed, known: Collection[str], *, second_price: float) -> Moment | None:
    """A decision as one between plain retrieval and the `known` adapters; None when it took another one.

    `second_price` makes prices of seconds.
    """
    arms = {arm.adapter: arm for arm in routed.arms if not arm.adapter or arm.adapter in known}
    taken, plain = arms.get(routed.chosen), arms.pop("", None)
    if taken is None or plain is None:
        return None
    rows = np.array([(arm.mean, arm.width, arm.here, arm.away) for arm in arms.values()], np.float64)
    means, widths, here, away = rows.reshape(-1, 4).T
    names = tuple(arms)
    request = Request(
        arms=names,
        means=means,
        widths=widths,
        here=second_price * here,
        away=second_price * away,
        without=plain.mean - second_price * plain.wait,
        used=routed.chosen,
    )
    return Moment(
        request,
        place=names.index(routed.chosen) + 1 if routed.chosen else 0,
        paid=second_price * taken.wait,
        hit=taken.resident,
        means=(plain.mean, *means.tolist()),
        probabilities=(plain.probability, *(arm.probability for arm in arms.values())),
    )
