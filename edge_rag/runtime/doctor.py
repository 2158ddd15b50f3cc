"""`doctor`: everything that has to be right, looked at one by one, each fault with its remedy."""

import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from edge_rag.config import Settings, default_data_folder, models_folder
from edge_rag.errors import EdgeRAGError
from edge_rag.native import device
from edge_rag.native.embedder import Embedder
from edge_rag.native.llama import Model, library
from edge_rag.records import Record
from edge_rag.runtime.rag import EdgeRAG
from edge_rag.store.manifest import bundled_manifest
from edge_rag.store.models import ModelFolder

LOW_DISK = 1_000_000_000  # bytes


class Check(Record, frozen=True):
    """What was looked at, what was found, and what to do about it when it is not fine."""

    what: str
    result: Literal["ok", "note", "fault"]
    found: str
    remedy: str = ""


def examine(data: Path | None, settings: Settings) -> list[Check]:
    """Run all checks. A check that fails is a result, never an error."""
    folder = data or default_data_folder()
    models = ModelFolder(models_folder(settings), bundled_manifest())
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("python", _python),
        ("llama.cpp", _llama),
        ("memory", lambda: _memory(models, settings)),
        ("disk", lambda: _disk(folder)),
        ("language model", lambda: _llm(models, settings)),
        ("embedding model", lambda: _embedder(models, settings)),
        ("library", lambda: _library(folder, settings)),
        ("passages as KV", lambda: _kv(folder, settings)),
    ]
    return [_guarded(what, check) for what, check in checks]


def _guarded(what: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except EdgeRAGError as error:
        return Check(what=what, result="fault", found=error.message, remedy=error.remedy)


def _python() -> Check:
    return Check(what="python", result="ok", found=f"{platform.python_version()} at {sys.executable}")


def _llama() -> Check:
    found = ", ".join(f"{name} {value}" for name, value in library.versions().items())
    if library.amx_is_broken():
        return Check(
            what="llama.cpp",
            result="note",
            found=f"{found}; built with AMX kernels that crash, so slower ones are used",
            remedy="reinstall it as tools/demo does, without AMX, for a faster prefill",
        )
    return Check(what="llama.cpp", result="ok", found=found)


def _memory(models: ModelFolder, settings: Settings) -> Check:
    need = models.spec(settings.models.llm).size
    free = device.memory_available()
    found = f"{free / 1e9:.1f} GB available, the language model takes {need / 1e9:.1f} GB"
    if free < 1.3 * need:
        return Check(what="memory", result="fault", found=found, remedy="close programs or choose a smaller model")
    return Check(what="memory", result="ok", found=found)


def _disk(folder: Path) -> Check:
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    result: Literal["ok", "fault"] = "ok" if free > LOW_DISK else "fault"
    remedy = "" if result == "ok" else "free some space or choose another folder with --data"
    return Check(what="disk", result=result, found=f"{free / 1e9:.1f} GB free in {there}", remedy=remedy)


def _llm(models: ModelFolder, settings: Settings) -> Check:
    path = models.path(settings.models.llm)
    with Model(path, vocab_only=True) as model:
        template = "with" if model.chat_template else "without"
        return Check(what="language model", result="ok", found=f"{settings.models.llm}, {template} chat template")


def _embedder(models: ModelFolder, settings: Settings) -> Check:
    spec = models.spec(settings.models.embedder)
    embedder = Embedder(models.path(spec.name), models.path(spec.tokenizer), threads=1)
    length = float((embedder.embed(["a test"]) ** 2).sum())
    if abs(length - 1) > 1e-3:
        return Check(what="embedding model", result="fault", found=f"gives vectors of length {length:.3f}", remedy="")
    return Check(what="embedding model", result="ok", found=f"{spec.name}, {embedder.dimensions} dimensions")


def _library(folder: Path, settings: Settings) -> Check:
    with EdgeRAG.open(folder, settings=settings) as rag:
        faults = rag.check()
        documents = len(rag.documents())
    if faults:
        remedy = "restore a backup, or move the folder away and add the documents again"
        return Check(what="library", result="fault", found="; ".join(faults), remedy=remedy)
    return Check(what="library", result="ok", found=f"{documents} documents in {folder}, whole")


def _kv(folder: Path, settings: Settings) -> Check:
    """Loads the model: whether its passages can be moved is proved on it."""
    what = "passages as KV"
    if not settings.kv.enabled:
        return Check(what=what, result="note", found="switched off", remedy="set kv.enabled to true")
    with EdgeRAG.open(folder, settings=settings) as rag:
        faults = rag.check_kv()
        now = rag.status().kv
    if faults:
        remedy = "delete the folder kv in the data folder: it can be computed again"
        return Check(what=what, result="fault", found="; ".join(faults), remedy=remedy)
    if now is None or now.moving:
        reason = now.moving if now else "unknown"
        found = f"only whole prompts are reused, because {reason}"
        return Check(what=what, result="note", found=found, remedy="another model would load passages")
    if now.link_tokens < 0:
        return Check(what=what, result="note", found="passages are not moved (kv.link_tokens)", remedy="")
    return Check(
        what=what, result="ok", found=f"passages can be moved, {now.link_tokens} tokens linked, all files whole"
    )
