"""The native routes: what they take, what they pass on, what they answer."""

from pathlib import Path

import httpx
import msgspec
import pytest
from msgspec.structs import replace

from edge_rag import errors
from edge_rag.records import AddReport, Answer, Document, FileReport, Filter, Passage, Turn
from edge_rag.runtime.status import Status
from tests.server.fakes import ENGINE, PASSAGE, FakeRAG, answer, document
from tests.server.harness import parsed


def test_a_question_is_passed_on_with_all_its_options(http: httpx.Client, fake: FakeRAG) -> None:
    body = {
        "question": "how long?",
        "history": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "where": {"folder": "/notes", "kinds": ["md"], "documents": ["/notes/a.md"]},
        "top_k": 3,
        "instructions": "be brief",
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 7,
        "stop": ["\n", "."],
        "private": True,
    }
    response = http.post("/ask", json=body)
    assert msgspec.json.decode(response.content, type=Answer) == answer("how long?")
    assert fake.calls[-1] == (
        "stream",
        "how long?",
        {
            "history": (Turn("user", "a"), Turn("assistant", "b")),
            "where": Filter(folder="/notes", kinds=("md",), documents=("/notes/a.md",)),
            "top_k": 3,
            "instructions": "be brief",
            "max_tokens": 5,
            "temperature": 0.5,
            "top_p": 0.9,
            "min_p": 0.1,
            "seed": 7,
            "stop": ("\n", "."),
            "private": True,
            "timeout": fake.settings.server.timeout,
        },
    )


def test_what_is_left_out_is_left_to_the_settings(http: httpx.Client, fake: FakeRAG) -> None:
    http.post("/ask", json={"question": "how long?", "stop": "."})
    options = fake.calls[-1][2]
    assert options.pop("timeout") == 600.0
    assert options.pop("stop") == "."
    assert options.pop("history") == ()
    assert options.pop("private") is False
    assert set(options.values()) == {None}


def test_search_gives_passages(http: httpx.Client, fake: FakeRAG) -> None:
    response = http.post("/search", json={"query": "membrane", "top_k": 2, "where": {"kinds": ["pdf"]}})
    assert msgspec.json.decode(response.content, type=list[Passage]) == [PASSAGE]
    assert fake.calls[-1] == ("search", "membrane", 2, Filter(kinds=("pdf",)))
    http.post("/search", json={"query": "membrane"})
    assert fake.calls[-1] == ("search", "membrane", None, None)


def test_documents_are_listed_and_filtered(http: httpx.Client, fake: FakeRAG) -> None:
    response = http.get("/documents")
    assert msgspec.json.decode(response.content, type=list[Document]) == fake.stored
    http.get("/documents?folder=/notes&kind=md&kind=pdf&document=/notes/a.md")
    assert fake.calls[-1] == (
        "documents",
        Filter(folder="/notes", kinds=("md", "pdf"), documents=("/notes/a.md",)),
    )


def test_documents_are_removed(http: httpx.Client, fake: FakeRAG) -> None:
    fake.stored.append(document("/notes/old.md", 9))
    response = http.request("DELETE", "/documents", json={"paths": ["/notes/old.md"]})
    assert msgspec.json.decode(response.content, type=list[Document]) == [document("/notes/old.md", 9)]
    again = http.request("DELETE", "/documents", json={"paths": ["/notes/old.md"]})
    assert (again.status_code, again.json()["error"]["param"]) == (404, "/notes/old.md")


@pytest.mark.parametrize("paths", [[], ["notes/old.md"], [""], ["a" * 4097], ["/a\0b"], ["~nobody-of-this-name/a"]])
@pytest.mark.parametrize("verb", ["DELETE", "POST"])
def test_paths_must_be_paths(verb: str, paths: list[str], http: httpx.Client, fake: FakeRAG) -> None:
    before = list(fake.calls)
    response = http.request(verb, "/documents", json={"paths": paths})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("paths")
    assert fake.calls == before


def test_feedback_is_passed_on(http: httpx.Client, fake: FakeRAG) -> None:
    response = http.post("/feedback", json={"answer_id": "abc", "score": 1, "comment": "good"})
    assert (response.status_code, response.content) == (204, b"")
    assert fake.calls[-1] == ("feedback", "abc", 1.0, "good")
    fake.errors["who?"] = errors.NotFound("there is no answer with this id", field="who?")
    assert http.post("/feedback", json={"answer_id": "who?", "score": 0}).status_code == 404
    for score in (-0.1, 1.1, "1"):
        bad = http.post("/feedback", json={"answer_id": "abc", "score": score})
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "score")


