"""KV files: real files, real damage, real full disks. What cannot be used is a miss and never an error."""

import fcntl
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rag.errors import InputError, StorageError
from edge_rag.store import kv_files
from edge_rag.store.kv_files import KVFolder
from edge_rag.store.kv_format import PIECE, KVFields
from edge_rag.store.temporaries import locked_temporary
from tests.store.kv_samples import fields, key

NOISE = np.random.default_rng(0).integers(0, 256, 1_000_000, dtype=np.uint8).tobytes()
SECTIONS = {"codes": NOISE[:150], "scales": bytes(2000), "rest": NOISE[:3]}
ALIKE = {"library": "ours", "generation": "now"}


@pytest.fixture
def folder(tmp_path: Path) -> KVFolder:
    return KVFolder(tmp_path / "kv", **ALIKE)


def write(folder: KVFolder, number: int = 1) -> Path:
    folder.write(fields(number), SECTIONS)
    return folder.path(key(number))


def read(folder: KVFolder, number: int = 1) -> dict[str, bytes] | None:
    stored = folder.read(key(number))
    return stored and {name: bytes(content) for name, content in stored.sections.items()}


def is_removed_as_a_miss(folder: KVFolder, *, header: bool = True) -> bool:
    """Whether `read` misses the file and removes it; and `header` as well, if it is the header that is wrong."""
    content = folder.path(key(1)).read_bytes()
    assert dict(folder.scan())[key(1)] is None or not header
    if header:
        assert folder.header(key(1)) is None
        assert not folder.path(key(1)).exists()
        folder.path(key(1)).write_bytes(content)
    return folder.read(key(1)) is None and not folder.path(key(1)).exists()


# --- what is written is read -----------------------------------------------------------------------------------------


def test_what_was_written_is_read(folder: KVFolder) -> None:
    size = folder.write(fields(), SECTIONS)
    stored = folder.read(key(1))
    assert stored is not None
    assert {name: bytes(content) for name, content in stored.sections.items()} == SECTIONS
    assert size == folder.path(key(1)).stat().st_size == stored.header.size
    header = stored.header
    assert [getattr(header, name) for name in KVFields.__struct_fields__] == [
        getattr(fields(), name) for name in KVFields.__struct_fields__
    ]
    assert (header.library, header.generation) == ("ours", "now")
    assert folder.header(key(1)) == header
    assert list(folder.scan()) == [(key(1), header)]
    assert list(folder.sizes()) == [(key(1), size)]


def test_arrays_of_any_shape_and_type_are_sections_and_empty_ones_too(folder: KVFolder) -> None:
    arrays = {
        "half": np.arange(24, dtype=np.float16).reshape(2, 3, 4),
        "empty": np.zeros((0, 5), np.float32),
        "wide": np.arange(5),
    }
    folder.write(fields(), arrays)
    assert read(folder) == {name: array.tobytes() for name, array in arrays.items()}


@settings(max_examples=60)
@given(sections=st.dictionaries(st.text(max_size=9), st.binary(max_size=300) | st.just(bytes(5000)), min_size=1))
def test_any_sections_survive(tmp_path_factory: pytest.TempPathFactory, sections: dict[str, bytes]) -> None:
    folder = KVFolder(tmp_path_factory.getbasetemp() / "any", **ALIKE)
    folder.write(fields(), sections)
    assert read(folder) == sections


def test_a_header_of_many_sections_is_read_as_well(folder: KVFolder) -> None:
    sections = {f"section {number}": NOISE[number : number + 70] for number in range(200)}
    folder.write(fields(), sections)
    assert read(folder) == sections
    header = folder.header(key(1))
    assert header is not None
    assert header.start > kv_files.HEAD


def test_sections_are_aligned_read_only_views_of_one_buffer(folder: KVFolder) -> None:
    folder.write(fields(), {"one": NOISE[:100], "two": NOISE[:100], "zeros": bytes(1000)})
    stored = folder.read(key(1))
    assert stored is not None
    assert [section.offset % 64 for section in stored.header.sections] == [0, 0, 0]
    assert all(content.readonly for content in stored.sections.values())
    one, two = (np.frombuffer(stored.sections[name], np.uint8) for name in ("one", "two"))
    assert two.ctypes.data - one.ctypes.data == 128


