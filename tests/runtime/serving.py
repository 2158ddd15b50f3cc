"""What tests of kept KV share: a data folder with chunks in it, an engine and its cache over that folder, questions.

Costs do not change here, so that what is loaded and what is recomputed never depends on how busy this machine is.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from msgspec import Struct

from edge_rag.config import Settings, load_settings
from edge_rag.errors import EdgeRAGError
from edge_rag.native import kv_blob
from edge_rag.native.llama import Context, Model, Run, Sampler
from edge_rag.policy.audit import divergence
from edge_rag.policy.costs import Costs
from edge_rag.records import Chunk, PassagePlan, Sampling
from edge_rag.runtime import requests
from edge_rag.runtime.engine import Engine
from edge_rag.runtime.generations import EngineEvent, Finished, Generation, Text
from edge_rag.runtime.kv_cache import KVCache
from edge_rag.runtime.parts import KV_FOLDER, Home, make_cache, make_engine
from edge_rag.runtime.prompting import Prompt, Tokens
from edge_rag.runtime.rag import EdgeRAG
from edge_rag.runtime.requests import Desk
from edge_rag.runtime.splicing import Assembled
from edge_rag.store import kv_rows, library
from edge_rag.store.database import Database
from edge_rag.store.kv_files import KVFolder
from edge_rag.store.kv_format import KVHeader

PREFIX = tuple(range(40, 58))  # of prompts of tiny models
SAMPLING = Sampling(max_tokens=5)
ALIKE = 1e-3  # KL of two distributions that differ by the order of sums only

Logits = npt.NDArray[np.float32]
Opened = Callable[..., contextlib.AbstractContextManager[EdgeRAG]]


class Steady(Costs, frozen=True):
    """Costs that no observation changes. Computing is dear, loading is cheap."""

    token: float = 1.0
    step: float = 0.0
    assemble: float = 1e-6
    read: float = 0.0

    def _observed(self, name: str, value: float) -> "Steady":
        return self


class Toy(Model):
    """A model without a vocabulary: token n is written as a letter, and none ends the answer."""

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return bytes([ord("0") + token])

    def ends_generation(self, token: int) -> bool:
        return False


class Seen(Struct):
    """A prompt that was put together: the positions of its cells then, in order, and the next token's logits."""

    assembled: Assembled
    positions: list[int]
    logits: npt.NDArray[np.float32]


class Answered(Struct):
    """The text of an answer, and what is known about it."""

    text: str
    last: Finished

    @property
    def sources(self) -> list[str]:
        return [plan.source for plan in self.last.passages]

    @property
    def cached(self) -> int:
        return self.last.usage.cached_tokens


class Running(Struct):
    """An engine with its cache over a data folder."""

    engine: Engine
    cache: KVCache
    database: Database
    folder: Path

    def ask(self, prompt: Prompt, sampling: Sampling = SAMPLING) -> Answered:
        """The answer, when all that is kept of it is written and the accounts were found right."""
        [answer] = self.ask_together((prompt, sampling))
        return answer

    def ask_together(self, *asked: tuple[Prompt, Sampling]) -> list[Answered]:
        """Answers to requests that come at the same time; as `ask`."""
        answers = [answered(generation) for generation in self.submit_together(*asked)]
        self.settle()
        return answers

    def submit_together(
        self, *asked: tuple[Prompt, Sampling], then: Callable[[list[Generation]], None] = lambda submitted: None
    ) -> list[Generation]:
        """Submit requests in this order, and call `then` with them, before any of them is begun."""

        def submit(_: Desk) -> list[Generation]:
            submitted = [self.engine.submit(*request) for request in asked]
            then(submitted)
            return submitted

        submitted: list[Generation] = self.on_thread(submit)
        return submitted

    def settle(self) -> None:
        """Wait until nothing is to be done, and prove that no cell is left and the accounts are right."""
        assert set(self.on_thread(ends)) == {0}
        self.cache.flush()
        self.cache.check()

    def on_thread(self, work: Callable[[Desk], Any]) -> Any:
        return self.engine.when_idle(work).result()

    def look(self, prompt: Prompt) -> Seen:
        """Put a prompt together and read it to its end."""
        seen: Seen = self.on_thread(lambda desk: look(desk, prompt))
        return seen

    def files(self) -> list[Path]:
        return kv_files(self.folder)

    def headers(self) -> list[KVHeader]:
        """What the files say about themselves."""
        headers = dict(self._disk().scan())
        assert None not in headers.values()
        return [header for header in headers.values() if header]

    def complaints(self) -> list[str]:
        """How rows and files disagree."""
        with self.database.read() as connection:
            return list(kv_rows.check(connection, self._disk()))

    def _disk(self) -> KVFolder:
        with self.database.write() as connection:
            own = kv_rows.library_id(connection)
        return KVFolder(self.folder / KV_FOLDER, library=own, generation=self.cache._space.generation)


