"""The manifest and the models folder, without a network: sources here are files."""

import hashlib
import os
import tomllib
from importlib.resources import files
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rag.errors import ConfigError, EdgeRAGError, InputError, ModelCorrupt, ModelMissing, NotFound, StorageError
from edge_rag.records import FileSource, ModelKind, ModelSpec, Source, UrlSource, WheelSource
from edge_rag.store.manifest import bundled_manifest, load_manifest
from edge_rag.store.models import ModelFolder

REPOSITORY = Path(__file__).parents[2]
CONTENT = b"GGUF" + bytes(range(256)) * 1000


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def model(
    name: str = "tiny",
    *sources: Source,
    content: bytes = CONTENT,
    kind: ModelKind = "llm",
    suffix: str = ".gguf",
    size: int = 0,
    tokenizer: str = "",
) -> ModelSpec:
    return ModelSpec(
        name=name,
        kind=kind,
        file=name + suffix,
        size=size or len(content),
        sha256=sha256(content),
        licence="Apache-2.0",
        sources=sources,
        tokenizer=tokenizer,
    )


def written(path: Path, content: bytes = CONTENT) -> Path:
    path.write_bytes(content)
    return path


# --- the manifest ----------------------------------------------------------------------------------------------------

ENTRY = f"""
[[model]]
name = "tiny"
kind = "llm"
file = "tiny.gguf"
size = 7
sha256 = "{"a" * 64}"
licence = "MIT"
"""


def test_the_manifest_in_the_repository_is_sound() -> None:
    text = (REPOSITORY / "models" / "manifest.toml").read_text(encoding="utf-8")
    specs = {spec.name: spec for spec in load_manifest(text)}
    assert list(specs) == [
        "smollm2-135m",
        "qwen2.5-coder-0.5b",
        "qwen2.5-coder-1.5b",
        "all-minilm-l6-v2",
        "all-minilm-l6-v2-tokenizer",
    ]
    assert all(len(spec.sha256) == 64 and int(spec.sha256, 16) for spec in specs.values())
    assert all(spec.licence == "Apache-2.0" and spec.sources for spec in specs.values())
    assert specs["all-minilm-l6-v2"].tokenizer == "all-minilm-l6-v2-tokenizer"
    assert "pypi" not in text.lower()


def test_the_installed_manifest_is_the_one_in_the_repository() -> None:
    text = (REPOSITORY / "models" / "manifest.toml").read_text(encoding="utf-8")
    assert files("edge_rag.models").joinpath("manifest.toml").read_text(encoding="utf-8") == text
    assert bundled_manifest() == load_manifest(text)


