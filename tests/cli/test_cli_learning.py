"""clusters, adapters, train, idle and what status tells of them: the same over a server's socket and in process."""

import contextlib
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
from msgspec.structs import replace

from edge_rag.cli import asking, house, show  # noqa: F401 — they register their commands
from edge_rag.cli.app import app
from edge_rag.cli.learning import next_time
from edge_rag.config import load_settings
from edge_rag.errors import ConfigError, InputError
from edge_rag.policy.prompt import LAYOUT_VERSION
from edge_rag.records import Adapter
from edge_rag.runtime.rag import EdgeRAG
from edge_rag.store import clusters, items
from edge_rag.store.adapters import AdapterFolder
from edge_rag.store.database import Database
from edge_rag.store.items import Taught
from edge_rag.store.models import ModelFolder
from tests.cli.commands import Command, Held, both, ways
from tests.server.fakes import ADAPTER, LEARNING, LESSON
from tests.server.harness import served
from tests.store.adapter_samples import add_adapter, add_passages

pytestmark = pytest.mark.usefixtures("no_lines_in_between")

SETTINGS = load_settings(environment={})


# --- a real library, without models ----------------------------------------------------------------------------------


@pytest.fixture
def base(model_folder: ModelFolder) -> str:
    """The sha256 of the language model that is used unless another one is set."""
    return model_folder.spec(SETTINGS.models.llm).sha256


@pytest.fixture
def learned(command: Command, base: str) -> Iterator[list[Adapter]]:
    """Two adapters of one cluster, in a library that is served."""
    with Database(command.data) as database:
        members = add_passages(database, "/notes/filters.md", "The filter lasts a year.", "The pump hums.")
        with database.write() as connection:
            clusters.put_clusters(connection, [frozenset(members)], [9.5], now=1000.0)
            [cluster] = clusters.clusters(connection)
            items.add_study(connection, members[0], ["How long does\nit last?", "Who?"], model=base, asked=2, now=5.0)
            first, second = items.untaught(connection, members, model=base, limit=2)
            items.teach(connection, first.id, taught("A year."), model=base)
            items.teach(connection, second.id, None, model=base)
            clusters.note_training(connection, cluster, now=2000.0, failure="it knows too little")
        folder = AdapterFolder(command.data / "adapters")
        about: dict[str, Any] = {"base": base, "layout": LAYOUT_VERSION, "cluster_id": cluster.id}
        adapters = [
            add_adapter(database, folder, 1, *members, **about),
            add_adapter(database, folder, 2, members[1], gate=None, state="failed", reason="it was torn", **about),
        ]
    settings = load_settings({"server.roots": (str(command.data.parent),)}, environment={})
    with served(EdgeRAG.open(command.data, settings=settings), command.socket):
        yield adapters


def taught(answer: str) -> Taught:
    return Taught(answer, np.ones(1, np.int32), np.ones((1, 16), np.int32), np.zeros((1, 16), np.float16))


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("clusters",), id="clusters"),
        pytest.param(("clusters", "--json"), id="clusters as json"),
        pytest.param(("clusters", "list"), id="clusters list"),
        pytest.param(("clusters", "show", "1"), id="cluster"),
        pytest.param(("clusters", "show", "1", "--json"), id="cluster as json"),
        pytest.param(("clusters", "show", "77"), id="no cluster"),
        pytest.param(("adapters",), id="adapters"),
        pytest.param(("adapters", "list", "--json"), id="adapters as json"),
        pytest.param(("adapters", "show", "nobody"), id="no adapter"),
        pytest.param(("adapters", "pin", ""), id="empty id"),
    ],
)
def test_the_output_is_the_same_over_the_socket_and_in_process(
    learned: list[Adapter], command: Command, arguments: Sequence[str]
) -> None:
    served, alone = command.served(*arguments), command.alone(*arguments)
    assert served.out == alone.out
    assert served.code == alone.code
    assert bool(served.err) == bool(alone.err) == bool(served.code)
    assert (served.out, served.err) != ("", "")


