"""A library for tests in which only HTTP matters: `EdgeRAG`'s methods, whose answers are known and come at once."""

import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from edge_rag.config import Settings, load_settings
from edge_rag.errors import NotFound
from edge_rag.policy.budget import plan_threads
from edge_rag.policy.hindsight import Comparison, Replayed
from edge_rag.policy.offline import Estimate, Evaluation
from edge_rag.records import (
    Adapter,
    AdapterStatus,
    AddReport,
    Answer,
    ArmStatus,
    Citation,
    Cited,
    Cluster,
    ClusterView,
    Delta,
    Document,
    EngineStatus,
    Event,
    FileReport,
    Filter,
    GateReport,
    Item,
    Kept,
    KVCounters,
    KVStatus,
    LearningStatus,
    Lesson,
    PagerStatus,
    Passage,
    PassagePlan,
    Plan,
    Progress,
    Recipe,
    RouterStatus,
    Sources,
    Timings,
    Usage,
    WarmReport,
)
from edge_rag.runtime.ingest import AddProgress
from edge_rag.runtime.status import Status
from edge_rag.runtime.warming import WarmProgress

PASSAGE = Passage(
    chunk_id=7,
    document_id=3,
    ordinal=0,
    path="/notes/filters.md",
    title="Filters",
    heading="Filters › Membrane",
    page=None,
    text="The membrane lasts two years.",
    tokens=8,
    score=1.0,
    similarity=0.9,
    matched_words=2,
)
CITATION = Citation(n=1, start=0, end=10, score=0.8)
PLANS = (PassagePlan(7, 8, how="exact", source="live"), PassagePlan(8, 9, how="splice", source="ram", link=4))
KV = KVStatus("q8", "", 4, 10, 100, 1, 20, 200, 1, KVCounters(live=2, ssd=3, seconds_saved=1.5))
ENGINE = EngineStatus(slots=2, active=1, waiting=0, cells=512, cells_used=100, served=9, steps=40, last_step=None)
CLUSTER = Cluster(id=3, members=(7, 8), tokens=17, weight=9.5, created_at=1.0, changed_at=2.0)
VIEW = ClusterView(CLUSTER, (PASSAGE,), (Item(1, "logged", "How long?", (7,), 3.0, answer="Two years."),))
GATE = GateReport(
    seen=Kept(20, 0.9), used=Kept(18, 0.95), unseen=Kept(5, 0.6), bare=Kept(20, 0.1), reach=0.8, drift=0.01, passed=True
)
ADAPTER = Adapter(
    id="ab" * 32,
    cluster_id=3,
    members=(7, 8),
    bytes=5000,
    base="cd" * 32,
    layout=1,
    recipe=Recipe("ffn", "all", 16, 8, 900, 50_000, 60.0, 1_000_000, 0.25, "cpu"),
    gate=GATE,
    state="ready",
    reason="",
    pinned=False,
    made_at=4.0,
)
LEARNING = LearningStatus("cluster 3: training", 10, 40, "", clusters=2, items=30, taught=25)
LESSON = Lesson(cluster_id=3, passages=2, items=25, adapter=ADAPTER.id, gate=GATE, seconds=61.0)
ADAPTERS = AdapterStatus(
    4, PagerStatus((ADAPTER.id,), 5000, 256_000_000, 6, 0.5), answers=7, remembered=11, fallbacks=1
)
ROUTER = RouterStatus(
    mode="linucb",
    residency="polar",
    decisions=9,
    hits=8,
    explored=2,
    arms=(ArmStatus("", 5, 3, 0.75, 0.25, True), ArmStatus(ADAPTER.id, 4, 0, None, 0.5, False)),
    wanted=(ADAPTER.id,),
    epochs=1,
    page_ins=6,
)
UNJUDGED = Evaluation(0, 0, 0, 0.0, (Estimate("dr", None, None, 0.0, False),), "no answer was judged")
JUDGED = Evaluation(3, 1, 0, 1.0, (Estimate("dr", 0.75, 0.1, 2.5, True),), "")
COMPARISON = Comparison(
    decisions=8,
    left_out=1,
    ways=(Replayed("as it was", 8, 4.0, 0.625, 4, 3, 1, JUDGED), Replayed("lru", 8, 5.0, 0.75, 6, 6, 2, UNJUDGED)),
)


