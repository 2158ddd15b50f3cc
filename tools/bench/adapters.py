"""`adapters`: what adapters learn, beside text and rivals, and what they cost: time, bytes, and while they are trained.

Parts, each for itself; what they leave is in --folder (`tools.bench.curriculum` says what is where):

    teach       articles, half of their questions asked, clusters, study questions, the teacher's answers. No GPU needed
    learn       an adapter for each cluster, with the settings or --targets, --layers, --rank: another variant has
                another library, so that several are trained from what was taught once. Examined and exported
    jobs        what `learn` and `rivals` would train, as folders for `tools.bench.train_jobs` on another machine; what
                that leaves there is taken up by `learn` and `rivals`
    rivals      P-RAG, format-only and SFT adapters from the same items
    quality     answers of all of them: closed book, hybrid as shipped, in-context RAG, the base alone
    latency     time to the first token and end to end by coverage; nothing needs to be trained
    storage     bytes of a passage in each form
    decode      tokens a second under each kind of adapter
    training    one small library from log to adapter on this machine, interrupted by questions
    foreground  time to the first token beside a training
    routed      made-up traffic through the product, by each way of choosing adapters and keeping them in memory

With --minutes a call ends in time, and the next one goes on. --out gets a copy of what another machine needs.
"""

import argparse
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct
from rich.console import Console

from edge_rag.config import Settings
from edge_rag.records import Adapter, Cluster, Kept
from edge_rag.store import clusters
from edge_rag.store.adapter_sheet import SHEET, Sheet
from tools.bench import beside_training, courses, coverage_cost, curriculum, learning_here, recall, rivals, routed
from tools.bench.courses import SUFFIX, TAUGHT, Seconds
from tools.bench.curriculum import JOBS, OUT, SPLIT, TIMES, Site
from tools.bench.metrics import mean
from tools.bench.recall_report import WAYS
from tools.bench.report import Result, Row, Value, at_least

