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
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from rich.console import Console
from rich.progress import track

from edge_rag import EdgeRAG
from edge_rag.config import Settings, models_folder
from edge_rag.records import Adapter, Cluster, Lesson, Sampling
from edge_rag.runtime.course import Course, Tools
from edge_rag.runtime.house import DEQUANTISED, House
from edge_rag.runtime.parts import MEGABYTE
from edge_rag.runtime.teaching import Teacher
from edge_rag.runtime.training import Training
from edge_rag.store import adapters, clusters
from edge_rag.store.adapter_bundle import export_bundle
from tools.bench import data, libraries
from tools.bench.answers import MAX_TOKENS, SHORT
from tools.bench.data import Dataset, Question
from tools.bench.libraries import Places
from tools.bench.metrics import Span
from tools.bench.overhead import model_path
from tools.bench.quality import first_questions

LIBRARY, SPLIT, REWRITES, TIMES, OUT, JOBS = "library", "split.json", "rewrites.json", "times.json", "out", "jobs"
SUFFIX = ".adapter"
SLICE = 10.0  # seconds of training between looks at the clock
TOGETHER = 8  # passages that are rewritten in one piece of work
REWRITE = "Rewrite the passage in your own words. Keep every fact, name, number and date. Write only the passage."
REWRITING = Sampling(max_tokens=320, temperature=0.7, top_p=0.95)
TAUGHT = "teach"  # in times.json, for what all variants share

T = TypeVar("T")
Seconds = dict[str, dict[str, dict[str, float]]]  # by variant, cluster and kind of work


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
        adapters=replace(settings.adapters, mode="coverage"),
        learning=replace(settings.learning, idle=False, **learning),
    )


# --- the library and its log -----------------------------------------------------------------------------------------


def prepare(site: Site, paths: Sequence[Path], articles: int, questions: int = 0) -> Split:
    """The split; on the first call the library is filled, and on any the seen questions are asked that were not yet.

    So many `articles`, and so many `questions` about them, taken evenly from all (0: all).
    """
    if not (site.folder / SPLIT).exists():
        _fill(site, paths, articles, questions)
    split = msgspec.json.decode((site.folder / SPLIT).read_bytes(), type=Split)
    _ask(site, split)
    return split


def _fill(site: Site, paths: Sequence[Path], articles: int, questions: int) -> None:
    for left in (site.taught, site.folder / "documents"):
        shutil.rmtree(left, ignore_errors=True)
    dataset = first_articles(data.load(paths, site.folder / "documents")[0], articles)
    dataset = first_questions(dataset, questions) if questions else dataset
    site.console.print(f"adding {len(dataset.files)} articles of {dataset.name}")
    libraries.fill(site.taught, dataset, site.settings)
    with libraries.opened(site.taught) as database:
        split = split_of(dataset, libraries.places(database), seed=0)
    site.write(SPLIT, split)


def first_articles(dataset: Dataset, count: int) -> Dataset:
    """The data set with the questions about its first documents, and no other files; folders stay whole."""
    kept = list(dict.fromkeys(question.spans[0].document for question in dataset.questions))[:count]
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


# --- courses ---------------------------------------------------------------------------------------------------------


def teach(site: Site) -> list[Cluster]:
    """Group the passages, have questions about them written and answered, and have them rewritten for P-RAG."""
    with site.house(site.taught) as house:
        found = grouped(house)
        tools = tools_of(house, site, TAUGHT)
        for cluster in found:
            if site.out_of_time:
                break
            _teach_one(Course(cluster, tools), cluster, tools, site)
        _rewrite(tools, sorted({chunk for cluster in found for chunk in cluster.members}), site)
    return found


def grouped(house: House) -> list[Cluster]:
    """The clusters of what was asked. Raises SystemExit when there are none."""
    learner = house.learner()
    if learner is None:
        raise SystemExit("no memory is left for adapters")
    learner.learn(least=float("inf"))  # it groups, and finds nothing that is worth so much
    with house.database.read() as connection:
        found = clusters.clusters(connection)
    if not found:
        raise SystemExit(f"nothing was grouped: {learner.status().waiting or 'no questions were asked'}")
    return found


def tools_of(house: House, site: Site, variant: str) -> Tools:
    """What a course works with. Unlike in the product nobody is served beside it."""
    engine, coverer = house.engine(), house.coverer()
    assert coverer, "adapters are on"
    threads = libraries.threads(site.settings)
    return Tools(
        database=house.database,
        engine=engine,
        teacher=Teacher(house.database, engine, house.builder(), instructions=SHORT),
        embedder=house.embedder(),
        builder=house.builder(),
        coverer=coverer,
        folder=house.adapter_folder(),
        settings=site.settings.learning,
        instructions=SHORT,
        model=model_path(site.settings),
        base=house.base(),
        jobs=site.folder / JOBS / variant,
        cache=models_folder(site.settings) / DEQUANTISED,
        memory=site.settings.learning.memory_mb * MEGABYTE,
        train=partial(Training, busy=lambda: False, short=lambda: False, threads=threads),
    )


