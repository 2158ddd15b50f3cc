"""`Client`: a library that a running server holds, asked over its socket by the same methods as `EdgeRAG`.

    from edge_rag import Client

    with Client() as rag:  # the default socket; Client("/run/…/edge_rag.sock") names another
        print(rag.ask("When does the filter have to be changed?").text)

What can be checked here is checked here, by the functions that check it in process. The rest is checked by the server,
and its errors become our exceptions again (`wire`). Paths are made absolute before they are sent, for the server has
another current folder. No engine is loaded.
"""

import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from msgspec import Struct

from edge_rag.client_learned import Learned, absolute
from edge_rag.closing import Closing
from edge_rag.config import Settings, load_settings, socket_path
from edge_rag.errors import ConfigError, InputError
from edge_rag.peers import listener_uid
from edge_rag.records import AddReport, Answer, Document, Event, Filter, Passage, Turn, WarmReport
from edge_rag.runtime import checked
from edge_rag.wire import Wire, decoded, knock

if TYPE_CHECKING:
    from edge_rag.runtime.ingest import AddProgress
    from edge_rag.runtime.status import Status
    from edge_rag.runtime.warming import WarmProgress
    from edge_rag.store.journal import Entry

LONGEST_QUERY = 8000  # bytes of a request's head; the server reads heads of up to 16 KB
TIMEOUT = 600.0  # seconds; the first sign of a long job may take minutes, after it the server pings


def default_socket() -> Path:
    """Where a server is looked for when no path is given: EDGE_RAG_UDS, `server.uds`, the user's runtime folder.

    Raises ConfigError when nobody named it and that folder is not the user's, or another user's program answers in it:
    what is asked there is nobody's business else.
    """
    named = os.environ.get("EDGE_RAG_UDS")
    if named:
        return Path(named).expanduser()
    settings = load_settings().server
    path = socket_path(settings)
    if not settings.uds and listener_uid(path) not in (None, os.getuid()):
        raise ConfigError(
            f"a program of another user answers on {path}", field="server.uds", remedy="name a path with --uds"
        )
    return path


def is_alive(path: str | Path) -> bool:
    """Whether a server that lets us in answers on the socket `path`, be it that it is still loading its models."""
    return knock(Path(path)) in (200, 503)


