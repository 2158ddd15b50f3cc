import io
import sys
import zipfile
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from edge_rag.errors import DocumentError
from edge_rag.reading.readers import parse


class NoMarkitdown(MetaPathFinder):
    """Makes the extra missing, whether or not it is installed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] == "markitdown":
            raise ModuleNotFoundError(name)
        return None


def archive(member: str, content: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr(member, content)
    return file.getvalue()


def refusal(name: str, data: bytes) -> DocumentError:
    with pytest.raises(DocumentError) as caught:
        parse(Path(name), data)
    assert caught.value.field == name
    return caught.value


@pytest.mark.parametrize(("name", "folder"), [("a.docx", "word"), ("a.PPTX", "ppt"), ("a.xlsx", "xl")])
def test_without_the_extra_the_remedy_is_to_install_it(monkeypatch: pytest.MonkeyPatch, name: str, folder: str) -> None:
    monkeypatch.setattr(sys, "meta_path", [NoMarkitdown(), *sys.meta_path])
    for module in [module for module in sys.modules if module.partition(".")[0] == "markitdown"]:
        monkeypatch.delitem(sys.modules, module)
    assert refusal(name, archive(f"{folder}/main.xml", "x")).remedy == "pip install 'edge-rag[office]'"


def test_what_is_no_office_file_is_refused_before_the_extra_is_needed() -> None:
    assert "broken" in refusal("a.docx", b"PK\x03\x04 cut off").message
    assert "no folder xl/" in refusal("a.xlsx", archive("word/document.xml", "x")).message
    assert "before 2007" in refusal("a.docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(512)).message


def test_an_archive_that_unpacks_without_end_is_refused() -> None:
    data = archive("xl/workbook.xml", "x" * 1000)
    # The size that the directory claims, 1000 bytes, becomes 3 GB.
    claimed = data.rindex((1000).to_bytes(4, "little"))
    bomb = data[:claimed] + (3 << 30).to_bytes(4, "little") + data[claimed + 4 :]
    assert "1 GB" in refusal("a.xlsx", bomb).message
