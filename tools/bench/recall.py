"""Answers of `adapters` from memory, from text and from rivals' adapters: F1, EM and contains, seen and unseen apart.

Each question takes the adapter that covers most of the passages that were retrieved for it, as the product chooses, but
whatever its exam said. `covered` questions are those whose gold passage that adapter covers; only these are compared.

    rag       the base model with all five passages       closed    the adapter, no passage at all
    base      the base model without any                  partial   the adapter, passages that it does not cover
    hybrid    `ask`, with gate and reach                  forced    another adapter on, all passages there (drift)
    wrong     another cluster's adapter, no passage       format, sft, prag    see `tools.bench.rivals`; no passage

Questions that were asked and then held out from training are left out: they are neither seen nor unseen.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from msgspec import Struct
from rich.progress import track

from edge_rag import EdgeRAG
from edge_rag.native.llama import ContextSettings, Model
from edge_rag.policy.covering import Offer, choose
from edge_rag.policy.reach import ONLY_TRAINED, Vectors, may_use
from edge_rag.records import Adapter, Answer, Cluster
from edge_rag.runtime.house import House
from edge_rag.runtime.parts import batch_size, make_engine
from edge_rag.runtime.prompting import PromptBuilder
from edge_rag.runtime.teaching import TOKENS, Teacher
from edge_rag.store import adapters, clusters, items
from tools.bench import libraries, rivals
from tools.bench.answers import SHORT
from tools.bench.courses import imported, newest
from tools.bench.curriculum import Site, Split
from tools.bench.metrics import without_marks
from tools.bench.overhead import model_path
from tools.bench.recall_report import GROUPS, WAYS, Case, compared
from tools.bench.report import Result
from tools.bench.summed import Summed

ANSWERS = "answers.json"
TOGETHER = 16  # questions between two looks at the clock
OWN = ("closed", "partial", "hybrid", "forced", "wrong")  # they depend on the variant

Told = dict[str, dict[str, str]]  # by way and question


class Ask(Struct, frozen=True):
    """What is put to the model: the passages of these chunks, under the adapter of this name."""

    chunks: tuple[int, ...]
    adapter: str


def measure(site: Site, split: Split, ways: Sequence[str], limit: int) -> Result:
    """Ask what was not asked yet in these ways, and compare all that is there."""
    imported(site)
    with site.house(site.trained) as house:
        found = list(cases(house, site, split, limit))
    told = site.read(ANSWERS, Told, dict)
    for way in ways:
        missing = [case for case in found if case.key not in told.get(named(way, site), {})]
        if missing and not site.out_of_time:
            _fill_in(site, way, missing, told)
    product = told.get(named("hybrid", site), {})
    by_way = {way: told.get(named(way, site), {}) for way in WAYS} | {
        "hybrid": {key: text.partition("|")[2] for key, text in product.items()}
    }
    return compared(found, by_way, {key for key, text in product.items() if not text.startswith("|")})


def named(way: str, site: Site) -> str:
    """A way's name in answers.json."""
    return f"{way} {site.variant}" if way in OWN else way


# --- who is asked what -----------------------------------------------------------------------------------------------


def cases(house: House, site: Site, split: Split, limit: int) -> Iterator[Case]:
    """Covered questions, so many of each group at most (0: all)."""
    known = {each.id: each for each in newest(house).values()}
    offers = [Offer(each.id, frozenset(each.members)) for each in known.values()]
    held_out = _held_out(house, [chunk for offer in offers for chunk in offer.members])
    left = dict.fromkeys(GROUPS, limit or len(split.questions))
    for asking in track(split.questions, "searching", console=site.console):
        if asking.question in held_out:
            continue
        found = house.retriever().search(asking.question, document_order=True)
        chunks = tuple(passage.chunk_id for passage in found.passages)
        chosen = choose(chunks, offers, least=0.0)
        members = next((offer.members for offer in offers if offer.adapter == chosen.adapter), frozenset[int]())
        strangers = sorted(offer.adapter for offer in offers if not offer.members & set(chunks))
        wrong = strangers[asking.id % len(strangers)] if strangers else ""
        tempted = bool(wrong) and _reaches(house, known[wrong], found.asked)
        case = Case(asking, chunks, chosen.adapter, members, wrong, tempted)
        if asking.gold in members and left[case.group]:
            left[case.group] -= 1
            yield case


def _reaches(house: House, adapter: Adapter, asked: Vectors) -> bool:
    with house.database.read() as connection:
        _, vectors, f1s = adapters.questions_of(connection, adapter.id)
    return may_use(asked, vectors, f1s, reach=adapter.gate.reach if adapter.gate else ONLY_TRAINED)


def _held_out(house: House, chunks: Sequence[int]) -> set[str]:
    with house.database.read() as connection:
        found = items.items_of(connection, chunks, model=house.base())
    return {item.question for item in found if item.held_out}


