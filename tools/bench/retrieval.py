"""`retrieval`: quality of the rankings (`quality`, `sweep`) and search time against size (`scale`)."""

import argparse
from pathlib import Path

from rich.console import Console

from edge_rag.config import Settings
from tools.bench import data, quality, scale, sweep
from tools.bench.report import Result
from tools.bench.scale_build import CHUNKS_A_DOCUMENT, seeds_of

QUICK_QUESTIONS = 40


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark alone."""
    parser.add_argument("--only", choices=("quality", "scale"), help="one half of it")
    parser.add_argument("--sweep", action="store_true", help="also compare fusion settings on the same rankings")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="CHUNKS", help="library sizes for search time")


def run(options: argparse.Namespace, settings: Settings, work: Path, console: Console) -> Result:
    """Measure what the options ask for."""
    datasets = data.load(options.data, work / "data")
    if options.quick:
        datasets = [quality.first_questions(dataset, QUICK_QUESTIONS) for dataset in datasets]
    measured = quality.fill_and_rank(datasets, settings, work)
    result = Result()
    if options.only != "scale":
        result.extend(quality.evaluate(measured))
    if options.sweep:
        result.rows += sweep.sweep(measured)
    if options.only != "quality":
        seeds = seeds_of([entry.folder for entry in measured])
        questions = [question.text for dataset in datasets for question in dataset.questions]
        wanted = options.sizes or (scale.QUICK_SIZES if options.quick else scale.SIZES)
        sizes = sorted({-(-size // CHUNKS_A_DOCUMENT) * CHUNKS_A_DOCUMENT for size in wanted})  # whole documents
        result.extend(scale.measure(seeds, questions, settings, work, sizes=sizes, console=console))
    return result
