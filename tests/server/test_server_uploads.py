"""Files that are sent: names are never paths, and only what the library took is kept."""

import contextlib
import hashlib
import io
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.errors import Busy, InputError, StorageError
from edge_rag.records import AddReport, FileReport
from edge_rag.server import uploads
from edge_rag.server.uploads import NAME_BYTES, Upload, Uploads, clean_name
from tests.server.fakes import FakeRAG, document
from tests.server.harness import caller, parsed, served


@pytest.fixture
def rag(tmp_path: Path) -> FakeRAG:
    """A library that takes every file but those that begin with 'bad'."""
    rag = FakeRAG(tmp_path / "data", server__max_body_mb=2)
    rag.folder.mkdir()

    def add(*paths: Path, progress: Callable[[Any], None]) -> AddReport:
        reports = []
        for path in paths:
            bad = path.read_bytes().startswith(b"bad")
            if not bad:
                sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
                rag.stored = [each for each in rag.stored if each.path != str(path)]
                rag.stored.append(document(str(path), 10 + len(rag.stored), sha256))
            reports.append(FileReport(str(path), "failed" if bad else "added"))
        return AddReport(tuple(reports), 0.1)

    rag.adding = add
    return rag


@pytest.fixture
def http(rag: FakeRAG, tmp_path: Path) -> Iterator[httpx.Client]:
    with served(rag, tmp_path / "a" / "e.sock"), caller(tmp_path / "a" / "e.sock") as client:
        yield client


def upload(http: httpx.Client, *files: tuple[str, bytes]) -> httpx.Response:
    return http.post("/documents", files=[("file", (name, content)) for name, content in files])


