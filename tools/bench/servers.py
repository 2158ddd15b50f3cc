"""Servers as child processes: ours, and llama-cpp-python's own for comparison."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import psutil

from edge_rag.closing import Closing
from edge_rag.config import Settings

START = 120.0  # seconds a server may take to load its model


class Child(Closing):
    """A server process. `health` answers 200 when it can be asked."""

    def __init__(self, command: Sequence[str], health: str, *, uds: str = "", base: str = "http://edge-rag") -> None:
        self.uds = uds
        self.base = base
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 — closed with us; a pipe that nobody reads would fill up
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self._said, env=_environment())
        self._wait(health)

    def close(self) -> None:
        """Ask it to end. Idempotent."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(START)
        self._said.close()

    def _wait(self, health: str) -> None:
        until = time.monotonic() + START
        with httpx.Client(transport=httpx.HTTPTransport(uds=self.uds or None), base_url=self.base) as client:
            while time.monotonic() < until and self._process.poll() is None:
                try:
                    if client.get(health).status_code == httpx.codes.OK:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
        self._process.kill()
        self._said.seek(0)
        raise RuntimeError(f"the server did not start: {self._said.read().decode()[-2000:]}")

    @property
    def process_id(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(psutil.Process(self._process.pid).memory_info().rss)


def ours(folder: Path, settings: Settings, socket_folder: Path, changes: Mapping[str, object]) -> Child:
    """`edge-rag serve` over a library; `changes` are settings by dotted key."""
    uds = str(socket_folder / f"s{len(list(socket_folder.iterdir()))}.sock")
    flags = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "edge_rag", "--data", str(folder), "--model", settings.models.llm, *flags]
    return Child([*command, "serve", "--uds", uds], "/health", uds=uds)


def llama_cpp(model: Path, n_ctx: int, threads: int) -> Child:
    """`llama_cpp.server`, with its cache of one prompt's beginning. Needs llama-cpp-python's extra `server`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"--model": str(model), "--n_ctx": n_ctx, "--n_threads": threads, "--n_threads_batch": threads}
    options |= {"--flash_attn": "true", "--verbose": "false", "--interrupt_requests": "false"}
    flags = [str(part) for pair in (options | {"--host": "127.0.0.1", "--port": port}).items() for part in pair]
    return Child([sys.executable, "-m", "llama_cpp.server", *flags], "/v1/models", base=f"http://127.0.0.1:{port}")


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ("NOTIFY_SOCKET", "LISTEN_FDS")}
