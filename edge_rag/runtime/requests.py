"""A request from the engine's side: its steps on the engine's thread, and what they work with."""

import math
import time
from collections.abc import Sequence

from edge_rag.errors import EdgeRAGError, InputError
from edge_rag.native.llama import Context, Run, Sampler
from edge_rag.policy.streaming import TextStream
from edge_rag.records import FinishReason, Sampling, Usage
from edge_rag.runtime import checked
from edge_rag.runtime.adapter_pager import Pager
from edge_rag.runtime.assembly import Assembler
from edge_rag.runtime.generations import Flight, Reading, Served, Text
from edge_rag.runtime.prompting import Prompt
from edge_rag.runtime.splicing import Assembled, Decoded
from edge_rag.runtime.steps import Steps, Wanted

NONE = -1  # in place of a token


def check_request(prompt: Prompt, sampling: Sampling, timeout: float | None, *, n_ctx: int) -> None:
    """Raise InputError unless a context of `n_ctx` tokens can serve this."""
    checked.converted(sampling, Sampling, "sampling")
    if not prompt.tail:
        raise InputError("is empty", field="prompt")
    if sampling.max_tokens < 1:
        raise InputError(f"must be positive, not {sampling.max_tokens}", field="max_tokens")
    if timeout is not None and not timeout > 0:
        raise InputError(f"must be positive, not {timeout}", field="timeout")
    for name in ("temperature", "top_p", "min_p"):
        if not math.isfinite(value := getattr(sampling, name)):
            raise InputError(f"must be a finite number, not {value}", field=name)
    if len(prompt) + sampling.max_tokens > n_ctx:
        raise InputError(
            f"{len(prompt)} tokens and an answer of up to {sampling.max_tokens} are more than the context of {n_ctx}",
            field="max_tokens",
            remedy="ask for less, or raise engine.n_ctx",
        )


class Desk:
    """What work on the engine's thread works with: the context, the assembler, and a sequence of its own.

    `lane` is the adapter under which it reads and writes, "" for none; putting together what is kept needs none.
    """

    def __init__(
        self,
        context: Context,
        assembler: Assembler,
        *,
        steps: Steps | None = None,
        pager: Pager | None = None,
        sequence: int = 0,
        lane: str = "",
        wanted: Wanted = lambda: True,
    ) -> None:
        self.context = context
        self.assembler = assembler
        self.sequence = sequence
        self.pager = pager
        self._steps = steps or Steps(context)
        self._lane = lane
        self._wanted = wanted

    def of(self, sequence: int, lane: str = "") -> "Desk":
        """The same desk with another sequence, in another lane."""
        return Desk(
            self.context,
            self.assembler,
            steps=self._steps,
            pager=self.pager,
            sequence=sequence,
            lane=lane,
            wanted=self._wanted,
        )

    def decode(self, runs: Sequence[Run]) -> Decoded:
        """Decode runs without adapter, however long. Raises Cancelled when the work is no longer wanted."""
        return self._steps.decode(runs, wanted=self._wanted)

    def read(self, tokens: Sequence[int], position: int) -> Decoded:
        """Append tokens to the desk's sequence, in its lane; logits of the last one are kept. Raises as `decode`."""
        runs = [Run(tokens, self.sequence, position, logits=True)]
        return self._steps.decode(runs, lane=self._lane, wanted=self._wanted)

    def step(self, runs: Sequence[Run]) -> tuple[int, ...]:
        """One batch in the desk's lane; the places of the runs' last tokens. Raises as `decode`."""
        return self._steps.alone(runs, lane=self._lane, wanted=self._wanted)

    def assemble(self, prompt: Prompt) -> Assembled:
        """Put together what is kept of a prompt in the desk's sequence. Raises as `decode`."""
        return self.assembler.assemble(prompt, self.decode, self.sequence)

    def clear(self) -> None:
        """Free the desk's sequence."""
        self.assembler.clear(self.sequence)


