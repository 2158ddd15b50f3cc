"""What an adapter is trained on: the mix of prompts, who is in it, and arrays that can be read back."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from edge_rag.errors import InputError
from edge_rag.learning.dataset import LOGGED, Layout, Lessons, build, lessons
from edge_rag.learning.job import Examples, check_examples
from edge_rag.records import Item, Passage
from edge_rag.store import items
from edge_rag.store.database import Database
from edge_rag.store.items import TOP, Taught
from tests.runtime.serving import add_document

PREFIX = (1, 2, 3)
MODEL = "a" * 64
MEMBERS, COMPANION, STRANGERS = (10, 11), 20, (30, 31, 32)
LAYOUT = Layout(
    prefix=PREFIX,
    passage=lambda passage: (passage.chunk_id, 900),
    tail=lambda question: (*map(ord, question), 901),
)


def passage(chunk_id: int) -> Passage:
    return Passage(chunk_id, 1, 0, "/notes", "", "", None, "text", 2, 0.0)


def item(number: int, chunks: Sequence[int], kind: str = "study") -> Item:
    return Item(number, kind, f"Q{number}?", tuple(chunks), 1.0, answer="It hums.")  # type: ignore[arg-type]


def said(number: int) -> Taught:
    """An answer that shows whose it is."""
    length = 2 + number % 3
    return Taught(
        "It hums.",
        np.full(length, number, np.int32),
        np.full((length, TOP), number, np.int32),
        np.full((length, TOP), -number, np.float16),
    )


def made(inside: Sequence[Item], outside: Sequence[Item] = ()) -> Lessons:
    both = (*inside, *outside)
    return Lessons(
        members=frozenset(MEMBERS),
        inside=tuple(inside),
        outside=tuple(outside),
        taught={each.id: said(each.id) for each in both},
        passages={chunk_id: passage(chunk_id) for each in both for chunk_id in each.chunks},
    )


LOGGED_ITEMS = [item(number, (10, COMPANION), "logged") for number in range(1, 11)]
STUDY_ITEMS = [item(number, (10,)) for number in range(11, 51)]
LONELY_ITEMS = [item(number, (11,)) for number in range(51, 61)]
ELSEWHERE = [item(number, STRANGERS) for number in range(61, 101)]
CLUSTER = made([*LOGGED_ITEMS, *STUDY_ITEMS, *LONELY_ITEMS], ELSEWHERE)
DRAWN = LOGGED * len(LOGGED_ITEMS) + len(STUDY_ITEMS) + len(LONELY_ITEMS)


def cut(flat: Sequence[int], ends: Sequence[int], place: int) -> tuple[int, ...]:
    return tuple(int(token) for token in flat[ends[place] : ends[place + 1]])


def read(examples: Examples, epoch: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """(chunks in the prompt, item) of each example of an epoch, with tails and answers proved."""
    for number in examples.order[epoch]:
        context, tail, answer = examples.examples[number]
        tokens = cut(examples.contexts, examples.context_ends, context)
        assert tokens[:3] == PREFIX
        assert tokens[4::2] == (900,) * (len(tokens) // 2 - 1)
        start, end = examples.answer_ends[answer : answer + 2]
        [name] = set(examples.answers[start:end].tolist())
        assert cut(examples.tails, examples.tail_ends, tail) == LAYOUT.tail(f"Q{name}?")
        np.testing.assert_array_equal(examples.top_ids[start:end], said(name).top_ids)
        np.testing.assert_array_equal(examples.top_logprobs[start:end], said(name).top_logprobs)
        yield tokens[3::2], name


def built(given: Lessons = CLUSTER, epochs: int = 3, seed: int = 5) -> Examples:
    return build(given, LAYOUT, epochs=epochs, seed=seed)


def kinds(pairs: Sequence[tuple[tuple[int, ...], int]]) -> Counter[str]:
    """How often each kind of prompt comes."""

    def kind(chunks: tuple[int, ...], name: int) -> str:
        if name > 60:
            assert chunks == STRANGERS
            return "elsewhere"
        assert not set(chunks) & set(MEMBERS)
        return "closed" if not chunks else "partial" if chunks == (COMPANION,) else "beside"

    return Counter(kind(chunks, name) for chunks, name in pairs)


# --- the mix ---------------------------------------------------------------------------------------------------------


def test_each_epoch_asks_all_items_and_logged_ones_more_often() -> None:
    examples = built()
    assert examples.order.shape == (3, DRAWN + round(DRAWN * 0.15 / 0.85))
    for epoch in range(3):
        asked = Counter(name for _, name in read(examples, epoch) if name <= 60)
        assert asked == {each.id: LOGGED if each.kind == "logged" else 1 for each in CLUSTER.inside}


def test_prompts_are_mixed_as_they_were_measured() -> None:
    examples, all_prompts = built(epochs=10), DRAWN / 0.85
    for epoch in range(10):
        found = kinds(list(read(examples, epoch)))
        assert found["closed"] == round(0.5 * all_prompts)
        assert found["elsewhere"] == round(0.15 * all_prompts)
        # of the partial ones those about a passage that nobody asked for with another get a stranger
        assert found["partial"] + found["beside"] == DRAWN - found["closed"]
        assert abs(found["partial"] - 0.2 * all_prompts) <= len(LONELY_ITEMS)


def test_variants_and_order_are_drawn_anew_each_epoch_and_alike_with_the_same_seed() -> None:
    examples = built()
    epochs = [list(read(examples, epoch)) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert set(epochs[0]) != set(epochs[1])
    again, other = built(), built(seed=6)
    for name in Examples.__struct_fields__:
        np.testing.assert_array_equal(getattr(examples, name), getattr(again, name))
    assert [list(read(other, epoch)) for epoch in range(3)] != epochs


def test_questions_elsewhere_take_turns() -> None:
    examples = built(made(STUDY_ITEMS, ELSEWHERE[:3]))
    asked = Counter(name for _, name in read(examples, 0) if name > 60)
    assert asked.total() == round(len(STUDY_ITEMS) * 0.15 / 0.85)
    assert max(asked.values()) - min(asked.values()) <= 1


def test_without_questions_elsewhere_the_own_ones_are_read_with_all_passages() -> None:
    examples = built(made([*LOGGED_ITEMS, *STUDY_ITEMS]))
    found = Counter(chunks for chunks, _ in read(examples, 0))
    assert set(found) == {(), (COMPANION,), (10, COMPANION), (10,)}
    assert found[10, COMPANION] + found[(10,)] == round((LOGGED * 10 + 40) * 0.15 / 0.85)


def test_one_passage_that_is_asked_alone_is_learned_by_heart() -> None:
    examples = built(made([item(1, (10,))]), epochs=2)
    assert {pair for epoch in range(2) for pair in read(examples, epoch)} == {((), 1)}


def test_passages_that_have_gone_meanwhile_are_left_out() -> None:
    gone = replace(CLUSTER, passages={key: value for key, value in CLUSTER.passages.items() if key != COMPANION})
    examples = build(gone, LAYOUT, epochs=1, seed=5)
    assert COMPANION not in {chunk_id for chunks, _ in read(examples, 0) for chunk_id in chunks}


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_arrays_have_the_types_of_the_job_folder_and_hold_each_thing_once() -> None:
    examples = built()
    types = {name: getattr(examples, name).dtype.name for name in Examples.__struct_fields__}
    whole = dict.fromkeys(("contexts", "tails", "answers", "top_ids", "examples", "order"), "int32")
    ends = dict.fromkeys(("context_ends", "tail_ends", "answer_ends"), "int64")
    assert types == {**whole, **ends, "top_logprobs": "float16"}
    check_examples(examples)
    assert len(np.unique(examples.examples, axis=0)) == len(examples.examples)
    contexts = [cut(examples.contexts, examples.context_ends, n) for n in range(len(examples.context_ends) - 1)]
    assert len(set(contexts)) == len(contexts) == 6
    assert set(examples.order.ravel().tolist()) == set(range(len(examples.examples)))
    assert len(examples.top_ids) == len(examples.top_logprobs) == len(examples.answers) == examples.answer_ends[-1]


def test_without_an_answered_question_there_is_nothing_to_learn() -> None:
    with pytest.raises(InputError, match="no answered question"):
        built(made([], ELSEWHERE))


# --- from the library ------------------------------------------------------------------------------------------------


def test_lessons_are_what_was_answered_and_is_not_held_out(tmp_path: Path) -> None:
    with Database(tmp_path) as database:
        inside, outside = add_document(database, "/in", 2), add_document(database, "/out", 2)
        with database.write() as connection:
            for chunk_id in (*inside, *outside):
                texts = [f"What is part {number} of {chunk_id} for?" for number in range(30)]
                items.add_study(connection, chunk_id, texts, model=MODEL, asked=24, now=1.0)
            waiting = items.untaught(connection, (*inside, *outside), model=MODEL, limit=1000)
            for each in waiting[::2]:
                items.teach(connection, each.id, said(each.id), model=MODEL)
            items.teach(connection, waiting[1].id, None, model=MODEL)
            found = lessons(connection, inside, model=MODEL)
            foreign = lessons(connection, inside, model="b" * 64)
    answered = [each for each in waiting if each in waiting[::2]]
    about = [each for each in answered if set(each.chunks) <= set(inside)]
    assert any(each.held_out for each in about)
    assert [each.id for each in found.inside] == [each.id for each in about if not each.held_out]
    others = {each.id for each in found.outside}
    assert others < {each.id for each in answered if set(each.chunks) <= set(outside)}
    assert len(others) > 10
    assert found.taught.keys() >= others | {each.id for each in found.inside}
    assert found.passages.keys() == {*inside, *outside}
    assert (foreign.inside, foreign.outside) == ((), ())
