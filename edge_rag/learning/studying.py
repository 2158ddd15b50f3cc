"""Study questions: the model asks itself about one passage, so that an adapter learns more of it than the log asked.

More and more varied questions matter most for questions that nobody has asked yet (29 a passage instead of 10: F1 27
instead of 15; docs/log.md). Asked in words for varied questions, small models wander off: SmolLM2-135M wrote of cars,
and little of it was a question. So the answer is begun for them, with a list and a question word: they go on with the
passage. Each round begins in other ways and with another seed; what earlier rounds brought does not count again
(`policy.study`).
"""

from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from edge_rag.policy.study import distinct, parse_questions

ROUNDS = 6  # at most
REQUEST = "Write exam questions about the facts above, one a line."
BEGINNINGS = (
    ("What is", "Who", "When", "How many"),
    ("Why", "Where", "How", "Which"),
    ("How long", "What does", "What must", "How often"),
)


class Request(Struct, frozen=True):
    """What is asked for, and the words with which the answer begins."""

    text: str
    begun: str


Write = Callable[[Sequence[tuple[int, Request]], int], Sequence[str]]
"""write([(chunk id, request), …], seed): what the model writes to each request with that passage in its prompt, from
the words on that it began with."""


def requests(number: int) -> tuple[Request, ...]:
    """The requests of a round."""
    return tuple(Request(REQUEST, f"1. {words}") for words in BEGINNINGS[number % len(BEGINNINGS)])


def study_questions(
    chunks: Sequence[int], write: Write, *, wanted: int, known: Mapping[int, Sequence[str]]
) -> dict[int, list[str]]:
    """At most `wanted` questions about each passage, by chunk id, other than each other and than the `known` ones.

    Passages are asked about together, each until a round brings no new question. What `write` raises goes through.
    """
    found: dict[int, list[str]] = {chunk: [] for chunk in chunks}
    going = list(chunks) if wanted else []
    for number in range(ROUNDS):
        if not going:
            break
        asked = [(chunk, request) for chunk in going for request in requests(number)]
        brought: dict[int, list[str]] = {chunk: [] for chunk in going}
        for (chunk, _), text in zip(asked, write(asked, number), strict=True):
            brought[chunk] += parse_questions(text)
        for chunk, questions in brought.items():
            new = distinct(questions, (*known.get(chunk, ()), *found[chunk]))
            found[chunk] += new
            if not new or len(found[chunk]) >= wanted:
                going.remove(chunk)
    return {chunk: questions[:wanted] for chunk, questions in found.items()}