def test_a_file_written_again_replaces_the_first_and_leaves_what_was_read_alone(folder: KVFolder) -> None:
    folder.write(fields(), {"a": b"first"})
    before = folder.read(key(1))
    folder.write(fields(space="other"), {"a": b"second"})
    after = folder.read(key(1))
    assert before is not None
    assert after is not None
    assert (bytes(before.sections["a"]), bytes(after.sections["a"])) == (b"first", b"second")
    assert after.header.space == "other"


def test_a_file_that_was_never_written_is_a_miss(folder: KVFolder) -> None:
    assert folder.read(key(1)) is None
    assert folder.header(key(1)) is None
    assert list(folder.scan()) == []
    folder.remove(key(1))
    folder.sweep_temps()
    assert not folder.folder.exists()


def test_removing_is_idempotent(folder: KVFolder) -> None:
    path = write(folder)
    folder.remove(key(1))
    folder.remove(key(1))
    assert not path.exists()


def test_a_file_that_is_removed_while_it_is_read_is_read_to_its_end(folder: KVFolder) -> None:
    path = write(folder)
    with kv_files._opened(path) as descriptor:
        folder.remove(key(1))
        stored = folder._read_all(key(1), descriptor)
    assert bytes(stored.sections["codes"]) == SECTIONS["codes"]


@pytest.mark.parametrize("bad", ["", "ab", "../" + "a" * 61, "A" * 64, "g" * 64, "a" * 65, "a" * 64 + "\n"])
def test_what_is_no_key_never_becomes_a_path(folder: KVFolder, bad: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: folder.write(fields(key=bad), SECTIONS),
        lambda: folder.read(bad),
        lambda: folder.header(bad),
        lambda: folder.remove(bad),
    ]
    for call in calls:
        with pytest.raises(InputError):
            call()
    assert not folder.folder.exists()


