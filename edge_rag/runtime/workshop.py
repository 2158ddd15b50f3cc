"""What a course works with, and where it keeps what it is at."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from edge_rag.config import Learning
from edge_rag.learning.job import Job
from edge_rag.native.embedder import Embedder
from edge_rag.records import Cluster, Record
from edge_rag.runtime.covering import Coverer
from edge_rag.runtime.engine import Engine
from edge_rag.runtime.prompting import PromptBuilder
from edge_rag.runtime.teaching import Teacher
from edge_rag.runtime.training import Training
from edge_rag.store.adapters import AdapterFolder
from edge_rag.store.database import Database

TOGETHER = 8  # questions in one piece of work, or as many as the engine writes at once


class Tools(Struct, frozen=True):
    """What a course works with. `model` is the GGUF file that serves and `base` its sha256.

    `train` opens a training over a job folder; `jobs` is where those folders are, `cache` that of dequantised weights.
    """

    database: Database
    engine: Engine
    teacher: Teacher
    embedder: Embedder
    builder: PromptBuilder
    coverer: Coverer
    folder: AdapterFolder
    settings: Learning
    instructions: str
    model: Path
    base: str
    jobs: Path
    cache: Path
    memory: int
    train: Callable[[Path], Training]

    @property
    def together(self) -> int:
        """How many questions are taught, or examined, in one piece of work."""
        return max(TOGETHER, self.engine.capacity.slots)

    def asked_for(self) -> Job:
        """What a trainer is asked for, by the settings."""
        wanted = self.settings
        return Job(
            model=str(self.model),
            sha256=self.base,
            cache=str(self.cache),
            targets=wanted.targets,
            layers=wanted.layers,
            rank=wanted.rank,
            epochs=wanted.epochs,
            learning_rate=wanted.learning_rate,
            kl=wanted.kl_share,
            memory=self.memory,
            device=wanted.device,
        )


class Doing(Record, frozen=True):
    """What a course is at, in words; `done` of `total` of it."""

    what: str
    done: int = 0
    total: int = 0


TRAINED_BY = ("targets", "layers", "rank", "epochs", "learning_rate", "kl_share", "study_questions")  # settings


def job_name(cluster: Cluster, tools: Tools) -> str:
    """The name of the folder for just this training: of these passages, with this model, trained in this way."""
    way = [getattr(tools.settings, name) for name in TRAINED_BY]
    what = (cluster.members, tools.base, way, tools.instructions)
    return f"{cluster.id}-{hashlib.sha256(msgspec.json.encode(what)).hexdigest()[:16]}"