def _teach_one(course: Course, cluster: Cluster, tools: Tools, site: Site) -> None:
    """Up to the job, which names this machine's files and is made anew where it is done."""
    shutil.rmtree(tools.jobs, ignore_errors=True)
    follow(course, cluster, site, TAUGHT, enough=lambda: course.prepared)
    shutil.rmtree(tools.jobs, ignore_errors=True)


def follow(
    course: Course, cluster: Cluster, site: Site, variant: str, *, enough: Callable[[], bool] = bool
) -> Lesson | None:
    """Step a course until it ends, or `enough`, or time is up; the seconds of each kind of work are noted."""
    spent: dict[str, float] = defaultdict(float)
    lesson, told = None, ""
    while lesson is None and not enough() and not site.out_of_time:
        started = time.perf_counter()
        lesson = course.step(SLICE)
        spent[course.doing.what] += time.perf_counter() - started
        if (doing := f"{course.doing.what} {10 * course.doing.done // max(1, course.doing.total) * 10} %") != told:
            site.console.print(f"cluster {cluster.id}: {(told := doing)}")
    course.close()
    _note(site, variant, cluster, spent)
    return lesson


def _note(site: Site, variant: str, cluster: Cluster, spent: dict[str, float]) -> None:
    times = site.read(TIMES, Seconds, dict)
    known = times.setdefault(variant, {}).setdefault(str(cluster.id), {})
    for what, seconds in spent.items():
        known[what] = known.get(what, 0.0) + seconds
    site.write(TIMES, times)


def _rewrite(tools: Tools, chunks: Sequence[int], site: Site) -> None:
    known = site.read(REWRITES, dict[str, str], dict)
    missing = [chunk for chunk in chunks if str(chunk) not in known]
    for start in track(range(0, len(missing), TOGETHER), "rewriting passages", console=site.console):
        if site.out_of_time:
            return
        part = missing[start : start + TOGETHER]
        texts = tools.teacher.write([(REWRITE, (chunk,)) for chunk in part], replace(REWRITING, seed=start))
        known |= {str(chunk): text for chunk, text in zip(part, texts, strict=True)}
        site.write(REWRITES, known)


# --- adapters --------------------------------------------------------------------------------------------------------


def learn(site: Site, *, only_jobs: bool = False) -> list[Lesson]:
    """Train, examine and export what was taught, in the variant's own library; those that are not done yet.

    `only_jobs`: prepare what is to be trained, and stop there.
    """
    if not site.trained.exists():
        beside = site.trained.with_suffix(".new")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(site.taught, beside, ignore=shutil.ignore_patterns("kv", "training"))
        beside.rename(site.trained)
    lessons = []
    with site.house(site.trained) as house:
        with house.database.read() as connection:
            waiting = [each for each in clusters.clusters(connection) if each.trained_at is None]
        tools = tools_of(house, site, site.variant)
        for cluster in waiting:
            course = Course(cluster, tools)
            enough = partial(getattr, course, "prepared") if only_jobs else bool
            lesson = follow(course, cluster, site, site.variant, enough=enough)
            lessons += [lesson] if lesson else []
        export(house, site)
    return lessons


def newest(house: House) -> dict[int, Adapter]:
    """The newest adapter of each cluster, whether it passed or not; imported ones have numbers below zero."""
    with house.database.read() as connection:
        found = adapters.adapters(connection)
    return {-place - 1 if each.cluster_id is None else each.cluster_id: each for place, each in enumerate(found)}


def export(house: House, site: Site) -> None:
    """Write each adapter into a file of its own."""
    (site.folder / OUT).mkdir(exist_ok=True)
    for cluster_id, adapter in newest(house).items():
        target = site.folder / OUT / f"{site.variant}-{cluster_id}{SUFFIX}"
        target.unlink(missing_ok=True)
        export_bundle(house.database, house.adapter_folder(), adapter.id, target)


def imported(site: Site) -> None:
    """Make the variant's library, on a machine that has not trained it: what was taught, and the files of `out`."""
    if site.trained.exists():
        return
    files = sorted((site.folder / OUT).glob(f"{site.variant}-*{SUFFIX}"))
    if not files:
        raise SystemExit(f"there are no adapters {site.variant} in {site.folder / OUT}; do the part `learn` first")
    shutil.copytree(site.taught, site.trained, ignore=shutil.ignore_patterns("kv", "training"))
    with EdgeRAG.open(site.trained, settings=site.settings) as rag:
        for file in files:
            rag.import_adapter(file)
