"""Numbers for Prometheus: counted from finished answers and requests, and read from the library's status when asked.

Labels are few and their values come from us, never from callers.
"""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edge_rag.records import AdapterStatus, Answer, EngineStatus, KVStatus, LearningStatus, RouterStatus
from edge_rag.runtime.status import Status

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
KV_SOURCES = ("live", "state", "ram", "ssd", "new", "recomputed")
PLAIN = "passages"  # as the arm that reads them: a label without a value would be none


class Metrics:
    """One server's numbers, in a registry of their own. Thread-safe."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "edge_rag_requests", "HTTP requests by route and status.", ["route", "status"], registry=self._registry
        )
        self._answers = Counter(
            "edge_rag_answers", "Answers by the reason of their end.", ["finish_reason"], registry=self._registry
        )
        self._tokens = Counter(
            "edge_rag_tokens",
            "Tokens: of prompts, of those from cache, and written.",
            ["kind"],
            registry=self._registry,
        )
        self._first = self._seconds("first_token", "From the call to the first token.")
        self._total = self._seconds("answer", "From the call to the end of the answer.")
        self._queued = self._seconds("queue", "Waiting for the engine.")
        self._registry.register(_FromStatus(status))

    def _seconds(self, name: str, what: str) -> Histogram:
        return Histogram(f"edge_rag_{name}_seconds", what, buckets=SECONDS, registry=self._registry)

    def requested(self, route: str, status: int) -> None:
        """Count a request."""
        self._requests.labels(route, str(status)).inc()

    def answered(self, answer: Answer) -> None:
        """Count a finished answer."""
        self._answers.labels(answer.finish_reason).inc()
        self._total.observe(answer.timings.total)
        if not answer.usage.prompt_tokens:  # the model was not asked
            return
        self._first.observe(answer.timings.first_token)
        self._queued.observe(answer.timings.queued)
        for kind in ("prompt", "cached", "completion"):
            self._tokens.labels(kind).inc(getattr(answer.usage, f"{kind}_tokens"))

    def cancelled(self) -> None:
        """Count an answer that nobody waited for to its end."""
        self._answers.labels("cancelled").inc()

    def text(self) -> bytes:
        """All numbers in Prometheus' text format; asks the library for its status."""
        return generate_latest(self._registry)


class _FromStatus(Collector):
    """What the library's status tells, at the moment of asking."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def describe(self) -> Iterator[Metric]:
        """Nothing: else the registry would ask for a status to learn the names."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The numbers of now."""
        status = self._status()
        yield _gauge("memory_bytes", "Resident memory of the process.", status.memory_used)
        yield _gauge("documents", "Documents in the library.", status.documents)
        yield _gauge("chunks", "Chunks in the library.", status.chunks)
        if status.engine:
            yield from _of_engine(status.engine)
        if status.kv:
            yield from _of_kv(status.kv)
        if status.adapters:
            yield from _of_adapters(status.adapters)
        if status.router:
            yield from _of_router(status.router)
        if status.learning:
            yield from _of_learning(status.learning)


def _of_engine(engine: EngineStatus) -> Iterator[Metric]:
    yield _gauge("engine_active", "Answers being written.", engine.active)
    yield _gauge("engine_waiting", "Requests that wait for the engine.", engine.waiting)
    yield _gauge("engine_cells", "Tokens that all answers may fill together.", engine.cells)
    yield _gauge("engine_cells_used", "Tokens that are filled or reserved.", engine.cells_used)
    yield _counter("engine_joined", "Requests answered along with an equal one.", engine.joined)
    yield _counter("engine_restarts", "Contexts made anew after a fault.", engine.restarts)
    yield _counter("engine_steps", "Batches that were run.", engine.steps)


def _of_kv(kv: KVStatus) -> Iterator[Metric]:
    passages = CounterMetricFamily(
        "edge_rag_kv_passages", "Passages of prompts by their KV's source.", labels=["source"]
    )
    for source in KV_SOURCES:
        passages.add_metric([source], getattr(kv.counters, source))
    yield passages
    kept = GaugeMetricFamily("edge_rag_kv_bytes", "Kept KV by tier.", labels=["tier"])
    kept.add_metric(["ram"], kv.ram_used)
    kept.add_metric(["disk"], kv.disk_used)
    yield kept
    yield _counter("kv_saved_seconds", "Estimated time that kept KV has saved.", kv.counters.seconds_saved)


def _of_adapters(adapters: AdapterStatus) -> Iterator[Metric]:
    pager = adapters.pager
    yield _gauge("adapters_ready", "Adapters that may answer.", adapters.ready)
    yield _gauge("adapters_resident", "Adapters in fast memory.", len(pager.resident))
    yield _gauge("adapter_bytes", "Fast memory that adapters take.", pager.used)
    yield _counter("adapter_page_ins", "Adapters loaded from disk.", pager.page_ins)
    yield _counter("adapter_page_in_seconds", "Time that loading them took.", pager.page_in_seconds)
    yield _counter("adapter_answers", "Answers given under an adapter.", adapters.answers)
    yield _counter("adapter_remembered", "Passages that an adapter kept out of prompts.", adapters.remembered)
    yield _counter("adapter_fallbacks", "Answers given from passages after their adapter failed.", adapters.fallbacks)


def _of_router(router: RouterStatus) -> Iterator[Metric]:
    yield _gauge("router_decisions", "Routed questions in the journal.", router.decisions)
    yield _gauge("router_hits", "Of these, such as needed no loading.", router.hits)
    yield _gauge("router_explored", "Of these, such as tried something.", router.explored)
    yield _counter("router_epochs", "Times that what stays in fast memory was chosen anew.", router.epochs)
    yield _gauge("router_wanted", "Adapters that are to stay in fast memory.", len(router.wanted))
    kinds: dict[str, tuple[str, Sequence[float | None]]] = {
        "chosen": ("Questions by the arm that answered them.", [arm.chosen for arm in router.arms]),
        "rewards": ("Rewards by arm.", [arm.rewards for arm in router.arms]),
        "reward_mean": ("Mean reward by arm.", [arm.mean for arm in router.arms]),
        "width": ("How unsure the last decision was of an arm.", [arm.width for arm in router.arms]),
    }
    for kind, (text, values) in kinds.items():
        family = GaugeMetricFamily(f"edge_rag_router_arm_{kind}", text, labels=["adapter"])
        for arm, value in zip(router.arms, values, strict=True):
            if value is not None:
                family.add_metric([arm.adapter or PLAIN], value)
        yield family


def _of_learning(learning: LearningStatus) -> Iterator[Metric]:
    yield _gauge("clusters", "Clusters of passages that are asked for together.", learning.clusters)
    yield _gauge("learning_questions", "Questions to learn from.", learning.items)
    yield _gauge("learning_answered", "Those that have the teacher's answer.", learning.taught)


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"edge_rag_{name}", what, value=value)


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(f"edge_rag_{name}", what, value=value)
