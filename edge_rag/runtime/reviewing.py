"""What answers were worth, found out while nobody asks: the base model answers again, with all passages in its prompt.

A share of the routed questions is reviewed, the newest first. What was said is compared with the new answer
(`policy.reward`): a `review` of the arm that said it. Then the adapter that is known least at this question answers it
too, resident or not, since nobody waits, and is compared with the same: a `trial`. What somebody has judged himself is
not reviewed, nor what cannot be: its passages have changed or find no room, or another model answered. What was asked
in private is not in the journal.

The new answer is put together as serving would do it, from kept KV with its seams: adapters were taught by answers that
came about in this way, and it is plain retrieval that they are weighed against. What moving passages costs is measured
elsewhere (`runtime.auditing`). Conversations are not journalled: a question that leaned on one is asked as it was
searched for.
"""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from msgspec import Struct

from edge_rag.config import Settings
from edge_rag.errors import EngineError, InputError, ModelError
from edge_rag.native.embedder import Embedder
from edge_rag.native.llama import Sampler
from edge_rag.policy.covering import NONE, Chosen
from edge_rag.policy.planner import make_plan
from edge_rag.policy.reward import WEIGHTS, score
from edge_rag.policy.streaming import TextStream
from edge_rag.records import Passage, Reward, RewardSource, Sampling
from edge_rag.runtime.engine import Engine
from edge_rag.runtime.prompting import Prompt, PromptBuilder
from edge_rag.runtime.requests import Desk
from edge_rag.runtime.shelf import Shelf
from edge_rag.runtime.teaching import Line
from edge_rag.store import journal, library, routes
from edge_rag.store.database import Connection
from edge_rag.store.journal import Entry
from edge_rag.store.routes import Routed

LOOKED_AT = 256  # of the newest questions
KNOWN = 0.2  # width up to which an arm is known well enough: that of 24 rewards of weight 1 in one and the same context

logger = logging.getLogger(__name__)

Widths = Callable[[Routed], Sequence[float]]


class Materials(Struct, frozen=True):
    """What reviews work with. `space` names what contexts are made of now: routes of another one are passed over."""

    engine: Engine
    builder: PromptBuilder
    embedder: Embedder
    shelf: Shelf
    settings: Settings
    space: str


class Case(Struct, frozen=True):
    """A routed question with all of its passages, best first. `clock` counts the rewards until now."""

    entry: Entry
    routed: Routed
    passages: tuple[Passage, ...]
    clock: int

    def longest(self, usual: int) -> int:
        """Tokens that its answer was allowed, as far as the journal tells: at least `usual` unless it was cut."""
        written = self.entry.usage.completion_tokens
        return written if self.entry.finish_reason == "length" else max(usual, written)


def as_journalled(routed: Routed) -> list[float]:
    """The widths that its arms had when the question came."""
    return [arm.width for arm in routed.arms]


