"""`ttft`: seconds to the first token with passages as KV, against plain prefill and against the question alone.

Ways, taking turns on the same prompts: `plain` (a bare loop that keeps nothing, in batches of the settings' size and of
512; the faster is the baseline), `prefix` (our engine without a cache: it restores the prefix, as llama-server does for
prompts that begin alike), `ram` and `ssd` (our engine with every passage kept there; for `ssd` the files' pages are
dropped before each request), and the floor: the question alone, decoded against the same context. No two prompts begin
with the same passage, so that no kept state of an earlier prompt serves them.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from msgspec import Struct
from rich.console import Console
from rich.progress import track

from edge_rag.config import Settings
from edge_rag.records import PassagePlan
from edge_rag.runtime.parts import batch_size
from edge_rag.runtime.prompting import Prompt
from tools.bench.kv import AMPLE_MB, PLAIN_BATCH, Bench, Serving, described
from tools.bench.report import Claim, Result, Row, at_least, at_most
from tools.bench.stages import stage_rows
from tools.bench.yielding import ARRIVALS, QUICK_ARRIVALS, yield_row

PASSAGES, QUICK_PASSAGES = (1, 3, 5, 10), (1, 3)
LINKS, QUICK_LINKS = (0, 4, 8, 16), (0, 4)
REPETITIONS, QUICK_REPETITIONS = 3, 1
STAGED = 5  # passages of the prompts whose stages are measured
TARGETS = {(1, "ram"): 3.0, (1, "ssd"): 3.0, (5, "ram"): 12.0, (5, "ssd"): 10.0}  # times faster than plain prefill
YIELD_MS = 50.0  # a request waits for idle work at most so long
FLOOR = 2.5  # at most so many times the question alone, at STAGED passages
OURS = ("ram", "ssd")
PREFIX, FLOOR_WAY = "prefix", "question alone"


class Sample(Struct, frozen=True):
    """Seconds to the first token of a prompt of so many tokens, and what became of its passages."""

    seconds: float
    tokens: int
    passages: tuple[PassagePlan, ...] = ()


Samples = dict[str, Sample]  # by way


class Cell(Struct, frozen=True):
    """The samples of all prompts of `k` passages."""

    k: int
    samples: list[Samples]

    def median(self, way: str) -> float:
        """Median of a way's seconds."""
        return median(sample[way].seconds for sample in self.samples)

    def ratios(self, over: str, way: str) -> list[float]:
        """How many times as long `over` took, prompt by prompt."""
        return [sample[over].seconds / sample[way].seconds for sample in self.samples]

    @property
    def baseline(self) -> str:
        """The faster way of plain prefill."""
        return min((way for way in self.samples[0] if way.startswith("plain")), key=self.median)


