"""`soak`: many short requests, and callers of every kind for minutes: nothing is lost, and memory stays flat.

Our server is a child; the load comes from this process (`mixed`) or from a third one (`short`). Memory is the server's
resident set, which holds the RAM tier of the KV cache: that is made small, so that it is full soon.
"""

import argparse
import asyncio
import itertools
import random
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import httpx
import psutil
from msgspec import Struct, field
from rich.console import Console

from edge_rag.config import Settings
from tools.bench.load import Ask, Load, send
from tools.bench.metrics import percentile
from tools.bench.report import Result, Row, at_most
from tools.bench.serve import Bench, told
from tools.bench.servers import Child

SHORT, QUICK_SHORT = (500, 9_500), (20, 40)  # requests up to the first look at memory, and from there to the second
SHORT_QUESTIONS = 40
IN_FLIGHT = 8
MINUTES = 20.0
SAMPLE = 5.0  # seconds between looks at memory
PAUSE = 0.2  # seconds of thought, or the quick kinds would leave no core to the others
WARM_UP = 0.2  # of the time: caches fill
FLAT = 1.02
RAM_MB = 64

ACTOR = """
import httpx, sys
with httpx.Client(transport=httpx.HTTPTransport(uds=sys.argv[1]), base_url="http://edge-rag") as client:
    with client.stream("POST", "/ask", json={"question": sys.argv[2], "stream": True, "max_tokens": 256}) as response:
        for line in response.iter_lines():
            print(line, flush=True)
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark alone."""
    parts = ("short", "mixed")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="which parts of it")
    parser.add_argument("--library", type=Path, help="as in `serve`")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of the mixed callers (default {MINUTES:g})")


def run(options: argparse.Namespace, settings: Settings, work: Path, console: Console) -> Result:
    """Measure the parts that are asked for."""
    bench, result = Bench(options, settings, work, console), Result()
    if "short" in options.parts:
        console.print("short requests")
        result.extend(short(bench))
    if "mixed" in options.parts:
        console.print(f"mixed callers for {options.minutes:g} minutes")
        result.extend(asyncio.run(mixed(bench, 60 * options.minutes, console)))
    return result


# --- many short requests ---------------------------------------------------------------------------------------------


def short(bench: Bench) -> Result:
    """Answers of two tokens, searches and vectors, over and over: memory after the first of them and after all."""
    sizes = QUICK_SHORT if bench.quick else SHORT
    rows: list[Row] = []
    done, memory = 0, list[int]()
    with bench.server(kv__ram_mb=RAM_MB) as server:
        for size in sizes:
            asks = [short_ask(bench, number) for number in range(size)]
            replies, seconds = send(Load(asks, IN_FLIGHT, server.uds, server.base))
            done += len(told(replies))
            memory.append(server.memory)
            rows.append(
                {
                    "table": f"short requests, {IN_FLIGHT} in flight",
                    "requests": done,
                    "requests/s": len(replies) / seconds,
                    "memory MB": memory[-1] / 1e6,
                }
            )
    return Result(rows, [at_most("memory after all ÷ after the first", memory[1] / memory[0], FLAT, "×")])


