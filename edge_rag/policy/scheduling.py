"""Which request is taken next, and what goes into the next batch: decided from values, so that it can be printed.

One prompt is read at a time while any number of answers are written: reading two prompts in turns would delay the first
word of both. What is being read goes through in pieces, and each piece takes one token of every answer along (chunked
prefill: Agrawal et al., SARATHI, arXiv 2308.16369). While answers are written the pieces are smaller, so that their
words keep coming.

A batch has one adapter set, so requests form lanes by adapter, and lanes take turns. Of the waiting requests, one that
begins with the passages of an answer that is being written goes first: their KV is there already and is shared
(RAG-DCache's dynamic batching, arXiv 2504.11765). Nobody is overtaken more than `OVERTAKEN` times: then nothing is
taken before him, until he fits.
"""

from collections.abc import Sequence
from itertools import takewhile

from edge_rag.records import Record, Step

OVERTAKEN = 8  # times that later requests may be taken before one
SMALLER = 4  # while answers are written, a prompt is read in pieces of n_batch / SMALLER tokens
LEAST_PIECE = 16  # tokens


class Job(Record, frozen=True):
    """A request. `keys` name its passages in order; `cells` is what it may fill at most, in tokens."""

    id: int
    cells: int
    lane: str = ""
    keys: tuple[str, ...] = ()
    overtaken: int = 0


class Reading(Record, frozen=True):
    """So many tokens of a prompt are still to be read, in this lane."""

    tokens: int
    lane: str = ""


def admit(waiting: Sequence[Job], active: Sequence[Job], *, free_cells: int) -> Job | None:
    """The request to take next, of those that wait in the order of their arrival; None when none fits or may go first.

    The caller counts an overtaking for all that arrived before the chosen one.
    """
    if waiting and waiting[0].overtaken >= OVERTAKEN:  # the oldest has been overtaken most often
        return waiting[0] if waiting[0].cells <= free_cells else None
    fitting = [job for job in waiting if job.cells <= free_cells]
    return max(fitting, key=lambda job: _attraction(job, active), default=None)


def _attraction(job: Job, active: Sequence[Job]) -> tuple[bool, int]:
    """A lane that is served already, then the number of passages that are there already; the first of equals wins."""
    there = max((shared(job.keys, other.keys) for other in active), default=0)
    return any(other.lane == job.lane for other in active), there


def shared(keys: Sequence[str], others: Sequence[str]) -> int:
    """How many leading keys are the same."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(keys, others, strict=False))))


def next_step(
    reading: Reading | None, writers: Sequence[Job], *, n_batch: int, served: Sequence[str] = ()
) -> Step | None:
    """The next batch; None when there is nothing to do. `served` are the lanes of earlier steps, the last one last.

    There are fewer writers than `n_batch`, so that each gets its turn and reading goes on.
    """
    lanes = dict.fromkeys([*([reading.lane] if reading else []), *(job.lane for job in writers)])
    if not lanes:
        return None
    lane = min(lanes, key=lambda lane: _last(served, lane))
    chosen = tuple(job.id for job in writers if job.lane == lane)
    piece = n_batch if not writers else max(LEAST_PIECE, n_batch // SMALLER)
    room = min(piece, n_batch - len(chosen))
    tokens = min(reading.tokens, room) if reading and reading.lane == lane else 0
    return Step(lane, tokens, chosen)


def _last(served: Sequence[str], lane: str) -> int:
    """When a lane was served last; -1 for never."""
    return max((place for place, name in enumerate(served) if name == lane), default=-1)
