"""The client against the server's own application on real sockets, with a library that says what it is told to."""

import contextlib
import dataclasses
import gc
import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag import Client, errors
from edge_rag.cli import house
from edge_rag.cli.app import Options
from edge_rag.client import default_socket, is_alive
from edge_rag.errors import (
    Busy,
    ConfigError,
    EdgeRAGError,
    EngineError,
    InputError,
    MachineError,
    NotFound,
    UsageError,
)
from edge_rag.records import Delta, Event, Filter, LearningStatus, Plan, Timings, Turn, Usage, WarmReport
from edge_rag.runtime.ingest import AddProgress
from edge_rag.runtime.warming import WarmProgress
from edge_rag.server.service import Service
from edge_rag.server.sockets import bind_tcp
from edge_rag.store.journal import Entry
from edge_rag.wire import parsed
from tests.server.fakes import (
    ADAPTER,
    CLUSTER,
    COMPARISON,
    LEARNING,
    LESSON,
    PASSAGE,
    ROUTER,
    VIEW,
    FakeRAG,
    answer,
    document,
    events,
)
from tests.server.harness import served

PATIENCE = 30.0  # seconds; only what is broken needs them
KEY = "0123456789abcdef0123456789abcdef"
STRANGER = 65534

# Texts with whatever a line reader could take for the end of a line.
ODD_EVENTS: tuple[Event, ...] = (
    *events("How long?")[:1],
    Delta(text="It lasts\u2028"),
    Delta(text="a\r\nye\x85ar\x0b.\n\n"),
    Delta(text="data: [1]\r"),
    answer("How\u2028long?"),
)
ENTRY = Entry(
    id="abc",
    asked_at=1_700_000_000.5,
    question="How long?",
    answer="A year.",
    finish_reason="stop",
    model="some-llm",
    plan=Plan(),
    citations=(),
    usage=Usage(),
    timings=Timings(),
    passages=((7, 0.9),),
    feedback=None,
)


class Library(FakeRAG):
    """A library that fails with `failure`, whatever it is asked, and answers with the events of `told`."""

    failure: Exception | None = None
    told: Callable[[], Iterator[Event]] | None = None

    def _note(self, *call: Any) -> None:
        super()._note(*call)
        if self.failure:
            raise self.failure

    def _events(self, question: str) -> Generator[Event, None, None]:
        return super()._events(question) if self.told is None else self._own(self.told)

    def _own(self, told: Callable[[], Iterator[Event]]) -> Generator[Event, None, None]:
        try:
            yield from told()
        finally:
            self.ended.release()

    def journal(self, limit: int = 20) -> list[Entry]:
        super().journal(limit)
        return [ENTRY]


@dataclasses.dataclass
class Running:
    """A server in a thread, its library and a client of it."""

    library: Library
    service: Service
    path: Path
    client: Client

    @property
    def options(self) -> dict[str, Any]:
        """Those that the only question was asked with."""
        [(_, _, options)] = self.library.calls
        return {name: value for name, value in options.items() if value is not None}


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    library, path = Library(tmp_path, server__roots=(str(tmp_path),), server__timeout=77), tmp_path / "run" / "socket"
    with served(library, path) as service, Client(path, timeout=PATIENCE) as client:
        yield Running(library, service, path, client)


