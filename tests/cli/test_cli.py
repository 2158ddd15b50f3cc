"""The command as people use it: real processes for exit codes and signals, real models, a real data folder."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from edge_rag.store.models import ModelFolder
from tests.conftest import SMALL_LLM


class Command:
    """`edge-rag` with its own data folder and configuration."""

    def __init__(self, folder: Path, models: Path) -> None:
        self.folder = folder
        (folder / "config.toml").touch()
        own = {key: value for key, value in os.environ.items() if not key.startswith("EDGE_RAG_")}
        self.environment = own | {
            "EDGE_RAG_DATA": str(folder / "data"),
            "EDGE_RAG_CONFIG": str(folder / "config.toml"),
            "EDGE_RAG_MODELS__LLM": SMALL_LLM,
            "EDGE_RAG_MODELS__FOLDER": str(models),
            "EDGE_RAG_ANSWERING__MAX_TOKENS": "24",
            # The tree under test, from whatever folder the command is called.
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }

    def start(self, *arguments: str, **options: object) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "edge_rag", *arguments],
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell starts what it puts into the background with interrupts ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def __call__(self, *arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        with self.start(*arguments) as process:
            said, complained = process.communicate(stdin, timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, said, complained)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder, corpus: Path) -> Command:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "notes").mkdir()
    (folder / "notes" / "filters.md").write_bytes((corpus / "manual" / "06-filters.md").read_bytes())
    (folder / "notes" / "pump.md").write_bytes((corpus / "manual" / "07-pump.md").read_bytes())
    command = Command(folder, model_folder.folder)
    added = command("add", "notes")
    assert added.returncode == 0, added.stderr
    assert added.stdout.startswith("2 added; ")
    return command


def test_adding_again_changes_nothing(command: Command) -> None:
    assert command("add", "notes").stdout.startswith("2 unchanged; 0 chunks")


def test_listing_shows_paths_relative_to_here(command: Command) -> None:
    lines = command("ls").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["document", "notes/filters.md", "notes/pump.md"]


def test_search_prints_places_and_texts(command: Command) -> None:
    found = json.loads(command("search", "membrane life", "-k", "2", "--json").stdout)
    assert len(found) == 2
    assert found[0]["title"] in command("search", "membrane life", "-k", "1").stdout + found[0]["title"]
    assert "filters.md" in command("search", "membrane life", "-k", "1").stdout


def test_search_keeps_to_the_filter(command: Command) -> None:
    found = json.loads(command("search", "membrane", "--document", "notes/pump.md", "--json").stdout)
    assert {Path(passage["path"]).name for passage in found} == {"pump.md"}


def test_an_answer_comes_with_sources_and_id_and_takes_feedback(command: Command) -> None:
    done = command("ask", "How long does a membrane last?")
    assert done.returncode == 0, done.stderr
    assert "Sources" in done.stdout
    assert "notes/filters.md" in done.stdout
    newest = json.loads(command("journal", "--json").stdout)[0]
    assert newest["question"] == "How long does a membrane last?"
    assert newest["id"] in done.stdout
    assert command("feedback", newest["id"], "1").returncode == 0
    assert "1.00" in command("journal").stdout


def test_a_private_question_leaves_nothing_to_look_at(command: Command) -> None:
    before = command("journal", "--json").stdout
    done = command("ask", "--private", "How long does a membrane last?", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["text"]
    assert command("journal", "--json").stdout == before
    said = command("feedback", answer["id"], "1")
    assert (said.returncode, "no answer with this id" in said.stderr) == (2, True)


def test_an_answer_as_json_has_everything(command: Command) -> None:
    answer = json.loads(command("ask", "How long does a membrane last?", "--json").stdout)
    assert answer["usage"]["completion_tokens"] <= 24
    assert answer["passages"]
    assert answer["plan"]["passages"][0]["how"] == "exact"


def test_what_one_process_has_computed_the_next_one_loads(command: Command) -> None:
    plans = [json.loads(command("ask", "What does the pump weigh?", "--json").stdout) for _ in range(2)]
    last = plans[-1]["plan"]
    assert {passage["source"] for passage in last["passages"]} <= {"ssd", "ram"}  # read ahead or not
    skipped = sum(passage["tokens"] - passage["link"] for passage in last["passages"])
    assert plans[-1]["usage"]["cached_tokens"] == last["prefix_tokens"] + skipped > last["prefix_tokens"] > 0


def test_a_question_about_nothing_known_is_not_put_to_the_model(command: Command) -> None:
    answer = json.loads(command("ask", "Who painted the Mona Lisa?", "--json").stdout)
    assert answer["finish_reason"] == "no_passages"
    assert answer["usage"]["completion_tokens"] == 0


def test_chat_answers_each_line_until_quit(command: Command) -> None:
    done = command(
        "chat", stdin="How long does a membrane last?\n/new\nWhat does the pump weigh?\n/quit\nnever asked\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Sources") == 2


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        pytest.param(("ask", " "), 2, "question: is empty", id="empty question"),
        pytest.param(("ask", "x", "--top-p", "7"), 2, "top_p", id="number out of range"),
        pytest.param(("--set", "retrieval.topk=3", "ls"), 2, "did you mean 'top_k'?", id="misspelt setting"),
        pytest.param(("--set", "retrieval", "ls"), 2, "KEY=VALUE", id="setting without value"),
        pytest.param(("rm", "nowhere.md"), 2, "is not in the library", id="unknown document"),
        pytest.param(("feedback", "nothing", "1"), 2, "no answer with this id", id="unknown answer"),
        pytest.param(("add", "nowhere"), 1, "nowhere", id="missing path"),
        pytest.param(("models", "pull", "smolm2-135m"), 2, "did you mean smollm2-135m?", id="misspelt model"),
        pytest.param(("--data", "/proc/nowhere", "ls"), 3, "data folder cannot be used", id="impossible folder"),
    ],
)
def test_wrong_use_says_what_is_wrong(command: Command, arguments: Sequence[str], code: int, complaint: str) -> None:
    done = command(*arguments)
    assert complaint in done.stderr
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def test_a_missing_model_offline_says_how_to_bring_it(command: Command, tmp_path: Path) -> None:
    done = command("--offline", "--set", f"models.folder={tmp_path}", "models", "pull", SMALL_LLM)
    assert done.returncode == 3
    assert "models import PATH" in done.stderr
    assert "sha256" in done.stderr


def test_status_and_doctor_find_everything_in_order(command: Command) -> None:
    status = json.loads(command("status", "--json").stdout)
    assert status["documents"] == 2
    done = command("doctor", "--json")
    assert done.returncode == 0, done.stdout
    assert {check["result"] for check in json.loads(done.stdout)} <= {"ok", "note"}


def test_doctor_names_a_missing_model_and_fails(command: Command) -> None:
    done = command("--model", "qwen2.5-coder-1.5b", "--set", f"models.folder={command.folder}", "doctor")
    assert done.returncode == 1
    assert "edge-rag models pull qwen2.5-coder-1.5b" in done.stdout


def test_settings_and_help_are_there(command: Command) -> None:
    assert "retrieval.top_k" in command("settings").stdout
    assert command("--version").stdout.strip() == "0.1.0"
    assert "Usage" in command().stdout


def test_interrupting_an_answer_keeps_what_was_said(command: Command) -> None:
    with command.start(
        "ask", "How long does a membrane last?", "--max-tokens", "2000", "--temperature", "1.5"
    ) as asking:
        assert asking.stdout is not None
        asking.stdout.read(1)  # the first word is there
        asking.send_signal(signal.SIGINT)
        _, complained = asking.communicate(timeout=60)
    assert asking.returncode == 130, complained
    assert "stopped" in complained
    newest = json.loads(command("journal", "--limit", "1", "--json").stdout)[0]
    assert newest["finish_reason"] == "cancelled"
    assert newest["answer"]


def test_a_reader_that_goes_away_is_no_error(command: Command) -> None:
    shell = f"{sys.executable} -m edge_rag settings | head -1"
    done = subprocess.run(shell, shell=True, env=command.environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_rm_removes_from_the_library_only(command: Command) -> None:
    extra = command.folder / "extra.md"
    extra.write_text("# Extra\n\nThe spare key hangs behind the door.\n")
    assert command("add", "extra.md").returncode == 0
    assert command("rm", "extra.md").stdout == "removed extra.md\n"
    assert extra.exists()
    extra.unlink()


def test_passages_are_warmed_with_adding_or_later_and_status_counts_them(command: Command) -> None:
    extra = command.folder / "warm.md"
    extra.write_text("# Warm\n\nThe spare fuse lies in the second drawer.\n")
    before = json.loads(command("status", "--json").stdout)["kv_files"]
    added = command("add", "warm.md", "--warm")
    assert added.returncode == 0, added.stderr
    assert added.stdout.startswith("1 added; 1 chunks in ")
    assert "\n1 passages computed, 0 had their KV, of 1, in " in added.stdout
    status = json.loads(command("status", "--json").stdout)
    prefix = before == 0  # it is kept too, with the first passage
    assert status["kv_files"] == before + 1 + prefix
    [line] = [line for line in command("status").stdout.splitlines() if line.startswith("passages as KV")]
    assert f" {status['kv_files']} on disk, " in line
    assert command("warm", "warm.md").stdout.startswith("0 passages computed, 1 had their KV, of 1, in ")
    assert command("rm", "warm.md").returncode == 0
    assert json.loads(command("status", "--json").stdout)["kv_files"] == status["kv_files"] - 1


def test_when_nothing_could_be_added_nothing_is_warmed(command: Command) -> None:
    done = command("add", "nowhere.md", "--warm")
    assert done.returncode == 1
    assert done.stdout.startswith("1 failed; 0 chunks")
    assert "passages" not in done.stdout


def test_warming_says_as_json_what_it_did_with_the_most_used_passages(command: Command) -> None:
    report = json.loads(command("warm", "--hot", "1", "--json").stdout)
    assert (report["passages"], report["computed"] + report["present"], report["full"]) == (1, 1, False)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        pytest.param(("warm", "nowhere.md"), "is not in the library", id="unknown document"),
        pytest.param(("--set", "kv.enabled=false", "warm"), "kv.enabled", id="kv switched off"),
        pytest.param(("warm", "--hot", "0"), "--hot", id="none at all"),
    ],
)
def test_what_cannot_be_warmed_is_said(command: Command, arguments: Sequence[str], complaint: str) -> None:
    done = command(*arguments)
    assert complaint in done.stderr
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "result", "found"),
    [
        pytest.param((), "ok", "passages can be moved, 4 tokens linked, all files whole", id="kept and moved"),
        pytest.param(("--set", "kv.link_tokens=-1"), "note", "passages are not moved", id="not moved"),
        pytest.param(("--set", "kv.enabled=false"), "note", "switched off", id="switched off"),
    ],
)
def test_doctor_tells_whether_passages_are_kept(
    command: Command, flags: Sequence[str], result: str, found: str
) -> None:
    done = command(*flags, "doctor", "--json")
    assert done.returncode == 0, done.stdout
    [check] = [check for check in json.loads(done.stdout) if check["what"] == "passages as KV"]
    assert check["result"] == result
    assert found in check["found"]