def test_a_cluster_is_shown_with_its_passages_and_questions(learned: list[Adapter], command: Command) -> None:
    said = command.served("clusters", "show", "1").out
    assert "2 passages of 2 tokens, weight 9.5" in said
    assert "it knows too little" in said
    assert said.count("/notes/filters.md › Heading  (1 tokens)") == 2
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert any(line.endswith("How long does it last? A year.") for line in lines)
    assert "study unanswered Who?" in lines


@pytest.mark.parametrize("number", ["0", "99999999999999999999", "one"])
def test_what_is_no_number_of_a_cluster_is_wrong_use(command: Command, number: str) -> None:
    said = command.alone("clusters", "show", number)
    assert (said.code, said.out) == (2, "")


def test_where_nothing_was_learned_yet_the_command_says_so(command: Command) -> None:
    for what in ("clusters", "adapters"):
        said = command.alone(what)
        assert (said.code, said.out) == (0, "")
        assert f"no {what} yet" in said.err
        assert command.alone(what, "--json").out == "[]\n"


def test_an_adapter_is_shown_with_its_recipe_and_its_exam_in_words(learned: list[Adapter], command: Command) -> None:
    said = [command(*way, "adapters", "show", learned[0].id[:8]) for way in ways(command)]
    assert said[0] == said[1]
    for words in (
        learned[0].id,
        "2 passages (cluster 1)",
        "feed-forward layers, rank 16",
        "900 examples, 50000 tokens, in 8 epochs",
        "60.5 s on cpu, 1.1 GB of memory, last loss 0.25",
        "passed",
        "0.90 F1 to the answers from the passages (40 asked)",
        "0.60 F1, about the same passages (12 asked)",
        "F1: it is used for these",
        "at least 0.80 similar to one of them",
        "0.01: how much",
    ):
        assert words in said[0].out
    failed = command.served("adapters", "show", learned[1].id).out
    assert "failed: it was torn" in failed
    assert "none: it is not used" in failed


def test_an_adapter_is_pinned_and_disabled_and_back(learned: list[Adapter], command: Command) -> None:
    id = learned[0].id[:12]
    for way in ways(command):
        for what, state in (
            ("pin", "pinned {}: 2 passages, ready, pinned"),
            ("disable", "disabled {}: 2 passages, disabled, pinned: it was disabled"),
            ("unpin", "unpinned {}: 2 passages, disabled: it was disabled"),
            ("enable", "enabled {}: 2 passages, ready"),
        ):
            said = command(*way, "adapters", what, id)
            assert (said.code, said.out) == (0, state.format(id) + "\n")
            [listed] = [line for line in command.alone("adapters").out.splitlines() if line.startswith(id)]
            assert listed.rstrip().endswith(state.rpartition(" passages, ")[2])
    said = command.served("adapters", "enable", learned[1].id[:12])
    assert said.code == 2
    assert "has failed: it was torn" in said.err


def test_a_deleted_adapter_is_gone_with_its_file(learned: list[Adapter], command: Command) -> None:
    for way, adapter in zip(ways(command), learned, strict=True):
        file = command.data / "adapters" / f"{adapter.id}.gguf"
        assert file.exists()
        assert json.loads(command(*way, "adapters", "delete", adapter.id[:12], "--json").out)["id"] == adapter.id
        assert not file.exists()
        assert command(*way, "adapters", "show", adapter.id).code == 2
    assert command.alone("adapters", "--json").out == "[]\n"


