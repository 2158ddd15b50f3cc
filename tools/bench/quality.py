"""Retrieval quality: how much of the references the first chunks hold, and how early the first good chunk comes.

Every dataset is a library of its own. `fused` is the product's ranking; `answering` is what the model is given: fused,
cut at the settings' top_k, neighbours in document order.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace
from rich.progress import track

from edge_rag.config import Settings
from edge_rag.policy.words import fts_query
from edge_rag.runtime.retrieval import Retriever
from edge_rag.store import library
from edge_rag.store.database import Database
from tools.bench import libraries
from tools.bench.data import Dataset, Question
from tools.bench.libraries import Places
from tools.bench.metrics import Span, any_contained, covered_share, mean, reciprocal_rank
from tools.bench.report import Claim, Result, Row, above, at_least

METRICS = ("recall@5", "recall@10", "MRR")
DEPTH = 50  # ranks that count for MRR
SLACK = 0.01
OVERALL = "all questions"

Scores = dict[str, float]


class Ranked(Struct, frozen=True):
    """A question with what each ranking found, as chunk ids, best first."""

    question: Question
    dense: list[int]
    words: list[int]
    fused: list[int]
    answering: list[int]

    def rankings(self) -> dict[str, list[int]]:
        """The rankings by name."""
        return {"dense": self.dense, "BM25": self.words, "fused": self.fused, "answering": self.answering}


class Measured(Struct, frozen=True):
    """A dataset's rankings: all that quality and sweep need, so that nothing is embedded twice."""

    dataset: Dataset
    folder: Path
    places: Places
    ranked: list[Ranked]


def first_questions(dataset: Dataset, count: int) -> Dataset:
    """The dataset with only so many of its questions, taken evenly from all."""
    step = max(1, len(dataset.questions) // count)
    return replace(dataset, questions=dataset.questions[::step][:count])


def fill_and_rank(datasets: Sequence[Dataset], settings: Settings, work: Path) -> list[Measured]:
    """A library for each dataset, and its questions searched in it."""
    measured = []
    for dataset in datasets:
        folder = work / "libraries" / f"{dataset.name}-{_short_hash(dataset)}"
        libraries.fill(folder, dataset, settings)
        with libraries.opened(folder) as database:
            ranked = list(rank(database, dataset, settings))
            measured.append(Measured(dataset, folder, libraries.places(database), ranked))
    return measured


def _short_hash(dataset: Dataset) -> str:
    return hashlib.sha256(str(dataset.files[0].absolute()).encode()).hexdigest()[:8]


def rank(database: Database, dataset: Dataset, settings: Settings) -> Iterator[Ranked]:
    """Search every question of the dataset in each way."""
    embedder = libraries.embedder(settings)
    product = Retriever(database, embedder, settings.retrieval)
    unordered = Retriever(database, embedder, replace(settings.retrieval, order_margin=0.0))
    for question in track(dataset.questions, description=f"{dataset.name}: searching", transient=True):
        vector = embedder.embed([question.text])[0]
        with database.read() as connection:
            dense = product.search_dense(connection, vector)
            words = library.search_words(connection, fts_query(question.text), limit=settings.retrieval.candidates)
        fused = unordered.search(question.text, top_k=DEPTH).passages
        answering = product.search(question.text).passages
        yield Ranked(
            question, dense, words, [passage.chunk_id for passage in fused], [passage.chunk_id for passage in answering]
        )


def scores(question: Question, chunks: Sequence[Span]) -> Scores:
    """The metrics of one ranking of one question."""
    recall = any_contained if question.alternatives else covered_share
    values = (
        recall(chunks[:5], question.spans),
        recall(chunks[:10], question.spans),
        reciprocal_rank(chunks[:DEPTH], question.spans),
    )
    return dict(zip(METRICS, values, strict=True))


def means(all_scores: Sequence[Scores]) -> Scores:
    """Each metric's mean over questions."""
    return {metric: mean([one[metric] for one in all_scores]) for metric in METRICS}


def evaluate(measured: Sequence[Measured]) -> Result:
    """Rows for each dataset and overall (every question counts the same), and the claims about fusion."""
    per_question = {
        entry.dataset.name: [
            {name: scores(ranked.question, entry.places.of(ids)) for name, ids in ranked.rankings().items()}
            for ranked in entry.ranked
        ]
        for entry in measured
    }
    result = Result(notes=_notes(measured))
    for name, questions in per_question.items():
        by_ranking = _by_ranking(questions)
        result.rows += _rows(name, len(questions), by_ranking)
        result.claims += keeps_up(name, by_ranking)
    everything = _by_ranking([question for questions in per_question.values() for question in questions])
    result.rows += _rows(OVERALL, sum(map(len, per_question.values())), everything)
    result.claims += beats_both(everything)
    return result


def _by_ranking(questions: Sequence[Mapping[str, Scores]]) -> dict[str, Scores]:
    names = questions[0] if questions else {}
    return {name: means([question[name] for question in questions]) for name in names}


def _rows(name: str, questions: int, by_ranking: Mapping[str, Scores]) -> list[Row]:
    return [
        {"table": "quality", "corpus": name, "questions": questions, "ranking": ranking, **found}
        for ranking, found in by_ranking.items()
    ]


def _best_single(by_ranking: Mapping[str, Scores], metric: str) -> float:
    return max(by_ranking["dense"][metric], by_ranking["BM25"][metric])


def keeps_up(name: str, by_ranking: Mapping[str, Scores]) -> list[Claim]:
    """On one corpus: fused is as good as the better of both, but for a slack."""
    return [
        at_least(
            f"{name}: fused {metric} − the better of both",
            by_ranking["fused"][metric] - _best_single(by_ranking, metric),
            -SLACK,
        )
        for metric in METRICS
    ]


def beats_both(by_ranking: Mapping[str, Scores]) -> list[Claim]:
    """Over all questions: fused is better than both."""
    return [
        above(
            f"{OVERALL}: fused {metric} − the better of both",
            by_ranking["fused"][metric] - _best_single(by_ranking, metric),
            0.0,
        )
        for metric in METRICS
    ]


def _notes(measured: Sequence[Measured]) -> list[str]:
    lost = sum(entry.dataset.lost for entry in measured)
    chunks = ", ".join(f"{entry.dataset.name} {len(entry.places.spans)}" for entry in measured)
    return [
        f"Chunks: {chunks}. References not found in the extracted text: {lost}.",
        "Recall: share of the references' characters in the first k chunks; SQuAD: answer span inside one of them. "
        f"MRR: first chunk that overlaps a reference, within {DEPTH}.",
        "'answering' is cut at the settings' top_k and in document order: its recall@10 and MRR see no further chunks.",
    ]
