"""The parts of one open library, each made once when it is first needed: models, engine, caches, and what uses them.

Listing documents needs none, searching the embedder, adding the embedder and the language model's vocabulary, asking
everything. What a part takes of memory is claimed before it is made.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from edge_rag.closing import Closing
from edge_rag.config import Settings
from edge_rag.errors import ConfigError, ModelError, StorageError
from edge_rag.native.device import physical_cores
from edge_rag.native.embedder import Embedder
from edge_rag.native.llama import Model
from edge_rag.native.llama.geometry import Geometry
from edge_rag.policy.budget import Threads, plan_threads
from edge_rag.policy.covering import Chosen
from edge_rag.policy.ledger import Claim, split
from edge_rag.records import Answer, EngineStatus, ModelKind, ModelSpec
from edge_rag.runtime import embedded_by
from edge_rag.runtime.answering import Answerer
from edge_rag.runtime.auditing import Auditor, decided_link
from edge_rag.runtime.engine import Engine
from edge_rag.runtime.idle import Idle, Step
from edge_rag.runtime.kv_cache import KVCache
from edge_rag.runtime.parts import (
    EMBEDDER_WORK,
    Home,
    Memory,
    admitted,
    fitted,
    gpu_share,
    layer_count,
    make_cache,
    make_engine,
    open_accounts,
    plan_engine,
    sweep_kv,
)
from edge_rag.runtime.prompting import Prompt, PromptBuilder
from edge_rag.runtime.retrieval import Retriever
from edge_rag.runtime.school import School
from edge_rag.runtime.warming import Warmer
from edge_rag.store import journal
from edge_rag.store.database import Database
from edge_rag.store.models import ModelFolder

logger = logging.getLogger(__name__)


class House(Closing):
    """The parts of the library in `folder`. Thread-safe; every method but `close` makes what it gives."""

    def __init__(self, folder: Path, settings: Settings, models: ModelFolder) -> None:
        self.folder = folder
        self.settings = settings
        self.models = models
        self._lock = threading.RLock()
        self.closing = ExitStack()
        self.database = self.closing.enter_context(Database(folder))
        self.made: dict[str, Any] = {}
        self.idle = Idle()
        self.school = School(self)
        self.closed = False

    def close(self) -> None:
        """Cancel what runs and free everything. Idempotent."""
        with self._lock:
            self.closed = True
            self.made.clear()
            self.closing.close()

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """The part called so, made now if it is not there. Raises StorageError when the library is closed."""
        with self._lock:
            if self.closed:
                raise StorageError("the library is closed", field=str(self.folder))
            if name not in self.made:
                self.made[name] = make()
            return self.made[name]

    def memory(self) -> Memory:
        """The account of what this process takes. The embedding model has its share from the start.

        Raises ModelError when there is not even room for that.
        """

        def make() -> Memory:
            memory, spec = open_accounts(self.settings), self._spec(self.settings.models.embedder, "embedder")
            with admitted(memory.accounts, Claim("embedding model", spec.size + EMBEDDER_WORK), model=spec.name):
                return memory

        memory: Memory = self.part("memory", make)
        return memory

    def embedder(self, *, answering: bool = False) -> Embedder:
        """The embedding model. If it is made for `answering`, it leaves a core to the engine."""

        def make() -> Embedder:
            spec, threads = self._spec(self.settings.models.embedder, "embedder"), self.threads()
            model, tokenizer = self.models.path(spec.name), self.models.path(spec.tokenizer)
            self.memory()
            return Embedder(model, tokenizer, threads=threads.embedder if answering else threads.engine)

        embedder: Embedder = self.part("embedder", make)
        return embedder

    def retriever(self) -> Retriever:
        """What searches. Raises StorageError when another model made the vectors."""

        def make() -> Retriever:
            embedder = self.embedder(answering=True)
            embedded_by.check(self.database, self.embedder_identity(embedder))
            return Retriever(self.database, embedder, self.settings.retrieval)

        retriever: Retriever = self.part("retriever", make)
        return retriever

    def _spec(self, name: str, kind: ModelKind) -> ModelSpec:
        spec = self.models.spec(name)
        if spec.kind != kind:
            field = "models.llm" if kind == "llm" else f"models.{kind}"
            raise ConfigError(
                f"{name} is of kind {spec.kind}, not {kind}", field=field, remedy="see `edge-rag models list`"
            )
        return spec

    def llm_file(self) -> Path:
        """The file of the language model. Raises ConfigError, ModelMissing."""
        return self.models.path(self._spec(self.settings.models.llm, "llm").name)

    def vocabulary(self) -> Model:
        """The language model, or as much of it as counts tokens."""
        loaded: Model | None = self.made.get("model")
        if loaded is not None:
            return loaded
        vocabulary: Model = self.part(
            "vocabulary", lambda: self.closing.enter_context(Model(self.llm_file(), vocab_only=True))
        )
        return vocabulary

    def model(self) -> Model:
        """The language model."""

        def make() -> Model:
            file, spec = self.llm_file(), self.models.spec(self.settings.models.llm)
            share = gpu_share(self.settings, lambda: layer_count(self.vocabulary()))
            with admitted(self.memory().accounts, split("weights", spec.size, share), model=spec.name):
                return self.closing.enter_context(Model(file, gpu_layers=self.settings.engine.gpu_layers))

        model: Model = self.part("model", make)
        return model

    def engine(self) -> Engine:
        """The engine, with its KV cache, as large as memory allows."""

        def make() -> Engine:
            model, memory = self.model(), self.memory()
            budget = plan_engine(model, self.settings, memory)
            for reason in budget.reasons:
                logger.warning("memory: %s", reason)
            self.closing.enter_context(self.idle)  # so that it is closed behind the engine, which ends its step
            with admitted(memory.accounts, *budget.claims, model=self.settings.models.llm):
                engine = self._make_engine(model, fitted(self.settings, budget))
            self.made["budget"] = budget
            return engine

        engine: Engine = self.part("engine", make)
        return engine

    def engine_status(self) -> EngineStatus | None:
        """What the engine does; None when there is none."""
        engine: Engine | None = self.made.get("engine")
        return engine.status() if engine else None

    def _make_engine(self, model: Model, settings: Settings) -> Engine:
        cache = partial(self._make_cache, settings) if settings.kv.enabled else None
        link = decided_link(self.database, settings.models.llm, settings.kv.link_tokens)
        file = self.school.folder.path if settings.router.mode != "off" else None
        engine = make_engine(model, settings, threads=self.threads().engine, cache=cache, adapter_file=file)
        engine.assembler.link = link
        return self.closing.enter_context(engine)

    def _make_cache(self, settings: Settings, geometry: Geometry | None) -> KVCache:
        home = Home(self.database, self.folder, self.models.spec(settings.models.llm).sha256)
        cache = self.closing.enter_context(make_cache(settings, home, geometry))
        self.made["kv"] = cache
        return cache

    def cache(self) -> KVCache:
        """The KV cache. Raises ConfigError when it is switched off."""
        self.engine()
        if "kv" not in self.made:
            raise ConfigError("keeping KV is switched off", field="kv.enabled", remedy="set kv.enabled to true")
        cache: KVCache = self.made["kv"]
        return cache

    def base(self) -> str:
        """The sha256 of the language model's file: what is learned belongs to just this one."""
        return self.models.spec(self.settings.models.llm).sha256

    def builder(self) -> PromptBuilder:
        """What makes prompts for the language model."""
        builder: PromptBuilder = self.part("builder", lambda: PromptBuilder(self.model()))
        return builder

    def warmer(self) -> Warmer:
        """What computes KV ahead. Raises ConfigError or ModelError when this cannot be done."""
        support = self.engine().assembler.support
        if support.geometry is None:
            raise ModelError(
                f"passages of this model cannot be kept: {support.reason}",
                field=self.settings.models.llm,
                remedy="use a model with plain rotary attention",
            )
        return Warmer(self.database, self.engine(), self.builder(), self.cache())

    def check_kv(self) -> list[str]:
        """Disagreements between KV files and their rows; [] when keeping KV is off."""
        self.engine()
        cache: KVCache | None = self.made.get("kv")
        return cache.faults() if cache else []

    def sweep_kv(self) -> None:
        """Remove the KV of documents that are gone, and what was learned from them; there may be new ones."""
        sweep_kv(self.database, self.folder)
        self.school.sweep()
        cache: KVCache | None = self.made.get("kv")
        if cache:
            cache.take_stock()
        self.idle.poke()

    def answerer(self) -> Answerer:
        """What answers questions."""

        def make() -> Answerer:
            answerer = Answerer(
                retriever=self.retriever(),
                embedder=self.embedder(),
                engine=self.engine(),
                builder=self.builder(),
                settings=self.settings,
                model=self.settings.models.llm,
                record=self._record,
                coverer=self.school.coverer(),
            )
            self._start_idle()
            return answerer

        answerer: Answerer = self.part("answerer", make)
        return answerer

    def _start_idle(self) -> None:
        engine, steps = self.engine(), self.idle_steps()
        if steps:
            self.idle.start([step for _, step in steps], lambda: engine.busy)

    def idle_steps(self) -> list[tuple[str, Step]]:
        """What is done while nobody asks, in words and as a step, the most important first."""
        steps: list[tuple[str, Step]] = self.part("idle steps", self._make_idle_steps)
        return steps

    def _make_idle_steps(self) -> list[tuple[str, Step]]:
        kv, engine, steps = self.settings.kv, self.engine(), list[tuple[str, Step]]()
        if kv.enabled and kv.idle and engine.assembler.support.geometry:
            steps = [("compared an answer with full prefill", self.auditor().next)]
            steps += [("computed the KV of a passage", self.warmer().next)]
        return [*steps, *self.school.idle_steps()]

    def auditor(self) -> Auditor:
        """What compares answers with those of full prefill."""

        def make() -> Auditor:
            return Auditor(self.database, self.engine(), self.settings.kv, model=self.settings.models.llm)

        auditor: Auditor = self.part("auditor", make)
        return auditor

    def _record(self, answer: Answer, prompt: Prompt | None, chosen: Chosen) -> None:
        if self.closed:  # while it was written: the reader still gets what there is of it
            return
        try:
            with self.database.write() as connection:
                if journal.record(connection, answer, now=time.time()):
                    self.school.note(connection, answer, chosen)
        except StorageError as error:  # the reader must not lose an answer because the disk is full
            logger.error("the answer %s could not be journalled: %s", answer.id, error)
        auditor: Auditor | None = self.made.get("auditor")
        if auditor and prompt and not prompt.adapter:
            auditor.sample(answer, prompt)
        self.idle.poke()

    def threads(self) -> Threads:
        """How many threads each of us may use."""
        return plan_threads(physical_cores(), self.settings.engine.threads)

    # --- which model made the vectors --------------------------------------------------------------------------------

    def embedder_identity(self, embedder: Embedder) -> str:
        """What the library's vectors are marked with."""
        return embedded_by.identity(self.models.spec(self.settings.models.embedder), embedder)

    def claim_vectors(self) -> None:
        """Record the embedding model in a new library; refuse another one in an old library."""
        embedded_by.claim(self.database, self.embedder_identity(self.embedder()))
