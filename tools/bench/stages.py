"""Where the time to the first token goes: the product's assembler over a context with a stopwatch.

`gather` is all in front of llama.cpp: finding, dequantising, turning and writing the passages' KV into one state;
`set_data` hands that to llama.cpp; `link` decodes the seams; `question` the tail, up to its logits. Seams are decoded
together, as the product does, or one by one: as when a batch had room for the seam of one passage only.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import llama_cpp.llama_cpp as lib
from msgspec import Struct
from msgspec.structs import replace

from edge_rag.native.kv_blob import Buffer
from edge_rag.native.kv_codec import Codec
from edge_rag.native.llama import Context, ContextSettings, Model, Run
from edge_rag.native.llama.support import examine
from edge_rag.policy.costs import Costs
from edge_rag.records import PassagePlan
from edge_rag.runtime.assembly import Assembler
from edge_rag.runtime.parts import SEAMS, batch_size, make_cache
from edge_rag.runtime.prompting import Prompt
from edge_rag.runtime.requests import Desk
from tools.bench.kv import AMPLE_MB, Bench, described
from tools.bench.report import Row

# Loading must always seem cheaper: here the way is measured, not the choice.
LOAD = Costs(token=1e3, step=0.0, assemble=0.0, read=0.0, seen=("token", "step", "assemble", "read"))
ONE_BY_ONE = 8  # linked tokens with which seams are decoded one by one, too

STAGES = ("gather", "set_data", "link", "question")


class Stopwatch(Context):
    """A context that adds up the seconds of what the assembler has it do."""

    def __init__(self, model: Model, settings: ContextSettings) -> None:
        super().__init__(model, settings)
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def restore(self, sequence: int, state: Buffer) -> None:
        """As `Context.restore`."""
        with self._timed("set_data"):
            super().restore(sequence, state)

    def decode(self, runs: Sequence[Run]) -> tuple[int, ...]:
        """As `Context.decode`."""
        with self._timed("link"):
            return super().decode(runs)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        lib.llama_synchronize(self.handle)  # a GPU may still be at it
        self.seconds[stage] += time.perf_counter() - started


class Staged(Struct, frozen=True):
    """Seconds by stage, and what became of the passages."""

    seconds: dict[str, float]
    passages: tuple[PassagePlan, ...]


class Setup(Struct, frozen=True):
    """How the seams are decoded; `n_batch` is the most that is decoded at once."""

    name: str
    link: int
    n_batch: int


def stage_rows(bench: Bench, prompt: Prompt, links: Sequence[int], repetitions: int) -> list[Row]:
    """Rows for the settings' codec with all links, and for float16 in RAM with the settings' link."""
    own, n_batch = bench.settings.kv, batch_size(bench.settings)
    together = [Setup("together", link, n_batch) for link in links]
    by_one = [Setup("one by one", ONE_BY_ONE, ONE_BY_ONE), Setup("together", ONE_BY_ONE, n_batch)]
    setups = list(dict.fromkeys([*together, *by_one]))
    rows = codec_rows(bench, prompt, own.codec, setups, repetitions)
    if own.codec != "f16":
        rows += codec_rows(bench, prompt, "f16", [Setup("together", max(0, own.link_tokens), n_batch)], repetitions)
    return rows


def codec_rows(bench: Bench, prompt: Prompt, codec: Codec, setups: Sequence[Setup], repetitions: int) -> list[Row]:
    """A row for each setup, with the passages in RAM in `codec`; setups take turns."""
    settings = replace(bench.settings, kv=replace(bench.settings.kv, codec=codec, ram_mb=AMPLE_MB, disk_mb=0))
    sizes = replace(bench.sizes, n_ctx=bench.sizes.n_ctx + bench.sizes.n_batch, n_seq_max=2 + SEAMS)
    with Stopwatch(bench.model, sizes) as context:
        support = examine(context)
        with (
            make_cache(settings, bench.home, support.geometry) as cache,
            Assembler(context, support, cache, link=settings.kv.link_tokens) as assembler,
        ):
            assembler.costs = LOAD
            Desk(context, assembler).assemble(prompt)  # computes the passages
            assembler.keep_computed()
            cache.flush()
            measured: dict[Setup, list[Staged]] = {setup: [] for setup in setups}
            for _ in range(repetitions + 1):
                for setup in setups:
                    measured[setup].append(staged(context, assembler, prompt, setup))
            kept = cache.status(moving="", link_tokens=0).ram_used
    return [_row(codec, setup, found[1:], kept) for setup, found in measured.items()]


def staged(context: Stopwatch, assembler: Assembler, prompt: Prompt, setup: Setup) -> Staged:
    """Put a prompt together and read its question."""
    desk = Desk(context, assembler)
    desk.clear()
    assembler.link, assembler.costs = setup.link, LOAD
    context.seconds.clear()
    usual = context.settings
    context.settings = replace(usual, n_batch=setup.n_batch)
    started = time.perf_counter()
    assembled = desk.assemble(prompt)
    seconds = dict(context.seconds)
    seconds["gather"] = time.perf_counter() - started - sum(seconds.values())
    context.settings = usual
    seconds["question"] = _timed(lambda: desk.read(prompt.tokens[assembled.position :], assembled.position))
    return Staged(seconds, assembled.passages)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _row(codec: Codec, setup: Setup, found: Sequence[Staged], kept: int) -> Row:
    stages = {f"{stage} ms": median(1e3 * entry.seconds.get(stage, 0.0) for entry in found) for stage in STAGES}
    return {
        "table": f"stages, {len(found[0].passages)} passages in RAM",
        "codec": codec,
        "linked tokens": setup.link,
        "seams": setup.name,
        **stages,
        "total ms": median(1e3 * sum(entry.seconds.values()) for entry in found),
        "MB in RAM": kept / 1e6,
        "passages": " | ".join(sorted({described(entry.passages) for entry in found})),
    }