def test_all_three_kinds_of_sources_are_read() -> None:
    sources = """sources = [
      { type = "file", path = "~/tiny.gguf" },
      { type = "url", url = "https://example.org/tiny.gguf" },
      { type = "wheel", packages = ["tiny==1.0"], members = ["tiny/m.bin"] },
    ]"""
    (spec,) = load_manifest(ENTRY + sources)
    assert spec.sources == (
        FileSource(path="~/tiny.gguf"),
        UrlSource(url="https://example.org/tiny.gguf"),
        WheelSource(packages=("tiny==1.0",), members=("tiny/m.bin",)),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("[[model]", "manifest.toml: not TOML", id="no TOML"),
        pytest.param("models = 1", r"manifest.toml: .*\[\[model\]\] tables only, not models", id="other tables"),
        pytest.param("model = 1", "manifest.toml: .*tables only", id="no tables"),
        pytest.param("model = [1]", r"model\[0\]: Expected `object`", id="no table"),
        pytest.param("[[model]]\nkind = 'llm'", r"model\[0\].name: .*missing", id="no name"),
        pytest.param(ENTRY.replace("size = 7\n", ""), "model.tiny.size: .*missing", id="no size"),
        pytest.param(
            ENTRY.replace("7", "'7'"), "model.tiny.size: Expected `int`, got `str`", id="size of a wrong type"
        ),
        pytest.param(ENTRY.replace("7", "0"), "model.tiny.size: must be", id="empty file"),
        pytest.param(ENTRY.replace("aaaa", "AAAA"), "model.tiny.sha256: must be 64", id="hash in capitals"),
        pytest.param(ENTRY.replace("aaaa", "aaa"), "model.tiny.sha256: must be 64", id="short hash"),
        pytest.param(ENTRY.replace('"MIT"', '" "'), "model.tiny.licence: must not", id="no licence"),
        pytest.param(ENTRY.replace('"llm"', '"lm"'), "model.tiny.kind: Invalid enum", id="unknown kind"),
        pytest.param(ENTRY.replace('"tiny"', '"../x"'), "model.../x.name: must be", id="a path as name"),
        pytest.param(ENTRY.replace("tiny.gguf", "a/b.gguf"), "model.tiny.file: must be", id="a path as file"),
        pytest.param(ENTRY.replace("tiny.gguf", "..gguf"), "model.tiny.file: must be", id="a hidden file"),
        pytest.param(ENTRY.replace("tiny.gguf", "imported.toml"), "model.tiny.file: must be", id="our own file"),
        pytest.param(ENTRY.replace("tiny.gguf", "x.verified.json"), "model.tiny.file: must be", id="a sidecar"),
        pytest.param(ENTRY + "note = 'x'", "model.tiny.note: unknown field — known: .*notes", id="mistyped field"),
        pytest.param(ENTRY + "tokenizer = 'x'", "model.tiny.tokenizer: is for embedders", id="a tokenizer for an llm"),
        pytest.param(
            ENTRY.replace('"llm"', '"embedder"') + "tokenizer = 'x'",
            "model.tiny.tokenizer: there is no tokenizer 'x'",
            id="a tokenizer that is not there",
        ),
        pytest.param(ENTRY * 2, "model.tiny.name: there are two", id="two of a name"),
        pytest.param(ENTRY + ENTRY.replace('"tiny"', '"b"'), "model.b.file: another", id="two of a file"),
        pytest.param(
            ENTRY + "sources = [{url = 'x'}]", r"model.tiny.sources\[0\].type: .*missing", id="typeless source"
        ),
        pytest.param(ENTRY + "sources = [{type = 'ftp'}]", r"model.tiny.sources\[0\].type: Invalid", id="unknown type"),
        pytest.param(ENTRY + "sources = [{type = 'url', url = 'ftp://x/y'}]", r"sources\[0\].url: must", id="ftp"),
        pytest.param(ENTRY + "sources = [{type = 'file', path = 'x'}]", r"sources\[0\].path: must", id="relative path"),
        pytest.param(
            ENTRY + "sources = [{type = 'url', url = 'http://x/y', size = 1}]",
            r"model.tiny.sources\[0\].size: unknown field",
            id="unknown field of a source",
        ),
        pytest.param(
            ENTRY + "sources = [{type = 'wheel', packages = ['--index-url=x==1'], members = ['m']}]",
            r"sources\[0\].packages: must be name==version",
            id="an option as package",
        ),
        pytest.param(
            ENTRY + "sources = [{type = 'wheel', packages = ['a==1', 'b==1'], members = ['m']}]",
            r"sources\[0\].members: must name one path for each of the 2",
            id="too few members",
        ),
    ],
)
def test_a_bad_manifest_is_refused_with_entry_and_field(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_manifest(text)


# --- what is here ----------------------------------------------------------------------------------------------------


def test_states_tell_missing_partial_ready_and_changed(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path, [model(name) for name in ("none", "half", "whole", "short", "other")])
    (tmp_path / "partial" / "half" / "x").mkdir(parents=True)
    written(tmp_path / "partial" / "half" / "x" / "half.gguf", CONTENT[:100])
    written(tmp_path / "whole.gguf")
    written(tmp_path / "short.gguf", CONTENT[:-1])
    written(tmp_path / "other.gguf", CONTENT[::-1])
    assert [(state.spec.name, state.state, state.bytes) for state in folder.states()] == [
        ("none", "missing", 0),
        ("half", "partial", 100),
        ("whole", "ready", len(CONTENT)),
        ("short", "changed", len(CONTENT) - 1),
        ("other", "changed", len(CONTENT)),
    ]


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path, [model("smollm2-135m"), model("qwen2.5-coder-0.5b")])
    with pytest.raises(NotFound, match=r"no model 'smollm2' — did you mean smollm2-135m\?"):
        folder.spec("smollm2")
    with pytest.raises(NotFound, match="known: smollm2-135m, qwen"):
        folder.path("../../etc/passwd")


