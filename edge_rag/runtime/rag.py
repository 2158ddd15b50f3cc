"""`EdgeRAG`: the library, the models and the answerer behind one object that any thread may use.

Opening it opens the database and nothing else. Models load when first needed: listing documents needs none, searching
the embedder, adding the embedder and the language model's vocabulary, asking everything.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from edge_rag.closing import Closing
from edge_rag.config import Settings, default_data_folder, load_settings, models_folder
from edge_rag.errors import ConfigError, NotFound, StorageError
from edge_rag.native.device import physical_cores
from edge_rag.native.embedder import Embedder
from edge_rag.native.llama import Model
from edge_rag.native.llama.geometry import Geometry
from edge_rag.records import AddReport, Answer, Document, Event, Filter, ModelKind, ModelSpec, Passage, Turn
from edge_rag.runtime import checked
from edge_rag.runtime.answering import Answerer, Question
from edge_rag.runtime.engine import Engine
from edge_rag.runtime.ingest import AddProgress, Ingester, possible_names, reembed
from edge_rag.runtime.kv_cache import KVCache
from edge_rag.runtime.parts import Home, make_cache, make_engine
from edge_rag.runtime.prompting import PromptBuilder
from edge_rag.runtime.retrieval import Retriever
from edge_rag.runtime.status import Status, collect
from edge_rag.store import journal, library
from edge_rag.store.database import Database
from edge_rag.store.manifest import bundled_manifest
from edge_rag.store.models import ModelFolder

EMBEDDER_KEY = "embedder"

logger = logging.getLogger(__name__)


class EdgeRAG(Closing):
    """A library of documents that can be asked. Use `EdgeRAG.open` in a `with`."""

    def __init__(self, folder: Path, settings: Settings, models: ModelFolder) -> None:
        self.folder = folder
        self.settings = settings
        self.models = models
        self._lock = threading.RLock()
        self._closing = ExitStack()
        self._database = self._closing.enter_context(Database(folder))
        self._parts: dict[str, Any] = {}
        self._closed = False

    @classmethod
    def open(cls, path: str | Path | None = None, *, settings: Settings | Mapping[str, Any] | None = None) -> Self:
        """Open the data folder `path` (default: the user's), creating it when missing.

        `settings` is a `Settings` or a mapping of dotted keys ({"retrieval.top_k": 8}) over file and environment.
        Raises StorageError when the folder cannot be used and ConfigError for a bad setting.
        """
        chosen = settings if isinstance(settings, Settings) else load_settings(settings)
        folder = Path(path).expanduser() if path is not None else default_data_folder()
        return cls(folder, chosen, ModelFolder(models_folder(chosen), bundled_manifest()))

    def close(self) -> None:
        """Cancel what runs and free everything. Idempotent."""
        with self._lock:
            self._closed = True
            self._parts.clear()
            self._closing.close()

    # --- documents ---------------------------------------------------------------------------------------------------

    def add(
        self,
        *paths: str | Path,
        include: str | Sequence[str] = (),
        exclude: str | Sequence[str] = (),
        prune: bool = False,
        progress: Callable[[AddProgress], None] | None = None,
    ) -> AddReport:
        """Add files and folders, or bring them up to date. Unreadable files are in the report and stop nothing."""
        given = checked.as_paths(paths)
        ingester = Ingester(self._database, self._embedder(), self._vocabulary().count_tokens, self.settings.ingest)
        self._claim_vectors()
        return ingester.add(
            given,
            include=checked.as_globs(include, "include"),
            exclude=checked.as_globs(exclude, "exclude"),
            prune=prune,
            progress=progress,
        )

    def remove(self, *paths: str | Path) -> list[Document]:
        """Remove documents by path, or all below a folder. Raises NotFound, removing none, when one is unknown."""
        removed: dict[int, Document] = {}
        with self._database.write() as connection:
            for path in checked.as_paths(paths):
                found = self._below(library.list_documents(connection), path)
                removed |= {document.id: document for document in found}
            for document_id in removed:
                library.remove_document(connection, document_id)
        return list(removed.values())

    def documents(self, where: Filter | None = None) -> list[Document]:
        """The documents in the library, by path."""
        with self._database.read() as connection:
            return library.list_documents(connection, checked.as_filter(where))

    def reembed(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Compute all vectors with the configured embedding model; needed after changing it. Returns the chunks."""
        embedder = self._embedder()
        with self._database.write() as connection:
            count = reembed(connection, embedder, progress)
            library.set_meta(connection, EMBEDDER_KEY, self._embedder_identity(embedder))
        self._retriever().index.clear()
        return count

    # --- questions ---------------------------------------------------------------------------------------------------

    def search(self, query: str, *, top_k: int | None = None, where: Filter | None = None) -> list[Passage]:
        """The passages for `query`, best first, without asking the language model."""
        question = self._question(query, top_k=top_k, where=where)
        return list(self._retriever().search(question.text, top_k=question.top_k, where=question.where).passages)

    def ask(self, question: str, **options: Any) -> Answer:
        """Answer a question; options as in `stream`."""
        answer = None
        for event in self.stream(question, **options):
            answer = event
        assert isinstance(answer, Answer)
        return answer

    def stream(
        self,
        question: str,
        *,
        history: Sequence[Turn] = (),
        where: Filter | None = None,
        top_k: int | None = None,
        instructions: str | None = None,
        **sampling: Any,
    ) -> Iterator[Event]:
        """Answer a question as a stream of events: `Sources` first, the `Answer` last.

        `sampling` overrides the settings' max_tokens, temperature, top_p, min_p, seed, stop. Raises InputError for a
        bad value or a question that cannot fit the context, before any work is done.
        """
        asked = self._question(
            question, history=history, where=where, top_k=top_k, instructions=instructions, sampling=sampling
        )
        return self._answerer().stream(asked)

    def feedback(self, answer_id: str, score: float, comment: str = "") -> None:
        """Say how good an answer was, from 0 (bad) to 1 (good); late is fine. Raises NotFound for an unknown id."""
        with self._database.write() as connection:
            journal.add_feedback(
                connection,
                checked.as_text(answer_id, "answer_id"),
                checked.converted(score, float, "score"),
                checked.as_text(comment, "comment"),
                now=time.time(),
            )

    def journal(self, limit: int = 20) -> list[journal.Entry]:
        """The last questions, newest first."""
        with self._database.read() as connection:
            return journal.newest(connection, limit=checked.as_limit(limit))

    # --- the house ---------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Load everything that answering needs now, instead of at the first question."""
        self._answerer()

    def status(self) -> Status:
        """What is stored, what is loaded here and how large it is, and the timings of the last answer."""
        with self._database.read() as connection:
            stored = library.counts(connection)
            asked = journal.count(connection)
            last = journal.newest(connection, limit=1)
        return collect(
            folder=self.folder,
            settings=self.settings,
            stored=stored,
            questions=asked,
            parts=dict(self._parts),
            last=last[0] if last else None,
        )

    def check(self) -> list[str]:
        """Every inconsistency in the stored library, in words; empty when it is whole."""
        with self._database.write() as connection:
            return list(library.check(connection))

    # --- parts, each made once when first needed ---------------------------------------------------------------------

    def _part(self, name: str, make: Callable[[], Any]) -> Any:
        with self._lock:
            if self._closed:
                raise StorageError("the library is closed", field=str(self.folder))
            if name not in self._parts:
                self._parts[name] = make()
            return self._parts[name]

    def _embedder(self) -> Embedder:
        def make() -> Embedder:
            spec = self._spec(self.settings.models.embedder, "embedder")
            return Embedder(self.models.path(spec.name), self.models.path(spec.tokenizer), threads=self._threads())

        embedder: Embedder = self._part("embedder", make)
        return embedder

    def _retriever(self) -> Retriever:
        def make() -> Retriever:
            self._check_vectors()
            return Retriever(self._database, self._embedder(), self.settings.retrieval)

        retriever: Retriever = self._part("retriever", make)
        return retriever

    def _spec(self, name: str, kind: ModelKind) -> ModelSpec:
        spec = self.models.spec(name)
        if spec.kind != kind:
            field = "models.llm" if kind == "llm" else f"models.{kind}"
            raise ConfigError(
                f"{name} is of kind {spec.kind}, not {kind}", field=field, remedy="see `edge-rag models list`"
            )
        return spec

    def _llm_file(self) -> Path:
        return self.models.path(self._spec(self.settings.models.llm, "llm").name)

    def _vocabulary(self) -> Model:
        loaded: Model | None = self._parts.get("model")
        if loaded is not None:
            return loaded
        vocabulary: Model = self._part(
            "vocabulary", lambda: self._closing.enter_context(Model(self._llm_file(), vocab_only=True))
        )
        return vocabulary

    def _model(self) -> Model:
        gpu_layers = self.settings.engine.gpu_layers
        model: Model = self._part(
            "model", lambda: self._closing.enter_context(Model(self._llm_file(), gpu_layers=gpu_layers))
        )
        return model

    def _engine(self) -> Engine:
        def make() -> Engine:
            cache = self._make_cache if self.settings.kv.enabled else None
            engine = make_engine(self._model(), self.settings, threads=self._threads(), cache=cache)
            return self._closing.enter_context(engine)

        engine: Engine = self._part("engine", make)
        return engine

    def _make_cache(self, geometry: Geometry | None) -> KVCache:
        home = Home(self._database, self.folder, self.models.spec(self.settings.models.llm).sha256)
        cache = make_cache(self.settings, home, geometry)
        self._parts["kv"] = self._closing.enter_context(cache)
        return cache

    def _answerer(self) -> Answerer:
        def make() -> Answerer:
            return Answerer(
                retriever=self._retriever(),
                embedder=self._embedder(),
                engine=self._engine(),
                builder=PromptBuilder(self._model()),
                settings=self.settings,
                model=self.settings.models.llm,
                record=self._record,
            )

        answerer: Answerer = self._part("answerer", make)
        return answerer

    def _record(self, answer: Answer) -> None:
        if self._closed:  # while it was written: the reader still gets what there is of it
            return
        try:
            with self._database.write() as connection:
                journal.record(connection, answer, now=time.time())
        except StorageError as error:  # the reader must not lose an answer because the disk is full
            logger.error("the answer %s could not be journalled: %s", answer.id, error)

    def _threads(self) -> int:
        return self.settings.engine.threads or physical_cores()

    def _question(
        self,
        text: str,
        *,
        history: Sequence[Turn] = (),
        where: Filter | None = None,
        top_k: int | None = None,
        instructions: str | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> Question:
        own = self.settings.answering.instructions if instructions is None else instructions
        return Question(
            text=checked.as_text(text, "question"),
            history=checked.as_history(history),
            where=checked.as_filter(where),
            top_k=self.settings.retrieval.top_k if top_k is None else top_k,
            instructions=checked.as_text(own, "instructions"),
            sampling=checked.as_sampling(self.settings, sampling or {}),
        )

    # --- which model made the vectors --------------------------------------------------------------------------------

    def _embedder_identity(self, embedder: Embedder) -> str:
        spec = self.models.spec(self.settings.models.embedder)
        return f"{spec.name} {spec.sha256} {embedder.dimensions}"

    def _claim_vectors(self) -> None:
        """Record the embedding model in a new library; refuse another one in an old library."""
        identity = self._embedder_identity(self._embedder())
        with self._database.write() as connection:
            if library.get_meta(connection, EMBEDDER_KEY) is None:
                library.set_meta(connection, EMBEDDER_KEY, identity)
        self._check_vectors()

    def _check_vectors(self) -> None:
        with self._database.read() as connection:
            stored = library.get_meta(connection, EMBEDDER_KEY)
        if stored is not None and stored != self._embedder_identity(self._embedder()):
            raise StorageError(
                f"the vectors were made by {stored.split()[0]}, not by {self.settings.models.embedder}",
                field="models.embedder",
                remedy="run `edge-rag reembed`, or set the embedder back",
            )

    @staticmethod
    def _below(documents: Sequence[Document], path: str | Path) -> list[Document]:
        names = possible_names(Path(path).expanduser())
        found = [document for document in documents if any(Path(document.path).is_relative_to(name) for name in names)]
        if not found:
            raise NotFound("is not in the library", field=str(path), remedy="see `edge-rag ls`")
        return found
