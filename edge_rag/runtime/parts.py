"""The engine and its KV cache, made from settings: how the parts of serving are put together."""

from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from edge_rag.config import Settings
from edge_rag.errors import ConfigError
from edge_rag.native.llama import Context, ContextSettings, Model, library
from edge_rag.native.llama.geometry import Geometry
from edge_rag.native.llama.support import examine
from edge_rag.runtime.assembly import Assembler
from edge_rag.runtime.engine import Engine
from edge_rag.runtime.kv_cache import KVCache
from edge_rag.runtime.kv_disk import KVDisk
from edge_rag.runtime.kv_keys import Space
from edge_rag.runtime.kv_memory import KVMemory
from edge_rag.store import kv_rows
from edge_rag.store.database import Database
from edge_rag.store.kv_files import KVFolder

MEGABYTE = 1_000_000
LEAST_BATCH = 16
CPU_BATCH, GPU_BATCH = 128, 512  # tokens: small ones stop soon, but a GPU computes large ones in the same time
SEQUENCES = 16  # one for the prompt, one for passages computed apart, the others mend seams
KV_FOLDER = "kv"


class Home(Struct, frozen=True):
    """Where KV is kept, and the sha256 of the model it belongs to."""

    database: Database
    folder: Path
    model: str


def make_cache(settings: Settings, home: Home, geometry: Geometry | None) -> KVCache:
    """The KV cache of one model in one data folder. Without geometry there is nothing to put on disk."""
    space = Space(home.model, library.versions()["llama_cpp_python"], geometry)
    memory = KVMemory(settings.kv.ram_mb * MEGABYTE)
    disk = None
    if geometry and settings.kv.disk_mb:
        with home.database.write() as connection:
            own = kv_rows.library_id(connection)
        folder = KVFolder(
            home.folder / KV_FOLDER, library=own, generation=space.generation, zstd_level=settings.kv.zstd_level
        )
        quota = settings.kv.disk_mb * MEGABYTE
        disk = KVDisk(home.database, folder, space=space.name, shape=geometry.shape, quota=quota)
    return KVCache(space, memory, disk, codec=settings.kv.codec)


def sweep_kv(database: Database, folder: Path) -> None:
    """Unlink the KV files of documents that were removed or replaced. Raises StorageError."""
    with database.write() as connection:
        kv_rows.sweep(connection, KVFolder(folder / KV_FOLDER, library="", generation=""))


def batch_size(settings: Settings) -> int:
    """Tokens of a prefill step: the setting, or what suits the machine. Raises ConfigError for a tiny one."""
    wanted = settings.engine
    if 0 < wanted.n_batch < LEAST_BATCH:
        raise ConfigError(f"must be 0 or at least {LEAST_BATCH}, not {wanted.n_batch}", field="engine.n_batch")
    return wanted.n_batch or (GPU_BATCH if wanted.gpu_layers and library.has_gpu() else CPU_BATCH)


def make_engine(
    model: Model, settings: Settings, *, threads: int, cache: Callable[[Geometry | None], KVCache] | None = None
) -> Engine:
    """An engine for `model`; `cache` makes the KV cache once the model has been examined. Raises ModelError."""
    wanted = settings.engine
    # Past the length it was trained for a model writes nonsense.
    n_ctx = min(wanted.n_ctx, model.n_ctx_train)
    n_batch = batch_size(settings)
    original = model.n_ctx_original
    if original and n_ctx <= original < n_ctx + n_batch:  # beyond it LongRoPE models turn to other factors
        n_ctx = original - n_batch
    sizes = ContextSettings(n_ctx=n_ctx + n_batch, n_batch=n_batch, n_seq_max=SEQUENCES, threads=threads)
    context = Context(model, sizes)
    try:
        support = examine(context)
        kept = cache(support.geometry) if cache else None
    except BaseException:
        context.close()
        raise
    return Engine(context, Assembler(context, support, kept, link=settings.kv.link_tokens), n_ctx=n_ctx)
