"""The teacher: the serving model answers with the passages in its prompt, writes study questions, and sits exams.

Prompts are built and put together as in serving, because what is learned is what serving would have said. Several
answers are written together, each in a sequence of its own, one token of each a step. All of it is done in chores, so
that a request interrupts at once; answers that were through by then are kept, the others begin anew.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from msgspec.structs import replace

from edge_rag.errors import Cancelled, EngineError, InputError
from edge_rag.learning.studying import Request
from edge_rag.native.llama import Context, Run, Sampler
from edge_rag.policy.planner import make_plan
from edge_rag.policy.study import answerable
from edge_rag.records import Passage, Sampling
from edge_rag.runtime.engine import Engine
from edge_rag.runtime.generations import current_scope
from edge_rag.runtime.prompting import Prompt, PromptBuilder
from edge_rag.runtime.requests import Desk
from edge_rag.store import library
from edge_rag.store.database import Database
from edge_rag.store.items import TOP, Float16, Int32, Taught

TOKENS = 64  # of an answer, at most: of Qwen 0.5B's, one in 24 was longer than 48 and none than 52
STUDY = Sampling(max_tokens=96, temperature=0.5, top_p=0.95)  # hotter, small models leave the passage

Asked = tuple[str, Sequence[int]]  # a question, and the ids of the chunks that stand in its prompt
Choose = Callable[[Context, int], int]  # a token from the logits at a place of the last batch
Choosing = Callable[[int], contextlib.AbstractContextManager[Choose]]  # for the answer at a place of a list, begun now


class Manner(Struct, frozen=True):
    """How a list of questions is answered: in so many tokens, with the user's instructions, under an adapter."""

    tokens: int
    instructions: str = ""
    adapter: str = ""