def asks(way: str, case: Case, found: Sequence[Cluster]) -> Ask | None:
    """What is put to the model in this way; None when there is no such adapter."""
    rest = tuple(chunk for chunk in case.chunks if chunk not in case.members)
    own = _own_cluster(case, found)
    side = rivals.format_of(own.id, found) if own else 0
    made = {
        "rag": Ask(case.chunks, ""),
        "base": Ask((), ""),
        "closed": Ask((), case.adapter),
        "partial": Ask(rest, case.adapter),
        "forced": Ask(case.chunks, case.wrong) if case.wrong else None,
        "wrong": Ask((), case.wrong) if case.wrong else None,
        "format": Ask((), f"{rivals.FORMAT}-{side}"),
        "sft": Ask((), f"{rivals.SFT}-{own.id}") if own else None,
    }
    return made[way]


def _own_cluster(case: Case, found: Sequence[Cluster]) -> Cluster | None:
    """The cluster that the case's adapter was trained for; an imported adapter does not say which."""
    return next((each for each in found if frozenset(each.members) == case.members), None)


# --- asking ----------------------------------------------------------------------------------------------------------


def _fill_in(site: Site, way: str, missing: Sequence[Case], told: Told) -> None:
    kept = told.setdefault(named(way, site), {})
    askers = {"hybrid": ask_product, "prag": ask_prag}
    for case, text in askers.get(way, ask_model)(site, way, missing):
        kept[case.key] = text
        if len(kept) % TOGETHER == 0:
            site.write(ANSWERS, told)
    site.write(ANSWERS, told)


def ask_product(site: Site, way: str, missing: Sequence[Case]) -> Iterator[tuple[Case, str]]:
    """Answers as shipped. What a case took is kept before the text, as `adapter|text`; without one there is none."""
    with EdgeRAG.open(site.trained, settings=site.settings) as rag:
        for case in track(missing, way, console=site.console):
            if site.out_of_time:
                return
            yield case, shipped(rag.ask(case.asking.question))


def shipped(answer: Answer) -> str:
    """An answer as it is kept: the adapter that gave it, and the text."""
    return f"{answer.plan.adapter}|{without_marks(answer.text)}"


def ask_prag(site: Site, way: str, missing: Sequence[Case]) -> Iterator[tuple[Case, str]]:
    """Answers under the sum of the adapters of the first passages."""
    files = rivals.prag_files(site)
    threads = libraries.threads(site.settings)
    sizes = ContextSettings(n_ctx=1024, n_batch=batch_size(site.settings), n_seq_max=1, threads=threads)
    with ExitStack() as stack:
        model = stack.enter_context(_model(site))
        summed = stack.enter_context(closing(Summed(model, sizes, files)))
        builder = PromptBuilder(model)
        for case in track(missing if files else [], way, console=site.console):
            if site.out_of_time:
                return
            best = [chunk for chunk in case.chunks if chunk in summed][: rivals.SUMMED]
            prompt = (*builder.prefix, *builder.tail((), case.asking.question, SHORT))
            yield case, summed.answer(prompt, best, TOKENS).strip()


def ask_model(site: Site, way: str, missing: Sequence[Case]) -> Iterator[tuple[Case, str]]:
    """Answers by plain prefill, those under one adapter together."""
    with ExitStack() as stack:
        house = stack.enter_context(site.house(site.trained))
        with house.database.read() as connection:
            found = clusters.clusters(connection)
        folder = house.school.folder
        files = rivals.rival_files(site) | {each.id: folder.path(each.id) for each in newest(house).values()}
        model = stack.enter_context(_model(site))
        threads = libraries.threads(site.settings)
        engine = make_engine(model, site.settings, threads=threads, adapter_file=files.__getitem__)
        teacher = Teacher(house.database, stack.enter_context(engine), PromptBuilder(model), instructions=SHORT)
        for adapter, part in track(_batches(way, missing, found, files), way, console=site.console):
            if site.out_of_time:
                return
            texts = teacher.answers([(case.asking.question, ask.chunks) for case, ask in part], adapter)
            yield from ((case, text) for (case, _), text in zip(part, texts, strict=True))


def _batches(
    way: str, missing: Sequence[Case], found: Sequence[Cluster], files: Mapping[str, Path]
) -> list[tuple[str, list[tuple[Case, Ask]]]]:
    """Questions under one adapter, some at a time; those whose adapter is not there are left out."""
    by_adapter: dict[str, list[tuple[Case, Ask]]] = defaultdict(list)
    for case in missing:
        ask = asks(way, case, found)
        if ask and (not ask.adapter or ask.adapter in files):
            by_adapter[ask.adapter].append((case, ask))
    return [
        (adapter, each[start : start + TOGETHER])
        for adapter, each in by_adapter.items()
        for start in range(0, len(each), TOGETHER)
    ]


def _model(site: Site) -> Model:
    return Model(model_path(site.settings), gpu_layers=site.settings.engine.gpu_layers)
