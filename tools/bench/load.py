"""Asks a server many things at once, from a process of its own: what it measures must not slow down what it asks.

Run as `python -m tools.bench.load`: a `Load` as JSON on standard input, a list of `Reply` as JSON on standard output.
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Literal

import httpx
import msgspec
from msgspec import Struct

LIMIT = 600.0  # seconds a reply may take


class Ask(Struct, frozen=True):
    """One request. `kind`: our native stream, OpenAI's, or no stream at all."""

    path: str
    body: dict[str, Any]
    kind: Literal["native", "openai", "plain"] = "native"


class Load(Struct, frozen=True):
    """What to ask, how many at once, and where: a Unix socket, or a base URL."""

    asks: list[Ask]
    in_flight: int
    uds: str = ""
    base: str = "http://edge-rag"


class Reply(Struct):
    """What came back. Seconds count from the sending; `client` is who of those in flight asked."""

    client: int
    first: float = 0.0
    total: float = 0.0
    inside: float = 0.0  # what the server says that it took itself
    tokens: int = 0
    error: str = ""


def send(load: Load) -> tuple[list[Reply], float]:
    """Put a load on a server from another process; the replies in order of their end, and the seconds of all."""
    made = subprocess.run(
        [sys.executable, "-m", "tools.bench.load"], input=msgspec.json.encode(load), capture_output=True, check=False
    )
    if made.returncode:
        raise RuntimeError(made.stderr.decode())
    return msgspec.json.decode(made.stdout, type=tuple[list[Reply], float])


async def ask_all(load: Load) -> list[Reply]:
    """Ask everything, `in_flight` at once."""
    transport = httpx.AsyncHTTPTransport(uds=load.uds or None)
    rest = iter(load.asks)
    async with httpx.AsyncClient(transport=transport, base_url=load.base, timeout=LIMIT) as client:
        found = await asyncio.gather(*(ask_some(client, number, rest) for number in range(load.in_flight)))
    return [reply for replies in found for reply in replies]


async def ask_some(client: httpx.AsyncClient, number: int, rest: Iterator[Ask]) -> list[Reply]:
    """One of the clients: asks the next thing as soon as the last one is answered."""
    return [await ask(client, number, each) for each in rest]


async def ask(client: httpx.AsyncClient, number: int, each: Ask) -> Reply:
    """Ask one thing."""
    reply, started = Reply(number), time.perf_counter()
    try:
        async with client.stream("POST", each.path, json=each.body) as response:
            if response.status_code != httpx.codes.OK:
                reply.error = f"{response.status_code} {(await response.aread()).decode()[:200]}"
            else:
                await READERS[each.kind](response, reply, started)
    except httpx.HTTPError as error:
        reply.error = f"{type(error).__name__}: {error}"
    reply.total = time.perf_counter() - started
    return reply


async def read_native(response: httpx.Response, reply: Reply, started: float) -> None:
    """Our own stream: the first `delta` is the first word, the `answer` has the counts."""
    async for kind, content in events(response):
        if kind == "delta" and not reply.first:
            reply.first = time.perf_counter() - started
        elif kind == "answer":
            answer = msgspec.json.decode(content)
            reply.tokens, reply.inside = answer["usage"]["completion_tokens"], answer["timings"]["total"]
        elif kind == "error":
            reply.error = content
    if not reply.tokens and not reply.error:
        reply.error = "the stream ended without its answer"


async def read_openai(response: httpx.Response, reply: Reply, started: float) -> None:
    """OpenAI's stream of completions: a chunk a token."""
    ended = False
    async for _, content in events(response):
        if content == "[DONE]":
            ended = True
        elif any(choice.get("text") for choice in msgspec.json.decode(content).get("choices", [])):
            reply.first = reply.first or time.perf_counter() - started
            reply.tokens += 1
    if not ended:
        reply.error = "the stream ended without [DONE]"


async def read_plain(response: httpx.Response, reply: Reply, started: float) -> None:
    """A body that comes as a whole."""
    await response.aread()


READERS = {"native": read_native, "openai": read_openai, "plain": read_plain}


async def events(response: httpx.Response) -> AsyncIterator[tuple[str, str]]:
    """(event, data) of a stream of server-sent events with one line of data each."""
    kind = ""
    async for line in response.aiter_lines():
        if line.startswith("event:"):
            kind = line[6:].strip()
        elif line.startswith("data:"):
            yield kind, line[5:].strip()


def main(source: Sequence[bytes]) -> bytes:
    """Serve the command line."""
    load = msgspec.json.decode(b"".join(source), type=Load)
    started = time.perf_counter()
    replies = asyncio.run(ask_all(load))
    return msgspec.json.encode((replies, time.perf_counter() - started))


if __name__ == "__main__":
    sys.stdout.buffer.write(main([sys.stdin.buffer.read()]))