class Teacher:
    """Asks the model of `engine` while nobody else does. `instructions` are the user's own. Any thread may call it.

    All methods wait for the engine. They raise Cancelled when the caller's scope is cancelled, and EngineError when the
    engine fails or is closed.
    """

    def __init__(self, database: Database, engine: Engine, builder: PromptBuilder, *, instructions: str = "") -> None:
        self._database = database
        self._engine = engine
        self._builder = builder
        self._instructions = instructions

    def teach(self, asked: Sequence[Asked]) -> list[Taught | None]:
        """Greedy answers, and what else might have been said at each token.

        None where the passages do not hold the answer (as the model says), where it does not end within TOKENS, and
        where the passages are gone or find no room.
        """
        notes: dict[int, Noting] = {}

        def noting(place: int) -> contextlib.nullcontext["Noting"]:
            notes[place] = Noting()
            return contextlib.nullcontext(notes[place])

        lines = self._write(asked, Manner(TOKENS, self._instructions), noting)
        return [self._taught(line, notes[place]) if line else None for place, line in enumerate(lines)]

    def _taught(self, line: "Line", note: "Noting") -> Taught | None:
        text = self._text(line)
        if not line.ended or not answerable(text):
            return None
        return Taught(text, np.array(line.tokens, np.int32), np.stack(note.ids), np.stack(note.logprobs))

    def answers(self, asked: Sequence[Asked], adapter: str = "") -> list[str]:
        """Greedy answers of at most TOKENS under an adapter (its id; '' for none); '' where there is no room.

        Raises InputError when adapters are off, and what the pager raises when this one cannot be loaded.
        """
        if adapter and not self._engine.pager:
            raise InputError("adapters are switched off", field="adapter")
        lines = self._write(asked, Manner(TOKENS, self._instructions, adapter), lambda place: _sampler(Sampling()))
        return [self._text(line) for line in lines]

    def answer(self, question: str, chunks: Sequence[int], adapter: str = "") -> str:
        """As `answers`, for one question."""
        return self.answers([(question, chunks)], adapter)[0]

    def write(self, asked: Sequence[Asked], sampling: Sampling, begun: Sequence[str] = ()) -> list[str]:
        """Texts without the user's instructions, each drawn with a seed of its own; '' where there is no room.

        `begun` are the words with which each of them begins.
        """
        words = begun or [""] * len(asked)

        def drawing(place: int) -> contextlib.AbstractContextManager[Choose]:
            return _sampler(replace(sampling, seed=sampling.seed + place))

        lines = self._write(asked, Manner(sampling.max_tokens), drawing, words)
        return [first + self._raw(line) if line else "" for first, line in zip(words, lines, strict=True)]

    def study(self, requests: Sequence[tuple[int, Request]], seed: int) -> list[str]:
        """What the model writes to each request with that passage in its prompt (a `learning.studying.Write`)."""
        asked = [(request.text, (chunk_id,)) for chunk_id, request in requests]
        sampling = replace(STUDY, seed=seed * len(requests))
        return self.write(asked, sampling, [request.begun for _, request in requests])

    def _text(self, line: "Line | None") -> str:
        return self._raw(line).strip() if line else ""

    def _raw(self, line: "Line") -> str:
        return self._engine.model.text(line.tokens[:-1] if line.ended else line.tokens)

    # --- prompts -----------------------------------------------------------------------------------------------------

    def _prompts(self, asked: Sequence[Asked], manner: Manner, begun: Sequence[str]) -> list[Prompt | None]:
        with self._database.read() as connection:
            found = library.passages(connection, sorted({chunk_id for _, chunks in asked for chunk_id in chunks}))
        return [
            self._prompt(question, [found.get(chunk_id) for chunk_id in chunks], manner, words)
            for (question, chunks), words in zip(asked, begun, strict=True)
        ]

    def _prompt(self, question: str, wanted: Sequence[Passage | None], manner: Manner, begun: str) -> Prompt | None:
        """The prompt with those passages that are there and fit, as serving chooses them.

        None when the question does not fit, or none of the passages is there and fits.
        """
        passages = [(each.chunk_id, self._builder.passage(each)) for each in wanted if each]
        tail = self._builder.tail((), question, manner.instructions)
        tail += tuple(self._engine.model.tokenize(begun)) if begun else ()
        try:
            plan = make_plan(
                [(chunk_id, len(tokens)) for chunk_id, tokens in passages],
                prefix_tokens=len(self._builder.prefix),
                tail_tokens=len(tail),
                max_tokens=manner.tokens,
                n_ctx=self._engine.n_ctx,
            )
        except InputError:
            return None
        if wanted and not plan.passages:
            return None
        kept = passages[: len(plan.passages)]
        return Prompt(
            prefix=self._builder.prefix,
            passages=tuple(tokens for _, tokens in kept),
            tail=tail,
            chunks=tuple(chunk_id for chunk_id, _ in kept),
            adapter=manner.adapter,
        )

    def _batches(self, prompts: Sequence[Prompt | None], tokens: int) -> Iterator[dict[int, Prompt]]:
        """Prompts by their places, as many at once as there are sequences and cells for."""
        batch: dict[int, Prompt] = {}
        cells, capacity = 0, self._engine.capacity
        for place, prompt in enumerate(prompts):
            if prompt is None:
                continue
            needed = len(prompt) + tokens
            if batch and (len(batch) == capacity.slots or cells + needed > capacity.cells):
                yield batch
                batch, cells = {}, 0
            batch[place] = prompt
            cells += needed
        if batch:
            yield batch

    # --- writing -----------------------------------------------------------------------------------------------------

    def _write(
        self, asked: Sequence[Asked], manner: Manner, choosing: Choosing, begun: Sequence[str] = ()
    ) -> list["Line | None"]:
        """The answer to each question, without the words that it began with; None where it has no prompt."""
        lines: dict[int, Line] = {}
        prompts = self._prompts(asked, manner, begun or [""] * len(asked))
        for batch in self._batches(prompts, manner.tokens):
            lines |= self._wait(_together(batch, manner.tokens, choosing))
        return [lines.get(place) for place in range(len(asked))]

    def _wait(self, work: Callable[[Desk], Any]) -> Any:
        scope, done = current_scope(), self._engine.when_idle(work)
        with scope.holding(done):
            try:
                return done.result()
            except CancelledError as error:
                if scope.cancelled:
                    raise Cancelled("nobody waits for it any more") from error
                raise EngineError("the engine was closed", remedy="open the library again") from error


