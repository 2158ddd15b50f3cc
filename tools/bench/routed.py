"""Traffic through the product with the adapters of `adapters`: what each way of routing and keeping is worth.

Topics are the adapters' clusters. Their popularity follows Zipf's law with an exponent of .9 and changes half-way; each
draw takes a question about a passage of its topic, one that was asked before or one that never was. All ways get the
same questions in the same order, one after the other, in a library of their own, and memory for a few adapters. After
each answer its F1 against the known answers is given as feedback. What counts is net utility: F1 less the price of the
seconds that the answer took.
"""

import itertools
import random
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace
from rich.progress import track

from edge_rag import EdgeRAG
from edge_rag.config import Router, Settings
from edge_rag.records import Adapter
from edge_rag.runtime.parts import MEGABYTE
from tools.bench import traces
from tools.bench.courses import imported
from tools.bench.curriculum import LIBRARY, Asking, Site, Split
from tools.bench.metrics import bootstrap, f1, mean, percentile, without_marks
from tools.bench.report import Claim, Result, Row, above, at_most

ROUTED = "routed.json"
EXPONENT = 0.9
EPOCH = 128  # questions
SHORT_OF = 0.02  # F1 that the router may lose against reading all passages
CHOOSERS: Mapping[str, dict[str, str]] = {  # settings of the group `router`
    "no adapters": {"mode": "off"},
    "coverage + LRU": {"mode": "coverage"},
    "LinUCB + EdgeLoRA": {"mode": "linucb", "residency": "edgelora"},
    "LinUCB + LRU": {"mode": "linucb", "residency": "lru"},
    "POLAR": {"mode": "linucb", "residency": "polar"},
    "POLAR+": {"mode": "linucb", "residency": "polar+"},
}
RULE, PLAIN = "coverage + LRU", "no adapters"


class Traffic(Struct, frozen=True):
    """So many questions, with room in memory for `kept` adapters; `price` of a second, in F1."""

    draws: int
    kept: int
    price: float


class Served(Struct, frozen=True):
    """An answer: what it was worth, seconds to its first token and in all, and the adapter that gave it."""

    f1: float
    first: float
    total: float
    adapter: str


class Run(Struct, frozen=True):
    """All answers of a way, and how many adapters were loaded for them."""

    served: list[Served]
    page_ins: int


Told = dict[str, Run]


def measure(site: Site, split: Split, traffic: Traffic, ways: Sequence[str]) -> Result:
    """Ask what was not asked yet, and compare all that is there."""
    imported(site)
    told = site.read(ROUTED, Told, dict)
    with EdgeRAG.open(site.trained, settings=site.settings) as rag:
        found = rag.adapters()
    asked = drawn(split, found, traffic.draws)
    for way in ways:
        if not _whole(told.get(way), asked) and not site.out_of_time:
            settings = settings_of(site.settings, way, traffic, max(each.bytes for each in found))
            told[way] = _ask(site, way, settings, asked)
            site.write(ROUTED, told)
    whole = {way: told[way] for way in CHOOSERS if _whole(told.get(way), asked)}
    return compared(whole, traffic, len(found))


def _whole(run: Run | None, asked: Sequence[Asking]) -> bool:
    return run is not None and len(run.served) == len(asked)


def drawn(split: Split, found: Sequence[Adapter], draws: int) -> list[Asking]:
    """The questions of the traffic, in order. Raises SystemExit when no adapter covers any."""
    topics = [sorted(each.members) for each in found]
    about: dict[int, list[Asking]] = defaultdict(list)
    for asking, (number, members) in itertools.product(split.questions, enumerate(topics)):
        if asking.gold in members:
            about[number].append(asking)
    if not about:
        raise SystemExit("no adapter covers a question")
    numbers = sorted(about)
    steps = [[topic] for topic in traces.zipf(len(numbers), EXPONENT, draws, seed=0)]
    chosen = random.Random(0)
    return [chosen.choice(about[numbers[topic]]) for [topic] in traces.drifted(steps, len(numbers), seed=1)]


def settings_of(settings: Settings, way: str, traffic: Traffic, size: int) -> Settings:
    """The settings of a way, with room for so many adapters of `size` bytes."""
    room = -(-traffic.kept * size // MEGABYTE)
    router = replace(Router(second_price=traffic.price, epoch=EPOCH), **CHOOSERS[way])
    return replace(settings, router=router, adapters=replace(settings.adapters, memory_mb=room))


def _ask(site: Site, way: str, settings: Settings, asked: Sequence[Asking]) -> Run:
    folder = site.folder / f"{LIBRARY}-routed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(site.trained, folder, ignore=shutil.ignore_patterns("training"))
    with EdgeRAG.open(folder, settings=settings) as rag:
        rag.load()
        rag.warm()
        served = [_serve(rag, asking) for asking in track(asked, way, console=site.console)]
        return Run(served, rag.router().page_ins)


def _serve(rag: EdgeRAG, asking: Asking) -> Served:
    answer = rag.ask(asking.question)
    worth = f1(without_marks(answer.text), asking.answers)
    rag.feedback(answer.id, worth)
    return Served(worth, answer.timings.first_token, answer.timings.total, answer.plan.adapter)


# --- the comparison --------------------------------------------------------------------------------------------------


def compared(told: Told, traffic: Traffic, adapters: int) -> Result:
    """What each way was worth, and the claims about the router."""
    rows = [_row(way, run, traffic.price) for way, run in told.items()]
    note = (
        f"{adapters} adapters, room for {traffic.kept}; {traffic.draws} questions by Zipf {EXPONENT}, other topics in "
        f"the second half; a second costs {traffic.price} of F1; 95 % bootstrap intervals over questions."
    )
    return Result(rows=rows, claims=list(_claims(told, traffic.price)), notes=[note])


def utilities(served: Sequence[Served], price: float) -> list[float]:
    """F1 less the price of the seconds it took, of each answer."""
    return [each.f1 - price * each.total for each in served]


def _row(way: str, run: Run, price: float) -> Row:
    served, net = run.served, utilities(run.served, price)
    _, low, high = bootstrap(net)
    firsts = [1000 * each.first for each in served]
    return {
        "table": "routed traffic",
        "way": way,
        "net utility": mean(net),
        "low": low,
        "high": high,
        "second half": mean(net[len(net) // 2 :]),
        "F1": mean([each.f1 for each in served]),
        "first token ms": percentile(firsts, 0.5),
        "99 % ms": percentile(firsts, 0.99),
        "mean s": mean([each.total for each in served]),
        "by adapters": mean([float(each.adapter != "") for each in served]),
        "page-ins": run.page_ins,
    }


def _claims(told: Told, price: float) -> list[Claim]:
    claims = []
    net = {way: mean(utilities(run.served, price)) for way, run in told.items()}
    right = {way: mean([each.f1 for each in run.served]) for way, run in told.items()}
    for way in ("POLAR", "POLAR+"):
        if way in told and RULE in told:
            claims.append(above(f"{way}: net utility over that of {RULE}", net[way] - net[RULE], 0.0))
        if way in told and PLAIN in told:
            claims.append(at_most(f"{way}: F1 lost against {PLAIN}", right[PLAIN] - right[way], SHORT_OF))
    return claims