def answer(question: str, finish: Any = "stop") -> Answer:
    return Answer(
        id="abc",
        question=question,
        text="Two years [1].",
        passages=(PASSAGE,),
        citations=(CITATION,),
        usage=Usage(prompt_tokens=20, cached_tokens=12, completion_tokens=4),
        timings=Timings(retrieve=0.01, queued=0.02, first_token=0.3, total=0.5),
        finish_reason=finish,
        plan=Plan(passages=PLANS),
        model="fake",
    )


def events(question: str) -> list[Event]:
    return [
        Sources(id="abc", passages=(PASSAGE,), dropped=0),
        Progress(done=10, total=20),
        Delta("Two years"),
        Cited(CITATION),
        Delta(" [1]."),
        answer(question),
    ]


def document(path: str, number: int = 3, sha256: str = "0") -> Document:
    return Document(number, path, "Filters", "md", 100, sha256, "1/256", 1, 8, 1000.0)


class FakeRAG:
    """`errors`: what a question (or query, path, id) fails with, at once; `late`: what it fails with after `Sources`.

    A question in `gates` waits, after its `Sources`, until its gate is opened. `calls` are the calls, with their
    arguments; `closed` are the questions whose stream was closed before its end.
    """

    def __init__(self, folder: Path, **flags: Any) -> None:
        self.folder = folder
        given = {key.replace("__", "."): value for key, value in flags.items()}
        self.settings: Settings = load_settings({"engine.slots": 2, "engine.queue": 2} | given, environment={})
        self.errors: dict[str, Exception] = {}
        self.late: dict[str, Exception] = {}
        self.gates: dict[str, threading.Event] = {}
        self.held = threading.Semaphore(0)  # released whenever a question comes to its gate
        self.closed: list[str] = []
        self.ended = threading.Semaphore(0)  # released whenever a stream has ended, in whichever way
        self.calls: list[tuple[Any, ...]] = []
        self.stored: list[Document] = [document("/notes/filters.md")]
        self.adding: Callable[..., AddReport] | None = None
        self.lessons = [LESSON]
        self.learning = LEARNING
        self.is_closed = False
        self.engine: EngineStatus | None = None

    def close(self) -> None:
        self.is_closed = True
        for gate in self.gates.values():
            gate.set()

    def load(self) -> None:
        self._note("load")

    def _note(self, *call: Any) -> None:
        self.calls.append(call)
        for value in call:
            if isinstance(value, str) and value in self.errors:
                raise self.errors[value]

    def stream(self, question: str, **options: Any) -> Generator[Event, None, None]:
        self._note("stream", question, options)
        return self._events(question)

    def _events(self, question: str) -> Generator[Event, None, None]:
        sources, *others = events(question)
        try:
            yield sources
            if question in self.gates:
                self.held.release()
                self.gates[question].wait()
            if question in self.late:
                raise self.late[question]
            yield from others
        except GeneratorExit:
            self.closed.append(question)
            raise
        finally:
            self.ended.release()

    def search(self, query: str, *, top_k: int | None = None, where: Filter | None = None) -> list[Passage]:
        self._note("search", query, top_k, where)
        return [PASSAGE]

    def documents(self, where: Filter | None = None) -> list[Document]:
        self._note("documents", where)
        wanted = where.documents if where else ()
        return [each for each in self.stored if not wanted or each.path in wanted]

    def add(self, *paths: Any, **options: Any) -> AddReport:
        self._note("add", *map(str, paths), {key: value for key, value in options.items() if key != "progress"})
        if self.adding:
            return self.adding(*paths, **options)
        options["progress"](AddProgress(1, 1, str(paths[0])))
        return AddReport(tuple(FileReport(str(path), "added", 1) for path in paths), 0.1)

    def remove(self, *paths: Any) -> list[Document]:
        self._note("remove", *map(str, paths))
        gone = [each for each in self.stored if each.path in map(str, paths)]
        if not gone:
            raise NotFound("is not in the library", field=str(paths[0]), remedy="see `edge-rag ls`")
        self.stored = [each for each in self.stored if each not in gone]
        return gone

    def warm(self, *paths: Any, hot: int | None = None, progress: Callable[[WarmProgress], None]) -> WarmReport:
        self._note("warm", *map(str, paths), hot)
        progress(WarmProgress(1, 2, "/notes/filters.md"))
        return WarmReport(2, 1, 1, False, 0.5)

    def reembed(self, progress: Callable[[int, int], None]) -> int:
        self._note("reembed")
        progress(4, 8)
        return 8

    def clusters(self) -> list[Cluster]:
        self._note("clusters")
        return [CLUSTER]

    def cluster(self, cluster_id: int) -> ClusterView:
        self._note("cluster", cluster_id)
        return VIEW

    def adapters(self) -> list[Adapter]:
        self._note("adapters")
        return [ADAPTER]

    def adapter(self, adapter_id: str) -> Adapter:
        self._note("adapter", adapter_id)
        return ADAPTER

    def pin_adapter(self, adapter_id: str, pinned: bool = True) -> Adapter:
        self._note("pin_adapter", adapter_id, pinned)
        return replace(ADAPTER, pinned=pinned)

    def disable_adapter(self, adapter_id: str) -> Adapter:
        self._note("disable_adapter", adapter_id)
        return replace(ADAPTER, state="disabled", reason="it was disabled")

    def enable_adapter(self, adapter_id: str) -> Adapter:
        self._note("enable_adapter", adapter_id)
        return ADAPTER

    def delete_adapter(self, adapter_id: str) -> Adapter:
        self._note("delete_adapter", adapter_id)
        return ADAPTER

    def export_adapter(self, adapter_id: str, target: Any) -> Adapter:
        self._note("export_adapter", adapter_id, str(target))
        return ADAPTER

    def import_adapter(self, file: Any) -> Adapter:
        self._note("import_adapter", str(file))
        return ADAPTER

    def router(self) -> RouterStatus:
        self._note("router")
        return ROUTER

    def replay_router(self, rules: Sequence[str] = ("polar", "lru")) -> Comparison:
        self._note("replay_router", *rules)
        return COMPARISON

    def learn(
        self, *, least: float, until: float | None, progress: Callable[[LearningStatus], None] | None
    ) -> list[Lesson]:
        self._note("learn", least, until)
        if progress:
            progress(LEARNING)
        return self.lessons

    def idle_once(self) -> str:
        self._note("idle_once")
        return "learned"

    def feedback(self, answer_id: str, score: float, comment: str = "") -> None:
        self._note("feedback", answer_id, score, comment)

    def journal(self, limit: int = 20) -> list[Any]:
        self._note("journal", limit)
        return [{"id": "abc"}]

    def status(self) -> Status:
        self._note("status")
        return Status(
            data=str(self.folder),
            documents=1,
            chunks=2,
            tokens=3,
            questions=4,
            database_bytes=5,
            kv_files=6,
            kv_bytes=7,
            kv_quota=8,
            llm="fake",
            embedder="fake",
            n_ctx=512,
            loaded=(),
            memory_used=9,
            memory_available=10,
            machine={},
            threads=plan_threads(2, 0),
            engine=ENGINE,
            kv=KV,
            adapters=ADAPTERS,
            router=ROUTER,
            learning=self.learning,
        )
