"""The life of a question: search → plan → prompt → generate → cite → journal, as a stream of events."""

import secrets
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial

from msgspec import Struct
from msgspec.structs import replace

from edge_rag.config import Settings
from edge_rag.errors import EngineError, InputError, MachineError
from edge_rag.native.embedder import Embedder
from edge_rag.policy import planner, rewriting
from edge_rag.policy.citations import best_support, prepare
from edge_rag.policy.covering import NONE, Chosen
from edge_rag.policy.prompt import alternating
from edge_rag.records import (
    Answer,
    Event,
    Filter,
    FinishReason,
    Plan,
    Progress,
    Sampling,
    Sources,
    Timings,
    Turn,
    Usage,
)
from edge_rag.runtime.covering import Covering, NoAdapters
from edge_rag.runtime.drafting import Cite, Draft
from edge_rag.runtime.engine import Engine
from edge_rag.runtime.generations import Finished, Generation, Reading, Text
from edge_rag.runtime.prompting import Prompt, PromptBuilder, Tokens
from edge_rag.runtime.retrieval import Found, Retriever

NOTHING_FOUND = "I found nothing about this in your documents."
MAX_QUESTION = 20_000  # characters
MAX_TOP_K = 64
REWRITE_TOKENS = 64
HISTORY_SHARE = 4  # history may take a quarter of the context


class Question(Struct, frozen=True, kw_only=True):
    """What is asked, checked. Raises InputError naming the bad field."""

    text: str
    history: tuple[Turn, ...] = ()
    where: Filter | None = None
    top_k: int
    sampling: Sampling
    instructions: str = ""
    timeout: float | None = None
    private: bool = False  # nothing of it is journalled, and so nothing learned

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise InputError("is empty", field="question", remedy="ask something")
        if len(self.text) > MAX_QUESTION:
            raise InputError(
                f"has {len(self.text)} characters, at most {MAX_QUESTION} are read",
                field="question",
                remedy="put long texts into a document and ask about it",
            )
        if not _is_unicode("".join([self.text, self.instructions, *(turn.content for turn in self.history)])):
            raise InputError("is not valid Unicode", field="question", remedy="write it in UTF-8")
        if not isinstance(self.top_k, int) or not 1 <= self.top_k <= MAX_TOP_K:
            raise InputError(f"must be from 1 to {MAX_TOP_K}, not {self.top_k}", field="top_k")
        if self.timeout is not None and not self.timeout > 0:
            raise InputError(f"must be positive, not {self.timeout}", field="timeout")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


Instead = Callable[[], tuple[Generation, Plan]]


