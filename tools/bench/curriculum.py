"""What `adapters` learns from: articles, their questions in two halves, and the way from the asked ones to adapters.

Everything stays in one folder, so that each step can be done on another machine, and goes on where it was cut off:

    split.json          which questions were asked (seen) and which never were (unseen), with their gold passages
    library/            the articles; seen questions were asked, and what was taught about their clusters
    library-VARIANT/    a copy in which adapters of that variant (targets-layers-rank) were trained and examined
    out/                those adapters, one file each, as `export_adapter` writes them
    rewrites.json       P-RAG's rewritten passages
    times.json          seconds of each kind of work, by variant and cluster
    jobs/VARIANT/       what is to be trained; it may be trained elsewhere (`tools.bench.train_jobs`)
    rivals/             the rivals' jobs and adapters (`tools.bench.rivals`)
    answers.json        what was answered in which way (`tools.bench.recall`)
"""

import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from rich.console import Console
from rich.progress import track

from edge_rag import EdgeRAG
from edge_rag.config import Settings
from edge_rag.runtime.house import House
from tools.bench import data, libraries
from tools.bench.answers import MAX_TOKENS, SHORT
from tools.bench.data import Dataset, Question
from tools.bench.libraries import Places
from tools.bench.metrics import Span
from tools.bench.quality import first_questions

LIBRARY, SPLIT, REWRITES, TIMES, OUT, JOBS = "library", "split.json", "rewrites.json", "times.json", "out", "jobs"

T = TypeVar("T")


class Asking(Struct, frozen=True):
    """A question with its known answers; `gold` is the chunk that holds the first of them."""

    id: int
    question: str
    answers: tuple[str, ...]
    seen: bool
    gold: int


class Split(Struct, frozen=True):
    """The questions of some articles. The first half of each article's, in an order that was drawn, was asked."""

    data: str
    articles: tuple[str, ...]
    questions: tuple[Asking, ...]


class Site(Struct, frozen=True):
    """The folder of a benchmark, its settings, and where it tells how far it is. `until` is of `time.monotonic`."""

    folder: Path
    settings: Settings
    console: Console
    until: float

    @property
    def variant(self) -> str:
        """What is trained, as the name of files."""
        wanted = self.settings.learning
        return f"{wanted.targets}-{wanted.layers}-{wanted.rank}"

    @property
    def taught(self) -> Path:
        """The library that all variants are copied from."""
        return self.folder / LIBRARY

    @property
    def trained(self) -> Path:
        """The library of this variant."""
        return self.folder / f"{LIBRARY}-{self.variant}"

    @property
    def out_of_time(self) -> bool:
        """Whether to stop, and go on in another call."""
        return time.monotonic() >= self.until

    def read(self, name: str, kind: type[T], empty: Callable[[], T]) -> T:
        """A JSON file of the folder."""
        file = self.folder / name
        return msgspec.json.decode(file.read_bytes(), type=kind) if file.exists() else empty()

    def write(self, name: str, value: object) -> None:
        """Replace a JSON file of the folder."""
        file = self.folder / name
        beside = file.with_suffix(".new")
        beside.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1))
        beside.replace(file)

    @contextmanager
    def house(self, library: Path) -> Iterator[House]:
        """The parts of a library."""
        with House(library, self.settings, libraries.model_folder(self.settings)) as house:
            yield house


def wanted_settings(settings: Settings, **learning: object) -> Settings:
    """The settings with short answers and no idle work; `learning` are changes of that group."""
    return replace(
        settings,
        answering=replace(settings.answering, instructions=SHORT, max_tokens=MAX_TOKENS),
        kv=replace(settings.kv, idle=False, audit_share=0.0),
        router=replace(settings.router, mode="coverage"),
        learning=replace(settings.learning, idle=False, **learning),
    )


# --- the library and its log -----------------------------------------------------------------------------------------


def prepare(site: Site, paths: Sequence[Path], articles: int, questions: int = 0, *, skip: int = 0) -> Split:
    """The split; on the first call the library is filled, and on any the seen questions are asked that were not yet.

    So many `articles` behind the first `skip`, and so many `questions` about them, taken evenly from all (0: all).
    """
    if not (site.folder / SPLIT).exists():
        _fill(site, paths, articles, questions, skip)
    split = msgspec.json.decode((site.folder / SPLIT).read_bytes(), type=Split)
    _ask(site, split)
    return split


def _fill(site: Site, paths: Sequence[Path], articles: int, questions: int, skip: int) -> None:
    for left in (site.taught, site.folder / "documents"):
        shutil.rmtree(left, ignore_errors=True)
    dataset = first_articles(data.load(paths, site.folder / "documents")[0], articles, skip=skip)
    dataset = first_questions(dataset, questions) if questions else dataset
    site.console.print(f"adding {len(dataset.files)} articles of {dataset.name}")
    libraries.fill(site.taught, dataset, site.settings)
    with libraries.opened(site.taught) as database:
        split = split_of(dataset, libraries.places(database), seed=0)
    site.write(SPLIT, split)


def first_articles(dataset: Dataset, count: int, *, skip: int = 0) -> Dataset:
    """The data set with the questions about so many of its documents, and no other files; folders stay whole."""
    kept = list(dict.fromkeys(question.spans[0].document for question in dataset.questions))[skip : skip + count]
    return replace(
        dataset,
        files=tuple(file for file in dataset.files if file.is_dir() or str(file.absolute()) in kept),
        questions=tuple(question for question in dataset.questions if question.spans[0].document in kept),
    )


def split_of(dataset: Dataset, places: Places, *, seed: int) -> Split:
    """Half of each document's questions seen, in an order in which no document's come together."""
    drawn = random.Random(seed)
    documents: dict[str, list[tuple[int, Question]]] = defaultdict(list)
    for number, question in enumerate(dataset.questions):
        documents[question.spans[0].document].append((number, question))
    found = []
    for asked in documents.values():
        drawn.shuffle(asked)
        half = (len(asked) + 1) // 2
        found += [
            Asking(number, question.text, question.answers, place < half, _holder(places, question.spans[0]))
            for place, (number, question) in enumerate(asked)
        ]
    drawn.shuffle(found)
    return Split(dataset.name, tuple(Path(document).name for document in documents), tuple(found))


def _holder(places: Places, span: Span) -> int:
    """The chunk that shares most characters with the span."""
    return max(places.spans, key=lambda chunk_id: places.spans[chunk_id].overlap(span))


def _ask(site: Site, split: Split) -> None:
    """Ask what the journal does not have yet."""
    with EdgeRAG.open(site.taught, settings=site.settings) as rag:
        seen = [asking for asking in split.questions if asking.seen][rag.status().questions :]
        for asking in track(seen, "asking", console=site.console):
            if site.out_of_time:
                return
            rag.ask(asking.question)