def test_the_journal_has_a_limit(http: httpx.Client, fake: FakeRAG) -> None:
    assert http.get("/journal").json() == [{"id": "abc"}]
    assert fake.calls[-1] == ("journal", 20)
    http.get("/journal?limit=3")
    assert fake.calls[-1] == ("journal", 3)


def test_status_is_the_record(http: httpx.Client, fake: FakeRAG) -> None:
    assert msgspec.json.decode(http.get("/status").content, type=Status) == fake.status()


def test_warming_tells_its_steps_and_reports(http: httpx.Client, fake: FakeRAG) -> None:
    told = parsed(http.post("/warm", json={"paths": ["/notes"], "hot": 5}).text)
    assert told[0] == ("progress", {"done": 1, "total": 2, "current": "/notes/filters.md"})
    assert told[1][0] == "report"
    assert told[1][1]["computed"] == 1
    assert fake.calls[-1] == ("warm", "/notes", 5)
    http.post("/warm")
    assert fake.calls[-1] == ("warm", None)


def test_embedding_anew_tells_its_steps_and_reports(http: httpx.Client) -> None:
    told = parsed(http.post("/reembed").text)
    assert told == [("progress", {"done": 4, "total": 8}), ("report", {"chunks": 8})]


def test_adding_by_path_passes_on_its_options(http: httpx.Client, fake: FakeRAG) -> None:
    path = str(fake.folder / "notes")
    body = {"paths": [path], "include": ["*.md"], "exclude": ["old"], "prune": True}
    told = parsed(http.post("/documents", json=body).text)
    assert [kind for kind, _ in told] == ["progress", "report"]
    assert told[0][1] == {"done": 1, "total": 1, "current": path}
    assert told[1][1]["files"][0]["outcome"] == "added"
    assert fake.calls[-1] == ("add", path, {"include": ("*.md",), "exclude": ("old",), "prune": True})


def test_adding_may_warm_what_it_has_added(http: httpx.Client, fake: FakeRAG) -> None:
    path = str(fake.folder / "notes")
    told = parsed(http.post("/documents", json={"paths": [path], "warm": True}).text)
    assert [kind for kind, _ in told] == ["progress", "report", "progress", "warmed"]
    assert fake.calls[-1] == ("warm", path, None)


def test_nothing_is_warmed_when_nothing_was_added(
    http: httpx.Client, fake: FakeRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = AddReport((FileReport("/a", "failed", reason="torn"),), 0.1)
    monkeypatch.setattr(fake, "adding", lambda *paths, **options: failed)
    told = parsed(http.post("/documents", json={"paths": [str(fake.folder)], "warm": True}).text)
    assert [kind for kind, _ in told] == ["report"]


# --- roots -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that may not be added by path."""
    (tmp_path / "secret.md").write_text("secret")
    return tmp_path / "secret.md"


def refused(http: httpx.Client, fake: FakeRAG, *paths: Path | str, **options: object) -> str:
    """The message when a server refuses to add these."""
    before = list(fake.calls)
    response = http.post("/documents", json={"paths": [str(path) for path in paths]} | options)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "paths")
    assert fake.calls == before
    return str(response.json()["error"]["message"])


def test_what_is_not_below_a_root_is_refused(http: httpx.Client, fake: FakeRAG, outside: Path) -> None:
    assert "secret.md is not below" in refused(http, fake, outside)
    refused(http, fake, "/")
    refused(http, fake, fake.folder, outside)
    refused(http, fake, f"{fake.folder}/../{outside.parent.name}")
    refused(http, fake, f"{fake.folder}-and-more")


def test_links_do_not_lead_out_of_a_root(http: httpx.Client, fake: FakeRAG, outside: Path) -> None:
    folder = fake.folder / "linked"
    folder.mkdir()
    (folder / "link.md").symlink_to(outside)
    (folder / "away").symlink_to(outside.parent)
    refused(http, fake, folder / "link.md")
    refused(http, fake, folder / "away")
    refused(http, fake, folder / "away" / "secret.md")
    assert "link.md is not below" in refused(http, fake, folder)
    fine = http.post("/documents", json={"paths": [str(folder)], "exclude": ["link.md"]})
    assert fine.status_code == 200


def test_health_says_that_the_engine_has_failed_but_not_how(
    http: httpx.Client, fake: FakeRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "engine", replace(ENGINE, failure="the engine failed: secret"))
    response = http.get("/health")
    assert (response.status_code, response.json()["error"]["type"]) == (503, "unavailable_error")
    assert "the engine has failed" in response.text
    assert "secret" not in response.text
