"""Sums over the journal of routing (`store.routes`) for `status`, and how one state of it is told from another."""

from collections.abc import Iterable
from typing import Any

from msgspec import Struct

from edge_rag.store.database import Connection
from edge_rag.store.routes import COUNTS


class ArmTotals(Struct, frozen=True):
    """Of an arm: how often it was chosen, its rewards and their mean, and how unsure its last decision was of it.

    Of a reward that was given again the last counts, and none from before an arm began anew.
    """

    chosen: int = 0
    rewards: int = 0
    mean: float | None = None
    width: float = 0.0


class RouteTotals(Struct, frozen=True):
    """Of all decisions: how many there were, took what was in fast memory, or tried something; and of each arm."""

    decisions: int
    hits: int
    explored: int
    arms: dict[str, ArmTotals]


def totals(connection: Connection) -> RouteTotals:
    """All sums. Arms whose adapter is gone are left out."""
    sums: Any = connection.execute(
        """SELECT count(*), coalesce(sum(a.resident), 0), coalesce(sum(r.explored), 0)
           FROM routes r JOIN route_arms a ON a.question_id = r.question_id AND a.adapter = r.chosen"""
    ).fetchall()[0]
    decisions, hits, explored = sums
    rows: Iterable[Any] = connection.execute(
        """SELECT a.adapter, sum(r.chosen = a.adapter), a.width, max(r.clock)
           FROM routes r JOIN route_arms a ON a.question_id = r.question_id
           WHERE a.adapter = '' OR a.adapter IN (SELECT id FROM adapters) GROUP BY a.adapter"""
    )
    rewards = {
        adapter: (count, mean)
        for adapter, count, mean in connection.execute(
            f"""SELECT adapter, count(*), sum(score * weight) / sum(weight)
                FROM (SELECT r.adapter, r.score, r.weight, max(r.id) FROM rewards r WHERE {COUNTS}
                      GROUP BY r.question_id, r.adapter, r.source)
                GROUP BY adapter"""
        )
    }
    arms = {
        adapter: ArmTotals(chosen, *rewards.get(adapter, (0, None)), width) for adapter, chosen, width, _ in list(rows)
    }
    return RouteTotals(decisions, hits, explored, arms)


def rows(connection: Connection) -> int:
    """How many decisions and rewards there are together."""
    count: int = connection.execute("SELECT (SELECT count(*) FROM routes) + (SELECT count(*) FROM rewards)").get
    return count


def mark(connection: Connection) -> str:
    """Differs whenever something was decided, rewarded, begun or forgotten."""
    parts: Any = connection.execute(
        """SELECT (SELECT coalesce(max(clock), -1) FROM routes), (SELECT count(*) FROM routes),
                  (SELECT count(*) FROM rewards), (SELECT coalesce(max(id), 0) FROM rewards),
                  (SELECT count(*) FROM arms), (SELECT coalesce(max(rowid), 0) FROM arms)"""
    ).fetchall()[0]
    return "-".join(map(str, parts))