@contextlib.contextmanager
def saying(path: Path, *replies: bytes) -> Iterator[None]:
    """Something that is no server of ours: says one thing to each caller that has sent a request, then hangs up."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def say() -> None:
            for reply in replies:
                caller, _ = listening.accept()
                with caller:
                    caller.recv(65536)
                    caller.sendall(reply)
                    caller.shutdown(socket.SHUT_WR)
                    with contextlib.suppress(ConnectionError):
                        while caller.recv(65536):  # until the other one hangs up too
                            pass

        thread = threading.Thread(target=say, name="something else")
        thread.start()
        try:
            yield
        finally:
            thread.join()


# --- what is asked and answered --------------------------------------------------------------------------------------


def test_documents_are_listed_by_the_filter_that_was_given(running: Running) -> None:
    where = Filter(documents=("/a b.md", "/c&d=é.md"), folder="/notes", kinds=("md", "pdf"))
    assert running.client.documents(where) == []
    assert running.client.documents() == [document("/notes/filters.md")]
    assert running.library.calls == [("documents", where), ("documents", Filter())]


def test_more_documents_may_be_named_than_a_request_s_head_holds(running: Running) -> None:
    names = tuple(f"/notes/a rather long name of a document, number {number}.md" for number in range(2000))
    where = Filter(documents=(*names, "/notes/filters.md"), folder="/notes")
    assert running.client.documents(where) == [document("/notes/filters.md")]
    assert running.client.documents(Filter(documents=names)) == []
    assert running.library.calls[0] == ("documents", Filter(folder="/notes"))


def test_a_search_takes_and_gives_what_it_does_in_process(running: Running) -> None:
    where = Filter(kinds=("md",))
    assert running.client.search("filter life", top_k=3, where=where) == [PASSAGE]
    assert running.client.search("filter life") == [PASSAGE]
    assert running.library.calls == [("search", "filter life", 3, where), ("search", "filter life", None, None)]


def test_a_stream_has_the_events_of_the_library(running: Running) -> None:
    assert list(running.client.stream("How long?")) == events("How long?")


def test_texts_come_through_whatever_they_hold(running: Running) -> None:
    running.library.told = lambda: iter(ODD_EVENTS)
    assert tuple(running.client.stream("How long?")) == ODD_EVENTS


def test_asking_gives_the_answer(running: Running) -> None:
    assert running.client.ask("How long?") == answer("How long?")


def test_all_options_of_a_question_arrive(running: Running) -> None:
    turns = (Turn(role="user", content="Hm?"), Turn(role="assistant", content="Well."))
    others = {
        "where": Filter(folder="/notes"),
        "top_k": 2,
        "instructions": "Be brief.",
        "history": turns,
        "private": True,
    }
    sampling = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "seed": 7, "stop": ("x",)}
    running.client.ask("How long?", **others, **sampling)
    assert running.options == {**others, **sampling, "timeout": 77}


def test_what_is_not_given_is_left_to_the_server(running: Running) -> None:
    running.client.ask("How long?", temperature=None)
    assert running.options == {"history": (), "timeout": 77, "private": False}


def test_dicts_are_taken_for_records_and_a_single_stop_for_several(running: Running) -> None:
    running.client.ask("How?", history=[{"role": "user", "content": "Hm?"}], where={"kinds": ["md"]}, stop="x")
    assert running.options["history"] == (Turn(role="user", content="Hm?"),)
    assert running.options["where"] == Filter(kinds=("md",))
    assert running.options["stop"] == ("x",)


@pytest.mark.parametrize(("given", "held_to"), [(5.0, 5.0), (500.0, 77.0)])
def test_a_time_limit_for_one_answer_holds_within_the_servers(running: Running, given: float, held_to: float) -> None:
    running.client.ask("How long?", timeout=given)
    assert running.options["timeout"] == held_to


def test_closing_a_stream_ends_the_work_in_the_server(running: Running) -> None:
    def endless() -> Iterator[Event]:
        yield ODD_EVENTS[0]
        while not never.wait(0.001):  # at an engine's pace
            yield Delta(text="and on ")

    never = threading.Event()

    running.library.told = endless
    answering = running.client.stream("How long?")
    assert [next(answering), next(answering)] == [ODD_EVENTS[0], Delta(text="and on ")]
    answering.close()
    assert running.library.ended.acquire(timeout=PATIENCE)


def test_feedback_and_journal_and_status_come_through(running: Running) -> None:
    running.client.feedback("abc", 1, "good")
    assert running.client.journal(3) == [ENTRY]
    assert running.client.status() == running.library.status()
    assert running.library.calls[:3] == [("feedback", "abc", 1.0, "good"), ("journal", 3), ("status",)]


# --- documents -------------------------------------------------------------------------------------------------------


def test_added_paths_are_absolute_and_progress_is_told(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = running.library.folder
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    heard: list[AddProgress] = []
    report = running.client.add(
        "notes", Path("~/more"), include="*.md", exclude=("a", "b"), prune=True, progress=heard.append
    )
    assert [file.path for file in report.files] == [f"{folder}/notes", f"{folder}/more"]
    assert heard == [AddProgress(done=1, total=1, current=f"{folder}/notes")]
    wanted = {"include": ("*.md",), "exclude": ("a", "b"), "prune": True}
    assert running.library.calls == [("add", f"{folder}/notes", f"{folder}/more", wanted)]


def test_nobody_has_to_listen_to_progress(running: Running) -> None:
    assert running.client.add(running.library.folder).count("added") == 1
    assert running.client.warm().computed == 1
    assert running.client.reembed() == 8


def test_removed_documents_come_back(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert running.client.remove("notes/filters.md") == [document("/notes/filters.md")]
    assert running.library.calls == [("remove", "/notes/filters.md")]


def test_as_many_paths_as_a_shell_gives_are_taken(running: Running) -> None:
    paths = [f"/notes/{number}.md" for number in range(30_000)]
    running.client.warm(*paths)
    assert running.library.calls == [("warm", *paths, None)]


def test_warming_takes_paths_and_a_limit_and_tells_progress(running: Running) -> None:
    heard: list[WarmProgress] = []
    report = running.client.warm("/notes", hot=2, progress=heard.append)
    assert report == WarmReport(passages=2, computed=1, present=1, full=False, seconds=0.5)
    assert heard == [WarmProgress(done=1, total=2, current="/notes/filters.md")]
    assert running.library.calls == [("warm", "/notes", 2)]


def test_embedding_anew_tells_progress(running: Running) -> None:
    heard: list[tuple[int, int]] = []
    assert running.client.reembed(lambda done, total: heard.append((done, total))) == 8
    assert heard == [(4, 8)]


def test_a_listener_that_fails_ends_the_job_with_its_own_error(running: Running) -> None:
    def fail(step: AddProgress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        running.client.add(running.library.folder, progress=fail)


# --- what was learned ------------------------------------------------------------------------------------------------


def test_clusters_and_adapters_come_through(running: Running) -> None:
    assert running.client.clusters() == [CLUSTER]
    assert running.client.cluster(3) == VIEW
    assert running.client.adapters() == [ADAPTER]
    assert running.client.adapter("abab") == ADAPTER
    assert running.library.calls == [("clusters",), ("cluster", 3), ("adapters",), ("adapter", "abab")]


def test_adapters_are_changed_by_the_methods_of_the_library(running: Running) -> None:
    assert running.client.pin_adapter("ab").pinned
    assert not running.client.pin_adapter("ab", False).pinned
    assert running.client.disable_adapter("ab").state == "disabled"
    assert running.client.enable_adapter("ab").state == "ready"
    assert running.client.delete_adapter("ab") == ADAPTER
    assert [call for call in running.library.calls if call[0] != "adapter"] == [
        ("pin_adapter", ADAPTER.id, True),
        ("pin_adapter", ADAPTER.id, False),
        ("disable_adapter", ADAPTER.id),
        ("enable_adapter", ADAPTER.id),
        ("delete_adapter", "ab"),
    ]


def test_paths_of_adapters_are_made_absolute(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = running.library.folder
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    assert running.client.export_adapter("ab", "a.zip") == ADAPTER
    assert running.client.import_adapter(Path("~/a.zip")) == ADAPTER
    assert running.library.calls == [
        ("export_adapter", "ab", f"{folder}/a.zip"),
        ("import_adapter", f"{folder}/a.zip"),
    ]


def test_learning_tells_progress_and_what_became_of_each_cluster(running: Running) -> None:
    heard: list[LearningStatus] = []
    assert running.client.learn(least=2, until=5e9, progress=heard.append) == [LESSON]
    assert heard == [LEARNING]
    assert running.client.learn() == running.client.learn(least=None) == [LESSON]
    worth = running.library.settings.learning.least_questions
    assert running.library.calls == [("learn", 2.0, 5e9), ("learn", 0.0, None), ("learn", worth, None)]


def test_a_piece_of_idle_work_is_done_by_the_server(running: Running) -> None:
    assert running.client.idle_once() == "learned"


@pytest.mark.parametrize("name", ["", "a/b", "..", "é?#", "\ud800"])
def test_a_name_that_no_adapter_has_is_not_found(running: Running, name: str) -> None:
    running.library.failure = NotFound("there is no such adapter", field="id")
    for ask in (running.client.adapter, running.client.delete_adapter):
        with pytest.raises(NotFound):
            ask(name)


def test_the_router_and_what_other_rules_would_have_done_come_through(running: Running) -> None:
    assert running.client.router() == ROUTER
    assert running.client.replay_router() == COMPARISON
    assert running.client.replay_router(("lfu", "static")) == COMPARISON
    assert running.library.calls == [
        ("router",),
        ("replay_router", "polar", "lru"),
        ("replay_router", "lfu", "static"),
    ]


# --- errors ----------------------------------------------------------------------------------------------------------

OURS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, EdgeRAGError)]


@pytest.mark.parametrize("kind", [kind for kind in OURS if kind is not EdgeRAGError])
def test_an_error_of_the_library_is_raised_here_again(running: Running, kind: type[EdgeRAGError]) -> None:
    running.library.failure = kind("is wrong", field="some.field", remedy="mend it")
    for ask in (running.client.documents, lambda: running.client.ask("How long?"), lambda: running.client.warm()):
        with pytest.raises(EdgeRAGError) as raised:
            ask()
        assert type(raised.value) is kind
        assert str(raised.value) == "some.field: is wrong — mend it"


@pytest.mark.parametrize("kind", [errors.Busy, errors.EngineError, errors.StorageError, errors.InputError])
def test_an_error_in_the_middle_of_a_stream_comes_after_what_was_there(
    running: Running, kind: type[EdgeRAGError]
) -> None:
    running.library.late["How long?"] = kind("is wrong", field="some.field", remedy="mend it")
    answering = running.client.stream("How long?")
    assert next(answering) == events("How long?")[0]
    with pytest.raises(EdgeRAGError, match=r"some\.field: is wrong — mend it") as raised:
        next(answering)
    assert type(raised.value) is kind


def test_a_fault_of_the_server_is_ours_and_tells_nothing_of_its_inside(running: Running) -> None:
    running.library.failure = RuntimeError("the inside")
    with pytest.raises(EngineError) as raised:
        running.client.documents()
    assert "the inside" not in str(raised.value)
    assert raised.value.exit_code == 70


def test_what_only_the_server_can_check_names_the_field(running: Running) -> None:
    with pytest.raises(InputError) as raised:
        running.client.ask("How long?", top_k=1000)
    assert raised.value.field == "top_k"


def test_a_path_outside_the_servers_folders_is_refused(running: Running) -> None:
    with pytest.raises(InputError, match=r"server\.roots"):
        running.client.add("/etc/passwd")
    assert running.library.calls == []


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        pytest.param(lambda client: client.add(), "paths", id="no path"),
        pytest.param(lambda client: client.remove(7), "paths", id="path of no type"),
        pytest.param(lambda client: client.add("/a\udcff"), "paths", id="path that is no text"),
        pytest.param(lambda client: client.add("/a", include=7), "include", id="pattern of no type"),
        pytest.param(lambda client: client.documents({"kinds": ["exe"]}), "where.kinds", id="unknown kind"),
        pytest.param(lambda client: client.stream(7), "question", id="question of no type"),
        pytest.param(lambda client: client.stream("x", history=[{"role": "king"}]), "history[0].role", id="role"),
        pytest.param(lambda client: client.stream("x", temprature=1), "temprature", id="unknown option"),
        pytest.param(lambda client: client.stream("x", top_p=7), "top_p", id="number out of range"),
        pytest.param(lambda client: client.ask("x\ud800"), "question", id="question that is no text"),
        pytest.param(lambda client: client.ask("x", timeout=float("inf")), "timeout", id="endless time"),
        pytest.param(lambda client: client.feedback("abc", float("nan")), "score", id="no number"),
        pytest.param(lambda client: client.feedback("abc", object()), "score", id="nothing that has JSON"),
        pytest.param(lambda client: client.journal(0), "limit", id="no entries"),
        pytest.param(lambda client: client.cluster("one"), "id", id="cluster that is no number"),
        pytest.param(lambda client: client.adapter(7), "id", id="adapter of no type"),
        pytest.param(lambda client: client.pin_adapter("ab", "yes"), "pinned", id="pinned or not"),
        pytest.param(lambda client: client.export_adapter("ab", 7), "paths", id="target of no type"),
        pytest.param(lambda client: client.ask("x", private="no"), "private", id="private or not"),
        pytest.param(lambda client: client.replay_router([7]), "rules[0]", id="rule of no type"),
        pytest.param(lambda client: client.learn(until=float("inf")), "until", id="no end"),
    ],
)
def test_what_is_wrong_here_is_never_sent(ask: Callable[[Client], Any], field: str, tmp_path: Path) -> None:
    with Client(tmp_path / "nobody") as client, pytest.raises(InputError) as raised:
        ask(client)
    assert raised.value.field == field


# --- who answers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def collected() -> Iterator[None]:
    """httpcore leaves a socket that it could not connect to the garbage collector."""
    yield
    gc.collect()


def leaves_a_socket(test: Callable[..., None]) -> Callable[..., None]:
    ignored = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
    return pytest.mark.usefixtures("collected")(ignored(test))


@leaves_a_socket
def test_when_nobody_answers_the_error_names_the_path_and_the_command(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    assert not is_alive(path)
    with Client(path) as client, pytest.raises(MachineError, match="no server answers there") as raised:
        client.documents()
    assert raised.value.field == str(path)
    assert f"edge-rag serve --uds {path}" in raised.value.remedy
    assert raised.value.exit_code == 3


@leaves_a_socket
def test_a_socket_whose_server_has_died_is_nobody(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert not is_alive(path)
    with Client(path) as client, pytest.raises(MachineError, match="no server answers there"):
        list(client.stream("How long?"))


@leaves_a_socket
def test_a_path_too_long_for_a_socket_is_nobody(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 120)
    assert not is_alive(path)
    with Client(path) as client, pytest.raises(MachineError, match="no server answers there"):
        client.documents()


def test_a_server_that_loads_its_models_is_alive_and_busy(running: Running) -> None:
    running.service.ready = False
    assert is_alive(running.path)
    with pytest.raises(Busy, match="Loading model") as raised:
        running.client.documents()
    assert raised.value.exit_code == 75
    running.service.ready = True
    assert is_alive(running.path)
    assert running.client.documents() == [document("/notes/filters.md")]


HTML = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>"
NO_EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n: nothing\n\n"
CUT = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nevent"
ODD = b"HTTP/1.1 418 Teapot\r\nContent-Length: 6\r\nConnection: close\r\n\r\nteapot"


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        pytest.param(HTML, "cannot be read", id="another program"),
        pytest.param(ODD, "cannot be read", id="another error"),
        pytest.param(CUT, "broke off", id="cut off"),
        pytest.param(b"", "broke off", id="silence"),
    ],
)
def test_an_answer_that_is_none_is_an_error_of_the_machine(tmp_path: Path, reply: bytes, complaint: str) -> None:
    path = tmp_path / "socket"
    with saying(path, reply), Client(path, timeout=PATIENCE) as client, pytest.raises(MachineError, match=complaint):
        client.documents()


@pytest.mark.parametrize("reply", [NO_EVENTS, CUT, b""])
def test_a_stream_without_an_end_is_an_error(tmp_path: Path, reply: bytes) -> None:
    path = tmp_path / "socket"
    with saying(path, reply, reply), Client(path, timeout=PATIENCE) as client:
        for ask in (lambda: client.ask("How long?"), client.warm):
            with pytest.raises(MachineError, match="broke off"):
                ask()


def test_a_server_that_says_nothing_for_too_long_is_given_up(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "socket"))
        silent.listen()
        with Client(tmp_path / "socket", timeout=0.05) as client, pytest.raises(MachineError, match="broke off"):
            client.documents()


# --- TCP -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "key").touch(0o600)
    (tmp_path / "key").write_text(KEY)
    library = Library(tmp_path, server__key_file=str(tmp_path / "key"))
    listening = bind_tcp("127.0.0.1:0")
    with served(library, tmp_path / "run" / "socket", listening):
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_over_tcp_the_key_opens(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # which must not be asked
    with Client(base_url=address, key=KEY, timeout=PATIENCE) as client:
        assert client.search("filter life") == [PASSAGE]
        assert list(client.stream("How long?")) == events("How long?")


@pytest.mark.parametrize("key", [KEY[::-1], None])
def test_over_tcp_a_wrong_key_does_not(address: str, key: str | None) -> None:
    with Client(base_url=address, key=key, timeout=PATIENCE) as client, pytest.raises(UsageError, match="key"):
        client.documents()


def test_over_tcp_nobody_adds_by_path(address: str, tmp_path: Path) -> None:
    with Client(base_url=address, key=KEY, timeout=PATIENCE) as client, pytest.raises(UsageError, match="own user"):
        client.add(tmp_path)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        pytest.param({"uds": "/a", "base_url": "http://127.0.0.1:1"}, "base_url", id="two places"),
        pytest.param({"base_url": "http://[::1"}, "base_url", id="no address"),
        pytest.param({"base_url": "http://127.0.0.1:1", "key": "a\nb"}, "key", id="key of two lines"),
        pytest.param({"base_url": "http://127.0.0.1:1", "key": "schlüssel"}, "key", id="key that is not ASCII"),
    ],
)
def test_a_place_that_is_none_is_refused(options: dict[str, str], field: str) -> None:
    with pytest.raises(InputError) as raised:
        Client(**options)  # type: ignore[arg-type]
    assert raised.value.field == field


def test_an_address_without_its_beginning_answers_nothing() -> None:
    with Client(base_url="127.0.0.1:1") as client, pytest.raises(MachineError, match="http://"):
        client.documents()


# --- the default socket ----------------------------------------------------------------------------------------------


def test_the_default_socket_is_in_the_runtime_folder_unless_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_socket() == tmp_path / "edge_rag" / "edge_rag.sock"
    monkeypatch.setenv("EDGE_RAG_SERVER__UDS", "/from/settings")
    assert default_socket() == Path("/from/settings")
    monkeypatch.setenv("EDGE_RAG_UDS", "/from/environment")
    assert default_socket() == Path("/from/environment")


@pytest.fixture
def default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default socket's path, in a runtime folder as it has to be, of a user who has no variables of ours."""
    for name in [name for name in os.environ if name.startswith("EDGE_RAG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    runtime = tmp_path / "runtime"
    (runtime / "edge_rag").mkdir(parents=True, mode=0o700)
    runtime.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    return default_socket()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_s_program_on_the_default_socket_is_never_asked(
    default: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(default))
        os.seteuid(STRANGER)  # the kernel notes who begins to listen
        try:
            listening.listen()
        finally:
            os.seteuid(0)
        with pytest.raises(ConfigError, match="another user"):
            default_socket()
        with pytest.raises(ConfigError, match="another user"):
            Client()
        assert Options().server() is None
        listening.setblocking(False)
        callers = [listening.accept()[0] for _ in range(3)]
        for caller in callers:
            with caller:
                assert caller.recv(1) == b""
        with pytest.raises(BlockingIOError):
            listening.accept()
        for name in ("EDGE_RAG_SERVER__UDS", "EDGE_RAG_UDS"):  # who names it means it
            monkeypatch.setenv(name, str(default))
            assert default_socket() == default


def test_a_default_socket_that_nobody_may_have_is_no_server(default: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def owned_by_another(*_: object, **__: object) -> Path:
        raise PermissionError("runtime directory /tmp/runtime-1 is owned by uid 2")

    monkeypatch.setattr(platformdirs, "user_runtime_path", owned_by_another)
    monkeypatch.setattr(house, "options", Options())
    assert Options().server() is None
    check = house._server()
    assert check.result == "note"
    assert "owned by uid 2" in check.found
    assert "--uds" in check.remedy


def test_an_empty_name_of_a_server_names_none(running: Running, default: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RAG_UDS", "")
    assert Options().server() is None
    default.symlink_to(running.path)
    assert Options().server() == default


def test_a_client_without_a_path_asks_on_the_default_socket(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RAG_UDS", str(running.path))
    with Client(timeout=PATIENCE) as client:
        assert client.search("filter life") == [PASSAGE]


def test_asking_over_the_socket_loads_no_engine(running: Running) -> None:
    script = f"""
import sys
from edge_rag import Client
with Client({str(running.path)!r}) as client:
    assert client.ask("How long?").text
    assert client.search("filter") and client.documents() and client.remove("/notes/filters.md")
    client.clusters() and client.learn() and client.adapter("ab")
    client.router() and client.replay_router()
    client.feedback("abc", 1)
    client.add({str(running.library.folder)!r}); client.warm()
print(*{{"llama_cpp", "onnxruntime", "tokenizers", "apsw", "starlette"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


# --- event streams ---------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["message", "delta", "sources"])
LINES = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=20)
SENT = st.lists(st.tuples(NAMES, st.lists(LINES, min_size=1, max_size=3)), max_size=4)


@given(SENT, st.sampled_from(["\n", "\r\n", "\r"]), st.lists(st.integers(0, 400), max_size=12))
def test_events_are_read_wherever_the_stream_is_cut(
    sent: Sequence[tuple[str, list[str]]], end: str, cuts: Sequence[int]
) -> None:
    told = [": a ping", ""]
    for name, data in sent:
        told += [f"event: {name}", "id: 7", *(f"data: {line}" for line in data), "", ": ping", ""]
    stream = (end.join([*told, ": the end"]) + end).encode()
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    chunks = [stream[a:b] for a, b in itertools.pairwise(places)]
    assert list(parsed(chunks)) == [(name, "\n".join(data).encode()) for name, data in sent]


def test_an_event_whose_end_is_missing_is_passed_over() -> None:
    assert list(parsed([b"data: 1\n\nevent: delta\ndata: 2\n"])) == [("message", b"1")]


def test_only_one_space_behind_the_colon_is_no_part_of_the_value() -> None:
    assert list(parsed([b"data:  a\ndata:b\ndata\n\n"])) == [("message", b" a\nb\n")]
