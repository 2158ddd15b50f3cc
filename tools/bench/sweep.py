"""Fusion settings compared on rankings that were computed once.

For each setting, the mean over corpora (every corpus counts the same, so that a large one does not decide) and the
worst shortfall against the better of both rankings on any corpus and metric: that is what the claims look at.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

from edge_rag.policy.fusion import reciprocal_rank_fusion
from tools.bench.metrics import mean
from tools.bench.quality import METRICS, Measured, Ranked, Scores, means, scores
from tools.bench.report import Row

CONSTANTS = (0.0, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0, 60.0, 100.0)
TEXT_WEIGHTS = (0.5, 0.7, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0)


def sweep(measured: Sequence[Measured]) -> Iterator[Row]:
    """A row for each setting, best mean first."""
    single = {entry.dataset.name: _better_of_both(entry) for entry in measured}
    rows = [_row(measured, single, k, weight) for k, weight in product(CONSTANTS, TEXT_WEIGHTS)]
    yield from sorted(rows, key=lambda row: -float(row["mean"] or 0))


def _row(measured: Sequence[Measured], single: dict[str, Scores], k: float, text_weight: float) -> Row:
    found = {entry.dataset.name: _fused(entry, k, text_weight) for entry in measured}
    gains = {
        (name, metric): scores_[metric] - single[name][metric] for name, scores_ in found.items() for metric in METRICS
    }
    worst = min(gains, key=lambda place: gains[place])
    over_corpora = {metric: mean([scores_[metric] for scores_ in found.values()]) for metric in METRICS}
    return {
        "table": "sweep",
        "rrf_k": k,
        "embedding_weight": 1.0,
        "text_weight": text_weight,
        **over_corpora,
        "mean": mean(list(over_corpora.values())),
        "worst gain": gains[worst],
        "where": " ".join(worst),
        "claims broken": sum(gain < -0.01 for gain in gains.values()),
    }


def _better_of_both(entry: Measured) -> Scores:
    dense = _means(entry, lambda ranked: ranked.dense)
    words = _means(entry, lambda ranked: ranked.words)
    return {metric: max(dense[metric], words[metric]) for metric in METRICS}


def _fused(entry: Measured, k: float, text_weight: float) -> Scores:
    def ranking(ranked: Ranked) -> list[int]:
        pairs = reciprocal_rank_fusion([(1.0, ranked.dense), (text_weight, ranked.words)], k=k)
        return [chunk_id for chunk_id, _ in pairs]

    return _means(entry, ranking)


def _means(entry: Measured, ranking: Callable[[Ranked], list[int]]) -> Scores:
    return means([scores(ranked.question, entry.places.of(ranking(ranked))) for ranked in entry.ranked])
