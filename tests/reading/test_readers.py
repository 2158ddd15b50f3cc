import os
import socket
from pathlib import Path

import pytest

from edge_rag.errors import DocumentError
from edge_rag.reading.readers import parse, read_bytes, read_document

MANY = 1 << 20


def refusal(path: Path, data: bytes | None = None, max_bytes: int = MANY) -> DocumentError:
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DocumentError) as caught:
        read_document(path, max_bytes=max_bytes)
    assert caught.value.field == str(path)
    assert caught.value.remedy
    return caught.value


def text_of(name: str, data: bytes) -> tuple[str, tuple[str, ...]]:
    document = parse(Path(name), data)
    return "".join(section.text for section in document.sections), document.warnings


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.md", "md"),
        ("a.MARKDOWN", "md"),
        ("a.rst", "txt"),
        ("a.log", "txt"),
        ("a.py", "txt"),
        ("a", "txt"),
        ("a.htm", "html"),
    ],
)
def test_the_extension_decides_the_kind(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_text("Some text.")
    document = read_document(tmp_path / name, max_bytes=MANY)
    assert (document.kind, document.title) == (kind, "a")
    assert [section.text for section in document.sections] == ["Some text."]


@pytest.mark.parametrize("data", [b"", b" \n\t\n", "\ufeff  ".encode(), b"\x0c"])
def test_files_without_content_are_refused(tmp_path: Path, data: bytes) -> None:
    assert any(word in refusal(tmp_path / "a.txt", data).message for word in ("empty", "no text"))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x7fELF\x02\x01\x01" + bytes(64), id="a program"),
        pytest.param(bytes(range(256)) * 8, id="all bytes"),
        pytest.param("wide text".encode("utf-16-le"), id="UTF-16 without its mark"),
    ],
)
def test_binary_data_posing_as_text_is_refused(tmp_path: Path, data: bytes) -> None:
    assert "binary" in refusal(tmp_path / "a.md", data).message


def test_a_file_over_the_limit_is_refused_with_both_sizes_and_the_setting(tmp_path: Path) -> None:
    error = refusal(tmp_path / "a.txt", b"x" * 3_000_000, max_bytes=2_000_000)
    assert "3.0 MB" in error.message
    assert "2.0 MB" in error.message
    assert "ingest.max_file_mb" in error.remedy
    assert len(read_bytes(tmp_path / "a.txt", 3_000_000)) == 3_000_000


def test_a_vanished_file_a_folder_and_a_loop_are_refused(tmp_path: Path) -> None:
    assert "vanished" in refusal(tmp_path / "gone.txt").message
    assert "folder" in refusal(tmp_path).message
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    assert "cannot be read" in refusal(tmp_path / "loop.txt").message


def test_pipes_sockets_and_devices_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    assert "pipe" in refusal(tmp_path / "pipe.txt").message
    assert "device" in refusal(Path("/dev/zero")).message
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        assert "socket" in refusal(tmp_path / "s").message


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidding(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("text")
    # The tests may run as root, for whom no mode forbids anything.
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", forbidding)
        error = refusal(tmp_path / "a.txt")
    assert "permission" in error.message


def test_an_error_about_a_name_that_is_not_utf8_can_be_shown() -> None:
    with pytest.raises(DocumentError) as caught:
        parse(Path(os.fsdecode(b"caf\xe9.txt")), b"")
    assert str(caught.value).encode()
    assert parse(Path(os.fsdecode(b"caf\xe9.txt")), b"x").title == "caf\\xe9"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_marked_unicode_is_read_without_warnings(encoding: str) -> None:
    assert text_of("a.txt", "Größe\r\nµ € 😀\rend".encode(encoding)) == ("Größe\nµ € 😀\nend", ())


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Grüße aus Köln, die Straße ist naß.", "cp1252"),
        ("Le café était déjà fermé à midi.", "cp1252"),
        ("café", "cp1252"),
        ("Zażółć gęślą jaźń, proszę bardzo", "cp1250"),
        ("Привет, как дела? Это текст.", "cp1251"),
        ("これは日本語のテキストです。", "cp932"),
    ],
)
def test_other_encodings_are_guessed_with_a_warning(text: str, encoding: str) -> None:
    read, (warning,) = text_of("a.txt", text.encode(encoding))
    assert read == text
    assert encoding in warning


def test_a_few_invalid_bytes_are_replaced_and_counted() -> None:
    read, (warning,) = text_of("a.txt", "Größe ".encode() * 1000 + b"\xff and \xfe\xfa.")
    assert read.startswith("Größe Größe ")
    assert read.endswith("\ufffd and \ufffd\ufffd.")
    assert warning.startswith("3 bytes")


def test_damage_in_marked_unicode_is_counted() -> None:
    read, (warning,) = text_of("a.txt", "ab".encode("utf-16") + b"\x00\xd8")
    assert read == "ab\ufffd"
    assert warning.startswith("1 damaged")


def test_control_characters_go_and_page_feeds_end_lines() -> None:
    read, _ = text_of("a.txt", b"\x1b[1mbold\x1b[0m\x0cnext\ttab" + b" and more words" * 20 + b"\x00")
    assert read.startswith("[1mbold[0m\nnext\ttab")
    assert read.endswith("words")
