"""`throughput`: questions a second under Zipf traffic, against plain prefill; what each tier serves; eviction policies.

Questions come one after the other, each with some passages drawn by Zipf's law. Ours starts with empty caches and goes
on with a second trace of the same popularity, warmed; RAM holds only a share of the passages' KV, the SSD all of it.
Plain prefill is measured on some of the first trace's questions and writes as many tokens for each as ours did. The
rows beside RAG-DCache (arXiv 2504.11765, one instance) have its shape: one document a prompt.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import get_args

import numpy as np
from msgspec import Struct
from rich.console import Console
from rich.progress import track

from edge_rag.config import Settings
from edge_rag.native.kv_blob import KVShape
from edge_rag.native.kv_codec import Codec, section_shapes
from edge_rag.native.llama.geometry import geometry
from edge_rag.policy.eviction import Rank
from edge_rag.records import KVSource
from edge_rag.runtime.generations import Finished
from edge_rag.runtime.parts import MEGABYTE, batch_size
from edge_rag.runtime.prompting import Prompt
from tools.bench.kv import PLAIN_BATCH, Bench, Serving
from tools.bench.metrics import percentile
from tools.bench.report import Claim, Result, Row, at_least
from tools.bench.traces import Trace, drifted, questions, replay, zipf

QUESTIONS, QUICK_QUESTIONS = 500, 6
PLAIN_QUESTIONS, QUICK_PLAIN = 30, 2
PASSAGES, QUICK_PASSAGES = 200, 8
EXPONENTS = (0.8, 1.1)
PASSAGES_EACH = 3
MAX_TOKENS, QUICK_TOKENS = 32, 4
BUDGET = 0.25  # share of the passages' KV that RAM may hold
CAPACITIES = (0.1, 0.25, 0.5)  # of all bytes, for the eviction policies
FASTER = 4.0
PUBLISHED = {"published TTFT": "-10 to -20 %", "published throughput": "+14 to +15 %"}


class Served(Struct, frozen=True):
    """What became of a trace: seconds for all of it, and each question's end."""

    seconds: float
    ends: list[Finished]

    @property
    def rate(self) -> float:
        """Questions a second."""
        return len(self.ends) / self.seconds


class Baseline(Struct, frozen=True):
    """Plain prefill on some of the questions: (seconds to the first token, and to the last) of each."""

    n_batch: int
    seconds: list[tuple[float, float]]

    @property
    def rate(self) -> float:
        """Questions a second."""
        return 1 / fmean(total for _, total in self.seconds)


class Measured(Struct, frozen=True):
    """One kind of traffic, served in all ways."""

    exponent: float
    passages: int
    plain: Baseline
    empty: Served
    warmed: Served