class Reviewer:
    """Reviews the answers of one model; one thread calls `next`. `learn` is told of each reward.

    `widths` says how unsure the arms of a decision are now, in their order.
    """

    def __init__(
        self, materials: Materials, *, learn: Callable[[Reward], None], widths: Widths = as_journalled
    ) -> None:
        self._engine = materials.engine
        self._builder = materials.builder
        self._embedder = materials.embedder
        self._shelf = materials.shelf
        self._settings = materials.settings
        self._space = materials.space
        self._learn = learn
        self._widths = widths
        self._looked_at: set[str] = set()  # reviewed, or not to be reviewed

    def next(self) -> bool:
        """Review one answer, and try another arm at its question; whether there was one.

        Raises EngineError when the engine cannot go on and StorageError as the disk.
        """
        case = self._find()
        if case is None:
            return False
        reference = self._answer(case)
        if self._judge(case, "review", case.routed.chosen, case.entry.answer, reference):
            self._try(case, reference)
        return True

    # --- questions ---------------------------------------------------------------------------------------------------

    def _find(self) -> Case | None:
        """The newest question that is to be reviewed and can be."""
        with self._shelf.database.read() as connection:
            waiting = set(routes.without_reward(connection, limit=LOOKED_AT)) if self._share else set[str]()
            self._looked_at &= waiting
            left = waiting - self._looked_at
            for entry in journal.newest(connection, limit=LOOKED_AT) if left else ():
                if entry.id in left:
                    self._looked_at.add(entry.id)
                    case = self._case(connection, entry) if self._is_wanted(entry) else None
                    if case:
                        return case
        return None

    @property
    def _share(self) -> float:
        return self._settings.router.review_share

    def _is_wanted(self, entry: Entry) -> bool:
        """Whether it is in the share, by its (random) id, answered by this model, and judged by nobody."""
        drawn = int(entry.id, 16) % 10_000 < self._share * 10_000
        return drawn and entry.model == self._settings.models.llm and entry.feedback is None

    def _case(self, connection: Connection, entry: Entry) -> Case | None:
        routed, chunks = routes.routed(connection, entry.id), [chunk for chunk, _ in entry.passages]
        found = library.passages(connection, chunks)
        if routed is None or routed.space != self._space or len(found) < len(chunks):
            return None
        return Case(entry, routed, tuple(found[chunk] for chunk in chunks), routes.clock(connection))

    # --- answers -----------------------------------------------------------------------------------------------------

    def _answer(self, case: Case, chosen: Chosen = NONE) -> str:
        """What is said when nobody waits; '' when not all passages find room."""
        limit = case.longest(self._settings.answering.max_tokens)
        prompt = self._prompt(case, chosen, limit)
        if prompt is None:
            return ""
        tokens = self._engine.when_idle(partial(_written, prompt=prompt, limit=limit)).result()
        stream = TextStream(self._settings.answering.stop)
        return stream.feed(self._engine.model.text(tokens).encode()) + stream.finish()

    def _prompt(self, case: Case, chosen: Chosen, limit: int) -> Prompt | None:
        builder = self._builder
        passages = {each.chunk_id: builder.passage(each) for each in case.passages}
        question = case.entry.plan.search_query or case.entry.question
        tail = builder.tail((), question, self._settings.answering.instructions)
        try:
            plan = make_plan(
                [(chunk, len(tokens)) for chunk, tokens in passages.items()],
                prefix_tokens=len(builder.prefix),
                tail_tokens=len(tail),
                max_tokens=limit,
                n_ctx=self._engine.n_ctx,
                chosen=chosen,
            )
        except InputError:
            return None
        if plan.dropped:
            return None
        chunks = tuple(each.chunk_id for each in plan.read)
        return Prompt(builder.prefix, tuple(passages[chunk] for chunk in chunks), tail, chunks, plan.adapter)

    # --- rewards -----------------------------------------------------------------------------------------------------

    def _judge(self, case: Case, source: RewardSource, arm: str, said: str, reference: str) -> bool:
        """Compare an answer with the reference and have it learned; whether they can be compared."""
        found = score(said, reference, self._cosine)
        if found is not None:
            self._learn(Reward(case.entry.id, arm, case.clock, time.time(), found, WEIGHTS[source], source))
        return found is not None

    def _cosine(self, one: str, other: str) -> float:
        vectors = self._embedder.embed([one, other])
        return float(vectors[0] @ vectors[1])

    def _try(self, case: Case, reference: str) -> None:
        """Have the question answered by the adapter that is known least there, if one is not known enough."""
        arm = self._least_known(case)
        if not arm.covered or not self._shelf.is_sound(arm.adapter):
            return
        try:
            said = self._answer(case, arm)
        except ModelError:
            self._shelf.disable(arm.adapter, "it could not be loaded")
        except EngineError as error:  # it finds no room, say; other idle work goes on
            logger.info("the adapter %s could not be tried: %s", arm.adapter[:12], error)
        else:
            self._judge(case, "trial", arm.adapter, said, reference)

    def _least_known(self, case: Case) -> Chosen:
        """Of the adapters that did not answer and may; NONE when all are known well enough.

        Plain retrieval is what they are compared with: there is nothing to be tried.
        """
        known, routed = self._shelf.known, case.routed
        unknown = [
            (width, arm.adapter)
            for width, arm in zip(self._widths(routed), routed.arms, strict=True)
            if width > KNOWN and arm.adapter in known and arm.adapter != routed.chosen
        ]
        if not unknown:
            return NONE
        _, adapter = max(unknown)
        return Chosen(adapter, known[adapter].members & {each.chunk_id for each in case.passages})


def _written(desk: Desk, prompt: Prompt, limit: int) -> list[int]:
    """The tokens of a greedy answer of at most `limit`, without the one that ends it. A chore of the engine."""
    assert desk.pager, "answers are reviewed where adapters are used"
    own = desk.of(desk.sequence, prompt.adapter)
    with desk.pager.held(prompt.adapter), Sampler(Sampling()) as sampler:
        line = Line(own, prompt, sampler.sample, limit)
        line.read()
        while not line.through:
            line.take(own.step([line.run])[0])
    return line.tokens[:-1] if line.ended else line.tokens
