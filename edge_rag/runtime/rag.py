"""`EdgeRAG`: a library of documents that can be asked, behind one object that any thread may use.

Opening it opens the database and nothing else; models load when first needed (`runtime.house`).
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from edge_rag.closing import Closing
from edge_rag.config import Settings, default_data_folder, load_settings, models_folder
from edge_rag.errors import NotFound
from edge_rag.native.embedder import Vectors
from edge_rag.records import AddReport, Answer, Document, EngineStatus, Event, Filter, Passage, Turn, WarmReport
from edge_rag.runtime import checked
from edge_rag.runtime.answering import Question
from edge_rag.runtime.completing import complete
from edge_rag.runtime.embedded_by import EMBEDDER_KEY
from edge_rag.runtime.house import House
from edge_rag.runtime.ingest import AddProgress, Ingester, possible_names
from edge_rag.runtime.learned import Learned
from edge_rag.runtime.reembedding import reembed
from edge_rag.runtime.status import Status, collect
from edge_rag.runtime.warming import WarmProgress
from edge_rag.store import adapters, items, journal, kv_audits, kv_rows, library
from edge_rag.store.database import Connection
from edge_rag.store.manifest import bundled_manifest
from edge_rag.store.models import ModelFolder

AUDITS_SHOWN = 100  # the last ones, in `status`


class EdgeRAG(Learned, Closing):
    """A library of documents that can be asked. Use `EdgeRAG.open` in a `with`."""

    def __init__(self, folder: Path, settings: Settings, models: ModelFolder) -> None:
        self.folder = folder
        self.settings = settings
        self.models = models
        self._house = House(folder, settings, models)
        self._database = self._house.database

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
        self._house.close()

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
        ingester = Ingester(
            self._database, self._house.embedder(), self._house.vocabulary().count_tokens, self.settings.ingest
        )
        self._house.claim_vectors()
        report = ingester.add(
            given,
            include=checked.as_globs(include, "include"),
            exclude=checked.as_globs(exclude, "exclude"),
            prune=prune,
            progress=progress,
        )
        self._house.sweep_kv()
        return report

    def remove(self, *paths: str | Path) -> list[Document]:
        """Remove documents by path, or all below a folder. Raises NotFound, removing none, when one is unknown."""
        given = checked.as_paths(paths)
        with self._database.write() as connection:
            removed = self._named(library.list_documents(connection), given)
            for document_id in removed:
                library.remove_document(connection, document_id)
        self._house.sweep_kv()
        return list(removed.values())

    def documents(self, where: Filter | None = None) -> list[Document]:
        """The documents in the library, by path."""
        with self._database.read() as connection:
            return library.list_documents(connection, checked.as_filter(where))

    def reembed(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Compute all vectors with the configured embedding model; needed after changing it. Returns the chunks."""
        embedder = self._house.embedder()
        identity = self._house.embedder_identity(embedder)
        with self._database.read() as connection:
            learned = {each.id: adapters.texts_of(connection, each.id) for each in self.adapters()}
        vectors = {id: embedder.embed(texts) for id, texts in learned.items()}

        def settle(connection: Connection) -> None:
            library.set_meta(connection, EMBEDDER_KEY, identity)
            items.forget_vectors(connection)
            for id, texts in learned.items():
                adapters.put_vectors(connection, id, texts, vectors[id])

        count = reembed(self._database, embedder, settle, progress)
        self._house.retriever().index.clear()
        self._house.school.refresh()
        return count

    def warm(
        self,
        *paths: str | Path,
        hot: int | None = None,
        progress: Callable[[WarmProgress], None] | None = None,
    ) -> WarmReport:
        """Compute and keep the KV of passages before anybody asks: of the documents at or below `paths`, else of all.

        The most often used come first; `hot` is how many at most. Questions asked meanwhile go first. Raises NotFound
        for a path that is not in the library and ModelError when the model's passages cannot be kept.
        """
        given = checked.as_paths(paths) if paths else []
        named = self._named(self.documents(), given)
        limit = None if hot is None else checked.as_limit(hot)
        return self._house.warmer().warm(sorted(named) if paths else None, hot=limit, progress=progress)

    # --- questions ---------------------------------------------------------------------------------------------------

    def search(self, query: str, *, top_k: int | None = None, where: Filter | None = None) -> list[Passage]:
        """The passages for `query`, best first, without asking the language model."""
        question = self._question(query, top_k=top_k, where=where)
        return list(self._house.retriever().search(question.text, top_k=question.top_k, where=question.where).passages)

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
        timeout: float | None = None,
        private: bool = False,
        **sampling: Any,
    ) -> Generator[Event, None, None]:
        """Answer a question as a stream of events: `Sources` first, the `Answer` last.

        A `private` one is not journalled, and nothing is learned from it.

        After `timeout` seconds in the engine the answer ends with what has been written. `sampling` overrides the
        settings' max_tokens, temperature, top_p, min_p, seed, stop. Raises InputError for a bad value or a question
        that cannot fit the context, before any work is done, and Busy (while iterating) when too many requests wait.
        """
        asked = self._question(
            question,
            history=history,
            where=where,
            top_k=top_k,
            instructions=instructions,
            timeout=timeout,
            private=private,
            sampling=sampling,
        )
        return self._house.answerer().stream(asked)

    def complete(self, prompt: str, *, timeout: float | None = None, **sampling: Any) -> Generator[Event, None, None]:
        """Continue a text with the bare language model, without documents, chat template or journal.

        A stream of events: `Progress` and `Delta`, an `Answer` without passages last. Options as in `stream`. Raises
        InputError for a bad value or a prompt that does not fit the context, and Busy when too many requests wait.
        """
        chosen = checked.as_sampling(self.settings, sampling)
        limit = None if timeout is None else checked.converted(timeout, float, "timeout")
        return complete(self._house, checked.as_text(prompt, "prompt"), chosen, timeout=limit)

    def embed(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Unit vectors of `texts`, shape [len(texts), dimensions], float32; and how many tokens of them were read.

        Of each text the first 512 tokens are read.
        """
        given = checked.converted(list(texts), list[str], "texts")
        embedder = self._house.embedder()
        return embedder.embed(given), embedder.count_tokens(given)

    def feedback(self, answer_id: str, score: float, comment: str = "") -> None:
        """Say how good an answer was, from 0 (bad) to 1 (good); late is fine. Raises NotFound for an unknown id."""
        answer, value = checked.as_text(answer_id, "answer_id"), checked.converted(score, float, "score")
        said = checked.as_text(comment, "comment")
        self._house.school.feedback(answer, value, said)

    def journal(self, limit: int = 20) -> list[journal.Entry]:
        """The last questions, newest first."""
        with self._database.read() as connection:
            return journal.newest(connection, limit=checked.as_limit(limit))

    # --- the house ---------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Load everything that answering needs now, instead of at the first question."""
        self._house.answerer()

    @property
    def engine(self) -> EngineStatus | None:
        """What the engine does at this moment; None before it is loaded. Quick: asks nothing of disk or device."""
        return self._house.engine_status()

    def status(self) -> Status:
        """What is stored, what is loaded here and how large it is, and the timings of the last answer."""
        with self._database.read() as connection:
            stored = library.counts(connection)
            asked = journal.count(connection)
            kept = kv_rows.totals(connection)
            audits = kv_audits.mean_agreement(connection, self.settings.models.llm, AUDITS_SHOWN)
            last = journal.newest(connection, limit=1)
        return collect(
            folder=self.folder,
            settings=self.settings,
            stored=stored,
            questions=asked,
            kept=kept,
            audits=audits,
            parts=dict(self._house.made),
            last=last[0] if last else None,
            router=self.router() if "coverer" in self._house.made else None,
        )

    def check(self) -> list[str]:
        """Every inconsistency in the stored library, in words; empty when it is whole."""
        with self._database.write() as connection:
            return list(library.check(connection))

    def check_kv(self) -> list[str]:
        """Every disagreement between KV files and what the library knows of them; loads the language model."""
        return self._house.check_kv()

    def _question(
        self,
        text: str,
        *,
        history: Sequence[Turn] = (),
        where: Filter | None = None,
        top_k: int | None = None,
        instructions: str | None = None,
        timeout: float | None = None,
        private: bool = False,
        sampling: Mapping[str, Any] | None = None,
    ) -> Question:
        own = self.settings.answering.instructions if instructions is None else instructions
        return Question(
            text=checked.as_text(text, "question"),
            history=checked.as_history(history),
            where=checked.as_filter(where),
            top_k=self.settings.retrieval.top_k if top_k is None else top_k,
            instructions=checked.as_text(own, "instructions"),
            timeout=None if timeout is None else checked.converted(timeout, float, "timeout"),
            private=checked.converted(private, bool, "private"),
            sampling=checked.as_sampling(self.settings, sampling or {}),
        )

    @staticmethod
    def _named(documents: Sequence[Document], paths: Iterable[str | Path]) -> dict[int, Document]:
        """The documents at or below these paths, by id. Raises NotFound for a path without any."""
        by_path = {document.path: document for document in documents}
        named: dict[int, Document] = {}
        for path in paths:
            names = possible_names(Path(path).expanduser())
            # Thousands of paths may be given; all documents are gone through for those of folders only.
            found = [by_path[str(name)] for name in names if str(name) in by_path]
            found = found or [each for each in documents if any(Path(each.path).is_relative_to(name) for name in names)]
            if not found:
                raise NotFound("is not in the library", field=str(path), remedy="see `edge-rag ls`")
            named |= {document.id: document for document in found}
        return named
