"""What tests of courses share: a library with a journal, a teacher that says what it is told to, made-up trainings.

The engine is real, with a tiny model. The adapters add nothing to it (B is zero), so that their proofs can be computed
in the engine, and what is said in exams is the teacher's.
"""

import contextlib
import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np

from edge_rag.config import load_settings
from edge_rag.learning.events import Failed, Step
from edge_rag.learning.job import ADAPTER, PROOF, RESULT, Examples, Proof, Result, pieces, read_examples, write_arrays
from edge_rag.learning.studying import Request
from edge_rag.native.llama import Model
from edge_rag.records import Adapter, Answer, Cluster, Passage, Plan, Power, Recipe, Timings, Turn, Usage
from edge_rag.runtime.covering import Coverer
from edge_rag.runtime.engine import Engine
from edge_rag.runtime.learner import Learner
from edge_rag.runtime.prompting import Tokens
from edge_rag.runtime.requests import Desk
from edge_rag.runtime.shelf import Shelf
from edge_rag.runtime.workshop import Tools
from edge_rag.store import adapters, clusters, journal
from edge_rag.store.adapters import AdapterFolder
from edge_rag.store.database import Database
from edge_rag.store.items import TOP, Taught
from tests.native.tiny_models import EMBEDDING, FORWARD
from tests.runtime.serving import PREFIX, Running, running, toy_passage

BASE = "b" * 64
RECIPE = Recipe("down", "all", 1, 2, 10, 100, 1.0, 1 << 20, 0.5, "cpu")
PROVED = 2  # tokens of each answer in a proof
TOP_LOGITS = 8


# --- adapters that add nothing ---------------------------------------------------------------------------------------


class Shape(msgspec.Struct, frozen=True):
    """What an adapter has to fit."""

    layers: int = 2
    forward: int = FORWARD
    embedding: int = EMBEDDING