@contextlib.contextmanager
def running(
    model: Model,
    folder: Path,
    flags: dict[str, Any] | None = None,
    *,
    model_name: str = "model",
    adapters: Path | None = None,
) -> Iterator[Running]:
    """Start over a data folder, with the adapters in a folder; everything is written and closed at the end."""
    settings = make_settings(flags or {})
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(Database(folder))
        made: list[KVCache] = []

        def make(geometry: Any) -> KVCache:
            made.append(stack.enter_context(make_cache(settings, Home(database, folder, model_name), geometry)))
            return made[0]

        file = (lambda name: adapters / f"{name}.gguf") if adapters else None
        engine = stack.enter_context(make_engine(model, settings, threads=1, cache=make, adapter_file=file))
        engine.assembler.costs = Steady()
        made[0].flush()
        yield Running(engine, made[0], database, folder)


def make_settings(flags: dict[str, Any]) -> Settings:
    return load_settings({"engine.n_ctx": 512, "engine.n_batch": 64, "kv.codec": "f16"} | flags, environment={})


def ends(desk: Desk) -> list[int]:
    """How far each sequence reaches."""
    return [desk.context.end(sequence) for sequence in range(desk.context.settings.n_seq_max)]


def look(desk: Desk, prompt: Prompt) -> Seen:
    done = desk.assemble(prompt)
    geometry, positions = desk.assembler.support.geometry, list[int]()
    if geometry:
        positions = sorted(kv_blob.parse(desk.context.save(desk.sequence), geometry.shape).positions.tolist())
    place = desk.read(prompt.tokens[done.position :], done.position).place
    return Seen(done, positions, desk.context.logits(place))


def skipped(plans: Sequence[PassagePlan]) -> int:
    return sum(plan.skipped for plan in plans)


# --- requests and batches --------------------------------------------------------------------------------------------


def answered(generation: Generation) -> Answered:
    """The answer of a request, once it has ended."""
    steps = list(generation)
    assert isinstance(steps[-1], Finished)
    return Answered(said(steps), steps[-1])


def said(events: Sequence[object]) -> str:
    """The text of some events."""
    return "".join(event.text for event in events if isinstance(event, Text))


def drained(generation: Generation) -> list[EngineEvent | EdgeRAGError]:
    """All events that have come and nobody has taken; waits for none."""
    events = []
    while not generation.events.empty():
        events.append(generation.events.get())
    return events


class Batches:
    """The batches of an engine: `before` is called with each one, on the engine's thread; `done` are those decoded.

    What `before` raises, the decode raises.
    """

    def __init__(self, engine: Engine) -> None:
        self.before: Callable[[Sequence[Run]], None] = lambda runs: None
        self.done: list[Sequence[Run]] = []
        self.context: Context = engine._context
        self._decode = self.context.decode
        self.context.decode = self._run  # type: ignore[method-assign]

    def _run(self, runs: Sequence[Run]) -> tuple[int, ...]:
        self.before(runs)
        places = self._decode(runs)
        self.done.append(tuple(runs))
        return places

    def of(self, sequence: int) -> list[Run]:
        """What was decoded in a sequence."""
        return [run for runs in self.done for run in runs if run.sequence == sequence]