def kept(rag: FakeRAG) -> dict[str, bytes]:
    """The files in the folder of uploads."""
    folder = rag.folder / "uploads"
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def test_a_file_is_kept_and_added(http: httpx.Client, rag: FakeRAG) -> None:
    told = parsed(upload(http, ("notes.md", b"good")).text)
    path = rag.folder / "uploads" / "notes.md"
    assert told == [("report", {"files": [report(path, "added")], "seconds": 0.1})]
    assert kept(rag) == {"notes.md": b"good"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def report(path: Path, outcome: str) -> dict[str, Any]:
    return {"path": str(path), "outcome": outcome, "chunks": 0, "reason": "", "warnings": []}


def test_several_files_are_one_report(http: httpx.Client, rag: FakeRAG) -> None:
    [(kind, told)] = parsed(upload(http, ("a.md", b"good"), ("b.md", b"bad"), ("c.md", b"good")).text)
    assert kind == "report"
    assert [file["outcome"] for file in told["files"]] == ["added", "failed", "added"]
    assert set(kept(rag)) == {"a.md", "c.md"}


def test_a_large_file_goes_through_the_disk(http: httpx.Client, rag: FakeRAG) -> None:
    content = os.urandom(1_900_000)
    upload(http, ("large.md", content))
    assert kept(rag) == {"large.md": content}


def test_a_file_that_is_too_large_is_refused(http: httpx.Client, rag: FakeRAG) -> None:
    response = upload(http, ("large.md", b"a" * 2_000_001))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")
    assert kept(rag) == {}


def test_the_same_name_replaces_the_document(http: httpx.Client, rag: FakeRAG) -> None:
    upload(http, ("notes.md", b"good"))
    upload(http, ("notes.md", b"better"))
    assert kept(rag) == {"notes.md": b"better"}


def test_a_file_that_cannot_be_read_does_not_replace_the_document(http: httpx.Client, rag: FakeRAG) -> None:
    upload(http, ("notes.md", b"good"))
    upload(http, ("notes.md", b"bad"))
    assert kept(rag) == {"notes.md": b"good"}


def test_when_adding_breaks_off_the_former_file_is_back(http: httpx.Client, rag: FakeRAG) -> None:
    upload(http, ("notes.md", b"good"))

    def broken(*paths: Path, **options: Any) -> AddReport:
        raise InputError("no more")

    rag.adding = broken
    assert upload(http, ("notes.md", b"better"), ("new.md", b"good")).status_code == 400
    assert kept(rag) == {"notes.md": b"good"}


def test_a_removed_document_takes_its_file_along(http: httpx.Client, rag: FakeRAG) -> None:
    upload(http, ("notes.md", b"good"))
    http.request("DELETE", "/documents", json={"paths": [str(rag.folder / "uploads" / "notes.md")]})
    assert kept(rag) == {}


def sent(name: str, content: bytes) -> list[Upload]:
    return [Upload(name, io.BytesIO(content))]


class Slow:
    """Has a library add files when it is let; `begun` when it has been asked to."""

    def __init__(self, rag: FakeRAG) -> None:
        self.begun, self.let = threading.Event(), threading.Event()
        assert rag.adding
        self._then, rag.adding = rag.adding, self

    def __call__(self, *paths: Path, **options: Any) -> AddReport:
        self.begun.set()
        assert self.let.wait(60)
        return self._then(*paths, **options)


@contextlib.contextmanager
def adding(files: Uploads, rag: FakeRAG, name: str, content: bytes) -> Iterator[None]:
    """While inside, this file is being added; afterwards it has been."""
    then, slow = rag.adding, Slow(rag)
    thread = threading.Thread(target=files.add, args=(sent(name, content),))
    thread.start()
    assert slow.begun.wait(60)
    rag.adding = then
    try:
        yield
    finally:
        slow.let.set()
        thread.join()


def test_while_a_file_is_added_others_come_and_go(rag: FakeRAG) -> None:
    files = Uploads(rag)  # type: ignore[arg-type]
    files.add(sent("old.md", b"good"))
    with adding(files, rag, "slow.md", b"good"):
        files.add(sent("other.md", b"good"))
        files.discard(rag.remove(rag.folder / "uploads" / "old.md"))
        assert set(kept(rag)) == {"slow.md", "other.md"}
    assert set(kept(rag)) == {"slow.md", "other.md"}


def test_a_name_is_in_work_for_one_caller_at_a_time(rag: FakeRAG) -> None:
    files = Uploads(rag)  # type: ignore[arg-type]
    with adding(files, rag, "notes.md", b"good"):
        [second] = sent("notes.md", b"better")
        with pytest.raises(Busy) as caught:
            files.add([second])
        assert caught.value.field == "notes.md"
        assert second.content.closed
        assert kept(rag) == {"notes.md": b"good"}
    files.add(sent("notes.md", b"better"))
    assert kept(rag) == {"notes.md": b"better"}


def test_a_file_that_is_sent_again_while_its_document_is_removed_stays(rag: FakeRAG) -> None:
    files = Uploads(rag)  # type: ignore[arg-type]
    files.add(sent("notes.md", b"good"))
    gone = rag.remove(rag.folder / "uploads" / "notes.md")
    files.add(sent("notes.md", b"better"))
    files.discard(gone)
    assert kept(rag) == {"notes.md": b"better"}


@pytest.mark.parametrize(("content", "left"), [(b"better", {"notes.md": b"better"}), (b"bad", {})])
def test_a_document_removed_while_its_name_is_in_work_leaves_nothing_old(
    content: bytes, left: dict[str, bytes], rag: FakeRAG
) -> None:
    files = Uploads(rag)  # type: ignore[arg-type]
    files.add(sent("notes.md", b"good"))
    with adding(files, rag, "notes.md", content):
        files.discard(rag.remove(rag.folder / "uploads" / "notes.md"))
        assert content in kept(rag).values()
    assert kept(rag) == left


def test_when_the_library_is_closed_meanwhile_the_former_file_is_back(rag: FakeRAG) -> None:
    files = Uploads(rag)  # type: ignore[arg-type]
    files.add(sent("notes.md", b"good"))

    def closed(*paths: Any, **options: Any) -> Any:
        rag.documents = closed  # type: ignore[method-assign]
        raise StorageError("the library is closed")

    rag.adding = closed
    with pytest.raises(StorageError):
        files.add([*sent("notes.md", b"better"), *sent("new.md", b"good")])
    assert kept(rag) == {"notes.md": b"good"}


def test_a_file_that_somebody_takes_away_meanwhile_can_be_sent_again(rag: FakeRAG) -> None:
    files, then = Uploads(rag), rag.adding  # type: ignore[arg-type]

    def taking(*paths: Path, **options: Any) -> AddReport:
        paths[0].unlink()
        raise InputError("no more")

    rag.adding = taking
    with pytest.raises(InputError):
        files.add(sent("notes.md", b"good"))
    rag.adding = then
    files.add(sent("notes.md", b"good"))
    assert kept(rag) == {"notes.md": b"good"}


def test_what_a_killed_server_left_on_its_way_is_swept_away(rag: FakeRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = rag.folder / "uploads"
    folder.mkdir()
    for name in (".0123456789abcdef", ".0123456789abcde", "notes.md"):
        (folder / name).write_bytes(b"good")
    Uploads(rag)  # type: ignore[arg-type]
    assert len(kept(rag)) == 3  # another server may be at it just now
    monkeypatch.setattr(uploads, "LEFT_BEHIND", -1.0)
    Uploads(rag)  # type: ignore[arg-type]
    assert set(kept(rag)) == {".0123456789abcde", "notes.md"}


def test_files_that_were_not_sent_are_never_removed(http: httpx.Client, rag: FakeRAG, tmp_path: Path) -> None:
    (tmp_path / "own.md").write_text("mine")
    rag.stored.append(document(str(tmp_path / "own.md")))
    http.request("DELETE", "/documents", json={"paths": [str(tmp_path / "own.md")]})
    assert (tmp_path / "own.md").exists()


@pytest.mark.parametrize("name", ["../../outside.md", "/etc/outside.md", "a\\..\\outside.md", "..\\outside.md"])
def test_a_path_for_a_name_leads_nowhere(name: str, http: httpx.Client, rag: FakeRAG, tmp_path: Path) -> None:
    upload(http, (name, b"good"))
    assert kept(rag) == {"outside.md": b"good"}
    assert [path.name for path in tmp_path.rglob("outside.md")] == ["outside.md"]


@pytest.mark.parametrize(
    "files", [[("..", b"good")], [("/", b"good")], [(" . ", b"good")], [("a.md", b"good"), ("x/a.md", b"good")]]
)
def test_bad_names_are_refused(files: list[tuple[str, bytes]], http: httpx.Client, rag: FakeRAG) -> None:
    response = upload(http, *files)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "file")
    assert kept(rag) == {}


def test_a_form_without_a_file_is_refused(http: httpx.Client) -> None:
    response = http.post("/documents", files=[("other", ("a.md", b"good"))])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "file")


