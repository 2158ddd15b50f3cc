"""What the benchmarks of passages as KV share: passages and prompts, a library for their KV, engines, the baseline.

Passages are cut from the data at white space, all of a file's of about one size, and are stored as chunks of a library:
KV on the SSD belongs to a chunk. A question is asked with the product's own tail; where the data has questions about a
passage, one of them is taken.
"""

import bisect
import contextlib
import itertools
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from edge_rag.closing import Closing
from edge_rag.config import Settings
from edge_rag.native.llama import ContextSettings, Model
from edge_rag.native.llama.geometry import Geometry
from edge_rag.records import Chunk, PassagePlan, Sampling
from edge_rag.runtime.engine import Engine
from edge_rag.runtime.generations import Finished
from edge_rag.runtime.kv_cache import KVCache
from edge_rag.runtime.parts import KV_FOLDER, Home, batch_size, make_cache, make_engine
from edge_rag.runtime.prompting import Prompt, PromptBuilder, Tokens
from edge_rag.store import library
from edge_rag.store.library import NewDocument
from tools.bench import data, libraries
from tools.bench.bare import BareLoop
from tools.bench.data import Dataset
from tools.bench.metrics import Span
from tools.bench.overhead import model_path

PASSAGE_TOKENS, QUICK_PASSAGE_TOKENS = 220, 24
PLAIN_BATCH = 512  # the baseline reads in batches of the settings' size and of this one; the faster counts
AMPLE_MB = 8192  # a RAM budget under which nothing has to leave


class Excerpt(Struct, frozen=True):
    """A passage of the library, and tails of prompts that ask about it."""

    chunk_id: int
    tokens: Tokens
    tails: tuple[Tokens, ...]


class Serving(Struct, frozen=True):
    """An engine and its cache; without one it keeps nothing but the prefix."""

    engine: Engine
    cache: KVCache | None

    def ask(self, prompt: Prompt, max_tokens: int = 1) -> Finished:
        """Serve one request, and wait until what it leaves behind is written: it must not slow the next one."""
        finished = self.answer(prompt, max_tokens)
        self.settle()
        return finished

    def answer(self, prompt: Prompt, max_tokens: int) -> Finished:
        """Serve one request."""
        for step in self.engine.submit(prompt, Sampling(max_tokens=max_tokens)):
            if isinstance(step, Finished):
                return step
        raise AssertionError("a generation ends with Finished")

    def settle(self) -> None:
        """Wait until engine and cache have nothing to do."""
        self.engine.when_idle(lambda desk: None).result()
        if self.cache:
            self.cache.flush()