def write_blank_lora(path: Path, shape: Shape, seed: int = 1) -> Path:
    """Write an adapter of the down projections whose B is zero; another seed, another file."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0)
    random = np.random.default_rng(seed)
    for layer in range(shape.layers):
        name = f"blk.{layer}.ffn_down.weight"
        writer.add_tensor(f"{name}.lora_a", random.normal(size=(1, shape.forward)).astype(np.float16))
        writer.add_tensor(f"{name}.lora_b", np.zeros((shape.embedding, 1), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_proof(engine: Engine, examples: Examples, *, wrong: float, most: int) -> Proof:
    """The proof of an adapter that adds nothing, of `most` examples; `wrong` is taken from some of its logits."""
    chosen = examples.examples[:most]
    read, asked, said = (
        list(pieces(*pair))
        for pair in (
            (examples.contexts, examples.context_ends),
            (examples.tails, examples.tail_ends),
            (examples.answers, examples.answer_ends),
        )
    )
    contexts = [read[context].tolist() for context, _, _ in chosen]
    tokens = [[*asked[tail].tolist(), *said[answer].tolist()[:-1][:PROVED]] for _, tail, answer in chosen]
    starts = [len(asked[tail]) - 1 for _, tail, _ in chosen]

    def compute(desk: Desk) -> list[Any]:
        found = []
        for context, line, start in zip(contexts, tokens, starts, strict=True):
            place = desk.read([*context, *line[: start + 1]], 0).place
            found.append(desk.context.logits(place).astype(np.float64))
            for end in range(start + 1, len(line)):
                place = desk.read(line[end : end + 1], len(context) + end).place
                found.append(desk.context.logits(place).astype(np.float64))
            desk.clear()
        return found

    logits = np.stack(engine.when_idle(compute).result())
    ids = np.argsort(-logits)[:, :TOP_LOGITS].astype(np.int32)
    best = np.take_along_axis(logits, ids, 1).astype(np.float32)
    norms = np.logaddexp.reduce(logits, axis=1).astype(np.float32)
    rows = [len(line) - start for line, start in zip(tokens, starts, strict=True)]
    other = best - np.float32(wrong)
    return Proof(
        *_flat(contexts),
        *_flat(tokens),
        starts=np.array(starts, np.int32),
        row_ends=np.cumsum([0, *rows], dtype=np.int64),
        base_ids=ids,
        base_logits=best,
        base_norms=norms,
        adapter_ids=ids,
        adapter_logits=other,
        adapter_norms=norms,
    )


def _flat(lists: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    return np.concatenate(lists).astype(np.int32), np.cumsum([0, *map(len, lists)], dtype=np.int64)


# --- trainings that are made up --------------------------------------------------------------------------------------


class Trainer:
    """Opens trainings; each `run` of theirs does the next of `script`, then they finish with a result.

    An outcome is told; a Failed is the failure; what can be called is called, and then it was a slice.
    """

    def __init__(self, engine: Engine, shape: Shape) -> None:
        self.engine = engine
        self.shape = shape
        self.script: list[Any] = []
        self.opened: list[MadeUp] = []
        self.spoil: Callable[[Path], None] = lambda folder: None  # what it has left
        self.wrong = 0.0  # how wrong its proof is
        self.proved = 2  # examples of it

    def __call__(self, folder: Path) -> Any:
        self.opened.append(MadeUp(folder, self))
        return self.opened[-1]

    def finish(self, folder: Path) -> None:
        """Leave what a trainer leaves."""
        file = write_blank_lora(folder / ADAPTER, self.shape, zlib.crc32(folder.name.encode()))
        write_arrays(folder / PROOF, make_proof(self.engine, read_examples(folder), wrong=self.wrong, most=self.proved))
        content = file.read_bytes()
        result = Result(RECIPE, hashlib.sha256(content).hexdigest(), len(content))
        (folder / RESULT).write_bytes(msgspec.json.encode(result))
        self.spoil(folder)


class MadeUp:
    """A training that does what its trainer is told."""

    def __init__(self, folder: Path, trainer: Trainer) -> None:
        self.folder = folder
        self.last: Step | None = None
        self.failure: Failed | None = None
        self.closed = False
        self._trainer = trainer

    def run(self, seconds: float) -> str:
        """The next of the script."""
        assert not self.closed
        self.last = Step(1, 3, 9, 0.5, 10, 1.0)
        if not self._trainer.script:
            self._trainer.finish(self.folder)
            return "finished"
        now = self._trainer.script.pop(0)
        if isinstance(now, Failed):
            self.failure = now
            return "failed"
        if callable(now):
            now()
            return "sliced"
        return str(now)

    def close(self) -> None:
        self.closed = True


# --- what is said ----------------------------------------------------------------------------------------------------


def word(question: str) -> str:
    """The right answer to a question."""
    return f"word{zlib.crc32(question.encode())}"


class Teacher:
    """Knows every answer with the passages, and under an adapter without them too, but for what it is told."""

    def __init__(self) -> None:
        self.taught: list[str] = []
        self.examined: list[tuple[str, str]] = []  # question and adapter
        self.studied: list[int] = []
        self.refuses = False
        self.forgets: Callable[[str], bool] = lambda question: False
        self.before: Callable[[], None] = lambda: None

    def study(self, asked: Sequence[tuple[int, Request]], seed: int) -> list[str]:
        self.studied += [chunk for chunk, _ in asked]
        return [
            f"How is the {_name((chunk, seed, request.begun))} of the Marlin unit kept?" for chunk, request in asked
        ]

    def teach(self, asked: Sequence[tuple[str, Sequence[int]]]) -> list[Taught | None]:
        self.before()
        self.taught += [question for question, _ in asked]
        return [None if self.refuses else _taught(question) for question, _ in asked]

    def answers(self, asked: Sequence[tuple[str, Sequence[int]]], adapter: str = "") -> list[str]:
        self.before()
        self.examined += [(question, adapter) for question, _ in asked]
        return [self._answer(question, bool(adapter or chunks)) for question, chunks in asked]

    def _answer(self, question: str, knows: bool) -> str:
        return word(question) if knows and not self.forgets(question) else "no idea"


def _name(what: object) -> str:
    """A word of letters, another one for something else."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(zlib.crc32(repr(what).encode())))