def test_only_the_owner_can_read_files_and_folders(folder: KVFolder) -> None:
    before = os.umask(0)
    try:
        path = write(folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for place in (folder.folder, path.parent, folder.folder / "tmp"):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700


# --- compression -----------------------------------------------------------------------------------------------------


def compressions(folder: KVFolder, content: bytes) -> tuple[str, bool]:
    """How a section is stored, and whether it is read as it was written."""
    folder.write(fields(), {"section": content})
    header = folder.header(key(1))
    assert header is not None
    return header.sections[0].compression, read(folder) == {"section": content}


def test_sections_are_compressed_only_where_it_pays(folder: KVFolder) -> None:
    assert compressions(folder, NOISE[:50_000]) == ("none", True)
    assert compressions(folder, NOISE[:48_000] + bytes(2_000)) == ("none", True)  # saves 4 %
    assert compressions(folder, NOISE[:40_000] + bytes(10_000)) == ("zstd", True)
    assert compressions(folder, NOISE) == ("none", True)
    assert compressions(folder, bytes(1_000_000)) == ("zstd", True)
    assert folder.path(key(1)).stat().st_size < 2000


def test_a_large_section_whose_samples_deceive_is_stored_as_it_is(folder: KVFolder) -> None:
    content = bytearray(NOISE)
    for place in range(4):
        start = place * (len(content) - PIECE) // 3
        content[start : start + PIECE // 2] = bytes(PIECE // 2)
    assert compressions(folder, bytes(content)) == ("none", True)


def test_a_large_section_whose_samples_promise_nothing_is_not_compressed(folder: KVFolder) -> None:
    content = bytearray(1_000_000)
    for place in range(4):
        start = place * (len(content) - PIECE) // 3
        content[start : start + PIECE] = NOISE[start : start + PIECE]
    assert compressions(folder, bytes(content)) == ("none", True)


# --- the format, as docs/format.md has it ----------------------------------------------------------------------------


def by_hand(text: bytes, body: bytes, *, magic: bytes = b"EDGERAGK", version: int = 1) -> bytes:
    """A file made with nothing but the description of the format."""
    preamble = magic + version.to_bytes(4, "little") + len(text).to_bytes(4, "little")
    head = preamble + xxhash.xxh3_64(text).intdigest().to_bytes(8, "little") + text
    return head + bytes(-len(head) % 64) + body


def entry(name: str, offset: int, stored: bytes, **changes: object) -> dict[str, object]:
    checksum = xxhash.xxh3_64(stored).hexdigest()
    size = len(stored)
    made = {"name": name, "offset": offset, "stored": size, "size": size, "compression": "none", "xxh3": checksum}
    return made | changes


def header_text(sections: list[dict[str, object]], **changes: object) -> bytes:
    values = {name: getattr(fields(), name) for name in KVFields.__struct_fields__}
    return json.dumps(values | ALIKE | {"sections": sections} | changes).encode()


def place_by_hand(folder: KVFolder, content: bytes) -> None:
    path = folder.path(key(1))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


FRAME = zstandard.ZstdCompressor().compress(b"zero" * 50)
START = 640  # the texts below are made to end between 576 and 640


def sample_text(*others: dict[str, object], **changes: object) -> bytes:
    return header_text([entry("plain", START, b"some bytes"), *others], **changes).ljust(START - 24 - 10)


def test_a_file_that_was_made_by_hand_is_read_and_unknown_fields_are_passed_over(folder: KVFolder) -> None:
    text = sample_text(entry("packed", START + 64, FRAME, size=200, compression="zstd"), future="field")
    place_by_hand(folder, by_hand(text, b"some bytes" + bytes(54) + FRAME))
    assert read(folder) == {"plain": b"some bytes", "packed": b"zero" * 50}


def test_a_file_of_ours_can_be_read_by_hand(folder: KVFolder) -> None:
    content = write(folder).read_bytes()
    assert content[:8] == b"EDGERAGK"
    version, length = (int.from_bytes(content[start : start + 4], "little") for start in (8, 12))
    text = content[24 : 24 + length]
    assert version == 1
    assert int.from_bytes(content[16:24], "little") == xxhash.xxh3_64(text).intdigest()
    header = json.loads(text)
    for section in header["sections"]:
        stored = content[section["offset"] : section["offset"] + section["stored"]]
        assert xxhash.xxh3_64(stored).hexdigest() == section["xxh3"]
        plain = zstandard.decompress(stored) if section["compression"] == "zstd" else stored
        assert plain == SECTIONS[section["name"]]
        assert len(plain) == section["size"]
    assert [section["compression"] for section in header["sections"]] == ["none", "zstd", "none"]
    assert section["offset"] + section["stored"] == len(content)
    assert {"key": header["key"], "codec": header["codec"]} == {"key": key(1), "codec": "q8"}


BODY = b"some bytes"
WRONG_HEADERS: dict[str, bytes] = {
    "not JSON": b"{".ljust(606),
    "not UTF-8": sample_text().replace(b"model", b"\xff\xfe\xfd\xfc\xfb"),
    "no sections": header_text([]).ljust(606),
    "a field is missing": sample_text().replace(b'"codec"', b'"kodec"'),
    "a number is a text": sample_text(tokens="3"),
    "a negative number": sample_text(layers=-1),
    "an unknown compression": header_text([entry("plain", START, BODY, compression="rar")]).ljust(606),
    "a section that is not aligned": header_text([entry("plain", START + 1, BODY[1:])]).ljust(606),
    "a section inside the header": header_text([entry("plain", 64, bytes(586))]).ljust(606),
    "a section of another size": header_text([entry("plain", START, BODY, size=11)]).ljust(606),
    "sections that overlap": sample_text(entry("other", START, BODY)),
    "sections that leave a gap": header_text([entry("plain", START, b""), entry("gap", START + 64, b"")]).ljust(606),
    "two sections of one name": header_text([entry("plain", START, b""), entry("plain", START, BODY)]).ljust(606),
    "another key": sample_text(key=key(2)),
    "another library": sample_text(library="theirs"),
    "another generation": sample_text(generation="then"),
}


@pytest.mark.parametrize("what", WRONG_HEADERS)
def test_a_header_that_is_wrong_is_a_miss_although_its_checksum_is_right(folder: KVFolder, what: str) -> None:
    assert len(WRONG_HEADERS[what]) == 606
    place_by_hand(folder, by_hand(WRONG_HEADERS[what], BODY))
    assert is_removed_as_a_miss(folder)


def test_the_headers_above_are_refused_for_nothing_else(folder: KVFolder) -> None:
    place_by_hand(folder, by_hand(sample_text(), BODY))
    assert read(folder) == {"plain": BODY}


@pytest.mark.parametrize("change", [{"magic": b"EDGERAGX"}, {"version": 0}, {"version": 2}])
def test_another_version_or_kind_of_file_is_a_miss(folder: KVFolder, change: dict[str, Any]) -> None:
    place_by_hand(folder, by_hand(sample_text(), BODY, **change))
    assert is_removed_as_a_miss(folder)


@pytest.mark.parametrize(
    ("frame", "size"), [(FRAME, 199), (FRAME[:-1], 200), (b"no zstd frame", 200), (b"", 0)], ids=str
)
def test_a_section_that_does_not_decompress_to_its_size_is_a_miss(folder: KVFolder, frame: bytes, size: int) -> None:
    text = header_text([entry("packed", START, frame, size=size, compression="zstd")]).ljust(606)
    place_by_hand(folder, by_hand(text, frame))
    assert is_removed_as_a_miss(folder, header=False)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_no_flipped_byte_goes_unnoticed(folder: KVFolder, flip: int) -> None:
    path = write(folder)
    content = path.read_bytes()
    header = folder.header(key(1))
    assert header is not None
    meant = set(range(24 + int.from_bytes(content[12:16], "little")))
    for section in header.sections:
        meant |= set(range(section.offset, section.offset + section.stored))
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
        found = read(folder)
        assert found == (None if place in meant else SECTIONS), place
        assert path.exists() == (place not in meant)
    assert 0 < len(content) - len(meant) < 64 * 4


def test_a_file_that_was_cut_anywhere_is_a_miss(folder: KVFolder) -> None:
    path = write(folder)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert is_removed_as_a_miss(folder), length


def test_a_file_that_has_grown_is_a_miss(folder: KVFolder) -> None:
    path = write(folder)
    path.write_bytes(path.read_bytes() + b"\0")
    assert is_removed_as_a_miss(folder)


def test_a_hole_in_a_section_is_a_miss_but_the_header_does_not_see_it(folder: KVFolder) -> None:
    path = write(folder)
    header = folder.header(key(1))
    assert header is not None
    content = path.read_bytes()
    path.write_bytes(content[: header.start] + bytes(len(content) - header.start))
    assert folder.header(key(1)) == header
    assert list(folder.scan()) == [(key(1), header)]
    assert is_removed_as_a_miss(folder, header=False)


def test_a_file_that_shrinks_between_its_header_and_its_sections_is_torn(folder: KVFolder) -> None:
    path = write(folder)
    with kv_files._opened(path) as descriptor, pytest.raises(kv_files.NotOurs, match="torn"):
        kv_files._read_exactly(descriptor, 0, path.stat().st_size + 1)


def test_files_that_were_renamed_onto_one_another_are_misses(folder: KVFolder) -> None:
    first, second = write(folder, 1), write(folder, 2)
    first.rename(first.with_name("aside"))
    second.rename(first)
    first.with_name("aside").rename(second)
    assert read(folder, 1) is None
    assert read(folder, 2) is None
    assert list(folder.scan()) == []


@pytest.mark.parametrize("change", [{"library": "theirs"}, {"generation": "then"}])
def test_a_file_of_another_library_or_generation_is_removed(folder: KVFolder, change: dict[str, str]) -> None:
    write(KVFolder(folder.folder, **ALIKE | change))
    assert is_removed_as_a_miss(folder)


def test_a_file_of_another_space_is_read(folder: KVFolder) -> None:
    folder.write(fields(space="another model"), SECTIONS)
    assert read(folder) == SECTIONS


# --- what is no file -------------------------------------------------------------------------------------------------


def test_links_are_not_followed(folder: KVFolder, tmp_path: Path) -> None:
    path = write(folder)
    target = path.rename(tmp_path / "target")
    path.symlink_to(target)
    assert list(folder.sizes()) == [(key(1), -1)]
    assert is_removed_as_a_miss_in_place(folder)
    assert target.exists()


def is_removed_as_a_miss_in_place(folder: KVFolder) -> bool:
    assert list(folder.scan()) == [(key(1), None)]
    return folder.read(key(1)) is None and not os.path.lexists(folder.path(key(1)))


def test_a_link_that_leads_nowhere_is_removed(folder: KVFolder) -> None:
    path = write(folder)
    path.unlink()
    path.symlink_to("nowhere")
    assert is_removed_as_a_miss_in_place(folder)


def test_a_pipe_is_not_waited_for(folder: KVFolder) -> None:
    path = write(folder)
    path.unlink()
    os.mkfifo(path)
    assert is_removed_as_a_miss_in_place(folder)


def test_a_socket_is_removed(folder: KVFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder)
    path.unlink()
    monkeypatch.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
        assert is_removed_as_a_miss_in_place(folder)


def test_a_folder_in_place_of_a_file_is_a_miss_and_an_error_only_to_who_writes(folder: KVFolder) -> None:
    path = write(folder)
    path.unlink()
    path.mkdir()
    (path / "treasure").touch()
    assert list(folder.scan()) == [(key(1), None)]
    assert folder.read(key(1)) is None
    for call in (lambda: folder.remove(key(1)), lambda: folder.write(fields(), SECTIONS)):
        with pytest.raises(StorageError) as raised:
            call()
        assert raised.value.field == str(path)
    assert (path / "treasure").exists()
    assert list((folder.folder / "tmp").iterdir()) == []


def test_names_that_are_not_ours_are_left_alone(folder: KVFolder, tmp_path: Path) -> None:
    path = write(folder)
    strangers = [
        path.with_name("notes.txt"),
        path.with_name("00notes.kv"),
        path.with_name("f" * 64 + ".kv"),  # in the wrong place
        folder.folder / path.name,
        path.with_name(key(1)),
    ]
    for stranger in strangers:
        stranger.write_bytes(b"theirs")
    (folder.folder / "ab").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ("f" * 64 + ".kv")).touch()
    (folder.folder / "ff").symlink_to(elsewhere)
    folder.sweep_temps()
    assert [found for found, _ in folder.scan()] == [found for found, _ in folder.sizes()] == [key(1)]
    assert all(stranger.exists() for stranger in strangers)


def test_a_file_that_goes_while_files_are_listed_is_passed_over(folder: KVFolder) -> None:
    for number in (1, 2, 3):
        write(folder, number)
    found = folder.sizes()
    assert next(found)[0] == key(1)
    folder.remove(key(2))
    assert [left for left, _ in found] == [key(3)]


def test_what_the_disk_does_not_give_is_a_miss_and_stays(folder: KVFolder, caplog: pytest.LogCaptureFixture) -> None:
    path = write(folder)
    path.parent.rename(folder.folder / "aside")
    path.parent.symlink_to(path.parent)  # a loop: whatever is below cannot be reached
    assert folder.read(key(1)) is None
    assert folder.header(key(1)) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    path.parent.unlink()
    (folder.folder / "aside").rename(path.parent)
    assert read(folder) == SECTIONS


# Permissions do not bind root, so this runs in a process that has given root up.
UNPRIVILEGED = """
import logging, os, sys
from pathlib import Path
from edge_rag.errors import StorageError
from edge_rag.store.kv_files import KVFolder

logging.basicConfig()
folder = KVFolder(Path(sys.argv[1]), library="ours", generation="now")
key = sys.argv[2]
if os.geteuid() == 0:
    os.seteuid(65534)
print(folder.read(key), folder.header(key), list(folder.scan()), [size > 0 for _, size in folder.sizes()])
try:
    folder.remove(key)
except StorageError as error:
    print("refused:", error)
"""


def test_a_file_that_may_not_be_read_is_a_miss_and_stays() -> None:
    with tempfile.TemporaryDirectory() as name:  # which every user can be let into, unlike pytest's folders
        folder = KVFolder(Path(name) / "kv", **ALIKE)
        path = write(folder)
        path.chmod(0o000)
        for place in (Path(name), folder.folder, path.parent):
            place.chmod(0o555)
        command = [sys.executable, "-c", UNPRIVILEGED, str(folder.folder), key(1)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
        found, refused = done.stdout.splitlines()
        assert found == "None None [] [True]"
        assert refused.startswith("refused: ")
        assert done.stderr.count("cannot be read: [Errno 13]") == 3
        for place in (Path(name), folder.folder, path.parent, path):
            place.chmod(0o700)
        assert read(folder) == SECTIONS


# --- writing that fails or dies --------------------------------------------------------------------------------------

# Argument 1: the folder; 2: what stops the writing. Prints the file that stood there before, and the error.
FULL = """
import ctypes, os, resource, sys
from pathlib import Path
from edge_rag.errors import StorageError
from edge_rag.store.kv_files import KVFolder
from edge_rag.store.kv_format import KVFields

place = Path(sys.argv[1])
if sys.argv[2] == "disk":
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x20000) or libc.mount(b"none", b"/", None, 0x44000, None):  # mounts of our own
        sys.exit("no right to mount")
    if libc.mount(b"none", str(place).encode(), b"tmpfs", 0, b"size=256k"):
        sys.exit("no right to mount")
else:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128 * 1024, hard))
folder = KVFolder(place / "kv", library="ours", generation="now")
key = "0" * 64
fields = KVFields(
    key=key, chunk_id=0, space="", tokens=1, layers=1, k_width=1, v_width=1, codec="", seconds=0.0
)
folder.write(fields, {"small": b"before"})
for size in (300_000, 150_000 if sys.argv[2] == "limit" else 260_000):
    try:
        folder.write(fields, {"large": os.urandom(size)})
    except StorageError as error:
        print("refused:", error.message, "-", error.remedy)
print(bytes(folder.read(key).sections["small"]).decode())
print(sorted(path.name for path in place.rglob("*") if path.is_file()) == [key + ".kv"])
"""


@pytest.mark.parametrize("what", ["limit", "disk"])
def test_a_full_disk_is_a_clear_error_and_leaves_the_old_file(tmp_path: Path, what: str) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path), what], capture_output=True, text=True)
    if done.stderr.strip() == "no right to mount":
        pytest.skip("only an administrator can mount a small disk")
    first, second, *rest = done.stdout.splitlines()
    for line in (first, second):
        assert line.startswith("refused: " + {"limit": "File too large", "disk": "No space left"}[what])
        assert what == "limit" or line.endswith("- free some disk space")
    assert rest == ["before", "True"], done.stderr


