"""Routes to what was learned: what they take, what they pass on, who may ask, and what is counted."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from msgspec.structs import replace

from edge_rag import errors
from edge_rag.policy.hindsight import Comparison
from edge_rag.records import Adapter, Cluster, ClusterView, LearningStatus, Lesson, RouterStatus
from edge_rag.server.metrics import Metrics
from edge_rag.server.sockets import bind_tcp
from tests.server.fakes import ADAPTER, CLUSTER, COMPARISON, LEARNING, LESSON, ROUTER, VIEW, FakeRAG
from tests.server.harness import caller, parsed, served
from tests.server.test_server_metrics import numbers

KEY = "0123456789abcdef0123"


def read(response: httpx.Response, kind: Any) -> Any:
    assert response.status_code == 200, response.text
    return msgspec.json.decode(response.content, type=kind)


# --- looking ---------------------------------------------------------------------------------------------------------


def test_clusters_are_listed_and_shown(http: httpx.Client, fake: FakeRAG) -> None:
    assert read(http.get("/clusters"), list[Cluster]) == [CLUSTER]
    assert read(http.get("/clusters/3"), ClusterView) == VIEW
    assert fake.calls[-2:] == [("clusters",), ("cluster", 3)]


@pytest.mark.parametrize("name", ["-1", "x", "3.0", "99999999999999999999"])
def test_what_can_be_no_cluster_is_none(name: str, http: httpx.Client, fake: FakeRAG) -> None:
    before = list(fake.calls)
    response = http.get(f"/clusters/{name}")
    assert (response.status_code, response.json()["error"]["param"]) == (404, name)
    assert fake.calls == before


def test_adapters_are_listed_and_shown_by_the_beginning_of_their_id(http: httpx.Client, fake: FakeRAG) -> None:
    assert read(http.get("/adapters"), list[Adapter]) == [ADAPTER]
    assert read(http.get("/adapters/abab"), Adapter) == ADAPTER
    assert fake.calls[-2:] == [("adapters",), ("adapter", "abab")]
    fake.errors["nobody"] = errors.NotFound("there is no adapter 'nobody'", field="id")
    assert http.get("/adapters/nobody").status_code == 404


def test_the_router_is_shown(http: httpx.Client, fake: FakeRAG) -> None:
    assert read(http.get("/router"), RouterStatus) == ROUTER
    assert fake.calls[-1] == ("router",)


def test_rules_are_replayed_those_of_the_library_unless_they_are_named(http: httpx.Client, fake: FakeRAG) -> None:
    for sent, rules in (({}, ("polar", "lru")), ({"rules": ["lfu"]}, ("lfu",)), ({"rules": []}, ())):
        assert read(http.post("/router/replay", json=sent), Comparison) == COMPARISON
        assert fake.calls[-1] == ("replay_router", *rules)
    fake.errors["best"] = errors.InputError("there is no rule 'best'", field="rules")
    response = http.post("/router/replay", json={"rules": ["lru", "best"]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "rules")


def test_no_more_rules_are_replayed_at_once_than_anybody_needs(http: httpx.Client, fake: FakeRAG) -> None:
    """Each takes time in the number of all questions so far."""
    before = list(fake.calls)
    response = http.post("/router/replay", json={"rules": ["lru"] * 17})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "rules")
    assert fake.calls == before


# --- changing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        ({}, []),
        ({"pinned": True}, [("pin_adapter", ADAPTER.id, True)]),
        ({"pinned": False}, [("pin_adapter", ADAPTER.id, False)]),
        ({"enabled": True}, [("enable_adapter", ADAPTER.id)]),
        (
            {"enabled": False, "pinned": True},
            [("disable_adapter", ADAPTER.id), ("pin_adapter", ADAPTER.id, True)],
        ),
    ],
)
def test_only_what_is_named_of_an_adapter_is_changed(
    change: dict[str, bool], calls: list[Any], http: httpx.Client, fake: FakeRAG
) -> None:
    fake.calls.clear()
    adapter = read(http.post("/adapters/ab", json=change), Adapter)
    assert fake.calls == [("adapter", "ab"), *calls]
    assert adapter.pinned == change.get("pinned", False)


def test_an_adapter_is_deleted(http: httpx.Client, fake: FakeRAG) -> None:
    assert read(http.delete("/adapters/ab"), Adapter) == ADAPTER
    assert fake.calls[-1] == ("delete_adapter", "ab")


def test_adapters_leave_and_come_by_paths_below_a_root(http: httpx.Client, fake: FakeRAG) -> None:
    path = str(fake.folder / "bundle.zip")
    assert read(http.post("/adapters/ab/export", json={"path": path}), Adapter) == ADAPTER
    assert read(http.post("/adapters", json={"path": path}), Adapter) == ADAPTER
    assert fake.calls[-2:] == [("export_adapter", "ab", path), ("import_adapter", path)]


@pytest.mark.parametrize("route", ["/adapters", "/adapters/ab/export"])
def test_other_paths_are_refused(route: str, http: httpx.Client, fake: FakeRAG, tmp_path: Path) -> None:
    (fake.folder / f"away{len(route)}").symlink_to(tmp_path)
    outside = (tmp_path / "bundle.zip", fake.folder / f"away{len(route)}" / "bundle.zip", "bundle.zip", "/a\0b")
    before = list(fake.calls)
    for path in outside:
        response = http.post(route, json={"path": str(path)})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "path")
        assert "server.roots" in response.json()["error"]["remedy"]
    assert fake.calls == before


# --- learning --------------------------------------------------------------------------------------------------------


def test_learning_tells_its_steps_and_reports(http: httpx.Client, fake: FakeRAG) -> None:
    [(first, step), (last, report)] = parsed(http.post("/learn", json={"least": 2, "until": 5e9}).text)
    assert (first, msgspec.convert(step, LearningStatus)) == ("progress", LEARNING)
    assert (last, msgspec.convert(report, list[Lesson])) == ("report", [LESSON])
    assert fake.calls[-1] == ("learn", 2.0, 5e9)


def test_how_many_questions_are_worth_it_is_the_servers_setting_unless_it_is_said(
    http: httpx.Client, fake: FakeRAG
) -> None:
    for sent, least in (({}, fake.settings.learning.least_questions), ({"least": 0}, 0.0)):
        http.post("/learn", json=sent)
        assert fake.calls[-1] == ("learn", least, None)


def test_what_cannot_be_learned_has_a_status_of_its_own(
    http: httpx.Client, fake: FakeRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fake.errors, "learn", errors.ConfigError("no adapters are used", field="router.mode"))
    response = http.post("/learn")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "router.mode")


def test_who_goes_away_ends_the_learning(tmp_path: Path) -> None:
    ended = threading.Event()

    class Endless(FakeRAG):
        def learn(self, *, progress: Callable[[LearningStatus], None] | None, **options: Any) -> list[Lesson]:
            assert progress
            try:
                while True:
                    progress(LEARNING)
                    ended.wait(0.001)
            finally:
                ended.set()

    with served(Endless(tmp_path), tmp_path / "e.sock"), caller(tmp_path / "e.sock") as http:
        with http.stream("POST", "/learn") as response:
            next(response.iter_bytes())
        assert ended.wait(60)


def test_a_piece_of_idle_work_is_reported(http: httpx.Client, fake: FakeRAG) -> None:
    assert parsed(http.post("/idle").text) == [("report", {"done": "learned"})]
    assert fake.calls[-1] == ("idle_once",)


# --- who may ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def over_tcp(folder: Path) -> Iterator[tuple[FakeRAG, httpx.Client]]:
    """A library, and somebody with the key who is not known to be the server's own user."""
    key = folder / "key"
    key.touch(0o600)
    key.write_text(KEY)
    rag, listening = FakeRAG(folder, server__key_file=str(key), server__roots=(str(folder),)), bind_tcp("127.0.0.1:0")
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    with (
        served(rag, folder / "e.sock", listening),
        httpx.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http,
    ):
        yield rag, http


