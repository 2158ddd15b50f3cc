"""Where training goes on: the adapter, its optimiser and the cursor, in one file that is replaced as a whole.

checkpoint/state.safetensors holds the matrices as `adapter.NAME`, AdamW's as `first.NAME` and `second.NAME`, those of
the best epoch as `best.NAME`, and the cursor as JSON in its metadata: two files could disagree after a crash. There is
no state of a random generator: the only numbers drawn are the adapter's first ones, and the order of examples is in the
job.

A checkpoint of another format or of another job is not used, and that is said.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct

from edge_rag.errors import StorageError
from edge_rag.learning.job import CHECKPOINT, EXAMPLES, Job, settle
from edge_rag.learning.trainer.sizes import Room
from edge_rag.store.fetching import storage_errors

FORMAT = 2  # 1: another number of examples made an update
FILE = "state.safetensors"

Tensors = dict[str, torch.Tensor]


class Cursor(Struct):
    """What is known after `step` steps.

    `losses` is the sum over the answer tokens of this epoch so far, `answers` their number; `loss` is the mean of the
    last whole epoch, `best` the least of these; `room` is how micro-batches are cut.
    """

    step: int = 0
    losses: float = 0.0
    answers: int = 0
    loss: float = float("inf")
    best: float = float("inf")
    tokens: int = 0
    seconds: float = 0.0
    room: Room | None = None


class State(Struct):
    """A cursor and the tensors that belong to it."""

    cursor: Cursor
    tensors: Tensors


class Envelope(Struct):
    """The metadata of a checkpoint file."""

    format: int
    job: str
    cursor: Any


def fingerprint(folder: Path, job: Job) -> str:
    """What a checkpoint must agree with: the examples and whatever of the job the result depends on."""
    digest = hashlib.sha256((folder / EXAMPLES).read_bytes())
    parts = (job.sha256, job.targets, job.layers, job.rank, job.epochs, job.learning_rate, job.kl, job.seed)
    digest.update(msgspec.json.encode(parts))
    return digest.hexdigest()


def save(folder: Path, job: str, state: State) -> None:
    """Replace the checkpoint of a job folder. Raises StorageError; the old one is there then."""
    from safetensors.torch import save_file

    file = folder / CHECKPOINT / FILE
    beside = file.with_name(f".{FILE}.{os.getpid()}")
    cursor = msgspec.json.encode(Envelope(FORMAT, job, _finite(state.cursor))).decode()
    with storage_errors(file):
        file.parent.mkdir(mode=0o700, exist_ok=True)
        for left in file.parent.glob(f".{FILE}.*"):  # of a trainer that was killed while it wrote
            left.unlink(missing_ok=True)
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in state.tensors.items()},
            beside,
            {"state": cursor},
        )
        settle(beside, file)


def load(folder: Path, job: str) -> tuple[State | None, str]:
    """The checkpoint of this job, or None and why it is not used ('' when there is none)."""
    from safetensors import SafetensorError, safe_open

    file = folder / CHECKPOINT / FILE
    if not file.exists():
        return None, ""
    try:
        with storage_errors(file), safe_open(file, "pt") as stored:
            envelope = msgspec.json.decode((stored.metadata() or {}).get("state", ""), type=Envelope)
            if envelope.format != FORMAT:
                raise StorageError(f"it has format {envelope.format}, this version writes {FORMAT}")
            if envelope.job != job:
                raise StorageError("it belongs to another job")
            cursor = msgspec.convert(envelope.cursor, Cursor)
            return State(cursor, {name: stored.get_tensor(name) for name in stored.keys()}), ""  # noqa: SIM118
    except (SafetensorError, msgspec.MsgspecError) as error:
        return None, f"the checkpoint was not used: it is damaged ({error})"
    except StorageError as error:
        return None, f"the checkpoint was not used: {error.message}"


def _finite(cursor: Cursor) -> dict[str, Any]:
    """JSON has no infinity: what is not known yet is left out."""
    return {name: value for name, value in msgspec.to_builtins(cursor).items() if value != float("inf")}
