"""The order of things: read, prepare, train, round, export, prove. What can be refused is refused before loading."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from msgspec import Struct

from edge_rag.learning.events import Checkpoint, Event, Loaded, Started
from edge_rag.learning.job import CHECKPOINT, RESULT, Examples, Job, Result, read_examples, read_job, write_whole
from edge_rag.learning.trainer import checkpoint, device, export, lora, sizes
from edge_rag.learning.trainer.base import Base
from edge_rag.learning.trainer.batches import Plan
from edge_rag.learning.trainer.checkpoint import State
from edge_rag.learning.trainer.control import Control
from edge_rag.learning.trainer.loop import Loop, Outlook
from edge_rag.learning.trainer.proof import write_proof
from edge_rag.records import Recipe


class Prepared(Struct, frozen=True):
    """What was decided before anything was loaded."""

    folder: Path
    job: Job
    data: Examples
    device: torch.device
    base: Base
    plan: Plan
    room: sizes.Room


def work(folder: Path, control: Control, emit: Callable[[Event], None]) -> Result | None:
    """Do a job, or go on with it; None when it was stopped, with a checkpoint. Raises EdgeRAGError."""
    return _train(_prepare(folder, emit), control, emit)


def _prepare(folder: Path, emit: Callable[[Event], None]) -> Prepared:
    job, data = read_job(folder), read_examples(folder)
    place = device.prepare(job)
    emit(Started(str(place), len(data.examples)))
    base = Base(job)
    export.check_architecture(job, base.facts)
    plan = Plan(data, base.facts, wide=place.type == "cuda")
    adapter = sizes.adapter_numbers(base.facts, job, len(lora.adapted_layers(job, base.facts)))
    taken = sizes.fixed(base.facts, adapter, converting=not base.kept)
    room = sizes.plan(base.facts, job, taken, device.available(place), plan.largest())
    return Prepared(folder, job, data, place, base, plan, room)


def _train(prepared: Prepared, control: Control, emit: Callable[[Event], None]) -> Result | None:
    """Train and write everything; None when it was stopped, with a checkpoint."""
    began = time.perf_counter()
    adapted = lora.attach(prepared.base.load(), prepared.job, prepared.base.facts).to(prepared.device)
    loop = Loop(adapted, prepared.plan, prepared.job, prepared.room, prepared.device)
    mark = checkpoint.fingerprint(prepared.folder, prepared.job)
    state, note = checkpoint.load(prepared.folder, mark)
    if state:
        loop.restore(state)
    taken = time.perf_counter() - began
    emit(Loaded(taken, prepared.base.facts.parameters, loop.cursor.step, prepared.plan.steps, note))

    def save(state: State) -> None:
        checkpoint.save(prepared.folder, mark, state)
        emit(Checkpoint(state.cursor.step))

    if not loop.run(control, Outlook(emit, save)):
        return None
    return _leave(prepared, adapted, loop, "; ".join(filter(None, [note, loop.note])))


def _leave(prepared: Prepared, adapted: object, loop: Loop, note: str) -> Result:
    """Write what a job leaves behind, the result last."""
    folder, job = prepared.folder, prepared.job
    export.round_weights(adapted)
    sha256, size = export.write_gguf(folder, adapted, job, prepared.base.facts)
    write_proof(folder, adapted, prepared.data, prepared.device)
    export.write_peft(folder, adapted, job)
    recipe = Recipe(
        targets=job.targets,
        layers=job.layers,
        rank=job.rank,
        epochs=prepared.data.order.shape[0],
        examples=prepared.data.order.shape[1],
        tokens=loop.cursor.tokens,
        seconds=loop.cursor.seconds,
        peak_bytes=device.peak(prepared.device),
        loss=loop.cursor.loss,
        device=str(prepared.device),
    )
    result = Result(recipe, sha256, size, note)
    write_whole(folder / RESULT, msgspec.json.format(msgspec.json.encode(result)))
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)  # several times the adapter, and of no use any more
    return result
