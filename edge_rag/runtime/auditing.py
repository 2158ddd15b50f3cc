"""The guard of quality: a sample of spliced answers is asked again with full prefill, while the engine is idle.

What comes out goes into the library (`store.kv_audits`); when a model's answers agree too little, more tokens are
linked, and in the end passages are no longer moved (`policy.audit`). What was decided is kept for the next start.
"""

import contextlib
import time
from collections import deque

import msgspec
from msgspec import Struct

from edge_rag.config import KV
from edge_rag.native.llama import Sampler
from edge_rag.policy.agreement import agreement
from edge_rag.policy.audit import ENOUGH, Logits, divergence, next_link
from edge_rag.records import Answer, Sampling
from edge_rag.runtime.engine import Engine
from edge_rag.runtime.prompting import Prompt
from edge_rag.runtime.requests import Desk
from edge_rag.store import library
from edge_rag.store.database import Database
from edge_rag.store.kv_audits import KVAudit, put_audit, recent_audits

WAITING = 32  # answers to be audited; of more the oldest are dropped
TOKENS = 24  # of each answer are compared
LINK_KEY = "kv_link"


class Decided(Struct, frozen=True):
    """The number of link tokens that audits have led to, for the one that was `asked` for in the settings."""

    asked: int
    link: int


def decided_link(database: Database, model: str, asked: int) -> int:
    """The number of link tokens to start with: the settings', unless audits have changed just that one."""
    with database.read() as connection:
        text = library.get_meta(connection, f"{LINK_KEY} {model}")
    with contextlib.suppress(msgspec.DecodeError):
        decided = msgspec.json.decode(text or "null", type=Decided | None)
        return decided.link if decided and decided.asked == asked else asked
    return asked


class Auditor:
    """Audits the answers of one model. `sample` may be called from any thread, `next` from one."""

    def __init__(self, database: Database, engine: Engine, settings: KV, *, model: str) -> None:
        self._database = database
        self._engine = engine
        self._settings = settings
        self._model = model
        self._waiting: deque[tuple[str, Prompt]] = deque(maxlen=WAITING)

    def sample(self, answer: Answer, prompt: Prompt) -> None:
        """Take an answer into the sample, or not: a share of those with moved passages, chosen by their (random) id."""
        moved = any(plan.how == "splice" for plan in answer.plan.passages)
        if moved and int(answer.id, 16) % 10_000 < self._settings.audit_share * 10_000:
            self._waiting.append((answer.id, prompt))

    def next(self) -> bool:
        """Audit one answer; whether there was one."""
        if not self._waiting:
            return False
        question_id, prompt = self._waiting.popleft()
        link = self._engine.assembler.link
        kl, agreed = self._engine.when_idle(lambda desk: _compare(desk, prompt)).result()
        audit = KVAudit(question_id, time.time(), self._model, link, kl, agreed)
        with self._database.write() as connection:
            put_audit(connection, audit)
            recent = recent_audits(connection, self._model, link, ENOUGH)
        self._decide(link, [entry.agreement for entry in recent])
        return True

    def _decide(self, link: int, agreements: list[float]) -> None:
        chosen = next_link(link, agreements, floor=self._settings.audit_floor)
        if chosen == link:
            return
        # On the engine's thread: a request that is being put together must not find another number half-way.
        self._engine.when_idle(lambda desk: desk.assembler.relink(chosen)).result()
        self._waiting.clear()  # they were put together in the old way
        decided = Decided(self._settings.link_tokens, chosen)
        with self._database.write() as connection:
            library.set_meta(connection, f"{LINK_KEY} {self._model}", msgspec.json.encode(decided).decode())


def _compare(desk: Desk, prompt: Prompt) -> tuple[float, float]:
    """KL of the first token and agreement of the answers, spliced and with full prefill."""
    spliced_logits, spliced = _answer(desk, prompt, desk.assemble(prompt).position)
    full_logits, full = _answer(desk, prompt, 0)
    return divergence(full_logits, spliced_logits), agreement(full, spliced)


def _answer(desk: Desk, prompt: Prompt, start: int) -> tuple[Logits, list[int]]:
    """Logits of the first token and the greedy answer, with the prompt read from `start` on."""
    context, written = desk.context, list[int]()
    logits = context.logits(desk.read(prompt.tokens[start:], start).place)
    with Sampler(Sampling()) as sampler:
        while len(written) < TOKENS and not context.model.ends_generation(token := sampler.sample(context)):
            written.append(token)
            desk.read([token], context.end(desk.sequence))
    desk.clear()
    return logits, written
