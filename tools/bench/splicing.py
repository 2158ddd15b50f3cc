"""`splicing`: what moved passages cost in quality: F1, EM and KL against full prefill, by codec and link tokens.

SQuAD files: the paragraph of a question among its neighbours, in random order, or first, or last (`--gold`). Without
--data questions whose answer needs two passages, from the demo corpus: both passages among those that retrieval finds.
Every way reads the same prompt: prefill of all of it, then kept passages behind the prefix, dequantised, turned and
linked. `apart`: the seams one by one, each seeing mended passages before it, instead of all in one batch.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct
from rich.console import Console
from rich.progress import track

from edge_rag import EdgeRAG
from edge_rag.config import Settings
from edge_rag.native.kv_codec import CODECS, Codec
from edge_rag.native.llama import Context, ContextSettings, Model, Sampler
from edge_rag.native.llama.support import Support, examine
from edge_rag.policy.audit import divergence
from edge_rag.policy.costs import Costs
from edge_rag.records import Passage, Sampling
from edge_rag.runtime.assembly import Assembler
from edge_rag.runtime.kv_cache import KVCache
from edge_rag.runtime.kv_keys import Space
from edge_rag.runtime.kv_memory import KVMemory
from edge_rag.runtime.prompting import Prompt, PromptBuilder
from edge_rag.runtime.requests import Desk
from tools.bench import data, libraries
from tools.bench.answers import SHORT
from tools.bench.metrics import bootstrap, contains_answer, exact_match, f1, mean, percentile
from tools.bench.overhead import model_path
from tools.bench.report import Claim, Result, Row, at_least

LINKS = (0, 4, 8, 16, 32)
PLACES = ("anywhere", "first", "last")
MAX_TOKENS = 32
MAY_LOSE, MAY_LOSE_BOUND = 0.01, 0.03  # F1, point and 95 % bound
# Loading must always seem cheaper: here quality is measured, not the choice.
LOAD = Costs(token=1e3, step=0.0, assemble=0.0, read=0.0, seen=("token", "step", "assemble", "read"))

Floats = npt.NDArray[np.float32]


class Case(Struct, frozen=True):
    """A question with its passages, best first or shuffled."""

    group: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]


class Said(Struct, frozen=True):
    """What one way made of a case; `kl` is the divergence of its first token from full prefill's, in nats."""

    way: str
    answer: str
    kl: float
    same_first: bool


