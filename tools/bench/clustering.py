"""`clustering`: how much of coming questions the clusters of logged ones cover, by cap, and what a longer log changes.

Questions are drawn by Zipf's law, and each has the passages that BM25 finds first. From the log clusters are made
(`cold`), and from a log with a fifth more: anew (`cold again`), and `grown` from the clusters that are there. Coverage
is of questions drawn afterwards, one cluster a question; `unseen` are those that were in no log. `kept` are clusters of
the first log that are there again (Jaccard ≥ 0.8), `held` those whose passages are all in the cluster in their place.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from msgspec import Struct
from rich.console import Console

from edge_rag.config import Settings
from edge_rag.policy.clustering import Coverage, cluster, coverage, regroup
from edge_rag.policy.words import fts_query
from edge_rag.records import Asked
from edge_rag.store import library
from tools.bench import data, libraries, traces
from tools.bench.metrics import mean
from tools.bench.quality import first_questions
from tools.bench.report import Claim, Result, Row, at_least

LOGGED, QUICK_LOGGED = 3000, 100
GROWTH = 0.2
EXPONENT = 0.8
PASSAGES = 5
CAPS = (16, 32, 64)
QUICK_QUESTIONS = 40
SAME = 0.8  # Jaccard
GAIN = 0.05
COVERED = {"all": 0.68, "unseen": 0.51}  # Leiden's clusters of 32 on all of SQuAD's development set
CLAIMED_CAP = 32

Clusters = list[frozenset[int]]
Make = Callable[[], Clusters]


class World(Struct, frozen=True):
    """The passages of each question, and the tokens of each passage."""

    questions: list[tuple[int, ...]]
    tokens: dict[int, int]


class Logs(Struct, frozen=True):
    """What is asked. `more` begins with `first`; `coming` is asked afterwards, `unseen` are those new then."""

    first: list[Asked]
    more: list[Asked]
    coming: list[Asked]
    unseen: list[Asked]


class Made(Struct, frozen=True):
    """Clusters, those that there were before, and the seconds that it took."""

    way: str
    before: Clusters
    clusters: Clusters
    seconds: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark alone."""
    parser.add_argument("--caps", type=int, nargs="+", default=CAPS, metavar="N", help="passages of a cluster at most")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")


def run(options: argparse.Namespace, settings: Settings, work: Path, console: Console) -> Result:
    """Cluster the passages of each dataset."""
    result = Result(notes=[f"Zipf {EXPONENT}; the {PASSAGES} passages of a question that BM25 finds first."])
    result.notes.append("The targets were measured on SQuAD's development set (2,067 passages, Leiden).")
    for dataset in data.load(options.data, work / "data"):
        chosen = first_questions(dataset, QUICK_QUESTIONS) if options.quick else dataset
        console.print(f"adding {chosen.name}")
        world = searched(chosen, settings, work / "libraries" / chosen.name)
        drawn = logs(world, QUICK_LOGGED if options.quick else LOGGED, options.seed)
        for cap in options.caps:
            most_tokens = cap * settings.learning.most_tokens // settings.learning.most_passages
            made = list(clusterings(world, drawn, cap, most_tokens))
            result.rows += [row(f"{chosen.name}, {len(world.tokens)} passages", cap, drawn, entry) for entry in made]
            if cap == CLAIMED_CAP:
                result.claims += claims(chosen.name, drawn, {entry.way: entry for entry in made})
    return result


def searched(dataset: data.Dataset, settings: Settings, folder: Path) -> World:
    """A library of the dataset's files, and what its word index finds for each question; some find nothing."""
    libraries.fill(folder, dataset, settings)
    with libraries.opened(folder) as database, database.read() as connection:
        found = [
            tuple(library.search_words(connection, fts_query(question.text), limit=PASSAGES))
            for question in dataset.questions
        ]
        rows: Iterator[tuple[int, int]] = connection.execute("SELECT id, tokens FROM chunks")
        return World(found, dict(rows))


def logs(world: World, length: int, seed: int) -> Logs:
    """Logs of `length` questions and a fifth more, and as many afterwards; which ones are popular is drawn too."""
    names = list(range(len(world.questions)))
    random.Random(seed).shuffle(names)
    more = round(length * (1 + GROWTH))
    drawn = [names[place] for place in traces.zipf(len(names), EXPONENT, more + length, seed)]
    asked = [Asked(weight=1.0, chunks=world.questions[name]) for name in drawn]
    logged = set(drawn[:more])
    unseen = [question for name, question in zip(drawn[more:], asked[more:], strict=True) if name not in logged]
    return Logs(first=asked[:length], more=asked[:more], coming=asked[more:], unseen=unseen)


def clusterings(world: World, drawn: Logs, cap: int, most_tokens: int) -> Iterator[Made]:
    """Each way to cluster under this cap."""

    def make(log: Sequence[Asked], old: Clusters, *, overlap: bool = False) -> Clusters:
        return cluster(log, world.tokens, old=old, most=cap, most_tokens=most_tokens, overlap=overlap)

    def anew(old: Clusters) -> Clusters:
        return regroup(drawn.more, world.tokens, old, most=cap, most_tokens=most_tokens, gain=GAIN) or old

    yield (cold := timed("cold", [], lambda: make(drawn.first, [])))
    yield timed("cold again", cold.clusters, lambda: make(drawn.more, []))
    yield (grown := timed("grown", cold.clusters, lambda: make(drawn.more, cold.clusters)))
    yield timed("grown, regrouped", cold.clusters, lambda: anew(grown.clusters))
    yield (double := timed("overlap", [], lambda: make(drawn.first, [], overlap=True)))
    yield timed("overlap, grown", double.clusters, lambda: make(drawn.more, double.clusters, overlap=True))


def timed(way: str, before: Clusters, make: Make) -> Made:
    """What `make` makes, and how long that took."""
    started = time.perf_counter()
    made = make()
    return Made(way, before, made, time.perf_counter() - started)


def row(table: str, cap: int, drawn: Logs, made: Made) -> Row:
    """Size, coverage and stability of clusters."""
    every, unseen = coverage(made.clusters, drawn.coming), coverage(made.clusters, drawn.unseen)
    return {
        "table": table,
        "cap": cap,
        "way": made.way,
        "adapters": len(made.clusters),
        "passages": len(frozenset().union(*made.clusters)),
        "covered": every.share,
        "covered unseen": unseen.share,
        "whole": every.whole,
        "whole unseen": unseen.whole,
        "kept": kept(made) if made.before else None,
        "held": held(made) if made.before else None,
        "seconds": made.seconds,
    }


def kept(made: Made) -> float:
    """The share of the clusters before that are there again."""
    near = [max(len(one & other) / len(one | other) for other in made.clusters) for one in made.before]
    return mean([float(likeness >= SAME) for likeness in near])


def held(made: Made) -> float:
    """The share of the clusters before that are within the one in their place."""
    return mean([float(one <= other) for one, other in zip(made.before, made.clusters, strict=False)])


def claims(name: str, drawn: Logs, made: dict[str, Made]) -> list[Claim]:
    """What is promised at the cap of the settings."""
    cold, grown = made["cold"], made["grown"]
    covered: dict[str, Coverage] = {
        "all": coverage(cold.clusters, drawn.coming),
        "unseen": coverage(cold.clusters, drawn.unseen),
    }
    return [
        *(at_least(f"{name}: {which} questions covered", covered[which].share, COVERED[which]) for which in covered),
        at_least(f"{name}: old clusters held by the grown ones", held(grown), 1.0),
    ]
