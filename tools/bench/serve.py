"""`serve`: what the server costs, and what many callers at once get from it.

Our server and llama-cpp-python's own run as children, and the load comes from yet another process (`tools.bench.load`).
All passages are warmed before. Claims are ratios within this run: the socket's latency against what the server itself
says that it took; one stream, and several, against bare loops over llama.cpp; sharing on against off.
"""

import argparse
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console

from edge_rag import EdgeRAG
from edge_rag.config import Settings
from edge_rag.native.llama import ContextSettings, Model
from edge_rag.runtime.parts import batch_size
from edge_rag.runtime.prompting import PromptBuilder
from tools.bench import data, libraries
from tools.bench.bare_batch import BareBatch
from tools.bench.load import Ask, Load, Reply, send
from tools.bench.metrics import percentile
from tools.bench.overhead import model_path
from tools.bench.report import Claim, Result, Row, at_least, at_most, show
from tools.bench.servers import Child, llama_cpp, ours
from tools.bench.traces import zipf

CLIENTS = (1, 4, 16)
SLOTS = 4  # the default; with 8, two cores answer fewer questions a second (docs/log.md)
TOP_K = 3
LONG = "Explain it in detail and in many words, with everything that the passages say about it."
LATENCY_ASKS, QUICK_LATENCY = 60, 5
REQUESTS, QUICK_REQUESTS = 84, 12  # of all rows of the table of clients together
TOKENS, QUICK_TOKENS = 192, 16
TRACE, QUICK_TRACE = 300, 8
TRACE_TOKENS = 32
IN_FLIGHT = 8
EXPONENT = 1.0
QUESTIONS = 40  # of the trace
COMPARED, QUICK_COMPARED = 24, 3
SINGLE, BATCHED, NEAR_BARE, LATENCY, FAIR, SHARING = 0.95, 2.0, 0.9, 3.0, 2.0, 1.3


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark alone."""
    parts = ("latency", "clients", "sharing", "beside")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="which parts of it")
    parser.add_argument(
        "--library", type=Path, help="a folder to keep the filled and warmed library in, for later runs"
    )
    parser.add_argument("--requests", type=int, help=f"requests of the table of clients (default {REQUESTS})")


class Bench:
    """A warmed library and its questions."""

    def __init__(self, options: argparse.Namespace, settings: Settings, work: Path, console: Console) -> None:
        self.settings = settings
        self.quick = options.quick
        self.folder = options.library or work / "library"
        self.sockets = Path(tempfile.mkdtemp(dir=work))
        dataset = data.load(options.data, work / "data")[0]
        self.questions = [question.text for question in dataset.questions]
        random.Random(0).shuffle(self.questions)
        if not self.folder.exists():
            libraries.fill(self.folder, dataset, settings)
        console.print("warming all passages")
        with EdgeRAG.open(self.folder, settings=settings) as rag:
            rag.warm(hot=20 if self.quick else None)

    def server(self, **changes: Any) -> Child:
        """Our server; idle work is off, so that only what is asked is measured."""
        usual = {"engine.slots": SLOTS, "engine.queue": 1000, "kv.idle": False}
        given = {key.replace("__", "."): value for key, value in changes.items()}
        return ours(self.folder, self.settings, self.sockets, usual | given)

    def ask(self, number: int, tokens: int) -> Ask:
        """A question, streamed."""
        body = {
            "question": self.questions[number % len(self.questions)],
            "top_k": TOP_K,
            "max_tokens": tokens,
            "instructions": LONG,
            "stream": True,
        }
        return Ask("/ask", body)

    def prompts(self, builder: PromptBuilder, count: int) -> list[list[int]]:
        """The prompts of the first questions, as the server puts them together."""
        with EdgeRAG.open(self.folder, settings=self.settings) as rag:
            found = [rag.search(question, top_k=TOP_K) for question in self.questions[:count]]
        return [
            [
                *builder.prefix,
                *(token for each in passages for token in builder.passage(each)),
                *builder.tail([], question, LONG),
            ]
            for question, passages in zip(self.questions, found, strict=False)
        ]


def run(options: argparse.Namespace, settings: Settings, work: Path, console: Console) -> Result:
    """Measure the parts that are asked for."""
    bench = Bench(options, settings, work, console)
    result = Result(notes=[f"{TOP_K} warmed passages a question, {libraries.threads(settings)} threads, greedy."])
    requests = options.requests or (QUICK_REQUESTS if options.quick else REQUESTS)
    parts: dict[str, Callable[[], Result]] = {
        "latency": lambda: latency(bench),
        "clients": lambda: clients(bench, requests),
        "sharing": lambda: sharing(bench),
        "beside": lambda: Result(beside(bench)),
    }
    for name in options.parts:
        console.print(name)
        found = parts[name]()
        show(console, name, found)  # now: a later part may fail
        result.extend(found)
    return result


def told(replies: Sequence[Reply]) -> list[Reply]:
    """The replies, when none is lost. Raises RuntimeError otherwise."""
    lost = [reply.error for reply in replies if reply.error]
    if lost:
        raise RuntimeError(f"{len(lost)} of {len(replies)} requests were lost: {lost[0]}")
    return list(replies)


# --- the socket ------------------------------------------------------------------------------------------------------


def latency(bench: Bench) -> Result:
    """Short answers one by one: what a caller waits beyond the answering itself, on the socket and in process."""
    count = QUICK_LATENCY if bench.quick else LATENCY_ASKS
    with bench.server() as server:
        asks = [bench.ask(0, 4)] * (count + 2)
        replies = told(send(Load(asks, 1, server.uds, server.base))[0])[2:]
    own = 1e3 * median(beyond_in_process(bench, count))
    added = [1e3 * (reply.total - reply.inside) - own for reply in replies]
    row: Row = {
        "table": "added by the socket",
        "requests": len(added),
        "answering ms": 1e3 * median(reply.inside for reply in replies),
        "in process beyond it ms": own,
        "added p50 ms": median(added),
        "added p95 ms": percentile(added, 0.95),
    }
    return Result([row], [at_most("latency that the socket adds, p50", median(added), LATENCY, "ms")])


def beyond_in_process(bench: Bench, count: int) -> Iterator[float]:
    """Seconds that the same call takes in this process beyond what its answer says: the journal, mostly."""
    body = bench.ask(0, 4).body
    options = {name: body[name] for name in ("question", "top_k", "max_tokens", "instructions")}
    with EdgeRAG.open(bench.folder, settings=bench.settings) as rag:
        rag.ask(**options)
        for _ in range(count):
            started = time.perf_counter()
            answer = rag.ask(**options)
            yield time.perf_counter() - started - answer.timings.total


# --- many clients ----------------------------------------------------------------------------------------------------


def clients(bench: Bench, requests: int) -> Result:
    """1, 4 and 16 clients, and bare loops over llama.cpp with as many answers in a batch."""
    tokens = QUICK_TOKENS if bench.quick else TOKENS
    bare = bare_rates(bench, tokens)
    served: dict[int, Row] = {}
    with bench.server() as server:
        for number in CLIENTS:
            asks = [bench.ask(i, tokens) for i in range(max(number, requests * number // sum(CLIENTS)))]
            replies, seconds = send(Load(asks, number, server.uds, server.base))
            served[number] = client_row(number, told(replies), seconds)
    return Result([*served.values(), *bare_rows(bare)], list(client_claims(served, bare)))


def client_row(number: int, replies: Sequence[Reply], seconds: float) -> Row:
    """What so many clients got. `decode`: an answer's tokens after its first, a second, times the clients."""
    firsts = [reply.first for reply in replies]
    return {
        "table": "clients at once",
        "clients": number,
        "requests": len(replies),
        "tokens/s": sum(reply.tokens for reply in replies) / seconds,
        "decode tokens/s": decode_rate(replies, number),
        "questions/s": len(replies) / seconds,
        "TTFT p50": median(firsts),
        "p95": percentile(firsts, 0.95),
        "p99": percentile(firsts, 0.99),
        "slowest client ÷ median": unfairness(replies),
    }