class Noting:
    """Chooses the likeliest token each time, and notes the TOP likeliest with their log-probabilities."""

    def __init__(self) -> None:
        self.ids: list[Int32] = []
        self.logprobs: list[Float16] = []

    def __call__(self, context: Context, place: int) -> int:
        """The likeliest token at this place of the last batch."""
        ids, logprobs = likeliest(context.logits(place))
        self.ids.append(ids)
        self.logprobs.append(logprobs)
        return int(ids[0])


def likeliest(logits: npt.NDArray[np.float32]) -> tuple[Int32, Float16]:
    """The TOP likeliest tokens of logits, shape [vocabulary], the best first, and their log-probabilities in all."""
    best = np.argpartition(logits, -TOP)[-TOP:]
    best = best[np.lexsort((best, -logits[best]))]
    above = logits - logits[best[0]]
    logprobs = above[best] - np.log(np.exp(above, dtype=np.float64).sum())
    return best.astype(np.int32), logprobs.astype(np.float16)


@contextlib.contextmanager
def _sampler(sampling: Sampling) -> Iterator[Choose]:
    with Sampler(sampling) as sampler:
        yield sampler.sample


class Line:
    """An answer being written on the engine's thread, in a sequence and a lane of its own."""

    def __init__(self, desk: Desk, prompt: Prompt, choose: Choose, limit: int) -> None:
        self.tokens: list[int] = []
        self.ended = False  # by the model: its last token says so
        self._desk = desk
        self._prompt = prompt
        self._choose = choose
        self._limit = limit

    @property
    def through(self) -> bool:
        """Whether nothing more is to be written."""
        return self.ended or len(self.tokens) == self._limit

    @property
    def run(self) -> Run:
        """Its next token."""
        return Run((self.tokens[-1],), self._desk.sequence, len(self._prompt) + len(self.tokens) - 1, logits=True)

    def read(self) -> None:
        """Put the prompt together, read what is left of it (passages without the adapter), take the first token."""
        prompt, desk = self._prompt, self._desk
        assembled = desk.assemble(prompt)
        start = assembled.position
        if prompt.adapter and start < prompt.seams[-1]:
            desk.of(desk.sequence).read(prompt.tokens[start : prompt.seams[-1]], start)
            start = prompt.seams[-1]
        place = desk.read(prompt.tokens[start:], start).place
        desk.assembler.lend(prompt, assembled, desk.sequence)
        self.take(place)

    def take(self, place: int) -> None:
        """Take a token from the logits at this place of the last batch."""
        context = self._desk.context
        self.tokens.append(self._choose(context, place))
        self.ended = context.model.ends_generation(self.tokens[-1])


def _together(batch: Mapping[int, Prompt], limit: int, choosing: Choosing) -> Callable[[Desk], dict[int, Line]]:
    """The chore of writing answers to these prompts, all under one adapter. Begun again, it writes what is missing."""
    done: dict[int, Line] = {}

    def work(desk: Desk) -> dict[int, Line]:
        missing = [(place, prompt) for place, prompt in batch.items() if place not in done]
        adapter = missing[0][1].adapter
        with contextlib.ExitStack() as stack:
            if desk.pager:
                stack.enter_context(desk.pager.held(adapter))
            lines = {
                place: Line(desk.of(sequence, adapter), prompt, stack.enter_context(choosing(place)), limit)
                for sequence, (place, prompt) in enumerate(missing)
            }
            stack.callback(lambda: done.update({place: line for place, line in lines.items() if line.through}))
            _write_all(desk.of(0, adapter), list(lines.values()))
        return done

    return work


def _write_all(desk: Desk, lines: Sequence[Line]) -> None:
    for line in lines:
        line.read()
    while going := [line for line in lines if not line.through]:
        for line, place in zip(going, desk.step([line.run for line in going]), strict=True):
            line.take(place)
