"""The router's file: whole or as good as nothing, whatever stands in its place."""

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.errors import StorageError
from edge_rag.store.router_file import NAME, put, take

TAG = "1-16-" + "ab" * 32
CONTENT = bytes(range(256)) * 3 + b"\n{}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a whole file is."""
    put(tmp_path, CONTENT, TAG)
    return tmp_path / NAME


def is_removed(path: Path, tag: str = TAG) -> bool:
    """Whether what is there counts as nothing, and is gone then."""
    return take(path.parent, tag) is None and not os.path.lexists(path)


# --- what is kept ----------------------------------------------------------------------------------------------------


@given(content=st.binary(max_size=400), tag=st.text(st.characters(codec="utf-8"), max_size=40))
def test_what_was_put_is_taken_as_often_as_one_likes(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, tag: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    put(folder, content, tag)
    assert take(folder, tag) == content
    assert take(folder, tag) == content


def test_a_file_that_was_never_put_is_nothing(tmp_path: Path) -> None:
    assert take(tmp_path, TAG) is None
    assert take(tmp_path / "missing", TAG) is None
    assert list(tmp_path.iterdir()) == []


def test_what_is_put_again_replaces_what_was_there(path: Path) -> None:
    put(path.parent, b"new", "another tag")
    assert take(path.parent, "another tag") == b"new"


def test_millions_of_bytes_are_kept_as_well(path: Path) -> None:
    large = os.urandom(5_000_000)
    put(path.parent, large, TAG)
    assert take(path.parent, TAG) == large


def test_only_the_owner_can_read_it_and_nothing_else_is_left(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        put(tmp_path / "data", CONTENT, TAG)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "data" / NAME).stat().st_mode) == 0o600
    assert [found.name for found in (tmp_path / "data").rglob("*") if found.is_file()] == [NAME]
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700


# --- what cannot be used ---------------------------------------------------------------------------------------------


def test_what_was_learned_in_another_space_is_removed(path: Path) -> None:
    assert is_removed(path, "1-32-" + "ab" * 32)


def test_a_file_that_was_cut_anywhere_is_removed(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert is_removed(path), length


def test_a_file_that_has_grown_is_removed(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    assert is_removed(path)


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_no_flipped_byte_goes_unnoticed(path: Path, flip: int) -> None:
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
        assert is_removed(path), place


@pytest.mark.parametrize(
    "foreign",
    [
        b"",
        b"\n",
        b"{}\n",
        b"SQLite format 3\0",
        b'{"format":"edge_rag router 2","tag":"%s","bytes":0,"sha256":""}\n' % TAG.encode(),
        b'{"format":"edge_rag router 1","tag":"%s","bytes":-9,"sha256":""}\nmore' % TAG.encode(),
        b'{"format":"edge_rag router 1","tag":"%s","bytes":4,"sha256":""}\nmore' % TAG.encode(),
        b" " * 100_000,
    ],
)
def test_a_foreign_file_is_removed(path: Path, foreign: bytes) -> None:
    path.write_bytes(foreign)
    assert is_removed(path)


def test_a_file_that_promises_more_than_any_memory_holds_is_removed(path: Path) -> None:
    head = b'{"format":"edge_rag router 1","tag":"%s","bytes":%d,"sha256":""}\n' % (TAG.encode(), 2**62)
    path.write_bytes(head + CONTENT)
    assert is_removed(path)


def test_links_are_not_followed_but_removed(path: Path) -> None:
    target = path.rename(path.with_name("target"))
    path.symlink_to(target)
    assert is_removed(path)
    assert target.exists()
    path.symlink_to("nowhere")
    assert is_removed(path)


def test_a_pipe_or_a_socket_is_not_waited_for_but_removed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.unlink()
    os.mkfifo(path)
    assert is_removed(path)
    monkeypatch.chdir(path.parent)  # the name of a socket has to be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(NAME)
        assert is_removed(path)


def test_a_folder_in_its_place_is_nothing_and_an_error_only_to_who_writes(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.unlink()
    path.mkdir()
    assert take(path.parent, TAG) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    with pytest.raises(StorageError):
        put(path.parent, CONTENT, TAG)
    path.rmdir()
    put(path.parent, CONTENT, TAG)
    assert take(path.parent, TAG) == CONTENT


# --- what the disk does not give or take -----------------------------------------------------------------------------

# Permissions do not bind root, so this runs in a process that has given root up.
UNPRIVILEGED = """
import logging, os, sys
from pathlib import Path
from edge_rag.store.router_file import take

logging.basicConfig()
if os.geteuid() == 0:
    os.seteuid(65534)
print(take(Path(sys.argv[1]), sys.argv[2]))
"""


def test_a_file_that_may_not_be_read_is_nothing_now_and_stays() -> None:
    with tempfile.TemporaryDirectory() as name:  # which every user can be let into, unlike pytest's folders
        folder = Path(name)
        put(folder, CONTENT, TAG)
        (folder / NAME).chmod(0o000)
        folder.chmod(0o777)
        command = [sys.executable, "-c", UNPRIVILEGED, name, TAG]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
        assert done.stdout.strip() == "None"
        assert "cannot be read: [Errno 13]" in done.stderr
        (folder / NAME).chmod(0o600)
        assert take(folder, TAG) == CONTENT


FULL = """
import resource, sys
from pathlib import Path
from edge_rag.errors import StorageError
from edge_rag.store.router_file import put

_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
try:
    put(Path(sys.argv[1]), bytes(100_000), "tag")
except StorageError as error:
    print("refused:", error.message)
"""


def test_a_full_disk_is_a_clear_error_and_leaves_the_old_file(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(path.parent)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "refused: File too large"
    assert take(path.parent, TAG) == CONTENT
    assert [found for found in path.parent.rglob("*") if found.is_file()] == [path]


def test_it_is_durable_before_it_takes_its_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        status = os.fstat(descriptor)
        steps.append("sync of the folder" if stat.S_ISDIR(status.st_mode) else f"sync of {status.st_size} bytes")
        fsync(descriptor)

    def replaced(path: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    put(path.parent, CONTENT, TAG)
    assert steps == [f"sync of {path.stat().st_size} bytes", "rename", "sync of the folder"]


KILLED = """
import os, signal, sys
from pathlib import Path
from edge_rag.store import router_file

router_file.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
router_file.put(Path(sys.argv[1]), b"half", "tag")
"""


def test_what_a_killed_process_was_writing_is_swept_by_the_next_one(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(path.parent)])
    assert done.returncode == -signal.SIGKILL
    assert take(path.parent, TAG) == CONTENT
    assert len([found for found in path.parent.rglob("*") if found.is_file()]) == 2
    put(path.parent, b"new", TAG)
    assert [found for found in path.parent.rglob("*") if found.is_file()] == [path]
