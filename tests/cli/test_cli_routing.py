"""router, private questions, and what status tells of routing: the same over a server's socket and in process."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer.main
from msgspec.structs import replace

from edge_rag.cli import asking, documents, house, routing  # noqa: F401 — they register their commands
from edge_rag.cli.app import app
from edge_rag.config import load_settings
from edge_rag.policy.caching_rules import RULES
from edge_rag.policy.hindsight import Comparison, Replayed
from edge_rag.policy.prompt import LAYOUT_VERSION
from edge_rag.records import Answer, Plan, Reward, RouterStatus, Timings, Usage
from edge_rag.runtime.rag import EdgeRAG
from edge_rag.store import journal, library, routes
from edge_rag.store.adapters import AdapterFolder
from edge_rag.store.database import Database
from edge_rag.store.models import ModelFolder
from edge_rag.store.routes import Routed, RoutedArm
from tests.cli.commands import Command, Held, both
from tests.server.fakes import ADAPTER, COMPARISON, JUDGED, ROUTER
from tests.server.harness import served
from tests.store.adapter_samples import add_adapter, add_passages

pytestmark = pytest.mark.usefixtures("no_lines_in_between")

SETTINGS = load_settings(environment={})


def lines(text: str) -> list[str]:
    """Lines with single spaces."""
    return [" ".join(line.split()) for line in text.splitlines()]


# --- with a library that says what it is told to ---------------------------------------------------------------------


def test_arms_are_shown_with_what_came_of_them(command: Command, library: Held) -> None:
    said = both(command, "router")
    assert said.code == 0
    assert said.err == ""
    sums, *table = lines(said.out)
    assert sums == (
        "mode linucb, residency polar: 9 decisions, 8 without loading, 2 to try something; 1 epochs, "
        "6 loads since the start"
    )
    assert table == [
        "arm chosen rewards mean unsure in memory",
        "(passages) 5 3 0.75 0.25",
        f"{ADAPTER.id[:12]} 4 0 0.50 wanted",
    ]
    assert both(command, "router", "status") == said


def test_an_adapter_in_fast_memory_is_marked(command: Command, library: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    there = replace(ROUTER, arms=(replace(ROUTER.arms[1], resident=True, mean=0.5),))
    monkeypatch.setattr(library, "router", lambda: there)
    assert lines(both(command, "router").out)[-1] == f"{ADAPTER.id[:12]} 4 0 0.50 0.50 yes"


def test_where_nothing_was_routed_the_command_says_so(
    command: Command, library: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "router", lambda: RouterStatus("off", "lru", 0, 0, 0))
    said = both(command, "router")
    assert (said.code, "mode off" in said.out) == (0, True)
    assert "nothing was routed yet" in said.err


def test_all_of_it_is_there_as_json(command: Command, library: Held) -> None:
    for arguments in (("router", "--json"), ("router", "status", "--json")):
        assert json.loads(both(command, *arguments).out)["wanted"] == [ADAPTER.id]
    assert json.loads(both(command, "router", "replay", "--json").out)["ways"][1]["policy"] == "lru"


def test_other_rules_are_compared_by_question(command: Command, library: Held) -> None:
    said = both(command, "router", "replay")
    assert said.code == 0
    text = " ".join(lines(said.out))
    assert text.startswith("8 decisions; of 1 others the adapter is gone. Utility is quality less the price of waiting")
    assert lines(said.out)[-3:] == [
        "rule utility quality by adapters in memory loads",
        "as it was 0.500 0.625 4 3 1",
        "lru 0.625 0.750 6 6 2",
    ]
    assert said.err == "what answers were worth: no answer was judged\n"


def test_rules_are_named_one_by_one(command: Command, library: Held) -> None:
    for arguments, rules in (((), ("polar", "lru")), (("-p", "lfu", "--policy", "static"), ("lfu", "static"))):
        library.calls.clear()
        both(command, "router", "replay", *arguments)
        assert [call for call in library.calls if call[0] == "replay_router"] == [("replay_router", *rules)] * 2


def test_what_was_said_once_is_not_said_for_every_rule(
    command: Command, library: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, unjudged = COMPARISON.ways
    found = Comparison(0, 0, (unjudged, replace(unjudged, policy="lfu", decisions=0)))
    monkeypatch.setattr(library, "replay_router", lambda rules: found)
    said = both(command, "router", "replay")
    assert said.err.count("no answer was judged") == 1
    assert "others" not in said.out
    assert lines(said.out)[-1].startswith("lfu 5.000")


def test_status_tells_of_routing(command: Command, library: Held) -> None:
    [row] = [line for line in lines(both(command, "status").out) if line.startswith("router")]
    assert row == "router linucb, polar: 9 decisions, 8 without loading, 2 to try something"


def test_a_question_is_private_when_it_is_said(command: Command, library: Held) -> None:
    for arguments, private in ((("How long?",), False), (("--private", "How long?"), True)):
        library.calls.clear()
        both(command, "ask", *arguments)
        asked = [options["private"] for what, _, options in library.calls if what == "stream"]
        assert asked == [private] * 2


# --- a real library, without a language model ------------------------------------------------------------------------


@pytest.fixture
def routed(command: Command, model_folder: ModelFolder) -> Iterator[str]:
    """An adapter that could have answered two questions and answered one of them, in a library that is served."""
    with EdgeRAG.open(command.data, settings=SETTINGS) as rag:
        space = rag._house.school.space()
    with Database(command.data) as database:
        members = add_passages(database, "/notes/filters.md", "The filter lasts a year.", "The pump hums.")
        folder = AdapterFolder(command.data / "adapters")
        base = model_folder.spec(SETTINGS.models.llm).sha256
        adapter = add_adapter(database, folder, 1, *members, base=base, layout=LAYOUT_VERSION).id
        with database.write() as connection:
            passages = tuple(library.passages(connection, members).values())
            for clock, chosen in enumerate(("", adapter)):
                answer = Answer(
                    f"{clock:016x}", "Why?", "So.", passages, (), Usage(), Timings(), "stop", Plan(), "small"
                )
                journal.record(connection, answer, now=float(clock))
                arms = (arm("", space.size, mean=0.5, here=2.0), arm(adapter, space.size, mean=0.9, away=4.0))
                routes.put(connection, Routed(answer.id, clock, space.tag, chosen, False, arms))
            routes.put_reward(connection, Reward("0" * 16, "", 2, 1.0, 0.25, 1.0, "feedback"))
    with served(EdgeRAG.open(command.data, settings=SETTINGS), command.socket):
        yield adapter


def arm(adapter: str, size: int, *, mean: float, here: float = 0.0, away: float = 0.0) -> RoutedArm:
    """An arm that has to be loaded, if it is an adapter."""
    wait = away or here
    return RoutedArm(adapter, np.zeros(size), mean, 0.125, wait, here, wait, float(not adapter), not adapter)


def test_the_journal_tells_of_arms_whatever_is_loaded(routed: str, command: Command) -> None:
    said = both(command, "router")
    assert lines(said.out)[-2:] == ["(passages) 1 1 0.25 0.12", f"{routed[:12]} 1 0 0.12"]
    assert "2 decisions, 1 without loading" in " ".join(lines(said.out))


def test_what_another_rule_would_have_done_needs_no_language_model(routed: str, command: Command) -> None:
    said = both(command, "router", "replay", "-p", "lru")
    assert said.code == 0
    price = SETTINGS.router.second_price
    utilities = [(0.5 - 2 * price + 0.9 - 4 * price) / 2, 0.5 - 2 * price, 0.9 - 4 * price / 2]
    assert lines(said.out)[-3:] == [
        f"as it was {utilities[0]:.3f} 0.700 1 0 1",
        f"without adapters {utilities[1]:.3f} 0.500 0 0 0",
        f"lru {utilities[2]:.3f} 0.900 2 1 1",
    ]


def test_a_rule_that_there_is_not_is_wrong_use(routed: str, command: Command) -> None:
    said = both(command, "router", "replay", "-p", "best")
    assert (said.code, said.out) == (2, "")
    assert "there is no rule 'best' — known are polar, " in said.err


def test_where_adapters_are_chosen_by_rule_those_stay_that_were_used_last(command: Command) -> None:
    said = command("--data", str(command.data), "--set", "router.mode=coverage", "router")
    assert said.out.startswith("mode coverage, residency lru: 0 decisions")


def test_in_a_new_library_nothing_is_compared(command: Command) -> None:
    assert "nothing was routed yet" in command.alone("router").err
    said = command.alone("router", "replay")
    assert (said.code, lines(said.out)[-1]) == (0, "lru 0.000 0.000 0 0 0")
    assert "no answer was judged" in said.err


# --- the guide -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guide(repository: Path) -> str:
    return (repository / "docs" / "router.md").read_text()


def test_the_guide_names_commands_that_exist(guide: str) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    used = re.findall(r"edge-rag (?:--\S+ \S+ )*([a-z]+)(?: ([a-z]+))?", guide)
    assert ("router", "replay") in used
    for name, inner in used:
        assert inner in ("", *getattr(known[name], "commands", ())), f"{name} {inner}"


def test_the_guide_tells_the_settings_as_they_are(guide: str) -> None:
    named = re.findall(r"`(router|learning|adapters)\.(?!state`)(\w+)`(?: \(([\w.]+)\))?", guide)
    assert {name for group, name, value in named if value and group == "router"} == set(
        SETTINGS.router.__struct_fields__
    )
    for group, name, value in named:
        setting = getattr(getattr(SETTINGS, group), name)
        assert not value or value == (setting if isinstance(setting, str) else f"{setting:g}"), f"{group}.{name}"


def test_the_guide_has_every_rule_and_no_other(guide: str) -> None:
    table = guide[guide.index("| `router.residency` |") :].partition("\n\n")[0]
    told = [name for row in table.splitlines()[2:] for name in re.findall(r"`([\w+-]+)`", row.split("|")[1])]
    assert sorted(told) == sorted(RULES)


def test_the_guide_shows_the_table_as_it_is_printed(
    guide: str, command: Command, library: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = guide[guide.index("$ edge-rag router replay") :].partition("\n```")[0]
    _, *rows = [line.split() for line in shown.splitlines()[2:]]
    ways = []
    for row in rows:
        utility, quality, used, hits, loads = map(float, row[-5:])
        name = " ".join(row[:-5])
        ways.append(Replayed(name, 412, 412 * utility, quality, int(used), int(hits), int(loads), JUDGED))
    monkeypatch.setattr(library, "replay_router", lambda rules: Comparison(412, 0, tuple(ways)))
    said = both(command, "router", "replay", *shown.splitlines()[0].split()[4:])
    assert said.out.splitlines() == shown.splitlines()[1:]
