"""What `status` tells: what is stored, what is loaded, how large it is, how long the last answer took."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_rag.config import Settings
from edge_rag.native import device
from edge_rag.native.llama import Model
from edge_rag.policy.budget import Budget, Threads, plan_threads
from edge_rag.policy.ledger import Account
from edge_rag.records import AdapterStatus, EngineStatus, KVStatus, LearningStatus, Record, RouterStatus, Timings, Usage
from edge_rag.runtime.engine import Engine
from edge_rag.runtime.parts import MEGABYTE
from edge_rag.store.database import FILE_NAME
from edge_rag.store.journal import Entry
from edge_rag.store.kv_audits import KVAgreement
from edge_rag.store.kv_rows import KVTotals
from edge_rag.store.library import Counts


class Loaded(Record, frozen=True):
    """Something in memory."""

    what: str
    name: str
    bytes: int


class Status(Record, frozen=True):
    """A snapshot. Sizes are bytes, times seconds; `last_…` are of the last answer in the journal.

    `kv_files` and `kv_bytes` are what all models have on disk; `kv` is the cache of the loaded one, None when none is.
    `budget` is what the loaded engine was given and why that is less than the settings ask for, `accounts` what has
    been claimed of which memory.
    """

    data: str
    documents: int
    chunks: int
    tokens: int
    questions: int
    database_bytes: int
    kv_files: int
    kv_bytes: int
    kv_quota: int
    llm: str
    embedder: str
    n_ctx: int
    loaded: tuple[Loaded, ...]
    memory_used: int
    memory_available: int
    machine: dict[str, str]
    threads: Threads
    accounts: tuple[Account, ...] = ()
    budget: Budget | None = None
    engine: EngineStatus | None = None
    kv: KVStatus | None = None
    kv_audits: KVAgreement | None = None
    adapters: AdapterStatus | None = None
    router: RouterStatus | None = None
    learning: LearningStatus | None = None
    last_timings: Timings | None = None
    last_usage: Usage | None = None


def collect(
    *,
    folder: Path,
    settings: Settings,
    stored: Counts,
    questions: int,
    kept: KVTotals,
    audits: KVAgreement | None,
    parts: Mapping[str, Any],
    last: Entry | None,
    router: RouterStatus | None = None,
) -> Status:
    """Put a status together from what is known; measures nothing."""
    engine: Engine | None = parts.get("engine")
    return Status(
        data=str(folder),
        documents=stored.documents,
        chunks=stored.chunks,
        tokens=stored.tokens,
        questions=questions,
        database_bytes=sum(file.stat().st_size for file in folder.glob(f"{FILE_NAME}*")),
        kv_files=kept.files,
        kv_bytes=kept.bytes,
        kv_quota=settings.kv.disk_mb * MEGABYTE if settings.kv.enabled else 0,
        llm=settings.models.llm,
        embedder=settings.models.embedder,
        n_ctx=engine.n_ctx if engine else settings.engine.n_ctx,
        loaded=tuple(_loaded(settings, parts)),
        memory_used=device.memory_used(),
        memory_available=device.memory_available(),
        machine=device.describe(),
        threads=plan_threads(device.physical_cores(), settings.engine.threads),
        accounts=parts["memory"].accounts.accounts() if "memory" in parts else (),
        budget=parts.get("budget"),
        engine=engine.status() if engine else None,
        kv=engine.assembler.kv_status() if engine else None,
        kv_audits=audits,
        adapters=parts["coverer"].status() if "coverer" in parts else None,
        router=router,
        learning=parts["learner"].status() if "learner" in parts else None,
        last_timings=last.timings if last else None,
        last_usage=last.usage if last else None,
    )


def _loaded(settings: Settings, parts: Mapping[str, Any]) -> list[Loaded]:
    loaded = []
    model, engine = parts.get("model"), parts.get("engine")
    if isinstance(model, Model):
        loaded.append(Loaded(what="language model", name=model.description, bytes=model.size))
    if isinstance(engine, Engine):
        loaded.append(Loaded(what="prefix state", name=settings.models.llm, bytes=engine.assembler.prefix_bytes))
    if "embedder" in parts:
        loaded.append(Loaded(what="embedding model", name=settings.models.embedder, bytes=0))
    if "retriever" in parts:
        loaded.append(Loaded(what="coarse vector index", name="sign codes", bytes=parts["retriever"].index.bytes))
    return loaded