class Asked(Struct, frozen=True):
    """A case and what every way said to it."""

    case: Case
    said: tuple[Said, ...]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark alone."""
    parser.add_argument("--limit", type=int, default=300, help="questions of each SQuAD file and number of passages")
    parser.add_argument("--k", type=int, nargs="+", default=[3, 5], help="passages in a prompt")
    parser.add_argument(
        "--gold", nargs="+", choices=PLACES, default=["anywhere"], help="where the question's paragraph stands"
    )
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument("--links", type=int, nargs="+", default=list(LINKS), help="link tokens, for the first codec")
    parser.add_argument(
        "--part", default="1/1", help="only part I of N of the questions, as I/N: for several processes"
    )
    parser.add_argument("--transcript", type=Path, help="append what was said to each question, as JSON lines")
    parser.add_argument("--read", type=Path, nargs="+", default=[], help="transcripts to evaluate instead of asking")


def run(options: argparse.Namespace, settings: Settings, work: Path, console: Console) -> Result:
    """Measure all ways on all sets."""
    result = Result(notes=[f"Greedy, at most {MAX_TOKENS} tokens; KL in nats of the first token's distribution."])
    asked = [record for file in options.read for record in read_transcript(file)] or ask(
        options, settings, work, console
    )
    for group in dict.fromkeys(entry.case.group for entry in asked):
        result.rows += list(rows(group, [entry for entry in asked if entry.case.group == group]))
    result.claims = [claim for row in result.rows for claim in claims(row, settings)]
    return result


def ask(options: argparse.Namespace, settings: Settings, work: Path, console: Console) -> list[Asked]:
    """Ask all questions in all ways."""
    limit, links = (4, [0, 4]) if options.quick else (options.limit, options.links)
    questions = [
        cases
        for file in options.data
        for k in options.k
        for cases in zip(*(squad_cases(file, k, limit, place) for place in options.gold), strict=True)
    ]
    if not options.data:
        found = list(two_passage_cases(settings, work, max(options.k)))
        questions = [(case,) for case in found[: limit if options.quick else None]]
    part, parts = map(int, options.part.split("/"))
    asked = []
    with Bench(settings, options.codecs, links) as bench:
        chosen = [case for cases in questions[part - 1 :: parts] for case in cases]
        for case in track(chosen, "questions", console=console):
            asked.append(Asked(case, tuple(bench.measure(case))))
            if options.transcript:
                with options.transcript.open("ab") as file:
                    file.write(msgspec.json.encode(asked[-1]) + b"\n")
    return asked


def read_transcript(file: Path) -> list[Asked]:
    """What `--transcript` has written."""
    return [msgspec.json.decode(line, type=Asked) for line in file.read_bytes().splitlines()]


# --- cases -----------------------------------------------------------------------------------------------------------


def squad_cases(file: Path, k: int, limit: int, gold: str) -> Iterator[Case]:
    """Questions spread over a SQuAD file, each with its paragraph and the nearest k - 1 of its article, shuffled.

    `gold` moves the question's paragraph to its place; nothing else changes.
    """
    found = [
        (article["title"].replace("_", " "), article["paragraphs"], place, question)
        for article in json.loads(file.read_text(encoding="utf-8"))["data"]
        for place, paragraph in enumerate(article["paragraphs"])
        for question in paragraph["qas"]
    ]
    rng = random.Random(k)
    for title, paragraphs, place, question in rng.sample(found, min(limit, len(found))):
        near = sorted(range(len(paragraphs)), key=lambda other: abs(other - place))[:k]
        rng.shuffle(near)
        if gold != "anywhere":
            near.sort(key=lambda other: (other == place) == (gold == "last"))
        texts = [paragraphs[other]["context"] for other in near]
        yield Case(
            f"{file.stem}, k = {k}" + ("" if gold == "anywhere" else f", gold {gold}"),
            question["question"],
            tuple(answer["text"] for answer in question["answers"]),
            tuple(_passage(title, text) for text in texts),
        )


def _passage(heading: str, text: str) -> Passage:
    return Passage(0, 0, 0, "", heading, heading, None, text, 0, 0.0)


def two_passage_cases(settings: Settings, work: Path, k: int) -> Iterator[Case]:
    """Questions over the demo corpus with both passages that they need, filled up with what else is retrieved."""
    demo = data.load_demo(data.DEMO)
    libraries.fill(work / "demo", demo, settings)
    with EdgeRAG.open(work / "demo", settings=settings) as rag, libraries.opened(work / "demo") as database:
        places = libraries.places(database)
        for question in data.two_passage_questions():
            needed = [max(places.spans, key=lambda chunk: places.spans[chunk].overlap(span)) for span in question.spans]
            found = rag.search(question.text, top_k=50)
            by_chunk = {passage.chunk_id: passage for passage in found}
            chosen = {chunk: by_chunk[chunk] for chunk in needed if chunk in by_chunk}
            for passage in found:
                if len(chosen) < k:
                    chosen.setdefault(passage.chunk_id, passage)
            if all(chunk in chosen for chunk in needed):
                ranked = sorted(chosen.values(), key=found.index)
                yield Case(f"two passages, k = {k}", question.text, tuple(question.answers), tuple(ranked))


# --- ways ------------------------------------------------------------------------------------------------------------


class Bench:
    """A model in two contexts: one that mends all seams in one batch, one that has sequences for one seam only."""

    def __init__(self, settings: Settings, codecs: Sequence[Codec], links: Sequence[int]) -> None:
        self._links = links
        with ExitStack() as stack:
            model = stack.enter_context(Model(model_path(settings), gpu_layers=settings.engine.gpu_layers))
            self._builder = PromptBuilder(model)
            wide, narrow = (self._context(stack, model, settings, sequences) for sequences in (16, 3))
            support = examine(wide)
            if support.geometry is None:
                raise SystemExit(f"passages of this model cannot be moved: {support.reason}")
            space = Space("bench", "bench", support.geometry)
            self._caches = {
                codec: stack.enter_context(KVCache(space, KVMemory(10**9), None, codec=codec)) for codec in codecs
            }
            self._desks = {codec: self._desk(stack, wide, support, cache) for codec, cache in self._caches.items()}
            first = codecs[0]
            self._apart = self._desk(stack, narrow, support, self._caches[first])
            self._closing = stack.pop_all()

    @staticmethod
    def _context(stack: ExitStack, model: Model, settings: Settings, sequences: int) -> Context:
        sizes = ContextSettings(4096, 512, sequences, libraries.threads(settings))
        return stack.enter_context(Context(model, sizes))

    @staticmethod
    def _desk(stack: ExitStack, context: Context, support: Support, cache: KVCache) -> Desk:
        return Desk(context, stack.enter_context(Assembler(context, support, cache, link=0)))

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def measure(self, case: Case) -> list[Said]:
        """What every way says to a case; the first is full prefill, the last has no passages."""
        passages = tuple(self._builder.passage(passage) for passage in case.passages)
        prompt = Prompt(self._builder.prefix, passages, self._builder.tail([], case.question, SHORT))
        desk = next(iter(self._desks.values()))
        full, answer = self._read(desk, prompt, 0)
        said = [Said("full prefill", answer, 0.0, True)]
        for way, desk, link in self._ways():
            logits, answer = self._spliced(desk, prompt, link)
            said.append(Said(way, answer, divergence(full, logits), bool(full.argmax() == logits.argmax())))
        alone = Prompt(prompt.prefix, (), prompt.tail)
        logits, answer = self._read(desk, alone, 0)
        return [*said, Said("no passages", answer, divergence(full, logits), bool(full.argmax() == logits.argmax()))]

    def _ways(self) -> Iterator[tuple[str, Desk, int]]:
        first, *others = self._desks
        for link in self._links:
            yield f"{first}, r = {link}", self._desks[first], link
        middle = self._links[min(1, len(self._links) - 1)]
        for codec in others:
            yield f"{codec}, r = {middle}", self._desks[codec], middle
        yield f"{first}, r = 8, apart", self._apart, 8

    def _spliced(self, desk: Desk, prompt: Prompt, link: int) -> tuple[Floats, str]:
        """Splice twice when passages had to be computed: the first time keeps them."""
        while True:
            desk.assembler.link, desk.assembler.costs = link, LOAD
            assembled = desk.assemble(prompt)
            if all(plan.source == "ram" for plan in assembled.passages):
                return self._read(desk, prompt, assembled.position)
            desk.clear()
            desk.assembler.keep_computed()
            for cache in self._caches.values():
                cache.flush()

    def _read(self, desk: Desk, prompt: Prompt, position: int) -> tuple[Floats, str]:
        """Read the rest of the prompt and answer greedily; logits of the first token, and the text."""
        context, tokens = desk.context, prompt.tokens
        logits, written = context.logits(desk.read(tokens[position:], position).place), list[int]()
        with Sampler(Sampling()) as sampler:
            while len(written) < MAX_TOKENS and not context.model.ends_generation(token := sampler.sample(context)):
                written.append(token)
                desk.read([token], len(tokens) + len(written) - 1)
        desk.clear()
        return logits, context.model.text(written).strip()


# --- tables ----------------------------------------------------------------------------------------------------------


def rows(group: str, asked: Sequence[Asked]) -> Iterator[Row]:
    """One row a way; ΔF1 is paired, with its 95 % bootstrap interval."""
    cases, said = [entry.case for entry in asked], [entry.said for entry in asked]
    scores = [[f1(entry.answer, case.answers) for entry in entries] for case, entries in zip(cases, said, strict=True)]
    for place, first in enumerate(said[0]):
        entries = [of_case[place] for of_case in said]
        delta = bootstrap([score[place] - score[0] for score in scores])
        kls = [entry.kl for entry in entries]
        answered = partial(zip, cases, entries, strict=True)
        yield {
            "table": group,
            "way": first.way,
            "questions": len(cases),
            "EM": mean([exact_match(entry.answer, case.answers) for case, entry in answered()]),
            "F1": mean([score[place] for score in scores]),
            "contains": mean([contains_answer(entry.answer, case.answers) for case, entry in answered()]),
            "ΔF1": delta.mean,
            "low": delta.low,
            "high": delta.high,
            "KL": mean(kls),
            "KL median": median(kls),
            "KL p95": percentile(kls, 0.95),
            "same first token": mean([float(entry.same_first) for entry in entries]),
        }


def claims(row: Row, settings: Settings) -> list[Claim]:
    """What is promised of the default setting."""
    if row["way"] != f"{settings.kv.codec}, r = {settings.kv.link_tokens}":
        return []
    name = f"{row['table']}: F1 of {row['way']} against full prefill"
    return [
        at_least(f"{name}, point", float(str(row["ΔF1"])), -MAY_LOSE),
        at_least(f"{name}, 95 % bound", float(str(row["low"])), -MAY_LOSE_BOUND),
    ]
