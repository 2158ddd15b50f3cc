"""The journal of routing: how questions were routed, and what the answers were worth. Functions take a connection.

Rows are written once and never edited, so that all the router has learned can be computed again from them
(`runtime.replaying`). They go with their question, and so with the documents that it was answered from.

A reward counts while its arm is the one that it was given to: an adapter that was removed, or that began anew, has
forgotten what was learned of it. Beginnings are put in order with rewards by the ids of those.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from msgspec.structs import replace

from edge_rag.errors import InputError
from edge_rag.records import Reward, RewardSource
from edge_rag.store.database import Connection

Context = npt.NDArray[np.float64]


class RoutedArm(Struct, frozen=True, eq=False):
    """An arm of a decision, with what the router saw of it (`context`, float64 [d]); see `Weighed`.

    `wait` are the seconds that somebody would have waited for it then, `here` if it had been resident, `away` if not.
    """

    adapter: str
    context: Context
    mean: float
    width: float
    wait: float
    here: float
    away: float
    probability: float
    resident: bool


class Routed(Struct, frozen=True, eq=False):
    """A decision: `chosen` of `arms`. `clock` counts the decisions before it; `space` names what contexts are made of.

    `explored`: not the arm of the best mean − price.
    """

    question_id: str
    clock: int
    space: str
    chosen: str
    explored: bool
    arms: tuple[RoutedArm, ...]


_ARM = ", ".join(RoutedArm.__struct_fields__)
_REWARD = ", ".join(Reward.__struct_fields__)
COUNTS = "(r.adapter = '' OR r.id > (SELECT last_reward FROM arms WHERE adapter = r.adapter))"


# --- decisions -------------------------------------------------------------------------------------------------------


def put(connection: Connection, routed: Routed) -> bool:
    """Write a decision, unless its question has been removed meanwhile; whether it was written."""
    connection.execute(
        "INSERT INTO routes SELECT ?1, ?2, ?3, ?4, ?5 WHERE EXISTS (SELECT 1 FROM questions WHERE id = ?1)",
        (routed.question_id, routed.clock, routed.space, routed.chosen, routed.explored),
    )
    if not connection.changes():
        return False
    connection.executemany(
        f"INSERT INTO route_arms (question_id, {_ARM}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                routed.question_id,
                arm.adapter,
                arm.context.astype("<f8").tobytes(),
                *(getattr(arm, name) for name in RoutedArm.__struct_fields__[2:]),
            )
            for arm in routed.arms
        ],
    )
    return True


def routed(connection: Connection, question_id: str) -> Routed | None:
    """How a question was routed, its arms by name; None when it was not, or is gone."""
    return next(_read(connection, "r.question_id = ?", question_id), None)


def history(connection: Connection, *, space: str) -> Iterator[Routed]:
    """All decisions whose contexts belong to `space`, by clock, their arms by name. Read within the transaction."""
    return _read(connection, "r.space = ?", space)


def _read(connection: Connection, condition: str, value: str) -> Iterator[Routed]:
    columns = ", ".join(f"a.{name}" for name in RoutedArm.__struct_fields__)
    rows: Iterable[Any] = connection.execute(
        f"""SELECT r.question_id, r.clock, r.space, r.chosen, r.explored, {columns}
            FROM routes r JOIN route_arms a ON a.question_id = r.question_id
            WHERE {condition} ORDER BY r.clock, r.question_id, a.adapter""",
        (value,),
    )
    for (question_id, clock, found, chosen, explored), group in itertools.groupby(rows, itemgetter(0, 1, 2, 3, 4)):
        yield Routed(question_id, clock, found, chosen, bool(explored), tuple(_arm(row[5:]) for row in group))


def _arm(row: Sequence[Any]) -> RoutedArm:
    adapter, context, mean, width, wait, here, away, probability, resident = row
    return RoutedArm(adapter, _context(context), mean, width, wait, here, away, probability, bool(resident))


def _context(data: bytes) -> Context:
    return np.frombuffer(data, "<f8").astype(np.float64)


def decisions(connection: Connection) -> int:
    """The number that the next decision gets: one more than the last that is still there."""
    count: int = connection.execute("SELECT coalesce(max(clock) + 1, 0) FROM routes").get
    return count


def clock(connection: Connection) -> int:
    """How many rewards have been given: no clock of a reward or an arm that is written down is later."""
    count: int = connection.execute(
        "SELECT max(coalesce((SELECT max(clock) + 1 FROM rewards), 0), coalesce((SELECT max(clock) FROM arms), 0))"
    ).get
    return count


# --- arms ------------------------------------------------------------------------------------------------------------


def begin_arm(connection: Connection, adapter: str, clock: int) -> bool:
    """Write that an arm begins, when `clock` rewards have been given; whether its adapter is still there.

    For an arm that had begun before, the rewards until now no longer count.
    """
    connection.execute(
        """INSERT OR REPLACE INTO arms SELECT ?1, ?2, (SELECT coalesce(max(id), 0) FROM rewards)
           WHERE EXISTS (SELECT 1 FROM adapters WHERE id = ?1)""",
        (adapter, clock),
    )
    return bool(connection.changes())


def arm_clocks(connection: Connection) -> dict[str, int]:
    """How many rewards had been given when each arm began, in the order in which they did."""
    # A row that is replaced gets a new rowid.
    rows: Iterable[Any] = connection.execute("SELECT adapter, clock FROM arms ORDER BY rowid")
    return dict(rows)


# --- rewards ---------------------------------------------------------------------------------------------------------


def put_reward(connection: Connection, reward: Reward) -> bool:
    """Write a reward, unless its question or this arm of it is gone; whether it was written.

    Raises InputError when its score is not from 0 to 1, or its weight below 0 or infinite.
    """
    if not 0 <= reward.score <= 1:
        raise InputError(f"must be from 0 to 1, not {reward.score}", field="score", remedy="0 is bad, 1 is good")
    if not 0 <= reward.weight < math.inf:
        raise InputError(f"must be at least 0 and finite, not {reward.weight}", field="weight")
    connection.execute(
        f"""INSERT INTO rewards ({_REWARD}) SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7
            WHERE EXISTS (SELECT 1 FROM route_arms WHERE question_id = ?1 AND adapter = ?2)""",
        tuple(getattr(reward, name) for name in Reward.__struct_fields__),
    )
    return bool(connection.changes())


def rewards(connection: Connection, *, space: str) -> list[tuple[Reward, Context]]:
    """The rewards that count of decisions in `space`, in the order in which they were given, with their arms' contexts.

    One that was given again is there again.
    """
    columns = ", ".join(f"r.{name}" for name in Reward.__struct_fields__)
    rows: Iterable[Any] = connection.execute(
        f"""SELECT a.context, {columns}
            FROM rewards r JOIN routes d ON d.question_id = r.question_id
                 JOIN route_arms a ON a.question_id = r.question_id AND a.adapter = r.adapter
            WHERE d.space = ? AND {COUNTS} ORDER BY r.id""",
        (space,),
    )
    return [(Reward(*row), _context(context)) for context, *row in rows]


def earlier(connection: Connection, question_id: str, adapter: str, source: RewardSource) -> Reward | None:
    """What a source has said so far of an arm's answer that counts, as it was learned; None when it has not.

    With clock and weight of the first time that it did, and the score of the last.
    """
    rows: list[Any] = connection.execute(
        f"""SELECT {_REWARD} FROM rewards r
            WHERE question_id = ? AND adapter = ? AND source = ? AND {COUNTS} ORDER BY id""",
        (question_id, adapter, source),
    ).fetchall()
    said = [Reward(*row) for row in rows]
    return corrected(said[0], said[-1]) if said else None


def corrected(first: Reward, last: Reward) -> Reward:
    """What is learned of a reward that was given again: as if it had been the last score at once."""
    return replace(first, score=last.score, given_at=last.given_at)


def worth(connection: Connection, *, space: str) -> dict[str, float]:
    """What the answers were worth that were given in `space`, by question: the last score of each source, weighted.

    Only what was chosen is judged here, whether or not its adapter is still there; unjudged answers are left out.
    """
    rows: Iterable[Any] = connection.execute(
        """SELECT question_id, sum(score * weight) / sum(weight)
           FROM (SELECT r.question_id, r.score, r.weight, max(r.id)
                 FROM rewards r JOIN routes d ON d.question_id = r.question_id AND d.chosen = r.adapter
                 WHERE d.space = ? GROUP BY r.question_id, r.source)
           GROUP BY question_id HAVING sum(weight) > 0""",
        (space,),
    )
    return dict(rows)


def without_reward(connection: Connection, *, limit: int) -> list[str]:
    """The last routed questions whose answers were finished and not reviewed yet, newest first."""
    rows = connection.execute(
        """SELECT r.question_id FROM routes r JOIN questions q ON q.id = r.question_id
           WHERE q.finish_reason IN ('stop', 'length')
             AND NOT EXISTS (SELECT 1 FROM rewards WHERE question_id = r.question_id AND source = 'review')
           ORDER BY r.clock DESC, r.question_id LIMIT ?""",
        (limit,),
    )
    return [question_id for (question_id,) in rows]
