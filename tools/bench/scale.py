"""Search time against library size, up to a million chunks.

Vectors are spread around real ones: each is a real chunk's vector turned by a random angle whose cosine is uniform in
0.6..0.95. Texts are real sentences. Queries are real questions. Baseline is the faster of two exact searches over the
same vectors: the library's own scan and sqlite-vec's vec0 table, the latter in a file of its own.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from rich.console import Console
from rich.progress import track

from edge_rag.config import Settings
from edge_rag.native.device import memory_used
from edge_rag.policy.words import fts_query
from edge_rag.runtime.retrieval import Retriever
from edge_rag.store import library, vectors
from edge_rag.store.database import Connection, Database
from edge_rag.store.library import Vectors
from tools.bench import libraries
from tools.bench.metrics import agreement, mean, percentile
from tools.bench.report import Result, Row, at_least
from tools.bench.scale_build import Builder, Seeds

SIZES = (1_000, 10_000, 100_000, 1_000_000)
QUICK_SIZES = SIZES[:2]
CLAIMED_AT = 1_000_000
RESCORES = (500, 1000, 2000, 4000)
QUERIES, WARM_UP = 24, 3
LIMIT = 10
SPEED_UP, RECALL = 8.0, 0.98

Ways = dict[str, Callable[[int], Any]]


class Bench:
    """A growing library and the ways to search it; each way takes the number of a query."""

    def __init__(self, builder: Builder, settings: Settings, questions: Sequence[str]) -> None:
        embedder = libraries.embedder(settings)
        self.builder = builder
        self.settings = settings.retrieval
        self.questions = list(questions)
        self.vectors: Vectors = embedder.embed(self.questions)
        self.index = vectors.CoarseIndex()
        # Always coarse, as in a large library, so that sizes can be compared.
        always_coarse = replace(settings.retrieval, exact_limit=0)
        self.retriever = Retriever(builder.database, embedder, always_coarse)

    def ways(self, connection: Connection) -> Ways:
        """What is timed."""
        return {
            "exact: library scan": partial(self.exact, connection),
            "exact: sqlite-vec vec0": lambda query: self.builder.vec0_search(self.vectors[query], LIMIT),
            "coarse": partial(self.coarse, connection, self.settings.rescore),
            "BM25": lambda query: library.search_words(
                connection, fts_query(self.questions[query]), limit=self.settings.candidates
            ),
            "whole Retriever.search": lambda query: self.retriever.search(self.questions[query]),
        }

    def exact(self, connection: Connection, query: int) -> list[int]:
        """Ids by the library's exact search."""
        return [found for found, _ in vectors.search_exact(connection, self.vectors[query], limit=LIMIT)]

    def coarse(self, connection: Connection, rescore: int, query: int) -> list[int]:
        """Ids by the library's coarse search."""
        hits = vectors.search(connection, self.index, self.vectors[query], limit=LIMIT, exact_limit=0, rescore=rescore)
        return [found for found, _ in hits]


def measure(
    seeds: Seeds, questions: Sequence[str], settings: Settings, work: Path, *, sizes: Sequence[int], console: Console
) -> Result:
    """Grow a library through `sizes` and time every way of searching it at each."""
    result = Result(notes=_notes())
    with ExitStack() as stack:
        database = stack.enter_context(Database(work / "scale"))
        builder = stack.enter_context(Builder(database, work / "scale" / "vec0.db", seeds))
        bench = Bench(builder, settings, _spread(questions, QUERIES + WARM_UP))
        for size in sizes:
            built = builder.grow(size)
            console.print(f"{size:,} chunks built in {built:.0f} s, {builder.bytes / 2**30:.2f} GiB on disk")
            with database.read() as connection:
                rows, recall, ratio = measure_size(bench, connection, size)
                result.rows += rows
                if size == max(sizes):
                    result.rows += list(rescore_rows(bench, connection, size))
            if size == CLAIMED_AT:
                result.claims.append(at_least("1M chunks: coarse is faster than exact by", ratio, SPEED_UP, "×"))
                result.claims.append(at_least(f"1M chunks: recall@{LIMIT} of coarse against exact", recall, RECALL))
    return result


def _spread(questions: Sequence[str], count: int) -> list[str]:
    step = max(1, len(questions) // count)
    return [questions[place * step % len(questions)] for place in range(count)]


def measure_size(bench: Bench, connection: Connection, size: int) -> tuple[list[Row], float, float]:
    """Rows for one size, recall of the coarse search, and how much faster it is than the faster exact one."""
    ways = bench.ways(connection)
    started = time.perf_counter()
    bench.coarse(connection, LIMIT, 0)  # the index is filled at the first search
    filled = time.perf_counter() - started
    times, found = alternate(ways, f"{size:,} chunks")
    truth = found["exact: library scan"]
    recall = {
        name: mean([agreement(hits, true) for hits, true in zip(found[name], truth, strict=True)])
        for name in ("exact: sqlite-vec vec0", "coarse")
    }
    medians = {name: percentile(taken, 0.5) for name, taken in times.items()}
    baseline = min(value for name, value in medians.items() if name.startswith("exact"))
    rows: list[Row] = [
        {
            "table": "search time",
            "chunks": size,
            "way": name,
            "p50 ms": 1000 * medians[name],
            "p95 ms": 1000 * percentile(taken, 0.95),
            "× baseline": baseline / medians[name],
            f"recall@{LIMIT}": recall.get(name),
            "index bytes": bench.index.bytes if name == "coarse" else None,
            "index filled s": filled if name == "coarse" else None,
            "process MiB": memory_used() // 2**20,
        }
        for name, taken in times.items()
    ]
    return rows, recall["coarse"], baseline / medians["coarse"]


def alternate(ways: Ways, what: str) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    """Seconds and results of each way for each query, the ways taking turns; the first queries only warm up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, list[Any]] = {name: [] for name in ways}
    for query in track(range(QUERIES + WARM_UP), description=what, transient=True):
        for name, search in ways.items():
            started = time.perf_counter()
            hits = search(query)
            if query >= WARM_UP:
                times[name].append(time.perf_counter() - started)
                found[name].append(hits)
    return times, found


def rescore_rows(bench: Bench, connection: Connection, size: int) -> Iterator[Row]:
    """Recall and time of the coarse search for several numbers of rescored candidates."""
    ways: Ways = {str(rescore): partial(bench.coarse, connection, rescore) for rescore in RESCORES}
    times, found = alternate({"exact": partial(bench.exact, connection), **ways}, "rescore")
    for rescore in RESCORES:
        hits = found[str(rescore)]
        yield {
            "table": "candidates rescored",
            "chunks": size,
            "rescore": rescore,
            "p50 ms": 1000 * percentile(times[str(rescore)], 0.5),
            "p95 ms": 1000 * percentile(times[str(rescore)], 0.95),
            f"recall@{LIMIT}": mean([agreement(a, b) for a, b in zip(hits, found["exact"], strict=True)]),
            f"worst recall@{LIMIT}": min(agreement(a, b) for a, b in zip(hits, found["exact"], strict=True)),
        }


def _notes() -> list[str]:
    return [
        f"{QUERIES} queries after {WARM_UP} to warm up, the ways taking turns; warm page cache. '× baseline' compares "
        "medians with the faster exact search. Exact and coarse return the 10 nearest, BM25 the settings' candidates; "
        "the whole search includes embedding the question, and is coarse at every size.",
        "Synthetic vectors: cosine to a real chunk's vector uniform in 0.6..0.95, the rest Gaussian and orthogonal.",
    ]
