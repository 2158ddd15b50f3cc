"""The courses of `adapters`: what is taught once, and the adapters of a variant; where they are says `curriculum`."""

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from msgspec.structs import replace
from rich.progress import track

from edge_rag import EdgeRAG
from edge_rag.config import models_folder
from edge_rag.records import Adapter, Cluster, Lesson, Sampling
from edge_rag.runtime.course import Course, Tools
from edge_rag.runtime.house import House
from edge_rag.runtime.parts import MEGABYTE
from edge_rag.runtime.school import DEQUANTISED
from edge_rag.runtime.teaching import Teacher
from edge_rag.runtime.training import Training
from edge_rag.store import adapters, clusters
from edge_rag.store.adapter_bundle import export_bundle
from tools.bench import libraries
from tools.bench.answers import SHORT
from tools.bench.curriculum import JOBS, OUT, REWRITES, TIMES, Site
from tools.bench.overhead import model_path

SUFFIX = ".adapter"
SLICE = 10.0  # seconds of training between looks at the clock
TOGETHER = 8  # passages that are rewritten in one piece of work
REWRITE = "Rewrite the passage in your own words. Keep every fact, name, number and date. Write only the passage."
REWRITING = Sampling(max_tokens=320, temperature=0.7, top_p=0.95)
TAUGHT = "teach"  # in times.json, for what all variants share

Seconds = dict[str, dict[str, dict[str, float]]]  # by variant, cluster and kind of work


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
    learner = house.school.learner()
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
    engine, coverer = house.engine(), house.school.coverer()
    assert coverer, "adapters are on"
    threads = libraries.threads(site.settings)
    return Tools(
        database=house.database,
        engine=engine,
        teacher=Teacher(house.database, engine, house.builder(), instructions=SHORT),
        embedder=house.embedder(),
        builder=house.builder(),
        coverer=coverer,
        folder=house.school.folder,
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
        export_bundle(house.database, house.school.folder, adapter.id, target)


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


def take_out(site: Site, target: Path) -> None:
    """Copy what another machine needs to go on: adapters of this variant and the small files."""
    target.mkdir(parents=True, exist_ok=True)
    files = [*(site.folder / OUT).glob(f"{site.variant}-*{SUFFIX}"), *site.folder.glob("*.json")]
    for file in files:
        shutil.copy2(file, target / file.name)