def decode_rate(replies: Sequence[Reply], number: int) -> float:
    """Tokens a second while answers are written, of all clients together."""
    written = [reply for reply in replies if reply.tokens > 1]
    return number * fmean((reply.tokens - 1) / (reply.total - reply.first) for reply in written) if written else 0.0


def unfairness(replies: Sequence[Reply]) -> float:
    """The slowest client's mean time for a request, against the median client's."""
    by_client: defaultdict[int, list[float]] = defaultdict(list)
    for reply in replies:
        by_client[reply.client].append(reply.total)
    means = [fmean(found) for found in by_client.values()]
    return max(means) / median(means)


def bare_rates(bench: Bench, tokens: int) -> dict[int, float]:
    """Tokens a second of bare loops, by the number of answers in a batch."""
    settings = bench.settings
    with Model(model_path(settings), gpu_layers=settings.engine.gpu_layers) as model:
        prompts = bench.prompts(PromptBuilder(model), max(CLIENTS))
        cells = sum(map(len, prompts)) + len(prompts) * (tokens + 1)
        sizes = ContextSettings(cells, batch_size(settings), max(CLIENTS), libraries.threads(settings))
        with BareBatch(model, sizes) as loop:
            loop.batched_rate(prompts[:1], 4)
            return {number: loop.batched_rate(prompts[:number], tokens) for number in CLIENTS}


