"""Study questions: the model asks itself about one passage, so that an adapter learns more of it than the log asked.

More and more varied questions matter most for questions that nobody has asked yet (29 a passage instead of 10: F1 27
instead of 15; docs/log.md). Asked in words for varied questions, small models wander off: SmolLM2-135M wrote of cars,
and little of it was a question. So the answer is begun for them, with a list and a question word: they go on with the
passage. Each round begins in other ways and with another seed; what earlier rounds brought does not count again
(`policy.study`).
"""

from collections.abc import Callable, Sequence

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


Write = Callable[[int, Sequence[Request], int], Sequence[str]]
"""write(chunk id, requests, seed): what the model writes to each request with that passage in its prompt, including the
words that it began with."""


def requests(number: int) -> tuple[Request, ...]:
    """The requests of a round."""
    return tuple(Request(REQUEST, f"1. {words}") for words in BEGINNINGS[number % len(BEGINNINGS)])


def study_questions(chunk_id: int, write: Write, *, wanted: int, known: Sequence[str] = ()) -> list[str]:
    """At most `wanted` questions about a passage that differ from each other and from `known`.

    Ends when a round brings no new one. What `write` raises goes through.
    """
    found: list[str] = []
    for number in range(ROUNDS):
        if len(found) >= wanted:
            break
        texts = write(chunk_id, requests(number), number)
        asked = [question for text in texts for question in parse_questions(text)]
        new = distinct(asked, (*known, *found))
        if not new:
            break
        found += new
    return found[:wanted]
