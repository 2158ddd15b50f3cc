"""The engine and its KV cache, made from settings: how the parts of serving are put together.

What they take of memory is claimed first (`policy.budget`): the weights by the size of their file, before they are
loaded; the rest when the model can be asked for its shape. `plan_engine` says what fits, `fitted` puts it in place of
what the settings ask for. Whoever makes an engine without a plan, as benchmarks do, gets what the settings say.

The sizes are known, but for the compute buffers: those are estimated from what llama.cpp puts in them at its largest
batch. It decides for itself how tightly to lay them out; a test holds the estimate against what it reports.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from edge_rag.config import Settings
from edge_rag.errors import ConfigError, ModelError
from edge_rag.native import device
from edge_rag.native.llama import Context, ContextSettings, Model, library
from edge_rag.native.llama.geometry import Geometry
from edge_rag.native.llama.support import examine
from edge_rag.policy.budget import Budget, Wanted, cells_for, plan_memory
from edge_rag.policy.ledger import MEGABYTE as MEGABYTE  # settings are in MB: whoever reads them has it from here
from edge_rag.policy.ledger import Accounts, Claim, Ledger, usable
from edge_rag.runtime.adapter_pager import Pager
from edge_rag.runtime.assembly import Assembler
from edge_rag.runtime.engine import Capacity, Engine
from edge_rag.runtime.kv_cache import KVCache
from edge_rag.runtime.kv_disk import KVDisk
from edge_rag.runtime.kv_keys import Space
from edge_rag.runtime.kv_memory import KVMemory
from edge_rag.store import kv_rows
from edge_rag.store.database import Database
from edge_rag.store.kv_files import KVFolder

LEAST_BATCH = 16
CPU_BATCH, GPU_BATCH = 128, 512  # tokens: small ones stop soon, but a GPU computes large ones in the same time
SEAMS = 14  # sequences that mend seams, besides one for each prompt and one for what is put together apart
SPARE = 256  # cells at least, for tokens that are decoded again at the seams of the prompt that is being read
KV_FOLDER = "kv"
EMBEDDER_WORK = 400 * MEGABYTE  # what onnxruntime takes for MiniLM and batches of usual chunks; measured
F16, F32 = 2, 4  # bytes
EMBEDDINGS, FORWARDS = 8, 3  # activations of a token that live at once, in widths of a layer and of its feed-forward


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
    return wanted.n_batch or (GPU_BATCH if _uses_gpu(settings) else CPU_BATCH)


def _uses_gpu(settings: Settings) -> bool:
    return settings.engine.gpu_layers != 0 and library.has_gpu()


def make_engine(
    model: Model,
    settings: Settings,
    *,
    threads: int,
    cache: Callable[[Geometry | None], KVCache] | None = None,
    adapter_file: Callable[[str], Path] | None = None,
) -> Engine:
    """An engine for `model`; `cache` makes the KV cache once the model has been examined. Raises ModelError.

    `adapter_file` says where an adapter's file is; without it there are none.
    """
    sizes = _sizes(model, settings)
    cells = cells_for(sizes.n_ctx, sizes.slots, spare=sizes.spare, original=sizes.original)
    capacity = Capacity(n_ctx=min(sizes.n_ctx, cells), cells=cells, slots=sizes.slots, queue=settings.engine.queue)
    context = Context(
        model,
        ContextSettings(n_ctx=cells + sizes.spare, n_batch=sizes.n_batch, n_seq_max=sizes.sequences, threads=threads),
    )
    try:
        support = examine(context)
        kept = cache(support.geometry) if cache else None
    except BaseException:
        context.close()
        raise
    link, share = settings.kv.link_tokens, settings.engine.share
    assembler = Assembler(context, support, kept, link=link, slots=sizes.slots, share=share)
    budget = settings.adapters.memory_mb * MEGABYTE
    pager = Pager(model, adapter_file, budget) if adapter_file and budget else None
    return Engine(context, assembler, capacity, pager)


class _Sizes(Struct, frozen=True):
    """Of a context, in tokens; `original` as in `policy.budget.Wanted`."""

    n_ctx: int
    slots: int
    spare: int
    n_batch: int
    sequences: int
    original: int


def _sizes(model: Model, settings: Settings) -> _Sizes:
    slots, n_batch = settings.engine.slots, batch_size(settings)
    sequences = slots + 1 + SEAMS
    return _Sizes(
        n_ctx=min(settings.engine.n_ctx, model.n_ctx_train),  # past it a model writes nonsense
        slots=slots,
        spare=max(n_batch, SPARE),
        n_batch=max(n_batch, sequences),
        sequences=sequences,
        original=model.n_ctx_original,
    )


# --- memory ----------------------------------------------------------------------------------------------------------


class Memory(Struct, frozen=True):
    """What this process may claim; `note` says why a GPU's memory is not known, '' when it is or there is none."""

    accounts: Accounts
    note: str = ""