def test_a_torn_form_is_refused(http: httpx.Client) -> None:
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
        response = http.post("/documents", content=b"--y\r\n", headers={"Content-Type": kind})
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "input_error"


def test_a_full_disk_is_an_error_of_the_place(
    http: httpx.Client, rag: FakeRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*files: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    response = upload(http, ("a.md", b"good"))
    assert (response.status_code, response.json()["error"]["code"]) == (503, "storage_error")
    assert "No space left" in response.json()["error"]["message"]
    assert kept(rag) == {}


def test_without_room_for_files_that_come_the_place_is_named(
    http: httpx.Client, rag: FakeRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(rag.folder / "nowhere"))
    response = upload(http, ("large.md", b"a" * 1_500_000))
    assert (response.status_code, response.json()["error"]["code"]) == (503, "storage_error")
    assert response.json()["error"]["param"] == str(rag.folder / "nowhere")


def test_a_file_that_another_caller_removes_at_once_is_not_found(http: httpx.Client, rag: FakeRAG) -> None:
    rag.adding = lambda *paths, **options: AddReport(tuple(FileReport(str(path), "added") for path in paths), 0.1)
    response = http.post("/v1/files", files=[("file", ("notes.md", b"good"))])
    assert (response.status_code, response.json()["error"]["param"]) == (404, "notes.md")


@given(st.text(st.characters(codec=None), max_size=300))
def test_a_clean_name_is_a_name(text: str) -> None:
    try:
        name = clean_name(text)
    except InputError:
        return
    assert name == Path(name).name == clean_name(name)
    assert not name.startswith(".")
    assert name.isprintable()
    assert len(name.encode()) <= NAME_BYTES


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("notes.md", "notes.md"),
        ("Jürgens Brief (2).pdf", "Jürgens Brief (2).pdf"),
        (".hidden.md", "hidden.md"),
        ("a\x1b[31m\u202eb.md", "a[31mb.md"),
        ("u\u0308ber.md", "über.md"),
        ("a" * 300 + ".md", "a" * 197 + ".md"),
        ("a." + "b" * 300, "a." + "b" * 198),
        ("ü" * 300 + ".md", "ü" * 98 + ".md"),
    ],
)
def test_names_stay_what_people_wrote(given: str, name: str) -> None:
    assert clean_name(given) == name