def test_a_file_put_there_by_hand_is_accepted_and_hashed_once(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path, [model()])
    with pytest.raises(ModelMissing, match="edge-rag models import"):
        folder.path("tiny")
    file = written(tmp_path / "tiny.gguf")
    assert folder.path("tiny") == file
    stat = file.stat()
    assert msgspec.json.decode((tmp_path / "tiny.gguf.verified.json").read_bytes()) == {
        "sha256": sha256(CONTENT),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
    }
    # The same size and mtime: the second call trusts the sidecar, which shows that it does not hash again.
    written(file, CONTENT[::-1])
    os.utime(file, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert folder.path("tiny") == file


@pytest.mark.parametrize("sidecar", [b"", b'{"sha256": 1}', b"\xff\xfe"], ids=["empty", "wrong type", "no text"])
def test_a_broken_sidecar_costs_a_hash_and_nothing_else(sidecar: bytes, tmp_path: Path) -> None:
    file = written(tmp_path / "tiny.gguf")
    written(tmp_path / "tiny.gguf.verified.json", sidecar)
    assert ModelFolder(tmp_path, [model()]).path("tiny") == file


def test_a_sidecar_that_cannot_be_written_costs_a_hash_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf.verified.json").mkdir()
    file = written(tmp_path / "tiny.gguf")
    assert ModelFolder(tmp_path, [model()]).path("tiny") == file
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_changed_is_corrupt_until_it_is_pulled_again(tmp_path: Path) -> None:
    usb = written(tmp_path / "usb.gguf")
    folder = ModelFolder(tmp_path / "models", [model("tiny", FileSource(path=str(usb)))])
    file = folder.pull("tiny")
    with file.open("r+b") as stream:
        stream.write(b"X")
    os.utime(file, ns=(1, 1))
    with pytest.raises(ModelCorrupt, match=r"has changed.*edge-rag models pull tiny"):
        folder.path("tiny")
    assert folder.pull("tiny").read_bytes() == CONTENT
    assert folder.path("tiny") == file


def test_verify_finds_a_changed_byte_that_size_and_time_hide(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path, [model(), model("absent")])
    file = written(tmp_path / "tiny.gguf")
    folder.path("tiny")
    before = file.stat()
    written(file, CONTENT[:-1] + b"x")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    told: list[tuple[str, int, int]] = []
    states = folder.verify(progress=lambda *what: told.append(what))
    assert [state.state for state in states] == ["changed", "missing"]
    assert told == [("verify", len(CONTENT), len(CONTENT))]
    with pytest.raises(ModelCorrupt):
        folder.path("tiny")
    assert [state.spec.name for state in folder.verify(["absent"])] == ["absent"]
    with pytest.raises(NotFound):
        folder.verify(["nobody"])


# --- pulling ---------------------------------------------------------------------------------------------------------


def test_pulling_an_embedder_brings_its_tokenizer(tmp_path: Path) -> None:
    usb, json = written(tmp_path / "usb.onnx"), written(tmp_path / "usb.json", b"{}")
    embedder = model("e", FileSource(path=str(usb)), kind="embedder", suffix=".onnx", tokenizer="t")
    tokenizer = model("t", FileSource(path=str(json)), kind="tokenizer", suffix=".json", content=b"{}")
    folder = ModelFolder(tmp_path / "models", [embedder, tokenizer])
    assert folder.pull("e") == tmp_path / "models" / "e.onnx"
    assert folder.path("t").read_bytes() == b"{}"


def test_offline_names_what_is_missing_and_how_to_bring_it(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path, [model("tiny", UrlSource(url="http://127.0.0.1:1/x"))])
    with pytest.raises(ModelMissing) as caught:
        folder.pull("tiny", offline=True)
    assert caught.value.message == (
        f"tiny.gguf ({len(CONTENT)} bytes, sha256 {sha256(CONTENT)}) is not on this machine"
    )
    assert caught.value.remedy == (
        "run `edge-rag models pull tiny` on a machine with network and copy the file to "
        f"{tmp_path / 'tiny.gguf'}, or run `edge-rag models import PATH`"
    )
    assert caught.value.field == "tiny"


def test_a_full_disk_is_found_before_the_download(tmp_path: Path) -> None:
    usb = written(tmp_path / "usb.gguf")
    folder = ModelFolder(tmp_path, [model("huge", FileSource(path=str(usb)), size=10**18)])
    with pytest.raises(StorageError, match=r"needs 1,000,000,000,000 MB of free disk space, [\d,]+ MB are free"):
        folder.pull("huge")


def test_a_models_folder_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    usb = written(tmp_path / "usb.gguf")
    with pytest.raises(StorageError):
        ModelFolder(usb, [model("tiny", FileSource(path=str(usb)))]).pull("tiny")


# --- importing -------------------------------------------------------------------------------------------------------


def test_an_imported_model_is_known_to_every_later_folder(tmp_path: Path) -> None:
    own = written(tmp_path / "My Model (v2).Q4_K_M.GGUF")
    told: list[tuple[str, int, int]] = []
    spec = ModelFolder(tmp_path / "models", [model("other", content=b"GGUF other")]).import_file(
        own, licence='"odd" \\ licence\x7f\n', progress=lambda *what: told.append(what)
    )
    assert (spec.name, spec.file, spec.size) == ("my-model-v2-.q4_k_m", "my-model-v2-.q4_k_m.gguf", len(CONTENT))
    assert told == [("copy", len(CONTENT), len(CONTENT))]
    later = ModelFolder(tmp_path / "models", [model("other", content=b"GGUF other")])
    assert later.spec(spec.name) == spec
    assert later.path(spec.name).read_bytes() == CONTENT
    assert [state.state for state in later.states()] == ["missing", "ready"]
    own.unlink()  # it was a copy
    assert later.verify([spec.name])[0].state == "ready"


def test_importing_again_changes_nothing_and_another_file_of_that_name_is_refused(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path / "models", [])
    first = folder.import_file(written(tmp_path / "a.gguf"), name="mine")
    assert folder.import_file(tmp_path / "a.gguf", name="mine") == first
    assert folder.import_file(tmp_path / "a.gguf") == first
    with pytest.raises(InputError, match="name: another file is the model 'mine'"):
        folder.import_file(written(tmp_path / "b.gguf", b"GGUF b"), name="mine")
    assert folder.path("mine").read_bytes() == CONTENT
    assert folder.specs == (first,)
    folder.import_file(tmp_path / "b.gguf")
    assert [spec.name for spec in folder.specs] == ["mine", "b"]
    assert [entry["name"] for entry in tomllib.loads((tmp_path / "models" / "imported.toml").read_text())["model"]] == [
        "mine",
        "b",
    ]


def test_a_file_of_the_manifest_takes_its_place_when_imported(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path / "models", [model("tiny")])
    assert folder.import_file(written(tmp_path / "downloaded-by-browser.gguf")).name == "tiny"
    assert folder.path("tiny").read_bytes() == CONTENT
    assert not (tmp_path / "models" / "imported.toml").exists()


def test_an_import_never_takes_the_file_of_a_manifest_model(tmp_path: Path) -> None:
    known = msgspec.structs.replace(model("tiny"), file="big.gguf")
    with pytest.raises(InputError, match="give another name"):
        ModelFolder(tmp_path / "models", [known]).import_file(written(tmp_path / "big.gguf", b"GGUF big"))
    assert not (tmp_path / "models" / "big.gguf").exists()


def test_kinds_other_than_llm_are_taken_without_a_look_inside(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path / "models", [])
    assert folder.import_file(written(tmp_path / "t.json", b"{}"), kind="tokenizer").file == "t.json"
    assert folder.import_file(written(tmp_path / "e.bin", b"onnx"), name="e", kind="embedder").file == "e.onnx"


@pytest.mark.parametrize(
    ("content", "name", "field"),
    [
        pytest.param(b"GGML" + bytes(100), None, "path", id="not a GGUF"),
        pytest.param(b"", None, "path", id="empty"),
        pytest.param(None, None, "path", id="not there"),
        pytest.param(CONTENT, "../../evil", "name", id="a path as name"),
        pytest.param(CONTENT, "Name", "name", id="capitals"),
        pytest.param(CONTENT, "", "name", id="no name"),
    ],
)
def test_what_cannot_be_imported_leaves_no_trace(
    content: bytes | None, name: str | None, field: str, tmp_path: Path
) -> None:
    if content is not None:
        written(tmp_path / "x.gguf", content)
    with pytest.raises(InputError) as caught:
        ModelFolder(tmp_path / "models", []).import_file(tmp_path / "x.gguf", name=name)
    assert caught.value.field == field
    assert not (tmp_path / "models").exists()


def test_a_tokenizer_whose_file_would_be_a_sidecar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="file: must be"):
        ModelFolder(tmp_path / "models", []).import_file(
            written(tmp_path / "t.json", b"{}"), name="x.gguf.verified", kind="tokenizer"
        )