def numbers(text: str) -> tuple[int, ...]:
    """Numbers in a list with commas."""
    return tuple(int(part) for part in text.split(","))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark alone."""
    parser.add_argument("--k", type=numbers, help=f"passages of a prompt, as 1,3 (default {PASSAGES})")
    parser.add_argument("--links", type=numbers, help=f"linked tokens whose stages are measured (default {LINKS})")
    parser.add_argument("--repetitions", type=int, help=f"prompts of each kind (default {REPETITIONS})")


def run(options: argparse.Namespace, settings: Settings, work: Path, console: Console) -> Result:
    """Measure all ways on all prompts, then the stages of ours."""
    wanted = options.k or (QUICK_PASSAGES if options.quick else PASSAGES)
    links = options.links or (QUICK_LINKS if options.quick else LINKS)
    repetitions = options.repetitions or (QUICK_REPETITIONS if options.quick else REPETITIONS)
    count = len(wanted) * repetitions + max(wanted)
    with Bench(settings, options.data, work, count, quick=options.quick) as bench:
        ks = [k for k in wanted if bench.fits(k)]
        if not ks:
            return Result(notes=["No prompt fits the model's context."])
        cells, again = measure(bench, ks, repetitions, console)
        bench.drop_page_cache()
        cold, warm = bench.read_rate() / 1e6, bench.read_rate() / 1e6
        console.print("stages")
        interrupted = yield_row(bench, QUICK_ARRIVALS if options.quick else ARRIVALS)
        stages = stage_rows(bench, bench.prompt(range(min(STAGED, max(ks)))), links, repetitions)
    result = Result(rows=[*(row for cell in cells for row in cell_rows(cell)), again, interrupted, *stages])
    result.claims = [claim for cell in cells for claim in claims(cell)]
    most = float(str(interrupted["most ms"]))
    result.claims.append(at_most("a request during idle work: longest wait", most, YIELD_MS, "ms"))
    result.notes = [
        f"Medians of {repetitions} prompts of each kind; × and ÷ are medians of the ratios prompt by prompt.",
        f"Links of {settings.kv.link_tokens} tokens, codec {settings.kv.codec}, {bench.threads} threads.",
        f"KV files are read at {cold:.0f} MB/s after their pages were dropped, at {warm:.0f} MB/s from the page cache.",
        *(f"{k} passages do not fit the model's context." for k in wanted if k not in ks),
        *(note for cell in cells for note in strangers(cell)),
    ]
    return result


def measure(bench: Bench, ks: Sequence[int], repetitions: int, console: Console) -> tuple[list[Cell], Row]:
    """A cell for each k, and a row for a question that is asked again."""
    console.print("computing the passages' KV")
    with bench.serving(ram_mb=AMPLE_MB) as serving:
        keep_all(bench, serving, max(ks))
    with ExitStack() as stack:
        rig = Rig(bench, stack)
        keep_all(bench, rig.ram, max(ks))  # from the SSD into RAM
        cells = {k: Cell(k, []) for k in ks}
        rounds = [(k, turn) for turn in range(repetitions) for k in ks]
        rig.sample(bench.prompt([0]), 0)  # to warm up
        for first, (k, turn) in enumerate(track(rounds, "prompts", console=console), start=1):
            prompt = bench.prompt(range(first, first + k), turn)
            cells[k].samples.append(rig.sample(prompt, first))
        again = rig.first_token(rig.ram, prompt)
    return list(cells.values()), _again_row(prompt, again)


def keep_all(bench: Bench, serving: Serving, most: int) -> None:
    """Have all passages kept. All these prompts begin with passage 0, with which no measured one does."""
    step = max(1, most - 1)
    for start in range(1, len(bench.excerpts), step):
        serving.ask(bench.prompt([0, *range(start, min(start + step, len(bench.excerpts)))]))


class Rig:
    """All ways, ready to take the same prompt one after the other."""

    def __init__(self, bench: Bench, stack: ExitStack) -> None:
        self._bench = bench
        self.ram = stack.enter_context(bench.serving(ram_mb=AMPLE_MB))
        self._ssd = stack.enter_context(bench.serving(ram_mb=0))
        self._prefix = stack.enter_context(bench.serving(keep=False))
        sizes = sorted({batch_size(bench.settings), PLAIN_BATCH})
        self._plain = {f"plain, batches of {size}": stack.enter_context(bench.plain(size)) for size in sizes}

    def sample(self, prompt: Prompt, turn: int) -> Samples:
        """Every way's sample of one prompt; who goes first changes with `turn`."""
        measures = [self._plain_samples, self._ram_sample, self._ssd_sample, self._prefix_sample]
        first = turn % len(measures)
        found: Samples = {}
        for measure_way in (*measures[first:], *measures[:first]):
            found |= measure_way(prompt)
        return found

    @staticmethod
    def first_token(serving: Serving, prompt: Prompt) -> Sample:
        """Seconds as the caller sees them, from submitting the request."""
        finished = serving.ask(prompt)
        return Sample(finished.first_token, len(prompt), finished.passages)

    def _plain_samples(self, prompt: Prompt) -> Samples:
        found = {}
        for name, plain in self._plain.items():
            found[name] = Sample(plain.answer(prompt)[0], len(prompt))
            alone = plain.question_alone(prompt)
        return found | {FLOOR_WAY: Sample(alone, len(prompt.tail))}

    def _prefix_sample(self, prompt: Prompt) -> Samples:
        return {PREFIX: self.first_token(self._prefix, prompt)}

    def _ram_sample(self, prompt: Prompt) -> Samples:
        return {"ram": self.first_token(self.ram, prompt)}

    def _ssd_sample(self, prompt: Prompt) -> Samples:
        self._bench.drop_page_cache()
        return {"ssd": self.first_token(self._ssd, prompt)}


# --- rows ------------------------------------------------------------------------------------------------------------


def cell_rows(cell: Cell) -> Iterator[Row]:
    """A row for each way."""
    for way in sorted(cell.samples[0], key=cell.median, reverse=True):
        speed, floor = cell.ratios(cell.baseline, way), cell.ratios(way, FLOOR_WAY)
        seconds = [sample[way].seconds for sample in cell.samples]
        yield {
            "table": "seconds to the first token",
            "k": cell.k,
            "way": way,
            "median ms": 1e3 * median(seconds),
            "least": 1e3 * min(seconds),
            "most": 1e3 * max(seconds),
            "× plain": median(speed),
            "least ×": min(speed),
            "÷ question alone": median(floor),
            "tokens": median(sample[way].tokens for sample in cell.samples),
            "passages": " | ".join(sorted({described(sample[way].passages) for sample in cell.samples})),
        }


def _again_row(prompt: Prompt, again: Sample) -> Row:
    return {
        "table": "the same question once more",
        "k": len(prompt.passages),
        "ms": 1e3 * again.seconds,
        "passages": described(again.passages),
    }


def claims(cell: Cell) -> Iterator[Claim]:
    """What is promised for prompts of so many passages."""
    for way in OURS:
        speed = median(cell.ratios(cell.baseline, way))
        yield at_least(f"k = {cell.k}, {way}: {cell.baseline} ÷ ours", speed, TARGETS.get((cell.k, way), 1.0), "×")
    if cell.k == STAGED:
        for way in OURS:
            ratio = median(cell.ratios(way, FLOOR_WAY))
            yield at_most(f"k = {cell.k}, {way}: ours ÷ the question alone", ratio, FLOOR, "×")


def strangers(cell: Cell) -> Iterator[str]:
    """A warning when a passage came from elsewhere than the row says; recomputing may be what pays."""
    for way in OURS:
        sources = {plan.source for sample in cell.samples for plan in sample[way].passages}
        if not sources <= {way, "none"}:
            yield f"NOT AS THE ROW SAYS: k = {cell.k}, {way}: passages came from {', '.join(sorted(sources))}."
