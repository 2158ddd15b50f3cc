"""What an adapter costs and saves: time by coverage, tokens a second by target, bytes by passage. Nothing is trained.

Adapters are blank (`tools.bench.blank_loras`): they say nothing and cost what trained ones do. Passages and prompts are
those of `ttft` (`tools.bench.kv`). Of each prompt of five passages 0 to 5 are covered: they stay out, the others come
from RAM, and question and answer are computed under the adapter. Plain RAG reads all of it: our engine without a cache,
which keeps the prefix, or a bare loop in batches of 512; the faster is the baseline.

End to end is counted to a set number of tokens: an answer may end sooner, or be longer, for reasons of its own.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import fmean, median

from msgspec import Struct
from msgspec.structs import replace
from rich.console import Console
from rich.progress import track

from edge_rag.config import Settings
from edge_rag.native.llama import Context, LoRA, Run, Sampler
from edge_rag.native.llama.geometry import Geometry
from edge_rag.records import Sampling
from edge_rag.runtime.kv_cache import KVCache
from edge_rag.runtime.parts import make_cache, make_engine
from edge_rag.runtime.prompting import Prompt
from edge_rag.store import library
from tools.bench.blank_loras import Blank, shapes_of, weight_bytes, write_blank
from tools.bench.kv import AMPLE_MB, PLAIN_BATCH, Bench, Serving
from tools.bench.report import Claim, Result, Row, at_least, at_most

K = 5  # passages of a prompt
ANSWER = 16  # tokens
REPETITIONS, QUICK_REPETITIONS = 10, 1
FULL_TO_PLAIN = 0.39  # of plain RAG's longest end to end
BLANK = Blank("ffn", 16)
BLANKS = (
    *(Blank("down", rank) for rank in (16, 32)),
    Blank("ffn", 16),
    Blank("all", 16),
    *(Blank(each.targets, each.rank, "last_half") for each in (Blank("down", 32), Blank("ffn", 16), Blank("all", 16))),
)
DECODED, QUICK_DECODED = 96, 4  # tokens
ROUNDS, QUICK_ROUNDS = 5, 1
PRAG = Blank("ffn", 2)
MANY = 2000  # passages
PLAIN, BARE, SPLICED, FULL = "plain", "bare loop", "0 covered", f"{K} covered"


class Sample(Struct, frozen=True):
    """Seconds to the first token, and from one token to the next."""

    first: float
    step: float

    @property
    def total(self) -> float:
        """Seconds to the end of an answer of ANSWER tokens."""
        return self.first + (ANSWER - 1) * self.step


Way = Callable[[Prompt], Sample]
Samples = dict[str, list[Sample]]  # by way, in the order of the prompts


# --- latency ---------------------------------------------------------------------------------------------------------


def latency(settings: Settings, paths: Sequence[Path], work: Path, console: Console, *, quick: bool) -> Result:
    """Time to the first token, and end to end, by coverage."""
    repetitions = QUICK_REPETITIONS if quick else REPETITIONS
    with ExitStack() as stack:
        bench = stack.enter_context(Bench(settings, paths, work, K + repetitions, quick=quick))
        blank = write_blank(work, shapes_of(bench.model), BLANK)
        ours = stack.enter_context(serving(bench, blank))
        for start in range(0, len(bench.excerpts), K):
            ours.ask(bench.prompt(range(start, start + K)))
        ways: dict[str, Way] = {PLAIN: partial(_served, stack.enter_context(bench.serving(keep=False)))}
        bare = stack.enter_context(bench.plain(PLAIN_BATCH))
        samples: Samples = {way: [] for way in (PLAIN, BARE, *map(_covered_name, range(K + 1)))}
        ways |= {_covered_name(count): partial(_covered, ours, count, str(blank)) for count in range(K + 1)}
        _covered(ours, K, str(blank), bench.prompt(range(K)))  # it is loaded
        for turn in track(range(repetitions), "latency", console=console):
            prompt = bench.prompt(range(turn + 1, turn + 1 + K), turn)
            samples[BARE].append(Sample(*_bare(bare.answer(prompt, ANSWER))))
            for way in _turned(list(ways), turn):
                samples[way].append(ways[way](prompt))
        page_in = ours.engine.pager.status() if ours.engine.pager else None
    notes = [f"End to end to {ANSWER} tokens; {repetitions} prompts of {K} passages; adapter {BLANK.name}."]
    if page_in and page_in.page_ins:
        notes.append(f"Loading the adapter took {1000 * page_in.page_in_seconds / page_in.page_ins:.0f} ms, once.")
    return Result(rows=list(_latency_rows(samples)), claims=latency_claims(samples), notes=notes)


@contextlib.contextmanager
def serving(bench: Bench, adapter: Path) -> Iterator[Serving]:
    """As `Bench.serving`, with passages in RAM and an adapter that is named by its path."""
    settings = replace(bench.settings, kv=replace(bench.settings.kv, ram_mb=AMPLE_MB))
    with ExitStack() as stack:
        kept: list[KVCache] = []

        def cache(geometry: Geometry | None) -> KVCache:
            kept.append(stack.enter_context(make_cache(settings, bench.home, geometry)))
            return kept[0]

        made = make_engine(bench.model, settings, threads=bench.threads, cache=cache, adapter_file=lambda name: adapter)
        yield Serving(stack.enter_context(made), kept[0])


def _turned(ways: Sequence[str], turn: int) -> list[str]:
    """Who goes first changes."""
    first = turn % len(ways)
    return [*ways[first:], *ways[:first]]


def _covered_name(count: int) -> str:
    return f"{count} covered"


def _covered(ours: Serving, count: int, adapter: str, prompt: Prompt) -> Sample:
    """The first passages stay out, and the rest is answered under the adapter."""
    return _served(ours, covered(prompt, count, adapter))


def covered(prompt: Prompt, count: int, adapter: str) -> Prompt:
    """The prompt without its first `count` passages, under an adapter if that is any."""
    if not count:
        return prompt
    return replace(prompt, passages=prompt.passages[count:], chunks=prompt.chunks[count:], adapter=adapter)


def _served(served: Serving, prompt: Prompt) -> Sample:
    started = time.perf_counter()
    finished = served.answer(prompt, ANSWER)
    total = time.perf_counter() - started
    served.settle()
    written = max(2, finished.usage.completion_tokens)
    return Sample(finished.first_token, (total - finished.first_token) / (written - 1))


def _bare(seconds: tuple[float, float]) -> tuple[float, float]:
    first, total = seconds
    return first, (total - first) / (ANSWER - 1)


def baseline(samples: Samples) -> str:
    """The faster way of plain RAG."""
    return min((PLAIN, BARE), key=lambda way: median(sample.total for sample in samples[way]))


def _latency_rows(samples: Samples) -> Iterator[Row]:
    plain = samples[baseline(samples)]
    for way, each in samples.items():
        firsts, totals = [sample.first for sample in each], [sample.total for sample in each]
        shares = [sample.total / other.total for sample, other in zip(each, plain, strict=True)]
        spliced = [sample.total / other.total for sample, other in zip(each, samples[SPLICED], strict=True)]
        yield {
            "table": f"latency at {K} passages",
            "way": way,
            "first token ms": 1000 * median(firsts),
            "most": 1000 * max(firsts),
            "end to end ms": 1000 * median(totals),
            "longest": 1000 * max(totals),
            "ms a token": 1000 * median(sample.step for sample in each),
            "÷ plain": median(shares),
            "÷ spliced": median(spliced),
        }


def latency_claims(samples: Samples) -> list[Claim]:
    """Full coverage against plain and against spliced RAG."""
    plain, spliced, full = samples[baseline(samples)], samples[SPLICED], samples[FULL]
    longest = max(sample.total for sample in full) / max(sample.total for sample in plain)
    firsts = median(one.first / other.first for one, other in zip(full, spliced, strict=True))
    totals = median(one.total / other.total for one, other in zip(full, spliced, strict=True))
    return [
        at_most("longest end to end, all covered ÷ plain RAG", longest, FULL_TO_PLAIN, "×"),
        at_most("first token, all covered ÷ spliced RAG", firsts, 1.0, "×"),
        at_most("end to end, all covered ÷ spliced RAG", totals, 1.0, "×"),
    ]


# --- decoding --------------------------------------------------------------------------------------------------------


def decoding(settings: Settings, paths: Sequence[Path], work: Path, console: Console, *, quick: bool) -> Result:
    """Tokens a second under each kind of adapter, against none, taking turns."""
    count, rounds = (QUICK_DECODED, QUICK_ROUNDS) if quick else (DECODED, ROUNDS)
    with ExitStack() as stack:
        bench = stack.enter_context(Bench(settings, paths, work, 1, quick=quick))
        shapes = shapes_of(bench.model)
        adapters: dict[str, LoRA | None] = {"none": None}
        for blank in BLANKS:
            adapters[blank.name] = stack.enter_context(LoRA(bench.model, write_blank(work, shapes, blank)))
        context = stack.enter_context(Context(bench.model, bench.sizes))
        prompt = bench.prompt([0]).tokens
        rates: dict[str, list[float]] = {name: [] for name in adapters}
        for turn in track(range(rounds), "decoding", console=console):
            for name in _turned(list(adapters), turn):
                context.wear(adapters[name])
                rates[name].append(decode_rate(context, prompt, count))
        context.wear(None)
        sizes = {blank.name: weight_bytes(shapes, blank) for blank in BLANKS}
    rows: list[Row] = [
        {
            "table": "decoding under an adapter",
            "adapter": name,
            "tokens/s": median(each),
            "of none": median(one / other for one, other in zip(each, rates["none"], strict=True)),
            "MB": sizes.get(name, 0) / 1e6,
        }
        for name, each in rates.items()
    ]
    return Result(rows=rows, notes=[f"{count} tokens, {rounds} rounds in turns; {bench.threads} threads."])


def decode_rate(context: Context, prompt: Sequence[int], count: int) -> float:
    """Tokens a second of greedy decoding behind a prompt; the end of generation is ignored."""
    context.clear(0)
    step, place = context.settings.n_batch, 0
    for start in range(0, len(prompt), step):
        (place,) = context.decode([Run(prompt[start : start + step], 0, start, logits=True)])
    with Sampler(Sampling()) as sampler:
        token = sampler.sample(context, place)
        started = time.perf_counter()
        for offset in range(count):
            (place,) = context.decode([Run((token,), 0, len(prompt) + offset, logits=True)])
            token = sampler.sample(context, place)
    return count / (time.perf_counter() - started)


# --- storage ---------------------------------------------------------------------------------------------------------


def storage(
    settings: Settings, paths: Sequence[Path], work: Path, console: Console, *, sizes: Sequence[int], quick: bool
) -> Result:
    """Bytes of a passage as adapter, as P-RAG's adapter, and as text with KV. `sizes`: passages of each adapter."""
    console.print("computing the passages' KV")
    with Bench(settings, paths, work, 2 * K, quick=quick) as bench:
        shapes = shapes_of(bench.model)
        with bench.serving(ram_mb=AMPLE_MB) as served:
            for start in range(0, len(bench.excerpts), K):
                served.ask(bench.prompt(range(start, start + K)))
        kv = fmean(file.stat().st_size for file in bench.files())
        with bench.home.database.read() as connection:
            found = library.passages(connection, [excerpt.chunk_id for excerpt in bench.excerpts])
        text = fmean(len(passage.text.encode()) for passage in found.values())
    wanted = settings.learning
    own = Blank(wanted.targets, wanted.rank, wanted.layers)
    members = fmean(sizes) if sizes else float(wanted.most_passages)
    each = {
        f"adapter {own.name}, {members:.0f} passages each": weight_bytes(shapes, own) / members,
        f"P-RAG, rank {PRAG.rank}": float(weight_bytes(shapes, PRAG)),
        f"text and KV ({settings.kv.codec})": text + kv,
        "text": text,
    }
    ours, prag = list(each.values())[:2]
    rows: list[Row] = [
        {
            "table": "storage",
            "kept as": name,
            "bytes a passage": size,
            f"MB of {MANY}": size * MANY / 1e6,
            "÷ ours": size / ours,
        }
        for name, size in each.items()
    ]
    many = f"{MANY} passages take {prag * MANY / 1e6:.0f} MB as P-RAG's adapters, {ours * MANY / 1e6:.0f} MB as ours"
    note = f"Adapters in float16; {many}."
    return Result(rows=rows, claims=[at_least("bytes a passage, P-RAG ÷ ours", prag / ours, 1.0, "×")], notes=[note])