class Request:
    """One request being served: read first, then written token by token (a `steps.Writer`)."""

    def __init__(self, desk: Desk, flight: Flight) -> None:
        self.flight = flight
        self.job = flight.job
        self.desk = desk
        self._context = desk.context
        self._stream = TextStream(flight.sampling.stop)
        self._sampler = Sampler(flight.sampling)
        self._started = time.perf_counter()
        self._first_token = 0.0
        self._assembled = Assembled(0, 0, ())
        self._position = 0
        self._written = 0
        self._token = NONE
        self.answered = False
        self._dressed = False
        flight.report = self._report

    # --- reading -----------------------------------------------------------------------------------------------------

    def read(self) -> bool:
        """Read the prompt and take the first token; whether the answer goes on. Raises Cancelled, EngineError."""
        prompt, assembler = self.flight.prompt, self.desk.assembler
        self._dress()
        self._assembled = self.desk.assemble(prompt)
        self._position = self._assembled.position
        self._tell()
        if (assembler.opaque or prompt.adapter) and self._position < prompt.seams[-1]:
            self._read_until(prompt.seams[-1], self.desk.of(self.desk.sequence))
            if assembler.opaque:
                assembler.keep_state(prompt, self._assembled, self.desk.sequence)
        place = self._read_until(len(prompt), self.desk)
        assembler.count(prompt, self._assembled)
        assembler.lend(prompt, self._assembled, self.desk.sequence)
        return self.take(place)

    def _read_until(self, end: int, desk: Desk) -> int:
        tokens, step, place = self.flight.prompt.tokens, self._context.settings.n_batch, -1
        while self._position < end:
            piece = tokens[self._position : min(end, self._position + step)]
            decoded = desk.read(piece, self._position)
            desk.assembler.observe(len(piece), decoded.seconds)
            self._position, place = self._position + len(piece), decoded.place
            self._tell()
        return place

    def _tell(self) -> None:
        self.flight.tell(Reading(self._position, len(self.flight.prompt)))

    def _dress(self) -> None:
        if self.desk.pager and self.job.lane:
            self.desk.pager.take(self.job.lane)
            self._dressed = True

    def undress(self) -> None:
        """Let its adapter go."""
        if self.desk.pager and self._dressed:
            self.desk.pager.drop(self.job.lane)
            self._dressed = False

    # --- writing -----------------------------------------------------------------------------------------------------

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for it."""
        return self.flight.unwanted is None

    @property
    def run(self) -> Run:
        """Its next token."""
        return Run((self._token,), self.desk.sequence, self._position, logits=True)

    def take(self, place: int) -> bool:
        """Take a token from the logits at this place of the last batch; whether the answer goes on."""
        if self._token >= 0:  # it has just been decoded
            self._position += 1
        self._token = self._sampler.sample(self._context, place)
        self._first_token = self._first_token or time.perf_counter()
        if self._context.model.ends_generation(self._token):
            return self._end("stop")
        self._written += 1
        self._say(self._stream.feed(self._context.model.piece(self._token)))
        if self._stream.stopped:
            return self._end("stop")
        return self._written < self.flight.sampling.max_tokens or self._end("length")

    def _say(self, text: str) -> None:
        if text:
            self.flight.tell(Text(text))

    # --- the end -----------------------------------------------------------------------------------------------------

    def _end(self, reason: FinishReason) -> bool:
        self._say(self._stream.finish())
        self.answered = reason in ("stop", "length")
        if self.answered:
            seconds = time.perf_counter() - self._first_token
            self.desk.assembler.observe_answer(self._written - 1, seconds, dressed=self._dressed)
        self._sampler.close()
        self.flight.end("stop" if self._stream.stopped else reason)
        return False

    def give_up(self) -> None:
        """Nobody waits for it any more. When it has ended already, nothing happens."""
        if not self.flight.ended:
            self._end(self.flight.unwanted or "cancelled")

    def fail(self, error: EdgeRAGError) -> None:
        """Serving it has failed. When it has ended already, nothing happens."""
        self._sampler.close()
        self.flight.fail(error)

    def _report(self) -> Served:
        return Served(
            Usage(
                prompt_tokens=len(self.flight.prompt),
                cached_tokens=self._assembled.cached,
                completion_tokens=self._written,
            ),
            self._assembled.passages,
            self._started,
            self._first_token,
        )

    def keep_state(self) -> None:
        """Keep the state of the whole prompt, when it has been answered."""
        if self.answered and not self.desk.assembler.opaque:
            self._context.clear(self.desk.sequence, len(self.flight.prompt) - 1)
            self.desk.assembler.keep_state(self.flight.prompt, self._assembled, self.desk.sequence)