def test_a_file_name_that_is_no_text_is_recorded_all_the_same(tmp_path: Path) -> None:
    own = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.gguf"))
    folder = ModelFolder(tmp_path / "models", [])
    spec = folder.import_file(written(own), licence="caf\udce9")
    assert (spec.name, spec.licence, spec.notes) == ("caf", "caf?", "imported from caf?.gguf")
    assert folder.specs == (spec,)


def test_a_damaged_record_of_imports_names_its_file(tmp_path: Path) -> None:
    written(tmp_path / "imported.toml", b"\xff[[")
    with pytest.raises(ConfigError, match=r"imported\.toml: not TOML"):
        ModelFolder(tmp_path, []).states()


@settings(deadline=None, max_examples=40)
@given(stem=st.text(min_size=1, max_size=20), licence=st.text(max_size=20))
def test_any_file_name_and_licence_survive_the_record_or_are_refused(
    stem: str, licence: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = ModelFolder(tmp_path_factory.mktemp("models"), [])
    path = folder.folder / ("own " + "".join(c for c in stem if c not in "/\0") + ".gguf")
    try:
        path.write_bytes(b"GGUF")
    except (OSError, UnicodeEncodeError):
        return  # no such file can exist here
    try:
        spec = folder.import_file(path, licence=licence)
    except EdgeRAGError as error:
        pytest.fail(str(error))
    assert ModelFolder(folder.folder, []).specs == (spec,)