def test_a_folder_that_cannot_be_used_is_a_clear_error_but_a_miss_to_who_reads(
    folder: KVFolder, tmp_path: Path
) -> None:
    (tmp_path / "kv").touch()
    calls: list[Callable[[], object]] = [
        lambda: write(folder),
        lambda: list(folder.sizes()),
        lambda: list(folder.scan()),
        folder.sweep_temps,
    ]
    for call in calls:
        with pytest.raises(StorageError):
            call()
    assert folder.read(key(1)) is None


def test_a_file_is_durable_before_it_takes_its_place(folder: KVFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, 2)
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
    size = folder.write(fields(), SECTIONS)
    assert steps == [f"sync of {size} bytes", "rename", "sync of the folder"]


KILLED = """
import os, signal, sys
from pathlib import Path
from edge_rag.store import kv_files
from edge_rag.store.kv_format import KVFields

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

kv_files.os.fsync = die
folder = kv_files.KVFolder(Path(sys.argv[1]), library="ours", generation="now")
fields = KVFields(
    key="0" * 64, chunk_id=0, space="", tokens=1, layers=1, k_width=1, v_width=1, codec="", seconds=0.0
)
folder.write(fields, {"any": b"bytes"})
"""


def test_what_a_killed_process_was_writing_is_swept_but_not_what_a_living_one_writes(folder: KVFolder) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder.folder)])
    assert done.returncode < 0
    (left,) = (folder.folder / "tmp").iterdir()
    (folder.folder / "tmp" / "link").symlink_to("nowhere")
    with locked_temporary(folder.folder / "tmp") as (_, living):
        folder.sweep_temps()
        assert living.exists()
        assert not left.exists()
    assert not living.exists()
    assert list(folder.scan()) == []