APART = ("jobs", "routed")  # parts that are done only when they are named
PARTS = (
    "teach",
    "jobs",
    "learn",
    "rivals",
    "quality",
    "latency",
    "storage",
    "decode",
    "training",
    "foreground",
    "routed",
)
FOLDER = Path("build") / "bench" / "adapters"
ARTICLES, QUICK_ARTICLES = 24, 2  # of XQuAD: 120 passages, four clusters
QUICK_QUESTIONS, QUICK_STUDY, QUICK_EPOCHS, QUICK_LIMIT = 16, 2, 1, 4
LEAST_CLUSTERS = 4
KINDS = {  # of work, by what a course calls them
    "writing": "writing questions about its passages",
    "teaching": "answering questions",
    "training": "training",
    "examining": "examining the adapter",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark alone."""
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=[part for part in PARTS if part not in APART],
        help="what to do (default: all but jobs and routed)",
    )
    parser.add_argument("--folder", type=Path, help=f"what parts leave to each other (default: {FOLDER})")
    parser.add_argument("--out", type=Path, help="copy adapters, split, times and answers to this folder")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after so many, to go on later")
    parser.add_argument("--articles", type=int, help=f"documents of the data to take (default: {ARTICLES})")
    parser.add_argument("--skip", type=int, default=0, help="documents of the data to leave out before those")
    parser.add_argument("--targets", choices=("down", "ffn", "all"), help="what is adapted")
    parser.add_argument("--layers", choices=("all", "last_half"), help="which layers are adapted")
    parser.add_argument("--rank", type=int, help="rank of the adapters")
    parser.add_argument("--epochs", type=int, help="times that items are gone through")
    parser.add_argument("--study", type=int, help="questions that are written about each passage")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to train")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="ways of answering")
    parser.add_argument("--draws", type=int, default=2000, help="questions of the traffic (routed)")
    parser.add_argument("--kept", type=int, default=4, help="adapters that memory has room for (routed)")
    parser.add_argument("--price", type=float, default=0.2, help="of a second of waiting, in F1 (routed)")
    parser.add_argument(
        "--choosers", nargs="+", choices=routed.CHOOSERS, default=list(routed.CHOOSERS), help="ways to route (routed)"
    )
    parser.add_argument("--limit", type=int, default=0, help="seen and unseen questions at most, of each")


class Call(Struct, frozen=True):
    """One call of the benchmark."""

    options: argparse.Namespace
    settings: Settings
    work: Path
    site: Site

    @property
    def quick(self) -> bool:
        """Whether it is a smoke run."""
        return bool(self.options.quick)

    def room(self) -> Path:
        """A new temporary folder."""
        return Path(tempfile.mkdtemp(dir=self.work))


def run(options: argparse.Namespace, settings: Settings, work: Path, console: Console) -> Result:
    """Do the parts, in their order."""
    chosen = curriculum.wanted_settings(settings, **_changes(options))
    folder = (options.folder or (work / "site" if options.quick else FOLDER)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    site = Site(folder, chosen, console, time.monotonic() + 60 * options.minutes)
    call = Call(options, chosen, work, site)
    result = Result(notes=[f"Variant {site.variant}; {chosen.learning.study_questions} study questions a passage."])
    for part in PARTS:
        if part in options.parts and not site.out_of_time:
            console.print(f"part {part}")
            result.extend(DO[part](call))
    if site.out_of_time:
        result.notes.append("Time was up before all was done; the same call goes on.")
    if options.out:
        courses.take_out(site, options.out)
    return result


def _changes(options: argparse.Namespace) -> dict[str, object]:
    """What the command line changes in the settings of learning."""
    quick = {"study_questions": QUICK_STUDY, "epochs": QUICK_EPOCHS} if options.quick else {}
    named = {
        "targets": options.targets,
        "layers": options.layers,
        "rank": options.rank,
        "epochs": options.epochs,
        "study_questions": options.study,
        "device": options.device,
    }
    return quick | {name: value for name, value in named.items() if value is not None}


# --- parts -----------------------------------------------------------------------------------------------------------


def teach(call: Call) -> Result:
    """What all variants share. Goes on where it was, and does nothing when all is done."""
    articles = call.options.articles or (QUICK_ARTICLES if call.quick else ARTICLES)
    questions = QUICK_QUESTIONS if call.quick else 0
    split = curriculum.prepare(call.site, call.options.data, articles, questions, skip=call.options.skip)
    found = courses.teach(call.site) if not call.site.out_of_time else []
    times = call.site.read(TIMES, Seconds, dict).get(TAUGHT, {})
    rows: list[Row] = [
        {
            "table": "taught",
            "cluster": each.id,
            "passages": len(each.members),
            "tokens": each.tokens,
            "questions": each.weight,
            **_spent(times.get(str(each.id), {}), ("writing", "teaching")),
        }
        for each in found
    ]
    seen = sum(asking.seen for asking in split.questions)
    note = (
        f"{len(split.articles)} articles of {split.data}; {seen} questions asked, {len(split.questions) - seen} unseen."
    )
    return Result(rows=rows, notes=[note])


def learn(call: Call) -> Result:
    """Adapters of this variant."""
    courses.learn(call.site)
    with call.site.house(call.site.trained) as house:
        with house.database.read() as connection:
            found = clusters.clusters(connection)
        known = courses.newest(house)
    times = call.site.read(TIMES, Seconds, dict)
    spent = {each.id: _summed(times, (TAUGHT, call.site.variant), str(each.id)) for each in found}
    trained = sum(each.id in known for each in found)
    return Result(
        rows=[
            *(lesson_row(call.site.variant, each, known.get(each.id), spent[each.id]) for each in found),
            *(exam_row(call.site.variant, each, known[each.id]) for each in found if each.id in known),
        ],
        claims=[at_least("clusters that were learned", trained, LEAST_CLUSTERS)],
        notes=[f"Cluster {each.id}: {each.failure}." for each in found if each.failure],
    )


def _summed(times: Seconds, variants: Sequence[str], cluster: str) -> dict[str, float]:
    """Seconds of each kind of work on a cluster."""
    parts = [times.get(variant, {}).get(cluster, {}) for variant in variants]
    return {what: sum(part.get(what, 0.0) for part in parts) for part in parts for what in part}


def lesson_row(variant: str, cluster: Cluster, adapter: Adapter | None, spent: Mapping[str, float]) -> Row:
    """Seconds of each kind of work on a cluster, and what was trained."""
    row: Row = {"table": f"learned: {variant}", "cluster": cluster.id, "passages": len(cluster.members)}
    row |= _spent(spent, ("writing", "teaching", "training", "examining"))
    if adapter:
        recipe = adapter.recipe
        row |= {"examples": recipe.examples, "tokens": recipe.tokens}
        row |= {"tokens/s": recipe.tokens / max(1e-9, recipe.seconds), "peak MB": recipe.peak_bytes / 1e6}
        row |= {"loss": recipe.loss, "MB": adapter.bytes / 1e6, "device": recipe.device}
    return row


def _spent(seconds: Mapping[str, float], kinds: Sequence[str]) -> dict[str, Value]:
    return {f"{kind} s": seconds.get(KINDS[kind], 0.0) for kind in kinds}


def exam_row(variant: str, cluster: Cluster, adapter: Adapter) -> Row:
    """What an exam said: F1 against the teacher, of so many questions each."""
    row: Row = {"table": f"examined: {variant}", "cluster": cluster.id, "state": adapter.state}
    if gate := adapter.gate:
        for name in ("seen", "used", "unseen", "bare"):
            kept: Kept = getattr(gate, name)
            row |= {name: kept.f1, f"of {name}": kept.questions}
        row |= {"drift": gate.drift, "reach": gate.reach}
    return row


def jobs(call: Call) -> Result:
    """What is to be trained of this variant and of the rivals."""
    courses.learn(call.site, only_jobs=True)
    rivals.prepare(call.site)
    return Result(notes=[f"Jobs are in {call.site.folder / JOBS} and {call.site.folder / rivals.RIVALS}."])


def train_rivals(call: Call) -> Result:
    """Adapters of the rivals."""
    return Result(rows=rivals.train(call.site))


def quality(call: Call) -> Result:
    """Answers. Raises SystemExit when nothing was prepared."""
    limit = call.options.limit or (QUICK_LIMIT if call.quick else 0)
    return recall.measure(call.site, _split(call.site), call.options.ways, limit)


def _split(site: Site) -> curriculum.Split:
    if not (site.folder / SPLIT).exists():
        raise SystemExit(f"there is no {SPLIT} in {site.folder}; do the part `teach` first")
    return site.read(SPLIT, curriculum.Split, lambda: curriculum.Split("", (), ()))


def latency(call: Call) -> Result:
    """Time by coverage."""
    return coverage_cost.latency(call.settings, call.options.data, call.room(), call.site.console, quick=call.quick)


def storage(call: Call) -> Result:
    """Bytes by passage; of the adapters that were exported, if any."""
    sizes = [len(sheet.members) for sheet in sheets(call.site).get(call.site.variant, [])]
    return coverage_cost.storage(
        call.settings, call.options.data, call.room(), call.site.console, sizes=sizes, quick=call.quick
    )


def decode(call: Call) -> Result:
    """Tokens a second by kind of adapter, beside what those that were exported kept."""
    result = coverage_cost.decoding(call.settings, call.options.data, call.room(), call.site.console, quick=call.quick)
    kept = sheets(call.site)
    none = next(float(str(row["tokens/s"])) for row in result.rows if row["adapter"] == "none")
    for row in result.rows:
        gates = [sheet.gate for sheet in kept.get(str(row["adapter"]), []) if sheet.gate]
        if gates:
            seen, unseen = mean([gate.seen.f1 for gate in gates]), mean([gate.unseen.f1 for gate in gates])
            lost = none - float(str(row["tokens/s"]))
            row |= {"kept seen": seen, "kept unseen": unseen}
            row |= {"kept a lost token/s": (seen + unseen) / 2 / lost if lost > 0 else None}
    return result


def sheets(site: Site) -> dict[str, list[Sheet]]:
    """What was exported, by variant."""
    found: dict[str, list[Sheet]] = defaultdict(list)
    for file in sorted((site.folder / OUT).glob(f"*{SUFFIX}")):
        with zipfile.ZipFile(file) as archive:
            found[file.stem.rpartition("-")[0]].append(msgspec.json.decode(archive.read(SHEET), type=Sheet))
    return found


def training(call: Call) -> Result:
    """From log to adapter on this machine."""
    return learning_here.end_to_end(call.settings, call.options.data, call.room(), call.site.console, quick=call.quick)


def foreground(call: Call) -> Result:
    """Who asks while there is training."""
    return beside_training.foreground(
        call.settings, call.options.data, call.room(), call.site.console, quick=call.quick
    )


def through_the_router(call: Call) -> Result:
    """Traffic by each way of choosing and keeping."""
    trace = routed.Traffic(call.options.draws, call.options.kept, call.options.price)
    return routed.measure(call.site, _split(call.site), trace, call.options.choosers)


DO: dict[str, Callable[[Call], Result]] = {
    "teach": teach,
    "jobs": jobs,
    "learn": learn,
    "rivals": train_rivals,
    "quality": quality,
    "latency": latency,
    "storage": storage,
    "decode": decode,
    "training": training,
    "foreground": foreground,
    "routed": through_the_router,
}