def test_others_may_look_and_change_nothing(tmp_path: Path) -> None:
    with over_tcp(tmp_path) as (rag, http):
        for path in ("/clusters", "/clusters/3", "/adapters", "/adapters/ab", "/router"):
            assert http.get(path).status_code == 200
        assert http.post("/router/replay", json={}).status_code == 200
        rag.calls.clear()
        place = {"path": str(tmp_path / "bundle.zip")}
        for method, path, body in (
            ("POST", "/adapters/ab", {"pinned": True}),
            ("DELETE", "/adapters/ab", None),
            ("POST", "/adapters/ab/export", place),
            ("POST", "/adapters", place),
            ("POST", "/learn", {}),
            ("POST", "/idle", {}),
        ):
            response = http.request(method, path, json=body)
            assert (response.status_code, response.json()["error"]["code"]) == (403, "forbidden")
        assert rag.calls == []


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_adapters_and_learning_are_counted(tmp_path: Path) -> None:
    told = numbers(Metrics(FakeRAG(tmp_path).status).text().decode())
    names = {name.removeprefix("edge_rag_"): value for (name, *_), value in told.items()}
    assert {name: names[name] for name in names if name.startswith(("adapter", "cluster", "learning"))} == {
        "adapters_ready": 4,
        "adapters_resident": 1,
        "adapter_bytes": 5000,
        "adapter_page_ins_total": 6,
        "adapter_page_in_seconds_total": 0.5,
        "adapter_answers_total": 7,
        "adapter_remembered_total": 11,
        "adapter_fallbacks_total": 1,
        "clusters": 2,
        "learning_questions": 30,
        "learning_answered": 25,
    }


def test_routing_is_counted_by_arm(tmp_path: Path) -> None:
    told = numbers(Metrics(FakeRAG(tmp_path).status).text().decode())
    routing = {key: value for key, value in told.items() if key[0].startswith("edge_rag_router")}
    assert {(name.removeprefix("edge_rag_router_"), *arm): value for (name, *arm), value in routing.items()} == {
        ("decisions",): 9,
        ("hits",): 8,
        ("explored",): 2,
        ("epochs_total",): 1,
        ("wanted",): 1,
        ("arm_chosen", "passages"): 5,
        ("arm_chosen", ADAPTER.id): 4,
        ("arm_rewards", "passages"): 3,
        ("arm_rewards", ADAPTER.id): 0,
        ("arm_reward_mean", "passages"): 0.75,
        ("arm_width", "passages"): 0.25,
        ("arm_width", ADAPTER.id): 0.5,
    }


def test_where_no_router_is_loaded_nothing_is_counted_of_it(tmp_path: Path) -> None:
    status = replace(FakeRAG(tmp_path).status(), router=None)
    assert "router" not in Metrics(lambda: status).text().decode()