class Size(Struct, frozen=True):
    """How much is asked."""

    questions: int
    plain: int
    tokens: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark alone."""
    parser.add_argument("--questions", type=int, help=f"questions of a trace (default {QUESTIONS})")
    parser.add_argument("--plain", type=int, help=f"those that plain prefill answers (default {PLAIN_QUESTIONS})")
    parser.add_argument("--passages", type=int, help=f"passages of the library (default {PASSAGES})")
    parser.add_argument("--exponents", type=float, nargs="+", default=EXPONENTS, help=f"of Zipf's law ({EXPONENTS})")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"share of the KV that RAM may hold ({BUDGET})")


def run(options: argparse.Namespace, settings: Settings, work: Path, console: Console) -> Result:
    """Serve all traffic in all ways, then replay the traces with other policies."""
    quick = options.quick
    size = Size(
        questions=options.questions or (QUICK_QUESTIONS if quick else QUESTIONS),
        plain=options.plain or (QUICK_PLAIN if quick else PLAIN_QUESTIONS),
        tokens=QUICK_TOKENS if quick else MAX_TOKENS,
    )
    wanted = options.passages or (QUICK_PASSAGES if quick else PASSAGES)
    with Bench(settings, options.data, work, wanted, quick=quick) as bench:
        ram_mb = ram_budget(bench, options.budget)
        kinds = [(exponent, PASSAGES_EACH) for exponent in options.exponents] + [(options.exponents[0], 1)]
        measured = [measure(bench, exponent, each, size, ram_mb, console) for exponent, each in kinds]
        tokens = [len(excerpt.tokens) for excerpt in bench.excerpts]
    many, single = measured[:-1], measured[-1]
    result = Result(rows=[row for entry in many for row in rows(entry)] + list(rows(single)) + [_published_row(single)])
    result.rows += [row for entry in many for row in eviction_rows(entry, tokens, size.questions)]
    result.claims = [claim for entry in many for claim in claims(entry)]
    result.notes = [
        f"{len(tokens)} passages of {fmean(tokens):.0f} tokens, at most {size.tokens} tokens an answer, greedy.",
        f"RAM for {ram_mb} MB of KV ({options.budget:.0%} of all passages'), codec {settings.kv.codec}; SSD for all.",
        f"Plain prefill answered {len(single.plain.seconds)} of {size.questions} questions of each kind.",
    ]
    return result


def ram_budget(bench: Bench, share: float) -> int:
    """Megabytes that hold this share of the KV of all passages, at least 1."""
    shape = geometry(bench.model)
    if isinstance(shape, str):  # whole states only: whatever the settings say
        return bench.settings.kv.ram_mb
    total = sum(kept_bytes(bench.settings.kv.codec, shape.shape, len(excerpt.tokens)) for excerpt in bench.excerpts)
    return max(1, int(share * total / MEGABYTE))


def kept_bytes(codec: Codec, shape: KVShape, tokens: int) -> int:
    """What a passage takes in RAM."""
    sections = section_shapes(codec, layers=shape.layers, tokens=tokens, k_width=shape.k_width, v_width=shape.v_width)
    return sum(math.prod(sizes) * np.dtype(kind).itemsize for kind, sizes in sections.values())


def make_trace(items: int, exponent: float, each: int, length: int, seed: int) -> Trace:
    """So many questions with `each` passages."""
    each = min(each, items)
    trace: Trace = []
    draws = length * each
    while len(trace) < length:
        draws *= 2
        trace = questions(zipf(items, exponent, draws, seed), each)
    return trace[:length]


# --- serving ---------------------------------------------------------------------------------------------------------


def measure(bench: Bench, exponent: float, each: int, size: Size, ram_mb: int, console: Console) -> Measured:
    """Serve two traces of one popularity, and some questions of the first one by plain prefill."""
    first, second = (
        [
            bench.prompt(places, turn)
            for turn, places in enumerate(make_trace(len(bench.excerpts), exponent, each, size.questions, seed))
        ]
        for seed in (0, 1)
    )
    bench.forget()
    name = f"Zipf {exponent}, {each} a question"
    with bench.serving(ram_mb=ram_mb) as serving:
        empty = serve(serving, first, size.tokens, f"{name}, empty", console)
        warmed = serve(serving, second, size.tokens, f"{name}, warmed", console)
    plain = serve_plain(bench, first, empty.ends, size.plain, f"{name}, plain", console)
    return Measured(exponent, each, plain, empty, warmed)


def serve(serving: Serving, prompts: Sequence[Prompt], tokens: int, name: str, console: Console) -> Served:
    """Ask everything, one after the other; what is left to be written at the end counts."""
    started = time.perf_counter()
    ends = [serving.answer(prompt, tokens) for prompt in track(prompts, name, console=console)]
    serving.settle()
    return Served(time.perf_counter() - started, ends)


def serve_plain(
    bench: Bench, prompts: Sequence[Prompt], ends: Sequence[Finished], count: int, name: str, console: Console
) -> Baseline:
    """Some of the questions by plain prefill, with the size of batches that is faster on the first of them."""
    step = max(1, len(prompts) // count)
    chosen = list(zip(prompts, ends, strict=True))[::step][:count]
    n_batch = faster_batches(bench, chosen[0][0])
    with bench.plain(n_batch) as plain:
        seconds = [plain.answer(prompt, written(end)) for prompt, end in track(chosen, name, console=console)]
    return Baseline(n_batch, seconds)


def faster_batches(bench: Bench, prompt: Prompt) -> int:
    """The size of batches in which plain prefill reads a prompt sooner."""
    sizes = sorted({batch_size(bench.settings), PLAIN_BATCH})
    if len(sizes) == 1:
        return sizes[0]
    seconds = {}
    for n_batch in sizes:
        with bench.plain(n_batch) as plain:
            seconds[n_batch] = min(plain.answer(prompt)[0] for _ in range(2))
    return min(seconds, key=seconds.__getitem__)


def written(end: Finished) -> int:
    """Tokens that were sampled for an answer: what ends it is not part of its text."""
    return end.usage.completion_tokens + (end.reason == "stop")


# --- rows ------------------------------------------------------------------------------------------------------------


def rows(measured: Measured) -> Iterator[Row]:
    """Plain prefill, then ours with empty caches and warmed."""
    plain = measured.plain
    kind: Row = {"table": "questions", "Zipf": measured.exponent, "passages": measured.passages}
    firsts = [first for first, _ in plain.seconds]
    yield kind | _speed_columns(f"plain, batches of {plain.n_batch}", plain.rate, plain.rate, firsts)
    for way, served in (("ours, empty", measured.empty), ("ours, warmed", measured.warmed)):
        firsts = [end.first_token for end in served.ends]
        yield kind | _speed_columns(way, served.rate, plain.rate, firsts) | hit_rates(served)


def _speed_columns(way: str, rate: float, plain: float, firsts: Sequence[float]) -> Row:
    return {
        "way": way,
        "questions/s": rate,
        "× plain": rate / plain,
        "first token, median s": median(firsts),
        "95 %": percentile(firsts, 0.95),
    }


def hit_rates(served: Served) -> Row:
    """The share of passages that came from each place; `none` were recomputed in place."""
    sources = Counter(plan.source for end in served.ends for plan in end.passages)
    return {source: sources[source] / max(1, sources.total()) for source in get_args(KVSource)}


def _published_row(measured: Measured) -> Row:
    plain = measured.plain
    ours = fmean(end.first_token for end in measured.warmed.ends)
    return {
        "table": "one document a prompt, beside RAG-DCache",
        "TTFT": f"{ours / fmean(first for first, _ in plain.seconds) - 1:+.0%}",
        "throughput": f"{measured.warmed.rate / plain.rate - 1:+.0%}",
        **PUBLISHED,
    }


def claims(measured: Measured) -> Iterator[Claim]:
    """What is promised under this traffic."""
    for way, served in (("empty", measured.empty), ("warmed", measured.warmed)):
        ratio = served.rate / measured.plain.rate
        yield at_least(f"Zipf {measured.exponent}, caches {way}: questions/s ÷ plain", ratio, FASTER, "×")


# --- eviction --------------------------------------------------------------------------------------------------------


def eviction_rows(measured: Measured, tokens: Sequence[int], length: int) -> Iterator[Row]:
    """The first trace, as it is and with a change half-way, replayed with each policy: shares of what was asked for.

    Bytes and seconds of a passage are in proportion to its tokens.
    """
    steady = make_trace(len(tokens), measured.exponent, measured.passages, length, 0)
    seconds = list(map(float, tokens))
    for name, trace in (("steady", steady), ("changes", drifted(steady, len(tokens), 0))):
        for capacity in CAPACITIES:
            room = int(capacity * sum(tokens))
            for rank in get_args(Rank):
                found = replay(trace, tokens, seconds, room, rank)
                yield {
                    "table": "eviction",
                    "Zipf": measured.exponent,
                    "trace": name,
                    "capacity": capacity,
                    "policy": "ours" if rank == "saved" else rank.upper(),
                    "hits": found.hits,
                    "seconds saved": found.seconds,
                    "writes": found.writes,
                }
