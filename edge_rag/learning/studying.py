"""Study questions: the model asks itself about one passage, so that an adapter learns more of it than the log asked.

More and more varied questions matter most for questions that nobody has asked yet (29 a passage instead of 10: F1 27
instead of 15; docs/log.md). Small models repeat themselves within one list, so each round asks in several ways, for
short lists, with another seed; what earlier rounds brought does not count again (`policy.study`).
"""

from collections.abc import Callable, Sequence

from edge_rag.policy.study import distinct, parse_questions

ROUNDS = 6  # at most

REQUESTS = tuple(
    f"Write 8 short questions about {subject} that the passage answers. Each question must name what it asks about, "
    "so that it can be understood without the passage. Write one question on each line, and no answers."
    for subject in (
        "the names, persons and things",
        "the numbers, amounts and dates",
        "the reasons and causes",
        "how things are done, and where",
    )
)

Write = Callable[[int, Sequence[str], int], Sequence[str]]
"""write(chunk id, requests, seed): what the model writes to each request, with that passage in its prompt."""


def study_questions(chunk_id: int, write: Write, *, wanted: int, known: Sequence[str] = ()) -> list[str]:
    """At most `wanted` questions about a passage that differ from each other and from `known`.

    Ends when a round brings no new one. What `write` raises goes through.
    """
    found: list[str] = []
    for number in range(ROUNDS):
        if len(found) >= wanted:
            break
        texts = write(chunk_id, REQUESTS, number)
        asked = [question for text in texts for question in parse_questions(text)]
        new = distinct(asked, (*known, *found))
        if not new:
            break
        found += new
    return found[:wanted]
