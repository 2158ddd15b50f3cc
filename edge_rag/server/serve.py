"""Serving until somebody says stop: sockets, models, systemd, and an end that loses nothing.

    listen → load the models (/health says 503) → READY → serve → SIGTERM: no new callers, answers go on for
    `server.drain` seconds, then they are cut off → close the library → exit

After the cut nothing begins any more, not even what is being sent just then; what does not end by itself within
LAST_WORDS is left alone. The exit code is 0 when all requests could be finished, 1 when some were cut off; a second
signal cuts them off at once.

The engine makes its context anew after a first fault of ours. After a second one the server ends with code 70, so that
systemd starts another; and systemd's watchdog is fed only while the engine gets on with its work.
"""

import asyncio
import contextlib
import logging
import resource
import signal
import socket
from collections.abc import Generator

import uvicorn

from edge_rag.errors import EdgeRAGError, EngineError
from edge_rag.runtime.rag import EdgeRAG
from edge_rag.server import logs
from edge_rag.server.app import make_app
from edge_rag.server.notify import Notifier
from edge_rag.server.protocol import Protocol
from edge_rag.server.service import Service
from edge_rag.server.sockets import Sockets

SIGNALS = (signal.SIGTERM, signal.SIGINT)
WATCH = 1.0  # seconds between looks at the engine
STUCK = 120.0  # seconds after which an engine that has work and begins no step is taken for stuck
LAST_WORDS = 10.0  # seconds in which what was cut off must have ended; then connections are closed

logger = logging.getLogger(__name__)


def serve(rag: EdgeRAG) -> int:
    """Serve a library on the sockets that its settings name until a signal comes; the exit code. Closes the library.

    To be called in the main thread, before others are started. Raises UsageError, ConfigError and StorageError when it
    cannot listen, and what loading the models raises.
    """
    logs.configure()
    _raise_file_limit()
    with contextlib.ExitStack() as stack:
        sockets = stack.enter_context(Sockets(rag.settings.server))
        notifier = stack.enter_context(Notifier())
        service = Service(rag)
        stack.callback(service.close)
        stack.callback(rag.close)  # the first to be closed: whoever waits for the engine is freed by it
        server = Server(service, notifier)
        asyncio.run(server.serve(sockets.listening))
        if server.failure:
            raise server.failure
        return 1 if server.cut_off else 0


class Server(uvicorn.Server):
    """uvicorn's server, with our own beginning and end. `cut_off` counts requests that could not be finished."""

    def __init__(self, service: Service, notifier: Notifier) -> None:
        super().__init__(config(service))
        self.cut_off = 0
        self.failure: EdgeRAGError | None = None
        self._service = service
        self._notifier = notifier
        self._hurry = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and begin to load the models."""
        await super().startup(sockets)
        self._notifier.status("loading models")
        logger.info("listening on %s", ", ".join(str(each.getsockname()) for each in sockets or ()))
        self._tasks = [asyncio.create_task(self._load()), asyncio.create_task(self._watch())]

    async def _load(self) -> None:
        try:
            await self._service.call(self._service.rag.load)
        except EdgeRAGError as error:
            self.failure, self.should_exit = error, True
        except Exception as error:
            logger.exception("loading failed; this is a fault of ours")
            self.failure, self.should_exit = EngineError(f"{type(error).__name__}: {error}"), True
        else:
            self._service.ready = True
            self._notifier.ready("serving")
            logger.info("ready")

    async def _watch(self) -> None:
        """Feed the watchdog while the engine gets on; end when it has failed for good."""
        watchdog = self._notifier.watchdog
        while True:
            engine = self._service.rag.engine
            if engine and engine.failure:
                self.failure, self.should_exit = EngineError(engine.failure), True
                self._hurry.set()
                return
            if watchdog and not (engine and engine.silent > STUCK):
                self._notifier.alive()
            await asyncio.sleep(min(WATCH, watchdog or WATCH))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nobody any more, let answers finish for a while, cut off the rest."""
        self._notifier.stopping("finishing answers")
        logger.info("stopping")
        cutting = asyncio.create_task(self._cut())
        await super().shutdown(sockets)
        for task in (cutting, *self._tasks):
            task.cancel()

    async def _cut(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), self._service.settings.server.drain)
        self.cut_off = self._service.stop()
        if self.cut_off:
            logger.warning("answers that were cut off: %d", self.cut_off)
        await asyncio.sleep(LAST_WORDS)
        if left := list(self.server_state.tasks):
            self.cut_off = max(self.cut_off, len(left))
            logger.warning("requests that did not end: %d", len(left))
        for task in left:
            task.cancel()
        self.force_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Heed signals while serving. uvicorn would raise them again at the end, and so lose our exit code."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        if self.should_exit:
            self._hurry.set()
        self.should_exit = True


def config(service: Service) -> uvicorn.Config:
    """How uvicorn serves: without anything of its own that we do, or do not want."""
    return uvicorn.Config(
        make_app(service),
        http=Protocol,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
    )


def _raise_file_limit() -> None:
    """As many open files as this process may have: each caller is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