class Answerer:
    """Answers questions over one library with one model. Thread-safe; `record` keeps each finished answer."""

    def __init__(
        self,
        *,
        retriever: Retriever,
        embedder: Embedder,
        engine: Engine,
        builder: PromptBuilder,
        settings: Settings,
        model: str,
        record: Callable[[Answer, Prompt | None, Chosen], None],
        coverer: Covering | None = None,
    ) -> None:
        self._coverer = coverer or NoAdapters()
        self._retriever = retriever
        self._embedder = embedder
        self._engine = engine
        self._builder = builder
        self._settings = settings
        self._model = model
        self._record = record

    def stream(self, question: Question) -> Generator[Event, None, None]:
        """`Sources`, then `Progress`, `Delta` and `Cited` as they come, last the `Answer`.

        Closing the iterator cancels the generation; what was said until then is in the journal as 'cancelled'. Raises
        InputError at once, before any work, when the question does not fit the context.
        """
        turns = self._recent(question.history)
        tail = self._builder.tail(turns, question.text, question.instructions)
        self._fit(question, tail, ())
        return self._events(question, turns, tail)

    def _events(self, question: Question, turns: Sequence[Turn], tail: Tokens) -> Generator[Event, None, None]:
        started = time.perf_counter()
        query = self._search_query(question.text, turns)
        found = self._search(question, query)
        retrieved = time.perf_counter() - started
        read = {passage.chunk_id: self._builder.passage(passage) for passage in found.passages}
        whole = Prompt(self._builder.prefix, tuple(read.values()), tail, tuple(read))
        scores = [passage.score for passage in found.passages]
        chosen = self._coverer.choose(
            found.asked, tuple(read), scores, partial(self._engine.waits, whole), tries=not question.private
        )
        prompt, plan = self._plan(question, tail, read, query, chosen)
        kept = found.passages[: len(plan.passages)]
        self._engine.read_ahead(prompt)
        remembered = frozenset(place for place, each in enumerate(plan.passages) if each.how == "remembered")
        run = _Run(
            answer=Answer(
                id=secrets.token_hex(8),
                question=question.text,
                text="",
                passages=kept,
                citations=(),
                usage=Usage(),
                timings=Timings(retrieve=retrieved),
                finish_reason="cancelled",
                plan=plan,
                model=self._model,
            ),
            draft=Draft(self._citer(question.text, found.first(len(kept))), remembered),
            started=started,
            record=lambda answer: self._keep(question, answer, prompt if kept else None, chosen),
        )

        def from_text() -> tuple[Generation, Plan]:
            self._coverer.failed(plan.adapter)
            texts = {passage.chunk_id: read[passage.chunk_id] for passage in kept}
            prompt, plain = self._plan(question, tail, texts, query, NONE)
            return self._submit(prompt, question), plain

        yield Sources(id=run.answer.id, passages=kept, dropped=plan.dropped)
        if kept:
            yield from run.generate(self._submit(prompt, question), instead=from_text if plan.adapter else None)
            self._coverer.count(run.answer.plan, chosen)
        else:
            yield from run.say_nothing_found()

    def _submit(self, prompt: Prompt, question: Question) -> Generation:
        return self._engine.submit(prompt, question.sampling, timeout=question.timeout)

    def _search(self, question: Question, query: str) -> Found:
        """What retrieval finds; empty when nothing reaches the floor."""
        found = self._retriever.search(
            query,
            top_k=question.top_k,
            where=question.where,
            document_order=True,
            embedded=self._coverer.foresee,
        )
        floor = self._settings.retrieval.min_similarity
        near = planner.anything_found(query, found.passages, min_similarity=floor)
        return found if near else found.first(0)

    def _recent(self, history: Sequence[Turn]) -> list[Turn]:
        turns = alternating(history)
        sizes = [self._builder.turn_size(turn) for turn in turns]
        kept = planner.newest_turns(sizes, budget=self._engine.n_ctx // HISTORY_SHARE)
        return turns[len(turns) - kept :]

    def _search_query(self, question: str, turns: Sequence[Turn]) -> str:
        if not turns or self._settings.answering.rewrite == "never" or not rewriting.leans_on_history(question):
            return question
        prompt = Prompt(self._builder.prefix, (), self._builder.tail(turns, rewriting.REQUEST + question))
        if len(prompt) + REWRITE_TOKENS > self._engine.n_ctx:
            return rewriting.accepted("", question, turns)
        said = self._engine.submit(prompt, Sampling(max_tokens=REWRITE_TOKENS, stop=("\n",)))
        try:
            return rewriting.accepted("".join(step.text for step in said if isinstance(step, Text)), question, turns)
        finally:
            said.cancel()  # the reader may have gone away

    def _keep(self, question: Question, answer: Answer, prompt: Prompt | None, chosen: Chosen) -> None:
        if not question.private:
            self._record(answer, prompt, chosen)

    def _plan(
        self, question: Question, tail: Tokens, passages: Mapping[int, Tokens], query: str, chosen: Chosen
    ) -> tuple[Prompt, Plan]:
        sizes = [(chunk, len(tokens)) for chunk, tokens in passages.items()]
        plan = self._fit(question, tail, sizes, query, chosen)
        if sizes and not plan.passages:
            raise InputError(
                "the question and its history leave no room for a passage",
                field="question",
                remedy="shorten them, lower max_tokens, or raise engine.n_ctx",
            )
        chunks = tuple(passage.chunk_id for passage in plan.read)
        read = tuple(passages[chunk] for chunk in chunks)
        return Prompt(self._builder.prefix, read, tail, chunks, plan.adapter), plan

    def _fit(
        self,
        question: Question,
        tail: Tokens,
        sizes: Sequence[tuple[int, int]],
        query: str = "",
        chosen: Chosen = NONE,
    ) -> Plan:
        return planner.make_plan(
            sizes,
            prefix_tokens=len(self._builder.prefix),
            tail_tokens=len(tail),
            max_tokens=question.sampling.max_tokens,
            n_ctx=self._engine.n_ctx,
            search_query=query,
            chosen=chosen,
        )

    def _citer(self, question: str, found: Found) -> Cite:
        evidence = [prepare(f"{passage.heading}\n{passage.text}") for passage in found.passages]
        floor = self._settings.answering.citation_floor

        def cite(sentence: str) -> tuple[int, float] | None:
            vector = self._embedder.embed([f"{question} {sentence}"])[0]
            best = best_support(sentence, question, evidence, found.similarities(vector))
            return best if best and best[1] >= floor else None

        return cite


class _Run:
    """One question being answered, from its sources to the journal."""

    def __init__(self, *, answer: Answer, draft: Draft, started: float, record: Callable[[Answer], None]) -> None:
        self.answer = answer
        self._draft = draft
        self._started = started
        self._record = record

    def generate(self, generation: Generation, instead: Instead | None = None) -> Generator[Event, None, None]:
        """The model's answer. What was said is journalled also when the reader goes away.

        When generating fails before a word was said, `instead` says how to go on.
        """
        try:
            try:
                yield from self._hear(generation)
            except (MachineError, EngineError):
                if instead is None or self._draft.text:
                    raise
                generation, plan = instead()
                kept = self.answer.passages[: len(plan.passages)]
                self.answer = replace(self.answer, plan=plan, passages=kept)
                self._draft.remembered = frozenset()
                yield from self._hear(generation)
        except EngineError:
            self.answer = replace(self.answer, finish_reason="error")
            raise
        finally:
            self._keep()
        yield self.answer

    def _hear(self, generation: Generation) -> Generator[Event, None, None]:
        waited = time.perf_counter() - self._started  # the engine counts from `submit`, we from the call
        try:
            for step in generation:
                if isinstance(step, Reading):
                    yield Progress(done=step.done, total=step.total)
                elif isinstance(step, Text):
                    yield from self._draft.feed(step.text)
                else:
                    yield from self._draft.finish()
                    self._finish(step.reason, step, waited)
        finally:
            generation.cancel()

    def say_nothing_found(self) -> Generator[Event, None, None]:
        """The answer when retrieval found nothing: said by us, so that the model cannot invent."""
        yield from self._draft.feed(NOTHING_FOUND)
        self._finish("no_passages", None, 0.0)
        self._keep()
        yield self.answer

    def _finish(self, reason: FinishReason, step: Finished | None, waited: float) -> None:
        timings = replace(
            self.answer.timings,
            queued=step.queued if step else 0.0,
            first_token=waited + step.first_token if step else time.perf_counter() - self._started,
        )
        usage = step.usage if step else Usage()
        self.answer = replace(self.answer, finish_reason=reason, timings=timings, usage=usage)
        if step:
            self.answer = replace(self.answer, plan=planner.as_served(self.answer.plan, step.passages))

    def _keep(self) -> None:
        self.answer = replace(
            self.answer,
            text=self._draft.text,
            citations=tuple(self._draft.citations),
            timings=replace(self.answer.timings, total=time.perf_counter() - self._started),
        )
        self._record(self.answer)