def test_an_adapter_leaves_and_comes_back_by_paths_relative_to_the_caller(
    learned: list[Adapter], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(command.data.parent)
    id = learned[0].id[:12]
    for number, way in enumerate(ways(command)):
        name = f"bundle-{number}.zip"
        assert command(*way, "adapters", "export", id, name).out == f"exported {id}: 2 passages, ready\n"
        again = command(*way, "adapters", "export", id, name)
        assert again.code == 2
        assert "exists already" in again.err
        assert command(*way, "adapters", "delete", id).code == 0
        assert command(*way, "adapters", "import", name).out == f"imported {id}: 2 passages, ready\n"
    assert (command.data.parent / "bundle-0.zip").stat().st_mode & 0o777 == 0o600


def test_a_server_writes_and_reads_bundles_below_its_roots_only(
    learned: list[Adapter], command: Command, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "bundle.zip"
    for said in (
        command.served("adapters", "export", learned[0].id, str(outside)),
        command.served("adapters", "import", str(outside)),
    ):
        assert said.code == 2
        assert "server.roots" in said.err
    assert not outside.exists()


# --- learning, with a library that says what it is told to -----------------------------------------------------------


def test_training_ends_with_a_table(command: Command, library: Held) -> None:
    failed = replace(LESSON, cluster_id=4, adapter="", gate=None, seconds=5.0, reason="no question\nhas an answer")
    library.lessons = [LESSON, failed]
    said = both(command, "train")
    assert said.code == 0
    lines = said.out.splitlines()
    assert lines[0].split() == ["cluster", "passages", "questions", "seen", "unseen", "took", "outcome"]
    assert lines[1].split() == ["3", "2", "25", "0.90", "0.60", "61.0", "s", "adapter", ADAPTER.id[:12]]
    assert lines[2].split(maxsplit=5) == ["4", "2", "25", "5.0", "s", "no question has an answer"]
    assert lines[3] == "1 of 2 clusters became adapters; nothing is left to learn"
    assert json.loads(both(command, "train", "--json").out)[1]["reason"] == failed.reason


def test_all_clusters_are_trained_or_those_that_the_settings_find_worth_it(command: Command, library: Held) -> None:
    for arguments, least in ((["train"], library.settings.learning.least_questions), (["train", "--all"], 0.0)):
        library.calls.clear()
        both(command, *arguments)
        assert [call for call in library.calls if call[0] == "learn"] == [("learn", least, None)] * 2


def test_training_ends_at_the_next_time_of_day_that_is_named(
    command: Command, library: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.lessons = []
    before = time.time()
    both(command, "train", "--until", "06:00")
    limits = {call[2] for call in library.calls if call[0] == "learn"}
    assert len(limits) == 1
    assert before < limits.pop() <= before + 25 * 3600
    monkeypatch.setattr("edge_rag.cli.learning.next_time", lambda text, now: before)
    assert both(command, "train", "--until", "06:00").out == "time is up; what is not finished goes on next time\n"


def test_a_time_that_is_none_is_wrong_use(command: Command, library: Held) -> None:
    for text in ("24:00", "6", "", "six"):
        said = both(command, "train", "--until", text)
        assert said.code == 2
        assert "as in --until 06:00" in said.err
    assert library.calls == []


def test_when_there_is_nothing_to_learn_the_command_says_so(command: Command, library: Held) -> None:
    library.lessons = []
    said = both(command, "train")
    assert (said.code, said.out.partition(":")[0]) == (0, "nothing to learn")
    library.learning = replace(LEARNING, waiting="the device runs on battery (learning.on_battery)")
    said = both(command, "train")
    assert (said.code, said.out) == (0, "stopped: the device runs on battery (learning.on_battery)\n")
    assert both(command, "train", "--json").out == "[]\n"


def test_where_nothing_can_be_trained_the_command_says_what_to_do(command: Command, library: Held) -> None:
    library.errors["learn"] = ConfigError("no adapters are used", field="router.mode", remedy="set it to coverage")
    said = both(command, "train")
    assert (said.code, said.out) == (2, "")
    assert said.err == "edge-rag: router.mode: no adapters are used — set it to coverage\n"


def test_a_bar_shows_what_is_being_learned(command: Command, library: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[Any, ...]] = []
    monkeypatch.setattr(show, "bar", lambda: contextlib.nullcontext(lambda *step: shown.append(step)))
    both(command, "train")
    assert shown == [("cluster 3: training", 10, 40)] * 2


def test_a_piece_of_idle_work_is_told(command: Command, library: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    assert both(command, "idle", "--once").out == "learned\n"
    assert json.loads(both(command, "idle", "--once", "--json").out) == {"done": "learned", "waiting": ""}
    library.learning = replace(LEARNING, waiting="the device has 90 °C")
    monkeypatch.setattr(library, "idle_once", lambda: "")
    assert both(command, "idle", "--once").out == "nothing to do\nnothing is learned: the device has 90 °C\n"
    assert command.served("idle").code == 2


def test_status_tells_of_learning_and_of_adapters(command: Command, library: Held) -> None:
    rows = dict(" ".join(line.split()).split(": ", 1) for line in told(both(command, "status").out))
    assert rows["learning"] == "cluster 3: training (10 of 40)"
    assert rows["learns from"] == "2 clusters, 30 questions, 25 with answers"
    assert rows["adapters"] == "4 ready, 1 in memory, 5.0 kB of 256.0 MB"
    assert rows["from memory"] == "11 passages remembered in 7 answers, 1 answers fell back"
    assert "failed last" not in rows
    library.learning = replace(LEARNING, doing="", total=0, waiting="it is hot", last_failure="torn")
    rows = dict(" ".join(line.split()).split(": ", 1) for line in told(both(command, "status").out))
    assert (rows["learning"], rows["failed last"]) == ("waits: it is hot", "torn")


def told(text: str) -> list[str]:
    """The rows about learning and adapters, as 'name: what'."""
    names = ("learning", "learns from", "failed last", "adapters", "from memory")
    found = [(name, line) for line in text.splitlines() for name in names if line.startswith(name + " ")]
    return [f"{name}: {line.removeprefix(name)}" for name, line in found]


# --- until when ------------------------------------------------------------------------------------------------------


@pytest.fixture
def summer_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A place that goes to summer time on the last Sunday of March at three, and back in October at four."""
    monkeypatch.setenv("TZ", "EET-2EEST,M3.5.0/3,M10.5.0/4")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("summer_time")
@pytest.mark.parametrize(
    ("now", "text", "hours"),
    [
        pytest.param("2026-01-10T05:00", "06:00", 1, id="later today"),
        pytest.param("2026-01-10T22:00", "06:00", 8, id="over midnight"),
        pytest.param("2026-01-10T06:00", "06:00", 24, id="just now is tomorrow"),
        pytest.param("2026-12-31T23:30", "0:30", 1, id="over the year's end"),
        pytest.param("2026-03-28T22:00", "06:00", 7, id="into summer time"),
        pytest.param("2026-10-24T22:00", "06:00", 9, id="out of summer time"),
    ],
)
def test_the_next_time_of_day_is_that_of_the_local_clock(now: str, text: str, hours: float) -> None:
    start = datetime.datetime.fromisoformat(now)
    assert next_time(text, start) - start.timestamp() == hours * 3600


def test_what_is_no_time_of_day_names_the_option() -> None:
    with pytest.raises(InputError) as raised:
        next_time("25:00", datetime.datetime(2026, 1, 1))
    assert raised.value.field == "--until"


# --- the tool --------------------------------------------------------------------------------------------------------

ENVIRONMENT = """
import contextlib
class Stages:
    def stage(self, name): return contextlib.nullcontext()
    def report(self): pass
def prepare(extras): print("prepared", *extras)
def binary(name): return name
def run(command): print(*command)
"""


def test_the_tool_prepares_what_training_needs_and_passes_its_options_on(repository: Path, tmp_path: Path) -> None:
    shutil.copy(repository / "tools" / "train_adapters", tmp_path)
    (tmp_path / "environment.py").write_text(ENVIRONMENT)
    called = [sys.executable, str(tmp_path / "train_adapters"), "--all", "--data", "/data", "--until", "06:00"]
    done = subprocess.run(called, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["prepared train", "edge-rag --data /data train --all --until 06:00"]
    assert os.access(repository / "tools" / "train_adapters", os.X_OK)


# --- the guide -------------------------------------------------------------------------------------------------------


def test_the_guide_names_commands_that_exist(repository: Path) -> None:
    guide = (repository / "docs" / "learning.md").read_text()
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    used = re.findall(r"edge-rag (?:--\S+ \S+ )*([a-z]+)(?: ([a-z]+))?", guide)
    assert used
    for name, inner in used:
        assert inner in ("", *getattr(known[name], "commands", ())), f"{name} {inner}"


def test_the_guide_tells_the_settings_as_they_are(repository: Path) -> None:
    guide = (repository / "docs" / "learning.md").read_text()
    named = re.findall(r"`(learning|adapters)\.(\w+)(?:` \(([\d.]+)\))?", guide)
    assert {name for _, name, value in named if value} >= {"keep", "drift", "most_passages", "memory_mb"}
    for group, name, value in named:
        setting = getattr(getattr(SETTINGS, group), name)
        assert not value or float(value) == setting, f"{group}.{name}"