class Bench(Closing):
    """A model, and a library in `work` with at most `count` passages of the data sets; with `quick`, short ones."""

    def __init__(self, settings: Settings, paths: Sequence[Path], work: Path, count: int, *, quick: bool) -> None:
        self.settings = settings
        self._passage_tokens = QUICK_PASSAGE_TOKENS if quick else PASSAGE_TOKENS
        self.threads = libraries.threads(settings)
        datasets = data.load(paths, work / "data")
        folder = work / "library"
        with ExitStack() as stack:
            self.model = stack.enter_context(Model(model_path(settings), gpu_layers=settings.engine.gpu_layers))
            self.builder = PromptBuilder(self.model)
            database = stack.enter_context(libraries.opened(folder))
            spec = libraries.model_folder(settings).spec(settings.models.llm)
            self.home = Home(database, folder, spec.sha256)
            self.excerpts = self._fill(datasets, count)
            self._closing = stack.pop_all()

    def close(self) -> None:
        """Free the model, close the library."""
        self._closing.close()

    @property
    def sizes(self) -> ContextSettings:
        """As the product makes its context, but for its sequences."""
        wanted = self.settings.engine
        n_ctx = min(wanted.n_ctx, self.model.n_ctx_train)
        return ContextSettings(n_ctx=n_ctx, n_batch=batch_size(self.settings), threads=self.threads)

    def fits(self, passages: int, answer: int = 1) -> bool:
        """Whether any prompt of so many passages, and its answer, fit the context."""
        tails = max(len(tail) for excerpt in self.excerpts for tail in excerpt.tails)
        longest = max(len(excerpt.tokens) for excerpt in self.excerpts)
        return len(self.builder.prefix) + passages * longest + tails + answer <= self.sizes.n_ctx

    def prompt(self, places: Sequence[int], turn: int = 0) -> Prompt:
        """The prompt of the passages number `places`, modulo their count, with a question about one of them."""
        chosen = [self.excerpts[place % len(self.excerpts)] for place in places]
        tails = chosen[turn % len(chosen)].tails
        return Prompt(
            self.builder.prefix,
            tuple(excerpt.tokens for excerpt in chosen),
            tails[turn % len(tails)],
            tuple(excerpt.chunk_id for excerpt in chosen),
        )

    @contextlib.contextmanager
    def serving(self, *, keep: bool = True, **kv: Any) -> Iterator[Serving]:
        """An engine on this library, with settings of the group `kv` changed; with `keep` False it has no cache."""
        settings = replace(self.settings, kv=replace(self.settings.kv, **kv))
        with ExitStack() as stack:
            caches: list[KVCache] = []

            def cache(geometry: Geometry | None) -> KVCache:
                caches.append(stack.enter_context(make_cache(settings, self.home, geometry)))
                return caches[0]

            made = make_engine(self.model, settings, threads=self.threads, cache=cache if keep else None)
            yield Serving(stack.enter_context(made), caches[0] if keep else None)

    def plain(self, n_batch: int) -> "Plain":
        """The baseline, in batches of so many tokens."""
        return Plain(self.model, replace(self.sizes, n_batch=n_batch))

    def drop_page_cache(self) -> None:
        """Make the kernel forget the KV files, so that the next read comes from the SSD."""
        for file in self.files():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # pages that are not written yet would stay
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

    def forget(self) -> None:
        """Remove the KV files; the next cache that starts forgets them, too. None must be open."""
        shutil.rmtree(self.home.folder / KV_FOLDER, ignore_errors=True)

    def read_rate(self) -> float:
        """Bytes a second at which the KV files are read, one after the other."""
        started = time.perf_counter()
        size = sum(len(file.read_bytes()) for file in self.files())
        return size / (time.perf_counter() - started)

    def files(self) -> list[Path]:
        """The KV files."""
        return sorted((self.home.folder / KV_FOLDER).glob("*/*.kv"))

    # --- passages ----------------------------------------------------------------------------------------------------

    def _fill(self, datasets: Sequence[Dataset], count: int) -> list[Excerpt]:
        """Store passages of all files, then take `count` of them, evenly from all."""
        texts = {file: data.extracted_text(file) for dataset in datasets for file in _files(dataset)}
        chunks = {file: self._chunks(text) for file, text in texts.items()}
        with self.home.database.write() as connection:
            for file, found in chunks.items():
                library.put_document(
                    connection, _document(file, found), [np.zeros((1, 8), np.float32)] * len(found), now=0
                )
            rows: Any = connection.execute(
                'SELECT c.id, d.path, c.start, c."end" FROM chunks c JOIN documents d ON d.id = c.document_id'
            ).fetchall()
        step = max(1.0, len(rows) / count)
        chosen = [rows[int(place * step)] for place in range(min(count, len(rows)))]
        return self._excerpts(datasets, {chunk_id: Span(*place) for chunk_id, *place in chosen})

    def _chunks(self, text: str) -> tuple[Chunk, ...]:
        parts = round(self.model.count_tokens(text) / self._passage_tokens)
        return tuple(
            Chunk(ordinal, text[start:end], "", None, start, end, self._passage_tokens)
            for ordinal, (start, end) in enumerate(cut(text, parts))
        )

    def _excerpts(self, datasets: Sequence[Dataset], spans: dict[int, Span]) -> list[Excerpt]:
        asked = [question for dataset in datasets for question in dataset.questions]
        with self.home.database.read() as connection:
            passages = library.passages(connection, list(spans))
        excerpts = []
        for place, (chunk_id, span) in enumerate(spans.items()):
            own = [question.text for question in asked if any(map(span.contains, question.spans))]
            questions = own or [asked[place % len(asked)].text]
            tails = tuple(self.builder.tail([], question) for question in questions)
            excerpts.append(Excerpt(chunk_id, self.builder.passage(passages[chunk_id]), tails))
        return excerpts


def _files(dataset: Dataset) -> list[Path]:
    """The files of a data set, those in its folders too."""
    return [
        file.absolute()
        for path in dataset.files
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if file.is_file()
    ]


def _document(file: Path, chunks: tuple[Chunk, ...]) -> NewDocument:
    return NewDocument(str(file), file.stem, "text", 0, "", "", chunks)


def cut(text: str, parts: int) -> list[tuple[int, int]]:
    """(start, end) of so many parts of about the same length, at least one, cut at white space."""
    words = [word.span() for word in re.finditer(r"\S+", text)]
    marks = [len(text) * part / max(1, parts) for part in range(1, max(1, parts))]
    firsts = sorted({0, *(bisect.bisect(words, (int(mark), 0)) for mark in marks)})
    ranges = itertools.pairwise([*(first for first in firsts if first < len(words)), len(words)])
    return [(words[first][0], words[last - 1][1]) for first, last in ranges]


class Plain(BareLoop):
    """Plain prefill: the bare loop, which keeps nothing."""

    def answer(self, prompt: Prompt, tokens: int = 1) -> tuple[float, float]:
        """Seconds until the first token is sampled, and until so many are."""
        flat = prompt.tokens
        started = time.perf_counter()
        _, writing = self._write(flat, tokens)
        total = time.perf_counter() - started
        return total - writing, total

    def question_alone(self, prompt: Prompt) -> float:
        """Seconds for the tail, directly after its one-token `answer`: the floor of every way to assemble it."""
        context, tail = self._context, prompt.tail
        lib.llama_memory_seq_rm(lib.llama_get_memory(context), 0, prompt.seams[-1], -1)
        started = time.perf_counter()
        for start in range(0, len(tail), self._n_batch):
            part = tail[start : start + self._n_batch]
            tokens = (lib.llama_token * len(part))(*part)
            if lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(part))):
                raise RuntimeError("llama_decode failed")
        lib.llama_sampler_sample(self._sampler, context, -1)
        return time.perf_counter() - started


def described(passages: Sequence[PassagePlan]) -> str:
    """How passages came into a prompt, as '1 exact from ram, 4 splice from ram'."""
    ways = Counter(f"{plan.how} from {plan.source}" if plan.source != "none" else plan.how for plan in passages)
    return ", ".join(f"{count} {way}" for way, count in sorted(ways.items()))
