"""Clusters of passages, and what the journal says of passages that are asked for together.

A cluster keeps its id for as long as it keeps its members. When members come, `changed_at` is after `trained_at`, and
when it is trained, `trained_at` is not before `changed_at`, whatever the clock says. When members go, a trigger forgets
that it was trained (`migrations`).
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edge_rag.errors import NotFound
from edge_rag.records import Asked, Cluster
from edge_rag.store.database import Connection

ANSWERED = ("stop", "length")
TICK = 0.001  # seconds that a change is after the training before it at least
FORGOTTEN = 10  # half-lives after which a question no longer counts: it would count a thousandth

_CLUSTERS = """
    SELECT c.id,
           (SELECT json_group_array(chunk_id ORDER BY chunk_id) FROM cluster_members WHERE cluster_id = c.id),
           (SELECT coalesce(sum(k.tokens), 0) FROM cluster_members m JOIN chunks k ON k.id = m.chunk_id
            WHERE m.cluster_id = c.id),
           c.weight, c.created_at, c.changed_at, c.trained_at, c.failure
    FROM clusters c"""


def asked_together(connection: Connection, *, now: float, half_life: float) -> list[Asked]:
    """The passages of each answered question, oldest question first; `half_life` in seconds.

    A question counts 1, half of that when it is `half_life` old, and so on; one from the future, as a clock that was
    set back leaves them, counts 1. Passages that are gone are left out, and so are questions that have none left.
    """
    rows: Iterable[Any] = connection.execute(
        """SELECT q.asked_at, json_group_array(p.chunk_id ORDER BY p.rank)
           FROM questions q JOIN question_passages p ON p.question_id = q.id JOIN chunks k ON k.id = p.chunk_id
           WHERE q.finish_reason IN (SELECT value FROM json_each(?)) AND q.asked_at > ?
           GROUP BY q.id ORDER BY q.asked_at, q.id""",
        (json.dumps(ANSWERED), now - FORGOTTEN * half_life),
    )
    return [
        Asked(weight=2.0 ** (-max(0.0, now - asked_at) / half_life), chunks=tuple(json.loads(chunks)))
        for asked_at, chunks in rows
    ]


def passage_tokens(connection: Connection) -> dict[int, int]:
    """Tokens of each passage that was ever asked for or is in a cluster, by chunk id."""
    rows: Iterable[Any] = connection.execute(
        """SELECT id, tokens FROM chunks
           WHERE id IN (SELECT chunk_id FROM question_passages UNION SELECT chunk_id FROM cluster_members)"""
    )
    return dict(rows)


def clusters(connection: Connection) -> list[Cluster]:
    """All clusters, by id."""
    return [_cluster(row) for row in connection.execute(f"{_CLUSTERS} ORDER BY c.id")]


def cluster(connection: Connection, cluster_id: int) -> Cluster:
    """The cluster with this id. Raises NotFound."""
    for row in connection.execute(f"{_CLUSTERS} WHERE c.id = ?", (cluster_id,)):
        return _cluster(row)
    raise NotFound("there is no cluster with this number", field=str(cluster_id), remedy="see `edge-rag clusters`")


def put_clusters(
    connection: Connection, groups: Sequence[frozenset[int]], weights: Sequence[float], *, now: float
) -> None:
    """Make `groups` of chunk ids the clusters, with their weights; chunks that are gone meanwhile are left out.

    A group that holds all members of a cluster is that cluster, with its id. Clusters that no group holds are removed.
    """
    present = _present(connection, groups)
    wanted = [(group & present, weight) for group, weight in zip(groups, weights, strict=True) if group & present]
    known = {known.id: frozenset(known.members) for known in clusters(connection)}
    places = _claimed(known, [group for group, _ in wanted])
    connection.execute(
        "DELETE FROM clusters WHERE id NOT IN (SELECT value FROM json_each(?))", (json.dumps(list(places.values())),)
    )
    for place, (group, weight) in enumerate(wanted):
        if place in places:
            _grow(connection, places[place], group - known[places[place]], weight, now)
        else:
            _create(connection, group, weight, now)


def note_training(connection: Connection, trained: Cluster, *, now: float, failure: str = "") -> bool:
    """Note that an adapter was tried for the cluster as it was read, and why that came to nothing ('' = it did not).

    Whether it was noted: not when it has changed or gone since, as what was trained is not the cluster of now.
    """
    if [known.members for known in clusters(connection) if known.id == trained.id] != [trained.members]:
        return False
    connection.execute(
        "UPDATE clusters SET trained_at = max(?, changed_at), failure = ? WHERE id = ?", (now, failure, trained.id)
    )
    return True


def _present(connection: Connection, groups: Iterable[frozenset[int]]) -> frozenset[int]:
    """Those chunks of the groups that are in the library."""
    ids = json.dumps(sorted(frozenset[int]().union(*groups)))
    rows = connection.execute("SELECT id FROM chunks WHERE id IN (SELECT value FROM json_each(?))", (ids,))
    return frozenset(chunk_id for (chunk_id,) in rows)


def _claimed(known: Mapping[int, frozenset[int]], groups: Sequence[frozenset[int]]) -> dict[int, int]:
    """Which cluster each group is: by the group's place, the id. Equal ones first, then the least grown ones."""
    grown = sorted(
        (len(group) - len(members), cluster_id, place)
        for (cluster_id, members), (place, group) in itertools.product(known.items(), enumerate(groups))
        if members <= group
    )
    places: dict[int, int] = {}
    for _, cluster_id, place in grown:
        if place not in places and cluster_id not in places.values():
            places[place] = cluster_id
    return places


def _grow(connection: Connection, cluster_id: int, added: Iterable[int], weight: float, now: float) -> None:
    connection.execute("UPDATE clusters SET weight = ? WHERE id = ?", (weight, cluster_id))
    if added:
        _add_members(connection, cluster_id, added)
        connection.execute(
            "UPDATE clusters SET changed_at = max(?, coalesce(trained_at + ?, ?)) WHERE id = ?",
            (now, TICK, now, cluster_id),
        )


def _create(connection: Connection, group: Iterable[int], weight: float, now: float) -> None:
    connection.execute(
        "INSERT INTO clusters (weight, created_at, changed_at, failure) VALUES (?, ?, ?, '')", (weight, now, now)
    )
    _add_members(connection, connection.last_insert_rowid(), group)


def _add_members(connection: Connection, cluster_id: int, members: Iterable[int]) -> None:
    connection.executemany("INSERT INTO cluster_members VALUES (?, ?)", [(cluster_id, member) for member in members])


def _cluster(row: Any) -> Cluster:
    values = dict(zip(Cluster.__struct_fields__, row, strict=True))
    return Cluster(**values | {"members": tuple(json.loads(row[1]))})
