"""One thread owns the llama.cpp context; callers hand it requests through a queue and read events from another.

The rule that keeps this simple: nothing native is touched outside the engine's thread, except the abort flag. A request
is served in small steps (restore the prefix, read the prompt batch by batch, write token by token); between two steps,
and on the CPU inside one, a cancelled request ends at once. Whatever happens, its cells are freed before the next.
"""

import queue
import threading
import time
from collections.abc import Iterator

from msgspec import Struct

from edge_rag.closing import Closing
from edge_rag.errors import Cancelled, EdgeRAGError, EngineError
from edge_rag.native.llama import Context, ContextSettings, Model, Sampler
from edge_rag.policy.streaming import TextStream
from edge_rag.records import FinishReason, Sampling, Usage

SEQUENCE = 0
KEPT_PREFIXES = 4  # a model has one prefix; a few more only while templates or instructions are tried out


class Prompt(Struct, frozen=True):
    """Token ids in the order of the layout (`policy.prompt`)."""

    prefix: tuple[int, ...]
    passages: tuple[tuple[int, ...], ...]
    tail: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prefix) + sum(map(len, self.passages)) + len(self.tail)


class Reading(Struct, frozen=True):
    """`done` of `total` prompt tokens are read."""

    done: int
    total: int


class Text(Struct, frozen=True):
    """More text of the answer: whole characters, no stop string."""

    text: str


class Finished(Struct, frozen=True):
    """The last event. `queued` and `first_token` are seconds from `submit`."""

    reason: FinishReason
    usage: Usage
    queued: float
    first_token: float


Step = Reading | Text | Finished


class Generation:
    """A request on its way: iterate over its events; `cancel` from any thread."""

    def __init__(self, engine: "Engine", prompt: Prompt, sampling: Sampling) -> None:
        self._engine = engine
        self.prompt = prompt
        self.sampling = sampling
        self.submitted = time.perf_counter()
        self.events: queue.SimpleQueue[Step | EdgeRAGError] = queue.SimpleQueue()
        self.cancelled = False

    def __iter__(self) -> Iterator[Step]:
        while True:
            event = self.events.get()
            if isinstance(event, EdgeRAGError):
                raise event
            yield event
            if isinstance(event, Finished):
                return

    def cancel(self) -> None:
        """Stop it as soon as possible; its `Finished` says 'cancelled', unless it was done before."""
        self._engine.cancel(self)


class Engine(Closing):
    """Serves requests one after the other. Raises ModelError when the context cannot be made."""

    def __init__(self, model: Model, settings: ContextSettings) -> None:
        self.model = model
        self._context = Context(model, settings)
        self._settings = settings
        self._prefixes: dict[tuple[int, ...], bytes] = {}
        self._requests: queue.SimpleQueue[Generation | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards _current and the abort flag
        self._current: Generation | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._serve_all, name="edge_rag engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cancel what runs, refuse what waits, free the context. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._current:
                self._current.cancelled = True
            self._context.abort(True)
        self._requests.put(None)
        self._thread.join()
        self._context.close()

    @property
    def n_ctx(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self._context.n_ctx

    @property
    def prefix_bytes(self) -> int:
        """Memory held by kept prefix states."""
        return sum(map(len, self._prefixes.values()))

    def submit(self, prompt: Prompt, sampling: Sampling) -> Generation:
        """Queue a request. `len(prompt) + max_tokens` must fit `n_ctx` (see `policy.planner`)."""
        generation = Generation(self, prompt, sampling)
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed", remedy="open the library again")
            self._requests.put(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """Mark a request as unwanted and interrupt it when it is the one running."""
        with self._lock:
            generation.cancelled = True
            if self._current is generation:
                self._context.abort(True)

    def _serve_all(self) -> None:
        while (generation := self._requests.get()) is not None:
            generation.events.put(self._serve(generation))

    def _serve(self, generation: Generation) -> Finished | EdgeRAGError:
        with self._lock:
            self._current = generation
            generation.cancelled = generation.cancelled or self._closed
            self._context.abort(generation.cancelled)
        try:
            return _Run(self._context, self._settings, self._prefixes, generation).finish()
        except EdgeRAGError as error:
            return error
        except Exception as error:  # the thread must outlive any request: a silent death would hang all callers
            return EngineError(f"{type(error).__name__}: {error}")
        finally:
            with self._lock:
                self._current = None
                self._context.abort(False)
            self._context.clear(SEQUENCE)


class _Run:
    """One request being served: the state between its steps."""

    def __init__(
        self,
        context: Context,
        settings: ContextSettings,
        prefixes: dict[tuple[int, ...], bytes],
        generation: Generation,
    ) -> None:
        self._context = context
        self._n_batch = settings.n_batch
        self._prefixes = prefixes
        self._generation = generation
        self._started = time.perf_counter()
        self._first_token = 0.0
        self._cached = 0
        self._written = 0
        self._position = 0

    def finish(self) -> Finished:
        """Run the request to its end."""
        try:
            self._read_prompt()
            reason = self._write_answer()
        except Cancelled:
            reason = "cancelled"
        submitted = self._generation.submitted
        return Finished(
            reason,
            Usage(
                prompt_tokens=len(self._generation.prompt),
                cached_tokens=self._cached,
                completion_tokens=self._written,
            ),
            queued=self._started - submitted,
            first_token=max(0.0, self._first_token - submitted),
        )

    def _read_prompt(self) -> None:
        prompt = self._generation.prompt
        if self._generation.cancelled:
            raise Cancelled("the request was cancelled while it waited")
        self._restore_prefix(prompt.prefix)
        rest = [token for part in (*prompt.passages, prompt.tail) for token in part]
        for start in range(0, len(rest), self._n_batch):
            self._decode(rest[start : start + self._n_batch])
            self._generation.events.put(Reading(self._position, len(prompt)))

    def _restore_prefix(self, prefix: tuple[int, ...]) -> None:
        state = self._prefixes.get(prefix)
        if state is not None:
            self._context.restore(SEQUENCE, state)
            self._cached = self._position = len(prefix)
            return
        for start in range(0, len(prefix), self._n_batch):
            self._decode(list(prefix[start : start + self._n_batch]))
        if len(self._prefixes) >= KEPT_PREFIXES:
            del self._prefixes[next(iter(self._prefixes))]
        self._prefixes[prefix] = self._context.save(SEQUENCE)

    def _write_answer(self) -> FinishReason:
        stream = TextStream(self._generation.sampling.stop)
        with Sampler(self._generation.sampling) as sampler:
            try:
                reason = self._write_tokens(sampler, stream)
            finally:
                self._say(stream.finish())
        return "stop" if stream.stopped else reason

    def _write_tokens(self, sampler: Sampler, stream: TextStream) -> FinishReason:
        model, limit = self._context.model, self._generation.sampling.max_tokens
        while True:
            token = sampler.sample(self._context)
            self._first_token = self._first_token or time.perf_counter()
            if model.ends_generation(token):
                return "stop"
            self._written += 1
            self._say(stream.feed(model.piece(token)))
            if stream.stopped:
                return "stop"
            if self._written == limit:
                return "length"
            self._decode([token])

    def _say(self, text: str) -> None:
        if text:
            self._generation.events.put(Text(text))

    def _decode(self, tokens: list[int]) -> None:
        if self._generation.cancelled:
            raise Cancelled("the request was cancelled")
        self._context.decode(tokens, sequence=SEQUENCE, position=self._position)
        self._position += len(tokens)