class Samplers:
    """The samplers of all requests: how many are `open`, and from which logits those of each seed have chosen.

    The next ones to choose, as many as `stumbling` says, fail.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = 0
        self.stumbling = 0
        self.chosen_from: dict[int, list[Logits]] = {}
        everyone = self

        class Watched(Sampler):
            def __init__(self, sampling: Sampling) -> None:
                super().__init__(sampling)
                everyone.open += 1
                self._logits = everyone.chosen_from.setdefault(sampling.seed, [])

            def close(self) -> None:
                everyone.open -= self._chain is not None
                super().close()

            def sample(self, context: Context, place: int = -1) -> int:
                if everyone.stumbling:
                    everyone.stumbling -= 1
                    raise RuntimeError("made to fail")
                self._logits.append(context.logits(place))
                return super().sample(context, place)

        monkeypatch.setattr(requests, "Sampler", Watched)

    def alike(self, seed: int, other: int) -> bool:
        """Whether two answers were chosen from the same logits, up to the end of the shorter or the first near tie."""
        for one, two in zip(self.chosen_from[seed], self.chosen_from[other], strict=False):
            if divergence(one, two) > ALIKE:
                return False
            if one.argmax() != two.argmax():
                break
        return True


# --- libraries of the small models -----------------------------------------------------------------------------------


@contextlib.contextmanager
def small_library(data: Path, settings: Settings, **changes: Any) -> Iterator[EdgeRAG]:
    """A library with the models of `settings`, where nothing goes on while idle; changes as `kv__idle=True`."""
    flags = {
        "models.llm": settings.models.llm,
        "models.folder": settings.models.folder,
        "engine.n_ctx": 512,
        "engine.threads": 2,
        "answering.max_tokens": 2,
        "retrieval.top_k": 2,
        "retrieval.min_similarity": -1,
        "kv.idle": False,
        "learning.idle": False,
    }
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    with EdgeRAG.open(data, settings=load_settings(flags | changed, environment={})) as rag:
        rag._house.engine().assembler.costs = Steady()
        yield rag


def add_files(rag: EdgeRAG, folder: Path, texts: Mapping[str, str]) -> None:
    """Write the texts into a new folder, and add it: one chunk each."""
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    assert rag.add(folder).count("added") == rag.status().chunks == len(texts)


# --- data folders ----------------------------------------------------------------------------------------------------


def add_document(database: Database, path: str, count: int) -> tuple[int, ...]:
    """Store a document of so many chunks, or replace it; returns the chunks' ids."""
    chunks = tuple(
        Chunk(ordinal=n, text=f"chunk {n}", heading="", page=None, start=0, end=7, tokens=1) for n in range(count)
    )
    new = library.NewDocument(path=path, title="", kind="txt", bytes=9, sha256="0", recipe="1", chunks=chunks)
    with database.write() as connection:
        number = library.put_document(connection, new, [np.ones(8, np.float32)] * count, now=1.0)
        found = connection.execute("SELECT id FROM chunks WHERE document_id = ? ORDER BY ordinal", (number,))
        return tuple(chunk_id for (chunk_id,) in found)


def remove_document(database: Database, path: str) -> None:
    with database.write() as connection:
        document = library.find_document(connection, path)
        assert document is not None
        library.remove_document(connection, document.id)


def kv_files(folder: Path) -> list[Path]:
    """All KV files of a data folder; those that are being written too."""
    return sorted(path for path in (folder / KV_FOLDER).rglob("*") if path.is_file())


# --- prompts of tiny models ------------------------------------------------------------------------------------------


def toy_passage(number: int, tokens: int = 20) -> Tokens:
    """Tokens of a passage; another number, other tokens."""
    return tuple(int(token) for token in np.random.default_rng(number).integers(1, 39, tokens))


def toy_prompt(chunks: Sequence[int], *, question: int = 1, prefix: Tokens = PREFIX, tokens: int = 20) -> Prompt:
    """A prompt with the passages of these chunks (ids that fresh data folders give: 1, 2, …)."""
    passages = tuple(toy_passage(chunk, tokens) for chunk in chunks)
    return Prompt(prefix, passages, (question, 60, 61), tuple(chunks))
