"""The command over the socket of a real `edge-rag serve` with the small model: the same output as in process.

The user of these tests has folders of his own and no EDGE_RAG_ variables, so the server is found where users have it.
The server is a process of its own; the command is one only where that matters, else it is called in this process.
"""

import contextlib
import gc
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from edge_rag.cli import main
from edge_rag.cli.app import Options
from edge_rag.client import Client
from edge_rag.errors import UsageError
from edge_rag.runtime.rag import EdgeRAG
from edge_rag.store.models import ModelFolder
from tests.conftest import SMALL_LLM

PATIENCE = 120.0  # seconds; only what is broken needs them
QUESTION = "How long does a membrane last?"

# Short ones: what is slow here is reading them.
NOTES = {
    "filters.md": "# Filters\n\nA membrane lasts two years. Rinse the membrane before its first use.\n",
    "pump.md": "# Pump\n\nThe pump weighs three kilograms. Its membrane is made of rubber.\n",
}

# KV is off: where an answer's passages come from must not depend on what was asked before.
CONFIG = """
[models]
llm = "{llm}"
folder = "{models}"
[answering]
max_tokens = 16
[engine]
n_ctx = 2048
threads = 1
[kv]
enabled = false
"""


def strangers() -> dict[str, str]:
    """The variables here that are none of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("EDGE_RAG_")}


def exit_code() -> int:
    """What a process that runs the command would end with."""
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


class Home:
    """A user's home with two notes, and the command as he calls it there."""

    def __init__(self, folder: Path, models: Path) -> None:
        self.folder = folder
        self.data = folder / "share" / "edge_rag" / "library"
        self.socket = folder / "run" / "edge_rag" / "edge_rag.sock"
        (folder / "config" / "edge_rag").mkdir(parents=True)
        (folder / "config" / "edge_rag" / "config.toml").write_text(CONFIG.format(llm=SMALL_LLM, models=models))
        (folder / "notes").mkdir()
        for name, text in NOTES.items():
            (folder / "notes" / name).write_text(text)
        self.environment = {
            "HOME": str(folder),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "XDG_DATA_HOME": str(folder / "share"),
            "XDG_RUNTIME_DIR": str(folder / "run"),
        }

    def start(self, *arguments: str, stderr: int | IO[str] = subprocess.PIPE, **more: str) -> "subprocess.Popen[str]":
        """The command in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "edge_rag", *arguments],
            # The tree under test, from whatever folder the command is called.
            env=strangers() | self.environment | {"PYTHONPATH": str(Path(__file__).parents[2])} | more,
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            # A shell starts what it puts into the background with interrupts ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def served(self, *arguments: str, stdin: str = "", **more: str) -> "subprocess.CompletedProcess[str]":
        """The command; the server that answers on the default socket does the work."""
        said, complained = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        with pytest.MonkeyPatch.context() as here:
            for name in os.environ.keys() - strangers().keys():
                here.delenv(name)
            for name, value in (self.environment | more).items():
                here.setenv(name, value)
            here.chdir(self.folder)
            here.setattr(sys, "argv", ["edge-rag", *arguments])
            here.setattr(sys, "stdin", io.StringIO(stdin))
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
                code = exit_code()
        texts = (stream.buffer.getvalue().decode() for stream in (said, complained))
        return subprocess.CompletedProcess(arguments, code, *texts)

    def alone(self, *arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        """The command; it does the work itself, on the same data folder."""
        return self.served("--data", str(self.data), *arguments, stdin=stdin)

    def json(self, *arguments: str) -> Any:
        done = self.served(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def until_ready(notices: socket.socket) -> None:
    while b"READY=1" not in notices.recv(4096):
        pass


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder) -> Iterator[Home]:
    """A home whose library holds the two notes and is being served."""
    home = Home(tmp_path_factory.mktemp("home"), model_folder.folder)
    notify, log = home.folder / "notify", home.folder / "log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices, log.open("w") as lines:
        notices.bind(str(notify))
        notices.settimeout(PATIENCE)
        with home.start("serve", stderr=lines, NOTIFY_SOCKET=str(notify)) as server:
            try:
                until_ready(notices)
                added = home.served("add", "notes")
                assert added.returncode == 0, added.stderr
                assert added.stdout.startswith("2 added; ")
                yield home
            finally:
                server.terminate()
                server.communicate(timeout=PATIENCE)
    assert server.returncode == 0, log.read_text()
    assert not home.socket.exists()


# --- a process of its own --------------------------------------------------------------------------------------------


def test_what_the_process_prints_and_ends_with_is_what_is_compared_below(home: Home) -> None:
    for arguments in (("ls",), ("rm", "nowhere.md")):
        here = home.served(*arguments)
        with home.start(*arguments) as process:
            told = process.communicate(timeout=PATIENCE)
        assert (*told, process.returncode) == (here.stdout, here.stderr, here.returncode)


# --- one library, two ways -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("ls",), id="ls"),
        pytest.param(("ls", "--json", "--in", "notes", "--type", "md"), id="ls as json, filtered"),
        pytest.param(("search", "membrane life", "-k", "3"), id="search"),
        pytest.param(("search", "membrane", "--document", "notes/pump.md", "--json"), id="search as json, filtered"),
        pytest.param(("search", "membrane", "--in", "nowhere"), id="search that finds nothing"),
        pytest.param(("rm", "nowhere.md"), id="unknown document"),
        pytest.param(("feedback", "nothing", "1"), id="unknown answer"),
        pytest.param(("ask", " "), id="empty question"),
        pytest.param(("warm",), id="kv is switched off"),
    ],
)
def test_the_output_is_the_same_over_the_socket_and_in_process(home: Home, arguments: Sequence[str]) -> None:
    served, alone = home.served(*arguments), home.alone(*arguments)
    assert served.stdout == alone.stdout
    assert served.returncode == alone.returncode
    assert (served.stdout, served.stderr) != ("", "")
    assert "Traceback" not in served.stderr


def test_an_answer_is_the_same_over_the_socket_and_in_process(home: Home) -> None:
    answers = [
        json.loads(done.stdout) for ask in (home.served, home.alone) for done in [ask("ask", QUESTION, "--json")]
    ]
    for answer in answers:
        assert answer["usage"]["completion_tokens"] > 0
        for name in ("id", "timings"):  # of their own
            del answer[name]
        del answer["usage"]["cached_tokens"]
    assert answers[0] == answers[1]


def test_an_answer_for_people_comes_with_its_sources_and_takes_feedback(home: Home) -> None:
    done = home.served("ask", QUESTION)
    assert done.returncode == 0, done.stderr
    assert "Sources" in done.stdout
    assert "notes/filters.md" in done.stdout
    newest = home.json("journal", "--limit", "1")[0]
    assert newest["id"] in done.stdout
    assert home.served("feedback", newest["id"], "1").stdout == "thank you\n"
    assert "1.00" in home.alone("journal").stdout


def test_a_chat_leans_on_the_server_until_quit(home: Home) -> None:
    done = home.served("chat", stdin=f"{QUESTION}\n \n/new\nWhat does the pump weigh?\n/quit\nnever asked\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Sources") == 2


def test_documents_come_and_go_by_paths_relative_to_the_caller(home: Home) -> None:
    (home.folder / "extra.md").write_text("# Extra\n\nThe spare key hangs behind the door.\n")
    added = home.served("add", "extra.md", "nowhere.md")
    assert added.stdout.startswith("1 added, 1 failed; 1 chunks")
    assert added.stderr == "failed: nowhere.md: no such file or folder\n"
    assert added.returncode == 1
    assert "extra.md" in home.alone("ls").stdout
    assert home.served("rm", "extra.md").stdout == "removed extra.md\n"
    assert (home.folder / "extra.md").exists()
    assert "extra.md" not in home.alone("ls").stdout


def test_embedding_anew_counts_the_chunks(home: Home) -> None:
    chunks = sum(document["chunks"] for document in home.json("ls"))
    assert home.served("reembed").stdout == f"{chunks} chunks embedded\n"


def test_status_is_the_servers_and_doctor_finds_it(home: Home) -> None:
    loaded = {part["what"] for part in home.json("status")["loaded"]}
    assert "language model" in loaded
    assert re.search(r"^engine +0 of \d answers being written, 0 waiting, ", home.served("status").stdout, re.M)
    assert json.loads(home.alone("status", "--json").stdout)["loaded"] == []
    done = home.served("doctor", "--json")
    assert done.returncode == 0, done.stdout
    [check] = [check for check in json.loads(done.stdout) if check["what"] == "server"]
    assert (check["result"], check["found"]) == ("ok", f"answers on {home.socket}")


def test_interrupting_an_answer_ends_it_in_the_server(home: Home) -> None:
    arguments = ("ask", QUESTION, "--max-tokens", "1000", "--temperature", "1.5")
    with home.start(*arguments) as asking:
        assert asking.stdout is not None
        asking.stdout.read(1)  # the first word is there
        asking.send_signal(signal.SIGINT)
        _, complained = asking.communicate(timeout=PATIENCE)
    assert asking.returncode == 130, complained
    assert "stopped" in complained
    newest = home.json("journal", "--limit", "1")[0]
    while newest["finish_reason"] != "cancelled":  # the server notices within a step, or pytest-timeout does
        newest = home.json("journal", "--limit", "1")[0]
    assert newest["question"] == QUESTION
    assert newest["answer"]


# --- which server, if any --------------------------------------------------------------------------------------------


@pytest.fixture
def collected() -> Iterator[None]:
    """httpcore leaves a socket that it could not connect to the garbage collector."""
    yield
    gc.collect()


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.usefixtures("collected")
def test_a_server_that_is_named_must_answer(home: Home, tmp_path: Path) -> None:
    path = tmp_path / "nobody"
    for done in (home.served("--uds", str(path), "ls"), home.served("ls", EDGE_RAG_UDS=str(path))):
        assert done.returncode == 3
        assert f"edge-rag serve --uds {path}" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_server_is_named_by_option_or_environment(home: Home) -> None:
    listed = home.served("ls").stdout
    assert "notes/pump.md" in listed
    # An own data folder in the environment would be empty.
    elsewhere = {"EDGE_RAG_DATA": str(home.folder / "elsewhere")}
    assert home.served("--uds", str(home.socket), "ls", **elsewhere).stdout == listed
    assert home.served("ls", EDGE_RAG_UDS=str(home.socket), **elsewhere).stdout == listed
    assert "notes/pump.md" not in home.served("ls", **elsewhere).stdout


@pytest.mark.parametrize("arguments", [("serve",), ("serve", "--uds", "option")])
def test_a_server_listens_where_it_is_looked_for(home: Home, tmp_path: Path, arguments: Sequence[str]) -> None:
    """It is named by the environment, or by an option, which goes before."""
    names = {"EDGE_RAG_UDS": str(tmp_path / "run" / "environment"), "EDGE_RAG_DATA": str(tmp_path / "data")}
    expected = tmp_path / "run" / ("option" if "--uds" in arguments else "environment")
    given = [str(expected) if argument == "option" else argument for argument in arguments]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        notices.bind(str(tmp_path / "notify"))
        notices.settimeout(PATIENCE)
        with home.start(*given, NOTIFY_SOCKET=str(tmp_path / "notify"), **names) as server:
            notices.recv(4096)  # it listens
            made = {name for name in ("environment", "option") if (tmp_path / "run" / name).is_socket()}
            server.terminate()
            _, log = server.communicate(timeout=PATIENCE)
    assert made == {expected.name}, log
    assert server.returncode == 0, log


def test_a_server_and_own_settings_contradict_each_other(home: Home) -> None:
    done = home.served("--uds", str(home.socket), "--data", "/tmp", "--set", "a.b=c", "--model", "x", "--offline", "ls")
    assert done.returncode == 2
    assert "leave out --data and --set and --model and --offline" in done.stderr


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    """Options of a call by a user who has no variables of ours, and whose server would be in `tmp_path`."""
    for name in [name for name in os.environ if name.startswith("EDGE_RAG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return Options()


@pytest.fixture
def default(home: Home, options: Options, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default socket, on which the server of `home` answers."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home.folder / "run"))
    return home.socket


def test_without_a_server_the_command_does_the_work(options: Options, tmp_path: Path) -> None:
    assert options.server() is None
    with options.open() as rag:
        assert isinstance(rag, EdgeRAG)
        assert rag.folder == tmp_path / "edge_rag" / "library"


def test_the_default_server_does_the_work_when_it_answers(options: Options, default: Path) -> None:
    assert options.server() == default
    with options.open() as rag:
        assert isinstance(rag, Client)


@pytest.mark.parametrize("name", ["EDGE_RAG_DATA", "EDGE_RAG_CONFIG", "EDGE_RAG_RETRIEVAL__TOP_K"])
def test_own_settings_in_the_environment_keep_the_work_here(
    options: Options, default: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "3")
    assert options.server() is None


def test_settings_that_say_where_the_server_is_do_not(
    options: Options, default: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere")
    monkeypatch.setenv("EDGE_RAG_SERVER__UDS", str(default))
    assert options.server() == default


def test_own_options_go_before_a_server_in_the_environment(
    options: Options, default: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_RAG_UDS", str(default))
    assert options.server() == default
    options.own = ("--data",)
    assert options.server() is None
    options.uds = default
    with pytest.raises(UsageError, match="leave out --data"):
        options.server()