def _taught(question: str) -> Taught:
    tokens = np.array([5, 6, 1 + zlib.crc32(question.encode()) % 30], np.int32)
    others = np.tile(np.arange(TOP, dtype=np.int32), (len(tokens), 1))
    return Taught(word(question), tokens, others, np.full((len(tokens), TOP), -3, np.float16))


class Builder:
    """Builds prompts of the tiny model."""

    prefix = PREFIX

    def passage(self, passage: Passage) -> Tokens:
        return toy_passage(passage.chunk_id, 6)

    def tail(self, turns: Sequence[Turn], question: str, instructions: str = "") -> Tokens:
        return (1 + zlib.crc32(question.encode()) % 30, 60, 61)


class Embedder:
    """Unit vectors that depend on the texts alone."""

    def __init__(self) -> None:
        self.embedded: list[str] = []

    def embed(self, texts: Sequence[str]) -> Any:
        self.embedded += texts
        raw = np.stack([np.random.default_rng(zlib.crc32(text.encode())).normal(size=16) for text in texts])
        return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)


# --- a library -------------------------------------------------------------------------------------------------------


class School(msgspec.Struct):
    """A library with its journal, and all that a learner works with."""

    served: Running
    tools: Tools
    teacher: Teacher
    trainer: Trainer
    embedder: Embedder
    asked: int = 0

    @property
    def database(self) -> Database:
        return self.served.database

    @property
    def folder(self) -> Path:
        return self.served.folder

    def ask(self, *chunks: int, times: int = 1, at: float = 1e9) -> list[str]:
        """Put questions about these passages into the journal; the questions."""
        questions = [f"What about {chunks} in case {self.asked + n}?" for n in range(times)]
        self.asked += times
        with self.database.write() as connection:
            for question in questions:
                journal.record(connection, logged(question, chunks), now=at)
        return questions

    def clusters(self) -> list[Cluster]:
        with self.database.read() as connection:
            return clusters.clusters(connection)

    def adapters(self) -> list[Adapter]:
        with self.database.read() as connection:
            return adapters.adapters(connection)

    def files(self) -> list[str]:
        """The adapters' files, by id."""
        return sorted(AdapterFolder(self.folder / "adapters").sizes())

    def jobs(self) -> list[str]:
        return sorted(each.name for each in self.tools.jobs.glob("*"))

    def learner(self, *, trains: str = "", power: Callable[[], Power] = Power, **changes: Any) -> Learner:
        return Learner(msgspec.structs.replace(self.tools, **changes), trains=trains, power=power)


def logged(question: str, chunks: Sequence[int]) -> Answer:
    passages = tuple(Passage(chunk, 1, chunk - 1, "notes.txt", "", "", None, "text", 1, 1.0) for chunk in chunks)
    id = hashlib.sha256(question.encode()).hexdigest()[:16]
    return Answer(id, question, "It is so.", passages, (), Usage(), Timings(), "stop", Plan(), "model")


@contextlib.contextmanager
def school(toy: Model, data: Path, **changes: Any) -> Iterator[School]:
    """A school over the library in `data`; changes as `keep=1.0` are those of the settings of learning."""
    flags = {"study_questions": 0, "epochs": 2, "least_questions": 1.0, "half_life_days": 36_500.0} | changes
    settings = load_settings({f"learning.{key}": value for key, value in flags.items()}, environment={})
    (data / "adapters").mkdir(exist_ok=True)
    with running(toy, data, adapters=data / "adapters") as served:
        pager = served.engine.pager
        assert pager is not None
        teacher, trainer, embedder = Teacher(), Trainer(served.engine, Shape()), Embedder()
        tools: Any = Tools(
            database=served.database,
            engine=served.engine,
            teacher=teacher,  # type: ignore[arg-type]
            embedder=embedder,  # type: ignore[arg-type]
            builder=Builder(),  # type: ignore[arg-type]
            coverer=Coverer(Shelf(served.database, pager, base=BASE), least=0.3),
            folder=AdapterFolder(data / "adapters"),
            settings=settings.learning,
            instructions="",
            model=data / "model.gguf",
            base=BASE,
            jobs=data / "training",
            cache=data / "cache",
            memory=0,
            train=trainer,
        )
        yield School(served, tools, teacher, trainer, embedder)
