"""What an adapter is trained on: taught questions with the prompts in which it will meet them.

An adapter answers without its passages in the prompt, beside passages that it does not cover, and it must not spoil
what it knows nothing of. So each epoch mixes four kinds of prompts (shares of the examples; measured: docs/log.md):

    closed book   .50   nothing but the prefix
    partial       .20   covered passages left out, uncovered ones kept
    beside        .15   a passage that has nothing to do with it
    elsewhere     .15   a question about other passages with those in the prompt: its teacher is the base model itself

A study question has no uncovered passage; it gets one of those that logged questions had beside its own. Where there
are no questions elsewhere, the cluster's own are asked with all of their passages: that too keeps reading as it was.

Each logged question comes `LOGGED` times as often as a written one. What was asked is what will be asked again, and
there are about eight times as many written ones (24 a passage beside three logged); so a quarter of all is logged.

Which variant an example is in an epoch is drawn anew for each epoch, with the seed of the job.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from edge_rag.errors import InputError
from edge_rag.learning.job import Examples
from edge_rag.records import Item, Passage
from edge_rag.store import library
from edge_rag.store.database import Connection
from edge_rag.store.items import TOP, Int32, Taught, items_elsewhere, items_of, taught

LOGGED = 3
CLOSED, PARTIAL, BESIDE, ELSEWHERE = 0.5, 0.2, 0.15, 0.15
MOST_ELSEWHERE = 256  # items, of which each epoch draws

Tokens = tuple[int, ...]
Int64 = npt.NDArray[np.int64]
Context = tuple[int, ...]  # the chunk ids of a prompt, in order


class Layout(Struct, frozen=True):
    """How prompts are made of tokens: exactly as in serving."""

    prefix: Tokens
    passage: Callable[[Passage], Tokens]
    tail: Callable[[str], Tokens]


class Lessons(Struct, frozen=True):
    """What was taught: items of a cluster, items elsewhere, the answers by item id, and the passages by chunk id."""

    members: frozenset[int]
    inside: tuple[Item, ...]
    outside: tuple[Item, ...]
    taught: Mapping[int, Taught]
    passages: Mapping[int, Passage]


def lessons(connection: Connection, members: Iterable[int], *, model: str) -> Lessons:
    """What can be learned about a cluster: what `model` was taught and is not held out."""
    chunks = sorted(members)
    inside = _answered(items_of(connection, chunks, model=model))
    outside = _answered(items_elsewhere(connection, chunks, model=model, exam=False, limit=MOST_ELSEWHERE))
    both = (*inside, *outside)
    return Lessons(
        members=frozenset(chunks),
        inside=tuple(item for item in inside if not item.held_out),
        outside=outside,
        taught=taught(connection, [item.id for item in both], model=model),
        passages=library.passages(connection, sorted({chunk_id for item in both for chunk_id in item.chunks})),
    )


def _answered(items: Sequence[Item]) -> tuple[Item, ...]:
    return tuple(item for item in items if item.answer is not None)


def build(lessons: Lessons, layout: Layout, *, epochs: int, seed: int) -> Examples:
    """The examples of a training run; the same for the same arguments.

    Raises InputError when nothing was taught about the cluster.
    """
    if not lessons.inside:
        raise InputError(
            "there is no answered question to learn from", field="cluster", remedy="ask about its passages"
        )
    mixer, book = _Mixer(lessons, seed), _Book(lessons, layout)
    order = [[book.example(item, context) for item, context in mixer.epoch(number)] for number in range(epochs)]
    return book.examples(order)


class _Mixer:
    """Draws the prompts of each epoch."""

    def __init__(self, lessons: Lessons, seed: int) -> None:
        self._seed = seed
        self._members = lessons.members
        self._inside = [item for item in lessons.inside for _ in range(LOGGED if item.kind == "logged" else 1)]
        self._outside = lessons.outside
        self._companions = _companions(lessons)
        self._strangers = sorted({chunk_id for item in lessons.outside for chunk_id in item.chunks})

    def epoch(self, number: int) -> list[tuple[Item, Context]]:
        """Every item of the cluster with a variant of its own, and some from elsewhere, in an order that is drawn."""
        random = np.random.default_rng([self._seed, number])
        inside = [self._inside[place] for place in random.permutation(len(self._inside))]
        share = len(inside) / (CLOSED + PARTIAL + BESIDE)
        closed, partial = round(CLOSED * share), round(PARTIAL * share)
        drawn = [
            *((item, ()) for item in inside[:closed]),
            *((item, self._partial(item, random)) for item in inside[closed : closed + partial]),
            *((item, self._stranger(random)) for item in inside[closed + partial :]),
            *self._elsewhere(round(ELSEWHERE * share), inside, random),
        ]
        return [drawn[place] for place in random.permutation(len(drawn))]

    def _partial(self, item: Item, random: np.random.Generator) -> Context:
        kept = tuple(chunk_id for chunk_id in item.chunks if chunk_id not in self._members)
        beside = sorted({other for chunk_id in item.chunks for other in self._companions[chunk_id]})
        return kept or (_one(beside, random) if beside else self._stranger(random))

    def _stranger(self, random: np.random.Generator) -> Context:
        return _one(self._strangers, random) if self._strangers else ()

    def _elsewhere(self, count: int, inside: Sequence[Item], random: np.random.Generator) -> list[tuple[Item, Context]]:
        items = self._outside or inside
        places = np.resize(random.permutation(len(items)), count).tolist()  # none twice before each has come once
        return [(items[place], items[place].chunks) for place in places]


def _companions(lessons: Lessons) -> Mapping[int, set[int]]:
    """The uncovered passages that logged questions had beside each covered one."""
    beside: dict[int, set[int]] = defaultdict(set)
    for item in lessons.inside:
        for chunk_id in lessons.members.intersection(item.chunks):
            beside[chunk_id].update(set(item.chunks) - lessons.members)
    return beside


def _one(chunks: Sequence[int], random: np.random.Generator) -> Context:
    return (chunks[int(random.integers(len(chunks)))],)


class _Book:
    """Numbers contexts, questions and examples as they first come, each once, and writes them as arrays."""

    def __init__(self, lessons: Lessons, layout: Layout) -> None:
        self._taught = lessons.taught
        self._layout = layout
        self._passages = {chunk_id: layout.passage(passage) for chunk_id, passage in lessons.passages.items()}
        self._contexts: dict[Context, int] = {}
        self._items: dict[int, tuple[int, Item]] = {}  # a question and its answer have the same number
        self._examples: dict[tuple[int, int], int] = {}

    def example(self, item: Item, context: Context) -> int:
        """The number of this question in this context. Passages that are gone are left out."""
        kept = tuple(chunk_id for chunk_id in context if chunk_id in self._passages)
        read = self._contexts.setdefault(kept, len(self._contexts))
        asked, _ = self._items.setdefault(item.id, (len(self._items), item))
        return self._examples.setdefault((read, asked), len(self._examples))

    def examples(self, order: Sequence[Sequence[int]]) -> Examples:
        """All of it, with the order of the examples in each epoch."""
        items = [item for _, item in self._items.values()]
        answers = [self._taught[item.id] for item in items]
        contexts, context_ends = _flat([self._tokens(context) for context in self._contexts])
        tails, tail_ends = _flat([self._layout.tail(item.question) for item in items])
        tokens, answer_ends = _flat([answer.tokens for answer in answers])
        return Examples(
            contexts=contexts,
            context_ends=context_ends,
            tails=tails,
            tail_ends=tail_ends,
            answers=tokens,
            answer_ends=answer_ends,
            top_ids=np.concatenate([answer.top_ids for answer in answers]).reshape(-1, TOP),
            top_logprobs=np.concatenate([answer.top_logprobs for answer in answers]).reshape(-1, TOP),
            examples=np.array([(read, asked, asked) for read, asked in self._examples], np.int32),
            order=np.array(order, np.int32),
        )

    def _tokens(self, context: Context) -> Tokens:
        passages = (token for chunk_id in context for token in self._passages[chunk_id])
        return (*self._layout.prefix, *passages)


def _flat(lists: Sequence[Sequence[int] | Int32]) -> tuple[Int32, Int64]:
    ends = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    return np.concatenate([np.asarray(each, np.int32) for each in lists]), ends