def test_a_sweep_between_making_and_locking_a_temporary_file_does_no_harm(
    folder: KVFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, 2)
    flock = fcntl.flock
    swept = []

    def late(descriptor: int, operation: int) -> None:
        if not swept:
            swept.append(True)
            folder.sweep_temps()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    write(folder)
    monkeypatch.undo()
    assert swept
    assert read(folder) == SECTIONS
    assert list((folder.folder / "tmp").iterdir()) == []


# --- many at once ----------------------------------------------------------------------------------------------------


def test_whoever_reads_beside_writers_removers_and_sweepers_sees_whole_files_or_none(folder: KVFolder) -> None:
    versions = [{"a": NOISE[n : n + 5000], "b": NOISE[n : n + 300]} for n in range(4)]
    seen: list[dict[str, bytes] | None] = []

    def change(first: int) -> None:
        for turn in range(100):
            folder.write(fields(), versions[first + turn % 2])
            if turn % 5 == 3:
                folder.remove(key(1))

    def watch(look: Callable[[], object]) -> None:
        while not all(change.done() for change in changes):
            look()

    looks: list[Callable[[], object]] = [
        folder.sweep_temps,
        lambda: seen.append(read(folder)),
        lambda: [list(folder.scan()), list(folder.sizes())],
    ]
    with ThreadPoolExecutor(5) as pool:
        changes = [pool.submit(change, first) for first in (0, 2)]
        watches = [pool.submit(watch, look) for look in looks]
    for work in (*changes, *watches):
        work.result()
    assert all(found in (None, *versions) for found in seen)
    assert any(seen)
    assert list((folder.folder / "tmp").iterdir()) == []