def short_ask(bench: Bench, number: int) -> Ask:
    """One of the short requests, in turns of each kind."""
    question = bench.questions[number // 5 % SHORT_QUESTIONS]
    return (
        Ask("/ask", {"question": question, "top_k": 1, "max_tokens": 2, "stream": True}),
        Ask("/ask", {"question": question, "top_k": 1, "max_tokens": 2}, "plain"),
        Ask("/v1/completions", {"prompt": f"{number}, ", "max_tokens": 2}, "plain"),
        Ask("/v1/embeddings", {"input": question}, "plain"),
        Ask("/search", {"query": question}, "plain"),
    )[number % 5]


# --- callers of every kind -------------------------------------------------------------------------------------------


class Deeds(Struct):
    """What was done: seconds by kind of caller, and what went wrong."""

    seconds: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    errors: list[str] = []


class Callers:
    """Everything that callers do, over and over. Each method does one thing once and raises when it goes wrong."""

    def __init__(self, bench: Bench, server: Child, client: httpx.AsyncClient) -> None:
        self._bench = bench
        self._server = server
        self._client = client
        self._numbers = itertools.count()
        self._random = random.Random(0)

    def kinds(self) -> Iterator[tuple[str, Callable[[], Awaitable[None]]]]:
        """All kinds of callers by name."""
        for name in (
            "stream",
            "ask",
            "chat",
            "complete",
            "search",
            "embed",
            "change",
            "feedback",
            "look",
            "leave",
            "die",
        ):
            yield name, getattr(self, name)

    def _question(self) -> str:
        return self._random.choice(self._bench.questions[:200])

    async def _json(self, method: str, path: str, **options: object) -> dict[str, object]:
        response = await self._client.request(method, path, **options)  # type: ignore[arg-type]
        if response.status_code >= httpx.codes.BAD_REQUEST:
            raise RuntimeError(f"{path}: {response.status_code} {response.text[:200]}")
        if response.headers.get("content-type", "").startswith("application/json"):
            found = response.json()
            return found if isinstance(found, dict) else {"found": found}
        return {}

    async def _lines(self, path: str, body: dict[str, object], last: str) -> None:
        async with self._client.stream("POST", path, json=body) as response:
            lines = [line async for line in response.aiter_lines() if line]
        if not any(last in line for line in lines[-2:]):
            raise RuntimeError(f"{path}: ended with {lines[-1:]}")

    async def stream(self) -> None:
        """A question, streamed."""
        await self._lines("/ask", {"question": self._question(), "stream": True, "max_tokens": 48}, "event: answer")

    async def ask(self) -> None:
        """A question, answered as a whole."""
        await self._json("POST", "/ask", json={"question": self._question(), "max_tokens": 24})

    async def chat(self) -> None:
        """OpenAI's chat, streamed."""
        messages = [{"role": "user", "content": self._question()}]
        body = {"messages": messages, "stream": True, "max_tokens": 24}
        await self._lines("/v1/chat/completions", body, "[DONE]")

    async def complete(self) -> None:
        """Raw use."""
        await self._json("POST", "/v1/completions", json={"prompt": "1, 2, 3,", "max_tokens": 16})

    async def search(self) -> None:
        """Passages only."""
        await self._json("POST", "/search", json={"query": self._question()})

    async def embed(self) -> None:
        """Vectors."""
        await self._json("POST", "/v1/embeddings", json={"input": [self._question()] * 4})

    async def change(self) -> None:
        """A document is uploaded, found, and removed."""
        number = next(self._numbers)
        text = f"# Note {number}\n\n" + " ".join(f"Locker {number} has the code {number * 7919}." for _ in range(40))
        made = await self._json(
            "POST",
            "/v1/files",
            files={"file": (f"note{number}.md", text.encode())},
            data={"purpose": "assistants"},
        )
        await self._json("POST", "/search", json={"query": f"code of locker {number}"})
        await self._json("DELETE", f"/v1/files/{made['id']}")

    async def feedback(self) -> None:
        """An answer is judged."""
        answer = await self._json("POST", "/ask", json={"question": self._question(), "max_tokens": 4})
        await self._json("POST", "/feedback", json={"answer_id": answer["id"], "score": 1})

    async def look(self) -> None:
        """How the server is."""
        for path in ("/health", "/status", "/metrics", "/documents", "/v1/models"):
            await self._json("GET", path)
        await asyncio.sleep(1)

    async def leave(self) -> None:
        """A stream is closed after its first event."""
        body = {"question": self._question(), "stream": True, "max_tokens": 256}
        async with self._client.stream("POST", "/ask", json=body) as response:
            await anext(response.aiter_lines())

    async def die(self) -> None:
        """A process with a stream is killed."""
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", ACTOR, self._server.uds, self._question(), stdout=asyncio.subprocess.PIPE
        )
        assert child.stdout
        if not await child.stdout.readline():
            raise RuntimeError("the child had no answer")
        child.send_signal(signal.SIGKILL)
        await child.communicate()
        await asyncio.sleep(5)


async def mixed(bench: Bench, seconds: float, console: Console) -> Result:
    """One caller of each kind at the same time."""
    deeds, samples = Deeds(), list[int]()
    with bench.server(kv__ram_mb=RAM_MB, kv__idle=True) as server:
        transport = httpx.AsyncHTTPTransport(uds=server.uds)
        async with httpx.AsyncClient(transport=transport, base_url=server.base, timeout=600) as client:
            callers, until = Callers(bench, server, client), time.monotonic() + seconds
            acting = [asyncio.create_task(act(name, do, until, deeds)) for name, do in callers.kinds()]
            process = psutil.Process(server.process_id)
            while time.monotonic() < until:
                await asyncio.sleep(SAMPLE)
                samples.append(process.memory_info().rss)
            await asyncio.gather(*acting)
            status = (await client.get("/status")).json()
        files = process.num_fds()
    for error in deeds.errors[:5]:
        console.print(error, markup=False)
    return mixed_result(deeds, samples, status["engine"], files)


async def act(name: str, do: Callable[[], Awaitable[None]], until: float, deeds: Deeds) -> None:
    """Do one thing until the time is over."""
    while time.monotonic() < until:
        started = time.perf_counter()
        try:
            await do()
        except (httpx.HTTPError, RuntimeError) as error:
            deeds.errors.append(f"{name}: {type(error).__name__}: {error}")
        else:
            deeds.seconds[name].append(time.perf_counter() - started)
        await asyncio.sleep(PAUSE)


def mixed_result(deeds: Deeds, samples: Sequence[int], engine: dict[str, int], files: int) -> Result:
    """Rows by kind of caller, and what is promised."""
    rows: list[Row] = [
        {
            "table": "mixed callers",
            "caller": name,
            "times": len(found),
            "p50 s": median(found),
            "p99 s": percentile(found, 0.99),
        }
        for name, found in deeds.seconds.items()
    ]
    early = samples[int(WARM_UP * len(samples)) :]
    tenth = max(1, len(early) // 10)
    first, last = median(early[:tenth]), median(early[-tenth:])
    rows.append(
        {
            "table": "memory of the server, MB",
            "after a fifth": first / 1e6,
            "at the end": last / 1e6,
            "most": max(samples) / 1e6,
            "open files at the end": files,
        }
    )
    left = engine["active"] + engine["waiting"] + engine["cells_used"]
    return Result(
        rows,
        [
            at_most("errors", len(deeds.errors), 0),
            at_most("memory at the end ÷ after a fifth", last / first, FLAT, "×"),
            at_most("requests and cells left over", left, 0),
        ],
    )