class Client(Learned, Closing):
    """The library of a running server. Any thread may use it; use it in a `with`.

    `uds` is the server's socket, `default_socket()` when it is not given; `base_url` is an address of TCP instead, with
    its `key`. `timeout` is how long the server may be silent, in seconds. Nothing is sent before the first call.

    The methods take, give and raise what those of `EdgeRAG` do; MachineError besides when no server answers, and Busy
    when it has too much to do or is still loading its models.
    """

    def __init__(
        self,
        uds: str | Path | None = None,
        *,
        base_url: str | None = None,
        key: str | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        if uds is not None and base_url is not None:
            raise InputError("stands beside uds", field="base_url", remedy="give the one or the other")
        if base_url is not None:
            self._wire = Wire.over_tcp(base_url, key or "", timeout)
        else:
            self._wire = Wire.over_socket(default_socket() if uds is None else Path(uds).expanduser(), timeout)

    def close(self) -> None:
        """Close all connections. Idempotent."""
        self._wire.close()

    # --- documents ---------------------------------------------------------------------------------------------------

    def add(
        self,
        *paths: str | Path,
        include: str | Sequence[str] = (),
        exclude: str | Sequence[str] = (),
        prune: bool = False,
        progress: "Callable[[AddProgress], None] | None" = None,
    ) -> AddReport:
        """Have the server add files and folders that it can read and that are below its `server.roots`."""
        fields = {
            "paths": absolute(paths),
            "include": checked.as_globs(include, "include"),
            "exclude": checked.as_globs(exclude, "exclude"),
            "prune": prune,
        }

        def tell(step: bytes) -> None:
            if progress:
                from edge_rag.runtime.ingest import AddProgress

                progress(decoded(step, AddProgress))

        return self._wire.job("/documents", fields, AddReport, tell)

    def remove(self, *paths: str | Path) -> list[Document]:
        """Remove documents by path, or all below a folder. Raises NotFound, removing none, when one is unknown."""
        return self._wire.call("DELETE", "/documents", list[Document], {"paths": absolute(paths)})

    def documents(self, where: Filter | None = None) -> list[Document]:
        """The documents in the library, by path."""
        chosen = checked.as_filter(where) or Filter()
        # More names than a request's head holds are looked for here.
        few = len(urlencode({"document": chosen.documents}, doseq=True)) <= LONGEST_QUERY
        query = {"document": chosen.documents if few else (), "folder": chosen.folder, "kind": chosen.kinds}
        found = self._wire.call("GET", "/documents", list[Document], query={k: v for k, v in query.items() if v})
        names = set(chosen.documents)
        return found if few else [document for document in found if document.path in names]

    def reembed(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Have all vectors computed with the server's embedding model. Returns the chunks."""

        def tell(step: bytes) -> None:
            if progress:
                so_far = decoded(step, _Reembedding)
                progress(so_far.done, so_far.total)

        return self._wire.job("/reembed", {}, _Reembedded, tell).chunks

    def warm(
        self,
        *paths: str | Path,
        hot: int | None = None,
        progress: "Callable[[WarmProgress], None] | None" = None,
    ) -> WarmReport:
        """Have the KV of passages computed and kept: of the documents at or below `paths`, else of all."""

        def tell(step: bytes) -> None:
            if progress:
                from edge_rag.runtime.warming import WarmProgress

                progress(decoded(step, WarmProgress))

        return self._wire.job("/warm", {"paths": absolute(paths) if paths else (), "hot": hot}, WarmReport, tell)

    # --- questions ---------------------------------------------------------------------------------------------------

    def search(self, query: str, *, top_k: int | None = None, where: Filter | None = None) -> list[Passage]:
        """The passages for `query`, best first, without asking the language model."""
        fields = {"query": query, "top_k": top_k, "where": checked.as_filter(where)}
        return self._wire.call("POST", "/search", list[Passage], fields)

    def ask(self, question: str, **options: Any) -> Answer:
        """Answer a question; options as in `stream`."""
        answer = None
        for event in self.stream(question, **options):
            answer = event
        assert isinstance(answer, Answer)
        return answer

    def stream(
        self,
        question: str,
        *,
        history: Sequence[Turn] = (),
        where: Filter | None = None,
        top_k: int | None = None,
        instructions: str | None = None,
        timeout: float | None = None,
        private: bool = False,
        **sampling: Any,
    ) -> Generator[Event, None, None]:
        """Answer a question as a stream of events: `Sources` first, the `Answer` last; closing it cancels the answer.

        `timeout`, `private` and `sampling` as in `EdgeRAG.stream`; what is not given is as the server's settings have
        it. What the server refuses is raised with the first event.
        """
        bounded = checked.as_sampling(Settings(), sampling)
        fields = {name: getattr(bounded, name) for name, value in sampling.items() if value is not None} | {
            "question": checked.as_text(question, "question"),
            "history": checked.as_history(history),
            "where": checked.as_filter(where),
            "top_k": top_k,
            "instructions": instructions,
            "timeout": timeout,
            "private": checked.converted(private, bool, "private"),
            "stream": True,
        }
        return self._wire.answering("/ask", fields)

    def feedback(self, answer_id: str, score: float, comment: str = "") -> None:
        """Say how good an answer was, from 0 (bad) to 1 (good); late is fine. Raises NotFound for an unknown id."""
        self._wire.call("POST", "/feedback", type(None), {"answer_id": answer_id, "score": score, "comment": comment})

    def journal(self, limit: int = 20) -> "list[Entry]":
        """The last questions, newest first."""
        from edge_rag.store.journal import Entry

        return self._wire.call("GET", "/journal", list[Entry], query={"limit": checked.as_limit(limit)})

    def status(self) -> "Status":
        """What the server has stored and loaded, how large it is, and the timings of the last answer."""
        from edge_rag.runtime.status import Status

        return self._wire.call("GET", "/status", Status)


class _Reembedding(Struct, frozen=True):
    done: int
    total: int


class _Reembedded(Struct, frozen=True):
    chunks: int
