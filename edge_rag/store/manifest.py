"""The manifest: which models there are. TOML in, checked records out; a bad entry names itself."""

import importlib.resources
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from edge_rag.errors import ConfigError
from edge_rag.records import FileSource, ModelKind, ModelSpec, Source, UrlSource, WheelSource

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*\.(gguf|onnx|json)")
_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.+!_-]*")
MEMO_SUFFIX = ".verified.json"
SUFFIXES: dict[ModelKind, str] = {"llm": ".gguf", "embedder": ".onnx", "tokenizer": ".json"}


def load_manifest(text: str, *, origin: str = "manifest.toml") -> tuple[ModelSpec, ...]:
    """The models that a manifest in TOML describes; the format is explained at the head of `models/manifest.toml`.

    Raises ConfigError, whose field is `model.<name>.<field>`, at the first thing that is wrong.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not TOML: {error}", field=origin) from error
    tables = document.pop("model", [])
    if document or not isinstance(tables, list):
        raise ConfigError(f"a manifest holds [[model]] tables only, not {', '.join(document) or 'model'}", field=origin)
    specs = tuple(_read_entry(table, f"model[{n}]") for n, table in enumerate(tables))
    _check_together(specs)
    return specs


def bundled_manifest() -> tuple[ModelSpec, ...]:
    """The manifest that is installed with this package; raises ConfigError when the installation lacks it."""
    try:
        text = importlib.resources.files("edge_rag.models").joinpath("manifest.toml").read_text(encoding="utf-8")
    except (ModuleNotFoundError, OSError) as error:
        raise ConfigError("this installation holds no model manifest", remedy="install edge-rag again") from error
    return load_manifest(text)


def _read_entry(table: object, where: str) -> ModelSpec:
    if isinstance(table, dict) and isinstance(table.get("name"), str):
        where = f"model.{table['name']}"
    try:
        spec = msgspec.convert(table, ModelSpec, strict=True)
    except msgspec.ValidationError as error:
        message, _, at = str(error).partition(" - at `$")
        missing = re.search(r"field `(\w+)`", message)
        parts = [where, at.strip(".`"), missing[1] if missing else ""]
        raise ConfigError(message, field=".".join(part for part in parts if part)) from error
    _check_keys(table, msgspec.to_builtins(spec), where)
    for field, message in faults(spec):
        raise ConfigError(message, field=f"{where}.{field}")
    return spec


def _check_keys(given: Any, known: dict[str, Any], where: str) -> None:
    """Refuses keys that msgspec passed over, so that a mistyped optional field is not lost."""
    for key in given.keys() - known.keys():
        raise ConfigError("unknown field", remedy=f"known: {', '.join(known)}", field=f"{where}.{key}")
    for n, source in enumerate(given.get("sources", ())):
        _check_keys(source, known["sources"][n], f"{where}.sources[{n}]")


def faults(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with its value) for each bad value."""
    good_file = _FILE.fullmatch(spec.file) and not spec.file.endswith(MEMO_SUFFIX)
    rules = [
        ("name", NAME.fullmatch(spec.name), "must be lower-case letters, digits, dots, dashes or underscores"),
        ("file", good_file, "must be a plain file name that ends in .gguf, .onnx or .json"),
        ("size", spec.size > 0, "must be the file's bytes, above 0"),
        ("sha256", re.fullmatch(r"[0-9a-f]{64}", spec.sha256), "must be 64 hex digits in lower case"),
        ("licence", spec.licence.strip(), "must not be empty"),
        ("tokenizer", spec.kind == "embedder" or not spec.tokenizer, "is for embedders only"),
    ]
    yield from ((field, message) for field, good, message in rules if not good)
    for n, source in enumerate(spec.sources):
        if fault := _source_fault(source):
            yield f"sources[{n}].{fault[0]}", fault[1]


def _source_fault(source: Source) -> tuple[str, str] | None:
    match source:
        case WheelSource(packages=packages, members=members):
            if not packages or not all(_PACKAGE.fullmatch(package) for package in packages):
                return "packages", "must be name==version, at least one"
            if len(members) != len(packages):
                return "members", f"must name one path for each of the {len(packages)} packages"
        case UrlSource(url=url):
            if not re.fullmatch(r"https?://[^/\s]+\S*", url):
                return "url", "must begin with https:// or http://"
        case FileSource(path=path):
            if not path.startswith(("/", "~")):
                return "path", "must be absolute or begin with ~"
    return None


def _check_together(specs: Sequence[ModelSpec]) -> None:
    """What no entry shows alone: names and files are unique, and tokenizers are there."""
    by_name: dict[str, ModelSpec] = {}
    files: set[str] = set()
    for spec in specs:
        if spec.name in by_name:
            raise ConfigError("there are two models of this name", field=f"model.{spec.name}.name")
        if spec.file.casefold() in files:
            raise ConfigError("another model has this file", field=f"model.{spec.name}.file")
        by_name[spec.name] = spec
        files.add(spec.file.casefold())
    for spec in specs:
        if spec.tokenizer and (spec.tokenizer not in by_name or by_name[spec.tokenizer].kind != "tokenizer"):
            raise ConfigError(f"there is no tokenizer {spec.tokenizer!r}", field=f"model.{spec.name}.tokenizer")


def dump_manifest(specs: Sequence[ModelSpec]) -> str:
    """Imported entries as TOML; they have no sources, and their fields are strings and one integer."""
    tables = []
    for spec in specs:
        fields = {key: value for key, value in msgspec.to_builtins(spec).items() if value}
        tables.append("\n".join(["[[model]]", *(f"{key} = {_toml_value(value)}" for key, value in fields.items())]))
    return "\n\n".join(tables) + "\n"


def _toml_value(value: str | int) -> str:
    # A JSON string is a TOML string but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