def open_accounts(settings: Settings) -> Memory:
    """Ledgers of what is available now; `memory.limit_mb` holds for the machine's memory and for the GPU's, each."""
    limit, reserve = settings.memory.limit_mb * MEGABYTE, settings.memory.reserve_mb * MEGABYTE
    machine = device.host_memory()
    room = usable(machine.available, reserve=reserve, limit=limit, used=device.memory_used())
    host = Ledger("the machine's memory", room)
    computing = device.memory() if _uses_gpu(settings) else machine
    if computing.kind != "discrete":
        return Memory(Accounts(host), computing.note)
    return Memory(Accounts(host, Ledger("the GPU's memory", usable(computing.available, reserve=reserve, limit=limit))))


@contextlib.contextmanager
def admitted(accounts: Accounts, *claims: Claim, model: str) -> Iterator[None]:
    """Claim memory for what is made inside; given back when that fails. Raises ModelError when there is too little."""
    admission = accounts.admit(claims)
    if not admission.granted:
        raise ModelError(
            admission.reason,
            field=model,
            remedy="use a smaller model, close programs, or raise memory.limit_mb",
        )
    try:
        yield
    except BaseException:
        accounts.release(claims)
        raise


def gpu_share(settings: Settings, layers: Callable[[], int]) -> float:
    """Which part of a model is put on the GPU; `layers` is asked only where it is a part.

    The layers are not alike, the output layer counts as one: what a part takes is known roughly.
    """
    wanted = settings.engine.gpu_layers
    if not _uses_gpu(settings):
        return 0.0
    return 1.0 if wanted < 0 else min(1.0, wanted / (layers() + 1))


def layer_count(model: Model) -> int:
    """Layers, from metadata: known without weights."""
    return _most(model, "block_count")


def plan_engine(model: Model, settings: Settings, memory: Memory) -> Budget:
    """What an engine for `model` can be run with in what is free. Raises ModelError when that is too little."""
    sizes, per_token = _sizes(model, settings), kv_bytes(model)
    wanted = Wanted(
        model=settings.models.llm,
        n_ctx=sizes.n_ctx,
        slots=sizes.slots,
        spare=sizes.spare,
        ram=settings.kv.ram_mb * MEGABYTE if settings.kv.enabled else 0,
        kv=per_token,
        mask=sizes.n_batch * (F32 + F16),  # at most: as it is made, and the copy that flash attention reads
        compute=_compute_bytes(model, sizes),
        adapters=settings.adapters.memory_mb * MEGABYTE if settings.router.mode != "off" else 0,
        original=sizes.original,
        gpu_share=gpu_share(settings, lambda: layer_count(model)),
    )
    budget = plan_memory(wanted, memory.accounts)
    return replace(budget, reasons=(*([memory.note] if memory.note else []), *budget.reasons))


def fitted(settings: Settings, budget: Budget) -> Settings:
    """The settings with what fits in place of what was asked for."""
    waiting = settings.engine.queue + settings.engine.slots - budget.slots  # as many callers, whatever fits
    return replace(
        settings,
        engine=replace(settings.engine, n_ctx=budget.n_ctx, slots=budget.slots, queue=waiting),
        kv=replace(settings.kv, ram_mb=budget.ram // MEGABYTE),
        adapters=replace(settings.adapters, memory_mb=budget.adapters // MEGABYTE),
    )


def kv_bytes(model: Model) -> int:
    """Bytes of KV that a token takes in all layers, float16. Layers that need less (windows) count as whole ones."""
    heads = _most(model, "attention.head_count")
    usual = _most(model, "embedding_length") // heads if heads else 0
    k_head, v_head = (_most(model, f"attention.{name}_length", usual) for name in ("key", "value"))
    return layer_count(model) * _most(model, "attention.head_count_kv", heads) * (k_head + v_head) * F16


def _compute_bytes(model: Model, sizes: _Sizes) -> int:
    """Compute buffers but for the attention mask, and the states of recurrent layers, which do not grow with tokens."""
    logits = model.vocab_size * (sizes.n_batch + sizes.sequences)
    widths = EMBEDDINGS * _most(model, "embedding_length") + FORWARDS * _most(model, "feed_forward_length")
    inner = _most(model, "ssm.inner_size") * (_most(model, "ssm.state_size") + _most(model, "ssm.conv_kernel"))
    return F32 * (logits + sizes.n_batch * widths + sizes.sequences * layer_count(model) * inner)


def _most(model: Model, key: str, default: int = 0) -> int:
    """A number of the model's architecture; the largest of them where each layer has its own."""
    text = model.metadata(f"{model.metadata('general.architecture')}.{key}")
    return max(map(int, re.findall(r"\d+", text)), default=default)
