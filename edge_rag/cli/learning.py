"""train, idle: learning now, and a piece of what is done while nobody asks."""

import datetime
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from edge_rag.cli import show
from edge_rag.cli.app import app, options, out
from edge_rag.cli.documents import Json
from edge_rag.cli.learned import kept, line, short
from edge_rag.client import Client
from edge_rag.errors import InputError
from edge_rag.records import LearningStatus, Lesson

if TYPE_CHECKING:
    from edge_rag.runtime.rag import EdgeRAG


@app.command()
def train(
    all_: Annotated[
        bool, typer.Option("--all", help="Clusters with few questions too (see learning.least_questions).")
    ] = False,
    until: Annotated[
        str | None, typer.Option(metavar="HH:MM", help="Stop at this time; what was not finished goes on next time.")
    ] = None,
    json: Json = False,
) -> None:
    """Learn now instead of while idle: one cluster after the other becomes an adapter. Questions go first."""
    limit = None if until is None else next_time(until, datetime.datetime.now())
    with options.open() as rag, show.bar() as bar:

        def progress(now: LearningStatus) -> None:
            if now.total:
                bar(now.doing, now.done, now.total)

        lessons = _learn(rag, all_, limit, progress)
        learning = rag.status().learning
    if json:
        show.as_json(lessons)
        return
    if lessons:
        columns = ["cluster", "passages", "questions", "seen", "unseen", "took", "outcome"]
        show.table(columns, [_row(each) for each in lessons], right=(0, 1, 2, 3, 4, 5))
    out.print(Text(_ending(lessons, learning.waiting if learning else "", limit)))


def _learn(
    rag: "EdgeRAG | Client", all_: bool, until: float | None, progress: Callable[[LearningStatus], None]
) -> list[Lesson]:
    """Which clusters are worth it is a setting of whoever does the work."""
    if isinstance(rag, Client):
        return rag.learn(least=0.0 if all_ else None, until=until, progress=progress)
    least = 0.0 if all_ else rag.settings.learning.least_questions
    return rag.learn(least=least, until=until, progress=progress)


def next_time(text: str, now: datetime.datetime) -> float:
    """When it is `text` (HH:MM) next after `now`, both on the local clock, since the epoch. Raises InputError."""
    try:
        wanted = datetime.datetime.strptime(text, "%H:%M").time()
    except ValueError as error:
        raise InputError(f"{text!r} is no time of day", field="--until", remedy="as in --until 06:00") from error
    today = datetime.datetime.combine(now.date(), wanted)
    return (today if today > now else today + datetime.timedelta(days=1)).timestamp()


def _row(lesson: Lesson) -> list[str]:
    outcome = f"adapter {short(lesson.adapter)}" if lesson.adapter else line(lesson.reason)
    counts = [str(lesson.cluster_id), str(lesson.passages), str(lesson.items)]
    return [*counts, *kept(lesson.gate), show.seconds(lesson.seconds), outcome]


def _ending(lessons: list[Lesson], waiting: str, limit: float | None) -> str:
    """Why it went no further."""
    if waiting:
        return f"stopped: {line(waiting)}"
    if limit and time.time() >= limit:
        return "time is up; what is not finished goes on next time"
    if lessons:
        made = sum(bool(lesson.adapter) for lesson in lessons)
        return f"{made} of {len(lessons)} clusters became adapters; nothing is left to learn"
    return "nothing to learn: no cluster is new, or has questions enough (--all takes those with few)"


@app.command()
def idle(
    once: Annotated[bool, typer.Option("--once", help="One piece of it, and no more.")],
    json: Json = False,
) -> None:
    """Do a piece of the work that is done while nobody asks: check answers, read ahead, learn."""
    with options.open() as rag:
        done = rag.idle_once()
        learning = rag.status().learning
    waiting = learning.waiting if learning else ""
    if json:
        show.as_json({"done": done, "waiting": waiting})
        return
    out.print(done or "nothing to do")
    if waiting:
        out.print(Text(f"nothing is learned: {line(waiting)}"))
