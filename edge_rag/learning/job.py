"""The job folder: what a trainer is asked for, what it learns from, and what it gives back. No torch here.

    job.json          what is asked for (`Job`); it is written last, so a folder with it is whole
    examples.npz      what is learned from (`Examples`)
    checkpoint/       the trainer's own: where it goes on after it was stopped or killed
    adapter.gguf      the adapter for llama.cpp; peft/ the same for transformers and vLLM
    proof.npz         logits to compare the exported adapter with (`Proof`)
    result.json       how it went (`Result`); it is written last, so a folder with it is done

Texts are flat arrays of token ids with offsets: sequence i is `ids[ends[i]:ends[i + 1]]`, and `ends[0]` is 0. Nothing
is pickled. Every file is replaced as a whole, mode 0600.
"""

import io
import os
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from edge_rag.errors import InputError, StorageError
from edge_rag.records import Recipe, Record, Targets
from edge_rag.store.fetching import storage_errors
from edge_rag.store.model_files import sync

FORMAT = 1
TOP = 16  # tokens of the teacher's distribution that are kept at each place of its answer

JOB, EXAMPLES, CHECKPOINT = "job.json", "examples.npz", "checkpoint"
ADAPTER, PEFT, PROOF, RESULT, LOG = "adapter.gguf", "peft", "proof.npz", "result.json", "trainer.log"
LOCK = "lock"  # held by the trainer that is at work

Ints = npt.NDArray[np.int32]
Offsets = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]

S = TypeVar("S", bound=Struct)


class Job(Record, frozen=True, kw_only=True):
    """What to train. `model` is the GGUF file that serves, `sha256` its hash, `cache` a folder of dequantised weights.

    `batch_tokens` are computed at a time (0 = as many as the memory allows), `memory` is what may be used in bytes (0 =
    what is free), `threads` 0 = physical cores. The effective batch does not depend on any of these.
    """

    model: str
    sha256: str
    cache: str
    targets: Targets = "ffn"
    layers: Literal["all", "last_half"] = "all"
    rank: Annotated[int, Meta(ge=1, le=256)] = 16
    epochs: Annotated[int, Meta(ge=1)] = 8
    learning_rate: Annotated[float, Meta(gt=0, le=1)] = 3e-4
    kl: Annotated[float, Meta(ge=0, le=1)] = 0.5
    batch_tokens: Annotated[int, Meta(ge=0)] = 0
    memory: Annotated[int, Meta(ge=0)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Meta(ge=0)] = 0
    seed: Annotated[int, Meta(ge=0)] = 0
    checkpoint_seconds: Annotated[float, Meta(ge=0)] = 60.0
    format: int = FORMAT


class Examples(Struct, frozen=True):
    """What is learned from: m examples, each a context, a tail and an answer, by their indices.

    contexts: prefix and kept passages, computed by the base; tails: question and assistant header, from which on the
    adapter acts; answers: the teacher's, with its end token. top_ids and top_logprobs [answer tokens, 16] are the
    teacher's distribution at each of them. order [epochs, n]: which examples each epoch trains on, in this order.
    """

    contexts: Ints
    context_ends: Offsets
    tails: Ints
    tail_ends: Offsets
    answers: Ints
    answer_ends: Offsets
    top_ids: Ints
    top_logprobs: Halves
    examples: Ints
    order: Ints


class Proof(Struct, frozen=True):
    """Logits of a few examples as torch computed them in float32, with and without the adapter (rounded to f16).

    Sequence i is `contexts` (base) followed by `tokens` (question, header, answer without its last token); row
    `row_ends[i] + j` belongs to token `starts[i] + j` of `tokens`. Of each row the highest logits (ids [rows, 64] and
    logits) and the logarithm of the sum of all exponentials (norms [rows]) are kept.
    """

    contexts: Ints
    context_ends: Offsets
    tokens: Ints
    token_ends: Offsets
    starts: Ints
    row_ends: Offsets
    base_ids: Ints
    base_logits: Floats
    base_norms: Floats
    adapter_ids: Ints
    adapter_logits: Floats
    adapter_norms: Floats


class Result(Record, frozen=True):
    """How a training went: `sha256` and `bytes` of adapter.gguf; `note` says what was unusual, '' when nothing was."""

    recipe: Recipe
    sha256: str
    bytes: int
    note: str = ""


def pieces(ids: Ints, ends: Offsets) -> Iterator[Ints]:
    """The sequences of a flat array."""
    for start, end in pairwise(ends):
        yield ids[start:end]


