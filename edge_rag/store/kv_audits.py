"""Audits: how far an answer from stored states was from what a full prefill would have said.

Rows are written once. They go with their question, and so with the documents that it was answered from.
"""

from typing import Any

from edge_rag.records import Record
from edge_rag.store.database import Connection


class KVAudit(Record, frozen=True):
    """One audit. kl: divergence in nats of the next-token distributions; agreement: share of equal tokens (0..1).

    link_tokens: how many tokens at the start of each passage were computed anew. audited_at: seconds since the epoch.
    """

    question_id: str
    audited_at: float
    model: str
    link_tokens: int
    kl: float
    agreement: float


_AUDIT = ", ".join(KVAudit.__struct_fields__)


def put_audit(connection: Connection, audit: KVAudit) -> bool:
    """Write an audit, unless its question has been removed meanwhile; whether it was written."""
    connection.execute(
        f"INSERT INTO kv_audits ({_AUDIT}) SELECT ?1, ?2, ?3, ?4, ?5, ?6 "
        "WHERE EXISTS (SELECT 1 FROM questions WHERE id = ?1)",
        tuple(getattr(audit, name) for name in KVAudit.__struct_fields__),
    )
    return bool(connection.changes())


def recent_audits(connection: Connection, model: str, link_tokens: int, limit: int) -> list[KVAudit]:
    """The last audits of a model with this many link tokens, newest first."""
    rows: list[Any] = connection.execute(
        f"SELECT {_AUDIT} FROM kv_audits WHERE model = ? AND link_tokens = ? ORDER BY id DESC LIMIT ?",
        (model, link_tokens, limit),
    ).fetchall()
    return [KVAudit(*row) for row in rows]


class KVAgreement(Record, frozen=True):
    """Means over the last audits of a model: `audits` of them."""

    audits: int
    agreement: float
    kl: float


def mean_agreement(connection: Connection, model: str, limit: int) -> KVAgreement | None:
    """How well the last answers of a model agreed with full prefill; None when none was audited."""
    row: Any = connection.execute(
        """SELECT count(*), avg(agreement), avg(kl)
           FROM (SELECT agreement, kl FROM kv_audits WHERE model = ? ORDER BY id DESC LIMIT ?)""",
        (model, limit),
    ).get
    return KVAgreement(*row) if row[0] else None