def bare_rows(bare: dict[int, float]) -> Iterator[Row]:
    """The bare loops' table."""
    for number, rate in bare.items():
        yield {"table": "bare loop", "answers in a batch": number, "tokens/s": rate, "× one": rate / bare[1]}


def client_claims(served: dict[int, Row], bare: dict[int, float]) -> Iterator[Claim]:
    """What is promised of several clients."""
    rates = {number: float(str(row["decode tokens/s"])) for number, row in served.items()}
    yield at_least("one stream: decode ÷ bare loop", rates[1] / bare[1], SINGLE, "×")
    ceiling = bare[4] / bare[1]
    target = min(BATCHED, NEAR_BARE * ceiling)
    yield at_least(f"4 clients: decode ÷ one stream (bare: {ceiling:.2f})", rates[4] / rates[1], target, "×")
    for number, row in served.items():
        yield at_most(f"{number} clients: slowest ÷ median", float(str(row["slowest client ÷ median"])), FAIR, "×")


# --- dynamic batching ------------------------------------------------------------------------------------------------


def sharing(bench: Bench) -> Result:
    """A trace of popular questions, several in flight, with shared cells and without."""
    length = QUICK_TRACE if bench.quick else TRACE
    asks = [bench.ask(number, TRACE_TOKENS) for number in zipf(QUESTIONS, EXPONENT, length, 0)]
    rates: dict[bool, float] = {}
    rows: list[Row] = []
    for share in (False, True):
        with bench.server(engine__share=share) as server:
            replies, seconds = send(Load(asks, IN_FLIGHT, server.uds, server.base))
        firsts = [reply.first for reply in told(replies)]
        rates[share] = len(replies) / seconds
        rows.append(
            {
                "table": f"{length} questions, Zipf {EXPONENT}, {IN_FLIGHT} in flight",
                "sharing": share,
                "questions/s": rates[share],
                "TTFT p50": median(firsts),
                "p95": percentile(firsts, 0.95),
            }
        )
    return Result(rows, [at_least("sharing on ÷ off, questions/s", rates[True] / rates[False], SHARING, "×")])


# --- beside another server -------------------------------------------------------------------------------------------


def beside(bench: Bench) -> list[Row]:
    """The same questions with the same passages, asked of both servers, one and four at once."""
    count = QUICK_COMPARED if bench.quick else COMPARED
    settings = bench.settings
    rows = []
    with bench.server() as server:
        for number in (1, 4):
            asks = [bench.ask(i, TRACE_TOKENS) for i in range(count)]
            replies, seconds = send(Load(asks, number, server.uds, server.base))
            rows.append(beside_row("edge_rag", number, told(replies), seconds, server.memory))
    prompts = [Ask("/v1/completions", body, "openai") for body in raw_prompts(bench, count)]
    with llama_cpp(model_path(settings), settings.engine.n_ctx, libraries.threads(settings)) as server:
        for number in (1, 4):
            replies, seconds = send(Load(prompts, number, base=server.base))
            rows.append(beside_row("llama_cpp.server", number, told(replies), seconds, server.memory))
    return rows


def raw_prompts(bench: Bench, count: int) -> Iterator[dict[str, Any]]:
    """The prompts of the first questions as text."""
    with Model(model_path(bench.settings), vocab_only=True) as model:
        for tokens in bench.prompts(PromptBuilder(model), count):
            text = model.text(tokens, special=True)
            yield {"prompt": text, "max_tokens": TRACE_TOKENS, "temperature": 0, "stream": True}


def beside_row(server: str, number: int, replies: Sequence[Reply], seconds: float, memory: int) -> Row:
    """One server's numbers."""
    firsts = [reply.first for reply in replies]
    return {
        "table": "beside llama_cpp.server",
        "server": server,
        "in flight": number,
        "TTFT p50": median(firsts),
        "p95": percentile(firsts, 0.95),
        "questions/s": len(replies) / seconds,
        "memory MB": memory / 1e6,
    }