def write_job(folder: Path, job: Job, examples: Examples) -> None:
    """Write a job folder, mode 0700. Raises InputError when the examples make no sense, StorageError as the disk."""
    check_examples(examples)
    with storage_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_arrays(folder / EXAMPLES, examples)
    write_whole(folder / JOB, msgspec.json.format(msgspec.json.encode(job)))


def read_job(folder: Path) -> Job:
    """What is asked for. Raises StorageError when it cannot be read or has another format."""
    job: Job = _read_json(folder / JOB, Job)
    if job.format != FORMAT:
        raise StorageError(f"has format {job.format}, this version reads {FORMAT}", field=str(folder / JOB))
    return job


def read_examples(folder: Path) -> Examples:
    """What is learned from. Raises StorageError when it cannot be read, InputError when it makes no sense."""
    examples = _read_arrays(folder / EXAMPLES, Examples)
    check_examples(examples)
    return examples


def read_result(folder: Path) -> Result | None:
    """How it went; None when the job is not done."""
    return _read_json(folder / RESULT, Result) if (folder / RESULT).exists() else None


def read_proof(folder: Path) -> Proof:
    """Logits to compare the exported adapter with. Raises StorageError."""
    return _read_arrays(folder / PROOF, Proof)


def check_examples(examples: Examples) -> None:
    """Raise InputError when the arrays do not fit each other, or there is nothing to learn from."""
    for ids, ends, name in (
        (examples.contexts, examples.context_ends, "context_ends"),
        (examples.tails, examples.tail_ends, "tail_ends"),
        (examples.answers, examples.answer_ends, "answer_ends"),
    ):
        _demand(ends.ndim == 1 and len(ends) > 0 and ends[0] == 0 and ends[-1] == len(ids), name, "must span its ids")
        _demand(bool((np.diff(ends) > 0).all()), name, "has an empty or reversed sequence")
    places = (len(examples.answers), TOP)
    _demand(examples.top_ids.shape == places, "top_ids", f"must have the shape {places}")
    _demand(examples.top_logprobs.shape == places, "top_logprobs", f"must have the shape {places}")
    _demand(examples.examples.ndim == 2 and examples.examples.shape[1] == 3, "examples", "must have three columns")
    counts = [len(ends) - 1 for ends in (examples.context_ends, examples.tail_ends, examples.answer_ends)]
    _demand(_within(examples.examples, np.array(counts)), "examples", "points to sequences that are not there")
    _demand(examples.order.ndim == 2 and examples.order.size > 0, "order", "must have rows of examples")
    _demand(_within(examples.order, np.array(len(examples.examples))), "order", "points to examples that are not there")


def _within(values: Ints, bounds: npt.NDArray[np.int_]) -> bool:
    return bool((values >= 0).all() and (values < bounds).all())


def _demand(holds: bool, field: str, message: str) -> None:
    if not holds:
        raise InputError(message, field=field)


# --- files -----------------------------------------------------------------------------------------------------------


def write_whole(file: Path, content: bytes) -> None:
    """Replace a file as a whole, mode 0600, or leave what was there. Raises StorageError."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    with storage_errors(file):
        try:
            with private(beside) as stream:
                stream.write(content)
            settle(beside, file)
        finally:
            beside.unlink(missing_ok=True)


def private(file: Path) -> BinaryIO:
    """A new or emptied file that only its owner may read, opened for writing. Raises OSError."""
    return os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")


def settle(beside: Path, place: Path) -> None:
    """Make a written file durable and put it in its place. Raises OSError."""
    sync(beside)
    beside.replace(place)
    sync(place.parent)


def write_arrays(file: Path, arrays: Struct) -> None:
    """Write a struct of arrays as npz. Raises StorageError."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: getattr(arrays, name) for name in arrays.__struct_fields__})
    write_whole(file, buffer.getvalue())


def _read_arrays(file: Path, kind: type[S]) -> S:
    try:
        with storage_errors(file):
            content = io.BytesIO(file.read_bytes())  # np.load leaves a damaged file open
        with np.load(content, allow_pickle=False) as stored:
            return kind(*(stored[name] for name in kind.__struct_fields__))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise StorageError(f"is damaged: {error}", field=str(file)) from error


def _read_json(file: Path, kind: Any) -> Any:
    try:
        with storage_errors(file):
            return msgspec.json.decode(file.read_bytes(), type=kind)
    except msgspec.DecodeError as error:
        raise StorageError(f"is damaged: {error}", field=str(file)) from error
