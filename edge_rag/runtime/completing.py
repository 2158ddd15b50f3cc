"""Raw use of the language model: a text is continued, without retrieval, chat template or journal.

The text is content, so '<|im_end|>' in it is plain text as in a document; only the model's own BOS stands before it. It
has no prefix and no passages either: nothing of it is looked up in the KV cache or kept there, and it cannot push the
library's passages out.
"""

import secrets
import time
from collections.abc import Generator

from edge_rag.errors import InputError
from edge_rag.records import Answer, Delta, Event, Plan, Progress, Sampling, Timings
from edge_rag.runtime.engine import Engine
from edge_rag.runtime.generations import Finished, Generation, Reading, Text
from edge_rag.runtime.house import House
from edge_rag.runtime.prompting import Prompt

LONGEST_TOKEN = 256  # bytes; vocabularies know runs of up to 128 spaces as one token


def complete(
    house: House, text: str, sampling: Sampling, *, timeout: float | None = None
) -> Generator[Event, None, None]:
    """Continue `text`: `Progress` and `Delta` as they come, last an `Answer` without passages. Closing it cancels.

    After `timeout` seconds it ends with what has been written. Raises at once, before any work: InputError when the
    text is empty, no Unicode, or more than the context with `sampling.max_tokens`, and Busy when too many wait.
    """
    engine = house.engine()
    run = _Run(text, house.settings.models.llm)
    events = run.events(engine, _prompt(engine, text), sampling, timeout)
    next(events)  # submitted: its errors came here, and from now on closing the iterator cancels
    return events


def _prompt(engine: Engine, text: str) -> Prompt:
    """The prompt for the engine: all of it is tail. Raises InputError."""
    if not text:
        raise InputError("is empty", field="prompt", remedy="give a text to continue")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise InputError("is not valid Unicode", field="prompt", remedy="write it in UTF-8") from error
    if size > engine.n_ctx * LONGEST_TOKEN:  # hopeless: not worth the time of counting its tokens
        raise InputError(
            f"{size} bytes are more than a context of {engine.n_ctx} tokens can hold",
            field="prompt",
            remedy="shorten it, or raise engine.n_ctx",
        )
    bos = engine.model.bos
    return Prompt((), (), (*(() if bos is None else (bos,)), *engine.model.tokenize(text)))


class _Run:
    """One text being continued."""

    def __init__(self, text: str, model: str) -> None:
        self._prompt = text
        self._model = model
        self._started = time.perf_counter()
        self._written = ""

    def events(
        self, engine: Engine, prompt: Prompt, sampling: Sampling, timeout: float | None
    ) -> Generator[Event, None, None]:
        """The events; the first one only says that the request is queued."""
        generation = engine.submit(prompt, sampling, timeout=timeout)
        try:
            yield Progress(done=0, total=len(prompt))
            yield from self._told(generation)
        finally:
            generation.cancel()

    def _told(self, generation: Generation) -> Generator[Event, None, None]:
        for step in generation:
            if isinstance(step, Reading):
                yield Progress(done=step.done, total=step.total)
            elif isinstance(step, Text):
                self._written += step.text
                yield Delta(text=step.text)
            else:
                yield self._answer(step)

    def _answer(self, step: Finished) -> Answer:
        total = time.perf_counter() - self._started
        return Answer(
            id=secrets.token_hex(8),
            question=self._prompt,
            text=self._written,
            passages=(),
            citations=(),
            usage=step.usage,
            timings=Timings(queued=step.queued, first_token=step.first_token, total=total),
            finish_reason=step.reason,
            plan=Plan(tail_tokens=step.usage.prompt_tokens),
            model=self._model,
        )
